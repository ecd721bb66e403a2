//! How many bytes may be on their way: bandwidth times delay.

use std::time::{Duration, Instant};

/// The bytes that may be on their way on all streams.
#[derive(Debug)]
pub struct Window {
    /// The bytes allowed, all streams together.
    pub bytes: u64,
    since: Instant,
    safe: u64,
    rate: f64,
}

/// Below this the window never falls: a disk needs some depth even without a link.
const MIN_WINDOW: u64 = 16 << 20;
/// The most memory that is spent on what is on its way.
const MAX_WINDOW: u64 = 512 << 20;
/// What an fsync and the turn of the streams add to a round trip.
const SYNC_TIME: Duration = Duration::from_millis(25);

/// Bandwidth times delay, doubled so that a growing rate finds room.
fn window_for(rate: f64, rtt: Duration) -> u64 {
    ((2.0 * rate * (rtt + SYNC_TIME).as_secs_f64()) as u64).clamp(MIN_WINDOW, MAX_WINDOW)
}

impl Default for Window {
    fn default() -> Self {
        Self { bytes: MIN_WINDOW, since: Instant::now(), safe: 0, rate: 0.0 }
    }
}

impl Window {
    /// Measures again, a round trip or more after the last time. `safe`: bytes
    /// acknowledged so far.
    pub fn update(&mut self, safe: u64, rtt: Duration) {
        let span = self.since.elapsed();
        if span < (rtt + SYNC_TIME).max(Duration::from_millis(100)) {
            return;
        }
        let rate = (safe - self.safe) as f64 / span.as_secs_f64();
        // A pause between rounds is no slow link: fall slowly.
        self.rate = rate.max(0.8 * self.rate);
        self.bytes = window_for(self.rate, rtt);
        (self.since, self.safe) = (Instant::now(), safe);
    }
}
