//! What KubeVirt's tests of migration show of guests and their devices: see docs/parity.md.

use crate::PROGRAM;
use anyhow::{Context, Result, ensure};
use e2e::cluster::{Cluster, memory};
use e2e::guest;
use e2e::registry::Registry;
use e2e::terminal::Terminal;
use e2e::vms::{
    CLAIMS, MOVES, Oracle, PODS, SETTINGS, VMIS, VMS, holds, import, is_running, migration, node,
    vm,
};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

const NODES: [&str; 4] = ["--nodes", "2", "--storage", "2Gi"];
const OBJECTS: &str = "/api/v1/namespaces/default";
/// The disks that the guest's kernel has drivers for, in their order, and whether it writes to them.
const DISKS: [(&str, bool); 8] = [
    ("data", true),
    ("block", true),
    ("own", true),
    ("scratch", true),
    ("seed", false),
    ("config", false),
    ("secret", false),
    ("fixed", false),
];
/// A claim of raw storage.
fn claim(name: &str, class: &str, access: &str, mode: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name},
        "spec": {
            "accessModes": [access], "volumeMode": mode, "storageClassName": class,
            "resources": {"requests": {"storage": "16Mi"}},
        },
    })
}

/// A VM with a disk of each kind on each bus, and what else guests have. It boots from SATA.
fn laden(image: &str) -> Value {
    let container = json!({"image": image});
    let config = json!({"name": "settings"});
    let secret = json!({"secretName": "keys"});
    let data = json!({"accessModes": ["ReadWriteMany"], "storageClassName": "shared",
        "resources": {"requests": {"storage": "100Mi"}}});
    let volumes = json!([
        {"name": "data", "dataVolume": {"name": "data"}},
        {"name": "block", "persistentVolumeClaim": {"claimName": "block"}},
        {"name": "own", "persistentVolumeClaim": {"claimName": "own"}},
        {"name": "scratch", "emptyDisk": {"capacity": "16Mi"}},
        {"name": "seed", "cloudInitNoCloud": {"userData": "#cloud-config\nhostname: laden\n"}},
        {"name": "config", "configMap": config},
        {"name": "secret", "secret": secret},
        {"name": "fixed", "containerDisk": container},
        {"name": "root", "containerDisk": container},
        {"name": "sata-config", "configMap": config},
        {"name": "sata-secret", "secret": secret},
        {"name": "sata-seed", "cloudInitConfigDrive": {"userData": "#cloud-config\n"}},
        {"name": "sata-cd", "configMap": config},
        {"name": "scsi-cd", "secret": secret},
        {"name": "stick", "emptyDisk": {"capacity": "16Mi"}},
    ]);
    let mut disks: Vec<Value> = DISKS
        .iter()
        .map(|(name, writes)| json!({"name": name, "disk": {"bus": "virtio", "readonly": !writes}}))
        .collect();
    disks[3]["cache"] = "writeback".into();
    let on = |name: &str, bus: &str| json!({"name": name, "disk": {"bus": bus}});
    disks.extend([
        json!({"name": "root", "disk": {"bus": "sata"}, "bootOrder": 1}),
        on("sata-config", "sata"),
        on("sata-secret", "sata"),
        on("sata-seed", "sata"),
        json!({"name": "sata-cd", "cdrom": {"bus": "sata"}}),
        json!({"name": "scsi-cd", "cdrom": {"bus": "scsi"}}),
        on("stick", "usb"),
    ]);
    let mut laden = vm("laden", "Always", vec![], vec![import("data", image, data)]);
    let template = &mut laden["spec"]["template"];
    template["metadata"]["annotations"] =
        json!({"kubevirt.io/placePCIDevicesOnRootComplex": "true"});
    template["spec"]["volumes"] = volumes;
    template["spec"]["evictionStrategy"] = "LiveMigrateIfPossible".into();
    // Free pages are reported by a guest that has more than 64 MiB of them in one zone.
    template["spec"]["domain"]["memory"]["guest"] = "256Mi".into();
    template["spec"]["hostname"] = "named".into();
    template["spec"]["subdomain"] = "headless".into();
    let devices = &mut template["spec"]["domain"]["devices"];
    devices["disks"] = disks.into();
    devices["rng"] = json!({});
    devices["inputs"] = json!([
        {"name": "pointer", "type": "tablet", "bus": "usb"},
        {"name": "pen", "type": "tablet", "bus": "virtio"},
    ]);
    laden
}

/// What the guest reads of a disk, past its own memory.
fn digest(console: &mut Terminal, index: usize) -> Result<String> {
    let disk = char::from(b'a' + u8::try_from(index)?);
    let command = format!("echo 3 >/proc/sys/vm/drop_caches; sha256sum /dev/vd{disk}");
    let read = console.run(&command)?;
    let digest = read.split_whitespace().next().unwrap_or_default();
    ensure!(digest.len() == 64, "vd{disk} cannot be read: {read}");
    Ok(digest.to_owned())
}

/// The disks that nobody writes to, and how large each is.
fn read_only(console: &mut Terminal) -> Result<BTreeMap<&'static str, (String, String)>> {
    let mut all = BTreeMap::new();
    for (index, (name, writes)) in DISKS.iter().enumerate() {
        if !writes {
            let disk = char::from(b'a' + u8::try_from(index)?);
            let size = console.run(&format!("cat /sys/block/vd{disk}/size"))?;
            all.insert(*name, (digest(console, index)?, size));
        }
    }
    Ok(all)
}

/// Writes a line to each disk that the guest writes to but the oracle's, at a place of its own.
fn write(console: &mut Terminal, round: usize) -> Result<()> {
    for disk in ["vdb", "vdc", "vdd"] {
        console.run(&format!(
            "echo round {round} of {disk} | dd of=/dev/{disk} bs=4096 seek={round} conv=fsync 2>&1"
        ))?;
    }
    Ok(())
}

/// Reads all of them.
fn written(console: &mut Terminal, rounds: usize) -> Result<()> {
    console.run("echo 3 >/proc/sys/vm/drop_caches")?;
    for disk in ["vdb", "vdc", "vdd"] {
        for round in 0..rounds {
            let dd = format!("dd if=/dev/{disk} bs=4096 skip={round} count=1 2>/dev/null");
            let read = console.run(&format!("{dd} | head -n 1"))?;
            ensure!(read.trim() == format!("round {round} of {disk}"), "{disk}: {read}");
        }
    }
    Ok(())
}

/// Seconds by which the guest's clock is ahead of ours: no less and no more than these.
fn ahead(console: &mut Terminal) -> Result<(i64, i64)> {
    let now = || -> Result<i64> {
        Ok(i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs())?)
    };
    let before = now()?;
    let guest: i64 = console.run("date +%s")?.trim().parse()?;
    Ok((guest - now()? - 1, guest - before + 1))
}

/// How the only QEMU was started.
fn command(cluster: &Cluster) -> Result<String> {
    let [qemu] = cluster.until_qemus(1)?[..] else { unreachable!("one was waited for") };
    let command = std::fs::read(format!("/proc/{qemu}/cmdline"))?;
    Ok(String::from_utf8_lossy(&command).replace('\0', " "))
}

/// Sets how migrations are made from now on.
async fn options(cluster: &Cluster, options: Value) -> Result<()> {
    let settings = json!({"spec": {"configuration": {"migrations": options}}});
    cluster.send("PATCH", SETTINGS, Some(settings)).await.map(|_| ())
}

/// Seconds that a migration took.
fn duration(vmi: &Value) -> Result<i64> {
    let state = &vmi["status"]["migrationState"];
    let moment = |field: &str| -> Result<i64> {
        let text = state[field].as_str().with_context(|| format!("no {field}: {state}"))?;
        let at: jiff::Timestamp = text.parse()?;
        Ok(at.as_second())
    };
    Ok(moment("endTimestamp")? - moment("startTimestamp")?)
}

/// What the guest has no use for any more, its host has again.
fn gives_back(cluster: &Cluster, console: &mut Terminal) -> Result<()> {
    console.run("dd if=/dev/urandom of=/tmp/large bs=1M count=64 2>&1")?;
    let [qemu] = cluster.until_qemus(1)?[..] else { unreachable!("one was waited for") };
    let before = memory(qemu)?;
    console.run("rm /tmp/large; sync")?;
    // Pages are reported in blocks of some MiB, after some seconds, and not the last 64 MiB of a zone.
    let end = Instant::now() + Duration::from_secs(60);
    while memory(qemu)? > before - 16.0 * 1024.0 * 1024.0 {
        ensure!(Instant::now() < end, "QEMU had {before} bytes, and has {}", memory(qemu)?);
        std::thread::sleep(Duration::from_millis(200));
    }
    Ok(())
}

/// Parity 33: names in a headless service; 35: tablets, 36: writeback, 37: CD-ROMs on several buses, 38: LiveMigrateIfPossible, 39:
/// read-only disks, 43: cloud-init and devices on the root bus, 44: USB, 54: shared block, 56: disks
/// of one node beside shared ones, 58: cloud-init and shared storage, 77: generated disks, 91: many
/// kinds on SATA. 34: a limit makes it take longer; 51: a guest that is slowed down; 52: its clock;
/// 86: how long it may stand still; 89: pages that are free.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_with_every_kind_of_disk_and_device_moves_again_and_again() -> Result<()> {
    let registry = Registry::start()?;
    let image = registry.push("guest", "disk/guest.raw", &guest::image("disk.raw")?)?;
    let cluster = Cluster::new(PROGRAM, &NODES).await?;
    let files = json!({"one": "1".repeat(100_000), "two": "2"});
    let settings = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "settings"},
        "data": files});
    cluster.create(&format!("{OBJECTS}/configmaps"), settings).await?;
    let keys = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "keys"},
        "stringData": files});
    cluster.create(&format!("{OBJECTS}/secrets"), keys).await?;
    cluster.create(CLAIMS, claim("block", "shared-block", "ReadWriteMany", "Block")).await?;
    cluster.create(CLAIMS, claim("own", "local", "ReadWriteOnce", "Filesystem")).await?;
    cluster.create(VMS, laden(&image)).await?;
    cluster.until(&format!("{VMS}/laden"), is_running).await?;
    let vmi = format!("{VMIS}/laden");
    cluster.until(&vmi, |vmi| holds(vmi, "LiveMigratable")).await?;
    let mut console = cluster.terminal("laden")?;
    let generated = read_only(&mut console)?;
    let clock = ahead(&mut console)?;
    gives_back(&cluster, &mut console)?;
    // Something to send, so that a limit is felt.
    console.run("dd if=/dev/urandom of=/tmp/noise bs=1M count=24 2>&1")?;
    write(&mut console, 0)?;
    Oracle::begin(&mut console)?;
    drop(console);

    let devices = [
        "usb-storage,bus=usb0.0",
        "usb-tablet",
        "virtio-tablet-pci",
        "ide-cd",
        "ide-hd",
        "scsi-cd",
        "virtio-rng-pci",
        "virtio-balloon-pci",
    ];
    let mut before = cluster.send("GET", &vmi, None).await?;
    let (mut writes, mut took) = (0, Vec::new());
    let rounds = [
        ("plain", json!({"bandwidthPerMigration": null})),
        ("limited", json!({"bandwidthPerMigration": "4Mi", "maxDowntimeMs": 2500})),
        ("slowed", json!({"bandwidthPerMigration": null, "allowAutoConverge": true})),
    ];
    for (round, (name, how)) in rounds.into_iter().enumerate() {
        options(&cluster, how.clone()).await?;
        if name == "slowed" {
            let mut console = cluster.console("laden")?;
            console.run(
                "(while :; do dd if=/dev/zero of=/tmp/noise bs=1M count=24; done) 2>/dev/null & :",
            )?;
        }
        cluster.create(MOVES, migration(name, "laden")).await?;
        cluster.until_moved(name, "Succeeded").await?;
        let idle = |vmi: &Value| vmi["status"]["migratedVolumes"].is_null();
        let after = cluster.until(&vmi, idle).await?;
        ensure!(node(&after) != node(&before), "{name}: it is where it was");
        let state = &after["status"]["migrationState"];
        ensure!(state["completed"] == true, "{state}");
        for field in ["maxDowntimeMs", "allowAutoConverge"] {
            let (said, is) = (&how[field], &state["migrationConfiguration"][field]);
            ensure!(said.is_null() || said == is, "{name}: {field} is {is}");
        }
        if let Some(most) = how["maxDowntimeMs"].as_u64() {
            let source = state["sourcePod"].as_str().context("no pod")?;
            let told = cluster.log(source, "").await?;
            ensure!(told.contains(&format!("max_downtime_ms={most} ")), "{name}: {told}");
        }
        took.push(duration(&after)?);
        let pod = state["targetPod"].as_str().context("no pod")?;
        let pod = cluster.send("GET", &format!("{PODS}/{pod}"), None).await?;
        let names = [&pod["spec"]["hostname"], &pod["spec"]["subdomain"]];
        ensure!(names == ["named", "headless"], "{pod}");
        let command = command(&cluster)?;
        for device in devices {
            ensure!(command.contains(device), "{name}: no {device} where it went: {command}");
        }
        let mut console = cluster.console("laden")?;
        if name == "slowed" {
            console.run("kill %% %2 2>/dev/null")?;
        }
        let found = read_only(&mut console)?;
        ensure!(found == generated, "{name}: disks were {generated:?}, and are {found:?}");
        written(&mut console, round + 1)?;
        write(&mut console, round + 1)?;
        let (least, most) = ahead(&mut console)?;
        // It stands still for a moment with each move, and never runs ahead.
        ensure!(most >= clock.0 - 10 && least <= clock.1, "{clock:?}, then {least} to {most}");
        let more = Oracle::again(&mut console).check()?;
        ensure!(more > writes, "the guest writes no more");
        (writes, before) = (more, after);
    }
    // 24 MiB that do not compress, at 4 MiB a second.
    ensure!(took[1] >= 5 && took[1] > took[0], "a limit is not felt: {took:?}");
    Ok(())
}
