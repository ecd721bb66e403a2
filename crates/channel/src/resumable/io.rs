//! The tasks around [`State`]: user to buffer, buffer to link, link to buffer, buffer to
//! user. All run in the stream's one task; none of them holds the state while it waits.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout};

use super::frame::{Frame, Parser};
use super::state::State;
use super::{Config, Error, Limiter, Monitor, Summary};

/// Reads grow from the one to the other as they are filled.
const READ: (usize, usize) = (16 << 10, 256 << 10);
/// Buffers that wait to be used again.
const KEPT: usize = 64;
/// Asked from the limiter at once: small enough not to stall others that share it.
const GRANT: u64 = 64 << 10;

/// How a link's session ended.
pub(super) enum Ended {
    /// The stream is over.
    Done,
    /// The link is over.
    Broken(String),
    /// The stream has failed.
    Failed(Error),
}

/// The state, and who waits for what in it.
pub(super) struct Shared {
    state: Mutex<State>,
    monitor: Monitor,
    began: Instant,
    /// There may be something to send.
    to_link: Notify,
    /// There may be something to deliver.
    to_user: Notify,
    /// There may be room for the user's bytes.
    room: Notify,
    /// There may be something for the limiter.
    to_grant: Notify,
}

impl Shared {
    pub(super) fn new(config: &Config) -> Self {
        Self {
            state: Mutex::new(State::new(config.buffer, config.limiter.is_some())),
            monitor: config.monitor.clone(),
            began: Instant::now(),
            to_link: Notify::new(),
            to_user: Notify::new(),
            room: Notify::new(),
            to_grant: Notify::new(),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn summary(&self) -> Summary {
        let state = self.lock();
        Summary {
            sent: state.read_total(),
            received: state.delivered_total(),
            resent: state.resent,
            reconnects: self.monitor.reconnects(),
        }
    }

    fn publish(&self, state: &State) {
        let meter = &self.monitor.0;
        meter.buffered.store(state.buffered(), Ordering::Relaxed);
        meter.sent.store(state.read_total(), Ordering::Relaxed);
        meter.received.store(state.delivered_total(), Ordering::Relaxed);
    }

    /// The user is gone.
    fn abort(&self, error: &io::Error) {
        self.lock().abort(error.to_string());
        self.to_link.notify_one();
    }

    fn micros(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX)
    }
}

/// Reads into buffers that grow with what is read, so that a quiet stream holds little
/// and a busy one copies less. Buffers are used again once their bytes have gone: new
/// memory would cost more than the copying.
struct Reads {
    size: usize,
    used: VecDeque<BytesMut>,
}

impl Reads {
    fn new() -> Self {
        Self { size: READ.0, used: VecDeque::new() }
    }

    /// Reads at most `most` bytes; appends them to `into`.
    async fn read<R: AsyncRead + Unpin>(
        &mut self,
        from: &mut R,
        into: &mut BytesMut,
        most: usize,
    ) -> io::Result<usize> {
        if into.capacity() - into.len() < self.size / 2 {
            self.renew(into);
        }
        let space = into.capacity() - into.len();
        let n = from.read_buf(&mut into.limit(most.min(space))).await?;
        if n == space && self.size < READ.1 {
            self.size = (self.size * 4).min(READ.1);
            // Too small from now on.
            self.used.clear();
        }
        Ok(n)
    }

    fn renew(&mut self, buffer: &mut BytesMut) {
        let free = self.used.front_mut().is_some_and(|oldest| {
            oldest.clear();
            oldest.try_reclaim(self.size)
        });
        let oldest = if free || self.used.len() == KEPT { self.used.pop_front() } else { None };
        let mut fresh = oldest.filter(|_| free).unwrap_or_default();
        fresh.reserve(self.size);
        fresh.extend_from_slice(buffer);
        self.used.push_back(std::mem::replace(buffer, fresh));
    }
}

/// User to buffer, until the user ends its side.
pub(super) async fn read_user<S: AsyncRead>(shared: &Shared, mut user: ReadHalf<S>) {
    let mut buffer = BytesMut::new();
    let mut reads = Reads::new();
    loop {
        let room = shared.lock().room();
        if room == 0 {
            shared.room.notified().await;
            continue;
        }
        let room = usize::try_from(room).unwrap_or(usize::MAX);
        let read = reads.read(&mut user, &mut buffer, room).await;
        match &read {
            Ok(0) => shared.lock().end(),
            Ok(_) => {
                let mut state = shared.lock();
                state.push(buffer.split().freeze());
                shared.publish(&state);
            }
            Err(error) => shared.abort(error),
        }
        shared.to_link.notify_one();
        shared.to_grant.notify_one();
        if !matches!(read, Ok(1..)) {
            return;
        }
    }
}

/// Buffer to user, until the peer's user has ended its side.
pub(super) async fn write_user<S: AsyncWrite>(shared: &Shared, mut user: WriteHalf<S>) {
    loop {
        let (pieces, end) = {
            let state = shared.lock();
            (state.deliverable(), state.at_peers_end())
        };
        if end {
            // It may have closed by itself, having all it wanted.
            let _ = user.shutdown().await;
            shared.lock().end_delivered();
            shared.to_link.notify_one();
            return;
        }
        if pieces.is_empty() {
            // A user that buffers must not sit on what was delivered.
            if let Err(error) = user.flush().await {
                return shared.abort(&error);
            }
            shared.to_user.notified().await;
            continue;
        }
        match write_some(&mut user, &pieces).await {
            Ok(n) => {
                let mut state = shared.lock();
                state.delivered(n);
                shared.publish(&state);
            }
            Err(error) => return shared.abort(&error),
        }
        shared.to_link.notify_one();
    }
}

/// Lets bytes pass as the limiter allows.
pub(super) async fn grant(shared: &Shared, limiter: Option<&dyn Limiter>) {
    let Some(limiter) = limiter else { return };
    loop {
        let n = shared.lock().ungranted().min(GRANT);
        if n == 0 {
            shared.to_grant.notified().await;
            continue;
        }
        limiter.take(n).await;
        shared.lock().grant(n);
        shared.to_link.notify_one();
    }
}

/// Everything that happens on one link.
pub(super) async fn session<L>(shared: &Shared, link: L, config: &Config) -> Ended
where
    L: AsyncRead + AsyncWrite,
{
    shared.lock().begin_link();
    let heard = Mutex::new(Instant::now());
    let (mut reader, mut writer) = tokio::io::split(link);
    let ended = tokio::select! {
        ended = write_link(shared, &mut writer) => ended,
        ended = read_link(shared, &mut reader, &heard) => ended,
        ended = watch_link(shared, config, &heard) => ended,
    };
    match ended {
        Ended::Broken(_) if shared.lock().finished() => Ended::Done,
        Ended::Done => {
            part(&mut reader, &mut writer).await;
            Ended::Done
        }
        ended => ended,
    }
}

async fn write_link<L: AsyncWrite>(shared: &Shared, link: &mut WriteHalf<L>) -> Ended {
    loop {
        let (batch, parted, aborted) = {
            let mut state = shared.lock();
            (state.next_batch(), state.parted(), state.aborted())
        };
        let idle = batch.is_empty();
        let written = if idle { link.flush().await } else { write_all(link, batch).await };
        if let Err(error) = written {
            return Ended::Broken(error.to_string());
        }
        if idle && parted {
            return Ended::Done;
        }
        if let Some(why) = aborted.filter(|_| idle) {
            return Ended::Failed(Error::Local(why));
        }
        if idle {
            shared.to_link.notified().await;
        }
    }
}

async fn read_link<L: AsyncRead>(
    shared: &Shared,
    link: &mut ReadHalf<L>,
    heard: &Mutex<Instant>,
) -> Ended {
    let mut buffer = BytesMut::new();
    let mut parser = Parser::default();
    let mut reads = Reads::new();
    loop {
        match reads.read(link, &mut buffer, usize::MAX).await {
            Ok(0) => return Ended::Broken("the connection was closed".into()),
            Ok(_) => *heard.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now(),
            Err(error) => return Ended::Broken(error.to_string()),
        }
        let taken = take_frames(shared, &mut parser, &mut buffer);
        shared.to_user.notify_one();
        shared.to_link.notify_one();
        shared.room.notify_one();
        if let Err(error) = taken {
            return Ended::Failed(error);
        }
    }
}

fn take_frames(shared: &Shared, parser: &mut Parser, buffer: &mut BytesMut) -> Result<(), Error> {
    let mut state = shared.lock();
    let was_resumed = state.resumed();
    let violated = |v: super::frame::Violation| Error::Protocol(v.to_string());
    while let Some(frame) = parser.next(buffer).map_err(violated)? {
        if let Frame::Abort(why) = frame {
            return Err(Error::Peer(why));
        }
        if let Some(stamp) = state.take(frame).map_err(violated)? {
            let rtt = shared.micros().saturating_sub(stamp).max(1);
            shared.monitor.0.rtt.store(rtt, Ordering::Relaxed);
        }
    }
    shared.publish(&state);
    if state.resumed() && !was_resumed {
        shared.monitor.0.reconnects.store(state.links() - 1, Ordering::Relaxed);
        state.ping(shared.micros());
        shared.monitor.set(super::State::Connected);
    }
    Ok(())
}

/// Ends when nothing was heard for too long.
async fn watch_link(shared: &Shared, config: &Config, heard: &Mutex<Instant>) -> Ended {
    loop {
        sleep(config.ping).await;
        let silent = heard.lock().unwrap_or_else(PoisonError::into_inner).elapsed();
        if silent > config.silence {
            return Ended::Broken(format!("nothing was heard from the peer for {silent:?}"));
        }
        shared.lock().ping(shared.micros());
        shared.to_link.notify_one();
    }
}

/// Both sides are done: closes so that the last word arrives.
async fn part<L>(reader: &mut ReadHalf<L>, writer: &mut WriteHalf<L>)
where
    L: AsyncRead + AsyncWrite,
{
    let last = async {
        writer.shutdown().await?;
        let mut buffer = [0; 1024];
        while reader.read(&mut buffer).await? > 0 {}
        io::Result::Ok(())
    };
    // The peer has said Bye; how its link ends does not matter.
    let _ = timeout(Duration::from_secs(1), last).await;
}

async fn write_some<W: AsyncWrite + Unpin>(to: &mut W, pieces: &[Bytes]) -> io::Result<usize> {
    let slices: Vec<_> = pieces.iter().map(|p| IoSlice::new(p)).collect();
    match to.write_vectored(&slices).await? {
        0 => Err(io::ErrorKind::WriteZero.into()),
        n => Ok(n),
    }
}

async fn write_all<W: AsyncWrite + Unpin>(to: &mut W, mut pieces: Vec<Bytes>) -> io::Result<()> {
    let mut first = 0;
    while first < pieces.len() {
        let mut n = write_some(to, &pieces[first..]).await?;
        while first < pieces.len() && n >= pieces[first].len() {
            n -= pieces[first].len();
            first += 1;
        }
        if n > 0 {
            pieces[first].advance(n);
        }
    }
    Ok(())
}
