//! The laws of server-side apply.

use crate::world::{World, config_map};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use serde_json::{Value, json};

const MAPS: &str = "/api/v1/namespaces/default/configmaps";

fn data() -> impl Strategy<Value = Value> {
    let pairs = proptest::collection::btree_map("[a-e]", "[0-9]", 0..5);
    pairs.prop_map(|map| json!(map))
}

fn in_world<F: Future>(test: impl FnOnce(World) -> F) -> F::Output {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async { test(World::new().await).await })
}

/// What each of two managers applies, one after the other, to one object.
#[test]
fn applied_twice_changes_nothing_and_what_is_dropped_goes_and_force_takes() {
    in_world(|world| async move {
        let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(60));
        let mut cases = Vec::new();
        for _ in 0..60 {
            let tree = (data(), data(), data()).new_tree(&mut runner).unwrap();
            cases.push(tree.current());
        }
        for (n, (first, second, third)) in cases.into_iter().enumerate() {
            let path = format!("{MAPS}/m{n}");
            let name = format!("m{n}");
            let apply = |manager: &'static str, force, data: &Value| {
                world.apply(&path, manager, force, config_map(&name, data.clone()))
            };
            let one = apply("one", false, &first).await.unwrap();
            let again = apply("one", false, &first).await.unwrap();
            assert_eq!(again, one, "applying {first} twice");

            let keys =
                |v: &Value| -> Vec<String> { v.as_object().unwrap().keys().cloned().collect() };
            let at_odds =
                keys(&second).into_iter().any(|k| first.get(&k).is_some_and(|v| *v != second[&k]));
            let other = apply("two", false, &second).await;
            match other {
                Ok(_) => assert!(!at_odds, "{second} was applied over {first}"),
                Err(failure) => {
                    assert!(at_odds, "{failure}");
                    assert_eq!(failure.code, 409);
                    let causes = failure.details["causes"].as_array().unwrap();
                    let text = match causes.len() {
                        1 => {
                            "Apply failed with 1 conflict: conflict with \"one\": .data.".to_owned()
                        }
                        n => format!(
                            "Apply failed with {n} conflicts: conflicts with \"one\":\n- .data."
                        ),
                    };
                    assert!(failure.message.starts_with(&text), "{failure}");
                    assert!(causes.iter().all(|c| c["reason"] == "FieldManagerConflict"));
                    apply("two", true, &second).await.unwrap();
                }
            }
            // Now both have what they have; the first drops some, and keeps what is the other's.
            apply("one", true, &third).await.unwrap();
            let found = world.get(&path).await.unwrap();
            let mut wanted = second.as_object().unwrap().clone();
            wanted.extend(third.as_object().unwrap().clone());
            let found = found["data"].as_object().cloned().unwrap_or_default();
            assert_eq!(found, wanted, "{first}, {second}, {third}");
        }
    });
}

#[tokio::test]
async fn elements_of_a_list_have_owners_of_their_own() {
    let world = World::new().await;
    let path = "/api/v1/namespaces/default/services/s";
    let service = |ports: Value| json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s"}, "spec": {"ports": ports}});
    let web = json!({"name": "web", "port": 80, "protocol": "TCP"});
    let ssh = json!({"name": "ssh", "port": 22, "protocol": "TCP"});
    world.apply(path, "one", false, service(json!([web]))).await.unwrap();
    let both = world.apply(path, "two", false, service(json!([ssh]))).await.unwrap();
    assert_eq!(both["spec"]["ports"].as_array().unwrap().len(), 2);
    let renamed = json!([{"name": "http", "port": 80, "protocol": "TCP"}]);
    let conflict = world.apply(path, "two", false, service(renamed)).await.unwrap_err();
    assert!(conflict.message.contains(".spec.ports[port=80,protocol=\"TCP\"].name"), "{conflict}");
    let left = world.apply(path, "two", false, service(json!([]))).await.unwrap();
    assert_eq!(left["spec"]["ports"].as_array().unwrap().len(), 1);
    assert_eq!(left["spec"]["ports"][0]["name"], "web");
}

#[tokio::test]
async fn an_update_takes_what_it_changes_and_an_apply_wants_it_back_by_force_only() {
    let world = World::new().await;
    let path = format!("{MAPS}/m");
    let mut live =
        world.apply(&path, "one", false, config_map("m", json!({"k": "1"}))).await.unwrap();
    live["data"]["k"] = "2".into();
    world.put(&format!("{path}?fieldManager=editor"), &live).await.unwrap();
    let refused =
        world.apply(&path, "one", false, config_map("m", json!({"k": "1"}))).await.unwrap_err();
    assert!(
        refused
            .message
            .starts_with("Apply failed with 1 conflict: conflict with \"editor\" using v1"),
        "{refused}"
    );
    let forced = world.apply(&path, "one", true, config_map("m", json!({"k": "1"}))).await.unwrap();
    assert_eq!(forced["data"]["k"], "1");
    let managers: Vec<&str> = forced["metadata"]["managedFields"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|m| m["manager"].as_str())
        .collect();
    assert_eq!(managers, ["one"]);
    let given = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "m", "managedFields": [{}]}});
    assert_eq!(world.apply(&path, "one", false, given).await.unwrap_err().code, 400);
}
