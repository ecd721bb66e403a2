//! The task that owns the socket, and what it shares with the handles.

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::{
    io::AsyncWriteExt,
    net::unix::{OwnedReadHalf, OwnedWriteHalf},
    sync::{broadcast, mpsc, oneshot, watch},
};

use crate::{
    Event,
    line::{Line, Lines, Reply},
};

/// Why a connection ended.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Closed {
    /// QEMU ended, or closed this connection.
    #[error("QEMU closed it")]
    Eof,
    /// QEMU ended while it wrote.
    #[error("QEMU closed it in the middle of a line")]
    MidLine,
    /// A line beyond [`Options::line_limit`](crate::Options::line_limit).
    #[error("QEMU sent a line of more than {limit} bytes; raise the limit if that is no fault")]
    LineTooLong {
        /// The limit in bytes.
        limit: usize,
    },
    /// A line that is no JSON object: nothing after it can be trusted.
    #[error("QEMU sent a line that is no JSON object")]
    NotJson(#[source] Arc<serde_json::Error>),
    /// The socket failed.
    #[error("its socket failed")]
    Io(#[source] Arc<io::Error>),
    /// The last [`Client`](crate::Client) of it was dropped in this process.
    #[error("its last client was dropped in this process")]
    Dropped,
}

/// One line to send, and the waiter that it is for.
pub(crate) struct Request {
    pub(crate) id: u64,
    pub(crate) line: Vec<u8>,
}

/// What the task and the handles share: who waits for which reply, and how the connection ended.
pub(crate) struct Shared {
    /// `None` once the connection has ended: nobody can begin to wait any more.
    waiters: Mutex<Option<Waiters>>,
    closed: watch::Sender<Option<Closed>>,
}

#[derive(Default)]
struct Waiters {
    last_id: u64,
    replies: HashMap<u64, oneshot::Sender<Reply>>,
}

impl Shared {
    pub(crate) fn new() -> Self {
        Self { waiters: Mutex::new(Some(Waiters::default())), closed: watch::channel(None).0 }
    }

    /// Begins to wait for a reply; `None` once the connection has ended.
    pub(crate) fn wait(&self) -> Option<Waiter<'_>> {
        let mut guard = self.lock();
        let waiters = guard.as_mut()?;
        waiters.last_id += 1;
        let id = waiters.last_id;
        let (sender, reply) = oneshot::channel();
        waiters.replies.insert(id, sender);
        Some(Waiter { shared: self, id, reply })
    }

    pub(crate) fn watch_closed(&self) -> watch::Receiver<Option<Closed>> {
        self.closed.subscribe()
    }

    /// Why the connection ended; only to be asked when it has.
    pub(crate) fn reason(&self) -> Closed {
        self.closed.borrow().clone().unwrap_or(Closed::Eof)
    }

    fn is_awaited(&self, id: u64) -> bool {
        self.lock().as_ref().is_some_and(|waiters| waiters.replies.contains_key(&id))
    }

    fn take(&self, id: u64) -> Option<oneshot::Sender<Reply>> {
        self.lock().as_mut()?.replies.remove(&id)
    }

    // N.B. the reason is set before the waiters are let go: they read it.
    fn close(&self, reason: Closed) {
        self.closed.send_replace(Some(reason));
        *self.lock() = None;
    }

    fn lock(&self) -> MutexGuard<'_, Option<Waiters>> {
        self.waiters.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits for one reply; dropped, nobody does, and the reply is thrown away when it comes.
pub(crate) struct Waiter<'a> {
    shared: &'a Shared,
    pub(crate) id: u64,
    reply: oneshot::Receiver<Reply>,
}

impl Waiter<'_> {
    /// The reply, or why none can come any more.
    pub(crate) async fn reply(&mut self) -> Result<Reply, Closed> {
        (&mut self.reply).await.map_err(|_| self.shared.reason())
    }
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        self.shared.take(self.id);
    }
}

/// Runs a connection until it ends.
pub(crate) async fn run(
    lines: Lines<OwnedReadHalf>,
    socket: OwnedWriteHalf,
    requests: mpsc::Receiver<Request>,
    events: broadcast::Sender<Event>,
    shared: Arc<Shared>,
) {
    let reason = tokio::select! {
        reason = read(lines, &events, &shared) => reason,
        reason = write(socket, requests, &shared) => reason,
    };
    tracing::debug!(%reason, "a QMP connection ended");
    // N.B. before `events` is dropped: a subscriber that finds it gone asks for the reason.
    shared.close(reason);
}

async fn read(
    mut lines: Lines<OwnedReadHalf>,
    events: &broadcast::Sender<Event>,
    shared: &Shared,
) -> Closed {
    loop {
        let line = match lines.next().await {
            Ok(line) => Line::parse(line),
            Err(reason) => return reason,
        };
        match line {
            Ok(Line::Event(event)) => {
                // An error only says that nobody listens.
                let _ = events.send(event);
            }
            Ok(Line::Reply { id, reply }) => match id.and_then(|id| shared.take(id)) {
                Some(waiter) => drop(waiter.send(reply)),
                None => tracing::debug!(?id, ?reply, "a QMP reply that nobody waits for"),
            },
            Ok(line) => tracing::debug!(?line, "a QMP line that says nothing to us"),
            Err(source) => return Closed::NotJson(Arc::new(source)),
        }
    }
}

async fn write(
    mut socket: OwnedWriteHalf,
    mut requests: mpsc::Receiver<Request>,
    shared: &Shared,
) -> Closed {
    while let Some(request) = requests.recv().await {
        // What was given up before it was sent is better not done at all.
        if !shared.is_awaited(request.id) {
            continue;
        }
        if let Err(source) = socket.write_all(&request.line).await {
            return Closed::Io(Arc::new(source));
        }
    }
    Closed::Dropped
}
