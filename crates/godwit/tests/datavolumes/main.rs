//! DataVolumes on a cluster of its own, with real importers.

mod clones;
mod cluster;
#[allow(dead_code)]
#[path = "../../../images/tests/common/containers.rs"]
mod containers;
#[allow(dead_code)]
#[path = "../../../images/tests/common/server.rs"]
mod server;

use api::datavolume::Phase;
use api::import::ORDER;
use api::keys;
use cluster::{Cluster, condition, phase};
use containers::{Image, PASSWORD, Running, USER, layer};
use flate2::{Compression, read::GzEncoder};
use k8s_openapi::api::core::v1::{ConfigMap, PersistentVolumeClaim, Pod, Secret};
use kube::ResourceExt;
use serde_json::json;
use server::{Fault, Server, Site};
use std::io::Read;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

const MIB: usize = 1 << 20;

/// A disk of 8 MiB with something at its beginning and its end.
fn disk(seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut disk = vec![0; 8 * MIB];
    for range in [0..MIB, 8 * MIB - 700..8 * MIB] {
        for byte in &mut disk[range] {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            *byte = state.to_le_bytes()[0];
        }
    }
    disk
}

fn qcow2(folder: &Path, disk: &[u8]) -> Vec<u8> {
    let (raw, image) = (folder.join("raw"), folder.join("qcow2"));
    std::fs::write(&raw, disk).unwrap();
    let convert = ["convert", "-f", "raw", "-O", "qcow2"];
    let status = Command::new("qemu-img").args(convert).arg(&raw).arg(&image).status().unwrap();
    assert!(status.success());
    std::fs::read(image).unwrap()
}

fn sha256(bytes: &[u8]) -> String {
    containers::digest(bytes)
}

/// A disk of 16 MiB that begins with an image, in a claim that has nothing else in it.
fn assert_disk(data: &Path, image: &[u8]) {
    let path = if data.is_dir() { data.join("disk.img") } else { data.to_owned() };
    let found = std::fs::read(&path).unwrap();
    assert_eq!(found.len(), 16 * MIB, "the size of {path:?}");
    assert!(found.starts_with(image) && found[image.len()..].iter().all(|byte| *byte == 0));
    if data.is_dir() {
        let names: Vec<_> =
            std::fs::read_dir(data).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["disk.img"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_is_made_once_and_waits_for_whom_it_is_for() {
    let cluster = Cluster::start().await;
    for class in ["local", "local-block"] {
        cluster.volume(class, class, json!({"blank": {}})).await;
        let volume = cluster.succeeded(class).await;
        assert_disk(&cluster.data(class).await, &[]);
        cluster.no_pod(class).await;
        let status = volume.status.clone().unwrap();
        assert_eq!(status.progress.as_deref(), Some("100.0%"));
        assert_eq!(status.claim_name.as_deref(), Some(class));
        assert!(condition(&volume, "Ready", true).is_some());
        let claim = cluster.api::<PersistentVolumeClaim>().get(class).await.unwrap();
        assert_eq!(claim.annotations()[keys::POD_PHASE], "Succeeded");
        let told = cluster.events(class).await;
        for reason in ["Pending", "ImportScheduled", "ImportSucceeded"] {
            assert!(told.iter().any(|told| told == reason), "{reason} is not among {told:?}");
        }
    }
    // What a guest has written stays, even if nobody remembers that the disk was made.
    std::fs::write(cluster.data("local").await.join("disk.img"), b"the guest's").unwrap();
    let blank = json!({"phase": "", "progress": null, "conditions": []});
    cluster.patch_status("local", blank).await;
    cluster.succeeded("local").await;
    assert!(cluster.api::<Pod>().get_opt("importer-local").await.unwrap().is_none());
    assert_eq!(
        std::fs::read(cluster.data("local").await.join("disk.img")).unwrap(),
        b"the guest's"
    );
    waits(&cluster).await;
    cluster.end().await;
}

/// Nobody asked that it be bound at once.
async fn waits(cluster: &Cluster) {
    cluster.late("late", "local", json!({"blank": {}})).await;
    cluster.until("late", |volume| phase(volume) == Phase::WaitForFirstConsumer).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(cluster.api::<Pod>().get_opt("importer-late").await.unwrap().is_none());
    cluster.consumer("late", "node-1").await;
    cluster.succeeded("late").await;
    assert_disk(&cluster.data("late").await, &[]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_comes_from_a_web_server_that_breaks_and_is_cloned_when_nobody_writes_to_it() {
    let cluster = Cluster::start().await;
    let disk = disk(1);
    let mut body = Vec::new();
    let image = qcow2(cluster.folder.path(), &disk);
    GzEncoder::new(&image[..], Compression::fast()).read_to_end(&mut body).unwrap();
    let checksum = sha256(&body);
    let half = body.len() / 2;
    // First it is another one altogether, then it breaks half way.
    let wrong = b"not what was promised".to_vec();
    let site = Site { body: wrong, ranges: true, ..Site::default() };
    let web = Server::start(site).await;
    let source = json!({"http": {"url": web.url(), "checksum": checksum}});
    cluster.volume("web", "local", source).await;
    let failed = cluster.until("web", |volume| {
        condition(volume, "Running", false).is_some_and(|(_, why)| why.contains("checksum"))
    });
    assert_eq!(phase(&failed.await), Phase::ImportInProgress);
    {
        let mut site = web.site();
        site.body = body.clone();
        site.version += 1;
        site.faults.push_back(Fault::Cut(half));
        site.sent = 0;
    }
    let volume = cluster.succeeded("web").await;
    assert!(volume.status.unwrap().restart_count.unwrap() > 0);
    assert_eq!(web.site().sent, body.len(), "what came is not fetched again");
    assert_disk(&cluster.data("web").await, &disk);
    clones(&cluster, &disk).await;
    cluster.end().await;
}

/// Clones of a claim, to a file system and a device, with its size or another.
async fn clones(cluster: &Cluster, disk: &[u8]) {
    let source = json!({"pvc": {"namespace": cluster::NAMESPACE, "name": "web"}});
    // A guest's pod holds it.
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "guest", "labels": {keys::APP: keys::LAUNCHER}},
        "spec": {
            "schedulerName": "nobody",
            "containers": [{"name": "c", "image": controllers::IMAGE}],
            "volumes": [{"name": "d", "persistentVolumeClaim": {"claimName": "web"}}],
        },
    });
    cluster.create::<Pod>(pod).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    cluster.sized("clone", "local", source.clone(), None).await;
    let waits = cluster.until("clone", |volume| {
        condition(volume, "Running", false).is_some_and(|(reason, _)| reason == "CloneSourceInUse")
    });
    assert_eq!(phase(&waits.await), Phase::CloneScheduled);
    assert!(cluster.api::<Pod>().get_opt("importer-clone").await.unwrap().is_none());
    cluster.delete_pod("guest").await;
    cluster.succeeded("clone").await;
    assert_disk(&cluster.data("clone").await, disk);
    cluster.volume("device", "local-block", source).await;
    cluster.succeeded("device").await;
    assert_disk(&cluster.data("device").await, disk);
    let again = json!({"pvc": {"namespace": cluster::NAMESPACE, "name": "device"}});
    cluster.sized("back", "local", again, None).await;
    cluster.succeeded("back").await;
    assert_disk(&cluster.data("back").await, disk);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_comes_from_a_registry_with_the_secrets_that_are_named() {
    let cluster = Cluster::start().await;
    let Some(registry) = Running::start(&cluster.folder.path().join("registry"), true).await else {
        return eprintln!("skipped: docker-registry is not installed");
    };
    let disk = disk(2);
    let image = qcow2(cluster.folder.path(), &disk);
    registry.push("some/disk", "1", &Image::new(vec![layer(&[("disk/disk.qcow2", &image)])])).await;
    let secret = json!({
        "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "who"},
        "stringData": {"accessKeyId": USER, "secretKey": PASSWORD},
    });
    let authority = json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "authority"},
        "data": {"ca.pem": registry.ca()},
    });
    cluster.create::<ConfigMap>(authority).await;
    let url = registry.registry("some/disk:1").url;
    let source = json!({"registry": {
        "url": url, "secretRef": "who", "certConfigMap": "authority",
    }});
    cluster.volume("image", "local", source).await;
    // It waits for what is not there yet, and says so.
    let waits = cluster.until("image", |volume| {
        condition(volume, "Running", false).is_some_and(|(_, why)| why.contains("who"))
    });
    assert_eq!(phase(&waits.await), Phase::ImportScheduled);
    let pod = cluster.api::<Pod>().get("importer-image").await.unwrap();
    let environment = pod.spec.unwrap().containers.remove(0).env.unwrap();
    let order = environment.iter().find(|variable| variable.name == ORDER).unwrap();
    assert!(!order.value.as_ref().unwrap().contains(PASSWORD));
    cluster.create::<Secret>(secret).await;
    cluster.succeeded("image").await;
    assert_disk(&cluster.data("image").await, &disk);
    cluster.end().await;
}
