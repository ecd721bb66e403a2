//! The one writer of the oracle's lines, so that they never mix.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;

use crate::protocol::Report;

/// Lines that wait before whoever reports has to wait, too.
const QUEUE: usize = 256;

/// A cheap handle to the writer's queue.
#[derive(Clone)]
pub struct Output {
    queue: SyncSender<Report>,
    waiting: Arc<AtomicUsize>,
}

impl Output {
    /// Starts the thread that writes to `sink`, and flushes, line by line. It
    /// ends when the last handle is dropped or the sink fails.
    pub fn start(mut sink: impl Write + Send + 'static) -> (Self, JoinHandle<()>) {
        let (queue, lines) = sync_channel::<Report>(QUEUE);
        let waiting = Arc::new(AtomicUsize::new(0));
        let written = waiting.clone();
        let thread = std::thread::spawn(move || {
            for report in lines {
                // One write per line: a line is never half in the terminal's queue.
                let line = format!("{report}\n");
                if sink.write_all(line.as_bytes()).and_then(|()| sink.flush()).is_err() {
                    return;
                }
                written.fetch_sub(1, Ordering::Relaxed);
            }
        });
        (Output { queue, waiting }, thread)
    }

    /// Reports, and waits while the queue is full: for lines that must not be lost.
    pub fn report(&self, report: Report) {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        // Fails only when the sink is gone, and with it everyone who could be told.
        let _ = self.queue.send(report);
    }

    /// Reports only when no line waits. Tells whether it did.
    pub fn offer(&self, report: Report) -> bool {
        let idle = self.waiting.load(Ordering::Relaxed) == 0;
        if idle {
            self.report(report);
        }
        idle
    }
}
