//! From a socket to a [`Client`].

use std::{
    fs::File,
    io,
    os::{fd::AsRawFd, unix::ffi::OsStrExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::UnixStream,
    time::Instant,
};

use crate::{Client, Closed, client, handshake};

/// The longest path that fits a Unix socket address, in bytes.
const LONGEST_ADDRESS: usize = 107;

/// What to ask of a server.
#[derive(Debug, Clone)]
pub struct Options {
    /// The export's name; empty for the server's default.
    pub export: String,
    /// The contexts whose block status is wanted, such as [`BASE_ALLOCATION`](crate::BASE_ALLOCATION).
    pub contexts: Vec<String>,
    /// How many requests may be open at a time, 1 to 1024; more wait. Default 16.
    pub in_flight: usize,
    /// Lets reads come in pieces, with holes told apart. Default false: QEMU ends the whole
    /// connection when its disk fails under such a read, while a read in one piece gets the error.
    pub sparse: bool,
}

impl Options {
    /// An export, without contexts.
    pub fn new(export: impl Into<String>) -> Self {
        Self { export: export.into(), contexts: Vec::new(), in_flight: 16, sparse: false }
    }

    /// Also asks for a context.
    #[must_use]
    pub fn context(mut self, context: impl Into<String>) -> Self {
        self.contexts.push(context.into());
        self
    }
}

/// An export, as the server describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Export {
    /// Its name.
    pub name: String,
    /// Its size in bytes.
    pub size: u64,
    /// Whether the server refuses writes to it.
    pub read_only: bool,
    /// Whether several connections see the same data.
    pub can_multi_conn: bool,
    /// What requests must keep to.
    pub block_size: BlockSize,
    /// The contexts that were negotiated.
    pub contexts: Vec<String>,
}

/// What the requests to an export must keep to, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSize {
    /// Offsets and lengths are multiples of it. A power of two.
    pub minimum: u32,
    /// Those of it are fast. A power of two.
    pub preferred: u32,
    /// The longest read. At most [`BlockSize::LONGEST_READ`].
    pub maximum: u32,
}

impl BlockSize {
    /// The longest read that this client asks for, and QEMU answers: 32 MiB.
    pub const LONGEST_READ: u32 = 32 << 20;

    pub(crate) fn checked(minimum: u32, preferred: u32, maximum: u32) -> Option<Self> {
        let sensible = minimum.is_power_of_two()
            && preferred.is_power_of_two()
            && minimum <= preferred
            && preferred <= maximum
            && preferred <= Self::LONGEST_READ;
        sensible.then_some(Self { minimum, preferred, maximum: maximum.min(Self::LONGEST_READ) })
    }
}

impl Default for BlockSize {
    /// What the protocol has for a server that says nothing.
    fn default() -> Self {
        Self { minimum: 1, preferred: 4096, maximum: Self::LONGEST_READ }
    }
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket cannot be connected to.
    #[error("cannot connect to NBD at {}; is its server running?", socket.display())]
    Socket {
        /// The socket.
        socket: Arc<Path>,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The server did not finish the handshake in time.
    #[error(
        "the NBD server on {} did not finish the handshake within {deadline:?}; it hangs, or it \
         has as many clients as it takes",
        socket.display()
    )]
    Deadline {
        /// The socket.
        socket: Arc<Path>,
        /// The time that was given.
        deadline: Duration,
    },
    /// The connection ended during the handshake.
    #[error("the NBD handshake on {} failed", socket.display())]
    Closed {
        /// The socket.
        socket: Arc<Path>,
        /// Why it ended.
        #[source]
        reason: Closed,
    },
    /// The server refused.
    #[error(
        "the NBD server on {} refused {option} for export `{export}`: {why} {message:?}",
        socket.display()
    )]
    Refused {
        /// The socket.
        socket: Arc<Path>,
        /// The export.
        export: String,
        /// What was refused.
        option: &'static str,
        /// The protocol's reason.
        why: &'static str,
        /// The server's own words; may be empty.
        message: String,
    },
    /// The export does not have a context.
    #[error(
        "export `{export}` on {} has no context `{context}`; a bitmap must be named when its \
         export is added",
        socket.display()
    )]
    NoContext {
        /// The socket.
        socket: Arc<Path>,
        /// The export.
        export: String,
        /// The context.
        context: String,
    },
    /// A name longer than the protocol allows, or a context asked for twice. Nothing was sent.
    #[error("the name of an NBD export or context cannot be asked for: {why}")]
    Name {
        /// What is wrong with it.
        why: String,
    },
}

impl Client {
    /// Connects to the server that listens on `socket`, whose path may have any length.
    pub async fn connect(
        socket: impl AsRef<Path>,
        options: Options,
        deadline: Duration,
    ) -> Result<Self, Error> {
        let socket = socket.as_ref();
        let until = Instant::now() + deadline;
        let stream = tokio::time::timeout(deadline, dial(socket))
            .await
            .map_err(|_| Error::Deadline { socket: socket.into(), deadline })?
            .map_err(|source| Error::Socket { socket: socket.into(), source })?;
        let left = until.saturating_duration_since(Instant::now());
        Self::over(stream, socket, options, left).await
    }

    /// Negotiates over a stream that is already connected; `name` stands for it in errors.
    pub async fn over<S>(
        mut stream: S,
        name: impl Into<PathBuf>,
        options: Options,
        deadline: Duration,
    ) -> Result<Self, Error>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        check_names(&options)?;
        let socket: Arc<Path> = name.into().into();
        let negotiated = tokio::time::timeout(deadline, handshake::run(&mut stream, &options))
            .await
            .map_err(|_| Error::Deadline { socket: socket.clone(), deadline })?
            .map_err(|error| explain(error, &socket, &options.export))?;
        Ok(client::start(stream, socket, negotiated, &options))
    }
}

fn explain(error: handshake::Error, socket: &Arc<Path>, export: &str) -> Error {
    let (socket, export) = (socket.clone(), export.to_owned());
    match error {
        handshake::Error::Closed(reason) => Error::Closed { socket, reason },
        handshake::Error::NoContext { context } => Error::NoContext { socket, export, context },
        handshake::Error::Refused { option, why, message } => {
            Error::Refused { socket, export, option, why, message }
        }
    }
}

fn check_names(options: &Options) -> Result<(), Error> {
    let longest = crate::wire::MAX_STRING;
    let names = std::iter::once(&options.export).chain(&options.contexts);
    for name in names {
        if name.len() > longest {
            let why = format!("`{name}` has more than {longest} bytes");
            return Err(Error::Name { why });
        }
    }
    for (index, context) in options.contexts.iter().enumerate() {
        if options.contexts[..index].contains(context) {
            return Err(Error::Name { why: format!("`{context}` is there twice") });
        }
    }
    Ok(())
}

async fn dial(socket: &Path) -> io::Result<UnixStream> {
    if socket.as_os_str().as_bytes().len() <= LONGEST_ADDRESS {
        return UnixStream::connect(socket).await;
    }
    let (Some(folder), Some(name)) = (socket.parent(), socket.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    // Held until connected: the short path leads through it.
    let folder = File::open(folder)?;
    let short = Path::new("/proc/self/fd").join(folder.as_raw_fd().to_string()).join(name);
    UnixStream::connect(short).await
}
