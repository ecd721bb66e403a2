//! The source's side of the disk streams: one thread a stream takes work,
//! reads the disk, hashes, compresses and sends; another reads what the target
//! says of it.

use crate::bucket::SharedBucket;
use crate::codec::{self, Chooser, Compression, Load};
use crate::counters::{Counters, Limit};
use crate::disk::{self, Disk, aligned};
use crate::extent::{Extent, ExtentSet};
use crate::window::Window;
use crate::wire::{self, CHUNK, COMPARE_BLOCK, Codec, Head, Kind, Reply};
use crate::work::{Item, Outstanding, Task, Work};
use crate::zeros::runs;
use std::io::{self, BufReader};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use xxhash_rust::xxh3::xxh3_128;

/// Why the streams ended.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The source's disk cannot be read.
    #[error("{0}")]
    Source(String),
    /// The target cannot go on.
    #[error("the target cannot go on: {0}")]
    Target(String),
    /// No connection could be had any more.
    #[error("disk stream {stream} is lost: {why}; the move can be resumed")]
    Lost {
        /// Which stream.
        stream: u16,
        /// Why it could not be connected again.
        why: String,
    },
    /// [`Sender::finish`] was called.
    #[error("the disk streams were stopped")]
    Stopped,
    /// The wait's deadline passed.
    #[error("after {0:?} not all of the disk is safe at the target")]
    Deadline(Duration),
}

/// Where connections for the streams come from.
pub trait Connect: Send + Sync {
    /// A connection for a stream, or why there will be none any more. Blocks
    /// as long as another try makes sense, and ends early when the move does.
    ///
    /// # Errors
    /// The reason, for a person.
    fn connect(&self, stream: u16) -> Result<UnixStream, String>;
}

/// How the streams are to work.
#[derive(Debug, Clone)]
pub struct Options {
    /// How many.
    pub streams: u16,
    /// Limit shared with the memory streams.
    pub bucket: Arc<SharedBucket>,
    /// Whether to compress.
    pub compression: Compression,
}

/// How work is to be brought over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// To a target that is known to read as zeros: holes cost nothing.
    Blank,
    /// Over something old: holes are made zero.
    Over,
    /// Over something that may be the same: hashes decide.
    Compare,
    /// Nothing is written: what differs is only noted, see [`Sender::differing`].
    Verify,
}

/// The disk streams of a move, at the source.
#[derive(Debug)]
pub struct Sender {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

struct Shared {
    disks: Vec<Arc<Disk>>,
    connect: Arc<dyn Connect>,
    options: Options,
    state: Mutex<State>,
    /// Work came, work was acknowledged, or the end.
    changed: Condvar,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("disks", &self.disks).finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct State {
    work: Work,
    counters: Counters,
    /// Bytes asked for, per disk.
    asked: Vec<u64>,
    chooser: Chooser,
    window: Window,
    /// The target's busy time of each stream.
    target_ns: Vec<u64>,
    /// The present connection of each stream, to end it.
    live: Vec<Option<UnixStream>>,
    /// Differences are noted, not mended.
    verifying: bool,
    differing: Vec<ExtentSet>,
    ended: Option<Error>,
}

impl Sender {
    /// Starts the streams for `disks`, whose order both sides know.
    pub fn start(disks: Vec<Arc<Disk>>, connect: Arc<dyn Connect>, options: Options) -> Self {
        let streams = options.streams.max(1);
        let state = State {
            work: Work::new(disks.len(), usize::from(streams)),
            counters: Counters::default(),
            asked: vec![0; disks.len()],
            chooser: Chooser::new(options.compression),
            window: Window::default(),
            target_ns: vec![0; usize::from(streams)],
            live: (0..streams).map(|_| None).collect(),
            verifying: false,
            differing: vec![ExtentSet::new(); disks.len()],
            ended: None,
        };
        let state = Mutex::new(state);
        let shared = Arc::new(Shared { disks, connect, options, state, changed: Condvar::new() });
        let threads = (0..streams)
            .map(|stream| {
                let shared = shared.clone();
                std::thread::spawn(move || shared.run(stream))
            })
            .collect();
        Self { shared, threads: Mutex::new(threads) }
    }

    /// Adds a round's work for a disk. Returns the bytes of it that will travel
    /// or be made zero at the target.
    ///
    /// # Errors
    /// [`Error::Source`] when the disk's holes cannot be found.
    pub fn push(&self, disk: u16, mode: Mode, extents: &ExtentSet) -> Result<u64, Error> {
        let Some(source) = self.shared.disks.get(usize::from(disk)) else { return Ok(0) };
        let (data, holes) = match mode {
            Mode::Verify => (extents.clone(), ExtentSet::new()),
            Mode::Blank | Mode::Over | Mode::Compare => source.classify(extents)?,
        };
        let task = match mode {
            Mode::Blank => Task::Copy { blank: true },
            Mode::Over => Task::Copy { blank: false },
            Mode::Compare | Mode::Verify => Task::Compare,
        };
        let mut state = self.shared.lock();
        state.verifying = mode == Mode::Verify;
        let before = state.work.left();
        state.work.push(disk, task, &data);
        if mode != Mode::Blank {
            state.work.push(disk, Task::Zero, &holes);
        }
        let bytes = state.work.left() - before;
        state.asked(disk, bytes);
        self.shared.changed.notify_all();
        Ok(bytes)
    }

    /// Waits until all that was pushed is on the target's stable storage.
    ///
    /// # Errors
    /// Why that will not be, or [`Error::Deadline`].
    pub fn wait(&self, deadline: Duration) -> Result<(), Error> {
        let until = Instant::now() + deadline;
        let mut state = self.shared.lock();
        loop {
            if let Some(error) = &state.ended {
                return Err(error.clone());
            }
            if state.work.is_done() {
                return Ok(());
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::Deadline(deadline));
            }
            state = wait(&self.shared.changed, state, left);
        }
    }

    /// The totals so far.
    pub fn counters(&self) -> Counters {
        let state = self.shared.lock();
        Counters { target_ns: state.target_ns.iter().sum(), ..state.counters }
    }

    /// Bytes that are not safe at the target yet.
    pub fn left(&self) -> u64 {
        self.shared.lock().work.left()
    }

    /// What [`Mode::Verify`] found to differ so far, per disk.
    pub fn differing(&self) -> Vec<ExtentSet> {
        self.shared.lock().differing.clone()
    }

    /// Bytes asked for so far and bytes that are not safe yet, per disk.
    pub fn per_disk(&self) -> Vec<(u64, u64)> {
        let state = self.shared.lock();
        state.asked.iter().copied().zip(state.work.left_per_disk()).collect()
    }

    /// Why the streams ended, if they did.
    pub fn ended(&self) -> Option<Error> {
        self.shared.lock().ended.clone()
    }

    /// Ends the streams, waits for their threads and returns, per disk, what
    /// is not safe at the target.
    pub fn finish(&self) -> Vec<Outstanding> {
        self.shared.end(Error::Stopped);
        let threads =
            std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for thread in threads {
            // A panic of a stream's thread has already been printed; what it
            // had not finished is outstanding.
            let _ = thread.join();
        }
        self.shared.lock().work.outstanding()
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        self.shared.end(Error::Stopped);
    }
}

fn wait<'a>(
    changed: &Condvar,
    guard: MutexGuard<'a, State>,
    time: Duration,
) -> MutexGuard<'a, State> {
    changed.wait_timeout(guard, time).unwrap_or_else(PoisonError::into_inner).0
}

/// An error with its causes on one line.
pub(crate) fn report(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// What broke a connection: the link (try again) or the end of all.
enum Broken {
    Link(io::Error),
    Ended,
}

impl From<io::Error> for Broken {
    fn from(error: io::Error) -> Self {
        Broken::Link(error)
    }
}

/// What to do next on a stream.
enum Next {
    Work(Item, Codec),
    /// Nothing pending: have what is on its way made safe.
    Flush(u64),
}

fn flush(mut connection: &UnixStream, seq: u64) -> Result<(), Broken> {
    let head = Head { seq, disk: 0, extent: Extent::new(0, 0), kind: Kind::Flush, payload: 0 };
    Ok(wire::write_frame(&mut connection, &head, &[])?)
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, why: Error) {
        let mut state = self.lock();
        if state.ended.is_none() {
            state.ended = Some(why);
        }
        for connection in state.live.iter().flatten() {
            // It may be gone already: that is the aim.
            let _ = connection.shutdown(Shutdown::Both);
        }
        self.changed.notify_all();
    }

    fn is_ended(&self) -> bool {
        self.lock().ended.is_some()
    }

    /// A stream's life: connect, send until it breaks, connect again.
    fn run(self: Arc<Self>, stream: u16) {
        for attempt in 0.. {
            if self.is_ended() {
                return;
            }
            let connection = match self.connect.connect(stream) {
                Ok(connection) => connection,
                Err(why) => return self.end(Error::Lost { stream, why }),
            };
            match self.serve(stream, connection, attempt > 0) {
                Err(Broken::Link(error)) => {
                    tracing::info!(stream, %error, "disk stream broke, connecting again");
                }
                Err(Broken::Ended) => return,
                Ok(()) => {}
            }
        }
    }

    /// Sends on one connection until that breaks. `again`: the stream's last one broke.
    fn serve(
        self: &Arc<Self>,
        stream: u16,
        connection: UnixStream,
        again: bool,
    ) -> Result<(), Broken> {
        let (replies, own) = (connection.try_clone()?, connection.try_clone()?);
        {
            let mut state = self.lock();
            let lost = state.work.reconnected(stream);
            state.counters.again += lost;
            state.live[usize::from(stream)] = Some(own);
            self.changed.notify_all();
        }
        let reader = {
            let shared = self.clone();
            std::thread::spawn(move || shared.read_replies(stream, replies, again))
        };
        let result = self.send(stream, &connection);
        self.lock().live[usize::from(stream)] = None;
        // The reader ends with the connection.
        let _ = connection.shutdown(Shutdown::Both);
        let _ = reader.join();
        result
    }

    fn send(&self, stream: u16, connection: &UnixStream) -> Result<(), Broken> {
        let mut buffers = Buffers::default();
        let mut flushed = {
            let mut state = self.lock();
            let seq = state.work.next_seq(stream);
            state.window.asks(stream, seq, Instant::now());
            seq
        };
        flush(connection, flushed)?;
        loop {
            match self.next(stream, flushed)? {
                Next::Work(item, codec) => {
                    self.send_item(stream, item, codec, connection, &mut buffers)?;
                }
                Next::Flush(seq) => {
                    flush(connection, seq)?;
                    flushed = seq;
                }
            }
        }
    }

    /// Waits for something to do on a stream whose last flush was frame `flushed`.
    fn next(&self, stream: u16, flushed: u64) -> Result<Next, Broken> {
        let mut state = self.lock();
        loop {
            if state.ended.is_some() {
                return Err(Broken::Ended);
            }
            if state.live[usize::from(stream)].is_none() {
                // The reader found the connection broken.
                return Err(Broken::Link(io::ErrorKind::ConnectionReset.into()));
            }
            let room = state.window.bytes / u64::from(self.options.streams.max(1));
            let full = state.work.on_its_way(stream) >= room;
            if !full && let Some(item) = state.work.take(stream) {
                let codec = match item.task {
                    Task::Copy { .. } => {
                        let load = state.load();
                        state.chooser.next(&load)
                    }
                    Task::Zero | Task::Compare => Codec::None,
                };
                if let Task::Zero = item.task {
                    let seq = state.work.next_seq(stream);
                    state.work.sending(stream, seq, item);
                }
                return Ok(Next::Work(item, codec));
            }
            if state.work.on_its_way(stream) > 0 && state.work.last_seq(stream) > flushed {
                return Ok(Next::Flush(state.work.next_seq(stream)));
            }
            let from = Instant::now();
            state = wait(&self.changed, state, Duration::from_secs(1));
            let waited = nanos(from);
            match full {
                true => state.counters.window_ns += waited,
                false => state.counters.idle_ns += waited,
            }
        }
    }

    fn send_item(
        &self,
        stream: u16,
        item: Item,
        codec: Codec,
        connection: &UnixStream,
        buffers: &mut Buffers,
    ) -> Result<(), Broken> {
        let Item { disk, extent, task } = item;
        if task == Task::Zero {
            let seq = self.lock().work.last_seq(stream);
            let head = Head { seq, disk, extent, kind: Kind::Zero, payload: 0 };
            return self.write(connection, &head, &[]);
        }
        let raw = aligned(&mut buffers.raw, extent.len as usize);
        let from = Instant::now();
        let read = self.disks[usize::from(disk)].read(extent.offset, raw);
        self.lock().counters.read_ns += nanos(from);
        if let Err(error) = read {
            self.end(Error::Source(report(&error)));
            return Err(Broken::Ended);
        }
        self.lock().counters.read += extent.len;
        if task == Task::Compare {
            buffers.packed.clear();
            for block in raw.chunks(COMPARE_BLOCK as usize) {
                buffers.packed.extend_from_slice(blake3::hash(block).as_bytes());
            }
            let seq = self.announce(stream, item);
            let payload = buffers.packed.len() as u32;
            let head = Head { seq, disk, extent, kind: Kind::Compare, payload };
            return self.write(connection, &head, &buffers.packed);
        }
        let blank = task == Task::Copy { blank: true };
        for (start, len, zero) in runs(raw) {
            let part = Extent::new(extent.offset + start as u64, len as u64);
            let piece = Item { disk, extent: part, task };
            if zero && blank {
                // Asked for and known to be there.
                let mut state = self.lock();
                state.work.skip(stream, part.len);
                state.counters.safe += part.len;
                self.changed.notify_all();
                continue;
            }
            if zero {
                let seq = self.announce(stream, piece);
                let head = Head { seq, disk, extent: part, kind: Kind::Zero, payload: 0 };
                self.write(connection, &head, &[])?;
                continue;
            }
            let bytes = &raw[start..start + len];
            let from = Instant::now();
            let used = codec::encode(codec, bytes, &mut buffers.packed);
            let took = from.elapsed();
            let payload = if used == Codec::None { bytes } else { &buffers.packed };
            let kind = Kind::Data { codec: used, hash: xxh3_128(bytes) };
            let seq = {
                let mut state = self.lock();
                state.counters.cpu_ns += nanos(from);
                state.chooser.observe(codec, len, payload.len(), took);
                let seq = state.work.next_seq(stream);
                state.work.sending(stream, seq, piece);
                seq
            };
            let head = Head { seq, disk, extent: part, kind, payload: payload.len() as u32 };
            self.write(connection, &head, payload)?;
        }
        Ok(())
    }

    fn announce(&self, stream: u16, item: Item) -> u64 {
        let mut state = self.lock();
        let seq = state.work.next_seq(stream);
        state.work.sending(stream, seq, item);
        seq
    }

    fn write(&self, mut to: &UnixStream, head: &Head, payload: &[u8]) -> Result<(), Broken> {
        let from = Instant::now();
        let debt = self.options.bucket.book(payload.len() as u64);
        self.pay(debt)?;
        let result = wire::write_frame(&mut to, head, payload);
        let mut state = self.lock();
        state.counters.wire_ns += nanos(from);
        state.counters.sent += payload.len() as u64 + 48;
        Ok(result?)
    }

    /// Waits out what the rate limit demands, unless the end comes first.
    fn pay(&self, debt: Duration) -> Result<(), Broken> {
        let until = Instant::now() + debt;
        let mut state = self.lock();
        loop {
            if state.ended.is_some() {
                return Err(Broken::Ended);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            state = wait(&self.changed, state, left);
        }
    }

    fn read_replies(&self, stream: u16, connection: UnixStream, mut again: bool) {
        let mut from = BufReader::new(connection);
        let end = loop {
            match wire::read_reply(&mut from) {
                Ok(Reply::Durable { seq, busy_ns }) => {
                    let mut state = self.lock();
                    let Some(bytes) = state.work.durable(stream, seq) else {
                        break Some(format!("it acknowledged frame {seq}, which was never sent"));
                    };
                    state.counters.safe += bytes;
                    // N.B. not before: a target that has all it needs ends the streams, and takes no new ones.
                    state.counters.resumes += u64::from(std::mem::take(&mut again));
                    state.target_ns[usize::from(stream)] = busy_ns;
                    let safe = state.counters.safe;
                    state.window.update(stream, seq, safe, Instant::now());
                    self.changed.notify_all();
                }
                Ok(Reply::Differ { seq, blocks }) => {
                    let mut state = self.lock();
                    state.note_difference(stream, seq, blocks);
                    self.changed.notify_all();
                }
                Ok(Reply::Failed(why)) => break Some(why),
                Err(_) => break None,
            }
        };
        if let Some(why) = end {
            return self.end(Error::Target(why));
        }
        // Wakes the sending half, which knows what a broken link means.
        self.lock().live[usize::from(stream)] = None;
        self.changed.notify_all();
    }
}

#[derive(Debug, Default)]
struct Buffers {
    raw: Vec<u8>,
    packed: Vec<u8>,
}

impl State {
    fn asked(&mut self, disk: u16, bytes: u64) {
        self.asked[usize::from(disk)] += bytes;
        self.counters.asked += bytes;
    }

    fn note_difference(&mut self, stream: u16, seq: u64, blocks: u64) {
        let Some((disk, extents)) = self.work.blocks_of(stream, seq, blocks) else { return };
        if self.verifying {
            self.differing[usize::from(disk)].union_with(&extents);
            return;
        }
        self.asked(disk, extents.bytes());
        self.work.push(disk, Task::Copy { blank: false }, &extents);
    }

    /// What the chooser needs to know.
    fn load(&self) -> Load {
        let wire = self.counters.wire_ns as f64 / 1e9 / self.live.len().max(1) as f64;
        Load {
            wire_limited: self.counters.limit() == Some(Limit::Wire),
            wire_rate: self.counters.sent as f64 / wire.max(1e-3),
            idle_cores: idle_cores(),
        }
    }
}

/// Cores that nobody uses, from the load of the last minute.
fn idle_cores() -> f64 {
    let cores = std::thread::available_parallelism().map_or(1, usize::from) as f64;
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = text.split(' ').next().and_then(|w| w.parse().ok()).unwrap_or(cores);
    (cores - load).max(0.0)
}

fn nanos(from: Instant) -> u64 {
    from.elapsed().as_nanos() as u64
}

const _: () = assert!(CHUNK / COMPARE_BLOCK <= 64, "a Differ has one bit for each block");

impl From<disk::Error> for Error {
    fn from(error: disk::Error) -> Self {
        Error::Source(report(&error))
    }
}
