//! One fault at one point of a move, and everything that must hold afterwards.
//!
//! ```text
//!  stage (two far hosts, a guest whose oracle works)
//!    └─ move ── stands at a point ── fault ── go on ── both halves end, or are in doubt
//!         └─ heal (links, gateways, launchers) ── one owner ── nothing lost ── move again
//! ```

mod after;
mod stage;

use anyhow::{Context, Result, ensure};
use stage::Stage;
use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What runs.
#[derive(Debug, Clone)]
pub struct Programs {
    /// Godwit.
    pub godwit: PathBuf,
    /// A QEMU other than the installed one: the stub.
    pub stub: Option<PathBuf>,
}

/// A host in a trial.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Where the guest is at first.
    Source,
    /// Where it is to go.
    Target,
}

impl Side {
    const BOTH: [Side; 2] = [Side::Source, Side::Target];

    fn other(self) -> Self {
        match self {
            Side::Source => Side::Target,
            Side::Target => Side::Source,
        }
    }
}

/// How a move comes to a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum By {
    /// Straight on.
    Success,
    /// It is cancelled in this state of the source.
    Cancel(&'static str),
    /// Somebody else holds the target's disk when QEMU is to run the guest there.
    Refusal,
}

/// Where a move is when the fault comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Point {
    /// Whose half stands.
    pub side: Side,
    /// The state that it has just entered.
    pub state: &'static str,
    /// How it comes there.
    pub by: By,
}

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Nothing does.
    None,
    /// A launcher is killed.
    Launcher(Side),
    /// A gateway is killed and started again.
    Gateway(Side),
    /// The link is cut for some seconds.
    Cut(Duration),
    /// The link is cut, and stays so until both halves have ended or are in doubt.
    CutForGood,
    /// The user wants it no more.
    Cancel,
}

/// When it goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// When the move comes to a point.
    At(Point),
    /// So long after its begin.
    After(Duration),
}

/// What the guest's oracle does meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Load {
    /// Durable writes of 4 KiB per second.
    pub writes: u32,
    /// Pages of memory counted up per second.
    pub pages: u32,
}

/// A trial.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Trial {
    /// When.
    pub when: Moment,
    /// What.
    pub fault: Fault,
    /// What else, and how long after that.
    pub then: Option<(Duration, Fault)>,
    /// QEMU's additional memory channels.
    pub multifd: u8,
    /// What the guest does.
    pub load: Load,
}

const fn point(by: By, side: Side, state: &'static str) -> Point {
    Point { side, state, by }
}

/// Every step of both halves, on all ways through a move.
pub const POINTS: [Point; 24] = [
    point(By::Success, Side::Source, "Seeding"),
    point(By::Success, Side::Source, "Seeded"),
    point(By::Success, Side::Source, "Arming"),
    point(By::Success, Side::Source, "Converging"),
    point(By::Success, Side::Source, "Paused"),
    point(By::Success, Side::Source, "Loading"),
    point(By::Success, Side::Target, "Loaded"),
    point(By::Success, Side::Source, "Committing"),
    point(By::Success, Side::Source, "Committed"),
    point(By::Success, Side::Target, "Adopting"),
    point(By::Success, Side::Target, "Activating"),
    point(By::Success, Side::Target, "Released"),
    point(By::Success, Side::Target, "Running"),
    point(By::Success, Side::Source, "Released"),
    point(By::Cancel("Converging"), Side::Source, "Aborting"),
    point(By::Cancel("Loading"), Side::Source, "Aborting"),
    point(By::Cancel("Loading"), Side::Source, "Resuming"),
    point(By::Cancel("Paused"), Side::Source, "Ended"),
    point(By::Cancel("Paused"), Side::Target, "Discarded"),
    point(By::Refusal, Side::Target, "Withdrawing"),
    point(By::Refusal, Side::Target, "GivingBack"),
    point(By::Refusal, Side::Target, "GaveBack"),
    point(By::Refusal, Side::Source, "HandingBack"),
    point(By::Refusal, Side::Source, "Resuming"),
];

/// Everything that can go wrong at a point.
pub const FAULTS: [Fault; 7] = [
    Fault::Launcher(Side::Source),
    Fault::Launcher(Side::Target),
    Fault::Gateway(Side::Source),
    Fault::Gateway(Side::Target),
    Fault::Cut(Duration::from_secs(3)),
    Fault::CutForGood,
    Fault::Cancel,
];

impl Load {
    /// A guest that works, but lets itself be caught.
    pub const MODERATE: Load = Load { writes: 200, pages: 1000 };
}

impl Fault {
    /// Seconds to be without a link, and seconds of patience, that suit it: a cut
    /// that heals must be outlasted, all else is to be noticed soon.
    fn deadlines(self) -> (u64, u64) {
        match self {
            Fault::Cut(time) => ((3 * time.as_secs() + 2).max(4), (3 * time.as_secs() + 2).max(10)),
            // N.B. they hold before the fault too, on the busiest machine.
            _ => (4, 10),
        }
    }
}

/// A failpoint's name.
impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let half = match self.side {
            Side::Source => "source",
            Side::Target => "target",
        };
        write!(f, "{half}:{}", self.state)
    }
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Moment::After(time) => write!(f, "after {} ms", time.as_millis()),
            Moment::At(point) => match point.by {
                By::Success => write!(f, "at {point}"),
                By::Cancel(state) => write!(f, "at {point} after a cancel at {state}"),
                By::Refusal => write!(f, "at {point} after a refusal to run"),
            },
        }
    }
}

impl fmt::Display for Trial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {}", self.fault, self.when)?;
        if let Some((time, fault)) = self.then {
            write!(f, ", then {fault:?} after {} ms", time.as_millis())?;
        }
        if self.multifd > 0 {
            write!(f, ", multifd {}", self.multifd)?;
        }
        if self.load != Load::MODERATE {
            write!(f, ", {:?}", self.load)?;
        }
        Ok(())
    }
}

impl Trial {
    /// One fault at a point, under a moderate load.
    pub fn at(point: Point, fault: Fault, multifd: u8) -> Self {
        Self { when: Moment::At(point), fault, then: None, multifd, load: Load::MODERATE }
    }

    /// Runs it.
    ///
    /// # Errors
    /// What does not hold, and where the logs are.
    pub fn run(&self, programs: &Programs) -> Result<()> {
        let mut stage = Stage::new(programs)?;
        let ended = self.play(&mut stage);
        ended.with_context(|| {
            let logs = stage.keep();
            format!("{self}: logs are kept in {}", logs.display())
        })
    }

    fn play(&self, stage: &mut Stage) -> Result<()> {
        stage.oracle_works(Side::Source, self.load).context("at the guest's start")?;
        stage.begin(self).context("at the begin")?;
        stage.strike(self.fault).context("at the fault")?;
        if let Some((time, fault)) = self.then {
            std::thread::sleep(time);
            stage.strike(fault).context("at the second fault")?;
        }
        stage.wait_ends().context("at the end of both halves")?;
        stage.heal();
        stage.wait_decided().context("after healing")?;
        let owner = stage.settle_owner().context("at settling the owner")?;
        stage.nothing_lost(owner)?;
        stage.nothing_left_over()?;
        stage.move_again(owner, self.load).context("at the second attempt")
    }

    /// Seconds to be without a link, and seconds of patience.
    fn deadlines(&self) -> (u64, u64) {
        let all = [Some(self.fault), self.then.map(|(_, fault)| fault)];
        all.into_iter().flatten().map(Fault::deadlines).max().unwrap_or_default()
    }
}

/// Runs trials, `at_once` of them at a time, and all of them whatever fails.
///
/// # Errors
/// Those of all trials that failed.
pub fn run_all(trials: &[Trial], programs: &Programs, at_once: usize) -> Result<()> {
    let next = AtomicUsize::new(0);
    let failures = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..at_once {
            scope.spawn(|| {
                while let Some(trial) = trials.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let begun = Instant::now();
                    let ended = trial.run(programs);
                    let how = if ended.is_ok() { "ok" } else { "FAILED" };
                    eprintln!("{how}: {trial}, {:.1} s", begun.elapsed().as_secs_f64());
                    if let Err(error) = ended {
                        failures.lock().unwrap_or_else(PoisonError::into_inner).push(error);
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().unwrap_or_else(PoisonError::into_inner);
    let (count, all) = (failures.len(), trials.len());
    let said: Vec<String> = failures.iter().map(|error| format!("{error:#}")).collect();
    ensure!(count == 0, "{count} of {all} trials failed:\n{}", said.join("\n"));
    Ok(())
}
