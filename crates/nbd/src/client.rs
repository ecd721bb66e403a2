//! The handle: requests in, data and extents out.

use std::{fmt, ops::Range, path::Path, sync::Arc, time::Duration};

use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::{Semaphore, mpsc},
};

use crate::{
    Closed, Errno, Export, Extent, Options,
    connection::{self, Order, Reply, Shared},
    extents::Layer,
    handshake::Negotiated,
    reply::{self, Body},
    wire::{self, Command, Run},
};

/// The most that one block status is asked of, in bytes.
const LONGEST_STATUS: u64 = 1 << 31;

/// A kind of [`Request`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Data.
    Read,
    /// What a context says.
    BlockStatus,
    /// The end of the connection; of no bytes.
    Disconnect,
}

/// What was asked, for errors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Its kind.
    pub kind: Kind,
    /// The first byte.
    pub offset: u64,
    /// How many bytes.
    pub len: u64,
    /// The export.
    pub export: Arc<str>,
    /// The server's socket.
    pub socket: Arc<Path>,
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, offset, len, export, socket } = self;
        match kind {
            Kind::Read => write!(f, "NBD read of {len} bytes at {offset}")?,
            Kind::BlockStatus => write!(f, "NBD block status of {len} bytes at {offset}")?,
            Kind::Disconnect => write!(f, "NBD disconnect")?,
        }
        write!(f, " of export `{export}` on {}", socket.display())
    }
}

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The server refused it, or its disk failed.
    #[error("the server failed the {request}: {errno} {message:?}")]
    Server {
        /// The request.
        request: Request,
        /// The server's error.
        errno: Errno,
        /// The server's own words; may be empty.
        message: String,
    },
    /// The deadline passed. Its reply is thrown away when it comes, and the connection lives on.
    #[error("the server did not answer the {request} within {deadline:?}; its disk may hang")]
    Deadline {
        /// The request.
        request: Request,
        /// The time that was given.
        deadline: Duration,
    },
    /// The connection ended.
    #[error("the connection ended before the {request} was answered; connect again")]
    Closed {
        /// The request.
        request: Request,
        /// Why it ended.
        #[source]
        reason: Closed,
    },
    /// The request is not one that this export takes. Nothing was sent.
    #[error("the {request} cannot be asked: {why}")]
    Invalid {
        /// The request.
        request: Request,
        /// What is wrong with it.
        why: String,
    },
    /// More extents than the caller has room for.
    #[error(
        "the {request} has more than {limit} extents; take a smaller range or a coarser bitmap"
    )]
    TooManyExtents {
        /// The request.
        request: Request,
        /// The caller's limit.
        limit: usize,
    },
}

/// The result of a [`Client::read`].
pub struct Filled {
    /// The caller's buffer, with the data; holes are zeroed in it.
    pub buffer: Vec<u8>,
    /// What the server sent as holes, as offsets of the export. With
    /// [`Options::sparse`](crate::Options::sparse) only, or from a server that cannot do without.
    pub holes: Vec<Range<u64>>,
}

impl fmt::Debug for Filled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Filled({} bytes, holes {:?})", self.buffer.len(), self.holes)
    }
}

/// A handle on one connection to one export. Clones are cheap and share the connection, which
/// ends with the last one.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

struct Inner {
    socket: Arc<Path>,
    name: Arc<str>,
    export: Export,
    context_ids: Vec<u32>,
    read_flags: u16,
    in_flight: Arc<Semaphore>,
    orders: mpsc::Sender<Order>,
    shared: Arc<Shared>,
}

/// Puts a negotiated stream to work.
pub(crate) fn start<S>(
    stream: S,
    socket: Arc<Path>,
    negotiated: Negotiated,
    options: &Options,
) -> Client
where
    S: AsyncRead + AsyncWrite + Send + 'static,
{
    let in_flight = options.in_flight.clamp(1, 1024);
    let (orders, queue) = mpsc::channel(in_flight);
    let shared = Arc::new(Shared::new());
    tokio::spawn(connection::run(stream, queue, shared.clone()));
    let Negotiated { export, context_ids, dont_fragment } = negotiated;
    let read_flags = if dont_fragment && !options.sparse { wire::DONT_FRAGMENT } else { 0 };
    let name = export.name.as_str().into();
    let in_flight = Arc::new(Semaphore::new(in_flight));
    let inner = Inner { socket, name, export, context_ids, read_flags, in_flight, orders, shared };
    Client { inner: Arc::new(inner) }
}

impl Client {
    /// The export, as the server describes it.
    pub fn export(&self) -> &Export {
        &self.inner.export
    }

    /// Fills `buffer` with the bytes at `offset`.
    ///
    /// Reads may overlap: as many as [`Options::in_flight`](crate::Options::in_flight) are under
    /// way at a time, in any order. The buffer goes along and comes back, so that data is copied
    /// once; an error drops it, as does dropping the future, which is allowed at any time.
    ///
    /// Offset and length are multiples of the export's minimum block size, and the length is at
    /// most its maximum.
    pub async fn read(
        &self,
        offset: u64,
        buffer: Vec<u8>,
        deadline: Duration,
    ) -> Result<Filled, Error> {
        let request = self.request(Kind::Read, offset, buffer.len() as u64);
        self.check(&request, self.inner.export.block_size.maximum.into())?;
        if buffer.is_empty() {
            return Ok(Filled { buffer, holes: Vec::new() });
        }
        let body = Body::Read(reply::Read::new(offset, buffer));
        match self.ask(&request, Command::Read, body, deadline).await? {
            Body::Read(read) => Ok(Filled { buffer: read.buffer, holes: read.holes }),
            Body::Status(_) => Err(self.closed_error(request)),
        }
    }

    /// What a context says of a range: extents that cover it exactly, in order, neighbours with
    /// different flags. At most `limit` of them, else [`Error::TooManyExtents`].
    ///
    /// A server may answer for less than it was asked: the rest is asked again. Each answer is
    /// waited for at most `deadline`.
    pub async fn extents(
        &self,
        context: &str,
        range: Range<u64>,
        limit: usize,
        deadline: Duration,
    ) -> Result<Vec<Extent>, Error> {
        let len = range.end.saturating_sub(range.start);
        let whole = self.request(Kind::BlockStatus, range.start, len);
        self.check(&whole, u64::MAX)?;
        let Some(id) = self.context_id(context) else {
            let why = format!("the context `{context}` was not asked for when connecting");
            return Err(Error::Invalid { request: whole, why });
        };
        let mut layer = Layer::new(range, limit);
        while !layer.rest().is_empty() {
            let rest = layer.rest();
            let len = (rest.end - rest.start).min(LONGEST_STATUS);
            let runs = self.block_status(id, rest.start, len, deadline).await?;
            if layer.add(&runs).is_none() {
                return Err(Error::TooManyExtents { request: whole, limit });
            }
        }
        Ok(layer.into_extents())
    }

    /// Ends the connection for all its clones and waits until the server has closed it: the
    /// export has one client less then. Requests that are still open fail.
    pub async fn disconnect(self, deadline: Duration) -> Result<(), Error> {
        let ended = async {
            // An error only says that it has ended already.
            let _ = self.inner.orders.send(Order::Disconnect).await;
            self.closed().await;
        };
        tokio::time::timeout(deadline, ended).await.map_err(|_| Error::Deadline {
            request: self.request(Kind::Disconnect, 0, 0),
            deadline,
        })
    }

    /// Waits for the connection's end.
    pub async fn closed(&self) -> Closed {
        let mut closed = self.inner.shared.watch_closed();
        let _ = closed.wait_for(Option::is_some).await;
        self.inner.shared.reason()
    }

    fn context_id(&self, context: &str) -> Option<u32> {
        let inner = &self.inner;
        let index = inner.export.contexts.iter().position(|name| name == context)?;
        inner.context_ids.get(index).copied()
    }

    async fn block_status(
        &self,
        context: u32,
        offset: u64,
        len: u64,
        deadline: Duration,
    ) -> Result<Vec<Run>, Error> {
        let request = self.request(Kind::BlockStatus, offset, len);
        let negotiated = self.inner.context_ids.iter().copied();
        let body = Body::Status(reply::Status::new(context, negotiated));
        match self.ask(&request, Command::BlockStatus, body, deadline).await? {
            Body::Status(status) => Ok(status.runs),
            Body::Read(_) => Err(self.closed_error(request)),
        }
    }

    /// Whether a request is one that the export takes.
    fn check(&self, request: &Request, longest: u64) -> Result<(), Error> {
        let Export { size, block_size, .. } = self.inner.export;
        let block = u64::from(block_size.minimum);
        let end = request.offset.checked_add(request.len).filter(|end| *end <= size);
        let why = match end {
            None => format!("the export has {size} bytes"),
            Some(_) if request.len > longest => format!("{longest} bytes are the most"),
            // The end of an export counts as aligned, whatever its size.
            Some(end)
                if !request.offset.is_multiple_of(block)
                    || !(end.is_multiple_of(block) || end == size) =>
            {
                format!("offset and length must be multiples of {block} bytes")
            }
            Some(_) => return Ok(()),
        };
        Err(Error::Invalid { request: request.clone(), why })
    }

    async fn ask(
        &self,
        request: &Request,
        command: Command,
        body: Body,
        deadline: Duration,
    ) -> Result<Body, Error> {
        let exchange = self.exchange(request, command, body);
        let request = request.clone();
        match tokio::time::timeout(deadline, exchange).await {
            Err(_) => Err(Error::Deadline { request, deadline }),
            Ok(Err(reason)) => Err(Error::Closed { request, reason }),
            Ok(Ok(Err(refusal))) => {
                let (errno, message) = (refusal.errno, refusal.message);
                Err(Error::Server { request, errno, message })
            }
            Ok(Ok(Ok(body))) => Ok(body),
        }
    }

    async fn exchange(
        &self,
        request: &Request,
        command: Command,
        body: Body,
    ) -> Result<Reply, Closed> {
        let Inner { in_flight, orders, shared, .. } = &*self.inner;
        // Never closed: an error cannot come.
        let permit = in_flight.clone().acquire_owned().await.map_err(|_| shared.reason())?;
        let order = orders.reserve().await.map_err(|_| shared.reason())?;
        // N.B. no wait between these two: a request that is open but never sent would keep its
        // permit for ever.
        let (cookie, reply) = shared.open(body, permit).ok_or_else(|| shared.reason())?;
        let flags = if command == Command::Read { self.inner.read_flags } else { 0 };
        let message = wire::request(command, flags, cookie, request.offset, request.len);
        order.send(Order::Request { cookie, message });
        reply.await.map_err(|_| shared.reason())
    }

    fn request(&self, kind: Kind, offset: u64, len: u64) -> Request {
        let Inner { name: export, socket, .. } = &*self.inner;
        Request { kind, offset, len, export: export.clone(), socket: socket.clone() }
    }

    fn closed_error(&self, request: Request) -> Error {
        Error::Closed { request, reason: self.inner.shared.reason() }
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("socket", &self.inner.socket)
            .field("export", &self.inner.export)
            .finish_non_exhaustive()
    }
}
