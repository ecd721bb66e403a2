//! The target's side of the disk streams: one thread a stream writes what it
//! is sent; one thread for all makes it durable and acknowledges it.

use crate::codec;
use crate::disk::{Disk, aligned};
use crate::sender::report;
use crate::wire::{self, COMPARE_BLOCK, HASH, Head, Kind, Reply};
use std::io::{self, BufReader, Read as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use xxhash_rust::xxh3::xxh3_128;

/// Faults put in on purpose, so that the checks that must find them are themselves checked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Fault {
    /// Every write that covers this byte of disk 0 is dropped.
    pub drop_writes_at: Option<u64>,
    /// This byte of disk 0 is flipped whenever it is written.
    pub flip_byte_at: Option<u64>,
}

/// What the source may do to the target's disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Write them.
    Write,
    /// Compare them, as they are in use.
    Compare,
}

/// Syncing more often than this costs more than it brings while data flows.
const SYNC_PERIOD: Duration = Duration::from_millis(20);
/// A source that takes no replies for this long is dead; its stream ends.
const REPLY_TIME: Duration = Duration::from_secs(10);

/// The disk streams of a move, at the target.
#[derive(Debug)]
pub struct Receiver {
    shared: Arc<Shared>,
    syncer: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Shared {
    disks: Vec<Arc<Disk>>,
    access: Access,
    fault: Fault,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    streams: Vec<Stream>,
    /// Bytes written, zeroed and compared so far.
    received: u64,
    failed: Option<String>,
    stopped: bool,
}

#[derive(Debug, Default)]
struct Stream {
    /// Last frame carried out.
    done: u64,
    /// Last frame on stable storage.
    durable: u64,
    /// The source waits for the rest.
    flush: bool,
    busy_ns: u64,
    connection: Option<Connection>,
}

#[derive(Debug)]
struct Connection {
    replies: Arc<Mutex<UnixStream>>,
    thread: JoinHandle<()>,
}

impl Receiver {
    /// A receiver for `disks`, whose order both sides know.
    pub fn start(disks: Vec<Arc<Disk>>, streams: u16, access: Access, fault: Fault) -> Self {
        let streams = (0..streams.max(1)).map(|_| Stream::default()).collect();
        let state = Mutex::new(State { streams, ..State::default() });
        let shared = Arc::new(Shared { disks, access, fault, state, changed: Condvar::new() });
        let syncer = {
            let shared = shared.clone();
            Mutex::new(Some(std::thread::spawn(move || shared.sync_forever())))
        };
        Self { shared, syncer }
    }

    /// Ends a stream's connection and waits until none of its frames can be
    /// written any more. To be called before a new connection is accepted:
    /// the source sends again only what it knows cannot come late.
    pub fn detach(&self, stream: u16) {
        let old = match self.shared.lock().streams.get_mut(usize::from(stream)) {
            Some(stream) => stream.connection.take(),
            None => None,
        };
        if let Some(old) = old {
            old.end();
        }
    }

    /// Serves a stream on its new connection.
    ///
    /// # Errors
    /// When there is no such stream, when an older connection was not
    /// detached, or when the receiver has failed or stopped.
    pub fn attach(&self, stream: u16, connection: UnixStream) -> io::Result<()> {
        let replies = connection.try_clone()?;
        replies.set_write_timeout(Some(REPLY_TIME))?;
        let replies = Arc::new(Mutex::new(replies));
        let mut state = self.shared.lock();
        if state.stopped || state.failed.is_some() {
            return Err(io::Error::other("the target takes no more data of this move"));
        }
        let Some(slot) = state.streams.get_mut(usize::from(stream)) else {
            return Err(io::Error::other(format!("there is no disk stream {stream}")));
        };
        if slot.connection.is_some() {
            return Err(io::Error::other(format!("disk stream {stream} is connected already")));
        }
        let thread = {
            let (shared, replies) = (self.shared.clone(), replies.clone());
            std::thread::spawn(move || shared.serve(stream, connection, &replies))
        };
        slot.connection = Some(Connection { replies, thread });
        Ok(())
    }

    /// Bytes of disk written, zeroed or compared so far.
    pub fn received(&self) -> u64 {
        self.shared.lock().received
    }

    /// Why the target cannot go on, if so.
    pub fn failed(&self) -> Option<String> {
        self.shared.lock().failed.clone()
    }

    /// Ends all streams; afterwards nothing writes the disks, and what was
    /// written is on stable storage.
    ///
    /// # Errors
    /// What the disks say to the sync.
    pub fn stop(&self) -> Result<(), crate::disk::Error> {
        self.end();
        match self.shared.access {
            Access::Write => self.shared.disks.iter().try_for_each(|disk| disk.sync()),
            Access::Compare => Ok(()),
        }
    }

    /// Ends all streams; afterwards nothing writes the disks.
    pub fn end(&self) {
        let connections: Vec<Connection> = {
            let mut state = self.shared.lock();
            state.stopped = true;
            self.shared.changed.notify_all();
            state.streams.iter_mut().filter_map(|s| s.connection.take()).collect()
        };
        for connection in connections {
            connection.end();
        }
        let syncer = self.syncer.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(syncer) = syncer {
            // A panic there has been printed; there is nothing left to wait for.
            let _ = syncer.join();
        }
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.end();
    }
}

impl Connection {
    fn end(self) {
        {
            let socket = self.replies.lock().unwrap_or_else(PoisonError::into_inner);
            // It may be gone already: that is the aim.
            let _ = socket.shutdown(Shutdown::Both);
        }
        let _ = self.thread.join();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fail(&self, replies: &Mutex<UnixStream>, why: String) {
        tracing::warn!(%why, "target cannot go on");
        self.lock().failed.get_or_insert_with(|| why.clone());
        self.changed.notify_all();
        // When the source cannot be told, its control stream tells it.
        let _ = self.reply(replies, &Reply::Failed(why));
    }

    fn reply(&self, to: &Mutex<UnixStream>, reply: &Reply) -> io::Result<()> {
        let to = to.lock().unwrap_or_else(PoisonError::into_inner);
        wire::write_reply(&mut &*to, reply)
    }

    fn serve(&self, stream: u16, connection: UnixStream, replies: &Mutex<UnixStream>) {
        let mut from = BufReader::with_capacity(256 << 10, connection);
        let (mut packed, mut raw) = (Vec::new(), Vec::new());
        loop {
            let frame = wire::read_head(&mut from).and_then(|head| {
                packed.resize(head.payload as usize, 0);
                from.read_exact(&mut packed).map(|()| head)
            });
            let head = match frame {
                Ok(head) => head,
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    return self.fail(replies, error.to_string());
                }
                // The link broke, or the move ended: not ours to judge.
                Err(_) => return,
            };
            if self.is_detached(stream, replies) {
                return;
            }
            let begun = Instant::now();
            match self.carry_out(stream, &head, &packed, &mut raw) {
                Ok(None) => {}
                Ok(Some(reply)) => {
                    if self.reply(replies, &reply).is_err() {
                        return;
                    }
                }
                Err(why) => return self.fail(replies, why),
            }
            let mut state = self.lock();
            state.received += head.extent.len;
            let stream = &mut state.streams[usize::from(stream)];
            stream.done = head.seq;
            stream.flush |= head.kind == Kind::Flush;
            stream.busy_ns += begun.elapsed().as_nanos() as u64;
            self.changed.notify_all();
        }
    }

    /// Whether the stream has, or is getting, another connection: then what
    /// is still in this one's buffers must not be written.
    fn is_detached(&self, stream: u16, own: &Mutex<UnixStream>) -> bool {
        let state = self.lock();
        let current = state.streams[usize::from(stream)].connection.as_ref();
        state.stopped || !current.is_some_and(|c| std::ptr::eq(&*c.replies, own))
    }

    fn carry_out(
        &self,
        stream: u16,
        head: &Head,
        payload: &[u8],
        raw: &mut Vec<u8>,
    ) -> Result<Option<Reply>, String> {
        let last = self.lock().streams[usize::from(stream)].done;
        if head.seq <= last {
            return Err(format!("disk stream {stream}: frame {} after {last}", head.seq));
        }
        if head.kind == Kind::Flush {
            return Ok(None);
        }
        let extent = head.extent;
        let disk = self
            .disks
            .get(usize::from(head.disk))
            .filter(|disk| extent.end() <= disk.size())
            .ok_or_else(|| format!("disk stream {stream}: {extent:?} is on no disk of the move"))?;
        if self.access == Access::Compare && head.kind != Kind::Compare {
            return Err(format!("disk stream {stream}: a write to a disk in use was refused"));
        }
        match head.kind {
            Kind::Zero => disk.zero(extent).map_err(|e| report(&e))?,
            Kind::Data { codec, hash } => {
                let bytes = aligned(raw, extent.len as usize);
                codec::decode(codec, payload, bytes).map_err(|e| e.to_string())?;
                if xxh3_128(bytes) != hash {
                    return Err(format!("{extent:?} of {} arrived damaged", disk.path().display()));
                }
                if self.put_fault_in(head, bytes) {
                    return Ok(None);
                }
                disk.write(extent.offset, bytes).map_err(|e| report(&e))?;
            }
            Kind::Compare => {
                let bytes = aligned(raw, extent.len as usize);
                disk.read(extent.offset, bytes).map_err(|e| report(&e))?;
                let blocks = differing(bytes, payload);
                return Ok((blocks != 0).then_some(Reply::Differ { seq: head.seq, blocks }));
            }
            Kind::Flush => {}
        }
        Ok(None)
    }

    /// Returns whether the write is to be dropped.
    fn put_fault_in(&self, head: &Head, bytes: &mut [u8]) -> bool {
        let covers =
            |at: u64| head.disk == 0 && (head.extent.offset..head.extent.end()).contains(&at);
        if let Some(at) = self.fault.flip_byte_at.filter(|at| covers(*at)) {
            bytes[(at - head.extent.offset) as usize] ^= 0x01;
        }
        self.fault.drop_writes_at.is_some_and(covers)
    }

    /// Acknowledges only what an fsync that began afterwards covered.
    fn sync_forever(&self) {
        let mut last = Instant::now();
        while let Some(covered) = self.next_sync(last) {
            let begun = Instant::now();
            for disk in self.disks.iter().filter(|_| self.access == Access::Write) {
                if let Err(error) = disk.sync() {
                    return self.fail_all(&report(&error));
                }
            }
            last = Instant::now();
            self.acknowledge(&covered, begun.elapsed());
        }
    }

    fn fail_all(&self, why: &str) {
        let connections: Vec<_> = {
            let state = self.lock();
            state
                .streams
                .iter()
                .filter_map(|s| s.connection.as_ref())
                .map(|c| c.replies.clone())
                .collect()
        };
        self.lock().failed.get_or_insert_with(|| why.to_owned());
        for replies in connections {
            self.fail(&replies, why.to_owned());
        }
    }

    /// Waits until something is to be made durable; returns each stream's last
    /// frame that is carried out. None: the end.
    fn next_sync(&self, last: Instant) -> Option<Vec<u64>> {
        let mut state = self.lock();
        loop {
            if state.stopped || state.failed.is_some() {
                return None;
            }
            let due = last.elapsed() >= SYNC_PERIOD;
            let dirty = |s: &Stream| s.done > s.durable;
            if state.streams.iter().any(|s| dirty(s) && (due || s.flush)) {
                for stream in &mut state.streams {
                    stream.flush = false;
                }
                return Some(state.streams.iter().map(|s| s.done).collect());
            }
            let time = if state.streams.iter().any(dirty) { SYNC_PERIOD } else { REPLY_TIME };
            state =
                self.changed.wait_timeout(state, time).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn acknowledge(&self, covered: &[u64], took: Duration) {
        let replies: Vec<_> = {
            let mut state = self.lock();
            let each = state.streams.iter_mut().zip(covered);
            each.filter(|(stream, seq)| stream.durable < **seq)
                .filter_map(|(stream, seq)| {
                    stream.durable = *seq;
                    stream.busy_ns += took.as_nanos() as u64;
                    let reply = Reply::Durable { seq: *seq, busy_ns: stream.busy_ns };
                    stream.connection.as_ref().map(|c| (c.replies.clone(), reply))
                })
                .collect()
        };
        for (to, reply) in replies {
            // A broken link: the source sends again what was not acknowledged.
            let _ = self.reply(&to, &reply);
        }
    }
}

fn differing(bytes: &[u8], hashes: &[u8]) -> u64 {
    bytes
        .chunks(COMPARE_BLOCK as usize)
        .zip(hashes.chunks(HASH))
        .enumerate()
        .filter(|(_, (block, hash))| blake3::hash(block).as_bytes() != *hash)
        .fold(0, |blocks, (i, _)| blocks | 1 << i)
}
