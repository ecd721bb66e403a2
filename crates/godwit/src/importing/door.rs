//! The way into a pod that takes or gives a disk.
//!
//! Over TLS with a certificate of its own, which is told through the pod's log to who may read that;
//! each request carries the token of a Secret that the pod was given.

use anyhow::{Context, Result, ensure};
use api::import::{ADDRESS, PASSWORD};
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use hyper::body::{Body, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use std::convert::Infallible;
use std::error::Error;
use std::io::Write;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

/// For a handshake, for a request's head, and between two pieces of a body.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// What is told again, for a log that was cut off.
const OFTEN: Duration = Duration::from_secs(1);

/// Where it listens.
pub struct Door {
    listener: TcpListener,
    acceptor: TlsAcceptor,
    token: String,
    /// Its address, without a path.
    pub url: String,
    /// The certificate to believe there, in PEM.
    pub certificate: String,
}

/// What is behind it.
pub trait Room: Send + Sync + 'static {
    /// What is answered with.
    type Body: Body<Data = Bytes, Error: Into<Box<dyn Error + Send + Sync>>> + Send + 'static;

    /// Answers who has the token.
    fn answer(
        &self,
        request: Request<Incoming>,
    ) -> impl Future<Output = Response<Self::Body>> + Send;

    /// An answer that says only this.
    fn say(code: StatusCode, text: &'static str) -> Response<Self::Body>;
}

impl Door {
    /// Opens it where the environment says.
    ///
    /// # Errors
    /// When it cannot listen.
    pub async fn open() -> Result<Self> {
        let text = |name| std::env::var(name).with_context(|| format!("{name} is not set"));
        let token = text(PASSWORD)?;
        ensure!(!token.is_empty(), "{PASSWORD} is empty: the Secret has no token");
        let address: IpAddr = text(ADDRESS)?.parse().context("the pod's address is none")?;
        let listener = TcpListener::bind((address, 0)).await.context("cannot listen")?;
        let (acceptor, certificate) = identity(address)?;
        let url = format!("https://{}", listener.local_addr()?);
        Ok(Self { listener, acceptor, token, url, certificate })
    }

    /// Tells of itself, and lets in, until it is dropped.
    pub async fn serve(self, told: &str, room: Arc<impl Room>) {
        let token: Arc<str> = self.token.into();
        let mut pulse = tokio::time::interval(OFTEN);
        loop {
            tokio::select! {
                _ = pulse.tick() => {
                    // Nobody can come who does not hear of it: the next time, then.
                    let _ = writeln!(std::io::stdout(), "{told}");
                }
                accepted = self.listener.accept() => if let Ok((stream, _)) = accepted {
                    let (room, token) = (Arc::clone(&room), Arc::clone(&token));
                    tokio::spawn(let_in(room, token, self.acceptor.clone(), stream));
                },
            }
        }
    }
}

fn identity(address: IpAddr) -> Result<(TlsAcceptor, String)> {
    let key = rcgen::KeyPair::generate()?;
    let certificate = rcgen::CertificateParams::new([address.to_string()])?.self_signed(&key)?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let private = rustls::pki_types::PrivateKeyDer::try_from(key.serialize_der())
        .map_err(|error| anyhow::anyhow!("the key of the pod's certificate: {error}"))?;
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], private)?;
    Ok((TlsAcceptor::from(Arc::new(config)), certificate.pem()))
}

async fn let_in<R: Room>(room: Arc<R>, token: Arc<str>, acceptor: TlsAcceptor, stream: TcpStream) {
    let Ok(Ok(stream)) = tokio::time::timeout(PATIENCE, acceptor.accept(stream)).await else {
        return;
    };
    let service = service_fn(move |request| {
        let (room, token) = (Arc::clone(&room), Arc::clone(&token));
        async move {
            Ok::<_, Infallible>(match has(&request, &token) {
                true => room.answer(request).await,
                false => {
                    R::say(StatusCode::UNAUTHORIZED, "the token is not that of the DataVolume")
                }
            })
        }
    });
    let mut server = hyper::server::conn::http1::Builder::new();
    server.timer(TokioTimer::new()).header_read_timeout(PATIENCE);
    if let Err(error) = server.serve_connection(TokioIo::new(stream), service).await {
        tracing::debug!(%error, "a connection ended");
    }
}

/// Whether a request has the token.
fn has(request: &Request<Incoming>, token: &str) -> bool {
    let given = request.headers().get("Authorization").and_then(|value| value.to_str().ok());
    let given = given.and_then(|value| value.strip_prefix("Bearer ")).unwrap_or_default();
    // Equal in length and in every byte, whichever is the first that differs.
    given.len() == token.len()
        && given.bytes().zip(token.bytes()).fold(0, |all, (a, b)| all | (a ^ b)) == 0
}
