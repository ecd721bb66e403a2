//! Connections of a move's streams: dialled at the source, awaited at the target.

use super::ticket::Peer;
use channel::client::GatewayClient;
use channel::preface::{Preface, Stream, VmName};
use channel::resumable::{self, LinkError};
use channel::tokens::Token;
use std::os::unix::net::UnixStream as StdStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

/// First wait between two tries, doubled up to [`SLOWEST`].
const FASTEST: Duration = Duration::from_millis(20);
const SLOWEST: Duration = Duration::from_secs(1);

/// Dials one stream of a move, again and again.
#[derive(Debug)]
pub struct Dialer {
    gateway: GatewayClient,
    peer: Peer,
    vm: VmName,
    migration: String,
    stream: Stream,
    /// For the next connection.
    token: Mutex<Token>,
    /// How long a lost link may take to come back.
    patience: Duration,
    /// Turns true when the move is over.
    over: watch::Receiver<bool>,
}

/// What all dialers of a move share.
#[derive(Debug, Clone)]
pub struct Dialing {
    /// This host's gateway.
    pub gateway: GatewayClient,
    /// The target's.
    pub peer: Peer,
    /// The VM.
    pub vm: VmName,
    /// The attempt.
    pub migration: String,
    /// How long a lost link may take to come back.
    pub patience: Duration,
    /// Turns true when the move is over.
    pub over: watch::Receiver<bool>,
}

impl Dialing {
    /// The dialer of a stream whose first token is `token`.
    pub fn stream(&self, stream: Stream, token: Token) -> Arc<Dialer> {
        let Self { gateway, peer, vm, migration, patience, over } = self.clone();
        let token = Mutex::new(token);
        Arc::new(Dialer { gateway, peer, vm, migration, stream, token, patience, over })
    }
}

impl Dialer {
    /// One try.
    async fn try_once(&self) -> Result<UnixStream, LinkError> {
        let preface = Preface {
            vm: self.vm.clone(),
            migration: self.migration.clone(),
            stream: self.stream,
            token: self.token.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        };
        let Peer { address, id } = &self.peer;
        match self.gateway.dial(address, id, &preface).await {
            Ok((stream, successor)) => {
                *self.token.lock().unwrap_or_else(PoisonError::into_inner) = successor;
                Ok(stream)
            }
            Err(error) if error.is_transient() => Err(LinkError::Transient(error.to_string())),
            Err(error) => Err(LinkError::Fatal(error.to_string())),
        }
    }

    /// A connection, or why there will be none any more.
    ///
    /// # Errors
    /// The last reason when the patience is over; a refusal at once.
    async fn dial(&self) -> Result<UnixStream, String> {
        let until = Instant::now() + self.patience;
        let mut over = self.over.clone();
        let mut pause = FASTEST;
        let trying = async {
            loop {
                match self.try_once().await {
                    Ok(stream) => return Ok(stream),
                    Err(LinkError::Fatal(why)) => return Err(why),
                    Err(LinkError::Transient(why)) if Instant::now() + pause > until => {
                        return Err(why);
                    }
                    Err(LinkError::Transient(why)) => {
                        tracing::debug!(stream = ?self.stream, %why, "dialling again");
                    }
                }
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(SLOWEST);
            }
        };
        tokio::select! {
            dialled = trying => dialled,
            _ = over.wait_for(|over| *over) => Err("the move is over".into()),
        }
    }
}

/// The mover's threads dial through the launcher's runtime.
pub struct DiskDialer {
    /// One dialer a stream.
    pub dialers: Vec<Arc<Dialer>>,
    /// The launcher's runtime.
    pub runtime: tokio::runtime::Handle,
}

impl mover::sender::Connect for DiskDialer {
    #[expect(
        clippy::disallowed_methods,
        reason = "a thread of the mover's own, not one of the runtime's"
    )]
    fn connect(&self, stream: u16) -> Result<StdStream, String> {
        let dialer = self.dialers.get(usize::from(stream)).ok_or("there is no such stream")?;
        let connected = self.runtime.block_on(dialer.dial())?;
        blocking(connected).map_err(|e| e.to_string())
    }
}

/// A stream for threads.
///
/// # Errors
/// Those of the system.
pub fn blocking(stream: UnixStream) -> std::io::Result<StdStream> {
    let stream = stream.into_std()?;
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// Links of one resumable stream, from either side.
#[derive(Debug)]
pub enum Links {
    /// The source dials.
    Dial(Arc<Dialer>),
    /// The target takes what its hall admits.
    Accept(mpsc::Receiver<UnixStream>),
}

impl Links {
    /// Which side this is.
    pub fn role(&self) -> resumable::Role {
        match self {
            Links::Dial(_) => resumable::Role::Dialing,
            Links::Accept(_) => resumable::Role::Accepting,
        }
    }
}

impl resumable::Links for Links {
    type Link = UnixStream;

    async fn next(&mut self) -> Result<UnixStream, LinkError> {
        match self {
            Links::Dial(dialer) => dialer.try_once().await,
            Links::Accept(admitted) => resumable::Links::next(admitted).await,
        }
    }
}
