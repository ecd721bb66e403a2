//! The stub's guest: the oracle's commands, blocks and counters on one "vCPU".
//!
//! One thread owns the guest alone. Everybody else sends it closures, which it
//! runs between two steps: so a stopped guest has no write under way, and a page
//! that is copied is whole.
//!
//! ```text
//!  QMP, migration --with(closure)--> guest thread --> disks (block graph)
//!  second serial line --bytes------>      |       --> second serial line
//! ```

mod disk;
mod jobs;
mod memory;
mod ram;
mod serve;

pub use ram::{PAGE, Page, Ram};

use super::block::Graph;
use super::chardev::Chardev;
use super::lock;
use jobs::Jobs;
use oracle::block::fill;
use oracle::protocol::Report;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Bytes that wait for the serial line before the guest's jobs wait too.
const MOST_OUTPUT: usize = 16 << 10;
/// Bytes that wait for the guest; more are lost.
const MOST_INPUT: usize = 64 << 10;
/// How soon a line that took no more is tried again.
const RETRY: Duration = Duration::from_millis(1);

/// The guest, as its thread has it.
pub struct Guest {
    /// Its memory.
    pub ram: Ram,
    state: State,
    disks: Disks,
    line: Chardev,
    console: Chardev,
    /// Set while it runs.
    since: Option<Instant>,
    /// What the host said and the guest has not read. Not the guest's: it does not move.
    input: VecDeque<u8>,
    power_button: bool,
    /// Tells the machine that the guest has shut itself down.
    shut_down: Sender<()>,
}

/// What moves with the guest beside its memory.
#[derive(Default, Serialize, Deserialize)]
struct State {
    booted: bool,
    /// How long it has run.
    uptime: Duration,
    /// What it has said and its line has not taken.
    output: VecDeque<u8>,
    /// The beginning of a command.
    command: Vec<u8>,
    jobs: Jobs,
}

/// The guest's disks.
#[derive(Clone)]
struct Disks(Arc<Mutex<Graph>>);

impl Disks {
    fn write(&self, disk: usize, offset: u64, bytes: &[u8]) -> io::Result<()> {
        lock(&self.0).write(disk, offset, bytes)
    }

    /// N.B. without the graph: a slow flush holds up the guest alone.
    fn flush(&self, disk: usize) -> io::Result<()> {
        let file = lock(&self.0).flush(disk);
        file.map_or(Ok(()), |file| file.sync_data())
    }

    fn earliest(&self, disk: usize) -> Instant {
        lock(&self.0).earliest(disk, Instant::now())
    }

    fn file(&self, disk: usize) -> io::Result<Arc<File>> {
        lock(&self.0).file(disk).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// Disk 0 is `/dev/vda`, 1 is `/dev/vdb`, whatever the letter in the middle.
    fn by_name(&self, dev: &str) -> io::Result<usize> {
        let letter = dev.strip_prefix("/dev/").and_then(|name| match name.as_bytes() {
            [b'v' | b's', b'd', letter @ b'a'..=b'z'] => Some(usize::from(letter - b'a')),
            _ => None,
        });
        letter.filter(|disk| *disk < lock(&self.0).disks()).ok_or_else(|| {
            io::Error::new(io::ErrorKind::NotFound, format!("{dev}: No such file or directory"))
        })
    }
}

/// What a job may touch.
struct Board<'a> {
    ram: &'a mut Ram,
    disks: &'a Disks,
    output: &'a mut VecDeque<u8>,
    uptime: Duration,
}

impl Board<'_> {
    fn report(&mut self, report: Report) {
        self.output.extend(format!("{report}\n").into_bytes());
    }
}

/// What others have the guest's thread do between two steps.
type Request = Box<dyn FnOnce(&mut Guest) + Send>;

/// A handle to the guest's thread.
#[derive(Clone)]
pub struct Handle {
    inbox: Sender<Request>,
}

/// What a guest is made of.
pub struct Parts {
    /// MiB of memory.
    pub memory: u64,
    /// Its disks.
    pub graph: Arc<Mutex<Graph>>,
    /// Told when it has shut itself down.
    pub shut_down: Sender<()>,
}

impl Handle {
    /// Starts the thread; the guest does not run yet. Its serial lines lead
    /// nowhere until [`Handle::connect`].
    pub fn start(parts: Parts) -> Self {
        let (inbox, requests) = channel();
        let Parts { memory, graph, shut_down } = parts;
        std::thread::spawn(move || {
            let guest = Guest {
                ram: Ram::new(memory),
                state: State::default(),
                disks: Disks(graph),
                line: Chardev::default(),
                console: Chardev::default(),
                since: None,
                input: VecDeque::new(),
                power_button: false,
                shut_down,
            };
            guest.live(&requests);
        });
        Self { inbox }
    }

    /// Has the guest's thread do something, and waits for the result.
    pub fn with<T: Send + 'static>(&self, act: impl FnOnce(&mut Guest) -> T + Send + 'static) -> T {
        let (answer, answered) = sync_channel(1);
        self.post(move |guest| drop(answer.send(act(guest))));
        answered.recv().expect("the guest's thread lives as long as the process")
    }

    /// Has the guest's thread do something soon.
    pub fn post(&self, act: impl FnOnce(&mut Guest) + Send + 'static) {
        let _ = self.inbox.send(Box::new(act));
    }

    /// Connects the serial lines.
    pub fn connect(&self, console: Chardev, line: Chardev) {
        self.with(move |guest| {
            guest.console = console;
            guest.line = line;
        });
    }
}

impl Guest {
    fn live(mut self, requests: &Receiver<Request>) {
        loop {
            let request = match self.wait() {
                None => requests.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(wait) => requests.recv_timeout(wait),
            };
            match request {
                Ok(act) => act(&mut self),
                Err(RecvTimeoutError::Timeout) => self.step(),
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    /// How long until there is something to do; `None` while it stands still.
    fn wait(&mut self) -> Option<Duration> {
        self.since?;
        if self.power_button || !self.input.is_empty() {
            return Some(Duration::ZERO);
        }
        let retry = (!self.state.output.is_empty()).then_some(RETRY);
        let due = match self.state.output.len() > MOST_OUTPUT {
            true => None,
            false => self.state.jobs.earliest(),
        };
        let due = due.map(|due| due.saturating_duration_since(Instant::now()));
        // A guest with nothing to do still looks at its power button now and then.
        Some(retry.into_iter().chain(due).min().unwrap_or(Duration::from_secs(1)))
    }

    fn step(&mut self) {
        self.speak();
        if self.power_button {
            self.pause();
            self.power_button = false;
            let _ = self.shut_down.send(());
        } else if !self.input.is_empty() {
            self.listen();
        } else if self.state.output.len() <= MOST_OUTPUT {
            let uptime = self.uptime();
            let State { jobs, output, .. } = &mut self.state;
            jobs.step(&mut Board { ram: &mut self.ram, disks: &self.disks, output, uptime });
            self.speak();
        }
    }

    fn speak(&mut self) {
        let output = self.state.output.make_contiguous();
        if !output.is_empty() {
            let said = self.line.say(output);
            self.state.output.drain(..said);
        }
    }

    /// Takes what the host said on the second serial line.
    pub fn hear(&mut self, bytes: &[u8]) {
        let room = MOST_INPUT.saturating_sub(self.input.len());
        self.input.extend(&bytes[..bytes.len().min(room)]);
    }

    fn listen(&mut self) {
        while let Some(byte) = self.input.pop_front() {
            if let Some(line) = serve::collect(&mut self.state.command, byte) {
                let uptime = self.uptime();
                let State { jobs, output, .. } = &mut self.state;
                let board = Board { ram: &mut self.ram, disks: &self.disks, output, uptime };
                serve::answer(jobs, board, &line);
                return;
            }
        }
    }

    fn uptime(&self) -> Duration {
        self.state.uptime + self.since.map_or(Duration::ZERO, |since| since.elapsed())
    }

    /// Lets it run; the first time it boots.
    pub fn resume(&mut self) {
        self.since = Some(Instant::now());
        if !std::mem::replace(&mut self.state.booted, true) {
            // As a kernel and its programs would: no real guest's memory is all zeros.
            for index in 0..self.ram.pages() / 2 {
                fill(self.ram.page_mut(index), index as u64);
            }
            self.console.say(b"stub guest: booted\r\n");
            self.state.output.extend(format!("{}\n", Report::Ready).into_bytes());
        }
    }

    /// Stops it. When this returns, nothing of it is under way.
    pub fn pause(&mut self) {
        self.state.uptime = self.uptime();
        self.since = None;
    }

    /// Presses the power button; seen when it runs.
    pub fn press_power(&mut self) {
        self.power_button = true;
    }

    /// Looks at once whether its jobs may go on.
    pub fn hurry(&mut self) {
        self.state.jobs.hurry();
    }

    /// All of it beside its memory.
    pub fn save(&self) -> Vec<u8> {
        serde_json::to_vec(&self.state).expect("a state of plain numbers and text")
    }

    /// Becomes what was saved; false when that is no state.
    pub fn load(&mut self, saved: &[u8]) -> bool {
        match serde_json::from_slice(saved) {
            Ok(state) => {
                self.state = state;
                true
            }
            Err(_) => false,
        }
    }
}
