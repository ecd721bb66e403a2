//! From a socket to a [`Client`]: connect, greeting, negotiation.

use std::{
    fs::File,
    io,
    os::{fd::AsRawFd, unix::ffi::OsStrExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::{
    net::UnixStream,
    sync::{broadcast, mpsc},
    time::Instant,
};

use crate::{
    Client, Closed, client,
    client::Inner,
    commands::{Capability, QmpCapabilities, Version},
    connection::{self, Shared},
    line::{Line, Lines},
};

/// The longest path that fits a Unix socket address, in bytes.
const LONGEST_ADDRESS: usize = 107;
/// How long to wait before a QEMU that does not listen yet is tried again.
const RETRY: Duration = Duration::from_millis(10);
/// How many commands may wait to be written.
const QUEUE: usize = 64;

/// The bounds of a connection.
#[derive(Debug, Clone)]
pub struct Options {
    /// The longest line accepted from QEMU, in bytes. Default 16 MiB: the reply to
    /// `query-qmp-schema` alone is 0.2 MiB, and disks add to `query-block`.
    pub line_limit: usize,
    /// How many events a subscriber may lie behind. Default 1024.
    pub event_queue: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { line_limit: 16 << 20, event_queue: 1024 }
    }
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket cannot be connected to.
    #[error("cannot connect to QMP at {}; is its QEMU running?", socket.display())]
    Socket {
        /// The socket.
        socket: Arc<Path>,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// QEMU listens but did not speak in time.
    #[error(
        "QEMU sent no QMP greeting on {} within {deadline:?}; it hangs, or its monitor (which \
         serves one client at a time) is taken",
        socket.display()
    )]
    NoGreeting {
        /// The socket.
        socket: Arc<Path>,
        /// The time that was given.
        deadline: Duration,
    },
    /// The connection ended instead of a greeting.
    #[error("the connection to {} ended before QMP's greeting", socket.display())]
    Closed {
        /// The socket.
        socket: Arc<Path>,
        /// Why it ended.
        #[source]
        reason: Closed,
    },
    /// Something else listens there.
    #[error("what listens on {} is no QMP server", socket.display())]
    NotQmp {
        /// The socket.
        socket: Arc<Path>,
    },
    /// The negotiation of capabilities failed.
    #[error("QMP's capabilities could not be negotiated")]
    Negotiation(#[source] client::Error),
}

impl Client {
    /// Connects to the QEMU that listens on `socket`, whose path may have any length, and
    /// negotiates; all within `deadline`.
    ///
    /// A socket that is missing or refuses belongs to a QEMU that still starts: it is tried again
    /// until the deadline. Drop the future when that QEMU is known to have ended.
    pub async fn connect(socket: impl AsRef<Path>, deadline: Duration) -> Result<Self, Error> {
        let socket = socket.as_ref();
        let until = Instant::now() + deadline;
        let stream = loop {
            match dial(socket).await {
                Ok(stream) => break stream,
                Err(error) if is_starting(&error) && Instant::now() + RETRY < until => {
                    tokio::time::sleep(RETRY).await;
                }
                Err(source) => return Err(Error::Socket { socket: socket.into(), source }),
            }
        };
        let left = until.saturating_duration_since(Instant::now());
        Self::over(stream, socket, Options::default(), left).await
    }

    /// Negotiates over a stream that is already connected; `name` stands for it in errors.
    pub async fn over(
        stream: UnixStream,
        name: impl Into<PathBuf>,
        options: Options,
        deadline: Duration,
    ) -> Result<Self, Error> {
        let socket: Arc<Path> = name.into().into();
        let until = Instant::now() + deadline;
        let (read_half, write_half) = stream.into_split();
        let mut lines = Lines::new(read_half, options.line_limit);
        let (version, oob) =
            tokio::time::timeout(deadline, greeting(&mut lines, &socket))
                .await
                .map_err(|_| Error::NoGreeting { socket: socket.clone(), deadline })??;

        let (requests, queue) = mpsc::channel(QUEUE);
        let events = broadcast::channel(options.event_queue).0;
        let shared = Arc::new(Shared::new());
        let client = Self::new(Inner {
            socket,
            version,
            oob,
            requests,
            events: events.downgrade(),
            shared: shared.clone(),
        });
        tokio::spawn(connection::run(lines, write_half, queue, events, shared));

        let enable = if oob { vec![Capability::Oob] } else { Vec::new() };
        let left = until.saturating_duration_since(Instant::now());
        client.execute(QmpCapabilities { enable }, left).await.map_err(Error::Negotiation)?;
        Ok(client)
    }
}

async fn greeting<R: tokio::io::AsyncRead + Unpin>(
    lines: &mut Lines<R>,
    socket: &Arc<Path>,
) -> Result<(Version, bool), Error> {
    let line =
        lines.next().await.map_err(|reason| Error::Closed { socket: socket.clone(), reason })?;
    match Line::parse(line) {
        Ok(Line::Greeting { version, oob }) => Ok((version, oob)),
        _ => Err(Error::NotQmp { socket: socket.clone() }),
    }
}

fn is_starting(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
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
