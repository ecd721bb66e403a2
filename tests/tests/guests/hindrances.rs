//! What stands in a migration's way, and what becomes of the guest meanwhile: see docs/parity.md.

use crate::PROGRAM;
use anyhow::{Context, Result, ensure};
use e2e::cluster::Cluster;
use e2e::guest;
use e2e::registry::Registry;
use e2e::vms::{
    CLAIMS, MOVES, Oracle, PODS, SETTINGS, VMIS, VMS, holds, import, is_running, kill, migration,
    node, shows, vm,
};
use serde_json::{Value, json};

const NODES: [&str; 4] = ["--nodes", "3", "--storage", "2Gi"];
const SUBRESOURCES: &str = "/apis/subresources.kubevirt.io/v1/namespaces/default";
const QUOTAS: &str = "/api/v1/namespaces/default/resourcequotas";

/// A claim of a device that all nodes share.
fn claim(name: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name},
        "spec": {
            "accessModes": ["ReadWriteMany"], "volumeMode": "Block",
            "storageClassName": "shared-block", "resources": {"requests": {"storage": "16Mi"}},
        },
    })
}

/// A VM on shared storage, with a second disk that it only reads.
fn with_a_fixed_disk(image: &str) -> Value {
    let storage = json!({
        "accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "100Mi"}},
        "storageClassName": "shared",
    });
    let volumes = vec![
        json!({"name": "root", "dataVolume": {"name": "web-root"}}),
        json!({"name": "fixed", "persistentVolumeClaim": {"claimName": "fixed"}}),
    ];
    let mut web = vm("web", "Always", volumes, vec![import("web-root", image, storage)]);
    let disks = &mut web["spec"]["template"]["spec"]["domain"]["devices"]["disks"];
    disks[1]["disk"]["readonly"] = true.into();
    web
}

/// Sets what the cluster's settings say, beneath `configuration`.
async fn configure(cluster: &Cluster, configuration: Value) -> Result<()> {
    let settings = json!({"spec": {"configuration": configuration}});
    cluster.send("PATCH", SETTINGS, Some(settings)).await.map(|_| ())
}

/// Asks for a migration by the VM's subresource.
async fn ask(cluster: &Cluster, options: Value) -> Result<()> {
    let path = format!("{SUBRESOURCES}/virtualmachines/web/migrate");
    let request = http::Request::put(path).body(options.to_string().into_bytes())?;
    cluster.client.request_text(request).await?;
    Ok(())
}

async fn migrations(cluster: &Cluster) -> Result<Vec<Value>> {
    let all = cluster.send("GET", MOVES, None).await?;
    Ok(all["items"].as_array().cloned().unwrap_or_default())
}

/// One that is given up when its pod has found no node for so many seconds.
fn given_up(name: &str, seconds: u32, selector: Value) -> Value {
    let mut given_up = migration(name, "web");
    given_up["spec"]["addedNodeSelector"] = selector;
    given_up["metadata"]["annotations"] = json!({
        "kubevirt.io/migrationUnschedulablePodTimeoutSeconds": seconds.to_string(),
    });
    given_up
}

/// Why a migration failed.
fn reason(over: &Value) -> &str {
    over["status"]["migrationState"]["failureReason"].as_str().unwrap_or_default()
}

/// What was found to be in a migration's way before it began.
fn foretold(migration: &Value) -> &str {
    let conditions = migration["status"]["conditions"].as_array();
    let mut all = conditions.into_iter().flatten();
    let found = all.find(|c| c["type"] == "migrationPreflight" && c["status"] == "False");
    found.and_then(|condition| condition["message"].as_str()).unwrap_or_default()
}

/// A migration that is under way; returns the target's QEMU.
async fn set_out(cluster: &Cluster, name: &str) -> Result<i32> {
    let before = cluster.until_qemus(1)?;
    cluster.create(MOVES, migration(name, "web")).await?;
    let runs = |m: &Value| m["status"]["phase"] == "Running";
    cluster.until(&format!("{MOVES}/{name}"), runs).await?;
    let both = cluster.until_qemus(2)?;
    both.into_iter().find(|pid| !before.contains(pid)).context("no second QEMU")
}

/// Parity 143, 144: `migrate`, also where nothing is to happen; 130: to a node that is named.
async fn asked_for_by_the_subresource(cluster: &Cluster, vmi: &str) -> Result<String> {
    ask(cluster, json!({"dryRun": ["All"]})).await?;
    ensure!(migrations(cluster).await?.is_empty(), "a dry run makes a migration");
    let before = cluster.send("GET", vmi, None).await?;
    // Not the one that it would be given, if names decided.
    let names = ["local-3", "local-2", "local-1"];
    let wanted = names.into_iter().find(|name| *name != node(&before)).context("no other node")?;
    let selector = json!({"kubernetes.io/hostname": wanted});
    ask(cluster, json!({"addedNodeSelector": selector})).await?;
    let [made] = &migrations(cluster).await?[..] else { anyhow::bail!("not one migration") };
    ensure!(made["spec"]["vmiName"] == "web", "{made}");
    let name = made["metadata"]["name"].as_str().context("no name")?.to_owned();
    cluster.until_moved(&name, "Succeeded").await?;
    let after = cluster.send("GET", vmi, None).await?;
    ensure!(node(&after) == wanted, "{wanted} was wanted: {after}");
    Ok(name)
}

/// Parity 103: a quota that lets no pod in is said to be what is waited for, and it goes on.
async fn a_quota(cluster: &Cluster) -> Result<()> {
    let one = |pods: &Value| pods["items"].as_array().is_some_and(|all| all.len() == 1);
    cluster.until(PODS, one).await?;
    let quota = json!({
        "apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "full"},
        "spec": {"hard": {"pods": "1"}},
    });
    cluster.create(QUOTAS, quota).await?;
    let counted = |quota: &Value| quota["status"]["used"]["pods"] == "1";
    cluster.until(&format!("{QUOTAS}/full"), counted).await?;
    cluster.create(MOVES, migration("quota", "web")).await?;
    let rejected = |m: &Value| holds(m, "migrationRejectedByResourceQuota");
    let waits = cluster.until(&format!("{MOVES}/quota"), rejected).await?;
    ensure!(waits["status"]["phase"] == "Pending", "{waits}");
    ensure!(foretold(&waits).contains("quota full is exceeded"), "{waits}");
    let more = json!({"spec": {"hard": {"pods": "2"}}});
    cluster.send("PATCH", &format!("{QUOTAS}/full"), Some(more)).await?;
    let over = cluster.until_moved("quota", "Succeeded").await?;
    ensure!(!holds(&over, "migrationRejectedByResourceQuota"), "{over}");
    cluster.send("DELETE", &format!("{QUOTAS}/full"), None).await?;
    Ok(())
}

/// Parity 126, 127: a guest that has its node's processor goes to no node whose processor lacks
/// something of it.
async fn another_processor(cluster: &Cluster, vmi: &str) -> Result<()> {
    let source = cluster.send("GET", vmi, None).await?;
    let path = format!("/api/v1/nodes/{}", node(&source));
    let label = |value: Value| {
        json!({"metadata": {"labels": {
            "cpu-feature.node.kubevirt.io/nowhere-else": value,
        }}})
    };
    cluster.send("PATCH", &path, Some(label("true".into()))).await?;
    // As on real processors: what is emulated is the same everywhere.
    let emulated = |it: bool| json!({"developerConfiguration": {"useEmulation": it}});
    configure(cluster, emulated(false)).await?;
    cluster.create(MOVES, given_up("processor", 2, json!({}))).await?;
    let over = cluster.until_moved("processor", "Failed").await?;
    ensure!(reason(&over).contains("Unschedulable"), "{over}");
    let events = cluster.send("GET", "/api/v1/namespaces/default/events", None).await?;
    let about = |event: &&Value| event["involvedObject"]["name"] == "processor";
    let mut told = events["items"].as_array().into_iter().flatten().filter(about);
    ensure!(
        told.any(|event| event["message"].as_str().is_some_and(|m| m.contains("Unschedulable")))
    );
    configure(cluster, emulated(true)).await?;
    cluster.send("PATCH", &path, Some(label(Value::Null))).await?;
    Ok(())
}

/// Parity 50: a pod that has a node, and does not get ready there, is given up.
async fn a_node_that_cannot_start_it(cluster: &Cluster, vmi: &str) -> Result<()> {
    let source = cluster.send("GET", vmi, None).await?;
    let name = if node(&source) == "local-1" { "local-2" } else { "local-1" };
    let pods = cluster.dir().join("local/machine/nodes").join(name).join("pods");
    let away = pods.with_extension("away");
    std::fs::create_dir_all(&pods)?;
    std::fs::rename(&pods, &away)?;
    std::fs::write(&pods, "not a folder")?;
    let mut stuck = migration("stuck", "web");
    stuck["spec"]["addedNodeSelector"] = json!({"kubernetes.io/hostname": name});
    stuck["metadata"]["annotations"] = json!({
        "kubevirt.io/migrationPendingPodTimeoutSeconds": "2",
    });
    cluster.create(MOVES, stuck).await?;
    let over = cluster.until_moved("stuck", "Failed").await?;
    ensure!(reason(&over).contains("was not ready within 2 s"), "{over}");
    std::fs::remove_file(&pods)?;
    std::fs::rename(&away, &pods)?;
    Ok(())
}

/// Parity 90: a guest of a machine type that no node has is not begun anywhere.
async fn another_machine(cluster: &Cluster, image: &str) -> Result<()> {
    let root = json!({"name": "root", "containerDisk": {"image": image}});
    let mut old = vm("old", "Always", vec![root], vec![]);
    old["spec"]["template"]["spec"]["domain"]["machine"] = json!({"type": "pc-q35-2.99"});
    cluster.create(VMS, old).await?;
    cluster.until(&format!("{VMS}/old"), shows("ErrorUnschedulable")).await?;
    cluster.does(&["vm", "delete", "old"])?;
    Ok(())
}

/// What stands in the way of a migration is said; the guest stays where it is, or goes on once it is
/// gone.
#[tokio::test(flavor = "multi_thread")]
async fn whatever_stands_in_the_way_of_a_migration_the_guest_goes_on() -> Result<()> {
    let registry = Registry::start()?;
    let image = registry.push("guest", "disk/guest.raw", &guest::image("disk.raw")?)?;
    let cluster = Cluster::new(PROGRAM, &NODES).await?;
    cluster.create(CLAIMS, claim("fixed")).await?;
    cluster.create(VMS, with_a_fixed_disk(&image)).await?;
    let (web, vmi) = (format!("{VMS}/web"), format!("{VMIS}/web"));
    cluster.until(&web, is_running).await?;
    // Parity 39: nothing has to be copied.
    let found = cluster.send("GET", &vmi, None).await?;
    ensure!(found["status"]["migrationMethod"] == "LiveMigration", "{found}");
    let mut console = cluster.terminal("web")?;
    Oracle::begin(&mut console)?;
    drop(console);
    let first = asked_for_by_the_subresource(&cluster, &vmi).await?;
    a_quota(&cluster).await?;
    another_processor(&cluster, &vmi).await?;
    a_node_that_cannot_start_it(&cluster, &vmi).await?;
    another_machine(&cluster, &image).await?;
    cluster.until_qemus(1)?;

    // Parity 72: one that does not come to its end is given up.
    let before = cluster.send("GET", &vmi, None).await?;
    let mut console = cluster.console("web")?;
    console.run(
        "(while :; do dd if=/dev/urandom of=/tmp/noise bs=1M count=8; done) 2>/dev/null & :",
    )?;
    let hopeless = json!({"bandwidthPerMigration": "1Mi", "completionTimeoutPerGiB": 5});
    configure(&cluster, json!({"migrations": hopeless})).await?;
    cluster.create(MOVES, migration("hopeless", "web")).await?;
    let over = cluster.until_moved("hopeless", "Failed").await?;
    ensure!(reason(&over).contains("in the time that it had"), "{over}");
    console.run("kill %2")?;
    Oracle::again(&mut console).check()?;
    drop(console);

    // Parity 73: one whose target dies is known to have failed.
    let slow = json!({"bandwidthPerMigration": "6Mi", "completionTimeoutPerGiB": null});
    configure(&cluster, json!({"migrations": slow})).await?;
    kill(set_out(&cluster, "killed").await?)?;
    cluster.until_moved("killed", "Failed").await?;
    cluster.until_qemus(1)?;
    let after = cluster.send("GET", &vmi, None).await?;
    ensure!(node(&after) == node(&before) && after["status"]["phase"] == "Running", "{after}");
    let mut console = cluster.console("web")?;
    Oracle::again(&mut console).check()?;
    drop(console);

    // Parity 74: of those that are over, the last five are kept.
    let nowhere = json!({"kubernetes.io/hostname": "nowhere"});
    cluster.create(MOVES, given_up("last", 0, nowhere)).await?;
    let last = cluster.until_moved("last", "Failed").await?;
    ensure!(foretold(&last).contains("selector"), "{last}");
    for gone in [&*first, "quota"] {
        cluster.until_gone(&format!("{MOVES}/{gone}")).await?;
    }
    let kept = migrations(&cluster).await?;
    ensure!(kept.len() == 5, "{} are kept", kept.len());

    // Parity 106: a VMI that is deleted while it moves takes its migration with it.
    set_out(&cluster, "orphan").await?;
    cluster.send("DELETE", &vmi, None).await?;
    cluster.until_moved("orphan", "Failed").await?;
    let anew = |vmi: &Value| {
        vmi["metadata"]["uid"] != after["metadata"]["uid"] && vmi["status"]["phase"] == "Running"
    };
    cluster.until(&vmi, anew).await?;
    cluster.until(&web, is_running).await?;
    cluster.until_qemus(1)?;
    cluster.terminal("web")?;
    Ok(())
}
