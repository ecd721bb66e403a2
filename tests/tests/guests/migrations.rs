//! Live migration inside a cluster, as KubeVirt's users ask for it, with guests that find their own
//! lost writes.

use crate::PROGRAM;
use anyhow::{Context, Result, ensure};
use e2e::cluster::Cluster;
use e2e::guest;
use e2e::registry::Registry;
use e2e::vms::{
    CLAIMS, DISKS, MOVES, OWNERS, Oracle, PODS, SETTINGS, VMIS, VMS, holds, import, is_running,
    migration, node, on_shared_storage, says, shows, until_at, vm,
};
use launcher::client::Client as Launcher;
use serde_json::{Value, json};
use std::fs::File;
use std::os::unix::fs::FileExt;

const NODES: [&str; 4] = ["--nodes", "2", "--storage", "2Gi"];

/// Parity 54, 57: shared disks, again and again; 48: a guest that stands still moves, and stands still;
/// 99: what is in effect is in the VMI's status.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_on_shared_storage_goes_from_node_to_node_and_loses_nothing() -> Result<()> {
    let registry = Registry::start()?;
    let image = registry.push("guest", "disk/guest.raw", &guest::image("disk.raw")?)?;
    let cluster = Cluster::new(PROGRAM, &NODES).await?;
    on_shared_storage(&cluster, "web", &image).await?;
    let vmi = format!("{VMIS}/web");
    let mut console = cluster.terminal("web")?;
    Oracle::begin(&mut console)?;
    drop(console);
    let mut before = cluster.send("GET", &vmi, None).await?;
    let mut writes = 0;
    for round in 0..3 {
        let name = format!("round-{round}");
        let paused = round == 1;
        if paused {
            cluster.does(&["vm", "pause", "web"])?;
            cluster.until(&vmi, |vmi| holds(vmi, "Paused")).await?;
        }
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
        if paused {
            let stands = cluster.until(&vmi, |vmi| holds(vmi, "Paused")).await?;
            ensure!(node(&stands) == node(&after), "{stands}");
            cluster.does(&["vm", "unpause", "web"])?;
            cluster.until(&vmi, |vmi| !holds(vmi, "Paused")).await?;
        }
        // The console is that of the node to which it went, and what the guest wrote is there.
        let mut console = cluster.console("web")?;
        let more = Oracle::again(&mut console).check()?;
        ensure!(more > writes, "the guest writes no more");
        writes = more;
        before = after;
    }
    // One that has moved begins anew in the same QEMU.
    let qemu = cluster.until_qemus(1)?;
    let mut console = cluster.console("web")?;
    console.run("touch /tmp/gone; (sleep 1; reboot -f) & true")?;
    // Its prompt now, and once it has booted.
    console.wait_for_shell()?;
    console.wait_for_shell()?;
    ensure!(console.run("ls /tmp/gone 2>/dev/null || echo anew")?.trim() == "anew");
    ensure!(cluster.until_qemus(1)? == qemu, "its QEMU ended when it was booted anew");
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
        let waits = |vm: &Value| says(vm, "VolumesChange", "WaitingForVolumes");
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
    let stale = |vmi: &Value| says(vmi, "Synchronized", "StaleDisk");
    cluster.until(&vmi, stale).await?;
    ensure!(cluster.qemus()?.is_empty(), "it runs on a disk that it has left");
    Ok(())
}

/// A disk that only its node can use follows its guest, without anybody being asked for anything, and
/// returns to where it was; a container disk's content comes along. (Parity 53 has KubeVirt refuse
/// it; 45, 56.) Where the disks are compared, one that is wrong is found.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_of_one_node_follows_its_guest_there_and_back() -> Result<()> {
    let registry = Registry::start()?;
    let image = registry.push("guest", "disk/guest.raw", &guest::image("disk.raw")?)?;
    let cluster = Cluster::with(PROGRAM, &NODES, &[("GODWIT_FAILPOINTS", "1")]).await?;
    let storage = json!({
        "storageClassName": "local", "resources": {"requests": {"storage": "100Mi"}},
    });
    let volumes = vec![
        json!({"name": "root", "dataVolume": {"name": "web-root"}}),
        json!({"name": "scratch", "emptyDisk": {"capacity": "16Mi"}}),
    ];
    let template = import("web-root", &image, storage);
    cluster.create(VMS, vm("web", "Always", volumes, vec![template])).await?;
    let (web, vmi) = (format!("{VMS}/web"), format!("{VMIS}/web"));
    cluster.until(&web, is_running).await?;
    let mut console = cluster.terminal("web")?;
    console.run("echo lost with the VM > /dev/vdb")?;
    Oracle::begin(&mut console)?;
    drop(console);
    let first = node(&cluster.send("GET", &vmi, None).await?).to_owned();
    let mut writes = 0;
    for round in 0..2 {
        let before = node(&cluster.send("GET", &vmi, None).await?).to_owned();
        let verified = cluster.tries(&["migrate", "vm/web", "--verify"])?;
        let told = String::from_utf8_lossy(&verified.stderr).into_owned();
        ensure!(verified.status.success() && told.contains("disks verified"), "{told}");
        let after = cluster.send("GET", &vmi, None).await?;
        ensure!(node(&after) != before, "round {round}: it is where it was");
        cluster.until(&vmi, |vmi| vmi["status"]["migratedVolumes"].is_null()).await?;
        cluster.until_qemus(1)?;
        let record = cluster.send("GET", &format!("{OWNERS}/web"), None).await?;
        let disk = record["status"]["volumes"]["root"].as_str().unwrap_or_default().to_owned();
        ensure!((disk == "web-root") == (node(&after) == first), "{record}");
        let named = |vm: &Value| {
            let volume = &vm["spec"]["template"]["spec"]["volumes"][0];
            let claim = volume["persistentVolumeClaim"]["claimName"].as_str();
            claim.or(volume["dataVolume"]["name"].as_str()) == Some(&disk)
        };
        cluster.until(&web, named).await?;
        let mut console = cluster.console("web")?;
        let more = Oracle::again(&mut console).check()?;
        ensure!(more > writes, "the guest writes no more");
        ensure!(console.run("head -c 4 /dev/vdb")?.trim() == "lost");
        writes = more;
    }
    let claims = cluster.send("GET", CLAIMS, None).await?;
    ensure!(claims["items"].as_array().is_some_and(|all| all.len() == 2), "{claims}");
    // What was left there was known, and only what has changed since was looked at.
    let moves = cluster.send("GET", MOVES, None).await?;
    let back = |m: &&Value| m["status"]["migrationState"]["targetNode"] == *first;
    let back = moves["items"].as_array().into_iter().flatten().find(back);
    let total = back.map(|back| back["status"]["progress"]["progress"]["bytes_total"].clone());
    let total = total.and_then(|total| total.as_u64()).context("no migration went back")?;
    ensure!(total < 50 << 20, "{total} bytes of disk were looked at on the way back");
    // Its last sector is none of any file's.
    let moved = goes_wrong(&cluster, |disk| {
        let last = disk.metadata()?.len() - 512;
        Ok(disk.write_all_at(b"not what was left", last)?)
    });
    let moved = moved.await?;
    let found = &moved["status"]["progress"]["verified"];
    ensure!(found["disks"] == "differ" && found["first"][0][0] == "root", "{moved}");
    Ok(())
}

/// Moves the guest with a comparison, and does something to its disk on the other node before it runs there.
async fn goes_wrong(cluster: &Cluster, does: impl Fn(&File) -> Result<()>) -> Result<Value> {
    let launcher = |node: &str, pod: &str| {
        let folder = format!("machine/nodes/{node}/handler/pods/default_{pod}");
        Launcher::new(&cluster.path(&folder), "default.web")
    };
    let text = |value: &Value| value.as_str().map(str::to_owned).context("no text");
    let record = cluster.send("GET", &format!("{OWNERS}/web"), None).await?;
    let status = &record["status"];
    let leaves = launcher(&text(&status["node"])?, &text(&status["pod"])?);
    leaves.arm("source:Seeding").await?;
    let mut wanted = migration("wrong", "web");
    wanted["metadata"]["annotations"] = json!({"godwit.dev/verify": "true"});
    cluster.create(MOVES, wanted).await?;
    until_at(&leaves, "source:Seeding").await?;
    let found = cluster.send("GET", &format!("{MOVES}/wrong"), None).await?;
    let state = &found["status"]["migrationState"];
    let there = text(&state["targetNode"])?;
    let comes = launcher(&there, &text(&state["targetPod"])?);
    comes.arm("target:Activating").await?;
    leaves.release().await?;
    until_at(&comes, "target:Activating").await?;
    for disk in guest::files(&cluster.path(&format!("machine/nodes/{there}/volumes")))? {
        does(&File::options().write(true).open(disk)?)?;
    }
    comes.release().await?;
    cluster.until_moved("wrong", "Succeeded").await
}

/// Parity 79 to 83: whenever it is cancelled, the guest is where it was; 49: a pod that finds no node
/// is given up; 12: a disk that is too small is said to be so, and nothing is tried; 55, 100: one
/// migration at a time.
#[tokio::test(flavor = "multi_thread")]
async fn a_migration_that_is_cancelled_or_cannot_be_leaves_the_guest_where_it_is() -> Result<()> {
    let registry = Registry::start()?;
    let image = registry.push("guest", "disk/guest.raw", &guest::image("disk.raw")?)?;
    let cluster = Cluster::new(PROGRAM, &NODES).await?;
    on_shared_storage(&cluster, "web", &image).await?;
    let vmi = format!("{VMIS}/web");
    let mut console = cluster.terminal("web")?;
    Oracle::begin(&mut console)?;
    let before = cluster.send("GET", &vmi, None).await?;
    let stays = async |why: &str| -> Result<()> {
        let after = cluster.send("GET", &vmi, None).await?;
        ensure!(node(&after) == node(&before), "{why}: it has moved");
        ensure!(after["status"]["migratedVolumes"].is_null(), "{why}: {after}");
        cluster.until_qemus(1)?;
        Ok(())
    };

    let mut nowhere = migration("nowhere", "web");
    nowhere["spec"]["addedNodeSelector"] = json!({"kubernetes.io/hostname": "nowhere"});
    nowhere["metadata"]["annotations"] =
        json!({"kubevirt.io/migrationUnschedulablePodTimeoutSeconds": "1"});
    cluster.create(MOVES, nowhere).await?;
    ensure!(cluster.create(MOVES, migration("second", "web")).await.is_err(), "two at once");
    let over = cluster.until_moved("nowhere", "Failed").await?;
    let why = over["status"]["migrationState"]["failureReason"].as_str().unwrap_or_default();
    ensure!(why.contains("Unschedulable"), "{why}");
    stays("no node").await?;

    // Slow enough to be caught at whatever point.
    let slow = json!({"spec": {"configuration": {"migrations": {"bandwidthPerMigration": "4Mi"}}}});
    cluster.send("PATCH", SETTINGS, Some(slow)).await?;
    for (name, at) in [("early", "Pending"), ("later", "Running")] {
        cluster.create(MOVES, migration(name, "web")).await?;
        let path = format!("{MOVES}/{name}");
        let reached = |m: &Value| {
            let passed = m["status"]["phaseTransitionTimestamps"].as_array();
            passed.is_some_and(|all| all.iter().any(|t| t["phase"] == at))
        };
        cluster.until(&path, reached).await?;
        cluster.send("DELETE", &path, None).await?;
        cluster.until_gone(&path).await?;
        stays(name).await?;
    }

    // By hand alone, the cluster says: then the command has not changed the VM either.
    let by_hand = json!({"spec": {"workloadUpdateStrategy": {"workloadUpdateMethods": []}}});
    cluster.send("PATCH", SETTINGS, Some(by_hand)).await?;
    let template = async || -> Result<Value> {
        Ok(cluster.send("GET", &format!("{VMS}/web"), None).await?["spec"].clone())
    };
    let before_it = template().await?;
    let said = cluster.does(&["migrate", "web", "--storage-class", "local"]);
    ensure!(said.is_err_and(|why| why.to_string().contains("workloadUpdateMethods")));
    ensure!(template().await? == before_it);
    let by_move =
        json!({"spec": {"workloadUpdateStrategy": {"workloadUpdateMethods": ["LiveMigrate"]}}});
    cluster.send("PATCH", SETTINGS, Some(by_move)).await?;

    let quick = json!({"spec": {"configuration": {"migrations": {"bandwidthPerMigration": null}}}});
    cluster.send("PATCH", SETTINGS, Some(quick)).await?;
    cluster.create(DISKS, blank("small", "shared", "16Mi")).await?;
    cluster.until(&format!("{DISKS}/small"), |disk| disk["status"]["phase"] == "Succeeded").await?;
    cluster.send("PATCH", &format!("{VMS}/web"), Some(goes_to("small"))).await?;
    let refused = |vm: &Value| holds(vm, "RestartRequired");
    cluster.until(&format!("{VMS}/web"), refused).await?;
    stays("too small").await?;
    let moves = cluster.send("GET", MOVES, None).await?;
    ensure!(moves["items"].as_array().is_some_and(|all| all.len() == 1), "{moves}");
    Oracle::again(&mut console).check()?;
    Ok(())
}

/// All that would make a move fail is told before it begins, with what it would take; parity 98: moves
/// take the network that the settings name, and those that are under way when it changes go on; 5, 92:
/// metrics tell how far they are.
#[tokio::test(flavor = "multi_thread")]
async fn a_move_is_foretold_and_takes_the_network_that_the_settings_name() -> Result<()> {
    let registry = Registry::start()?;
    let image = registry.push("guest", "disk/guest.raw", &guest::image("disk.raw")?)?;
    let network = ["--migration-network", "moves=127.80.7.0/24"];
    let cluster = Cluster::new(PROGRAM, &[&NODES[..], &network].concat()).await?;
    on_shared_storage(&cluster, "web", &image).await?;
    let mut console = cluster.terminal("web")?;
    Oracle::begin(&mut console)?;
    drop(console);

    let told: Value =
        serde_json::from_str(&cluster.does(&["migrate", "web", "--dry-run", "-o", "json"])?)?;
    let from = cluster.send("GET", &format!("{VMIS}/web"), None).await?;
    ensure!(told["node"] != node(&from) && told["faults"] == json!([]), "{told}");
    let forecast = &told["outlook"]["forecast"];
    // All nodes can use its disk: it stays where it is.
    ensure!(forecast["disk"] == 0 && forecast["memory"] == 128 << 20, "{told}");
    let to_class = cluster.does(&["migrate", "web", "--dry-run", "--storage-class", "local"])?;
    ensure!(
        to_class.contains("to copy") && to_class.contains("nothing speaks against it"),
        "{to_class}"
    );
    let full = json!({
        "apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "full"},
        "spec": {"hard": {"pods": "1"}},
    });
    let quotas = "/api/v1/namespaces/default/resourcequotas";
    cluster.create(quotas, full).await?;
    let is_counted = |quota: &Value| quota["status"]["used"]["pods"] == "1";
    cluster.until(&format!("{quotas}/full"), is_counted).await?;
    let nowhere = ["migrate", "web", "--dry-run", "--to-node", "nowhere"];
    let refused = cluster.refuses(&nowhere)?;
    ensure!(refused.contains("Unschedulable") && refused.contains("ExceededQuota"), "{refused}");
    cluster.send("DELETE", &format!("{quotas}/full"), None).await?;
    let open = cluster.send("GET", MOVES, None).await?;
    ensure!(open["items"] == json!([]), "a move that was only foretold: {open}");

    // One that is under way when the network changes.
    let rate = |rate: Value| json!({"spec": {"configuration": {"migrations": {"bandwidthPerMigration": rate}}}});
    let network =
        |name: Value| json!({"spec": {"configuration": {"migrations": {"network": name}}}});
    cluster.send("PATCH", SETTINGS, Some(rate(json!("8Mi")))).await?;
    cluster.create(MOVES, migration("old", "web")).await?;
    let runs = |m: &Value| m["status"]["phase"] == "Running";
    cluster.until(&format!("{MOVES}/old"), runs).await?;
    cluster.send("PATCH", SETTINGS, Some(network(json!("moves")))).await?;
    let is_there = |node: &Value| {
        let gateway = node["metadata"]["annotations"]["godwit.dev/gateway"].as_str();
        gateway.is_some_and(|address| address.starts_with("127.80.7."))
    };
    for node in ["local-1", "local-2"] {
        cluster.until(&format!("/api/v1/nodes/{node}"), is_there).await?;
    }
    let metrics = cluster.text("/metrics").await?;
    let remaining = "kubevirt_vmi_migration_data_remaining_bytes{name=\"web\"";
    ensure!(metrics.contains(remaining), "{metrics}");
    let address = |m: &Value| {
        let address = m["status"]["migrationState"]["targetNodeAddress"].as_str();
        address.unwrap_or_default().to_owned()
    };
    let old = cluster.until_moved("old", "Succeeded").await?;
    ensure!(address(&old) == "127.0.0.1", "{old}");
    cluster.send("PATCH", SETTINGS, Some(rate(Value::Null))).await?;
    cluster.create(MOVES, migration("new", "web")).await?;
    let new = cluster.until_moved("new", "Succeeded").await?;
    ensure!(address(&new).starts_with("127.80.7."), "{new}");
    ensure!(new["status"]["migrationState"]["migrationNetworkType"] == "Migration", "{new}");

    // One that no node is in: that is told, and nothing is tried another way.
    cluster.send("PATCH", SETTINGS, Some(network(json!("other")))).await?;
    let is_nowhere = |node: &Value| node["metadata"]["annotations"]["godwit.dev/gateway"].is_null();
    cluster.until("/api/v1/nodes/local-1", is_nowhere).await?;
    let refused = cluster.refuses(&["migrate", "web", "--dry-run"])?;
    ensure!(refused.contains("network for migrations"), "{refused}");
    cluster.send("PATCH", SETTINGS, Some(network(Value::Null))).await?;
    let mut console = cluster.console("web")?;
    Oracle::again(&mut console).check()?;
    Ok(())
}

/// Parity 84: what is not through in its time is given up, by the policy that is the VMI's; 131, 132:
/// or its guest is stopped until it is through; 87: compressed.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_is_not_caught_in_time_stays_or_is_stopped_as_its_policy_says() -> Result<()> {
    const POLICIES: &str = "/apis/migrations.kubevirt.io/v1alpha1/migrationpolicies";
    let registry = Registry::start()?;
    let image = registry.push("guest", "disk/guest.raw", &guest::image("disk.raw")?)?;
    let cluster = Cluster::new(PROGRAM, &NODES).await?;
    on_shared_storage(&cluster, "web", &image).await?;
    let mut console = cluster.terminal("web")?;
    Oracle::begin(&mut console)?;
    // Faster than the link carries.
    console.run("(while :; do yes | head -c 41943040 > /tmp/dirt; done) & echo $! > /tmp/busy")?;
    drop(console);
    let slow = json!({"spec": {"configuration": {"migrations": {"bandwidthPerMigration": "6Mi"}}}});
    cluster.send("PATCH", SETTINGS, Some(slow)).await?;
    let policy = json!({
        "apiVersion": "migrations.kubevirt.io/v1alpha1", "kind": "MigrationPolicy",
        "metadata": {"name": "short"},
        "spec": {"completionTimeoutPerGiB": 5, "selectors": {
            "namespaceSelector": {"kubernetes.io/metadata.name": "default"},
        }},
    });
    cluster.create(POLICIES, policy).await?;
    cluster.create(MOVES, migration("late", "web")).await?;
    let late = cluster.until_moved("late", "Failed").await?;
    let state = &late["status"]["migrationState"];
    ensure!(state["migrationPolicyName"] == "short", "{state}");
    let why = state["failureReason"].as_str().unwrap_or_default();
    ensure!(why.contains("in the time that it had"), "{why}");
    nothing_is_lost(&cluster)?;

    let path = format!("{POLICIES}/short");
    let stop = json!({"spec": {"allowWorkloadDisruption": true, "completionTimeoutPerGiB": 20}});
    cluster.send("PATCH", &path, Some(stop)).await?;
    cluster.create(MOVES, migration("stopped", "web")).await?;
    let stopped = cluster.until_moved("stopped", "Succeeded").await?;
    ensure!(stopped["status"]["migrationState"]["mode"] == "Paused", "{stopped}");
    nothing_is_lost(&cluster)?;

    let mut console = cluster.console("web")?;
    console.run("kill $(cat /tmp/busy)")?;
    drop(console);
    let zip = json!({"spec": {"experimental": {"compression": "zstd"}}});
    cluster.send("PATCH", &path, Some(zip)).await?;
    cluster.create(MOVES, migration("zip", "web")).await?;
    let zip = cluster.until_moved("zip", "Succeeded").await?;
    let options = &zip["status"]["migrationState"]["migrationConfiguration"];
    ensure!(options["experimental"]["compression"] == "zstd", "{options}");
    nothing_is_lost(&cluster)
}

/// Has the oracle look, at the console of wherever the guest is.
fn nothing_is_lost(cluster: &Cluster) -> Result<()> {
    let mut console = cluster.console("web")?;
    Oracle::again(&mut console).check().map(|_| ())
}
