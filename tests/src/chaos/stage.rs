//! The stage of a trial: two hosts, a guest, and a move that is stopped, broken
//! and let go.

use super::{By, Fault, Load, Moment, Point, Programs, Side, Trial};
use crate::guest;
use crate::witness::Witness;
use crate::world::{Host, Process, World};
use anyhow::{Context, Result, bail};
use channel::relay::DelayRelay;
use launcher::migration::status::Outcome;
use launcher::status::Status;
use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

pub(super) const VM: &str = "web";
pub(super) const MIB: u64 = 64;
/// Whatever takes longer than this hangs.
pub(super) const SOON: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(10);
/// A gateway is away for so long when it is killed.
const RESTART: Duration = Duration::from_millis(300);

pub(super) struct Stage {
    pub(super) world: World,
    pub(super) hosts: [Host; 2],
    pub(super) launchers: [Option<Process>; 2],
    pub(super) witness: Witness,
    /// The guest was started anew after its first one had died.
    pub(super) is_second_guest: bool,
    point: Option<Point>,
    moving: Option<Child>,
    /// The target's disk, locked by somebody else: the stub of QEMU uses `flock`.
    held: Option<File>,
}

impl Stage {
    /// A guest is started on the source, and a launcher waits for it on the target.
    pub(super) fn new(programs: &Programs) -> Result<Self> {
        let mut world = World::new(&programs.godwit)?;
        if let Some(stub) = &programs.stub {
            world.set_env("GODWIT_QEMU", stub);
            world.set_env("STUB_QEMU_RUN_LOCK", world.path("run.lock"));
        }
        let here = |name, number| world.far_host(name, number, Duration::ZERO);
        let hosts = [here("a", 2)?, here("b", 3)?];
        let witness = Witness::new();
        let mut stage = Self {
            world,
            hosts,
            launchers: [None, None],
            witness,
            is_second_guest: false,
            point: None,
            moving: None,
            held: None,
        };
        let disk = stage.disk(Side::Source);
        guest::disk(&disk, MIB)?;
        let spec = guest::spec(VM, &disk, MIB)?;
        let source = stage.host(Side::Source).launch(VM, &spec, &["--failpoints"])?;
        let target = stage.host(Side::Target).receive(VM, &["--failpoints"])?;
        stage.launchers = [Some(source), Some(target)];
        Ok(stage)
    }

    /// Has a fresh guest's oracle write, count and tick.
    pub(super) fn oracle_works(&self, side: Side, load: Load) -> Result<()> {
        self.world.wait_running(self.host(side), VM)?;
        let mut line = self.witness.listen(&self.host(side).folder(VM).join("oracle.sock"))?;
        self.witness.wait_ready(SOON)?;
        let Load { writes, pages } = load;
        let region = "dev=/dev/vda offset=32M len=4M seed=7";
        line.command(&format!("write start {region} rate={writes}"), SOON)?;
        line.command(&format!("memory start mib=4 rate={pages}"), SOON)?;
        line.command("tick start us=5000", SOON)?;
        self.witness.wait_written(100, SOON)
    }

    pub(super) fn host(&self, side: Side) -> &Host {
        &self.hosts[side as usize]
    }

    /// Where the guest's disk lies on a host.
    pub(super) fn disk(&self, side: Side) -> PathBuf {
        match side {
            Side::Source => self.world.path("a/root.raw"),
            Side::Target => self.host(side).folder(VM).join("root.raw"),
        }
    }

    /// A launcher's status, if it lives.
    pub(super) fn status(&self, side: Side) -> Result<Option<Status>> {
        match self.launchers[side as usize] {
            Some(_) => self.world.status(self.host(side), VM).map(Some),
            None => Ok(None),
        }
    }

    /// The sides whose launcher lives.
    pub(super) fn living(&self) -> Vec<Side> {
        Side::BOTH.into_iter().filter(|side| self.launchers[*side as usize].is_some()).collect()
    }

    /// Begins a move and has it stand at the trial's point.
    pub(super) fn begin(&mut self, trial: &Trial) -> Result<()> {
        match trial.when {
            Moment::At(point) => {
                self.come_to(trial, point)?;
                self.point = Some(point);
            }
            Moment::After(time) => {
                self.start_move(trial)?;
                std::thread::sleep(time);
            }
        }
        Ok(())
    }

    fn come_to(&mut self, trial: &Trial, point: Point) -> Result<()> {
        match point.by {
            By::Success => self.stand_at(trial, &point.to_string(), point.side),
            By::Cancel(state) => {
                self.stand_at(trial, &format!("source:{state}"), Side::Source)?;
                self.world.run(self.host(Side::Source).client(VM).cancel())?;
                self.go_round(Side::Source, point)
            }
            By::Refusal => {
                self.stand_at(trial, "target:Adopting", Side::Target)?;
                let disk = File::open(self.disk(Side::Target))?;
                disk.lock().context("the target's disk")?;
                self.held = Some(disk);
                self.go_round(Side::Target, point)
            }
        }
    }

    /// From where `side` stands to `point`.
    fn go_round(&self, side: Side, point: Point) -> Result<()> {
        let name = point.to_string();
        self.world.run(self.host(point.side).client(VM).arm(&name))?;
        self.world.run(self.host(side).client(VM).release())?;
        self.wait_standing(point.side, &name)
    }

    fn stand_at(&mut self, trial: &Trial, point: &str, side: Side) -> Result<()> {
        self.world.run(self.host(side).client(VM).arm(point))?;
        self.start_move(trial)?;
        self.wait_standing(side, point)
    }

    fn start_move(&mut self, trial: &Trial) -> Result<()> {
        let (reconnect, patience) = trial.deadlines();
        let [from, to] = &self.hosts;
        let mut command = self.world.move_command(VM, from, to, &[]);
        command.args(["--reconnect", &reconnect.to_string()]);
        command.args(["--patience", &patience.to_string()]);
        command.args(["--multifd", &trial.multifd.to_string()]);
        let log = File::create(self.world.path("move.log"))?;
        self.moving = Some(command.stdout(Stdio::null()).stderr(log).spawn()?);
        Ok(())
    }

    fn wait_standing(&self, side: Side, point: &str) -> Result<()> {
        self.wait(&format!("{side:?} stands at {point}"), |stage| {
            let status = stage.status(side)?;
            let at = status.and_then(|s| s.migration).and_then(|m| m.failpoint);
            Ok(at.as_deref() == Some(point))
        })
    }

    /// Lets the move go on from where it stands.
    fn go_on(&self) -> Result<()> {
        let Some(point) = self.point else { return Ok(()) };
        if self.launchers[point.side as usize].is_some() {
            self.world.run(self.host(point.side).client(VM).release())?;
        }
        Ok(())
    }

    /// Does what goes wrong, and lets the move run into it.
    pub(super) fn strike(&mut self, fault: Fault) -> Result<()> {
        match fault {
            Fault::None => self.go_on(),
            Fault::Launcher(side) => {
                if let Some(launcher) = self.launchers[side as usize].take() {
                    launcher.kill();
                }
                self.go_on()
            }
            Fault::Gateway(side) => {
                self.hosts[side as usize].kill_gateway();
                self.go_on()?;
                std::thread::sleep(RESTART);
                self.hosts[side as usize].start_gateway()
            }
            Fault::Cut(time) => {
                self.links(DelayRelay::cut);
                self.go_on()?;
                std::thread::sleep(time);
                self.links(DelayRelay::restore);
                Ok(())
            }
            Fault::CutForGood => {
                self.links(DelayRelay::cut);
                self.go_on()
            }
            Fault::Cancel => {
                // Refused when it is too late: then the move must succeed.
                let _ = self.world.run(self.host(Side::Source).client(VM).cancel());
                self.go_on()
            }
        }
    }

    fn links(&self, each: impl Fn(&DelayRelay)) {
        self.hosts.iter().filter_map(Host::link).for_each(each);
    }

    /// Waits until both halves have ended or say that they are in doubt.
    pub(super) fn wait_ends(&self) -> Result<()> {
        self.wait_outcomes("has ended or is in doubt", |outcome| outcome.is_some())
    }

    /// Takes back what is broken beside the launchers.
    pub(super) fn heal(&mut self) {
        self.held = None;
        self.links(DelayRelay::restore);
    }

    /// Waits until no half is in doubt any more, and until the command has ended.
    pub(super) fn wait_decided(&mut self) -> Result<()> {
        self.wait_outcomes("has ended", |outcome| {
            outcome.is_some_and(|o| !matches!(o, Outcome::InDoubt { .. }))
        })?;
        let until = Instant::now() + SOON;
        let Some(mut moving) = self.moving.take() else { return Ok(()) };
        while moving.try_wait()?.is_none() {
            if Instant::now() > until {
                moving.kill()?;
                moving.wait()?;
                bail!("`godwit move` does not end within {SOON:?}");
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    fn wait_outcomes(&self, what: &str, holds: impl Fn(Option<&Outcome>) -> bool) -> Result<()> {
        for side in self.living() {
            self.wait(&format!("{side:?} {what}"), |stage| {
                let migration = stage.status(side)?.and_then(|s| s.migration);
                Ok(migration.is_none_or(|m| holds(m.outcome.as_ref())))
            })?;
        }
        Ok(())
    }

    /// Waits until `holds`.
    pub(super) fn wait(&self, what: &str, holds: impl Fn(&Self) -> Result<bool>) -> Result<()> {
        let until = Instant::now() + SOON;
        while !holds(self).with_context(|| format!("while waiting until {what}"))? {
            if Instant::now() > until {
                let statuses = [self.status(Side::Source), self.status(Side::Target)];
                bail!("not within {SOON:?}: {what}; {statuses:?}");
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// Ends the move and keeps the folder; returns it.
    pub(super) fn keep(&mut self) -> PathBuf {
        if let Some(mut moving) = self.moving.take() {
            // It may have ended already.
            let _ = moving.kill();
            let _ = moving.wait();
        }
        self.world.keep()
    }
}
