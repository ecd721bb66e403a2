//! The server's socket: TLS always, one task for each connection.

use crate::api::Api;
use crate::auth::User;
use http::Request;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use rustls::ServerConfig;
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

/// Serves until `ending` turns true, and then until no request is under way.
pub async fn serve(
    api: Api,
    listener: TcpListener,
    tls: Arc<ServerConfig>,
    mut ending: watch::Receiver<bool>,
) {
    let acceptor = TlsAcceptor::from(tls);
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
                let connection = connection(api.clone(), acceptor.clone(), stream, ending.clone());
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

async fn connection(
    api: Api,
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
    let user = certificate.and_then(|c| User::of_certificate(c)).map(Arc::new);
    let service = service_fn(move |request: Request<Incoming>| {
        let (api, user) = (api.clone(), user.clone());
        async move { Ok::<_, Infallible>(api.answer(request, user).await) }
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
