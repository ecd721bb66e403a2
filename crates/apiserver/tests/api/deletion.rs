//! Delete: finalizers, owners, namespaces.

use crate::world::{World, config_map, pod};
use serde_json::{Value, json};

const MAPS: &str = "/api/v1/namespaces/default/configmaps";

fn owned(name: &str, owner: &Value, blocks: bool) -> Value {
    let mut object = config_map(name, json!({}));
    object["metadata"]["ownerReferences"] = json!([{
        "apiVersion": "v1", "kind": "ConfigMap", "name": owner["metadata"]["name"],
        "uid": owner["metadata"]["uid"], "blockOwnerDeletion": blocks,
    }]);
    object
}

#[tokio::test]
async fn what_has_finalizers_goes_with_the_last_of_them() {
    let world = World::new().await;
    let mut object = config_map("f", json!({}));
    object["metadata"]["finalizers"] = json!(["example.com/a", "example.com/b"]);
    world.create(MAPS, object).await.unwrap();
    let path = format!("{MAPS}/f");
    let marked = world.delete(&path, json!({})).await.unwrap();
    assert!(marked["metadata"]["deletionTimestamp"].is_string());
    let finalizers = |list: Value| json!({"metadata": {"finalizers": list}});
    let merge = "application/merge-patch+json";
    world.patch(&path, merge, finalizers(json!(["example.com/b"]))).await.unwrap();
    let more =
        world.patch(&path, merge, finalizers(json!(["example.com/b", "example.com/c"]))).await;
    assert!(more.unwrap_err().message.contains("no new finalizers can be added"));
    world.patch(&path, merge, finalizers(json!(null))).await.unwrap();
    assert_eq!(world.get(&path).await.unwrap_err().code, 404);
}

#[tokio::test]
async fn preconditions_are_kept() {
    let world = World::new().await;
    let made = world.create(MAPS, config_map("p", json!({}))).await.unwrap();
    let path = format!("{MAPS}/p");
    let wrong = json!({"preconditions": {"uid": "another"}});
    assert_eq!(world.delete(&path, wrong).await.unwrap_err().code, 409);
    let right = json!({"preconditions": {"uid": made["metadata"]["uid"], "resourceVersion": made["metadata"]["resourceVersion"]}});
    let gone = world.delete(&path, right).await.unwrap();
    assert_eq!(
        (&gone["status"], &gone["details"]["uid"]),
        (&json!("Success"), &made["metadata"]["uid"])
    );
}

#[tokio::test]
async fn dependents_go_with_their_owner_before_it_or_not_at_all() {
    let world = World::new().await;
    for policy in ["Background", "Foreground", "Orphan"] {
        let owner = world.create(MAPS, config_map("owner", json!({}))).await.unwrap();
        world.create(MAPS, owned("dependent", &owner, true)).await.unwrap();
        let (at_owner, at_dependent) = (format!("{MAPS}/owner"), format!("{MAPS}/dependent"));
        world.delete(&at_owner, json!({"propagationPolicy": policy})).await.unwrap();
        world.until_gone(&at_owner).await;
        if policy == "Orphan" {
            let left = world.get(&at_dependent).await.unwrap();
            assert!(left["metadata"].get("ownerReferences").is_none(), "{left}");
            world.delete(&at_dependent, json!({})).await.unwrap();
        } else {
            if policy == "Foreground" {
                assert_eq!(world.get(&at_dependent).await.unwrap_err().code, 404);
            }
            world.until_gone(&at_dependent).await;
        }
    }
}

#[tokio::test]
async fn a_dependent_of_an_owner_that_never_was_goes_and_one_of_two_owners_stays() {
    let world = World::new().await;
    let owner = world.create(MAPS, config_map("real", json!({}))).await.unwrap();
    let mut ghost = owner.clone();
    ghost["metadata"]["uid"] = "00000000-0000-0000-0000-000000000000".into();
    ghost["metadata"]["name"] = "ghost".into();
    world.create(MAPS, owned("lost", &ghost, false)).await.unwrap();
    world.until_gone(&format!("{MAPS}/lost")).await;
    let mut both = owned("both", &owner, false);
    let second = owned("x", &ghost, false)["metadata"]["ownerReferences"][0].clone();
    both["metadata"]["ownerReferences"].as_array_mut().unwrap().push(second);
    world.create(MAPS, both).await.unwrap();
    let one = |object: &Value| {
        object["metadata"]["ownerReferences"].as_array().is_some_and(|o| o.len() == 1)
    };
    world.until(&format!("{MAPS}/both"), one).await;
}

#[tokio::test]
async fn a_namespace_goes_with_all_that_is_in_it_and_takes_nothing_new() {
    let world = World::new().await;
    let path = world.namespace("gone").await;
    let mut held = config_map("held", json!({}));
    held["metadata"]["finalizers"] = json!(["example.com/wait"]);
    world.create(&format!("{path}/configmaps"), held).await.unwrap();
    world.create(&format!("{path}/pods"), pod("p")).await.unwrap();
    world.delete(&path, json!({})).await.unwrap();
    let told = |namespace: &Value| {
        let conditions = namespace["status"]["conditions"].as_array();
        conditions
            .is_some_and(|all| all.iter().any(|c| c["type"] == "NamespaceFinalizersRemaining"))
    };
    let terminating = world.until(&path, told).await;
    assert_eq!(terminating["status"]["phase"], "Terminating");
    let refused = world
        .create(&format!("{path}/configmaps"), config_map("new", json!({})))
        .await
        .unwrap_err();
    assert!(refused.message.contains("because it is being terminated"), "{refused}");
    let free = json!({"metadata": {"finalizers": null}});
    world
        .patch(&format!("{path}/configmaps/held"), "application/merge-patch+json", free)
        .await
        .unwrap();
    world.until_gone(&path).await;
    let refused = world.delete("/api/v1/namespaces/kube-system", json!({})).await.unwrap_err();
    assert_eq!(refused.code, 403);
}

#[tokio::test]
async fn a_pod_on_a_node_gets_its_time_and_an_eviction_asks_the_budget() {
    let world = World::new().await;
    if !world.has(21, "policy/v1") {
        return;
    }
    let pods = "/api/v1/namespaces/default/pods";
    let mut it = pod("p");
    it["metadata"]["labels"] = json!({"app": "x"});
    world.create(pods, it).await.unwrap();
    let binding = json!({
        "apiVersion": "v1", "kind": "Binding", "metadata": {"name": "p"},
        "target": {"kind": "Node", "name": "n1"},
    });
    world.create(&format!("{pods}/p/binding"), binding.clone()).await.unwrap();
    let again = world.create(&format!("{pods}/p/binding"), binding).await.unwrap_err();
    assert!(again.message.contains("is already assigned to node \"n1\""), "{again}");
    let status = json!({"status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}});
    world.patch(&format!("{pods}/p/status"), "application/merge-patch+json", status).await.unwrap();
    let budget = json!({
        "apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": {"name": "b"},
        "spec": {"minAvailable": 1, "selector": {"matchLabels": {"app": "x"}}},
    });
    let budgets = "/apis/policy/v1/namespaces/default/poddisruptionbudgets";
    world.create(budgets, budget).await.unwrap();
    world.until(&format!("{budgets}/b"), |b| b["status"]["currentHealthy"] == 1).await;
    let eviction =
        json!({"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": "p"}});
    let refused = world.create(&format!("{pods}/p/eviction"), eviction.clone()).await.unwrap_err();
    assert_eq!(refused.code, 429);
    assert!(refused.message.contains("would violate the pod's disruption budget"), "{refused}");
    let none = json!({"spec": {"minAvailable": 0}});
    world.patch(&format!("{budgets}/b"), "application/merge-patch+json", none).await.unwrap();
    world.until(&format!("{budgets}/b"), |b| b["status"]["disruptionsAllowed"] == 1).await;
    world.create(&format!("{pods}/p/eviction"), eviction).await.unwrap();
    let marked = world.get(&format!("{pods}/p")).await.unwrap();
    assert_eq!(marked["metadata"]["deletionGracePeriodSeconds"], 30);
    // Its node says that it has ended.
    world.delete(&format!("{pods}/p"), json!({"gracePeriodSeconds": 0})).await.unwrap();
    assert_eq!(world.get(&format!("{pods}/p")).await.unwrap_err().code, 404);
}
