//! Custom resources.

use crate::world::World;
use serde_json::{Value, json};

const CRDS: &str = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
const WIDGETS: &str = "/apis/example.com/v1/namespaces/default/widgets";

fn crd() -> Value {
    json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": "widgets.example.com"},
        "spec": {
            "group": "example.com", "scope": "Namespaced",
            "names": {"plural": "widgets", "kind": "Widget", "shortNames": ["wd"]},
            "versions": [{
                "name": "v1", "served": true, "storage": true,
                "subresources": {"status": {}},
                "schema": {"openAPIV3Schema": {"type": "object", "properties": {
                    "spec": {
                        "type": "object", "required": ["size"],
                        "x-kubernetes-validations": [
                            {"rule": "self.size <= self.max", "message": "size must not exceed max"},
                            {"rule": "self.color == oldSelf.color", "message": "color is immutable"},
                        ],
                        "properties": {
                            "size": {"type": "integer", "minimum": 1},
                            "max": {"type": "integer", "default": 10},
                            "color": {"type": "string", "enum": ["red", "blue"], "default": "red"},
                            "port": {"x-kubernetes-int-or-string": true},
                            "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": true},
                        },
                    },
                    "status": {"type": "object", "properties": {"ready": {"type": "boolean"}}},
                }}},
            }, {
                "name": "v1beta1", "served": true, "storage": false,
                "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}},
            }],
        },
    })
}

fn widget(name: &str, spec: Value) -> Value {
    json!({"apiVersion": "example.com/v1", "kind": "Widget", "metadata": {"name": name}, "spec": spec})
}

#[tokio::test]
async fn a_crd_is_served_when_it_is_acknowledged_and_takes_its_objects_with_it() {
    let world = World::new().await;
    world.serve(crd()).await;
    let made = world
        .create(WIDGETS, widget("a", json!({"size": 3, "odd": 1, "free": {"x": [1]}})))
        .await
        .unwrap();
    assert_eq!(made["spec"], json!({"size": 3, "max": 10, "color": "red", "free": {"x": [1]}}));
    assert_eq!(made["metadata"]["generation"], 1);
    let beta = world.get(&WIDGETS.replace("v1", "v1beta1")).await.unwrap();
    assert_eq!(beta["items"][0]["apiVersion"], "example.com/v1beta1");
    world.delete(&format!("{CRDS}/widgets.example.com"), json!({})).await.unwrap();
    world.until_gone(&format!("{CRDS}/widgets.example.com")).await;
    assert_eq!(world.get(WIDGETS).await.unwrap_err().code, 404);
    // One of the same name does not find what is gone.
    world.serve(crd()).await;
    assert_eq!(world.get(WIDGETS).await.unwrap()["items"], json!([]));
}

#[tokio::test]
async fn schemas_and_rules_are_kept() {
    let world = World::new().await;
    world.serve(crd()).await;
    let cases = [
        (json!({}), "spec.size: Required value"),
        (json!({"size": 0}), "spec.size in body should be greater than or equal to 1"),
        (json!({"size": "x"}), "spec.size in body must be of type integer: \"string\""),
        (
            json!({"size": 1, "color": "green"}),
            "Unsupported value: \"green\": supported values: \"red\", \"blue\"",
        ),
        (json!({"size": 11}), "size must not exceed max"),
        (json!({"size": 1, "port": true}), "spec.port"),
    ];
    let rules = world.has(25, "rules in schemas");
    for (spec, why) in cases.into_iter().filter(|(_, why)| rules || !why.contains("exceed")) {
        let refused = world.create(WIDGETS, widget("a", spec.clone())).await.unwrap_err();
        assert_eq!(refused.code, 422, "{spec}");
        assert!(refused.message.contains(why), "{spec}: {refused}");
    }
    let made = world.create(WIDGETS, widget("a", json!({"size": 1}))).await.unwrap();
    if !rules {
        return;
    }
    let mut blue = made.clone();
    blue["spec"]["color"] = "blue".into();
    let refused = world.put(&format!("{WIDGETS}/a"), &blue).await.unwrap_err();
    assert!(refused.message.contains("color is immutable"), "{refused}");
}

#[tokio::test]
async fn status_and_the_rest_are_written_apart_and_generation_counts_what_is_wanted() {
    let world = World::new().await;
    world.serve(crd()).await;
    let path = format!("{WIDGETS}/a");
    let mut object = widget("a", json!({"size": 1}));
    object["status"] = json!({"ready": true});
    let mut made = world.create(WIDGETS, object).await.unwrap();
    assert!(made.get("status").is_none());
    made["status"] = json!({"ready": true});
    made["spec"]["size"] = 2.into();
    let after_status = world.put(&format!("{path}/status"), &made).await.unwrap();
    assert_eq!(
        (&after_status["status"]["ready"], &after_status["spec"]["size"]),
        (&json!(true), &json!(1))
    );
    assert_eq!(after_status["metadata"]["generation"], 1);
    let mut wanted = after_status.clone();
    wanted["spec"]["size"] = 3.into();
    wanted["status"] = json!({"ready": false});
    let after_spec = world.put(&path, &wanted).await.unwrap();
    assert_eq!(
        (&after_spec["status"]["ready"], &after_spec["spec"]["size"]),
        (&json!(true), &json!(3))
    );
    assert_eq!(after_spec["metadata"]["generation"], 2);
    let strategic =
        world.patch(&path, "application/strategic-merge-patch+json", json!({})).await.unwrap_err();
    assert_eq!(strategic.code, 415);
    let mut blind = after_spec;
    blind["metadata"]["resourceVersion"] = Value::Null;
    assert!(
        world
            .put(&path, &blind)
            .await
            .unwrap_err()
            .message
            .contains("must be specified for an update")
    );
}

#[tokio::test]
async fn a_schema_that_is_none_is_refused_with_where() {
    let world = World::new().await;
    let spec = "/spec/versions/0/schema/openAPIV3Schema/properties/spec";
    let cases: [(&str, Value, &str); 6] = [
        ("/properties/size/type", json!("number of"), "type: Unsupported value"),
        ("/properties/color/default", json!("green"), "default: Unsupported value"),
        ("/properties/free", json!({}), "type: Required value"),
        ("/properties/free", json!({"type": "array"}), "items: Required value"),
        (
            "/properties/color",
            json!({"type": "string", "pattern": "("}),
            "must be a valid regular expression",
        ),
        ("/x-kubernetes-validations", json!([{"rule": "self.size <"}]), "compilation failed"),
    ];
    let rules = world.has(25, "rules in schemas");
    for (at, value, why) in cases.into_iter().filter(|(_, _, why)| rules || !why.contains("compil"))
    {
        let mut odd = crd();
        *odd.pointer_mut(&format!("{spec}{at}")).unwrap() = value;
        let refused = world.create(CRDS, odd).await.unwrap_err();
        assert_eq!(refused.code, 422);
        assert!(refused.message.contains(why), "{at}: {refused}");
    }
    let mut two = crd();
    two["spec"]["versions"][1]["storage"] = true.into();
    assert!(
        world
            .create(CRDS, two)
            .await
            .unwrap_err()
            .message
            .contains("exactly one version marked as storage version")
    );
    let mut named = crd();
    named["metadata"]["name"] = "gadgets.example.com".into();
    assert!(
        world.create(CRDS, named).await.unwrap_err().message.contains("must be spec.names.plural")
    );
}
