//! The importer's way in for an image that a person uploads.
//!
//! ```text
//! HEAD /v1/upload                        -> Upload-Offset: bytes that are here
//! PUT  /v1/upload, Upload-Offset: N      -> 204 once all is here and safe
//! ```
//!
//! Over TLS with a certificate of its own, which is told through the pod's log to who may read that;
//! each request carries the token of the DataVolume's Secret. What was received outlives the
//! container: an upload that was cut goes on where it was.

use anyhow::{Context, Result};
use api::import::{ADDRESS, PASSWORD, Upload};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use std::convert::Infallible;
use std::io::Write;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncSeekExt, AsyncWriteExt, SeekFrom};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Mutex, mpsc};
use tokio_rustls::TlsAcceptor;

/// For a handshake, for a request's head, and between two pieces of a body.
const PATIENCE: Duration = Duration::from_secs(30);
/// What is told again, for a log that was cut off.
const OFTEN: Duration = Duration::from_secs(1);
/// The header with how many bytes there are.
const OFFSET: &str = "Upload-Offset";

/// What an upload is received by.
struct Receiver {
    token: String,
    /// Held by the one upload that is under way.
    file: Mutex<PathBuf>,
    most: u64,
    done: mpsc::Sender<()>,
}

/// Waits until an image of at most so many bytes is in a file.
///
/// # Errors
/// When it cannot listen. What goes wrong with an upload is its sender's to know.
pub async fn receive(file: &Path, most: u64) -> Result<()> {
    let complete = file.with_extension("complete");
    if complete.exists() {
        return Ok(());
    }
    let text = |name| std::env::var(name).with_context(|| format!("{name} is not set"));
    let address: IpAddr = text(ADDRESS)?.parse().context("the pod's address is none")?;
    let listener = TcpListener::bind((address, 0)).await.context("cannot listen for the upload")?;
    let (acceptor, certificate) = identity(address)?;
    let url = format!("https://{}/v1/upload", listener.local_addr()?);
    let told = serde_json::to_string(&Upload { upload: url, certificate })?;
    let (done, mut ended) = mpsc::channel(1);
    let file = Mutex::new(file.to_owned());
    let receiver = Arc::new(Receiver { token: text(PASSWORD)?, file, most, done });
    let mut pulse = tokio::time::interval(OFTEN);
    loop {
        tokio::select! {
            _ = pulse.tick() => {
                // Nobody can upload who does not hear of it: the next time, then.
                let _ = writeln!(std::io::stdout(), "{told}");
            }
            accepted = listener.accept() => if let Ok((stream, _)) = accepted {
                tokio::spawn(serve(Arc::clone(&receiver), acceptor.clone(), stream));
            },
            _ = ended.recv() => {
                std::fs::File::create(&complete).context("cannot note that the upload is whole")?;
                return Ok(());
            }
        }
    }
}

fn identity(address: IpAddr) -> Result<(TlsAcceptor, String)> {
    let key = rcgen::KeyPair::generate()?;
    let certificate = rcgen::CertificateParams::new([address.to_string()])?.self_signed(&key)?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let private = rustls::pki_types::PrivateKeyDer::try_from(key.serialize_der())
        .map_err(|error| anyhow::anyhow!("the key of the upload's certificate: {error}"))?;
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], private)?;
    Ok((TlsAcceptor::from(Arc::new(config)), certificate.pem()))
}

async fn serve(receiver: Arc<Receiver>, acceptor: TlsAcceptor, stream: TcpStream) {
    let Ok(Ok(stream)) = tokio::time::timeout(PATIENCE, acceptor.accept(stream)).await else {
        return;
    };
    let service = service_fn(move |request| {
        let receiver = Arc::clone(&receiver);
        async move { Ok::<_, Infallible>(receiver.answer(request).await) }
    });
    let mut server = hyper::server::conn::http1::Builder::new();
    server.timer(TokioTimer::new()).header_read_timeout(PATIENCE);
    if let Err(error) = server.serve_connection(TokioIo::new(stream), service).await {
        tracing::debug!(%error, "an upload's connection ended");
    }
}

type Answer = Response<Full<Bytes>>;

fn answer(code: StatusCode, offset: u64, text: impl Into<String>) -> Answer {
    let mut answer = Response::new(Full::new(Bytes::from(text.into())));
    *answer.status_mut() = code;
    answer.headers_mut().insert(OFFSET, offset.into());
    answer
}

impl Receiver {
    async fn answer(&self, request: Request<Incoming>) -> Answer {
        let given = request.headers().get("Authorization").and_then(|value| value.to_str().ok());
        let given = given.and_then(|value| value.strip_prefix("Bearer ")).unwrap_or_default();
        // Equal in length and in every byte, whichever is the first that differs.
        let same = given.len() == self.token.len()
            && given.bytes().zip(self.token.bytes()).fold(0, |all, (a, b)| all | (a ^ b)) == 0;
        if !same {
            return answer(StatusCode::UNAUTHORIZED, 0, "the token is not that of the DataVolume");
        }
        if request.uri().path() != "/v1/upload" {
            return answer(StatusCode::NOT_FOUND, 0, "uploads go to /v1/upload");
        }
        let Ok(file) = self.file.try_lock() else {
            return answer(StatusCode::CONFLICT, 0, "another upload is under way");
        };
        let have = std::fs::metadata(&*file).map(|found| found.len()).unwrap_or_default();
        match *request.method() {
            Method::HEAD => answer(StatusCode::OK, have, ""),
            Method::PUT => self.take(request, &file, have).await,
            _ => answer(StatusCode::METHOD_NOT_ALLOWED, have, "say HEAD or PUT"),
        }
    }

    async fn take(&self, request: Request<Incoming>, file: &Path, have: u64) -> Answer {
        let header = |name: &str| {
            let value = request.headers().get(name)?.to_str().ok()?;
            value.parse::<u64>().ok()
        };
        let begins = header(OFFSET).unwrap_or(0);
        let Some(length) = header("Content-Length") else {
            return answer(StatusCode::LENGTH_REQUIRED, have, "say Content-Length");
        };
        if begins != have && begins != 0 {
            return answer(StatusCode::CONFLICT, have, format!("go on at {have}"));
        }
        if begins.saturating_add(length) > self.most {
            let text = format!("an image of more than {} bytes is not taken", self.most);
            return answer(StatusCode::PAYLOAD_TOO_LARGE, have, text);
        }
        match write(request.into_body(), file, begins).await {
            Ok(end) if end == begins + length => {
                // Its receiver lives as long as the pod.
                let _ = self.done.try_send(());
                answer(StatusCode::NO_CONTENT, end, "")
            }
            Ok(end) => answer(StatusCode::BAD_REQUEST, end, "the upload broke off"),
            Err(error) => answer(StatusCode::INSUFFICIENT_STORAGE, have, format!("{error:#}")),
        }
    }
}

/// Writes what comes, from an offset on. Returns where it ends; it is safe then.
async fn write(mut body: Incoming, path: &Path, begins: u64) -> Result<u64> {
    let mut file =
        tokio::fs::File::options().create(true).truncate(false).write(true).open(path).await?;
    file.set_len(begins).await?;
    file.seek(SeekFrom::Start(begins)).await?;
    let mut end = begins;
    while let Ok(Some(Ok(frame))) = tokio::time::timeout(PATIENCE, body.frame()).await {
        if let Ok(data) = frame.into_data() {
            file.write_all(&data).await.context("the image cannot be kept")?;
            end += data.len() as u64;
        }
    }
    file.flush().await?;
    file.sync_all().await.context("the image cannot be kept")?;
    Ok(end)
}
