//! Guests go from one cluster to another and back, by KubeVirt's manifests: see docs/parity.md.

use crate::PROGRAM;
use anyhow::{Context, Result, ensure};
use e2e::cluster::Cluster;
use e2e::guest;
use e2e::registry::Registry;
use e2e::vms::{
    MOVES, Oracle, PODS, SETTINGS, VMIS, VMS, holds, import, is_running, kill, migration, shows, vm,
};
use serde_json::{Value, json};

pub const UP: [&str; 4] = ["--nodes", "1", "--storage", "2Gi"];
pub const MAPS: &str = "/api/v1/namespaces/kubevirt/configmaps";

/// Two clusters that believe each other.
pub struct World {
    pub east: Cluster,
    pub west: Cluster,
    count: usize,
}

/// The bundle of CAs that a cluster believes.
pub async fn bundle(cluster: &Cluster) -> Result<String> {
    let path = format!("{MAPS}/kubevirt-ca");
    let map = cluster.until(&path, |map| !map["data"]["ca-bundle"].is_null()).await?;
    Ok(map["data"]["ca-bundle"].as_str().context("no bundle")?.to_owned())
}

/// Has a cluster believe another, as KubeVirt's guide does it.
pub async fn believe(cluster: &Cluster, other: &str) -> Result<()> {
    let path = format!("{MAPS}/kubevirt-external-ca");
    cluster.until(&path, |_| true).await?;
    let external = json!({"data": {"ca-bundle": other}});
    cluster.send("PATCH", &path, Some(external)).await?;
    // What is there is taken.
    cluster.until(&path, |map| map["data"]["ca-bundle"] == "").await?;
    let has = |map: &Value| map["data"]["ca-bundle"].as_str().is_some_and(|b| b.contains(other));
    cluster.until(&format!("{MAPS}/kubevirt-ca"), has).await?;
    Ok(())
}

impl World {
    pub async fn new() -> Result<Self> {
        let east = Cluster::named("east", PROGRAM, &UP, &[]).await?;
        let west = Cluster::named("west", PROGRAM, &UP, &[]).await?;
        let (of_east, of_west) = (bundle(&east).await?, bundle(&west).await?);
        believe(&east, &of_west).await?;
        believe(&west, &of_east).await?;
        Ok(Self { east, west, count: 0 })
    }

    /// The guest of VM `web` goes from one cluster to the other, whose VM waits for it; returns both
    /// migrations when they are over.
    async fn go(&mut self, eastwards: bool) -> Result<(Value, Value)> {
        let (from, to) =
            if eastwards { (&self.west, &self.east) } else { (&self.east, &self.west) };
        self.count += 1;
        let id = format!("move-{}", self.count);
        to.until(&format!("{VMS}/web"), shows("WaitingForReceiver")).await?;
        let waits = |vmi: &Value| vmi["status"]["phase"] == "WaitingForSync";
        to.until(&format!("{VMIS}/web"), waits).await?;
        let mut receive = migration(&id, "web");
        receive["spec"]["receive"] = json!({"migrationID": id});
        to.create(MOVES, receive).await?;
        let tells = |m: &Value| m["status"]["synchronizationAddresses"][0].is_string();
        let target = to.until(&format!("{MOVES}/{id}"), tells).await?;
        ensure!(target["status"]["phase"] == "WaitingForSync", "{target}");
        let address = &target["status"]["synchronizationAddresses"][0];
        let settings = to.send("GET", SETTINGS, None).await?;
        ensure!(settings["status"]["synchronizationAddresses"][0] == *address, "{settings}");
        let mut send = migration(&id, "web");
        send["spec"]["sendTo"] = json!({"migrationID": id, "connectURL": address});
        from.create(MOVES, send).await?;
        let source = from.until_moved(&id, "Succeeded").await?;
        let target = to.until_moved(&id, "Succeeded").await?;
        Ok((source, target))
    }
}

/// A VM that waits for its guest, on a blank disk.
fn receiver() -> Value {
    let blank = json!({
        "apiVersion": "cdi.kubevirt.io/v1beta1", "kind": "DataVolume",
        "metadata": {"name": "web-root"},
        "spec": {"source": {"blank": {}}, "storage": storage()},
    });
    let root = json!({"name": "root", "dataVolume": {"name": "web-root"}});
    let mut vm = vm("web", "WaitAsReceiver", vec![root], vec![blank]);
    vm["metadata"]["annotations"] = json!({"kubevirt.io/restore-run-strategy": "Always"});
    vm
}

pub fn storage() -> Value {
    json!({
        "accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "100Mi"}},
        "storageClassName": "local",
    })
}

/// Bytes that a migration sent of disks.
fn sent(migration: &Value) -> u64 {
    migration["status"]["progress"]["progress"]["bytes_sent"].as_u64().unwrap_or_default()
}

/// Parity 32: a disk goes along, there and back.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_goes_to_another_cluster_and_comes_back_and_loses_nothing() -> Result<()> {
    let registry = Registry::start()?;
    let image = registry.push("guest", "disk/guest.raw", &guest::image("disk.raw")?)?;
    let mut world = World::new().await?;
    let web = format!("{VMS}/web");
    let root = json!({"name": "root", "dataVolume": {"name": "web-root"}});
    let template = import("web-root", &image, storage());
    world.east.create(VMS, vm("web", "Always", vec![root], vec![template])).await?;
    world.east.until(&web, is_running).await?;
    let mut console = world.east.terminal("web")?;
    Oracle::begin(&mut console)?;
    drop(console);
    world.west.create(VMS, receiver()).await?;
    let (source, _) = world.go(false).await?;
    let there = sent(&source);
    ensure!(there > 1 << 20, "the disk went along: {source}");
    // The guest is west's, and its VM runs as it is to; east's is halted, and is not started.
    let vm = world.west.until(&web, is_running).await?;
    ensure!(vm["spec"]["runStrategy"] == "Always", "{vm}");
    ensure!(vm["metadata"]["annotations"]["kubevirt.io/restore-run-strategy"].is_null(), "{vm}");
    let halted = |vm: &Value| vm["spec"]["runStrategy"] == "Halted" && shows("Stopped")(vm);
    world.east.until(&web, halted).await?;
    world.east.until_gone(&format!("{VMIS}/web")).await?;
    world.east.until_qemus(0)?;
    world.west.until_qemus(1)?;
    let mut console = world.west.console("web")?;
    let first = Oracle::again(&mut console).check()?;
    drop(console);

    let waits = json!({
        "metadata": {"annotations": {"kubevirt.io/restore-run-strategy": "Always"}},
        "spec": {"runStrategy": "WaitAsReceiver"},
    });
    world.east.send("PATCH", &web, Some(waits)).await?;
    let (back, _) = world.go(true).await?;
    world.east.until(&web, is_running).await?;
    world.west.until(&web, halted).await?;
    let mut console = world.east.console("web")?;
    let second = Oracle::again(&mut console).check()?;
    ensure!(second > first, "the guest writes no more");
    // Only what has changed goes back.
    ensure!(sent(&back) < there / 2, "{} bytes went there, {} back", there, sent(&back));
    Ok(())
}

/// A migration of VM `web` that is under way on both sides, slowly.
async fn set_out(world: &mut World) -> Result<String> {
    let (from, to) = (&world.east, &world.west);
    world.count += 1;
    let id = format!("move-{}", world.count);
    to.until(&format!("{VMIS}/web"), |vmi| vmi["status"]["phase"] == "WaitingForSync").await?;
    let settings =
        to.until(SETTINGS, |s| !s["status"]["synchronizationAddresses"].is_null()).await?;
    let address = &settings["status"]["synchronizationAddresses"][0];
    // In the other order: the source comes first.
    let mut send = migration(&id, "web");
    send["spec"]["sendTo"] = json!({"migrationID": id, "connectURL": address});
    from.create(MOVES, send).await?;
    let path = format!("{MOVES}/{id}");
    from.until(&path, |m| m["status"]["phase"] == "Synchronizing").await?;
    // It says what it waits for.
    from.until(&path, |m| holds(m, "decentralizedMigrationBlocked")).await?;
    let mut receive = migration(&id, "web");
    receive["spec"]["receive"] = json!({"migrationID": id});
    to.create(MOVES, receive).await?;
    from.until(&path, |m| m["status"]["phase"] == "Running").await?;
    to.until(&path, |m| m["status"]["phase"] == "Running").await?;
    Ok(id)
}

/// Both sides of a migration fail, and each can be begun again: nothing is left of it. `deleted` was
/// deleted, and is gone.
async fn both_fail(world: &World, id: &str, deleted: Option<&Cluster>) -> Result<()> {
    for cluster in [&world.east, &world.west] {
        match deleted.is_some_and(|deleted| std::ptr::eq(deleted, cluster)) {
            true => cluster.until_gone(&format!("{MOVES}/{id}")).await?,
            false => drop(cluster.until_moved(id, "Failed").await?),
        }
    }
    let waits = |vmi: &Value| vmi["status"]["phase"] == "WaitingForSync";
    world.west.until(&format!("{VMIS}/web"), waits).await?;
    world.west.until_qemus(0)?;
    let none = |pods: &Value| pods["items"].as_array().is_some_and(Vec::is_empty);
    world.west.until(PODS, none).await?;
    Ok(())
}

/// Parity 28: the source's migration is deleted; 29: the target's is; 30: the source's pod is killed. And
/// the guest moves all the same, with a second disk (25).
#[tokio::test(flavor = "multi_thread")]
async fn whatever_ends_a_migration_between_clusters_both_sides_know_it_and_begin_again()
-> Result<()> {
    let registry = Registry::start()?;
    let image = registry.push("guest", "disk/guest.raw", &guest::image("disk.raw")?)?;
    let mut world = World::new().await?;
    let web = format!("{VMS}/web");
    let volume = |name: &str| json!({"name": name, "dataVolume": {"name": format!("web-{name}")}});
    let blank = |name: &str| {
        json!({
            "apiVersion": "cdi.kubevirt.io/v1beta1", "kind": "DataVolume",
            "metadata": {"name": format!("web-{name}")},
            "spec": {"source": {"blank": {}}, "storage": storage()},
        })
    };
    let volumes = || vec![volume("root"), volume("data")];
    let own = vec![import("web-root", &image, storage()), blank("data")];
    world.east.create(VMS, vm("web", "Always", volumes(), own)).await?;
    world.east.until(&web, is_running).await?;
    let mut console = world.east.terminal("web")?;
    console.run("echo kept | dd of=/dev/vdb conv=fsync 2>/dev/null")?;
    Oracle::begin(&mut console)?;
    drop(console);
    let mut waits = vm("web", "WaitAsReceiver", volumes(), vec![blank("root"), blank("data")]);
    waits["metadata"]["annotations"] = json!({"kubevirt.io/restore-run-strategy": "Manual"});
    world.west.create(VMS, waits).await?;
    let slow = |limit: Value| json!({"spec": {"configuration": {"migrations": {"bandwidthPerMigration": limit}}}});
    world.east.send("PATCH", SETTINGS, Some(slow("4Mi".into()))).await?;

    for eastern in [true, false] {
        let id = set_out(&mut world).await?;
        let cluster = if eastern { &world.east } else { &world.west };
        cluster.send("DELETE", &format!("{MOVES}/{id}"), None).await?;
        both_fail(&world, &id, Some(cluster)).await?;
        let mut console = world.east.console("web")?;
        Oracle::again(&mut console).check()?;
    }
    let id = set_out(&mut world).await?;
    let before = world.east.send("GET", &format!("{VMIS}/web"), None).await?;
    let [qemu] = world.east.until_qemus(1)?[..] else { unreachable!("one was waited for") };
    kill(qemu)?;
    both_fail(&world, &id, None).await?;
    let anew = |vmi: &Value| {
        vmi["metadata"]["uid"] != before["metadata"]["uid"] && vmi["status"]["phase"] == "Running"
    };
    world.east.until(&format!("{VMIS}/web"), anew).await?;
    let mut console = world.east.terminal("web")?;
    Oracle::begin_with(&mut console, 8)?;
    drop(console);

    world.east.send("PATCH", SETTINGS, Some(slow(Value::Null))).await?;
    world.go(false).await?;
    let vm = world.west.until(&web, is_running).await?;
    ensure!(vm["spec"]["runStrategy"] == "Manual", "{vm}");
    let mut console = world.west.console("web")?;
    Oracle::again(&mut console).check()?;
    let data = console.run("dd if=/dev/vdb bs=512 count=1 2>/dev/null | head -n 1")?;
    ensure!(data.trim() == "kept", "{data}");
    Ok(())
}

/// Parity 31: from a device to a file, between namespaces of one cluster, to a VM of another name; 24: there
/// and back several times.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_goes_to_another_namespace_and_name_and_back_several_times() -> Result<()> {
    let registry = Registry::start()?;
    let image = registry.push("guest", "disk/guest.raw", &guest::image("disk.raw")?)?;
    let cluster = Cluster::new(PROGRAM, &UP).await?;
    let space = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "other"}});
    cluster.create("/api/v1/namespaces", space).await?;
    let there = |path: &str| path.replace("/default/", "/other/");
    let on = |class: &str, size: &str| {
        json!({
            "resources": {"requests": {"storage": size}}, "storageClassName": class,
        })
    };
    let volume = |disk: &str| {
        vec![
            json!({"name": "root", "dataVolume": {"name": disk}}),
            json!({"name": "image", "containerDisk": {"image": image}}),
        ]
    };
    let template = import("web-root", &image, on("local-block", "100Mi"));
    cluster.create(VMS, vm("web", "Always", volume("web-root"), vec![template])).await?;
    cluster.until(&format!("{VMS}/web"), is_running).await?;
    let mut console = cluster.terminal("web")?;
    let uuid = console.run("cat /sys/class/dmi/id/product_uuid")?;
    Oracle::begin(&mut console)?;
    drop(console);
    let blank = json!({
        "apiVersion": "cdi.kubevirt.io/v1beta1", "kind": "DataVolume", "metadata": {"name": "shop-root"},
        "spec": {"source": {"blank": {}}, "storage": on("local", "100Mi")},
    });
    let shop = vm("shop", "WaitAsReceiver", volume("shop-root"), vec![blank]);
    cluster.create(&there(VMS), shop).await?;
    let (here, shop) = ((VMS, VMIS, MOVES, "web"), (there(VMS), there(VMIS), there(MOVES), "shop"));
    let shop = (shop.0.as_str(), shop.1.as_str(), shop.2.as_str(), shop.3);
    for round in 0..4 {
        let (from, to) = if round % 2 == 0 { (here, shop) } else { (shop, here) };
        let id = format!("move-{round}");
        let waits = |vmi: &Value| vmi["status"]["phase"] == "WaitingForSync";
        cluster.until(&format!("{}/{}", to.1, to.3), waits).await?;
        let settings = cluster.send("GET", SETTINGS, None).await?;
        let address = &settings["status"]["synchronizationAddresses"][0];
        let mut receive = migration(&id, to.3);
        receive["spec"]["receive"] = json!({"migrationID": id});
        cluster.create(to.2, receive).await?;
        let mut send = migration(&id, from.3);
        send["spec"]["sendTo"] = json!({"migrationID": id, "connectURL": address});
        cluster.create(from.2, send).await?;
        for side in [from, to] {
            let over = |m: &Value| {
                ["Succeeded", "Failed"].contains(&m["status"]["phase"].as_str().unwrap_or_default())
            };
            let found = cluster.until(&format!("{}/{id}", side.2), over).await?;
            ensure!(found["status"]["phase"] == "Succeeded", "{round}: {found}");
        }
        cluster.until(&format!("{}/{}", to.0, to.3), is_running).await?;
        cluster.until(&format!("{}/{}", from.0, from.3), shows("Stopped")).await?;
        cluster.until_qemus(1)?;
        let waits = json!({"spec": {"runStrategy": "WaitAsReceiver"}});
        cluster.send("PATCH", &format!("{}/{}", from.0, from.3), Some(waits)).await?;
        if round % 2 == 1 {
            let mut console = cluster.console("web")?;
            Oracle::again(&mut console).check()?;
            // It is the machine that it was.
            ensure!(console.run("cat /sys/class/dmi/id/product_uuid")? == uuid);
        }
    }
    Ok(())
}
