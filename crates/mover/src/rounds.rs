//! When a disk's rounds have come close enough, and what to do with a guest
//! that writes faster than the link carries. Pure.

use serde::{Deserialize, Serialize};
use std::time::Duration;

/// What the user allows for the sake of an end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Policy {
    /// The pause to aim at, milliseconds.
    pub downtime_ms: u64,
    /// The pause that is tolerated when the guest does not let itself be caught, milliseconds.
    pub max_downtime_ms: u64,
    /// Whether the guest's disk writes may be slowed down.
    pub throttle: bool,
    /// Rounds without progress before the move fails.
    pub patience: u32,
}

impl Default for Policy {
    fn default() -> Self {
        Self { downtime_ms: 50, max_downtime_ms: 300, throttle: true, patience: 6 }
    }
}

/// What a round saw.
#[derive(Debug, Clone, Copy)]
pub struct Round {
    /// Bytes that the guest dirtied while the round ran.
    pub dirtied: u64,
    /// How long the round ran.
    pub took: Duration,
    /// Bytes of disk per second that the streams made safe when they were busy; 0 when unknown.
    pub rate: f64,
}

impl Round {
    /// Bytes per second that the guest dirties.
    pub fn dirty_rate(&self) -> f64 {
        self.dirtied as f64 / self.took.as_secs_f64().max(1e-3)
    }
}

/// What to do after a round.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Next {
    /// The delta fits the pause: go on to the memory.
    Fits,
    /// Another round.
    Round,
    /// Slow the guest's writes down to so many bytes per second, then another round.
    Throttle(u64),
    /// The guest cannot be caught within the policy.
    Outrun,
}

/// The rounds so far.
#[derive(Debug, Clone, Default)]
pub struct Rounds {
    smallest: Option<u64>,
    stuck: u32,
    throttle: Option<u64>,
}

/// Below this a delta is small whatever the link: it is dominated by round trips.
const SMALL: u64 = 256 << 10;
/// The guest keeps at least this much of its disk: a guest that may not write at all looks hung.
const MIN_THROTTLE: u64 = 256 << 10;

impl Rounds {
    /// The limit that was asked for last, bytes per second.
    pub fn throttle(&self) -> Option<u64> {
        self.throttle
    }

    /// Decides after a round.
    pub fn next(&mut self, policy: &Policy, round: &Round) -> Next {
        let aim = Duration::from_millis(policy.downtime_ms);
        if fits(round, aim) {
            return Next::Fits;
        }
        let better = self.smallest.is_none_or(|s| round.dirtied < s / 10 * 9);
        self.smallest = Some(self.smallest.map_or(round.dirtied, |s| s.min(round.dirtied)));
        self.stuck = if better { 0 } else { self.stuck + 1 };
        if self.stuck == 0 {
            return Next::Round;
        }
        if policy.throttle
            && let Some(limit) = self.tighter(round)
        {
            self.throttle = Some(limit);
            self.smallest = None;
            return Next::Throttle(limit);
        }
        if fits(round, Duration::from_millis(policy.max_downtime_ms)) {
            return Next::Fits;
        }
        if self.stuck >= policy.patience { Next::Outrun } else { Next::Round }
    }

    /// Half of what the link carries first, then half of that, and so on.
    fn tighter(&self, round: &Round) -> Option<u64> {
        let link = (round.rate / 2.0) as u64;
        let limit = self.throttle.map_or(link, |limit| link.min(limit / 2));
        let limit = limit.max(MIN_THROTTLE);
        self.throttle.is_none_or(|now| limit < now).then_some(limit)
    }
}

fn fits(round: &Round, pause: Duration) -> bool {
    // A third of the pause is the disk's: the rest is memory's and the devices'.
    round.dirtied <= SMALL || round.dirtied as f64 <= round.rate * pause.as_secs_f64() / 3.0
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    /// A guest that dirties `dirty` bytes/s on a link of `link` bytes/s.
    fn run(policy: &Policy, size: u64, dirty: f64, link: f64) -> (Next, u32) {
        let (mut rounds, mut left, mut dirty) = (Rounds::default(), size as f64, dirty);
        for n in 1..200 {
            let took = Duration::from_secs_f64((left / link).max(0.005));
            let dirtied = (dirty * took.as_secs_f64()).min(size as f64) as u64;
            match rounds.next(policy, &Round { dirtied, took, rate: link }) {
                Next::Throttle(limit) => dirty = dirty.min(limit as f64),
                Next::Round => {}
                end => return (end, n),
            }
            left = dirtied as f64;
        }
        (Next::Round, 200)
    }

    proptest! {
        #[test]
        fn rounds_always_end(size in 1u64 << 20..1 << 36, dirty in 0.0f64..1e10, link in 1e5f64..1e10, throttle: bool) {
            let policy = Policy { throttle, ..Policy::default() };
            let (end, _) = run(&policy, size, dirty, link);
            prop_assert!(matches!(end, Next::Fits | Next::Outrun));
        }

        #[test]
        fn a_throttled_guest_is_caught_on_any_decent_link(size in 1u64 << 26..1 << 36, dirty in 0.0f64..1e10, link in 2e7f64..1e10) {
            prop_assert_eq!(run(&Policy::default(), size, dirty, link).0, Next::Fits);
        }

        #[test]
        fn a_guest_that_writes_faster_than_the_link_fails_without_a_throttle(link in 1e6f64..1e9) {
            let policy = Policy { throttle: false, ..Policy::default() };
            prop_assert_eq!(run(&policy, 1 << 34, 2.0 * link, link).0, Next::Outrun);
        }
    }
}
