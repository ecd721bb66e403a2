//! Godwit's own moves.

use super::{DISK_MIB, MEMORY_MIB, Run, SOON, full_disk, listen, load, two_hosts, whole};
use crate::guest;
use crate::witness::{Line, Witness};
use crate::world::{Host, Process, World};
use anyhow::{Context, Result, bail, ensure};
use launcher::migration::progress::Progress;
use std::cell::Cell;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

const VM: &str = "bench";
const POLL: Duration = Duration::from_millis(2);
/// What the oracle writes at a time.
const BLOCK: usize = 4096;

struct Scene {
    world: World,
    a: Host,
    b: Host,
    on_a: Process,
    _on_b: Process,
    witness: Witness,
}

/// A loaded guest on host a, whose disk `make_disk` makes; b is `delay` away.
fn scene(
    godwit: &Path,
    delay: Option<Duration>,
    make_disk: impl FnOnce(&Path) -> Result<()>,
) -> Result<Scene> {
    let world = World::new(godwit)?;
    let (a, b) = two_hosts(&world, delay)?;
    let disk = world.path("a/root.raw");
    make_disk(&disk)?;
    let on_a = a.launch(VM, &guest::spec(VM, &disk, MEMORY_MIB)?, &[])?;
    let on_b = b.receive(VM, &[])?;
    world.wait_running(&a, VM)?;
    let witness = Witness::new();
    let mut line = witness.listen(&a.folder(VM).join("oracle.sock"))?;
    load(&witness, &mut line)?;
    Ok(Scene { world, a, b, on_a, _on_b: on_b, witness })
}

fn full(disk: &Path) -> Result<()> {
    full_disk(disk, DISK_MIB)
}

impl Scene {
    fn begin(&self, from: &Host, to: &Host, more: &[&str]) -> Result<Child> {
        let mut command = self.world.move_command(VM, from, to, more);
        let log = File::create(self.world.path("move.log"))?;
        Ok(command.stdout(log.try_clone()?).stderr(log).spawn()?)
    }

    fn finish(&self, mut moving: Child) -> Result<()> {
        if !moving.wait()?.success() {
            bail!("{}", std::fs::read_to_string(self.world.path("move.log"))?);
        }
        Ok(())
    }

    /// Awaits a move from a to b, in which nothing may be lost.
    fn finish_whole(&self, moving: Child) -> Result<()> {
        let line = listen(&self.witness, &self.b.folder(VM).join("oracle.sock"));
        self.finish(moving)?;
        self.witness.wait_alive(SOON)?;
        whole(&mut line?)
    }

    /// Moves the guest; follows it. Returns the run and the line to its oracle.
    fn hop(&self, from: &Host, to: &Host, more: &[&str]) -> Result<(Run, Line)> {
        let begun = Instant::now();
        let moving = self.begin(from, to, more)?;
        let line = listen(&self.witness, &to.folder(VM).join("oracle.sock"));
        self.finish(moving)?;
        let took = begun.elapsed();
        self.witness.wait_alive(SOON)?;
        Ok((Run::since(begun, took, &self.witness), line?))
    }

    fn progress(&self, host: &Host) -> Result<Progress> {
        Ok(self.world.status(host, VM)?.migration.context("no move")?.progress)
    }

    /// Waits until the move under way is as `holds` says.
    fn wait(&self, holds: impl Fn(&str, &Progress) -> bool) -> Result<()> {
        let until = Instant::now() + SOON;
        loop {
            let now = self.world.status(&self.a, VM)?.migration;
            match now {
                Some(m) if holds(&m.phase, &m.progress) => return Ok(()),
                _ if Instant::now() > until => bail!("the move does not get there: {now:?}"),
                _ => std::thread::sleep(POLL),
            }
        }
    }
}

/// A whole move of a full disk.
///
/// # Errors
/// When it fails, or something is lost.
pub fn run(godwit: &Path) -> Result<Run> {
    let scene = scene(godwit, None, full)?;
    let (run, mut line) = scene.hop(&scene.a, &scene.b, &[])?;
    whole(&mut line)?;
    Ok(run)
}

/// What a way back after 1 % of the disk was changed costs.
#[derive(Debug, Clone, Copy)]
pub struct WayBack {
    /// Share of the disk that was changed.
    pub changed: f64,
    /// Disk bytes sent, for each byte that was changed.
    pub sent_per_changed: f64,
}

/// Moves there, changes 1 % of the disk, and moves back.
///
/// # Errors
/// When a move fails, or something is lost.
pub fn way_back(godwit: &Path) -> Result<WayBack> {
    let scene = scene(godwit, None, full)?;
    let (_, mut line) = scene.hop(&scene.a, &scene.b, &[])?;
    line.command("write stop", SOON)?;
    let percent = DISK_MIB / 100;
    let region = format!("dev=/dev/vda offset=64M len={percent}M");
    line.command(&format!("write start {region} batch=64 seed=9 id=1"), SOON)?;
    // It picks its slots at random: after five times their number, 99 % were written.
    let slots = (percent << 20) / BLOCK as u64;
    scene.witness.wait_written_by(1, 5 * slots, SOON)?;
    line.command("write stop id=1", SOON)?;
    let (at_a, at_b) = (scene.world.path("a/root.raw"), scene.b.folder(VM).join("root.raw"));
    let changed = differing(&at_a, &at_b)?;
    let disk = format!("root={}", at_a.display());
    let (_, mut line) = scene.hop(&scene.b, &scene.a, &["--disk", &disk])?;
    whole(&mut line)?;
    let sent = scene.progress(&scene.b)?.bytes_sent as f64;
    let (changed, all) = (changed as f64, (DISK_MIB << 20) as f64);
    Ok(WayBack { changed: changed / all, sent_per_changed: sent / changed })
}

/// Bytes of the blocks in which two disks differ.
fn differing(one: &Path, other: &Path) -> Result<u64> {
    let (mut one, mut other) = (File::open(one)?, File::open(other)?);
    let (mut ours, mut theirs) = (vec![0; 4 << 20], vec![0; 4 << 20]);
    let mut blocks = 0;
    for _ in 0..DISK_MIB / 4 {
        one.read_exact(&mut ours)?;
        other.read_exact(&mut theirs)?;
        let pairs = ours.chunks(BLOCK).zip(theirs.chunks(BLOCK));
        blocks += pairs.filter(|(our, their)| our != their).count();
    }
    Ok((blocks * BLOCK) as u64)
}

/// The share of the disk that is sent again when the target's gateway dies at half.
///
/// # Errors
/// When the move does not outlast that.
pub fn sent_again_after_a_cut(godwit: &Path) -> Result<f64> {
    let mut scene = scene(godwit, None, full)?;
    let moving = scene.begin(&scene.a, &scene.b, &[])?;
    scene.wait(|_, progress| {
        progress.bytes_total > 0 && progress.bytes_left < progress.bytes_total / 2
    })?;
    scene.b.kill_gateway();
    scene.b.start_gateway()?;
    scene.finish_whole(moving)?;
    let again = scene.progress(&scene.a)?.bytes_again;
    ensure!(again > 0, "no stream broke when the gateway was killed");
    Ok(again as f64 / (DISK_MIB << 20) as f64)
}

/// Bytes per second of the seed of a full disk of `mib` over a link of this RTT,
/// between the first and the last tenth of it.
///
/// # Errors
/// When the move fails.
pub fn disk_rate(godwit: &Path, rtt: Duration, mib: u64) -> Result<f64> {
    let scene = scene(godwit, Some(rtt / 2), |disk| full_disk(disk, mib))?;
    let moving = scene.begin(&scene.a, &scene.b, &[])?;
    let left = |tenths: u64| -> Result<(Instant, u64)> {
        let left = Cell::new(0);
        scene.wait(|_, progress| {
            left.set(progress.bytes_left);
            progress.bytes_total > 0 && progress.bytes_left <= progress.bytes_total / 10 * tenths
        })?;
        Ok((Instant::now(), left.get()))
    };
    let ((began, before), (ended, after)) = (left(9)?, left(1)?);
    scene.finish_whole(moving)?;
    Ok((before - after) as f64 / (ended - began).as_secs_f64())
}

/// Seconds that a GiB of hole costs a whole move, over `gib` of them. Below zero
/// when it is less than what two moves differ by.
///
/// # Errors
/// When a move fails.
pub fn hole_cost(godwit: &Path, gib: u64) -> Result<f64> {
    let whole_move = |bytes: u64| -> Result<f64> {
        let scene = scene(godwit, None, |disk| Ok(File::create(disk)?.set_len(bytes)?))?;
        let (run, mut line) = scene.hop(&scene.a, &scene.b, &[])?;
        whole(&mut line)?;
        Ok(run.took.as_secs_f64())
    };
    let (small, large) = (whole_move(1 << 30)?, whole_move((gib + 1) << 30)?);
    Ok((large - small) / gib as f64)
}

/// Resident MiB of a launcher whose guest runs and does not move.
///
/// # Errors
/// When the system does not tell.
pub fn idle_launcher(godwit: &Path) -> Result<f64> {
    let scene = scene(godwit, None, |disk| guest::disk(disk, 64))?;
    let status = std::fs::read_to_string(format!("/proc/{}/status", scene.on_a.pid()))?;
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).context("no VmRSS")?;
    let kib: f64 = line.split_whitespace().nth(1).context("no VmRSS")?.parse()?;
    Ok(kib / 1024.0)
}
