//! Guests that are to leave their nodes or their launchers, as KubeVirt's users have it.

use crate::PROGRAM;
use anyhow::{Result, bail, ensure};
use e2e::cluster::Cluster;
use e2e::guest;
use e2e::registry::Registry;
use e2e::vms::{MOVES, OWNERS, Oracle, PODS, SETTINGS, VMIS, VMS, holds, import, is_running, vm};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;

const STORAGE: [&str; 2] = ["--storage", "2Gi"];
const IN_PROGRESS: &str = "descheduler.alpha.kubernetes.io/eviction-in-progress";

fn with_strategy(mut vm: Value, strategy: &str) -> Value {
    vm["spec"]["template"]["spec"]["evictionStrategy"] = strategy.into();
    vm
}

/// A VM whose disk is on storage that all nodes share, or only its own has.
fn on_claim(name: &str, image: &str, mode: &str, class: &str) -> Value {
    let storage = json!({
        "accessModes": [mode], "resources": {"requests": {"storage": "100Mi"}},
        "storageClassName": class,
    });
    let disk = format!("{name}-root");
    let root = json!({"name": "root", "dataVolume": {"name": disk}});
    vm(name, "Always", vec![root], vec![import(&disk, image, storage)])
}

fn shared(name: &str, image: &str) -> Value {
    with_strategy(on_claim(name, image, "ReadWriteMany", "shared"), "LiveMigrate")
}

fn node(vmi: &Value) -> &str {
    vmi["status"]["nodeName"].as_str().unwrap_or_default()
}

fn name(object: &Value) -> &str {
    object["metadata"]["name"].as_str().unwrap_or_default()
}

fn phase(object: &Value) -> &str {
    object["status"]["phase"].as_str().unwrap_or_default()
}

fn is_over(migration: &Value) -> bool {
    ["Succeeded", "Failed"].contains(&phase(migration))
}

fn is_asked(vmi: &Value) -> bool {
    holds(vmi, "EvictionRequested")
}

fn kubectl(cluster: &Cluster, arguments: &[&str]) -> Result<String> {
    match cluster.kubectl(arguments) {
        Some((true, said)) => Ok(said),
        Some((false, said)) => {
            bail!("kubectl {arguments:?}: {said}; logs are in {}", cluster.keep_logs().display())
        }
        None => bail!("there is no kubectl of 1.27 or later: run `make setup`"),
    }
}

async fn items(cluster: &Cluster, path: &str) -> Result<Vec<Value>> {
    let found = cluster.send("GET", path, None).await?;
    Ok(found["items"].as_array().cloned().unwrap_or_default())
}

/// The pod in which a guest runs.
async fn pod_of(cluster: &Cluster, vm: &str) -> Result<String> {
    let record = cluster.send("GET", &format!("{OWNERS}/{vm}"), None).await?;
    Ok(record["status"]["pod"].as_str().unwrap_or_default().into())
}

/// Asks that a pod may go; returns what is said where it may not.
async fn evict(cluster: &Cluster, pod: &str) -> Result<Option<String>> {
    let eviction =
        json!({"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod}});
    match cluster.create(&format!("{PODS}/{pod}/eviction"), eviction).await {
        Ok(_) => Ok(None),
        Err(error) => match error.downcast::<kube::Error>()? {
            kube::Error::Api(status) if status.code == 429 => Ok(Some(status.message.clone())),
            other => Err(other.into()),
        },
    }
}

/// Waits until a VM's migration is there that is as awaited.
async fn until_migration(
    cluster: &Cluster,
    vm: &str,
    holds: impl Fn(&Value) -> bool,
) -> Result<Value> {
    let own = |m: &&Value| m["spec"]["vmiName"] == vm && holds(m);
    let some =
        |list: &Value| list["items"].as_array().is_some_and(|all| all.iter().any(|m| own(&m)));
    let found = cluster.until(MOVES, some).await?;
    let found = found["items"].as_array().into_iter().flatten().find(own).cloned();
    Ok(found.unwrap_or_default())
}

/// Parity 115, 118, 119, 121: a drained node's guests are elsewhere, whatever each VM's strategy,
/// and lose nothing; 122: two leave at a time; 123: the cluster's strategy is that of VMs that say
/// none; 124: a VM that says None ends. 108, 112: it is said while it lasts.
#[tokio::test(flavor = "multi_thread")]
async fn kubectl_drain_has_guests_move_and_ends_only_those_that_may() -> Result<()> {
    let registry = Registry::start()?;
    let image = registry.push("guest", "disk/guest.raw", &guest::image("disk.raw")?)?;
    let cluster = Cluster::new(PROGRAM, &[&STORAGE[..], &["--nodes", "3"]].concat()).await?;
    let cluster = Arc::new(cluster);
    let everywhere = json!({"spec": {"configuration": {"evictionStrategy": "LiveMigrate"}}});
    cluster.send("PATCH", SETTINGS, Some(everywhere)).await?;
    kubectl(&cluster, &["cordon", "local-2", "local-3"])?;
    let copied = json!({"name": "root", "containerDisk": {"image": image}});
    let copied = |name: &str| vm(name, "Always", vec![copied.clone()], vec![]);
    let movers = ["one", "two", "three"];
    // The first says how it leaves; the second, whose disk is copied, that it would rather move;
    // the third says nothing.
    cluster.create(VMS, shared("one", &image)).await?;
    cluster.create(VMS, with_strategy(copied("two"), "LiveMigrateIfPossible")).await?;
    cluster.create(VMS, on_claim("three", &image, "ReadWriteMany", "shared")).await?;
    cluster.create(VMS, with_strategy(copied("ends"), "None")).await?;
    let mut before = Vec::new();
    for vm in movers.into_iter().chain(["ends"]) {
        cluster.until(&format!("{VMS}/{vm}"), is_running).await?;
        before.push(cluster.send("GET", &format!("{VMIS}/{vm}"), None).await?);
    }
    for vm in movers {
        let mut console = cluster.terminal(vm)?;
        Oracle::begin(&mut console)?;
    }
    kubectl(&cluster, &["uncordon", "local-2", "local-3"])?;
    let flags = ["--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=240s"];
    let drain = [&["drain", "local-1"], &flags[..]].concat();
    // All the while no more than two are on their way.
    let drained = tokio::task::spawn_blocking({
        let cluster = Arc::clone(&cluster);
        move || kubectl(&cluster, &drain)
    });
    while !drained.is_finished() {
        let leaves = |m: &&Value| !is_over(m) && !["", "Pending"].contains(&phase(m));
        let active = items(&cluster, MOVES).await?.iter().filter(leaves).count();
        ensure!(active <= 2, "{active} guests leave a node at the same time");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let said = drained.await??;
    ensure!(said.contains("Eviction triggered evacuation of VMI \"default/one\""), "{said}");
    for (vm, before) in movers.into_iter().zip(&before) {
        let vmi = format!("{VMIS}/{vm}");
        let after = cluster.until(&vmi, |vmi| !is_asked(vmi)).await?;
        ensure!(node(before) == "local-1" && node(&after) != "local-1", "{vm}: {after}");
        ensure!(after["metadata"]["uid"] == before["metadata"]["uid"], "{vm} began anew");
        ensure!(after["status"]["evacuationNodeName"].is_null(), "{vm}: {after}");
        let made = until_migration(&cluster, vm, |m| phase(m) == "Succeeded").await?;
        ensure!(name(&made).starts_with("kubevirt-evacuation-"), "{made}");
        ensure!(made["spec"]["priority"] == "system-critical", "{made}");
        ensure!(made["metadata"]["annotations"]["kubevirt.io/evacuationMigration"] == "local-1");
        let mut console = cluster.console(vm)?;
        ensure!(Oracle::again(&mut console).check()? > 0, "{vm} has written nothing");
    }
    let first = before.last().map(|vmi| vmi["metadata"]["uid"].clone());
    let again =
        |vmi: &Value| Some(vmi["metadata"]["uid"].clone()) != first && phase(vmi) == "Running";
    let ends = cluster.until(&format!("{VMIS}/ends"), again).await?;
    ensure!(node(&ends) != "local-1", "{ends}");
    let left = items(&cluster, PODS).await?;
    ensure!(left.iter().all(|pod| pod["spec"]["nodeName"] != "local-1"), "{left:?}");
    Ok(())
}

/// Parity 108, 109, 112, 113: what is asked is said until it is done, however often it fails; 110,
/// 111: who fails waits, and goes on; 114: who may stay is left alone; 117: what moves is not
/// evicted; 120: a taint empties a node as well.
#[tokio::test(flavor = "multi_thread")]
async fn an_evacuation_that_fails_is_tried_again_until_it_succeeds_or_is_cancelled() -> Result<()> {
    let registry = Registry::start()?;
    let image = registry.push("guest", "disk/guest.raw", &guest::image("disk.raw")?)?;
    let cluster = Cluster::new(PROGRAM, &[&STORAGE[..], &["--nodes", "2"]].concat()).await?;
    kubectl(&cluster, &["cordon", "local-2"])?;
    cluster.create(VMS, shared("web", &image)).await?;
    cluster.until(&format!("{VMS}/web"), is_running).await?;
    let vmi = format!("{VMIS}/web");
    let pod = pod_of(&cluster, "web").await?;
    let told = |pod: &Value| pod["metadata"]["annotations"][IN_PROGRESS] == "kubevirt";

    let denied = evict(&cluster, &pod).await?.unwrap_or_default();
    ensure!(denied.starts_with("Eviction triggered evacuation of VMI \"default/web\""), "{denied}");
    let denied = evict(&cluster, &pod).await?.unwrap_or_default();
    ensure!(denied.starts_with("Evacuation in progress"), "{denied}");
    cluster.until(&vmi, is_asked).await?;
    cluster.until(&format!("{PODS}/{pod}"), told).await?;
    // No node is left for it: its target's pod waits, and is not to be evicted either.
    let first = until_migration(&cluster, "web", |m| phase(m) == "Scheduling").await?;
    let uid = first["metadata"]["uid"].as_str().unwrap_or_default();
    let own = format!("{PODS}?labelSelector=kubevirt.io/migrationJobUID={uid}");
    let target = cluster.until(&own, |list| list["items"][0].is_object()).await?;
    let target = name(&target["items"][0]).to_owned();
    let denied = evict(&cluster, &target).await?.unwrap_or_default();
    ensure!(denied.contains("is about to move here"), "{denied}");
    // It fails; another is made at once, and waits.
    cluster.send("DELETE", &format!("{PODS}/{target}"), None).await?;
    cluster.until_moved(name(&first), "Failed").await?;
    let second = until_migration(&cluster, "web", |m| phase(m) == "Pending").await?;
    let events = "/api/v1/namespaces/default/events";
    let backoff = |events: &Value| events.to_string().contains("MigrationBackoff");
    cluster.until(events, backoff).await?;
    let vmi_now = cluster.send("GET", &vmi, None).await?;
    ensure!(is_asked(&vmi_now) && vmi_now["status"]["evacuationNodeName"] == "local-1");
    ensure!(told(&cluster.send("GET", &format!("{PODS}/{pod}"), None).await?));
    // Then it succeeds, since there is a node again.
    kubectl(&cluster, &["uncordon", "local-2"])?;
    cluster.until_moved(name(&second), "Succeeded").await?;
    cluster.until(&vmi, |vmi| node(vmi) == "local-2" && !is_asked(vmi)).await?;
    cluster.until_gone(&format!("{PODS}/{pod}")).await?;
    let pod = pod_of(&cluster, "web").await?;
    ensure!(!told(&cluster.send("GET", &format!("{PODS}/{pod}"), None).await?));

    // It is to leave again, and then may stay.
    kubectl(&cluster, &["cordon", "local-1"])?;
    ensure!(evict(&cluster, &pod).await?.is_some());
    let third = until_migration(&cluster, "web", |m| !is_over(m)).await?;
    let cancel = "/apis/subresources.kubevirt.io/v1/namespaces/default/virtualmachineinstances/web\
                  /evacuate/cancel";
    cluster.client.request_text(http::Request::put(cancel).body(Vec::new())?).await?;
    cluster.until(&vmi, |vmi| !is_asked(vmi)).await?;
    cluster.until(&format!("{PODS}/{pod}"), |pod| !told(pod)).await?;
    cluster.send("DELETE", &format!("{MOVES}/{}", name(&third)), None).await?;
    cluster.until_gone(&format!("{MOVES}/{}", name(&third))).await?;
    let touched = json!({"metadata": {"annotations": {"example.org/touched": "true"}}});
    cluster.send("PATCH", &vmi, Some(touched)).await?;

    // The taint is as good as an eviction, and cannot be cancelled.
    kubectl(&cluster, &["taint", "node", "local-2", "kubevirt.io/drain=:NoSchedule"])?;
    let fourth = until_migration(&cluster, "web", |m| !is_over(m)).await?;
    let all = items(&cluster, MOVES).await?;
    ensure!(all.len() == 3, "one was made that nobody has asked for: {all:?}");
    ensure!(evict(&cluster, &pod).await?.is_some());
    let refused = cluster.client.request_text(http::Request::put(cancel).body(Vec::new())?).await;
    ensure!(matches!(&refused, Err(kube::Error::Api(status)) if status.code == 400), "{refused:?}");
    kubectl(&cluster, &["uncordon", "local-1"])?;
    cluster.until_moved(name(&fourth), "Succeeded").await?;
    cluster.until(&vmi, |vmi| node(vmi) == "local-1" && !is_asked(vmi)).await?;
    ensure!(cluster.until_qemus(1)?.len() == 1);
    Ok(())
}

/// A launcher of another version is renewed by a move, when the settings want it so.
#[tokio::test(flavor = "multi_thread")]
async fn outdated_launchers_are_renewed_as_the_settings_want_it() -> Result<()> {
    let registry = Registry::start()?;
    let image = registry.push("guest", "disk/guest.raw", &guest::image("disk.raw")?)?;
    let cluster = Cluster::new(PROGRAM, &[&STORAGE[..], &["--nodes", "2"]].concat()).await?;
    let by_hand = json!({"spec": {"workloadUpdateStrategy": {"workloadUpdateMethods": []}}});
    cluster.send("PATCH", SETTINGS, Some(by_hand)).await?;
    cluster.create(VMS, shared("moves", &image)).await?;
    let mut before = Vec::new();
    for vm in ["moves"] {
        cluster.until(&format!("{VMS}/{vm}"), is_running).await?;
        before.push(cluster.send("GET", &format!("{VMIS}/{vm}"), None).await?);
        let old = json!({"metadata": {"annotations": {"godwit.dev/version": "0.0.0-old"}}});
        let pod = pod_of(&cluster, vm).await?;
        cluster.send("PATCH", &format!("{PODS}/{pod}"), Some(old)).await?;
    }
    let outdated = |count: i64| {
        move |settings: &Value| {
            settings["status"]["outdatedVirtualMachineInstanceWorkloads"] == count
        }
    };
    let label =
        |vmi: &Value| vmi["metadata"]["labels"]["kubevirt.io/outdatedLauncherImage"].clone();
    cluster.until(SETTINGS, outdated(1)).await?;
    cluster.until(&format!("{VMIS}/moves"), |vmi| label(vmi) == "").await?;
    ensure!(items(&cluster, MOVES).await?.is_empty(), "nobody has asked for it");
    let update = json!({"spec": {"workloadUpdateStrategy": {
        "workloadUpdateMethods": ["LiveMigrate", "Evict"],
    }}});
    cluster.send("PATCH", SETTINGS, Some(update)).await?;
    cluster.until(SETTINGS, outdated(0)).await?;
    let made = until_migration(&cluster, "moves", |m| phase(m) == "Succeeded").await?;
    ensure!(name(&made).starts_with("kubevirt-workload-update-"), "{made}");
    let moved = cluster.until(&format!("{VMIS}/moves"), |vmi| label(vmi).is_null()).await?;
    ensure!(moved["metadata"]["uid"] == before[0]["metadata"]["uid"], "it began anew: {moved}");
    ensure!(node(&moved) != node(&before[0]), "{moved}");
    Ok(())
}
