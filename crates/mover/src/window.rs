//! How many bytes may be on their way: bandwidth times delay.
//!
//! The delay is that of a flush that is the first thing on a new connection: nothing is before it.

use std::collections::HashMap;
use std::time::{Duration, Instant};

/// The bytes that may be on their way on all streams.
#[derive(Debug)]
pub struct Window {
    /// The bytes allowed, all streams together.
    pub bytes: u64,
    since: Instant,
    safe: u64,
    rate: f64,
    /// The shortest time in which a first flush was answered; zero while unknown.
    delay: Duration,
    /// First flushes of streams that were not answered yet: of which frame, and when.
    asked: HashMap<u16, (u64, Instant)>,
}

/// Below this the window never falls: a disk needs some depth even without a link.
const MIN_WINDOW: u64 = 16 << 20;
/// The most memory that is spent on what is on its way.
const MAX_WINDOW: u64 = 512 << 20;
/// What an fsync of data and the turn of the streams add to that.
const SYNC_TIME: Duration = Duration::from_millis(25);

/// Bandwidth times delay, doubled so that a growing rate finds room.
fn window_for(rate: f64, delay: Duration) -> u64 {
    ((2.0 * rate * (delay + SYNC_TIME).as_secs_f64()) as u64).clamp(MIN_WINDOW, MAX_WINDOW)
}

impl Default for Window {
    fn default() -> Self {
        Self {
            bytes: MIN_WINDOW,
            since: Instant::now(),
            safe: 0,
            rate: 0.0,
            delay: Duration::ZERO,
            asked: HashMap::new(),
        }
    }
}

impl Window {
    /// A stream has a new connection, and the flush of frame `seq` is the first thing on it.
    pub fn asks(&mut self, stream: u16, seq: u64, now: Instant) {
        self.asked.insert(stream, (seq, now));
    }

    /// A stream's frame `seq` was acknowledged. Measures again, a round trip or more after the last time.
    /// `safe`: bytes acknowledged so far.
    pub fn update(&mut self, stream: u16, seq: u64, safe: u64, now: Instant) {
        if let Some((_, at)) = self.asked.get(&stream).copied().filter(|(asked, _)| *asked <= seq) {
            self.asked.remove(&stream);
            let delay = now.duration_since(at);
            self.delay = if self.delay.is_zero() { delay } else { self.delay.min(delay) };
        }
        let span = now.duration_since(self.since);
        if span < (self.delay + SYNC_TIME).max(Duration::from_millis(100)) {
            return;
        }
        let rate = (safe - self.safe) as f64 / span.as_secs_f64();
        // A pause between rounds is no slow link: fall slowly.
        self.rate = rate.max(0.8 * self.rate);
        self.bytes = window_for(self.rate, self.delay);
        (self.since, self.safe) = (now, safe);
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_long_way_has_room_for_what_it_carries_once_a_first_flush_has_measured_it() {
        let mut window = Window::default();
        let began = window.since;
        let after = |ms| began + Duration::from_millis(ms);
        window.asks(0, 1, after(900));
        // 100 MB a second, of which 10 MB are on a way of 100 ms at any time.
        window.update(0, 1, 100_000_000, after(1000));
        assert_eq!(window.bytes, 25_000_000);
        // It is measured by the first flush alone, and a later one on a new connection only shortens it.
        window.update(0, 9, 200_000_000, after(2000));
        window.asks(1, 5, after(2000));
        window.update(1, 5, 300_000_000, after(3000));
        assert_eq!(window.bytes, 25_000_000);
    }

    #[test]
    fn what_was_sent_before_a_first_flush_does_not_answer_it() {
        let mut window = Window::default();
        let later = window.since + Duration::from_millis(40);
        window.asks(1, 7, window.since);
        window.update(1, 6, 0, later);
        window.update(0, 9, 0, later);
        assert_eq!(window.delay, Duration::ZERO);
        window.update(1, 8, 0, later);
        assert_eq!(window.delay, Duration::from_millis(40));
    }
}
