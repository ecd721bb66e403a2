//! kube-rs and kubectl, over TLS.

use crate::world::{World, config_map, kubectl};
use futures_util::StreamExt;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::Resource;
use kube::api::{
    Api, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams, ResourceExt,
};
use kube::discovery::Discovery;
use kube::runtime::controller::{Action, Controller};
use kube::runtime::{finalizer, watcher};
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;

#[tokio::test(flavor = "multi_thread")]
async fn kube_rs_discovers_and_uses_all_that_is_served() {
    let world = World::new().await;
    let client = world.client().await;
    let discovery = Discovery::new(client.clone()).run().await.unwrap();
    let mut kinds = 0;
    for group in discovery.groups() {
        for (resource, capabilities) in group.recommended_resources() {
            if capabilities.supports_operation("list") {
                let api: Api<DynamicObject> = Api::all_with(client.clone(), &resource);
                api.list(&ListParams::default()).await.unwrap();
                kinds += 1;
            }
        }
    }
    assert!(kinds >= 28, "{kinds}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_has_one_holder() {
    let world = World::new().await;
    let leases: Api<Lease> = Api::namespaced(world.client().await, &world.name);
    let lease =
        json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "l"}});
    leases.create(&PostParams::default(), &serde_json::from_value(lease).unwrap()).await.unwrap();
    let seen = leases.get("l").await.unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..16 {
        let (leases, mut own) = (leases.clone(), seen.clone());
        own.spec.get_or_insert_default().holder_identity = Some(format!("h{n}"));
        tasks.spawn(async move { leases.replace("l", &PostParams::default(), &own).await.is_ok() });
    }
    let mut winners = 0;
    while let Some(won) = tasks.join_next().await {
        winners += u32::from(won.unwrap());
    }
    assert_eq!(winners, 1);
    let apply = json!({
        "apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "l"},
        "spec": {"leaseDurationSeconds": 0},
    });
    let params = PatchParams::apply("x").force();
    let refused = leases.patch("l", &params, &Patch::Apply(apply)).await.unwrap_err();
    assert!(refused.to_string().contains("must be greater than 0"), "{refused}");
}

/// What a controller of kube-rs makes for each map that it looks after, and takes away before it
/// lets go of it.
async fn copies(
    map: Arc<ConfigMap>,
    maps: Arc<Api<ConfigMap>>,
) -> Result<Action, finalizer::Error<kube::Error>> {
    let copy = format!("{}-copy", map.name_any());
    let own = Arc::clone(&maps);
    finalizer::finalizer(&maps, "example.com/copies", map, |event| async move {
        match event {
            finalizer::Event::Apply(map) => {
                let copy = json!({
                    "apiVersion": "v1", "kind": "ConfigMap",
                    "metadata": {"name": copy, "ownerReferences": [map.controller_owner_ref(&())]},
                    "data": map.data,
                });
                let params = PatchParams::apply("copier").force();
                let name = copy["metadata"]["name"].as_str().unwrap();
                own.patch(name, &params, &Patch::Apply(&copy)).await?;
            }
            finalizer::Event::Cleanup(_) => {
                own.delete(&copy, &DeleteParams::default()).await?;
            }
        }
        Ok(Action::await_change())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_controller_keeps_what_it_owns_and_cleans_up_before_its_object_goes() {
    let world = World::new().await;
    let maps: Api<ConfigMap> = Api::namespaced(world.client().await, &world.name);
    let watched = watcher::Config::default().labels("copied=yes");
    let controller = Controller::new(maps.clone(), watched)
        .owns(maps.clone(), watcher::Config::default())
        .run(copies, |_, _, _| Action::requeue(Duration::from_millis(100)), Arc::new(maps.clone()));
    let running = tokio::spawn(controller.for_each(|_| async {}));
    let mut map = config_map("m", json!({"k": "1"}));
    map["metadata"]["labels"] = json!({"copied": "yes"});
    let path = "/api/v1/namespaces/default/configmaps";
    world.create(path, map).await.unwrap();
    let (at_map, at_copy) = (format!("{path}/m"), format!("{path}/m-copy"));
    world.until(&at_copy, |copy| copy["data"]["k"] == "1").await;
    // What somebody else changes of it is put right, as is what its object changes.
    let merge = "application/merge-patch+json";
    world.patch(&at_copy, merge, json!({"data": {"k": "x"}})).await.unwrap();
    world.until(&at_copy, |copy| copy["data"]["k"] == "1").await;
    world.patch(&at_map, merge, json!({"data": {"k": "2"}})).await.unwrap();
    world.until(&at_copy, |copy| copy["data"]["k"] == "2").await;
    world.delete(&at_copy, json!({})).await.unwrap();
    world.until(&at_copy, |copy| copy["data"]["k"] == "2").await;
    world.delete(&at_map, json!({})).await.unwrap();
    world.until_gone(&at_map).await;
    assert_eq!(world.get(&at_copy).await.unwrap_err().code, 404);
    running.abort();
}

const MANIFEST: &str = r#"
apiVersion: v1
kind: ConfigMap
metadata: {name: m, labels: {app: x}}
data: {k: "1"}
---
apiVersion: v1
kind: Pod
metadata: {name: p, labels: {app: x}}
spec: {containers: [{name: c, image: "a:1"}]}
"#;

#[tokio::test(flavor = "multi_thread")]
async fn kubectl_works_as_with_any_kubernetes() {
    let world = World::new().await;
    let Some(kubectl) = kubectl(&world) else {
        eprintln!("NOT RUN: there is no kubectl of 1.27 or later");
        return;
    };
    let n = &*world.unique("n");
    let apply = |manifest: &str, more: &[&str]| {
        let arguments = [&["apply", "-f", "-"], more].concat();
        kubectl.run(&arguments, manifest)
    };
    assert_eq!(apply(MANIFEST, &[]).1, "configmap/m created\npod/p created\n");
    assert_eq!(apply(MANIFEST, &[]).1, "configmap/m unchanged\npod/p unchanged\n");
    let changed = MANIFEST.replace("k: \"1\"", "k: \"2\"");
    assert_eq!(apply(&changed, &[]).1, "configmap/m configured\npod/p unchanged\n");
    // From now on the server applies, and owns what kubectl did.
    assert!(apply(&changed, &["--server-side"]).0);
    let (conflict, said) = apply(
        &MANIFEST.replace("k: \"1\"", "k: \"3\""),
        &["--server-side", "--field-manager=other"],
    );
    assert!(!conflict && said.contains("conflict with \"kubectl\": .data.k"), "{said}");
    let strange = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: s}\nspec: {a: 1}\n";
    assert!(apply(strange, &[]).1.contains("unknown field \"spec\""));

    let wide = kubectl.ok(&["get", "pods", "-o", "wide"]);
    let columns: Vec<&str> = wide.lines().next().unwrap().split_whitespace().collect();
    assert_eq!(columns[..5], ["NAME", "READY", "STATUS", "RESTARTS", "AGE"]);
    assert!(wide.lines().nth(1).unwrap().starts_with("p      0/1     Pending"), "{wide}");
    assert_eq!(kubectl.ok(&["get", "cm", "-l", "app=x", "-o", "name"]), "configmap/m\n");
    assert_eq!(kubectl.ok(&["get", "cm", "m", "-o", "jsonpath={.data.k}"]), "2");
    assert_eq!(
        kubectl.ok(&["get", "pods", "--field-selector", "status.phase=Running", "-o", "name"]),
        ""
    );
    assert!(kubectl.ok(&["describe", "pod", "p"]).contains("Priority:         0"));
    assert!(kubectl.ok(&["explain", "pod.spec.containers.image"]).contains("image name"));
    assert!(kubectl.ok(&["api-resources"]).contains("customresourcedefinitions"));

    // These are sent as protobuf.
    kubectl.ok(&["create", "namespace", n]);
    kubectl.ok(&["create", "secret", "generic", "s", "--from-literal=a=b", "-n", n]);
    assert_eq!(kubectl.ok(&["get", "secret", "s", "-n", n, "-o", "jsonpath={.data.a}"]), "Yg==");
    kubectl.ok(&["create", "role", "r", "--verb=get", "--resource=pods", "-n", n]);
    kubectl.ok(&["create", "rolebinding", "b", "--role=r", "--user=bob", "-n", n]);
    let may = ["auth", "can-i", "get", "pods", "-n", n, "--as=bob"];
    world.soon(async || kubectl.run(&may, "").1 == "yes\n").await;
    assert!(
        kubectl.fails(&["auth", "can-i", "delete", "pods", "-n", n, "--as=bob"]).contains("no")
    );
    kubectl.ok(&["create", "serviceaccount", "robot"]);
    assert_eq!(kubectl.ok(&["create", "token", "robot"]).split('.').count(), 3);
    kubectl.ok(&["create", "quota", "q", "--hard=pods=5,requests.memory=1Gi", "-n", n]);
    let counted = ["wait", "quota/q", "--for=jsonpath={.status.used.pods}=0", "-n", n];
    kubectl.ok(&[&counted[..], &["--timeout=20s"]].concat());
    let described = kubectl.ok(&["describe", "quota", "q", "-n", n]);
    assert!(described.contains("requests.memory  0     1Gi"), "{described}");

    kubectl.ok(&["label", "pod", "p", "tier=db"]);
    kubectl.ok(&["annotate", "pod", "p", "note=hi"]);
    kubectl.ok(&[
        "patch",
        "pod",
        "p",
        "-p",
        r#"{"spec":{"containers":[{"name":"c","image":"a:2"}]}}"#,
    ]);
    assert!(
        kubectl
            .fails(&["patch", "pod", "p", "-p", r#"{"spec":{"hostNetwork":true}}"#])
            .contains("pod updates may not change fields")
    );
    assert!(
        kubectl
            .fails(&["wait", "pod", "p", "--for=condition=Ready", "--timeout=1s"])
            .contains("timed out")
    );
    kubectl.ok(&["delete", "pod", "p"]);
    kubectl.ok(&["delete", "namespace", n, "--timeout=20s"]);
    let gone = kubectl.fails(&["get", "namespace", n]);
    assert!(gone.contains(&format!("namespaces {n:?} not found")), "{gone}");
}

#[tokio::test(flavor = "multi_thread")]
async fn kubectl_watches_and_deletes_with_or_without_what_is_owned() {
    let world = World::new().await;
    let Some(kubectl) = kubectl(&world) else {
        eprintln!("NOT RUN: there is no kubectl of 1.27 or later");
        return;
    };
    let maps = "/api/v1/namespaces/default/configmaps";
    let make = async |name: &str, owner: Option<&serde_json::Value>| {
        let mut map = config_map(name, json!({}));
        map["metadata"]["labels"] = json!({"of": "this"});
        map["metadata"]["ownerReferences"] = owner.map_or(json!([]), |owner| {
            json!([{
                "apiVersion": "v1", "kind": "ConfigMap", "name": owner["metadata"]["name"],
                "uid": owner["metadata"]["uid"], "blockOwnerDeletion": true,
            }])
        });
        world.create(maps, map).await.unwrap()
    };
    for (cascade, stays) in [("background", false), ("foreground", false), ("orphan", true)] {
        let owner = make("owner", None).await;
        make("owned", Some(&owner)).await;
        let watch = ["get", "cm", "-l", "of=this", "-w", "--output-watch-events"];
        let watch = [&watch[..], &["--request-timeout=3s"]].concat();
        let cascade = format!("--cascade={cascade}");
        let deleted = ["delete", "cm", "owner", "--timeout=20s", &cascade];
        let (told, _) = std::thread::scope(|scope| {
            let watching = scope.spawn(|| kubectl.run(&watch, "").1);
            // It begins with what there is; either way it tells of the owner's end.
            std::thread::sleep(Duration::from_millis(500));
            let done = kubectl.ok(&deleted);
            (watching.join().unwrap(), done)
        });
        let line = |event: &str, name: &str| {
            told.lines().any(|line| {
                let mut words = line.split_whitespace();
                words.next() == Some(event) && words.next() == Some(name)
            })
        };
        assert!(line("ADDED", "owned") && line("DELETED", "owner"), "{cascade}: {told}");
        assert_eq!(line("DELETED", "owned"), !stays, "{cascade}: {told}");
        if stays {
            let left = world.get(&format!("{maps}/owned")).await.unwrap();
            assert!(left["metadata"].get("ownerReferences").is_none(), "{left}");
        }
    }
}
