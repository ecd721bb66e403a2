//! The channel alone: a resumable stream through two gateways, beside plain TCP.

use super::tunnel::{admit, dial, hall};
use crate::world::World;
use anyhow::{Context, Result};
use channel::client::GatewayClient;
use channel::preface::Stream;
use channel::resumable::{Config, LinkError, Links, Role, run};
use channel::tokens::Tokens;
use launcher::migration::ticket::Here;
use std::path::Path;
use std::sync::Mutex;
use std::time::Instant;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};

const BYTES: u64 = 2 << 30;
const PIECE: usize = 256 << 10;

/// Bytes per second of plain TCP on the loopback, in one connection.
///
/// # Errors
/// Those of the network.
pub fn plain_tcp(world: &World) -> Result<f64> {
    world.run(async {
        let listener = TcpListener::bind("127.0.0.3:0").await?;
        let (near, far) =
            tokio::join!(TcpStream::connect(listener.local_addr()?), listener.accept());
        rate(near?, far?.0).await
    })
}

/// Bytes per second of one resumable stream through two gateways.
///
/// # Errors
/// When a gateway does not carry it.
pub fn channel(program: &Path) -> Result<f64> {
    let world = World::new(program)?;
    let (a, b) = (world.host("a", 2)?, world.host("b", 3)?);
    world.run(async {
        let mut tokens = Tokens::new();
        let token = tokens.issue(Stream::Memory(0));
        let (tokens, hall) = (Mutex::new(tokens), hall(&b)?);
        let (gateway, peer) = (GatewayClient::new(&a.dir), Here::of(&b.dir)?.peer);
        let admitted = async { admit(hall.accept().await?.0, &tokens).await };
        let dialled = dial(&gateway, &peer, Stream::Memory(0), token);
        let (near, far) = tokio::join!(dialled, admitted);
        let (sends, near_end) = UnixStream::pair()?;
        let (receives, far_end) = UnixStream::pair()?;
        let near = run(near_end, One(Some(near?.0)), Config::new(Role::Dialing));
        let far = run(far_end, One(Some(far?.1)), Config::new(Role::Accepting));
        let (near, far) = (tokio::spawn(near), tokio::spawn(far));
        let rate = rate(sends, receives).await;
        near.abort();
        far.abort();
        rate
    })
}

/// The one link that a stream gets here.
struct One(Option<UnixStream>);

impl Links for One {
    type Link = UnixStream;

    async fn next(&mut self) -> Result<UnixStream, LinkError> {
        match self.0.take() {
            Some(link) => Ok(link),
            None => std::future::pending().await,
        }
    }
}

async fn rate(mut from: impl AsyncWrite + Unpin, mut to: impl AsyncRead + Unpin) -> Result<f64> {
    let begun = Instant::now();
    let piece = vec![0x5a; PIECE];
    let sent = async {
        for _ in 0..BYTES / PIECE as u64 {
            from.write_all(&piece).await?;
        }
        from.flush().await
    };
    let received = async {
        let (mut buffer, mut left) = (vec![0; PIECE], BYTES);
        while left > 0 {
            match to.read(&mut buffer).await.context("the far end")? {
                0 => anyhow::bail!("the stream ended with {left} bytes to come"),
                n => left -= n as u64,
            }
        }
        Ok(())
    };
    let (sent, received) = tokio::join!(sent, received);
    sent?;
    received?;
    Ok(BYTES as f64 / begun.elapsed().as_secs_f64())
}
