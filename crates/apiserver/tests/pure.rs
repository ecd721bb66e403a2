//! Laws of the parts that do no I/O.

use apiserver::apply::Set;
use apiserver::quantity::Quantity;
use apiserver::request::{Accept, Info, query};
use apiserver::selector::Labels;
use apiserver::{builtin, decode, kinds, names, protobuf, schema};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::sync::Arc;

fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        "[a-z:.]{0,6}".prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 40, 5, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            proptest::collection::btree_map("[fkvi.]:?[a-z]{0,3}", inner, 0..4)
                .prop_map(|m| json!(m)),
        ]
    })
}

#[test]
fn every_built_in_resource_has_its_published_schema() {
    for resource in builtin::resources() {
        let spec_or_data = resource.schema.properties.keys().any(|k| &**k != "metadata");
        assert!(spec_or_data, "{} has no schema", resource.key());
        assert!(resource.schema.properties.contains_key("metadata"), "{}", resource.key());
    }
    assert!(schema::metadata().properties.contains_key("ownerReferences"));
}

/// A field of a message, as protobuf has it: its number, its length and its bytes.
fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    [&[number << 3 | 2, bytes.len() as u8], bytes].concat()
}

/// Go's client writes what is empty too.
#[test]
fn an_object_in_protobuf_is_what_it_is_in_json() {
    let zero_time = field(8, &[]);
    let labels = field(11, &[field(1, b"a"), field(2, b"b")].concat());
    let meta =
        [field(1, b"n"), field(2, b""), field(3, b""), vec![7 << 3, 0], zero_time, labels].concat();
    let object = [field(1, &meta), field(2, &[]), field(3, &field(1, b""))].concat();
    let kind = [field(1, b"v1"), field(2, b"Namespace")].concat();
    let mut bytes =
        [b"k8s\0".to_vec(), field(1, &kind), field(2, &object), field(3, b""), field(4, b"")]
            .concat();
    assert_eq!(
        protobuf::decode(&bytes).unwrap(),
        json!({
            "apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "n", "labels": {"a": "b"}},
            "spec": {}, "status": {},
        })
    );
    bytes.truncate(30);
    assert_eq!(protobuf::decode(&bytes).unwrap_err().code, 400);
}

#[test]
fn fields_that_are_given_twice_are_told_by_their_paths() {
    let text = br#"{"a": {"b": 1, "b": 2}, "c": [{"d": 1, "d": 1}]}"#;
    let decoded = decode::json(text).unwrap();
    assert_eq!(decoded.value["a"]["b"], 2);
    assert_eq!(decoded.duplicates, ["a.b", "c[0].d"]);
}

#[test]
fn quantities_are_read_and_written_as_kubernetes_does() {
    for (text, wanted) in [
        ("1000m", "1"),
        ("0.5", "500m"),
        ("1Gi", "1Gi"),
        ("1024Mi", "1Gi"),
        ("1500Mi", "1500Mi"),
        ("1e3", "1e3"),
        ("1000", "1k"),
        ("128974848", "128974848"),
        ("0", "0"),
        ("-2", "-2"),
        ("1.5Gi", "1536Mi"),
    ] {
        assert_eq!(Quantity::parse(text).unwrap().to_string(), wanted, "{text}");
    }
    for wrong in ["", "x", "1x", "1..2", "1.2.3", "--1", "1 Gi", "Gi", ".", "1e99"] {
        assert!(Quantity::parse(wrong).is_none(), "{wrong}");
    }
}

#[test]
fn a_default_that_was_filled_in_is_not_filled_in_again() {
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"},
        "spec": {
            "containers": [{"name": "c", "image": "a", "resources": {"limits": {"cpu": "1"}}, "ports": [{"containerPort": 1}],
                "livenessProbe": {"httpGet": {"port": 1}}}],
            "volumes": [{"name": "v"}, {"name": "s", "secret": {"secretName": "x"}}],
        },
    });
    let kind = kinds::kind("pods");
    let mut once = pod;
    (kind.default)(&mut once);
    assert_eq!((kind.validate)(&once), []);
    assert_eq!((kind.validate_update)(&once, &once), []);
    let mut twice = once.clone();
    (kind.default)(&mut twice);
    assert_eq!(once, twice);
    assert_eq!(once["spec"]["containers"][0]["imagePullPolicy"], "Always");
    assert_eq!(once["spec"]["containers"][0]["resources"]["requests"]["cpu"], "1");
}

proptest! {
    #[test]
    fn sums_of_quantities_are_exact(a in -1_000_000_000i64..1_000_000_000, b in -1_000_000_000i64..1_000_000_000) {
        let of = |n: i64| Quantity::parse(&format!("{n}m")).unwrap();
        let sum = of(a).plus(of(b));
        prop_assert_eq!(sum, of(a + b));
        prop_assert_eq!(Quantity::parse(&sum.to_string()).unwrap(), sum);
        prop_assert_eq!(sum.minus(of(b)), of(a));
    }

    #[test]
    fn a_selector_is_what_it_was_when_it_is_read_again(
        keys in proptest::collection::vec("[a-z]{1,4}", 1..4),
        values in proptest::collection::vec("[a-z0-9]{1,4}", 1..3),
        how in proptest::collection::vec(0..6usize, 1..4),
    ) {
        let all = values.join(",");
        let parts: Vec<String> = keys.iter().zip(&how).map(|(key, how)| match how {
            0 => format!("{key}={}", values[0]),
            1 => format!("{key}!={}", values[0]),
            2 => format!("{key} in ({all})"),
            3 => format!("{key} notin ({all})"),
            4 => key.clone(),
            _ => format!("!{key}"),
        }).collect();
        let selector = Labels::parse(&parts.join(",")).unwrap();
        prop_assert_eq!(&Labels::parse(&selector.to_string()).unwrap(), &selector);
    }

    #[test]
    fn a_set_of_fields_is_what_it_was_when_it_is_read_again(fields in value()) {
        let set = Set::from_json(&fields);
        prop_assert_eq!(&Set::from_json(&set.to_json()), &set);
        prop_assert!(set.minus(&set).is_empty());
        prop_assert_eq!(&set.union(&set), &set);
    }

    #[test]
    fn whatever_is_pruned_and_completed_is_so_once_and_never_breaks(spec in value()) {
        let resource: Arc<_> = builtin::resources().into_iter().find(|r| r.key() == "pods").unwrap();
        let mut object = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": spec});
        resource.schema.prune(&mut object);
        resource.schema.fill_in(&mut object);
        // Kubernetes' own defaults come before validation, which then may find anything.
        (kinds::kind("pods").default)(&mut object);
        let mut again = object.clone();
        prop_assert!(resource.schema.prune(&mut again).is_empty());
        let _ = resource.schema.validate(&again, None);
        let _ = (kinds::kind("pods").validate)(&again);
    }

    #[test]
    fn any_bytes_are_an_object_or_a_failure(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = decode::json(&bytes);
        let _ = decode::yaml(&bytes);
        let mut body = b"k8s\0".to_vec();
        body.extend(&bytes);
        let _ = protobuf::decode(&body);
    }

    #[test]
    fn any_request_line_is_understood_or_refused(path in "/[ -~]{0,60}", text in "[ -~]{0,60}") {
        let _ = Info::parse(&path);
        let _ = query(&text);
        let _ = Accept::parse(Some(&text));
        let _ = Labels::parse(&text);
        let _ = names::subdomain(&text);
    }
}
