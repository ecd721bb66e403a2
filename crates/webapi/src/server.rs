//! The API role's server, for clusters whose API server is not ours.
//!
//! ```text
//! API server --> /mutate, /validate           -> webhooks
//!            --> /apis/subresources.kubevirt.io -> aggregator: who asks -> may they -> subresources
//! kubelet    --> /healthz
//! Prometheus --> /metrics                      -> token: who asks -> may they
//! ```
//!
//! Webhooks are answered whoever asks: an answer changes nothing.

use crate::aggregator::Aggregator;
use crate::{WebApi, access, webhooks};
use apiserver::auth::{Attributes, User};
use apiserver::body::{self, Answer};
use apiserver::catalog::Catalog;
use apiserver::discovery::Served;
use apiserver::extension::{self, Extension};
use apiserver::request::{Info, Path, Verb, query, takes_aggregated_discovery};
use apiserver::server::{self, Service};
use apiserver::status::Failure;
use http::header::ACCEPT;
use http::request::Parts;
use http::{Method, Request, StatusCode};
use hyper::body::Incoming;
use kube::Client;
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::watch;

/// What the cluster says of its aggregators is read so often.
const LOOK: Duration = Duration::from_secs(60);

/// Why there is no server.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Whom to believe is not known.
    #[error(
        "it cannot be read who speaks for the cluster's users; bind the role \
             extension-apiserver-authentication-reader of kube-system to this account"
    )]
    Aggregator(#[source] Failure),
    /// The certificate or its key is none.
    #[error("the serving certificate cannot be used: {0}")]
    Certificate(String),
}

/// What the server proves itself with: both PEM.
#[derive(Debug, Clone)]
pub struct Credential {
    /// The certificate, and those that vouch for it.
    pub chain: String,
    /// Its key.
    pub key: String,
}

/// What it is run with.
pub struct Config {
    /// What is served.
    pub web: Arc<WebApi>,
    /// A client that may ask what others may do, and read what the cluster says of aggregators.
    pub client: Client,
    /// Where.
    pub listener: TcpListener,
    /// The credential, as it is renewed.
    pub credential: watch::Receiver<Credential>,
    /// Turns true at the end.
    pub ending: watch::Receiver<bool>,
}

/// Serves until its end.
///
/// # Errors
/// When it cannot begin.
pub async fn run(config: Config) -> Result<(), Error> {
    let Config { web, client, listener, mut credential, ending } = config;
    let first = Aggregator::read(&client).await.map_err(Error::Aggregator)?;
    let (tls, configured) = watch::channel(tls(&first, &credential.borrow_and_update())?);
    let (believed, aggregator) = watch::channel(Arc::new(first));
    let site = Site { web, client: client.clone(), aggregator };
    tokio::select! {
        () = server::serve(site, listener, configured, ending) => {}
        () = follow(&client, credential, &tls, &believed) => {}
    }
    Ok(())
}

/// Keeps what TLS is made of as the cluster and the credential have it. Never ends.
async fn follow(
    client: &Client,
    mut credential: watch::Receiver<Credential>,
    tls_of_new: &watch::Sender<Arc<ServerConfig>>,
    believed: &watch::Sender<Arc<Aggregator>>,
) {
    loop {
        // A credential that is never renewed has a sender that is gone.
        let renewed = async {
            if credential.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        let _ = tokio::time::timeout(LOOK, renewed).await;
        let made = match Aggregator::read(client).await {
            Ok(now) => tls(&now, &credential.borrow()).map(|tls| (now, tls)),
            Err(failure) => Err(Error::Aggregator(failure)),
        };
        match made {
            Ok((now, tls)) => {
                believed.send_replace(Arc::new(now));
                tls_of_new.send_replace(tls);
            }
            // What was right a minute ago is better than nothing.
            Err(error) => tracing::warn!(why = ?error, "TLS stays as it was: {error}"),
        }
    }
}

fn tls(aggregator: &Aggregator, credential: &Credential) -> Result<Arc<ServerConfig>, Error> {
    let wrong = |why: &dyn std::fmt::Display| Error::Certificate(why.to_string());
    let chain = CertificateDer::pem_slice_iter(credential.chain.as_bytes());
    let chain = chain.collect::<Result<Vec<_>, _>>().map_err(|error| wrong(&error))?;
    let key =
        PrivateKeyDer::from_pem_slice(credential.key.as_bytes()).map_err(|error| wrong(&error))?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| wrong(&error))?;
    let builder = match aggregator.roots().map_err(Error::Aggregator)? {
        Some(roots) => {
            let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider)
                .allow_unauthenticated()
                .build()
                .map_err(|error| wrong(&error))?;
            builder.with_client_cert_verifier(verifier)
        }
        None => builder.with_no_client_auth(),
    };
    let mut config = builder.with_single_cert(chain, key).map_err(|error| wrong(&error))?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// What answers.
#[derive(Clone)]
struct Site {
    web: Arc<WebApi>,
    client: Client,
    aggregator: watch::Receiver<Arc<Aggregator>>,
}

impl Service for Site {
    /// An aggregator.
    type Peer = ();

    fn peer(&self, certificate: &CertificateDer<'_>) -> Option<()> {
        self.aggregator.borrow().is(certificate).then_some(())
    }

    async fn answer(&self, request: Request<Incoming>, aggregator: Option<()>) -> Answer {
        let (head, sent) = request.into_parts();
        let answer = match (head.method.as_str(), head.uri.path()) {
            ("POST", "/mutate") => self.mutate(sent).await,
            ("POST", "/validate") => self.validate(sent).await,
            ("GET", "/healthz" | "/livez" | "/readyz") => Ok(text("ok".into())),
            ("GET", "/metrics") => self.metrics(&head, aggregator).await,
            _ => match aggregator.and_then(|()| self.aggregator.borrow().user(&head.headers)) {
                Some(user) => self.pass_on(head, sent, user).await,
                None => Err(Failure::unauthorized()),
            },
        };
        answer.unwrap_or_else(|failure| body::failure(&failure))
    }
}

fn text(text: String) -> Answer {
    body::answer(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", text)
}

impl Site {
    async fn mutate(&self, sent: Incoming) -> Result<Answer, Failure> {
        let sent = body::read_up_to(sent, webhooks::MOST).await?;
        Ok(body::json(StatusCode::OK, &webhooks::mutate(&*self.web, &sent).await?))
    }

    async fn validate(&self, sent: Incoming) -> Result<Answer, Failure> {
        let sent = body::read_up_to(sent, webhooks::MOST).await?;
        Ok(body::json(StatusCode::OK, &webhooks::validate(&*self.web, &sent).await?))
    }

    async fn pass_on(&self, head: Parts, sent: Incoming, user: User) -> Result<Answer, Failure> {
        match Info::parse(head.uri.path())? {
            Info::Resource(path) => self.resource(head, sent, path, user).await,
            Info::Other(path) => self.page(&head, path, &user).await,
        }
    }

    /// The metrics, for who may see those of the cluster's API server as well.
    async fn metrics(&self, head: &Parts, aggregator: Option<()>) -> Result<Answer, Failure> {
        let passed_on = aggregator.and_then(|()| self.aggregator.borrow().user(&head.headers));
        let user = match (passed_on, access::token(&head.headers)) {
            (Some(user), _) => user,
            (None, Some(token)) => access::authenticate(&self.client, token).await?,
            (None, None) => return Err(Failure::unauthorized()),
        };
        let what =
            Attributes { verb: "get".into(), path: "/metrics".into(), ..Attributes::default() };
        self.permit(&user, &what).await?;
        self.web.metrics().await.map(text)
    }

    async fn resource(
        &self,
        head: Parts,
        sent: Incoming,
        path: Path,
        user: User,
    ) -> Result<Answer, Failure> {
        if self.web.resources(&path.group, &path.version).is_none() {
            return Err(Failure::no_such_path());
        }
        let query = query(head.uri.query().unwrap_or_default())?;
        let verb = Verb::of(&head.method, &path, false)?;
        self.permit(&user, &Attributes::of(verb, &path, &query)).await?;
        let body = body::read(sent).await?;
        let user = Arc::new(user);
        self.web.serve(extension::Request { path, user, query, head, body }).await
    }

    /// What is no resource: what is served, as the API server asks for it in order to tell it with
    /// its own.
    async fn page(&self, head: &Parts, path: String, user: &User) -> Result<Answer, Failure> {
        let verb = head.method.as_str().to_lowercase();
        let what = Attributes { verb, path, ..Attributes::default() };
        self.permit(user, &what).await?;
        if head.method != Method::GET {
            return Err(Failure::no_such_verb());
        }
        let accept = head.headers.get(ACCEPT).and_then(|value| value.to_str().ok());
        let catalog = Catalog::default();
        let served = Served { catalog: &catalog, extension: Some(&*self.web) };
        let parts: Vec<_> = what.path.split('/').filter(|part| !part.is_empty()).collect();
        let page = match &parts[..] {
            ["apis"] if takes_aggregated_discovery(accept) => return Ok(served.aggregated(false)),
            ["apis"] => Some(served.groups()),
            ["apis", group] => served.group(group),
            ["apis", group, version] => served.resources(group, version),
            _ => None,
        };
        page.map(|page| body::json(StatusCode::OK, &page)).ok_or_else(Failure::no_such_path)
    }

    /// Asks the cluster whether a user may do something. It has said so already of what it passes
    /// on; but only to that path, and not of what came by another way.
    async fn permit(&self, user: &User, what: &Attributes) -> Result<(), Failure> {
        access::permit(&self.client, user, what).await
    }
}
