//! A whole server over a folder: certificates, store, the objects that every cluster has, socket.

use crate::api::{Api, Config as ApiConfig, Logs};
use crate::auth::pki::{self, Credential, Pki};
use crate::auth::{MASTERS, User, bootstrap, token};
use crate::housekeeping;
use crate::local::Local;
use crate::server;
use crate::status::Failure;
use crate::store::{OpenError, Store};
use http::Method;
use serde_json::{Value, json};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;

/// Where and how to serve.
pub struct Config {
    /// Of the database and the certificates.
    pub folder: PathBuf,
    /// The address to listen on, and on no other. Port 0 takes a free one.
    pub listen: SocketAddr,
    /// The logs of pods, if there are any.
    pub logs: Option<Box<dyn Logs>>,
}

/// Why there is no server.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The database cannot be opened.
    #[error("the cluster's database cannot be opened")]
    Store(#[from] OpenError),
    /// The certificates cannot be had.
    #[error("the cluster's certificates cannot be used")]
    Pki(#[from] pki::Error),
    /// The address cannot be listened on.
    #[error("cannot listen on {0}; another program may have the port: choose one with --port")]
    Listen(SocketAddr, #[source] std::io::Error),
    /// What every cluster has cannot be made.
    #[error("the cluster's first objects cannot be made: {0}")]
    Bootstrap(#[from] Failure),
    /// The keys of tokens are damaged.
    #[error("{0}")]
    Keys(String),
}

/// A server that runs. When it is dropped without [`Server::stop`] its tasks end with it.
pub struct Server {
    /// The API, for who is in this process.
    pub api: Api,
    /// Where it listens.
    pub address: SocketAddr,
    /// Its certificates.
    pub pki: Pki,
    ending: watch::Sender<bool>,
    housekeeping: JoinSet<()>,
    serving: JoinSet<()>,
}

impl Server {
    /// Starts.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn start(config: Config) -> Result<Self, Error> {
        let pki = Pki::open(&config.folder.join("pki"))?;
        let store = Store::open(&config.folder.join("objects.sqlite"))?;
        let listener =
            TcpListener::bind(config.listen).await.map_err(|e| Error::Listen(config.listen, e))?;
        let address = listener.local_addr().map_err(|e| Error::Listen(config.listen, e))?;
        let own = [address.ip(), IpAddr::from([127, 0, 0, 1])];
        let names = [
            "localhost",
            "kubernetes",
            "kubernetes.default",
            "kubernetes.default.svc",
            "kubernetes.default.svc.cluster.local",
        ];
        let tls = pki.server(&own, &names)?;
        let (private, public) = pki.token_keys()?;
        let issuer = "https://kubernetes.default.svc.cluster.local";
        let keys = token::Keys::new(&private, &public, issuer).map_err(Error::Keys)?;
        let (ending, ends) = watch::channel(false);
        let api = Api::new(ApiConfig {
            store,
            keys,
            logs: config.logs,
            address: address.to_string(),
            ending: ends.clone(),
        });
        first_objects(&api.as_user(User::new("system:apiserver", &[MASTERS]))).await?;
        let (mut housekeeping, mut serving) = (JoinSet::new(), JoinSet::new());
        housekeeping::start(&api, pki.authority(), &mut housekeeping);
        let (_, tls) = watch::channel(tls);
        serving.spawn(server::serve(api.clone(), listener, tls, ends));
        Ok(Self { api, address, pki, ending, housekeeping, serving })
    }

    /// The credential of the cluster's administrator.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn administrator(&self) -> Result<Credential, pki::Error> {
        self.pki.user("admin", "kubernetes-admin", &[MASTERS])
    }

    /// Ends: no new requests, watches end, what is under way is finished, the database is closed.
    pub async fn stop(mut self) {
        self.housekeeping.shutdown().await;
        self.ending.send_replace(true);
        // It gives up on connections that do not end.
        while self.serving.join_next().await.is_some() {}
    }
}

/// What every cluster has. What is there is let be, but for roles that lack rules.
async fn first_objects(api: &Local) -> Result<(), Failure> {
    let rbac = "/apis/rbac.authorization.k8s.io/v1";
    for name in ["default", "kube-system", "kube-public", "kube-node-lease"] {
        let namespace =
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
        api.ensure("/api/v1/namespaces", &namespace).await?;
    }
    for role in bootstrap::roles() {
        restore(api, &format!("{rbac}/clusterroles"), &role, "rules").await?;
    }
    for binding in bootstrap::bindings() {
        restore(api, &format!("{rbac}/clusterrolebindings"), &binding, "subjects").await?;
    }
    for (name, value) in
        [("system-cluster-critical", 2_000_000_000), ("system-node-critical", 2_000_001_000)]
    {
        let class = json!({
            "apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass",
            "metadata": {"name": name}, "value": value,
        });
        api.ensure("/apis/scheduling.k8s.io/v1/priorityclasses", &class).await?;
    }
    Ok(())
}

/// Creates an object, or adds what a list of an older one lacks.
async fn restore(api: &Local, path: &str, object: &Value, list: &str) -> Result<(), Failure> {
    let one = format!("{path}/{}", crate::meta::text(object, "name"));
    let found = match api.send(Method::GET, &one, "application/json", None).await {
        Ok(found) => found,
        Err(failure) if failure.code == 404 => return api.ensure(path, object).await,
        Err(failure) => return Err(failure),
    };
    let gathers = object["aggregationRule"].is_object();
    let has = found[list].as_array().cloned().unwrap_or_default();
    let wanted = object[list].as_array().cloned().unwrap_or_default();
    let missing: Vec<Value> = wanted.into_iter().filter(|w| !has.contains(w)).collect();
    if gathers || missing.is_empty() {
        return Ok(());
    }
    let all: Vec<Value> = has.into_iter().chain(missing).collect();
    api.merge(&one, &json!({list: all})).await.map(|_| ())
}
