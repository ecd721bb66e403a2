//! QEMU's own way: `blockdev-mirror` to an NBD export of the target, then
//! `migrate`, both through Godwit's gateways.
//!
//! The order is libvirt's: mirror until it keeps up, migrate up to the pause
//! before the switchover, end the mirror and the export, go on. QEMU's defaults
//! are kept but for the bandwidth, which is not limited.

use super::tunnel::{Tunnel, Way};
use super::{DISK_MIB, MEMORY_MIB, Run, SOON, full_disk, listen, load, two_hosts, whole};
use crate::guest;
use crate::witness::Witness;
use crate::world::{Host, World};
use anyhow::{Context, Result, bail};
use channel::preface::Stream;
use qmp::Client;
use qmp::commands::{
    BlockExportAdd, BlockJobCancel, BlockJobInfo, BlockdevAdd, BlockdevMirror, Cont, ExportType,
    Migrate, MigrateContinue, MigrateIncoming, MigrateSetCapabilities, MigrateSetParameters,
    MigrationCapability, MigrationCapabilityStatus, MigrationParameters, MigrationStatus,
    MirrorSync, NbdAddress, NbdServerStart, NbdServerStop, QueryBlockJobs, QueryMigrate,
};
use serde_json::json;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const ANSWER: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(2);
/// For a whole copy.
const LONG: Duration = Duration::from_secs(600);

/// Moves a guest as QEMU does it by itself.
///
/// # Errors
/// When QEMU refuses a step, or something is lost.
pub fn run(godwit: &Path) -> Result<Run> {
    let scene = scene(godwit, None, DISK_MIB)?;
    let Scene { world, witness, .. } = &scene;
    let begun = Instant::now();
    let target = scene.target()?;
    let mut line = listen(witness, &target.folder.join("oracle.sock"))?;
    world.run(scene.source.move_to(&target))?;
    let took = begun.elapsed();
    witness.wait_alive(SOON)?;
    whole(&mut line)?;
    Ok(Run::since(begun, took, witness))
}

/// The pause of `migrate` alone, as the guest sees it: straight from one QEMU to the other, with
/// one disk for both, and aiming at 50 ms as Godwit does. Whoever moves disks too adds to it.
///
/// # Errors
/// When QEMU refuses a step, or something is lost.
pub fn bare_pause(godwit: &Path) -> Result<Duration> {
    let scene = scene(godwit, None, 64)?;
    let Scene { world, witness, source, .. } = &scene;
    let begun = Instant::now();
    let disk = source.folder.join("disk.raw");
    let target = Qemu::start(world, &scene.b.dir, &disk, &["-incoming", "defer"])?;
    let mut line = listen(witness, &target.folder.join("oracle.sock"))?;
    world.run(source.move_memory_to(&target))?;
    witness.wait_alive(SOON)?;
    whole(&mut line)?;
    Ok(witness.pause_at_switchover_since(begun))
}

/// Bytes per second of the mirror of a full disk of `mib` over a link of this RTT,
/// between the first and the last tenth of it.
///
/// # Errors
/// When QEMU refuses a step.
pub fn disk_rate(godwit: &Path, rtt: Duration, mib: u64) -> Result<f64> {
    let scene = scene(godwit, Some(rtt / 2), mib)?;
    let target = scene.target()?;
    scene.world.run(async {
        scene.source.begin_mirror_to(&target).await?;
        let done = |tenths: u64| {
            let source = &scene.source;
            async move {
                let job = source.wait_mirror(|job| job.offset >= job.len / 10 * tenths).await?;
                anyhow::Ok((Instant::now(), job.offset))
            }
        };
        let ((began, before), (ended, after)) = (done(1).await?, done(9).await?);
        Ok((after - before) as f64 / (ended - began).as_secs_f64())
    })
}

/// A loaded guest whose disk is full, and a way to where it is to go.
struct Scene {
    source: Qemu,
    _tunnel: Tunnel,
    witness: Witness,
    _a: Host,
    b: Host,
    mib: u64,
    world: World,
}

fn scene(godwit: &Path, delay: Option<Duration>, mib: u64) -> Result<Scene> {
    let world = World::new(godwit)?;
    let (a, b) = two_hosts(&world, delay)?;
    let disk = a.dir.join("disk.raw");
    full_disk(&disk, mib)?;
    let source = Qemu::start(&world, &a.dir, &disk, &[])?;
    let way = |stream, name: &str| Way { stream, near: a.dir.join(name), far: b.dir.join(name) };
    let ways = vec![way(Stream::Disk(0), "nbd.sock"), way(Stream::Memory(0), "memory.sock")];
    let tunnel = Tunnel::open(&world, &a, &b, ways)?;
    let witness = Witness::new();
    let mut line = listen(&witness, &a.dir.join("oracle.sock"))?;
    load(&witness, &mut line)?;
    Ok(Scene { source, _tunnel: tunnel, witness, _a: a, b, mib, world })
}

impl Scene {
    fn target(&self) -> Result<Qemu> {
        let copy = self.b.dir.join("disk.raw");
        File::create(&copy)?.set_len(self.mib << 20)?;
        Qemu::start(&self.world, &self.b.dir, &copy, &["-incoming", "defer"])
    }
}

/// A QEMU with the guest's hardware.
struct Qemu {
    child: Child,
    client: Client,
    folder: PathBuf,
}

impl Qemu {
    fn start(world: &World, folder: &Path, disk: &Path, more: &[&str]) -> Result<Self> {
        let at = |name: &str| folder.join(name).display().to_string();
        let node = json!({
            "driver": "raw", "node-name": "disk",
            "file": {"driver": "file", "filename": disk, "cache": {"direct": true}},
        });
        let cmdline = std::fs::read_to_string(guest::image("cmdline")?)?;
        let mut child = Command::new("qemu-system-x86_64")
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            // As Godwit's guests: see there why not a multiple of 256 KiB.
            .args(["-machine", "pc,accel=tcg", "-m", &format!("size={}K", MEMORY_MIB * 1024 + 8)])
            .arg("-kernel")
            .arg(guest::image("vmlinuz")?)
            .arg("-initrd")
            .arg(guest::image("initramfs.img")?)
            .args(["-append", cmdline.trim(), "-blockdev", &node.to_string()])
            .args(["-device", "virtio-blk-pci,drive=disk", "-serial", "null"])
            .args(["-serial", &format!("unix:{},server=on,wait=off", at("oracle.sock"))])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", at("qmp.sock"))])
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(folder.join("qemu.log"))?)
            .spawn()
            .context("cannot run qemu-system-x86_64")?;
        match world.run(Client::connect(folder.join("qmp.sock"), SOON)) {
            Ok(client) => Ok(Self { child, client, folder: folder.to_owned() }),
            Err(error) => {
                child.kill()?;
                child.wait()?;
                Err(error.into())
            }
        }
    }

    fn socket(&self, name: &str) -> String {
        self.folder.join(name).display().to_string()
    }

    async fn move_to(&self, target: &Self) -> Result<()> {
        self.begin_mirror_to(target).await?;
        self.wait_mirror(|job| job.ready).await?;
        target.set_up().await?;
        self.set_up().await?;
        let to = |qemu: &Self| format!("unix:{}", qemu.socket("memory.sock"));
        target.client.execute(MigrateIncoming { uri: to(target) }, ANSWER).await?;
        self.client.execute(Migrate { uri: to(self) }, ANSWER).await?;
        self.wait_migration(MigrationStatus::PreSwitchover).await?;
        self.end_mirror().await?;
        target.client.execute(NbdServerStop {}, ANSWER).await?;
        self.switch_over_to(target).await
    }

    async fn move_memory_to(&self, target: &Self) -> Result<()> {
        self.set_up().await?;
        let aim = MigrationParameters { downtime_limit: Some(50), ..Default::default() };
        self.client.execute(MigrateSetParameters(aim), ANSWER).await?;
        let uri = format!("unix:{}", target.socket("bare.sock"));
        target.client.execute(MigrateIncoming { uri: uri.clone() }, ANSWER).await?;
        self.client.execute(Migrate { uri }, ANSWER).await?;
        self.wait_migration(MigrationStatus::PreSwitchover).await?;
        self.switch_over_to(target).await
    }

    /// From the pause before the switchover to the guest that runs at its target.
    async fn switch_over_to(&self, target: &Self) -> Result<()> {
        let state = MigrationStatus::PreSwitchover;
        self.client.execute(MigrateContinue { state }, ANSWER).await?;
        target.wait_migration(MigrationStatus::Completed).await?;
        target.client.execute(Cont {}, ANSWER).await?;
        Ok(())
    }

    async fn begin_mirror_to(&self, target: &Self) -> Result<()> {
        let addr = NbdAddress::Unix { path: target.socket("nbd.sock") };
        target.client.execute(NbdServerStart { addr, ..Default::default() }, ANSWER).await?;
        let export = BlockExportAdd {
            r#type: ExportType::Nbd,
            id: "disk".into(),
            node_name: "disk".into(),
            writable: Some(true),
            ..Default::default()
        };
        target.client.execute(export, ANSWER).await?;
        let remote = json!({
            "driver": "nbd", "node-name": "remote", "export": "disk",
            "server": {"type": "unix", "path": self.socket("nbd.sock")},
        });
        self.client.execute(BlockdevAdd(remote), ANSWER).await?;
        let mirror = BlockdevMirror {
            job_id: "mirror".into(),
            device: "disk".into(),
            target: "remote".into(),
            sync: MirrorSync::Full,
            ..Default::default()
        };
        self.client.execute(mirror, ANSWER).await?;
        Ok(())
    }

    /// Waits until the mirror is as `holds` says.
    async fn wait_mirror(&self, holds: impl Fn(&BlockJobInfo) -> bool) -> Result<BlockJobInfo> {
        let until = Instant::now() + LONG;
        loop {
            let jobs = self.client.execute(QueryBlockJobs {}, ANSWER).await?;
            match jobs.into_iter().next() {
                None => bail!("the mirror ended too early"),
                Some(job) if holds(&job) => return Ok(job),
                Some(job) if Instant::now() > until => bail!("the mirror hangs: {job:?}"),
                Some(_) => tokio::time::sleep(POLL).await,
            }
        }
    }

    /// Ends the mirror, which then is equal: the guest stands still.
    async fn end_mirror(&self) -> Result<()> {
        let cancel = BlockJobCancel { device: "mirror".into(), ..Default::default() };
        self.client.execute(cancel, ANSWER).await?;
        let until = Instant::now() + SOON;
        while !self.client.execute(QueryBlockJobs {}, ANSWER).await?.is_empty() {
            if Instant::now() > until {
                bail!("the mirror does not end");
            }
            tokio::time::sleep(POLL).await;
        }
        Ok(())
    }

    async fn set_up(&self) -> Result<()> {
        let capability = MigrationCapability::PauseBeforeSwitchover;
        let capabilities = vec![MigrationCapabilityStatus { capability, state: true }];
        self.client.execute(MigrateSetCapabilities { capabilities }, ANSWER).await?;
        let unlimited = Some(64 << 30);
        let parameters = MigrationParameters { max_bandwidth: unlimited, ..Default::default() };
        self.client.execute(MigrateSetParameters(parameters), ANSWER).await?;
        Ok(())
    }

    async fn wait_migration(&self, wanted: MigrationStatus) -> Result<()> {
        let until = Instant::now() + LONG;
        loop {
            let info = self.client.execute(QueryMigrate {}, ANSWER).await?;
            match info.status {
                Some(status) if status == wanted => return Ok(()),
                Some(MigrationStatus::Failed) => bail!("the migration failed: {info:?}"),
                _ if Instant::now() > until => bail!("not {wanted:?} in {LONG:?}: {info:?}"),
                _ => tokio::time::sleep(POLL).await,
            }
        }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
