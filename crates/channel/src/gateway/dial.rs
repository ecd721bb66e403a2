//! Connections to other hosts' gateways.

use std::io;
use std::net::SocketAddr;

use serde_json::Value;
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;
use tokio_rustls::client::TlsStream;

use super::{Shared, TLS_BUFFER, Wire, wired};
use crate::identity::SpiffeId;
use crate::preface::{self, Opening, Preface, Refusal, Reply, code};
use crate::tcp;
use crate::tokens::Token;
use crate::wire::Failure;
use crate::{tls, wire, with_source};

pub(super) type Tls = TlsStream<Wire>;

/// Opens a stream at the gateway `expect`; returns it with the successor of its token.
pub(super) async fn stream(
    shared: &Shared,
    address: &str,
    expect: &SpiffeId,
    preface: Preface,
) -> Result<(Tls, Token), Failure> {
    let migration = preface.migration.clone();
    let mut tls = connect(shared, address, expect).await?;
    // A write that fails was refused: the reason is there to be read.
    let _ = preface::write(&mut tls, &Opening::Stream(preface)).await;
    match reply(shared, &mut tls, address).await? {
        Reply::Accepted { successor } => {
            tls.get_ref().0.get_ref().connection.relays(&migration);
            Ok((tls, successor))
        }
        Reply::Refused(refusal) => Err(Failure::Refused(refusal)),
        Reply::Ready => Err(nonsense()),
    }
}

/// Asks the handler behind the gateway `expect`.
pub(super) async fn ask(
    shared: &Shared,
    address: &str,
    expect: &SpiffeId,
    request: &Value,
) -> Result<Value, Failure> {
    let mut tls = connect(shared, address, expect).await?;
    let asked = async {
        preface::write(&mut tls, &Opening::Owner).await?;
        wire::write(&mut tls, request).await
    };
    // As above.
    let _ = timeout(shared.limits.handshake, asked).await;
    match reply(shared, &mut tls, address).await? {
        Reply::Ready => match timeout(shared.limits.answer, wire::read(&mut tls)).await {
            Ok(answer) => answer.map_err(|e| unreachable(address, &e)),
            Err(_) => Err(unreachable(address, &"its answer did not come in time")),
        },
        Reply::Refused(refusal) => Err(Failure::Refused(refusal)),
        Reply::Accepted { .. } => Err(nonsense()),
    }
}

pub(super) async fn reply(shared: &Shared, tls: &mut Tls, address: &str) -> Result<Reply, Failure> {
    // The other gateway waits for its launcher as long as this one would.
    let patience = shared.limits.answer + shared.limits.handshake;
    preface::read(tls, patience).await.map_err(|e| match e {
        preface::Error::Io(e) => failure(address, &tls::Error::from_io(e)),
        e => unreachable(address, &e),
    })
}

pub(super) async fn connect(
    shared: &Shared,
    address: &str,
    expect: &SpiffeId,
) -> Result<Tls, Failure> {
    let patience = shared.limits.handshake;
    let tcp = match timeout(patience, connect_tcp(shared, address)).await {
        Ok(tcp) => tcp.map_err(|e| unreachable(address, &e))?,
        Err(_) => return Err(unreachable(address, &"no connection in time")),
    };
    tcp::tune(&tcp, shared.limits.dead_peer).map_err(|e| unreachable(address, &e))?;
    let io = wired(tcp, shared.traffic.connection());
    let client = shared.client();
    let mut tls = match timeout(patience, client.connect(expect, io)).await {
        Ok(tls) => tls.map_err(|e| failure(address, &e))?,
        Err(_) => return Err(unreachable(address, &"no TLS handshake in time")),
    };
    tls.get_mut().1.set_buffer_limit(Some(TLS_BUFFER));
    Ok(tls)
}

async fn connect_tcp(shared: &Shared, address: &str) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "its name has no address");
    for to in tokio::net::lookup_host(address).await? {
        match connect_one(shared, to).await {
            Ok(tcp) => return Ok(tcp),
            Err(e) => last = e,
        }
    }
    Err(last)
}

async fn connect_one(shared: &Shared, to: SocketAddr) -> io::Result<TcpStream> {
    let socket = if to.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    let own = shared.listen();
    if to.is_ipv4() == own.is_ipv4() {
        // From the migration address, so that the stream takes the migration network.
        socket.bind(SocketAddr::new(own.ip(), 0))?;
    }
    socket.connect(to).await
}

fn failure(address: &str, error: &tls::Error) -> Failure {
    match error {
        tls::Error::Peer(_) | tls::Error::RefusedByPeer(_) | tls::Error::Credentials(_) => {
            Failure::Identity(with_source(error))
        }
        tls::Error::Handshake(e) => unreachable(address, e),
    }
}

fn unreachable(address: &str, text: &dyn std::fmt::Display) -> Failure {
    Failure::Unreachable(format!("{address}: {text}"))
}

pub(super) fn nonsense() -> Failure {
    let text = "the other gateway answered what was not asked; update the older host";
    Failure::Refused(Refusal::new(code::BAD_PREFACE, text))
}
