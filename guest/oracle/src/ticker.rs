//! Ticks: the host sees each pause of the guest as a gap between them.

use std::io;
use std::time::{Duration, Instant};

use crate::output::Output;
use crate::protocol::Report;
use crate::worker::Task;

/// Prints `T <n> <us>` about once per period.
pub struct Ticker {
    period: Duration,
    began: Instant,
    due: Instant,
    printed: u64,
    output: Output,
}

impl Ticker {
    /// Ticks every `period`; the printed time counts from `began`.
    pub fn new(period: Duration, began: Instant, output: Output) -> Self {
        Ticker { period, began, due: Instant::now(), printed: 0, output }
    }
}

impl Task for Ticker {
    fn name(&self) -> String {
        "tick".into()
    }

    fn step(&mut self) -> io::Result<Instant> {
        let now = Instant::now();
        let us = now.duration_since(self.began).as_micros() as u64;
        if self.output.offer(Report::Tick { n: self.printed + 1, us }) {
            self.printed += 1;
        }
        // N.B. after a pause the missed ticks are skipped, not caught up on.
        self.due = (self.due + self.period).max(now);
        Ok(self.due)
    }

    fn status(&self) -> String {
        format!("printed={}", self.printed)
    }
}
