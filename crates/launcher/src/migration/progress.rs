//! What a move shows of itself: measured, never invented.

use mover::counters::{Counters, Limit};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::time::Duration;

/// One disk's share.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct DiskProgress {
    /// The disk's name.
    pub name: String,
    /// Its size in bytes.
    pub size: u64,
    /// Bytes of it that this attempt was asked to bring over so far.
    pub total: u64,
    /// Of those, bytes that are not safe at the target.
    pub left: u64,
}

/// The memory's share, as QEMU tells it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct MemoryProgress {
    /// Bytes of guest memory.
    pub total: u64,
    /// Bytes left to send in this pass.
    pub left: u64,
    /// Bytes sent so far.
    pub sent: u64,
    /// Bytes per second that are sent.
    #[serde(default)]
    pub rate: u64,
    /// Bytes per second that the guest dirties.
    pub dirty_rate: u64,
}

/// A move's progress at one moment.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// The disks.
    pub disks: Vec<DiskProgress>,
    /// Bytes of disk asked for so far; grows with every round.
    pub bytes_total: u64,
    /// Bytes of disk that are not safe at the target.
    pub bytes_left: u64,
    /// Bytes handed to the disk streams, after compression.
    pub bytes_sent: u64,
    /// Bytes that were sent again after a broken link.
    pub bytes_again: u64,
    /// How often a stream that had broken went on: of disks, of memory, or the control stream.
    #[serde(default)]
    pub resumes: u64,
    /// Bytes of disk per second that become safe.
    pub rate: u64,
    /// Bytes of disk per second that the guest dirties.
    pub dirty_rate: u64,
    /// Rounds over the disks so far.
    pub rounds: u32,
    /// The memory, once it moves.
    pub memory: Option<MemoryProgress>,
    /// Seconds until the guest runs at the target; None while unknown.
    pub eta_seconds: Option<f64>,
    /// Predicted pause in milliseconds; None while unknown.
    pub predicted_downtime_ms: Option<f64>,
    /// What limits the move now.
    pub limit: Option<Limit>,
    /// The limit on the guest's disk writes, bytes per second, while it is slowed down.
    pub throttle: Option<u64>,
}

impl Progress {
    /// Takes over what the data path has counted.
    pub(crate) fn count(&mut self, counters: &Counters, other_resumes: u64) {
        self.resumes = counters.resumes + other_resumes;
        self.bytes_total = counters.asked;
        self.bytes_sent = counters.sent;
        self.bytes_again = counters.again;
    }
}

/// Turns running totals into rates over the last seconds. Pure: the caller brings the time.
#[derive(Debug, Default)]
pub struct Meter {
    samples: VecDeque<(Duration, Counters)>,
}

/// Rates are over this span.
const SPAN: Duration = Duration::from_secs(3);

impl Meter {
    /// Adds the totals at time `now`.
    pub fn sample(&mut self, now: Duration, counters: Counters) {
        self.samples.push_back((now, counters));
        while self.samples.len() > 2 && self.samples[1].0 + SPAN < now {
            self.samples.pop_front();
        }
    }

    /// Bytes per second that became safe, and what limited them.
    pub fn rate(&self) -> (f64, Option<Limit>) {
        let (Some((t0, first)), Some((t1, last))) = (self.samples.front(), self.samples.back())
        else {
            return (0.0, None);
        };
        let span = t1.saturating_sub(*t0).as_secs_f64();
        if span <= 0.0 {
            return (0.0, None);
        }
        let delta = last.since(first);
        (delta.safe as f64 / span, delta.limit())
    }
}

/// What an ETA is made of.
#[derive(Debug, Clone, Copy, Default)]
pub struct Outlook {
    /// Bytes of disk left in this round.
    pub disk_left: u64,
    /// Bytes of disk per second.
    pub disk_rate: f64,
    /// Bytes of disk per second that the guest dirties.
    pub disk_dirty_rate: f64,
    /// Bytes of memory left.
    pub memory_left: u64,
    /// Bytes of memory per second, or the disk's rate while no memory moved yet.
    pub memory_rate: f64,
    /// Bytes of memory per second that the guest dirties.
    pub memory_dirty_rate: f64,
    /// Bytes of memory on their way that a pause has to wait for.
    pub buffered: u64,
    /// Round-trip time of the link.
    pub rtt: Duration,
    /// What pausing, loading the devices and writing the owner record take.
    pub fixed: Duration,
}

/// Rounds over `left` bytes at `rate` while `dirty` bytes/s come again form a
/// geometric series: left/rate * 1/(1 - dirty/rate). None: it never ends.
pub(crate) fn series(left: u64, rate: f64, dirty: f64) -> Option<f64> {
    if left == 0 {
        return Some(0.0);
    }
    (rate > dirty && rate > 0.0).then(|| left as f64 / (rate - dirty))
}

impl Outlook {
    /// Seconds until the guest runs at the target.
    pub fn eta(&self) -> Option<f64> {
        let disk = series(self.disk_left, self.disk_rate, self.disk_dirty_rate)?;
        let memory = series(self.memory_left, self.memory_rate, self.memory_dirty_rate)?;
        Some(disk + memory + self.downtime(self.disk_dirty_rate as u64 / 100).unwrap_or(0.0) / 1e3)
    }

    /// Milliseconds of pause if it began now with `delta` bytes of disk to send.
    pub fn downtime(&self, delta: u64) -> Option<f64> {
        if self.disk_rate <= 0.0 {
            return None;
        }
        let memory = if self.buffered > 0 { self.buffered as f64 / self.memory_rate } else { 0.0 };
        let bytes = delta as f64 / self.disk_rate + memory;
        Some((bytes + self.overhead().as_secs_f64()) * 1e3)
    }

    /// What a pause takes beside the bytes: last delta acknowledged, Loaded, Commit
    /// are two round trips and a half.
    pub fn overhead(&self) -> Duration {
        self.rtt.mul_f64(2.5) + self.fixed
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn the_eta_counts_what_the_guest_dirties_meanwhile_and_is_unknown_when_it_never_ends() {
        let outlook = Outlook { disk_left: 1000, disk_rate: 100.0, ..Outlook::default() };
        assert!((outlook.eta().unwrap() - 10.0).abs() < 0.1);
        let dirtied = Outlook { disk_dirty_rate: 50.0, ..outlook };
        assert!((dirtied.eta().unwrap() - 20.0).abs() < 0.1);
        assert_eq!(Outlook { disk_dirty_rate: 100.0, ..outlook }.eta(), None);
    }

    #[test]
    fn rates_are_of_the_last_seconds_only() {
        let mut meter = Meter::default();
        for second in 0..10u64 {
            let safe = if second < 5 { second * 1000 } else { 4000 };
            meter.sample(Duration::from_secs(second), Counters { safe, ..Counters::default() });
        }
        assert!(meter.rate().0 < 1.0);
    }
}
