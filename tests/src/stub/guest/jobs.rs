//! The guest's jobs, which move with it.

use super::Board;
use super::disk::{DirtyDisk, Writer};
use super::memory::{Counters, DirtyMemory};
use oracle::protocol::{Check, Report};
use oracle::worker::Pace;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io;
use std::time::{Duration, Instant};

/// `LOST` lines of one comparison; the count goes on.
pub const MAX_LINES: u64 = 16;

/// Bounded steps at a rate.
pub trait Job {
    /// What the host calls it.
    fn name(&self) -> String;

    /// When the next step is due.
    fn schedule(&mut self) -> &mut Schedule;

    /// Does one piece, and says when the next may begin.
    ///
    /// # Errors
    /// When it cannot go on.
    fn step(&mut self, board: &mut Board<'_>) -> io::Result<Instant>;

    /// Compares all there is with what must be.
    ///
    /// # Errors
    /// When it cannot be read.
    fn check(&mut self, _: &mut Board<'_>) -> io::Result<Check> {
        Ok(Check::default())
    }

    /// One short text for `status`.
    fn status(&self) -> String;
}

/// When a job is due. Times are this host's and do not move.
#[derive(Serialize, Deserialize)]
pub struct Schedule {
    pub running: bool,
    /// Units per second; 0: no limit.
    rate: u64,
    #[serde(skip)]
    pace: Option<Pace>,
    #[serde(skip)]
    due: Option<Instant>,
}

impl Schedule {
    /// Due at once.
    pub fn new(rate: u64) -> Self {
        Self { running: true, rate, pace: None, due: None }
    }

    /// The rate's pace.
    pub fn pace(&mut self) -> &mut Pace {
        self.pace.get_or_insert_with(|| Pace::new(self.rate))
    }

    fn due(&mut self) -> Option<Instant> {
        self.running.then(|| *self.due.get_or_insert_with(Instant::now))
    }
}

/// All jobs. A new one of a kind replaces the old; one that was stopped stays,
/// to be checked.
#[derive(Default, Serialize, Deserialize)]
pub struct Jobs {
    pub ticker: Option<Ticker>,
    pub writers: BTreeMap<u64, Writer>,
    pub counters: Option<Counters>,
    pub dirty_memory: Option<DirtyMemory>,
    pub dirty_disk: Option<DirtyDisk>,
}

impl Jobs {
    /// Every job.
    pub fn all(&mut self) -> Vec<&mut dyn Job> {
        let mut all: Vec<&mut dyn Job> = Vec::new();
        all.extend(self.ticker.iter_mut().map(|job| job as &mut dyn Job));
        all.extend(self.writers.values_mut().map(|job| job as &mut dyn Job));
        all.extend(self.counters.iter_mut().map(|job| job as &mut dyn Job));
        all.extend(self.dirty_memory.iter_mut().map(|job| job as &mut dyn Job));
        all.extend(self.dirty_disk.iter_mut().map(|job| job as &mut dyn Job));
        all
    }

    /// When the first job is due.
    pub fn earliest(&mut self) -> Option<Instant> {
        self.all().into_iter().filter_map(|job| job.schedule().due()).min()
    }

    /// Makes every job that runs due at once.
    pub fn hurry(&mut self) {
        self.all().into_iter().for_each(|job| job.schedule().due = None);
    }

    /// Has the job that is due first do its step, if its time has come.
    pub fn step(&mut self, board: &mut Board<'_>) {
        let mut due: Vec<_> = self
            .all()
            .into_iter()
            .filter_map(|job| job.schedule().due().map(|due| (due, job)))
            .collect();
        due.sort_by_key(|(due, _)| *due);
        let Some((due, job)) = due.into_iter().next() else { return };
        if due > Instant::now() {
            return;
        }
        match job.step(board) {
            Ok(next) => job.schedule().due = Some(next),
            Err(error) => {
                job.schedule().running = false;
                let text = format!("{} stopped: {error}", job.name());
                board.report(Report::Err(text));
            }
        }
    }

    /// The sums over all jobs.
    ///
    /// # Errors
    /// When one cannot be checked.
    pub fn check(&mut self, board: &mut Board<'_>) -> io::Result<Check> {
        let mut sums = Check::default();
        for job in self.all() {
            let one = job.check(board)?;
            sums.writes += one.writes;
            sums.slots += one.slots;
            sums.lost += one.lost;
            sums.pages += one.pages;
            sums.stale += one.stale;
        }
        Ok(sums)
    }

    /// The text of `status`.
    pub fn status(&mut self, uptime: Duration) -> String {
        let mut texts = vec![format!("up_us={}", uptime.as_micros())];
        for job in self.all() {
            let state = if job.schedule().running { "runs" } else { "stopped" };
            texts.push(format!("{} {state} {}", job.name(), job.status()));
        }
        texts.join("; ")
    }
}

/// Prints `T <n> <us>` about once per period.
#[derive(Serialize, Deserialize)]
pub struct Ticker {
    schedule: Schedule,
    us: u64,
    printed: u64,
    #[serde(skip)]
    due: Option<Instant>,
}

impl Ticker {
    /// Ticks every `us` microseconds.
    pub fn new(us: u64) -> Self {
        Self { schedule: Schedule::new(0), us, printed: 0, due: None }
    }
}

impl Job for Ticker {
    fn name(&self) -> String {
        "tick".into()
    }

    fn schedule(&mut self) -> &mut Schedule {
        &mut self.schedule
    }

    fn step(&mut self, board: &mut Board<'_>) -> io::Result<Instant> {
        // A tick that the line has no room for is never numbered.
        if board.output.is_empty() {
            self.printed += 1;
            let us = board.uptime.as_micros() as u64;
            board.report(Report::Tick { n: self.printed, us });
        }
        let now = Instant::now();
        // N.B. after a pause the missed ticks are skipped, not caught up on.
        let due = (self.due.unwrap_or(now) + Duration::from_micros(self.us)).max(now);
        self.due = Some(due);
        Ok(due)
    }

    fn status(&self) -> String {
        format!("printed={}", self.printed)
    }
}
