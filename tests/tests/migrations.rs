//! Live migration inside a cluster, as KubeVirt's users ask for it, with guests that find their own
//! lost writes.

use anyhow::{Result, ensure};
use e2e::cluster::Cluster;
use e2e::guest;
use e2e::registry::Registry;
use e2e::vms::{MOVES, OWNERS, Oracle, PODS, VMIS, VMS, import, is_running, migration, vm};
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
