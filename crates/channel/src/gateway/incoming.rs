//! Connections from other hosts' gateways.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::net::{TcpStream, UnixStream};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::timeout;
use tokio_rustls::server::TlsStream;

use super::{Shared, TLS_BUFFER, Wire, probe, wired};
use crate::identity::SpiffeId;
use crate::preface::{self, Delivery, Opening, Preface, Refusal, Reply, code};
use crate::socket;
use crate::tcp;
use crate::{copy, wire, with_source};

type Tls = TlsStream<Wire>;

/// Serves one connection to its end. `handshake` is held until it has said what it is.
pub(super) async fn serve(
    shared: Arc<Shared>,
    tcp: TcpStream,
    from: SocketAddr,
    handshake: OwnedSemaphorePermit,
) {
    let connection = shared.traffic.connection();
    let refused = |reason: &dyn std::fmt::Display| {
        shared.traffic.count_refused();
        tracing::warn!(%from, "connection refused: {reason}");
    };
    if let Err(error) = tcp::tune(&tcp, shared.limits.dead_peer) {
        return refused(&error);
    }
    let server = shared.server();
    let io = wired(tcp, connection.clone());
    let (mut tls, peer) = match timeout(shared.limits.handshake, server.accept(io)).await {
        Ok(Ok(accepted)) => accepted,
        Ok(Err(error)) => return refused(&with_source(&error)),
        Err(_) => return refused(&"the TLS handshake took too long"),
    };
    tls.get_mut().1.set_buffer_limit(Some(TLS_BUFFER));
    let opening = preface::read(&mut tls, shared.limits.handshake).await;
    let admitted = opening.map_err(|e| e.refusal()).and_then(|opening| {
        let permit = shared.incoming.clone().try_acquire_owned();
        let busy = |_| Refusal::new(code::BUSY, "this host serves as many streams as it may");
        Ok((opening, permit.map_err(busy)?))
    });
    drop(handshake);
    let served = match admitted {
        Ok((Opening::Owner, _permit)) => answer(&shared, &mut tls, &peer).await,
        Ok((Opening::Probe, _permit)) => probe::serve(&shared, &mut tls).await,
        Ok((Opening::Stream(preface), _permit)) => match launcher(&shared, &peer, &preface).await {
            Ok((unix, reply)) => {
                connection.relays(&preface.migration);
                tracing::debug!(%peer, vm = %preface.vm, stream = %preface.stream, "stream relayed");
                return relay(tls, unix, reply).await;
            }
            Err(refusal) => Err(refusal),
        },
        Err(refusal) => Err(refusal),
    };
    if let Err(refusal) = served {
        refused(&format_args!("{peer}: {refusal}"));
        // The peer may be gone already; the refusal is in the log.
        let _ =
            timeout(shared.limits.handshake, preface::write(&mut tls, &Reply::Refused(refusal)))
                .await;
        copy::farewell(&mut tls).await;
    }
}

/// Hands the preface to the launcher it names; returns its socket once it has accepted.
async fn launcher(
    shared: &Shared,
    peer: &SpiffeId,
    preface: &Preface,
) -> Result<(UnixStream, Reply), Refusal> {
    preface.check()?;
    let vm = &preface.vm;
    let name = format!("vms/{vm}/streams.sock");
    let folder = shared.service.folder(&vm.to_string(), &preface.migration);
    let folder = folder.as_ref().unwrap_or(&shared.host_dir);
    let mut unix = socket::connect_beneath(folder, &name).await.map_err(|e| match e {
        socket::Error::Absent { .. } => {
            Refusal::new(code::NO_LAUNCHER, format!("no launcher of VM {vm} listens on this host"))
        }
        e => Refusal::new(code::UNSAFE_SOCKET, with_source(&e)),
    })?;
    let delivery = Delivery { preface: preface.clone(), peer: peer.clone() };
    let silent = |e: &dyn std::fmt::Display| {
        Refusal::new(code::LAUNCHER_SILENT, format!("the launcher of VM {vm} gave no answer: {e}"))
    };
    preface::write(&mut unix, &delivery).await.map_err(|e| silent(&e))?;
    match preface::read(&mut unix, shared.limits.answer).await {
        Ok(Reply::Refused(refusal)) => Err(refusal),
        Ok(Reply::Ready) => Err(silent(&"it answered what was not asked")),
        Ok(accepted) => Ok((unix, accepted)),
        Err(e) => Err(silent(&e)),
    }
}

async fn relay(mut tls: Tls, unix: UnixStream, reply: Reply) {
    let ended = match preface::write(&mut tls, &reply).await {
        Ok(()) => copy::both_ways(tls, unix).await,
        Err(e) => Err(e),
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "relayed stream was cut");
    }
}

/// One request and one answer.
async fn answer(shared: &Shared, tls: &mut Tls, peer: &SpiffeId) -> Result<(), Refusal> {
    let failed = |e: &dyn std::fmt::Display| {
        Refusal::new(code::BAD_REQUEST, format!("the request cannot be answered: {e}"))
    };
    let request = timeout(shared.limits.handshake, wire::read(tls))
        .await
        .map_err(|_| failed(&"it did not come in time"))?
        .map_err(|e| failed(&e))?;
    let answer = timeout(shared.limits.answer, shared.service.peer(peer, request))
        .await
        .map_err(|_| failed(&"the handler took too long"))?;
    let replied = async {
        preface::write(tls, &Reply::Ready).await?;
        wire::write(tls, &answer).await?;
        std::io::Result::Ok(())
    };
    match timeout(shared.limits.answer, replied).await {
        Ok(Ok(())) => copy::farewell(tls).await,
        // Nobody is there to be told.
        Ok(Err(error)) => tracing::debug!(%peer, %error, "an answer was not delivered"),
        Err(_) => tracing::debug!(%peer, "an answer was not taken in time"),
    }
    Ok(())
}
