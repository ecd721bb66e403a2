//! What is said first on every connection, and how it is answered.
//!
//! ```text
//! caller                                             called
//!   "GDWT" version:u16 length:u16 {Opening}  ----->
//!                                            <-----  "GDWT" version:u16 length:u16 {Reply}
//!   confirm byte, then the stream's bytes    <---->  the stream's bytes
//! ```
//!
//! Numbers are big-endian, the bodies JSON of at most [`MAX_BODY`] bytes. A gateway passes
//! a preface on to the launcher with the peer's id, in the same framing.

use std::fmt;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::identity::SpiffeId;
use crate::tokens::Token;

/// The version spoken here. A reader takes this and, once there is one, the previous.
pub const VERSION: u16 = 1;
/// The most bytes of JSON in a preface or a reply.
pub const MAX_BODY: usize = 4096;
/// What the source sends first once it has the successor.
pub(crate) const CONFIRM: u8 = 0xC5;

const MAGIC: &[u8; 4] = b"GDWT";

/// Codes of refusals: stable words for programs.
pub mod code {
    /// The bytes are no preface.
    pub const BAD_PREFACE: &str = "bad-preface";
    /// The preface is longer than allowed.
    pub const PREFACE_TOO_LARGE: &str = "preface-too-large";
    /// The preface's version is not spoken here.
    pub const VERSION: &str = "version";
    /// The preface did not come in time.
    pub const PREFACE_TIMEOUT: &str = "preface-timeout";
    /// No launcher of that VM listens on this host.
    pub const NO_LAUNCHER: &str = "no-launcher";
    /// The launcher's socket is a link, another's, or no socket.
    pub const UNSAFE_SOCKET: &str = "unsafe-socket";
    /// The launcher accepted the connection but not the stream in time.
    pub const LAUNCHER_SILENT: &str = "launcher-silent";
    /// A request that cannot be read or answered.
    pub const BAD_REQUEST: &str = "bad-request";
    /// Too many connections.
    pub const BUSY: &str = "busy";
    /// The migration does not expect that stream.
    pub const STREAM_UNKNOWN: &str = "stream-unknown";
    /// The token led to a connection before.
    pub const TOKEN_USED: &str = "token-used";
    /// The token was never issued for that stream.
    pub const TOKEN_UNKNOWN: &str = "token-unknown";
}

/// One of a migration's streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stream {
    /// The launchers' talk.
    Control,
    /// QEMU's memory; 0 is its main channel.
    Memory(u16),
    /// Disk extents.
    Disk(u16),
}

impl fmt::Display for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Control => f.write_str("control stream"),
            Self::Memory(n) => write!(f, "memory stream {n}"),
            Self::Disk(n) => write!(f, "disk stream {n}"),
        }
    }
}

/// Which stream a connection is to be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Preface {
    /// The VM's name on the target host: the folder of its launcher.
    pub vm: VmName,
    /// The migration, as both launchers call it; 1 to 128 bytes.
    pub migration: String,
    /// The stream.
    pub stream: Stream,
    /// Admits this one connection.
    pub token: Token,
}

impl Preface {
    /// Checks what the types do not.
    pub(crate) fn check(&self) -> Result<(), Refusal> {
        if (1..=128).contains(&self.migration.len()) {
            return Ok(());
        }
        Err(Refusal::new(code::BAD_PREFACE, "a migration's name is 1 to 128 bytes"))
    }
}

/// A VM's folder: 1 to 63 of `a-z 0-9 . -`, and neither `.` nor `..`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VmName(String);

impl VmName {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for VmName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for VmName {
    type Error = &'static str;

    fn try_from(name: String) -> Result<Self, Self::Error> {
        let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b".-".contains(&b);
        let whole = (1..=63).contains(&name.len()) && name.bytes().all(inner);
        if !whole || name == "." || name == ".." {
            return Err("a VM's name is 1 to 63 of a-z 0-9 . - and neither . nor ..");
        }
        Ok(Self(name))
    }
}

impl std::str::FromStr for VmName {
    type Err = &'static str;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::try_from(name.to_owned())
    }
}

impl From<VmName> for String {
    fn from(name: VmName) -> Self {
        name.0
    }
}

/// The first message from gateway to gateway.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Opening {
    /// Becomes a migration's stream.
    Stream(Preface),
    /// One request and one answer between the handlers, about who owns a VM.
    Owner,
    /// Bytes follow that are thrown away: the link is measured.
    Probe,
}

/// The first message from a gateway to a launcher.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Delivery {
    /// What the source said.
    pub(crate) preface: Preface,
    /// The gateway that brought it, as its certificate proved.
    pub(crate) peer: SpiffeId,
}

/// How an opening is answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Reply {
    /// The stream stands, once the source confirmed the token of its next connection.
    Accepted { successor: Token },
    /// The answer to [`Opening::Owner`]'s request follows, or [`Opening::Probe`]'s bytes may.
    Ready,
    /// Neither.
    Refused(Refusal),
}

/// Why a stream was refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{text} ({code})")]
pub struct Refusal {
    /// One of [`code`]'s, or the launcher's own.
    pub code: String,
    /// For people.
    pub text: String,
}

impl Refusal {
    /// A refusal; both parts are cut to what fits into a reply.
    pub fn new(code: &str, text: impl fmt::Display) -> Self {
        let text = text.to_string().chars().take(512).collect();
        Self { code: code.chars().take(64).collect(), text }
    }
}

/// Why a message could not be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not our protocol.
    #[error("the bytes received are not a preface; does another service use this address?")]
    Magic,
    /// A version that is not spoken here.
    #[error(
        "preface version {found} is not spoken here (this side speaks {VERSION}); update the older host"
    )]
    Version {
        /// The peer's.
        found: u16,
    },
    /// Longer than allowed.
    #[error("a preface of {length} bytes is longer than the {MAX_BODY} that are allowed")]
    TooLarge {
        /// The length announced.
        length: usize,
    },
    /// Not the JSON expected.
    #[error("the preface is malformed: {0}")]
    Malformed(String),
    /// It did not come in time.
    #[error("no preface came within {0:?}")]
    Timeout(Duration),
    /// The connection ended.
    #[error("the connection ended before the preface was whole")]
    Io(#[source] std::io::Error),
}

impl Error {
    /// What to tell the peer.
    pub fn refusal(&self) -> Refusal {
        let code = match self {
            Self::Magic | Self::Malformed(_) | Self::Io(_) => code::BAD_PREFACE,
            Self::Version { .. } => code::VERSION,
            Self::TooLarge { .. } => code::PREFACE_TOO_LARGE,
            Self::Timeout(_) => code::PREFACE_TIMEOUT,
        };
        Refusal::new(code, self)
    }
}

/// Writes one message.
pub(crate) async fn write<W, T>(io: &mut W, message: &T) -> std::io::Result<()>
where
    W: AsyncWrite + Unpin,
    T: Serialize + Sync,
{
    let body = serde_json::to_vec(message)?;
    let length = u16::try_from(body.len()).ok().filter(|n| usize::from(*n) <= MAX_BODY);
    let length = length.ok_or_else(|| std::io::Error::other("the preface is too long"))?;
    let mut bytes = Vec::with_capacity(8 + body.len());
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&VERSION.to_be_bytes());
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes.extend_from_slice(&body);
    io.write_all(&bytes).await?;
    io.flush().await
}

/// Reads one message within `deadline`, and not a byte beyond it.
pub(crate) async fn read<R, T>(io: &mut R, deadline: Duration) -> Result<T, Error>
where
    R: AsyncRead + Unpin,
    T: DeserializeOwned,
{
    match tokio::time::timeout(deadline, read_message(io)).await {
        Ok(message) => message,
        Err(_) => Err(Error::Timeout(deadline)),
    }
}

async fn read_message<R, T>(io: &mut R) -> Result<T, Error>
where
    R: AsyncRead + Unpin,
    T: DeserializeOwned,
{
    let mut header = [0; 8];
    // Four bytes first: whoever speaks another protocol may never send eight.
    io.read_exact(&mut header[..4]).await.map_err(Error::Io)?;
    if header[..4] != *MAGIC {
        return Err(Error::Magic);
    }
    io.read_exact(&mut header[4..]).await.map_err(Error::Io)?;
    let version = u16::from_be_bytes([header[4], header[5]]);
    if version != VERSION {
        return Err(Error::Version { found: version });
    }
    let length = usize::from(u16::from_be_bytes([header[6], header[7]]));
    if length > MAX_BODY {
        return Err(Error::TooLarge { length });
    }
    let mut body = vec![0; length];
    io.read_exact(&mut body).await.map_err(Error::Io)?;
    serde_json::from_slice(&body).map_err(|e| Error::Malformed(e.to_string()))
}
