//! One token bucket for everything that a move sends, disks and memory alike.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How much may be sent in one go after a rest, as a span of time at the full
/// rate. Small, so that a limit of 1 MiB/s does not start with a burst of 10.
const BURST: Duration = Duration::from_millis(50);

/// The pure arithmetic: debts are allowed and are paid by waiting.
#[derive(Debug, Clone)]
pub struct Bucket {
    /// Bytes per second; None is no limit.
    rate: Option<u64>,
    /// The moment up to which all sent bytes are paid for.
    paid_until: Duration,
}

impl Bucket {
    /// A bucket of `rate` bytes per second.
    pub fn new(rate: Option<u64>) -> Self {
        Self { rate: rate.filter(|r| *r > 0), paid_until: Duration::ZERO }
    }

    /// Books `bytes` at time `now`; returns how long to wait before sending them.
    pub fn book(&mut self, now: Duration, bytes: u64) -> Duration {
        let Some(rate) = self.rate else { return Duration::ZERO };
        let start = self.paid_until.max(now.saturating_sub(BURST));
        self.paid_until = start + Duration::from_secs_f64(bytes as f64 / rate as f64);
        start.saturating_sub(now)
    }
}

/// A bucket that several threads and tasks share.
#[derive(Debug)]
pub struct SharedBucket {
    epoch: Instant,
    bucket: Mutex<Bucket>,
}

impl SharedBucket {
    /// A shared bucket of `rate` bytes per second; None is no limit.
    pub fn new(rate: Option<u64>) -> Self {
        Self { epoch: Instant::now(), bucket: Mutex::new(Bucket::new(rate)) }
    }

    /// Books `bytes` now; the caller waits for the time returned, then sends.
    pub fn book(&self, bytes: u64) -> Duration {
        let mut bucket = self.bucket.lock().unwrap_or_else(PoisonError::into_inner);
        bucket.book(self.epoch.elapsed(), bytes)
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_sent_never_exceeds_the_rate_by_more_than_the_burst(
            rate in 1_000u64..1_000_000_000,
            sends in proptest::collection::vec((0u64..2_000_000, 0u64..100_000), 1..200),
        ) {
            let mut bucket = Bucket::new(Some(rate));
            let (mut now, mut sent, mut last) = (Duration::ZERO, 0u64, 0u64);
            for (bytes, idle_us) in sends {
                now += Duration::from_micros(idle_us);
                now += bucket.book(now, bytes);
                // What was booked before has been sent by now; this one starts now.
                prop_assert!(sent as f64 <= rate as f64 * (now + BURST).as_secs_f64() + 1.0 + last as f64);
                sent += bytes;
                last = bytes;
            }
        }
    }

    #[test]
    fn no_limit_never_waits() {
        assert_eq!(Bucket::new(None).book(Duration::ZERO, u64::MAX), Duration::ZERO);
    }
}
