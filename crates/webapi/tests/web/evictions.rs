//! Evictions of launchers' pods, asked by people, deschedulers and other API servers.

use crate::site::Site;
use crate::world::{OWNERS, Reply, VMIS, World, admin, own};
use serde_json::{Value, json};

const PODS: &str = "/api/v1/namespaces/default/pods";

/// A guest that runs in a pod on node `n1`.
async fn runs(world: &World, name: &str, strategy: &str, migratable: bool) -> String {
    let mut vmi = crate::world::vmi();
    vmi["metadata"]["name"] = name.into();
    vmi["spec"]["evictionStrategy"] = strategy.into();
    let vmi = world.create(&own(), VMIS, &vmi).await;
    let status = json!({"status": {"phase": "Running", "nodeName": "n1", "conditions": [{
        "type": "LiveMigratable", "status": if migratable { "True" } else { "False" },
        "reason": "DisksNotLiveMigratable", "message": "claim x is on its node alone",
    }]}});
    assert_eq!(world.merge(&own(), &format!("{VMIS}/{name}/status"), &status).await.code, 200);
    let pod = format!("virt-launcher-{name}");
    let object = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {
            "name": pod, "annotations": {"kubevirt.io/domain": name},
            "labels": {
                "kubevirt.io": "virt-launcher",
                "kubevirt.io/created-by": vmi["metadata"]["uid"],
            },
        },
        "spec": {"nodeName": "n1", "containers": [{"name": "c", "image": "i"}]},
    });
    world.create(&admin(), PODS, &object).await;
    let running = json!({"status": {"phase": "Running"}});
    assert_eq!(world.merge(&admin(), &format!("{PODS}/{pod}/status"), &running).await.code, 200);
    let record = json!({
        "apiVersion": "godwit.dev/v1alpha1", "kind": "OwnerRecord", "metadata": {"name": name},
        "spec": {"vm": name},
    });
    world.create(&own(), OWNERS, &record).await;
    let status = json!({"status": {"epoch": 1, "owner": "i", "state": "idle", "pod": pod}});
    assert_eq!(world.merge(&own(), &format!("{OWNERS}/{name}/status"), &status).await.code, 200);
    pod
}

fn eviction(pod: &str, requested_by: Option<&str>) -> Value {
    json!({
        "apiVersion": "policy/v1", "kind": "Eviction",
        "metadata": {"name": pod, "annotations": {"requested-by": requested_by}},
    })
}

async fn evict(world: &World, pod: &str, query: &str, by: Option<&str>) -> Reply {
    let path = format!("{PODS}/{pod}/eviction{query}");
    world.post(&admin(), &path, &eviction(pod, by)).await
}

#[tokio::test]
async fn a_pod_is_evicted_as_its_guests_strategy_says() {
    let world = World::new().await;
    // Strategy, whether it can move; what is answered, what is said, whether it is marked.
    let cases = [
        ("None", true, 201, "", false),
        ("LiveMigrate", true, 429, "Eviction triggered evacuation of VMI", true),
        ("LiveMigrate", false, 429, "not live-migratable: claim x is on its node alone", false),
        ("LiveMigrateIfPossible", true, 429, "Eviction triggered evacuation of VMI", true),
        ("LiveMigrateIfPossible", false, 201, "", false),
        ("External", false, 429, "Eviction triggered evacuation of VMI", true),
    ];
    for (n, (strategy, migratable, code, words, marked)) in cases.into_iter().enumerate() {
        let name = format!("vm-{n}");
        let pod = runs(&world, &name, strategy, migratable).await;
        let vmi = format!("{VMIS}/{name}");
        let dry = evict(&world, &pod, "?dryRun=All", None).await;
        assert!(world.get(&vmi).await["status"]["evacuationNodeName"].is_null(), "{strategy}");
        let reply = evict(&world, &pod, "", None).await;
        assert_eq!((dry.code, reply.code), (code, code), "{strategy}: {}", reply.body);
        assert!(code == 201 || reply.message().contains(words), "{strategy}: {}", reply.body);
        let node = world.get(&vmi).await["status"]["evacuationNodeName"].clone();
        assert_eq!(node, if marked { json!("n1") } else { Value::Null }, "{strategy}");
        let leaves = world.get(&format!("{PODS}/{pod}")).await;
        assert_eq!(leaves["metadata"]["deletionTimestamp"].is_string(), code == 201, "{strategy}");
    }
}

#[tokio::test]
async fn who_asks_is_kept_and_another_api_server_hears_the_same() {
    let site = Site::new().await;
    let world = &site.world;
    let pod = runs(world, "web", "LiveMigrate", true).await;
    let review = |dry: bool| {
        json!({
            "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
            "request": {
                "uid": "u", "resource": {"group": "", "version": "v1", "resource": "pods"},
                "subResource": "eviction", "name": pod, "namespace": "default",
                "operation": "CREATE", "userInfo": {"username": "jane"}, "dryRun": dry,
                "object": eviction(&pod, Some("sigs.k8s.io/descheduler")), "oldObject": null,
            },
        })
    };
    let marks = || async {
        let vmi = world.get(&format!("{VMIS}/web")).await;
        let source = &vmi["metadata"]["annotations"]["kubevirt.io/eviction-source"];
        (vmi["status"]["evacuationNodeName"].clone(), source.clone())
    };
    for (dry, expected) in
        [(true, (Value::Null, Value::Null)), (false, (json!("n1"), json!("descheduler")))]
    {
        let reply = site.webhook("/validate", &review(dry)).await;
        let response = &reply.body["response"];
        assert_eq!(
            (&response["allowed"], &response["status"]["code"]),
            (&json!(false), &json!(429))
        );
        let said = response["status"]["message"].as_str().unwrap();
        assert!(said.contains("Eviction triggered evacuation of VMI \"default/web\""), "{said}");
        assert_eq!(marks().await, expected);
    }
    // Who drains the node is in a greater hurry.
    let reply = evict(world, &pod, "", None).await;
    assert!(reply.message().starts_with("Evacuation in progress"), "{}", reply.body);
    assert_eq!(marks().await, (json!("n1"), Value::Null));
}
