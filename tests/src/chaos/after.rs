//! What must hold when a fault is over.

use super::stage::{MIB, SOON, Stage, VM};
use super::{Load, Side};
use crate::guest;
use crate::witness::Witness;
use crate::world::{Host, Process};
use anyhow::{Context, Result, bail, ensure};
use launcher::status::Phase;
use std::path::Path;
use std::time::{Duration, Instant};

/// Who has the guest.
#[derive(Debug, Clone, Copy)]
pub(super) struct Owner {
    /// Where.
    pub side: Side,
    /// Whether it is the guest that ran before the fault, and not a new start from its disk.
    pub outlived: bool,
}

impl Stage {
    /// Starts what died again. Exactly one host has the guest in the end; the
    /// other one's launcher refuses to start it.
    pub(super) fn settle_owner(&mut self) -> Result<Owner> {
        let running = self.running()?;
        ensure!(running.len() < 2, "two instances run");
        let mut owner = running.first().map(|side| Owner { side: *side, outlived: true });
        let living = self.living();
        for side in Side::BOTH.into_iter().filter(|side| !living.contains(side)) {
            let launcher = match self.start_from_disk(side)? {
                Some(launcher) if owner.is_none() => {
                    owner = Some(Owner { side, outlived: false });
                    launcher
                }
                Some(_) => bail!("{side:?} starts the guest though {owner:?} has it"),
                None => self.host(side).receive(VM, &["--failpoints"])?,
            };
            self.launchers[side as usize] = Some(launcher);
        }
        owner.context("nobody has the guest, and nobody may start it")
    }

    fn running(&self) -> Result<Vec<Side>> {
        let mut running = Vec::new();
        for side in self.living() {
            if self.status(side)?.is_some_and(|s| s.phase == Phase::Running) {
                running.push(side);
            }
        }
        Ok(running)
    }

    /// Starts the VM from the disk that lies on this host, as its user would;
    /// None when the launcher refuses.
    fn start_from_disk(&mut self, side: Side) -> Result<Option<Process>> {
        let spec = guest::spec(VM, &self.disk(side), MIB)?;
        let Ok(mut launcher) = self.host(side).launch(VM, &spec, &["--failpoints"]) else {
            return Ok(None);
        };
        let until = Instant::now() + SOON;
        loop {
            if launcher.has_ended()? {
                return Ok(None);
            }
            let status = self.world.status(self.host(side), VM);
            if status.is_ok_and(|s| s.phase == Phase::Running) {
                return Ok(Some(launcher));
            }
            ensure!(Instant::now() < until, "the launcher neither starts nor refuses");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Every acknowledged write is on the owner's disk; a guest that outlived
    /// the fault finds all its writes and pages, and writes on.
    pub(super) fn nothing_lost(&self, owner: Owner) -> Result<()> {
        if owner.outlived {
            let before = self.witness.written();
            let socket = self.host(owner.side).folder(VM).join("oracle.sock");
            let mut line = self.witness.listen(&socket)?;
            self.witness.wait_alive(SOON)?;
            let sums = line.check()?;
            ensure!(sums.lost == 0 && sums.stale == 0, "{sums:?}: {:?}", self.witness.losses());
            self.witness.wait_written(before + 20, SOON)?;
        } else {
            let acknowledged = self.witness.written();
            let region = region(&self.disk(owner.side));
            let found = oracle::image::verify(&region, 4096, 7, acknowledged, |_| {})?;
            ensure!(found.lost == 0, "{found:?} after {acknowledged} acknowledged writes");
        }
        ensure!(self.witness.losses().is_empty(), "{:?}", self.witness.losses());
        self.never_two()
    }

    /// Beside launchers and gateways one process is left: the guest's QEMU.
    pub(super) fn nothing_left_over(&self) -> Result<()> {
        let launchers = self.launchers.iter().flatten().map(Process::pid);
        let gateways = self.hosts.iter().filter_map(Host::gateway_pid);
        let known: Vec<u32> = launchers.chain(gateways).collect();
        self.wait("one QEMU is left", |stage| {
            let all = processes(&stage.world.path(""))?;
            Ok(all.iter().filter(|pid| !known.contains(pid)).count() == 1)
        })
    }

    /// The guest moves to the other host.
    pub(super) fn move_again(&mut self, owner: Owner, load: Load) -> Result<()> {
        if !owner.outlived {
            self.witness = Witness::new();
            self.is_second_guest = true;
            self.oracle_works(owner.side, load)?;
        }
        let there = Owner { side: owner.side.other(), outlived: true };
        let (from, to) = (self.host(owner.side), self.host(there.side));
        let disk = format!("root={}", self.disk(there.side).display());
        let ended = self.world.move_vm(VM, from, to, &["--disk", &disk])?;
        ensure!(ended.status.success(), "{}", ended.err);
        self.world.wait_running(to, VM)?;
        self.nothing_lost(there)?;
        let verified = self.world.verify(VM, from, to)?;
        ensure!(verified.status.success(), "{}{}", verified.out, verified.err);
        self.nothing_left_over()
    }

    /// No tick came from two hosts: a guest never ran on where it had left.
    /// N.B. a line begins with what was said before, be it by the guest that died.
    fn never_two(&self) -> Result<()> {
        let doubled = self.witness.doubled();
        ensure!(self.is_second_guest || doubled.is_empty(), "two instances ticked: {doubled:?}");
        // What the stub of QEMU notices by itself.
        let violation = self.world.path("run.lock.violation");
        let said = std::fs::read_to_string(violation).unwrap_or_default();
        ensure!(said.is_empty(), "two instances ran: {said}");
        Ok(())
    }
}

fn region(disk: &Path) -> oracle::protocol::Range {
    oracle::protocol::Range { dev: disk.display().to_string(), offset: 32 << 20, len: 4 << 20 }
}

/// Processes that work in `folder` or were told of it.
fn processes(folder: &Path) -> Result<Vec<u32>> {
    let name = folder.display().to_string();
    let name = name.trim_end_matches('/');
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let path = entry?.path();
        let pid = path.file_name().and_then(|n| n.to_str()).and_then(|n| n.parse().ok());
        let Some(pid) = pid else { continue };
        // A process that ends meanwhile is none.
        let told = std::fs::read(path.join("cmdline")).unwrap_or_default();
        let told = String::from_utf8_lossy(&told).contains(name);
        let works = std::fs::read_link(path.join("cwd")).is_ok_and(|cwd| cwd.starts_with(name));
        if told || works {
            found.push(pid);
        }
    }
    Ok(found)
}
