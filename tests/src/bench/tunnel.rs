//! QEMU's own streams through Godwit's gateways: encrypted, and relayed as often
//! as Godwit's are.
//!
//! ```text
//! QEMU -- near socket -- gateway ===== TLS ===== gateway -- far socket -- QEMU
//! ```

use crate::world::{Host, World};
use anyhow::{Context, Result, ensure};
use channel::client::{self, GatewayClient, Incoming};
use channel::preface::{Preface, Stream};
use channel::tokens::{Token, Tokens};
use launcher::migration::ticket::{Here, Peer};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;

const VM: &str = "qemu";
const MIGRATION: &str = "bench";
const ANSWER: Duration = Duration::from_secs(15);
/// Bytes that a relay copies at a time.
const PIECE: usize = 256 << 10;

/// Ends when dropped.
#[derive(Debug)]
pub struct Tunnel {
    _tasks: JoinSet<()>,
}

/// One stream through a tunnel.
#[derive(Debug)]
pub struct Way {
    /// Which.
    pub stream: Stream,
    /// The socket at the source, which the tunnel makes.
    pub near: PathBuf,
    /// The socket at the target, which is there when the first byte comes.
    pub far: PathBuf,
}

impl Tunnel {
    /// Opens ways from one host to another.
    ///
    /// # Errors
    /// When a socket cannot be made.
    pub fn open(world: &World, from: &Host, to: &Host, ways: Vec<Way>) -> Result<Self> {
        world.run(async {
            let mut tokens = Tokens::new();
            let mut tasks = JoinSet::new();
            let mut far = Vec::new();
            for Way { stream, near, far: socket } in ways {
                let token = tokens.issue(stream);
                let listener = UnixListener::bind(&near).context("the near socket")?;
                let (gateway, peer) = (GatewayClient::new(&from.dir), Here::of(&to.dir)?.peer);
                tasks.spawn(near_end(listener, gateway, peer, stream, token));
                far.push((stream, socket));
            }
            tasks.spawn(far_end(hall(to)?, Arc::new(Mutex::new(tokens)), far));
            Ok(Self { _tasks: tasks })
        })
    }
}

async fn near_end(
    listener: UnixListener,
    gateway: GatewayClient,
    peer: Peer,
    stream: Stream,
    mut token: Token,
) {
    while let Ok((mut qemu, _)) = listener.accept().await {
        match dial(&gateway, &peer, stream, token).await {
            Ok((mut link, successor)) => {
                token = successor;
                relay(&mut qemu, &mut link).await;
            }
            Err(error) => return eprintln!("tunnel: {stream}: {error:#}"),
        }
    }
}

/// Dials a stream of the bench's.
///
/// # Errors
/// When a gateway refuses it.
pub async fn dial(
    gateway: &GatewayClient,
    peer: &Peer,
    stream: Stream,
    token: Token,
) -> Result<(UnixStream, Token)> {
    let vm = VM.to_owned().try_into().map_err(anyhow::Error::msg)?;
    let preface = Preface { vm, migration: MIGRATION.into(), stream, token };
    Ok(gateway.dial(&peer.address, &peer.id, &preface).await?)
}

async fn far_end(listener: UnixListener, tokens: Arc<Mutex<Tokens>>, ways: Vec<(Stream, PathBuf)>) {
    let mut streams = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let (tokens, ways) = (tokens.clone(), ways.clone());
        streams.spawn(async move {
            if let Err(error) = lead(stream, &tokens, &ways).await {
                eprintln!("tunnel: {error:#}");
            }
        });
    }
}

async fn lead(
    stream: UnixStream,
    tokens: &Mutex<Tokens>,
    ways: &[(Stream, PathBuf)],
) -> Result<()> {
    let (stream, mut link) = admit(stream, tokens).await?;
    let (_, far) = ways.iter().find(|(known, _)| *known == stream).context("no such way")?;
    let mut qemu = UnixStream::connect(far).await.context("QEMU at the target")?;
    relay(&mut qemu, &mut link).await;
    Ok(())
}

/// Admits a stream that a gateway hands over.
///
/// # Errors
/// When it has no right to come.
pub async fn admit(stream: UnixStream, tokens: &Mutex<Tokens>) -> Result<(Stream, UnixStream)> {
    let lock = || tokens.lock().unwrap_or_else(PoisonError::into_inner);
    let incoming = Incoming::read(stream, ANSWER).await?;
    let Preface { stream, token, .. } = incoming.preface().clone();
    let successor = lock().offer(stream, &token).map_err(|r| anyhow::anyhow!("{r}"))?;
    let link = incoming.accept(&successor, ANSWER).await?;
    ensure!(lock().confirm(stream, &successor), "a later connection has taken its place");
    Ok((stream, link))
}

/// Where a gateway hands the bench's streams over.
///
/// # Errors
/// When the socket cannot be made.
pub fn hall(host: &Host) -> Result<UnixListener> {
    let folder: &Path = &host.folder(VM);
    std::fs::create_dir_all(folder)?;
    Ok(client::listen(folder)?)
}

async fn relay(near: &mut UnixStream, far: &mut UnixStream) {
    // A stream that breaks shows at both ends.
    let _ = tokio::io::copy_bidirectional_with_sizes(near, far, PIECE, PIECE).await;
}
