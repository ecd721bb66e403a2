//! Disks that go to other storage while their guest runs, and what may come in between: see
//! docs/parity.md.

use crate::PROGRAM;
use anyhow::{Result, ensure};
use e2e::cluster::Cluster;
use e2e::guest;
use e2e::registry::Registry;
use e2e::vms::{
    CLAIMS, MOVES, OWNERS, Oracle, SETTINGS, VMIS, VMS, holds, import, is_running, says, shows, vm,
};
use serde_json::{Value, json};

const NODES: [&str; 4] = ["--nodes", "2", "--storage", "2Gi"];

/// A claim of a class.
fn claim(name: &str, class: &str, access: &str, mode: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name},
        "spec": {
            "accessModes": [access], "volumeMode": mode, "storageClassName": class,
            "resources": {"requests": {"storage": "100Mi"}},
        },
    })
}

fn shared_block(name: &str) -> Value {
    claim(name, "shared-block", "ReadWriteMany", "Block")
}

/// The VM's root is to be that claim.
async fn goes_to(cluster: &Cluster, claim: &str, strategy: Option<&str>) -> Result<()> {
    let vm = cluster.send("GET", &format!("{VMS}/web"), None).await?;
    let mut volumes = vm["spec"]["template"]["spec"]["volumes"].clone();
    volumes[0] = json!({"name": "root", "persistentVolumeClaim": {"claimName": claim}});
    let patch = json!({"spec": {
        "updateVolumesStrategy": strategy, "dataVolumeTemplates": [],
        "template": {"spec": {"volumes": volumes}},
    }});
    cluster.send("PATCH", &format!("{VMS}/web"), Some(patch)).await.map(|_| ())
}

/// The claim of a VMI's root.
fn root(vmi: &Value) -> &str {
    let volume = &vmi["spec"]["volumes"][0];
    let claim = volume["persistentVolumeClaim"]["claimName"].as_str();
    claim.or(volume["dataVolume"]["name"].as_str()).unwrap_or_default()
}

/// Whether a VMI's root is there and nothing moves.
fn is_on(claim: &'static str) -> impl Fn(&Value) -> bool {
    move |vmi| {
        root(vmi) == claim
            && vmi["status"]["migratedVolumes"].is_null()
            && !holds(vmi, "VolumesChange")
            && vmi["status"]["phase"] == "Running"
    }
}

/// How fast disks go.
async fn bandwidth(cluster: &Cluster, rate: Value) -> Result<()> {
    let settings = json!({"spec": {"configuration": {"migrations": {
        "bandwidthPerMigration": rate,
    }}}});
    cluster.send("PATCH", SETTINGS, Some(settings)).await.map(|_| ())
}

/// Waits until the root is on its way.
async fn under_way(cluster: &Cluster) -> Result<()> {
    cluster.until(&format!("{VMIS}/web"), |vmi| holds(vmi, "VolumesChange")).await?;
    let runs = |all: &Value| {
        let mut all = all["items"].as_array().into_iter().flatten();
        all.any(|m| m["status"]["phase"] == "Running")
    };
    cluster.until(MOVES, runs).await.map(|_| ())
}

/// Parity 7: it begins once the claim is there; 8: shared block to shared block; 10: beside a disk of
/// an image; 11, 15: a template that is reverted cancels it, and no trace is left; 14: a VM that is
/// stopped meanwhile is on the disk that it has not left, and goes on moving when it is started; 16: a
/// copy that is not whole is not started from, whoever says so.
#[tokio::test(flavor = "multi_thread")]
async fn whatever_comes_between_a_guest_is_on_a_disk_that_is_whole() -> Result<()> {
    let registry = Registry::start()?;
    let image = registry.push("guest", "disk/guest.raw", &guest::image("disk.raw")?)?;
    let tools = tempfile::NamedTempFile::new()?;
    std::fs::write(&tools, "tools".repeat(1 << 18))?;
    let tools = registry.push("tools", "disk/tools.raw", tools.path())?;
    let cluster = Cluster::new(PROGRAM, &NODES).await?;
    let storage = json!({
        "accessModes": ["ReadWriteMany"], "volumeMode": "Block", "storageClassName": "shared-block",
        "resources": {"requests": {"storage": "100Mi"}},
    });
    let volumes = vec![
        json!({"name": "root", "dataVolume": {"name": "first"}}),
        json!({"name": "tools", "containerDisk": {"image": tools}}),
    ];
    let template = import("first", &image, storage);
    cluster.create(VMS, vm("web", "Always", volumes, vec![template])).await?;
    let (web, vmi) = (format!("{VMS}/web"), format!("{VMIS}/web"));
    cluster.until(&web, is_running).await?;
    let mut console = cluster.terminal("web")?;
    console.run("echo kept > /data/file; sync")?;
    let tools = console.run("sha256sum /dev/vdb")?;
    Oracle::begin(&mut console)?;
    drop(console);
    let looks = |cluster: &Cluster| -> Result<u64> {
        let mut console = cluster.console("web")?;
        console.run("echo 3 >/proc/sys/vm/drop_caches")?;
        ensure!(console.run("sha256sum /dev/vdb")? == tools, "the image's disk is another");
        Oracle::again(&mut console).check()
    };

    goes_to(&cluster, "second", Some("Migration")).await?;
    let waits = |vm: &Value| says(vm, "VolumesChange", "WaitingForVolumes");
    cluster.until(&web, waits).await?;
    cluster.create(CLAIMS, shared_block("second")).await?;
    cluster.until(&vmi, is_on("second")).await?;
    cluster.until_qemus(1)?;
    let writes = looks(&cluster)?;

    bandwidth(&cluster, "2Mi".into()).await?;
    cluster.create(CLAIMS, shared_block("third")).await?;
    goes_to(&cluster, "third", Some("Migration")).await?;
    under_way(&cluster).await?;
    let state = |vm: &Value| vm["status"]["volumeUpdateState"].clone();
    let vm = cluster.send("GET", &web, None).await?;
    let moved = &state(&vm)["volumeMigrationState"]["migratedVolumes"][0];
    ensure!(moved["destinationPVCInfo"]["claimName"] == "third", "{vm}");
    goes_to(&cluster, "second", Some("Migration")).await?;
    cluster.until(&vmi, is_on("second")).await?;
    let vm = cluster.until(&web, |vm| state(vm).is_null()).await?;
    ensure!(is_running(&vm) && !holds(&vm, "RestartRequired"), "{vm}");
    cluster.until_qemus(1)?;
    ensure!(looks(&cluster)? > writes, "the guest writes no more");

    goes_to(&cluster, "third", Some("Migration")).await?;
    under_way(&cluster).await?;
    cluster.does(&["vm", "stop", "web"])?;
    cluster.until(&web, shows("Stopped")).await?;
    cluster.until_qemus(0)?;
    // Whoever takes the copy as it is, is told that it is none.
    goes_to(&cluster, "third", None).await?;
    cluster.does(&["vm", "start", "web"])?;
    cluster.until(&vmi, |vmi| says(vmi, "Synchronized", "StaleDisk")).await?;
    ensure!(cluster.qemus()?.is_empty(), "it runs on half a disk");
    cluster.does(&["vm", "stop", "web"])?;
    cluster.until(&web, shows("Stopped")).await?;

    // As it was, it starts from the disk that it has, and moves.
    bandwidth(&cluster, Value::Null).await?;
    goes_to(&cluster, "third", Some("Migration")).await?;
    cluster.does(&["vm", "start", "web"])?;
    cluster.until(&vmi, is_on("third")).await?;
    let record = cluster.send("GET", &format!("{OWNERS}/web"), None).await?;
    ensure!(record["status"]["volumes"]["root"] == "third", "{record}");
    let mut console = cluster.terminal("web")?;
    ensure!(console.run("cat /data/file")?.trim() == "kept");
    Ok(())
}

/// Parity 13: a disk of one node may not be left behind.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_would_be_left_behind_keeps_the_others_where_they_are() -> Result<()> {
    let registry = Registry::start()?;
    let image = registry.push("guest", "disk/guest.raw", &guest::image("disk.raw")?)?;
    let cluster = Cluster::new(PROGRAM, &NODES).await?;
    for name in ["one", "two", "three"] {
        let made = claim(name, "local", "ReadWriteOnce", "Filesystem");
        cluster.create(CLAIMS, made).await?;
    }
    let claimed = |name: &str, claim: &str| json!({"name": name, "persistentVolumeClaim": {"claimName": claim}});
    let volumes = |first: &str| {
        let root = json!({"name": "root", "containerDisk": {"image": image}});
        vec![root, claimed("a", first), claimed("b", "two")]
    };
    cluster.create(VMS, vm("pair", "Always", volumes("one"), vec![])).await?;
    let pair = format!("{VMS}/pair");
    cluster.until(&pair, is_running).await?;
    let change = json!({"spec": {
        "updateVolumesStrategy": "Migration",
        "template": {"spec": {"volumes": volumes("three")}},
    }});
    cluster.send("PATCH", &pair, Some(change)).await?;
    let refused = cluster.until(&pair, |vm| holds(vm, "RestartRequired")).await?;
    let why = refused["status"]["conditions"].to_string();
    ensure!(why.contains("volume b stays on claim two"), "{why}");
    let vmi = cluster.send("GET", &format!("{VMIS}/pair"), None).await?;
    ensure!(vmi["spec"]["volumes"].to_string().contains("\"one\""), "{vmi}");
    let moves = cluster.send("GET", MOVES, None).await?;
    ensure!(moves["items"].as_array().is_some_and(Vec::is_empty), "{moves}");
    Ok(())
}
