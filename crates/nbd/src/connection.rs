//! The task that owns the stream, and what it shares with the handles.

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader, ReadHalf, WriteHalf},
    sync::{OwnedSemaphorePermit, mpsc, oneshot, watch},
};

use crate::{
    Errno, Violation,
    reply::Body,
    wire::{self, Chunk, Command},
};

/// How long a server may take to accept a goodbye that nobody waits for.
const GOODBYE: Duration = Duration::from_secs(1);

/// Why a connection ended.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Closed {
    /// The server ended, deleted the export, or followed a `disconnect`.
    #[error("the server closed it")]
    Eof,
    /// The server ended while it wrote.
    #[error("the server closed it in the middle of a message")]
    MidMessage,
    /// The server does not keep to the protocol: nothing after it can be trusted.
    #[error("the server sent what it must not")]
    Violation(
        #[from]
        #[source]
        Violation,
    ),
    /// The stream failed.
    #[error("its stream failed")]
    Io(#[source] Arc<io::Error>),
    /// The last [`Client`](crate::Client) of it was dropped in this process.
    #[error("its last client was dropped in this process")]
    Dropped,
}

/// What a failed read or write in the middle of a message says.
pub(crate) fn broken(error: io::Error) -> Closed {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => Closed::MidMessage,
        _ => Closed::Io(Arc::new(error)),
    }
}

/// The server's refusal of one request.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) errno: Errno,
    pub(crate) message: String,
}

pub(crate) type Reply = Result<Body, Refusal>;

/// What the task is asked to write.
pub(crate) enum Order {
    Request { cookie: u64, message: Vec<u8> },
    Disconnect,
}

/// A request whose reply has not fully come.
//
// N.B. it stays open when its waiter gives up: its reply still comes, and still has to be taken
// off the stream. The permit bounds how many can be left behind like that.
pub(crate) struct Open {
    body: Body,
    refusal: Option<Refusal>,
    waiter: oneshot::Sender<Reply>,
    _permit: OwnedSemaphorePermit,
}

/// What the task and the handles share: the open requests, and how the connection ended.
pub(crate) struct Shared {
    /// `None` once the connection has ended.
    requests: Mutex<Option<Requests>>,
    closed: watch::Sender<Option<Closed>>,
}

#[derive(Default)]
struct Requests {
    last_cookie: u64,
    open: HashMap<u64, Open>,
}

impl Shared {
    pub(crate) fn new() -> Self {
        Self { requests: Mutex::new(Some(Requests::default())), closed: watch::channel(None).0 }
    }

    /// Opens a request: its cookie, and where its reply will come. `None` once closed.
    pub(crate) fn open(
        &self,
        body: Body,
        permit: OwnedSemaphorePermit,
    ) -> Option<(u64, oneshot::Receiver<Reply>)> {
        let mut guard = self.lock();
        let requests = guard.as_mut()?;
        requests.last_cookie += 1;
        let (waiter, reply) = oneshot::channel();
        let open = Open { body, refusal: None, waiter, _permit: permit };
        requests.open.insert(requests.last_cookie, open);
        Some((requests.last_cookie, reply))
    }

    pub(crate) fn watch_closed(&self) -> watch::Receiver<Option<Closed>> {
        self.closed.subscribe()
    }

    /// Why the connection ended; only to be asked when it has.
    pub(crate) fn reason(&self) -> Closed {
        self.closed.borrow().clone().unwrap_or(Closed::Eof)
    }

    fn take(&self, cookie: u64) -> Option<Open> {
        self.lock().as_mut()?.open.remove(&cookie)
    }

    fn put_back(&self, cookie: u64, open: Open) {
        if let Some(requests) = self.lock().as_mut() {
            requests.open.insert(cookie, open);
        }
    }

    /// Forgets a request that was not sent and that nobody waits for. Whether it was one.
    fn forget_if_given_up(&self, cookie: u64) -> bool {
        let mut guard = self.lock();
        let Some(requests) = guard.as_mut() else { return true };
        let given_up = requests.open.get(&cookie).is_none_or(|open| open.waiter.is_closed());
        if given_up {
            requests.open.remove(&cookie);
        }
        given_up
    }

    // N.B. the reason is set before the waiters are let go: they read it.
    fn close(&self, reason: Closed) {
        self.closed.send_replace(Some(reason));
        *self.lock() = None;
    }

    fn lock(&self) -> MutexGuard<'_, Option<Requests>> {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs a connection until it ends.
pub(crate) async fn run<S>(stream: S, orders: mpsc::Receiver<Order>, shared: Arc<Shared>)
where
    S: AsyncRead + AsyncWrite,
{
    let (reader, writer) = tokio::io::split(stream);
    let reason = tokio::select! {
        reason = read(BufReader::new(reader), &shared) => reason,
        reason = write(writer, orders, &shared) => reason,
    };
    tracing::debug!(%reason, "an NBD connection ended");
    shared.close(reason);
}

async fn write<S: AsyncWrite>(
    mut stream: WriteHalf<S>,
    mut orders: mpsc::Receiver<Order>,
    shared: &Shared,
) -> Closed {
    let goodbye = wire::request(Command::Disconnect, 0, 0, 0, 0);
    while let Some(order) = orders.recv().await {
        let message = match &order {
            Order::Request { cookie, .. } if shared.forget_if_given_up(*cookie) => continue,
            Order::Request { message, .. } => message,
            Order::Disconnect => &goodbye,
        };
        if let Err(source) = stream.write_all(message).await {
            return Closed::Io(Arc::new(source));
        }
        if matches!(order, Order::Disconnect) {
            // The server ends the connection, and `read` sees it.
            std::future::pending::<()>().await;
        }
    }
    // A courtesy: a server takes the end of the stream for the same.
    let _ = tokio::time::timeout(GOODBYE, stream.write_all(&goodbye)).await;
    Closed::Dropped
}

async fn read<S: AsyncRead>(mut stream: BufReader<ReadHalf<S>>, shared: &Shared) -> Closed {
    loop {
        if let Err(reason) = read_message(&mut stream, shared).await {
            return reason;
        }
    }
}

async fn read_message<R: AsyncRead + Unpin>(stream: &mut R, shared: &Shared) -> Result<(), Closed> {
    let mut magic = [0; 4];
    let begun = stream.read(&mut magic).await.map_err(broken)?;
    if begun == 0 {
        return Err(Closed::Eof);
    }
    stream.read_exact(&mut magic[begun..]).await.map_err(broken)?;
    match u32::from_be_bytes(magic) {
        wire::CHUNK_MAGIC => read_chunk(stream, shared).await,
        wire::SIMPLE_REPLY_MAGIC => read_simple_reply(stream, shared).await,
        found => Err(Violation::Magic { what: "a reply", found: found.into() }.into()),
    }
}

/// With structured replies negotiated, a simple reply can only be a refusal: all that this client
/// asks has a payload.
async fn read_simple_reply<R: AsyncRead + Unpin>(
    stream: &mut R,
    shared: &Shared,
) -> Result<(), Closed> {
    let mut rest = [0; wire::SIMPLE_REPLY_REST];
    stream.read_exact(&mut rest).await.map_err(broken)?;
    let (errno, cookie) = wire::simple_reply(&rest)?;
    let open = shared.take(cookie).ok_or(Violation::Cookie(cookie))?;
    if errno == Errno(0) {
        return Err(Violation::Incomplete("its payload").into());
    }
    let _ = open.waiter.send(Err(Refusal { errno, message: String::new() }));
    Ok(())
}

async fn read_chunk<R: AsyncRead + Unpin>(stream: &mut R, shared: &Shared) -> Result<(), Closed> {
    let mut rest = [0; wire::CHUNK_REST];
    stream.read_exact(&mut rest).await.map_err(broken)?;
    let chunk = Chunk::parse(&rest)?;
    let mut open = shared.take(chunk.cookie).ok_or(Violation::Cookie(chunk.cookie))?;
    read_payload(stream, chunk, &mut open).await?;
    if !chunk.done {
        shared.put_back(chunk.cookie, open);
        return Ok(());
    }
    let reply = match open.refusal {
        Some(refusal) => Err(refusal),
        None => {
            open.body.finish()?;
            Ok(open.body)
        }
    };
    // An error only says that its waiter gave up.
    let _ = open.waiter.send(reply);
    Ok(())
}

async fn read_payload<R: AsyncRead + Unpin>(
    stream: &mut R,
    chunk: Chunk,
    open: &mut Open,
) -> Result<(), Closed> {
    match (chunk.kind, &mut open.body) {
        (wire::CHUNK_NONE, _) => {
            payload(stream, "an empty chunk", chunk.len, 0..=0).await?;
            // Only as the last one does it say anything.
            return if chunk.done { Ok(()) } else { Err(Violation::Chunk(chunk.kind).into()) };
        }
        (wire::CHUNK_DATA, Body::Read(read)) => {
            let what = "a data chunk";
            let len = chunk.len.checked_sub(8);
            let len = len.ok_or(Violation::Length { what, len: chunk.len.into() })?;
            let offset = stream.read_u64().await.map_err(broken)?;
            let target = read.claim(offset, len.into())?;
            stream.read_exact(target).await.map_err(broken)?;
        }
        (wire::CHUNK_HOLE, Body::Read(read)) => {
            let exact = wire::HOLE_CHUNK..=wire::HOLE_CHUNK;
            read.hole(&payload(stream, "a hole chunk", chunk.len, exact).await?)?;
        }
        (wire::CHUNK_BLOCK_STATUS, Body::Status(status)) => {
            let bounds = 4..=wire::MAX_BLOCK_STATUS_CHUNK;
            status.accept(&payload(stream, "a block status chunk", chunk.len, bounds).await?)?;
        }
        _ if chunk.is_error() => {
            let bounds = 6..=wire::MAX_ERROR_CHUNK;
            let data = payload(stream, "an error chunk", chunk.len, bounds).await?;
            let (errno, message) = wire::error_chunk(&data)?;
            open.refusal.get_or_insert(Refusal { errno, message });
        }
        _ => return Err(Violation::Chunk(chunk.kind).into()),
    }
    Ok(())
}

/// Reads a payload whose length lies within bounds.
async fn payload<R: AsyncRead + Unpin>(
    stream: &mut R,
    what: &'static str,
    len: u32,
    bounds: std::ops::RangeInclusive<u32>,
) -> Result<Vec<u8>, Closed> {
    if !bounds.contains(&len) {
        return Err(Violation::Length { what, len: len.into() }.into());
    }
    let mut data = vec![0; len as usize];
    stream.read_exact(&mut data).await.map_err(broken)?;
    Ok(data)
}
