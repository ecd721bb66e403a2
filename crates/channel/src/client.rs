//! The launchers' side: how a source opens a stream, and how a target receives one.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;

use crate::gateway::Counters;
use crate::identity::SpiffeId;
use crate::preface::{self, CONFIRM, Delivery, Preface, Refusal, Reply};
use crate::resumable::{LinkError, Links};
use crate::tokens::Token;
use crate::wire::{Failure, GATEWAY_SOCKET, Request, Response};
use crate::{socket, wire, with_source};

/// A gateway answers within its own deadlines, which are shorter.
const PATIENCE: Duration = Duration::from_secs(60);

/// Why a stream or an answer cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The target's gateway or launcher said no.
    #[error("refused: {0}")]
    Refused(Refusal),
    /// No connection, or it broke before it stood; worth another try.
    #[error("the other gateway cannot be reached: {0}")]
    Unreachable(String),
    /// The other gateway is not who it should be, or does not believe this one.
    #[error("{0}")]
    PeerIdentity(String),
    /// This host's gateway does not run, or ended meanwhile; worth another try.
    #[error("this host's gateway does not answer; is the handler running?")]
    GatewayDown(#[source] std::io::Error),
    /// This host's gateway answered something else.
    #[error("this host's gateway answered what was not asked; restart it with this version")]
    Protocol,
}

impl DialError {
    /// Whether the same call may succeed later.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unreachable(_) | Self::GatewayDown(_) => true,
            Self::Refused(refusal) => [
                preface::code::BUSY,
                preface::code::LAUNCHER_SILENT,
                preface::code::PREFACE_TIMEOUT,
            ]
            .contains(&refusal.code.as_str()),
            Self::PeerIdentity(_) | Self::Protocol => false,
        }
    }
}

impl From<Failure> for DialError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Refused(refusal) => Self::Refused(refusal),
            Failure::Unreachable(text) => Self::Unreachable(text),
            Failure::Identity(text) => Self::PeerIdentity(text),
        }
    }
}

/// Reaches the gateway of this host.
#[derive(Debug, Clone)]
pub struct GatewayClient {
    host_dir: PathBuf,
}

impl GatewayClient {
    /// For the gateway whose socket is in `host_dir`. Connects at each call.
    pub fn new(host_dir: impl Into<PathBuf>) -> Self {
        Self { host_dir: host_dir.into() }
    }

    /// Opens a stream at the gateway `expect`, which listens at `address` (`host:port`).
    /// Returns it with the token of its next connection, which replaces the preface's.
    pub async fn dial(
        &self,
        address: &str,
        expect: &SpiffeId,
        preface: &Preface,
    ) -> Result<(UnixStream, Token), DialError> {
        let request = Request::Dial {
            address: address.into(),
            expect: expect.clone(),
            preface: preface.clone(),
        };
        match self.call(&request).await? {
            (mut stream, Response::Accepted { successor }) => {
                stream.write_all(&[CONFIRM]).await.map_err(DialError::GatewayDown)?;
                Ok((stream, successor))
            }
            _ => Err(DialError::Protocol),
        }
    }

    /// Asks the handler of this host.
    pub async fn local(&self, request: Value) -> Result<Value, DialError> {
        self.answer(&Request::Local(request)).await
    }

    /// Asks the handler behind the gateway `expect`, which listens at `address`.
    pub async fn ask(
        &self,
        address: &str,
        expect: &SpiffeId,
        request: Value,
    ) -> Result<Value, DialError> {
        let (address, expect) = (address.into(), expect.clone());
        self.answer(&Request::Ask { address, expect, request }).await
    }

    /// What the gateway has done since it started.
    pub async fn counters(&self) -> Result<Counters, DialError> {
        match self.call(&Request::Counters).await? {
            (_, Response::Counters(counters)) => Ok(counters),
            _ => Err(DialError::Protocol),
        }
    }

    async fn answer(&self, request: &Request) -> Result<Value, DialError> {
        match self.call(request).await? {
            (_, Response::Answer(value)) => Ok(value),
            _ => Err(DialError::Protocol),
        }
    }

    async fn call(&self, request: &Request) -> Result<(UnixStream, Response), DialError> {
        let down = |e: socket::Error| DialError::GatewayDown(std::io::Error::other(e));
        let mut stream =
            socket::connect_beneath(&self.host_dir, GATEWAY_SOCKET).await.map_err(down)?;
        let talk = async {
            wire::write(&mut stream, request).await?;
            wire::read(&mut stream).await
        };
        let response = match timeout(PATIENCE, talk).await {
            Ok(response) => response.map_err(DialError::GatewayDown)?,
            Err(e) => return Err(DialError::GatewayDown(e.into())),
        };
        match response {
            Response::Failed(failure) => Err(failure.into()),
            response => Ok((stream, response)),
        }
    }
}

/// Links for [`crate::resumable::run`]: dials one stream again and again, each time with
/// the token that the last connection was handed.
#[derive(Debug)]
pub struct Redial {
    client: GatewayClient,
    address: String,
    expect: SpiffeId,
    preface: Preface,
}

impl Redial {
    /// For the stream that `preface` names, at the gateway `expect`.
    pub fn new(client: GatewayClient, address: &str, expect: SpiffeId, preface: Preface) -> Self {
        Self { client, address: address.into(), expect, preface }
    }
}

impl Links for Redial {
    type Link = UnixStream;

    async fn next(&mut self) -> Result<UnixStream, LinkError> {
        match self.client.dial(&self.address, &self.expect, &self.preface).await {
            Ok((stream, successor)) => {
                self.preface.token = successor;
                Ok(stream)
            }
            Err(e) if e.is_transient() => Err(LinkError::Transient(with_source(&e))),
            Err(e) => Err(LinkError::Fatal(with_source(&e))),
        }
    }
}

/// The name of a launcher's socket in its VM's folder.
pub const STREAMS_SOCKET: &str = "streams.sock";

/// Makes the socket on which a launcher receives its streams, in `vms/<vm>`.
pub fn listen(vm_dir: &Path) -> Result<tokio::net::UnixListener, socket::Error> {
    socket::bind_beneath(vm_dir, STREAMS_SOCKET)
}

/// A stream that waits to be accepted or refused.
#[derive(Debug)]
pub struct Incoming {
    preface: Preface,
    peer: SpiffeId,
    stream: UnixStream,
}

/// Why an incoming stream does not stand.
#[derive(Debug, thiserror::Error)]
pub enum IncomingError {
    /// A process of another user connected.
    #[error("a process of another user connected to this launcher's socket")]
    ForeignUser,
    /// The gateway's message cannot be read.
    #[error("the gateway's message cannot be read")]
    Preface(#[source] preface::Error),
    /// The stream was cut before the source had confirmed it.
    #[error("the stream was cut before the source confirmed it; the source will connect again")]
    Cut(#[source] std::io::Error),
    /// Something else than the confirmation came first.
    #[error("the source began with {0:#04x} instead of the confirmation; update the older host")]
    NotConfirmed(u8),
}

impl Incoming {
    /// Reads what a connection of `streams.sock` is to be; `deadline` bounds the wait.
    pub async fn read(mut stream: UnixStream, deadline: Duration) -> Result<Self, IncomingError> {
        if !socket::is_own(&stream).unwrap_or(false) {
            return Err(IncomingError::ForeignUser);
        }
        let Delivery { preface, peer } =
            preface::read(&mut stream, deadline).await.map_err(IncomingError::Preface)?;
        Ok(Self { preface, peer, stream })
    }

    /// What the source asks for. Its token is for [`crate::tokens::Tokens::offer`].
    pub fn preface(&self) -> &Preface {
        &self.preface
    }

    /// The source's gateway, as its certificate proved. Whether it is the one that this
    /// migration expects is for the launcher to judge.
    pub fn peer(&self) -> &SpiffeId {
        &self.peer
    }

    /// Accepts it and waits, up to `deadline`, until the source has `successor`. The
    /// stream stands only if [`crate::tokens::Tokens::confirm`] then says so.
    pub async fn accept(
        mut self,
        successor: &Token,
        deadline: Duration,
    ) -> Result<UnixStream, IncomingError> {
        let reply = Reply::Accepted { successor: successor.clone() };
        let confirmed = async {
            preface::write(&mut self.stream, &reply).await?;
            self.stream.read_u8().await
        };
        match timeout(deadline, confirmed).await {
            Ok(Ok(CONFIRM)) => Ok(self.stream),
            Ok(Ok(other)) => Err(IncomingError::NotConfirmed(other)),
            Ok(Err(e)) => Err(IncomingError::Cut(e)),
            Err(e) => Err(IncomingError::Cut(e.into())),
        }
    }

    /// Refuses it, with a reason for the source.
    pub async fn refuse(mut self, refusal: Refusal) {
        // The source may be gone; then there is nobody to tell.
        let _ = preface::write(&mut self.stream, &Reply::Refused(refusal)).await;
    }
}
