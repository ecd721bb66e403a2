//! A job on a thread of its own that owns its state alone: the host's questions
//! reach it between two steps, so nothing is locked and nothing is torn.

use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::output::Output;
use crate::protocol::{Check, Report};

/// How long the host waits for an answer before it is told that a job hangs.
const ANSWER_DEADLINE: Duration = Duration::from_secs(120);

/// A job: bounded steps, and a comparison of what is with what must be.
pub trait Task: Send + 'static {
    /// What the host calls it.
    fn name(&self) -> String;

    /// Does one bounded piece and says when the next is due.
    ///
    /// # Errors
    /// When the job cannot go on. It is reported and the job stops, but can
    /// still be checked.
    fn step(&mut self) -> io::Result<Instant>;

    /// Compares all there is with what must be; reports at most a few losses.
    ///
    /// # Errors
    /// When it cannot be read.
    fn check(&mut self) -> io::Result<Check> {
        Ok(Check::default())
    }

    /// One short text for `status`.
    fn status(&self) -> String;
}

/// A question to a running job.
enum Request {
    Stop,
    Check(Sender<io::Result<Check>>),
    Status(Sender<String>),
}

/// The handle to a running job. Dropping it ends the thread.
pub struct Worker {
    inbox: Option<Sender<Request>>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts `task`.
    ///
    /// # Errors
    /// When the guest cannot start a thread.
    pub fn start(task: impl Task, output: Output) -> io::Result<Self> {
        let (inbox, requests) = channel();
        let thread = std::thread::Builder::new()
            .stack_size(128 << 10)
            .spawn(move || run(task, &requests, &output))?;
        Ok(Worker { inbox: Some(inbox), thread: Some(thread) })
    }

    /// Stops the steps. Returns when the step under way has ended; what the job
    /// knows stays, to be checked.
    ///
    /// # Errors
    /// When the job does not answer in time.
    pub fn stop(&self) -> io::Result<()> {
        self.send(Request::Stop)?;
        self.status().map(drop)
    }

    /// Asks for a comparison; the job pauses meanwhile.
    ///
    /// # Errors
    /// When it cannot be read, or the job does not answer in time.
    pub fn check(&self) -> io::Result<Check> {
        self.ask(Request::Check)?
    }

    /// Asks for one short text.
    ///
    /// # Errors
    /// When the job does not answer in time.
    pub fn status(&self) -> io::Result<String> {
        self.ask(Request::Status)
    }

    fn ask<T>(&self, request: impl FnOnce(Sender<T>) -> Request) -> io::Result<T> {
        let (answer, answered) = channel();
        self.send(request(answer))?;
        answered.recv_timeout(ANSWER_DEADLINE).map_err(|_| {
            let text = format!("the job gave no answer within {} s", ANSWER_DEADLINE.as_secs());
            io::Error::new(io::ErrorKind::TimedOut, text)
        })
    }

    fn send(&self, request: Request) -> io::Result<()> {
        let gone = || io::Error::other("the job's thread has ended");
        self.inbox.as_ref().ok_or_else(gone)?.send(request).map_err(|_| gone())
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.inbox = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn run(mut task: impl Task, requests: &Receiver<Request>, output: &Output) {
    let mut due = Some(Instant::now());
    loop {
        match next_request(requests, due) {
            Next::Request(Request::Stop) => due = None,
            Next::Request(Request::Check(answer)) => drop(answer.send(task.check())),
            Next::Request(Request::Status(answer)) => {
                let state = if due.is_some() { "runs" } else { "stopped" };
                drop(answer.send(format!("{} {state} {}", task.name(), task.status())));
            }
            Next::Due => match task.step() {
                Ok(next) => due = Some(next),
                Err(error) => {
                    due = None;
                    output.report(Report::Err(format!("{} stopped: {error}", task.name())));
                }
            },
            Next::End => return,
        }
    }
}

enum Next {
    Request(Request),
    Due,
    End,
}

/// Waits for a request, but not longer than until `due` (for ever when stopped:
/// the handle's drop ends that wait).
fn next_request(requests: &Receiver<Request>, due: Option<Instant>) -> Next {
    let Some(due) = due else {
        return requests.recv().map_or(Next::End, Next::Request);
    };
    let wait = due.saturating_duration_since(Instant::now());
    if wait.is_zero() {
        return match requests.try_recv() {
            Ok(request) => Next::Request(request),
            Err(TryRecvError::Empty) => Next::Due,
            Err(TryRecvError::Disconnected) => Next::End,
        };
    }
    match requests.recv_timeout(wait) {
        Ok(request) => Next::Request(request),
        Err(RecvTimeoutError::Timeout) => Next::Due,
        Err(RecvTimeoutError::Disconnected) => Next::End,
    }
}

/// A rate: how many units per second, and when the next may be spent.
pub struct Pace {
    per_second: u64,
    due: Instant,
}

/// What a job that was held up may catch up on, at most.
const BURST: Duration = Duration::from_millis(100);

impl Pace {
    /// `per_second` units; 0: no limit.
    pub fn new(per_second: u64) -> Self {
        Pace { per_second, due: Instant::now() }
    }

    /// Spends `units` and says when the next may be spent.
    pub fn spend(&mut self, units: u64) -> Instant {
        let now = Instant::now();
        let earliest = now.checked_sub(BURST).unwrap_or(now);
        self.due = match self.per_second {
            0 => now,
            rate => self.due.max(earliest) + Duration::from_secs_f64(units as f64 / rate as f64),
        };
        self.due
    }

    /// How many units to take in one step: about a hundredth of a second's
    /// worth, at least 1 and at most `most`.
    pub fn portion(&self, most: u64) -> u64 {
        match self.per_second {
            0 => most,
            rate => (rate / 100).clamp(1, most),
        }
    }
}
