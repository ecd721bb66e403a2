//! Live migration inside a cluster, as KubeVirt's users ask for it, with guests that find their own
//! lost writes.

use anyhow::{Result, ensure};
use e2e::cluster::Cluster;
use e2e::guest;
use e2e::registry::Registry;
use e2e::vms::{
    CLAIMS, DISKS, MOVES, OWNERS, Oracle, PODS, VMIS, VMS, holds, import, is_running, migration,
    shows, vm,
};
use serde_json::{Value, json};

const PROGRAM: &str = env!("CARGO_BIN_EXE_godwit-under-test");
const NODES: [&str; 4] = ["--nodes", "2", "--storage", "2Gi"];

/// A VM on storage that all nodes share, which runs.
async fn shared(cluster: &Cluster, name: &str, image: &str) -> Result<()> {
    let storage = json!({
        "accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "100Mi"}},
        "storageClassName": "shared",
    });
    let disk = format!("{name}-root");
    let root = json!({"name": "root", "dataVolume": {"name": disk}});
    let template = import(&disk, image, storage);
    cluster.create(VMS, vm(name, "Always", vec![root], vec![template])).await?;
    cluster.until(&format!("{VMS}/{name}"), is_running).await?;
    Ok(())
}

fn node(vmi: &Value) -> &str {
    vmi["status"]["nodeName"].as_str().unwrap_or_default()
}

/// Parity 54, 57: shared disks, again and again; 43, 45 with the seed; 99: what is in effect is in
/// the VMI's status; 74: migrations that are over are collected.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_on_shared_storage_goes_from_node_to_node_and_loses_nothing() -> Result<()> {
    let registry = Registry::start()?;
    let image = registry.push("guest", "disk/guest.raw", &guest::image("disk.raw")?)?;
    let cluster = Cluster::new(PROGRAM, &NODES).await?;
    shared(&cluster, "web", &image).await?;
    let vmi = format!("{VMIS}/web");
    let mut console = cluster.terminal("web")?;
    Oracle::begin(&mut console)?;
    drop(console);
    let mut before = cluster.send("GET", &vmi, None).await?;
    let mut writes = 0;
    for round in 0..3 {
        let name = format!("round-{round}");
        cluster.create(MOVES, migration(&name, "web")).await?;
        let over = cluster.until_moved(&name, "Succeeded").await?;
        let after = cluster.send("GET", &vmi, None).await?;
        ensure!(node(&after) != node(&before), "it is where it was: {after}");
        ensure!(after["metadata"]["uid"] == before["metadata"]["uid"]);
        let state = &after["status"]["migrationState"];
        ensure!(state["completed"] == true && state["failed"].is_null(), "{state}");
        ensure!(state["migrationConfiguration"]["completionTimeoutPerGiB"] == 150, "{state}");
        ensure!(over["status"]["migrationState"]["targetNode"] == node(&after), "{over}");
        let record = cluster.send("GET", &format!("{OWNERS}/web"), None).await?;
        ensure!(record["status"]["node"] == node(&after), "{record}");
        cluster.until_qemus(1)?;
        let gone = state["sourcePod"].as_str().unwrap_or_default();
        cluster.until_gone(&format!("{PODS}/{gone}")).await?;
        // The console is that of the node to which it went, and what the guest wrote is there.
        let mut console = cluster.console("web")?;
        let more = Oracle::again(&mut console).check()?;
        ensure!(more > writes, "the guest writes no more");
        writes = more;
        before = after;
    }
    Ok(())
}

/// A blank disk.
fn blank(name: &str, class: &str, size: &str) -> Value {
    json!({
        "apiVersion": "cdi.kubevirt.io/v1beta1", "kind": "DataVolume", "metadata": {"name": name},
        "spec": {
            "source": {"blank": {}},
            "storage": {"storageClassName": class, "resources": {"requests": {"storage": size}}},
        },
    })
}

/// What KubeVirt's user guide has a person apply: the VM's volume is another.
fn goes_to(disk: &str) -> Value {
    json!({"spec": {
        "updateVolumesStrategy": "Migration",
        "dataVolumeTemplates": [],
        "template": {"spec": {"volumes": [{"name": "root", "dataVolume": {"name": disk}}]}},
    }})
}

/// Parity 1, 2, 9: disks of one node go to others while the guest runs, from files to devices and
/// back, larger ones are seen to be larger; 6: one that is missing is waited for; the VM starts from
/// its new disk, and not from the one that it left.
#[tokio::test(flavor = "multi_thread")]
async fn disks_go_to_other_storage_while_the_guest_runs() -> Result<()> {
    let registry = Registry::start()?;
    let image = registry.push("guest", "disk/guest.raw", &guest::image("disk.raw")?)?;
    let cluster = Cluster::new(PROGRAM, &["--storage", "2Gi"]).await?;
    let storage = json!({
        "storageClassName": "local", "resources": {"requests": {"storage": "100Mi"}},
    });
    let root = json!({"name": "root", "dataVolume": {"name": "web-root"}});
    let template = import("web-root", &image, storage);
    cluster.create(VMS, vm("web", "Always", vec![root], vec![template])).await?;
    let (web, vmi) = (format!("{VMS}/web"), format!("{VMIS}/web"));
    cluster.until(&web, is_running).await?;
    let mut console = cluster.terminal("web")?;
    console.run("echo kept > /data/file; sync")?;
    let small = console.run("cat /sys/block/vda/size")?;
    Oracle::begin(&mut console)?;
    drop(console);
    let (mut writes, mut from) = (0, "web-root");
    for (disk, class, size) in
        [("on-block", "local-block", "200Mi"), ("on-files", "local", "300Mi")]
    {
        cluster.send("PATCH", &web, Some(goes_to(disk))).await?;
        let waits = |vm: &Value| {
            let conditions = vm["status"]["conditions"].as_array();
            let is = |c: &Value| c["type"] == "VolumesChange" && c["reason"] == "WaitingForVolumes";
            conditions.is_some_and(|all| all.iter().any(is))
        };
        cluster.until(&web, waits).await?;
        cluster.create(DISKS, blank(disk, class, size)).await?;
        let there = |vmi: &Value| {
            vmi["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] == disk
                && vmi["status"]["migratedVolumes"].is_null()
                && !holds(vmi, "VolumesChange")
        };
        cluster.until(&vmi, there).await?;
        cluster.until_qemus(1)?;
        let vm = cluster.until(&web, is_running).await?;
        ensure!(vm["status"]["volumeUpdateState"].is_null(), "{vm}");
        ensure!(!holds(&vm, "RestartRequired"), "{vm}");
        let old = cluster.send("GET", &format!("{CLAIMS}/{from}"), None).await?;
        let note = &old["metadata"]["annotations"]["godwit.dev/superseded"];
        ensure!(note.as_str().is_some_and(|note| note.contains(disk)), "{old}");
        let mut console = cluster.console("web")?;
        let more = Oracle::again(&mut console).check()?;
        ensure!(more > writes, "the guest writes no more");
        let grown = console.run("cat /sys/block/vda/size")?;
        let sectors = |text: &str| text.trim().parse::<u64>();
        ensure!(sectors(&grown)? > sectors(&small)?, "{small} {grown}");
        (writes, from) = (more, disk);
    }

    // It starts from where it is, and what it was is kept from being started by mistake.
    cluster.does(&["vm", "restart", "web"])?;
    let again =
        cluster.send("GET", &format!("{OWNERS}/web"), None).await?["status"]["epoch"].clone();
    cluster.until(&format!("{OWNERS}/web"), |owner| owner["status"]["epoch"] != again).await?;
    cluster.until(&web, is_running).await?;
    let mut console = cluster.terminal("web")?;
    ensure!(console.run("cat /data/file")?.trim() == "kept");
    drop(console);
    cluster.does(&["vm", "stop", "web"])?;
    cluster.until(&web, shows("Stopped")).await?;
    let mut back = goes_to("on-block");
    back["spec"]["updateVolumesStrategy"] = Value::Null;
    cluster.send("PATCH", &web, Some(back)).await?;
    cluster.does(&["vm", "start", "web"])?;
    let stale = |vmi: &Value| {
        let conditions = vmi["status"]["conditions"].as_array();
        conditions.is_some_and(|all| all.iter().any(|c| c["reason"] == "StaleDisk"))
    };
    cluster.until(&vmi, stale).await?;
    ensure!(cluster.qemus()?.is_empty(), "it runs on a disk that it has left");
    Ok(())
}
