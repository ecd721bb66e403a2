//! Requests and answers: JSON with a length before it, between a launcher and its gateway,
//! between two gateways' owners, and between clusters.

use std::io;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::gateway::Counters;
use crate::identity::SpiffeId;
use crate::preface::{Preface, Refusal};
use crate::tokens::Token;

/// The gateway's socket in its host's folder.
pub(crate) const GATEWAY_SOCKET: &str = "gateway.sock";
/// The most bytes in one message.
const MAX_MESSAGE: usize = 1 << 20;

/// What a local process asks of its gateway; one on each connection.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Request {
    /// Open a stream; on [`Response::Accepted`] the connection becomes that stream.
    Dial { address: String, expect: SpiffeId, preface: Preface },
    /// Ask the handler of this host.
    Local(Value),
    /// Ask the handler behind another gateway.
    Ask { address: String, expect: SpiffeId, request: Value },
    /// What has passed.
    Counters,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Response {
    Accepted { successor: Token },
    Answer(Value),
    Counters(Counters),
    Failed(Failure),
}

/// Why a gateway could not do what a launcher asked.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Failure {
    Refused(Refusal),
    Unreachable(String),
    Identity(String),
}

/// Writes a message.
///
/// # Errors
/// Those of the stream; and when the message is too large.
pub async fn write<W, T>(io: &mut W, message: &T) -> io::Result<()>
where
    W: AsyncWrite + Unpin,
    T: Serialize + Sync,
{
    let body = serde_json::to_vec(message)?;
    if body.len() > MAX_MESSAGE {
        let text = format!("a message of {} bytes is over {MAX_MESSAGE}", body.len());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    let length = u32::try_from(body.len()).map_err(io::Error::other)?;
    let mut bytes = Vec::with_capacity(4 + body.len());
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes.extend_from_slice(&body);
    io.write_all(&bytes).await?;
    io.flush().await
}

/// Reads a message.
///
/// # Errors
/// Those of the stream; and when the message is too large, or makes no sense.
pub async fn read<R, T>(io: &mut R) -> io::Result<T>
where
    R: AsyncRead + Unpin,
    T: DeserializeOwned,
{
    let invalid = |text: String| io::Error::new(io::ErrorKind::InvalidData, text);
    let length = io.read_u32().await?;
    if length as usize > MAX_MESSAGE {
        return Err(invalid(format!("a message of {length} bytes is over {MAX_MESSAGE}")));
    }
    let mut body = Vec::new();
    // Memory grows with what arrives, not with what is announced.
    io.take(u64::from(length)).read_to_end(&mut body).await?;
    if body.len() < length as usize {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    serde_json::from_slice(&body).map_err(|e| invalid(format!("a malformed message: {e}")))
}
