//! Two hosts and a guest that finds its own losses: where most tests of a move begin.

use crate::guest;
use crate::witness::{Line, Witness};
use crate::world::{Host, Process, World};
use anyhow::{Context, Result};
use launcher::migration::status::Outcome;
use oracle::protocol::Check;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

/// The VM's name.
pub const VM: &str = "web";
/// Whatever a guest does takes less, on a busy machine too.
pub const SOON: Duration = Duration::from_secs(120);

/// Two hosts, a guest on the first whose oracle writes, counts and ticks.
#[derive(Debug)]
pub struct Scene {
    /// Where the guest begins.
    pub a: Host,
    /// Where it is to go.
    pub b: Host,
    /// The launcher on `a`.
    pub on_a: Option<Process>,
    /// The launcher on `b`.
    pub on_b: Option<Process>,
    /// Has heard all that the oracle said.
    pub witness: Witness,
    /// Where all of it lies. N.B. last: its folder goes when nobody works in it any more.
    pub world: World,
}

/// A scene for the `godwit` at `program`. `target` are more arguments for the
/// launcher on the second host.
///
/// # Errors
/// When it does not come up.
pub fn scene(program: &Path, target: &[&str]) -> Result<Scene> {
    scene_on(program, target, |world| {
        let disk = world.path("a/root.raw");
        guest::disk(&disk, 64)?;
        Ok(vec![("root", disk)])
    })
}

/// A scene whose guest has the disks that `disks` makes, by name; it boots from the first.
///
/// # Errors
/// When it does not come up.
pub fn scene_on(
    program: &Path,
    target: &[&str],
    disks: impl FnOnce(&World) -> Result<Vec<(&'static str, PathBuf)>>,
) -> Result<Scene> {
    let world = World::new(program)?;
    let (a, b) = (world.host("a", 2)?, world.host("b", 3)?);
    let disks = disks(&world)?;
    let disks: Vec<_> = disks.iter().map(|(name, path)| (*name, path.as_path())).collect();
    let on_a = a.launch(VM, &guest::spec_with(VM, &disks, 64)?, &["--failpoints"])?;
    let on_b = b.receive(VM, &[&["--failpoints"], target].concat())?;
    let witness = Witness::new();
    world.wait_running(&a, VM)?;
    let mut line = witness.listen(&a.folder(VM).join("oracle.sock"))?;
    witness.wait_ready(SOON)?;
    line.command("write start dev=/dev/vda offset=32M len=4M rate=200 seed=7", SOON)?;
    line.command("memory start mib=4 rate=1000", SOON)?;
    line.command("tick start us=2000", SOON)?;
    witness.wait_written(100, SOON)?;
    Ok(Scene { a, b, on_a: Some(on_a), on_b: Some(on_b), witness, world })
}

impl Scene {
    /// The argument that moves the guest back to the disk where it began.
    pub fn disk_back(&self) -> String {
        format!("root={}", self.world.path("a/root.raw").display())
    }

    /// Follows the guest to `host`, which must run it, and has it check everything.
    ///
    /// # Errors
    /// When it does not run there or gives no answer.
    pub fn check(&self, host: &Host) -> Result<Check> {
        self.world.wait_running(host, VM)?;
        let mut line = self.listen(host)?;
        self.witness.wait_alive(SOON)?;
        line.check()
    }

    /// A line to the oracle on `host`.
    ///
    /// # Errors
    /// When its socket cannot be reached.
    pub fn listen(&self, host: &Host) -> Result<Line> {
        self.witness.listen(&host.folder(VM).join("oracle.sock"))
    }

    /// Nothing was lost, and the guest writes on.
    ///
    /// # Errors
    /// When it does not run on `host`, or writes no more.
    ///
    /// # Panics
    /// When something was lost.
    pub fn nothing_is_lost(&self, host: &Host) -> Result<()> {
        let sums = self.check(host)?;
        assert_eq!((sums.lost, sums.stale), (0, 0), "{:?}", self.witness.losses());
        assert!(self.witness.losses().is_empty(), "{:?}", self.witness.losses());
        self.witness.wait_written(self.witness.written() + 20, SOON)
    }

    /// Moves the guest.
    ///
    /// # Errors
    /// When the command cannot be run or hangs.
    ///
    /// # Panics
    /// When the move fails.
    pub fn moved(&self, from: &Host, to: &Host, more: &[&str]) -> Result<()> {
        let ended = self.world.move_vm(VM, from, to, more)?;
        assert!(ended.status.success(), "{}", ended.err);
        Ok(())
    }

    /// What was left and what is run on now are equal.
    ///
    /// # Errors
    /// When the command cannot be run or hangs.
    ///
    /// # Panics
    /// When they differ or cannot be compared.
    pub fn disks_are_equal(&self, from: &Host, to: &Host) -> Result<()> {
        let verified = self.world.verify(VM, from, to)?;
        assert!(verified.status.success(), "{verified:?}");
        Ok(())
    }

    /// A move from `a` to `to` fails, says `why`, and the guest goes on where it was.
    ///
    /// # Errors
    /// When the command cannot be run or hangs, or the guest does not go on.
    ///
    /// # Panics
    /// When the move succeeds or fails otherwise, or something was lost.
    pub fn is_refused(&self, to: &Host, more: &[&str], why: &str) -> Result<()> {
        let ended = self.world.move_vm(VM, &self.a, to, more)?;
        assert!(!ended.status.success(), "it went through: {}", ended.err);
        let told = ended.err.lines().filter(|line| line.contains(why)).count();
        assert_eq!(told, 1, "once '{why}', not: {}", ended.err);
        self.nothing_is_lost(&self.a)?;
        // The target has let go, too.
        self.world.wait_status(to, VM, "without a move", |s| {
            s.migration.as_ref().is_none_or(|m| m.outcome.is_some())
        })?;
        Ok(())
    }

    /// Begins a move that stops at a failpoint of `host`; returns once it stands there.
    ///
    /// # Errors
    /// When it does not get there in time.
    pub fn stands_at(&self, host: &Host, point: &str, more: &[&str]) -> Result<Child> {
        self.world.run(host.client(VM).arm(point))?;
        let mut command = self.world.move_command(VM, &self.a, &self.b, more);
        let moving = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        self.world.wait_status(host, VM, point, |s| {
            s.migration.as_ref().is_some_and(|m| m.failpoint.as_deref() == Some(point))
        })?;
        Ok(moving)
    }

    /// How the move has ended on `host`, once it has.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn outcome(&self, host: &Host) -> Result<Outcome> {
        let status = self.world.wait_status(host, VM, "at the move's end", |s| {
            s.migration
                .as_ref()
                .and_then(|m| m.outcome.as_ref())
                .is_some_and(|o| !matches!(o, Outcome::InDoubt { .. }))
        })?;
        status.migration.and_then(|m| m.outcome).context("it was waited for")
    }
}
