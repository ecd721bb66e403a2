//! A node's handler in a cluster: runs the guests of the VMIs that are scheduled to its node.
//!
//! ```text
//! VMI, its pod --> guests: prepare files (files) -> spec (translate) -> launcher -> VMI's status
//! launcher     --> doors --> records: the owner record, by compare-and-swap through the API
//! QEMU's end   --> watch --> records: the owner has ended
//! API role     --> serve: pause, console, …; what guests have used (measure)
//! ```
//!
//! It keeps nothing that matters in memory: guests go on without it, and the next one finds them by
//! their pods, launchers and watched processes.

pub mod devices;
pub mod doors;
pub mod files;
pub mod guests;
pub mod measure;
pub mod moves;
pub mod network;
pub mod node;
pub mod records;
pub mod serve;
pub mod translate;
mod way;

pub use way::address_of;

use crate::watch::Watch;
use api::kubevirt::{self, KubeVirt};
use api::owner::OwnerRecord;
use api::vmi::VirtualMachineInstance;
use channel::gateway::{Config as GatewayConfig, Gateway, Limits};
use channel::identity::{Credentials, SpiffeId};
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use kube::runtime::reflector::Store;
use kube::runtime::watcher;
use kube::{Api, Client};
use reconcile::Queue;
use reconcile::events::Recorder;
use reconcile::kept::Keeper;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::sync::Notify;
use tokio::sync::watch;
use tokio::task::JoinSet;

/// How a handler is run.
#[derive(Debug, Clone)]
pub struct Config {
    /// Its node.
    pub node: String,
    /// Its folder: identities of processes, the gateway's socket, and `pods`.
    pub folder: PathBuf,
    /// Where the gateway and the API role's way in listen; port 0 takes a free one.
    pub listen: SocketAddr,
    /// The node's places in networks for migrations, by their names: an address, or an interface that
    /// has one.
    pub networks: BTreeMap<String, String>,
    /// Who it is and whom it believes, as they are renewed.
    pub credentials: watch::Receiver<Credentials>,
    /// The folder in which the node's kubelet takes offers of devices, where it is to be offered KVM.
    pub devices: Option<PathBuf>,
    /// A program that calls `images::confine`, and its arguments.
    pub confine: Vec<OsString>,
}

impl Config {
    /// Who it is.
    pub fn id(&self) -> SpiffeId {
        self.credentials.borrow().identity.id().clone()
    }

    /// The folders of pods.
    pub fn pods(&self) -> PathBuf {
        self.folder.join("pods")
    }
}

/// What all of a handler's parts share.
#[derive(Clone)]
pub struct Shared {
    /// How it is run.
    pub config: Arc<Config>,
    /// The API.
    pub client: Client,
    /// Says what happens.
    pub events: Recorder,
    /// Which processes live.
    pub watch: Arc<Watch>,
    /// Disks of images.
    pub cache: Arc<images::Cache>,
    /// VMIs of this node.
    pub vmis: Store<VirtualMachineInstance>,
    /// Launchers' pods of this node.
    pub pods: Store<Pod>,
    /// Rings when one comes, changes or goes.
    pub pods_bell: Arc<Notify>,
    /// All owner records.
    pub owners: Store<OwnerRecord>,
    /// All claims.
    pub claims: Store<PersistentVolumeClaim>,
    /// The cluster's settings.
    pub settings: Store<KubeVirt>,
    /// Rings when they change.
    pub settings_bell: Arc<Notify>,
    /// What is remembered of moves.
    pub moves: Arc<moves::Moves>,
    /// VMIs to be looked at.
    pub queue: Queue<(String, String)>,
}

impl Shared {
    /// The cluster's settings; None as long as there are none.
    fn cluster(&self) -> Option<Arc<KubeVirt>> {
        kubevirt::foremost(self.settings.state())
    }
}

/// Why a handler does not run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Its folder cannot be used.
    #[error("cannot use the handler's folder {}", folder.display())]
    Folder {
        /// Which.
        folder: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The gateway does not start.
    #[error("the gateway of node {node} does not start")]
    Gateway {
        /// Whose.
        node: String,
        /// Why.
        #[source]
        source: channel::gateway::Error,
    },
    /// The API role's way in does not open.
    #[error("the handler of node {node} cannot listen on {address}")]
    Listen {
        /// Whose.
        node: String,
        /// Where.
        address: SocketAddr,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The credentials do not work.
    #[error("the handler's credentials cannot be used")]
    Tls(#[source] channel::tls::Error),
}

/// Runs a node's handler. Returns only when it cannot begin.
///
/// # Errors
/// [`Error`].
pub async fn run(client: Client, config: Config) -> Result<(), Error> {
    let config = Arc::new(config);
    let folder = |source| Error::Folder { folder: config.folder.clone(), source };
    std::fs::create_dir_all(config.pods()).map_err(folder)?;
    let watch = Arc::new(Watch::open(&config.folder).map_err(folder)?);
    let (shared, _keeper) = keep(&client, &config, watch);
    let credentials = config.credentials.borrow().clone();
    let open = |listen| {
        Gateway::start(GatewayConfig {
            listen,
            host_dir: config.folder.clone(),
            identity: credentials.identity.clone(),
            trust: credentials.trust.clone(),
            service: Arc::new(moves::Cluster(shared.clone())),
            limits: Limits::default(),
        })
    };
    settings_ready(&shared).await;
    let (gateway, place) = way::open(&shared, open)
        .await
        .map_err(|source| Error::Gateway { node: config.node.clone(), source })?;
    let gateway = Arc::new(gateway);
    // It was empty: this is the only one.
    let _ = shared.moves.gateway.set(Arc::clone(&gateway));
    let served = serve::Served::open(&shared).await?;
    let mut tasks = JoinSet::new();
    let places = watch::Sender::new(place);
    tasks.spawn(node::run(shared.clone(), served.address, places.subscribe()));
    tasks.spawn(way::follow(shared.clone(), Arc::clone(&gateway), places));
    tasks.spawn(served.run(shared.clone()));
    if let Some(folder) = config.devices.clone() {
        tasks.spawn(devices::offer(folder));
    }
    tasks.spawn(renew(Arc::clone(&gateway), config.credentials.clone()));
    reconcile_ready(&shared).await;
    tasks.spawn(doors::run(shared.clone(), gateway));
    tasks.spawn(records::report(shared.clone()));
    tasks.spawn(guests::run(shared));
    while tasks.join_next().await.is_some() {}
    Ok(())
}

/// Hands the gateway its new credentials. What stands goes on.
async fn renew(gateway: Arc<Gateway>, mut credentials: watch::Receiver<Credentials>) {
    // What has come since the gateway was started.
    credentials.mark_changed();
    while credentials.changed().await.is_ok() {
        let Credentials { identity, trust, .. } = credentials.borrow_and_update().clone();
        if let Err(error) = gateway.renew(identity, trust) {
            tracing::warn!("the gateway keeps its old credentials: {}", launcher::chain(&error));
        }
    }
}

async fn settings_ready(shared: &Shared) {
    let Shared { settings, .. } = shared;
    reconcile::ready!(settings);
}

async fn reconcile_ready(shared: &Shared) {
    let Shared { vmis, pods, owners, claims, settings, .. } = shared;
    reconcile::ready!(vmis, pods, owners, claims, settings);
}

fn keep(client: &Client, config: &Arc<Config>, watch: Arc<Watch>) -> (Shared, Keeper) {
    let mut keeper = Keeper::default();
    let queue = Queue::default();
    let labels = format!("{}={}", api::keys::NODE, config.node);
    let vmis =
        keeper.keep_and(Api::all(client.clone()), watcher::Config::default().labels(&labels), {
            let queue: Queue<(String, String)> = queue.clone();
            move |vmi: &VirtualMachineInstance| queue.ring(guests::key(vmi))
        });
    let pods_bell = Arc::new(Notify::new());
    let pods = watcher::Config::default()
        .fields(&format!("spec.nodeName={}", config.node))
        .labels(&format!("{}={}", api::keys::APP, api::keys::LAUNCHER));
    let pods = keeper.keep_and(Api::all(client.clone()), pods, {
        let (queue, bell) = (queue.clone(), Arc::clone(&pods_bell));
        move |pod: &Pod| {
            bell.notify_one();
            if let Some(vmi) = guests::owner(pod) {
                queue.ring(vmi);
            }
        }
    });
    let all = watcher::Config::default;
    let owners = keeper.keep_and(Api::all(client.clone()), all(), {
        let queue = queue.clone();
        // A guest that has come or gone is known by its record.
        move |record: &OwnerRecord| queue.ring(guests::key(record))
    });
    let claims = keeper.keep(Api::all(client.clone()), all());
    let settings_bell = Arc::new(Notify::new());
    let settings = keeper.keep_and(Api::all(client.clone()), all(), {
        let bell = Arc::clone(&settings_bell);
        move |_: &KubeVirt| bell.notify_one()
    });
    let cache = images::Cache::new(config.folder.join("images"), images::Limits::default());
    let shared = Shared {
        events: Recorder::new(client.clone(), "virt-handler", Some(&config.node)),
        config: Arc::clone(config),
        client: client.clone(),
        watch,
        cache: Arc::new(cache),
        vmis,
        pods,
        pods_bell,
        owners,
        claims,
        settings,
        settings_bell,
        moves: Arc::default(),
        queue,
    };
    (shared, keeper)
}
