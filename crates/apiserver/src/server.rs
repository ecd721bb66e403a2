//! The server's socket: TLS always, one task for each connection.

use crate::api::Api;
use crate::auth::User;
use crate::body::Answer;
use http::Request;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use rustls::ServerConfig;
use rustls::pki_types::CertificateDer;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

/// A client has so long for its handshake and for each request's head.
const PATIENCE: Duration = Duration::from_secs(20);
/// Connections at once: more wait.
const CONNECTIONS: usize = 4096;
/// Requests that are under way when the server ends get this long.
const FAREWELL: Duration = Duration::from_secs(5);
/// A listener that cannot accept, for want of descriptors, tries again after this.
const RELIEF: Duration = Duration::from_millis(100);

/// What answers requests.
pub trait Service: Clone + Send + Sync + 'static {
    /// Who is at the other end of a connection.
    type Peer: Clone + Send + Sync + 'static;

    /// Who that is, by a certificate that TLS has verified.
    fn peer(&self, certificate: &CertificateDer<'_>) -> Option<Self::Peer>;

    /// Answers a request.
    fn answer(
        &self,
        request: Request<Incoming>,
        peer: Option<Self::Peer>,
    ) -> impl Future<Output = Answer> + Send;
}

impl Service for Api {
    type Peer = Arc<User>;

    fn peer(&self, certificate: &CertificateDer<'_>) -> Option<Arc<User>> {
        User::of_certificate(certificate).map(Arc::new)
    }

    fn answer(
        &self,
        request: Request<Incoming>,
        peer: Option<Arc<User>>,
    ) -> impl Future<Output = Answer> + Send {
        self.answer(request, peer)
    }
}

/// Serves until `ending` turns true, and then until no request is under way. Each connection is
/// made with the `tls` of its time.
pub async fn serve<S: Service>(
    service: S,
    listener: TcpListener,
    tls: watch::Receiver<Arc<ServerConfig>>,
    mut ending: watch::Receiver<bool>,
) {
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        // It is never closed.
        let Ok(place) = room.clone().acquire_owned().await else { return };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = ending.wait_for(|ends| *ends) => break,
        };
        match accepted {
            Ok((stream, from)) => {
                let acceptor = TlsAcceptor::from(tls.borrow().clone());
                let connection = connection(service.clone(), acceptor, stream, ending.clone());
                connections.spawn(async move {
                    if let Err(error) = connection.await {
                        tracing::debug!(%from, error, "a connection ended");
                    }
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "a connection cannot be accepted");
                tokio::time::sleep(RELIEF).await;
            }
        }
    }
    let all = async { while connections.join_next().await.is_some() {} };
    // Those that do not end by then are cut off.
    let _ = tokio::time::timeout(FAREWELL, all).await;
    connections.shutdown().await;
}

async fn connection<S: Service>(
    service: S,
    acceptor: TlsAcceptor,
    stream: TcpStream,
    mut ending: watch::Receiver<bool>,
) -> Result<(), String> {
    // Watches are many small pieces.
    stream.set_nodelay(true).map_err(|e| e.to_string())?;
    let stream = tokio::time::timeout(PATIENCE, acceptor.accept(stream))
        .await
        .map_err(|_| "no handshake in time".to_owned())?
        .map_err(|e| e.to_string())?;
    let certificate = stream.get_ref().1.peer_certificates().and_then(|all| all.first());
    let peer = certificate.and_then(|c| service.peer(c));
    let service = service_fn(move |request: Request<Incoming>| {
        let (service, peer) = (service.clone(), peer.clone());
        async move { Ok::<_, Infallible>(service.answer(request, peer).await) }
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(PATIENCE);
    builder.http2().timer(TokioTimer::new()).max_concurrent_streams(250);
    let serving = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
    let mut serving = std::pin::pin!(serving);
    tokio::select! {
        ended = serving.as_mut() => return ended.map_err(|e| e.to_string()),
        _ = ending.wait_for(|ends| *ends) => serving.as_mut().graceful_shutdown(),
    }
    serving.await.map_err(|e| e.to_string())
}
