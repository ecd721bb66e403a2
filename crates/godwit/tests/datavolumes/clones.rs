//! Clones of claims that no pod could have together, and of claims that guests want.

use crate::cluster::{Cluster, NAMESPACE, condition};
use crate::{assert_disk, disk};
use api::datavolume::DataVolume;
use api::keys;
use api::kubevirt::KubeVirt;
use api::vmi::VirtualMachineInstance;
use futures_util::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::{Namespace, Pod, Secret};
use kube::api::{DeleteParams, ListParams, PostParams, WatchEvent, WatchParams};
use kube::{Api, ResourceExt};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

/// Makes a claim with a disk on it. Returns its node.
async fn golden(cluster: &Cluster, image: &[u8]) -> String {
    cluster.volume("golden", "local", json!({"blank": {}})).await;
    cluster.succeeded("golden").await;
    cluster.no_pod("golden").await;
    let data = cluster.data("golden").await;
    let file = std::fs::File::options().write(true).open(data.join("disk.img")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, image, 0).unwrap();
    node_of(&data)
}

/// The node on which a volume is.
fn node_of(data: &Path) -> String {
    let parts: Vec<_> = data.iter().map(|part| part.to_string_lossy()).collect();
    parts.iter().find(|part| part.starts_with("node-")).unwrap().to_string()
}

fn source() -> Value {
    json!({"pvc": {"namespace": NAMESPACE, "name": "golden"}})
}

fn lenders() -> ListParams {
    ListParams::default().labels(&format!("{}={}", keys::APP, keys::LENDER))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_is_cloned_to_another_namespace_and_another_node_with_its_holes() {
    let cluster = Cluster::with_nodes(2).await;
    let image = disk(7);
    let here = golden(&cluster, &image).await;
    let there = if here == "node-1" { "node-2" } else { "node-1" };
    // Its first consumer is where the source is not.
    cluster.late("far", "local", source()).await;
    cluster.consumer("far", there).await;
    cluster.succeeded("far").await;
    let data = cluster.data("far").await;
    assert_eq!(node_of(&data), there);
    assert_disk(&data, &image);
    let found = std::fs::metadata(data.join("disk.img")).unwrap();
    assert!(found.blocks() * 512 < found.size() / 2, "holes are filled: {}", found.blocks());
    let other = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "other"}});
    let other: Namespace = serde_json::from_value(other).unwrap();
    Api::all(cluster.client.clone()).create(&PostParams::default(), &other).await.unwrap();
    for class in ["local", "local-block"] {
        let name = format!("other/{class}");
        cluster.sized(&name, class, source(), Some("16Mi")).await;
        cluster.succeeded(&name).await;
        assert_disk(&cluster.data(&name).await, &image);
        cluster.no_pod(&name).await;
    }
    // One that is deleted half way leaves nothing either.
    cluster.late("other/never", "local", source()).await;
    cluster.consumer("other/never", "nowhere").await;
    let (volumes, never) = cluster.at::<DataVolume>("other/never");
    volumes.delete(never, &DeleteParams::default()).await.unwrap();
    let pods = cluster.api::<Pod>();
    let secrets = cluster.api::<Secret>();
    cluster
        .soon("what lent is gone", async || {
            let token = |secret: &Secret| secret.name_any().starts_with("clone-source-");
            pods.list(&lenders()).await.unwrap().items.is_empty()
                && !secrets.list(&ListParams::default()).await.unwrap().iter().any(token)
        })
        .await;
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clone_begins_again_when_what_lends_to_it_is_killed() {
    let cluster = Cluster::start().await;
    let image = disk(8);
    golden(&cluster, &image).await;
    let pods = cluster.api::<Pod>();
    let mut seen = pods.watch(&WatchParams::default(), "0").await.unwrap().boxed();
    cluster.sized("clone", "local", source(), None).await;
    let mut killed = BTreeSet::new();
    // Once before it is known where it lends, and once when its importer is there.
    for awaited in ["clone-source-", "importer-"] {
        while let Some(event) = seen.try_next().await.unwrap() {
            let WatchEvent::Added(pod) = event else { continue };
            if pod.name_any().starts_with(awaited) && !pod.name_any().ends_with("golden") {
                break;
            }
        }
        for lender in pods.list(&lenders()).await.unwrap() {
            killed.insert(lender.uid().unwrap());
            // It may be gone by itself.
            let _ = pods.delete(&lender.name_any(), &DeleteParams::default().grace_period(0)).await;
        }
    }
    assert!(!killed.is_empty());
    cluster.succeeded("clone").await;
    assert_disk(&cluster.data("clone").await, &image);
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clone_never_reads_what_a_guest_may_write() {
    let cluster = Cluster::start().await;
    let image = disk(9);
    golden(&cluster, &image).await;
    let settings = json!({
        "apiVersion": "kubevirt.io/v1", "kind": "KubeVirt", "metadata": {"name": "kubevirt"},
        "spec": {},
    });
    cluster.create::<KubeVirt>(settings).await;
    let pods = cluster.api::<Pod>();
    let seen = tokio::spawn(record(pods.clone()));
    let mut told = Vec::new();
    for round in 0..4u64 {
        let name = format!("clone-{round}");
        let (first, second) = if round % 2 == 0 { (0, round * 30) } else { (round * 20, 0) };
        let guest = async {
            tokio::time::sleep(Duration::from_millis(first)).await;
            cluster.create::<VirtualMachineInstance>(guest()).await;
        };
        let clone = async {
            tokio::time::sleep(Duration::from_millis(second)).await;
            cluster.sized(&name, "local", source(), None).await;
        };
        tokio::join!(guest, clone);
        let launchers = ListParams::default().labels(&format!("{}={}", keys::APP, keys::LAUNCHER));
        cluster
            .soon("the guest has a pod", async || {
                !pods.list(&launchers).await.unwrap().items.is_empty()
            })
            .await;
        cluster
            .until(&name, |volume| {
                let waits = condition(volume, "Running", false);
                let waits = waits.is_some_and(|(reason, _)| reason == "CloneSourceInUse");
                waits || crate::phase(volume) == api::datavolume::Phase::Succeeded
            })
            .await;
        let vmis = cluster.api::<VirtualMachineInstance>();
        vmis.delete("guest", &DeleteParams::default()).await.unwrap();
        cluster
            .soon("the guest is gone", async || vmis.get_opt("guest").await.unwrap().is_none())
            .await;
        cluster.succeeded(&name).await;
        told.extend(cluster.events(&name).await);
    }
    assert!(!seen.is_finished(), "{:?}", seen.await);
    seen.abort();
    assert!(told.iter().any(|reason| reason == "CloneSourceInUse"), "{told:?}");
    cluster.end().await;
}

/// A guest of the claim that is cloned.
fn guest() -> Value {
    json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance",
        "metadata": {"name": "guest", "finalizers": [keys::VMI_FINALIZER]},
        "spec": {
            "domain": {
                "memory": {"guest": "64Mi"},
                "devices": {"disks": [{"name": "root", "disk": {"bus": "virtio"}}]},
            },
            "volumes": [{"name": "root", "persistentVolumeClaim": {"claimName": "golden"}}],
        },
    })
}

/// Follows all pods: a guest's and a clone's importer must never be there at the same time.
async fn record(pods: Api<Pod>) {
    let mut live = BTreeMap::<String, &str>::new();
    let mut seen = pods.watch(&WatchParams::default(), "0").await.unwrap().boxed();
    while let Some(event) = seen.try_next().await.unwrap() {
        let (pod, gone) = match event {
            WatchEvent::Added(pod) | WatchEvent::Modified(pod) => (pod, false),
            WatchEvent::Deleted(pod) => (pod, true),
            _ => continue,
        };
        let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
        let ended = gone || matches!(phase, Some("Succeeded" | "Failed"));
        let kind = match pod.labels().get(keys::APP).map(String::as_str) {
            Some(keys::LAUNCHER) => "guest",
            Some("importer") => "reader",
            _ => continue,
        };
        match ended {
            true => live.remove(&pod.name_any()),
            false => live.insert(pod.name_any(), kind),
        };
        let both = ["guest", "reader"].iter().all(|kind| live.values().any(|k| k == kind));
        assert!(!both, "a clone reads what a guest writes: {live:?}");
    }
}
