//! The long-running roles: a host's gateway, a VM's launcher, a cluster's controllers and handlers.

use crate::cli;
use crate::ground::Ground;
use crate::host::IDENTITY;
use crate::trust;
use anyhow::{Context, Result, anyhow};
use channel::gateway::{self, Answer, Gateway, Limits, Service};
use channel::identity::{Credentials, Identity, SpiffeId, Trust};
use handler::Handler;
use handover::ledger::{Request, Response};
use handover::record::HostId;
use kube::config::Kubeconfig;
use kube::{Client, Config};
use launcher::migration::ticket::{Here, Peer};
use launcher::spec::VmSpec;
use reconcile::lease::Candidate;
use serde_json::Value;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use synchronizer::Advertise;
use tokio::signal::unix::{SignalKind, signal};

/// Log to stderr, as `GODWIT_LOG` says (default: info for the roles).
pub fn log() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("GODWIT_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        // A log that cannot be written, on a full disk, ends nothing.
        .log_internal_errors(false)
        .init();
}

/// The handler's answers, behind the gateway.
struct Agent(Handler);

impl Agent {
    fn reply(response: &Response) -> Value {
        serde_json::to_value(response).unwrap_or(Value::Null)
    }

    fn understood(request: Value) -> Result<Request, Response> {
        serde_json::from_value(request).map_err(|e| Response::Failed { why: e.to_string() })
    }
}

impl Service for Agent {
    fn peer<'a>(&'a self, peer: &'a SpiffeId, request: Value) -> Answer<'a> {
        Box::pin(async move {
            let response = match Self::understood(request) {
                Ok(request) => self.0.peer(&HostId(peer.to_string()), &request),
                Err(response) => response,
            };
            Self::reply(&response)
        })
    }

    fn local(&self, request: Value) -> Answer<'_> {
        Box::pin(async move {
            let response = match Self::understood(request) {
                Ok(request) => self.0.local(&request),
                Err(response) => response,
            };
            Self::reply(&response)
        })
    }
}

/// Runs a host's gateway and handler until SIGTERM or SIGINT.
///
/// # Errors
/// When it cannot listen.
pub async fn gateway(arguments: cli::Gateway) -> Result<ExitCode> {
    let host = std::path::absolute(&arguments.host)?;
    let folder = host.join(IDENTITY);
    let identity = Identity::load(&folder)
        .with_context(|| format!("{} is no host; run `godwit host` first", host.display()))?;
    let trust = Trust::load([folder.join("trust.pem")])?;
    let id = identity.id().clone();
    let service = Arc::new(Agent(Handler::open(&host).context("cannot open the host's ledger")?));
    let gateway = Gateway::start(gateway::Config {
        listen: arguments.listen,
        host_dir: host.clone(),
        identity,
        trust,
        service,
        limits: Limits::default(),
    })?;
    let address = arguments.advertise.unwrap_or_else(|| gateway.local_addr().to_string());
    let here = Here { peer: Peer { address: address.clone(), id: id.clone() } };
    publish(&host, &here)?;
    tracing::info!(%address, %id, "gateway is ready");
    asked_to_end().await?;
    gateway.shutdown().await;
    Ok(ExitCode::SUCCESS)
}

fn publish(host: &Path, here: &Here) -> Result<()> {
    let draft = host.join("gateway.json.new");
    std::fs::write(&draft, serde_json::to_vec_pretty(here)?)?;
    std::fs::rename(&draft, host.join("gateway.json")).context("cannot say where the gateway is")
}

/// SIGTERM, or SIGINT.
async fn asked_to_end() -> Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = tokio::signal::ctrl_c() => {}
    }
    Ok(())
}

/// The API, as a kubeconfig says, or as the pod that this is run in may.
async fn client(kubeconfig: Option<&Path>) -> Result<Client> {
    let mut config = match kubeconfig {
        Some(path) => {
            let found = Kubeconfig::read_from(path)
                .with_context(|| format!("cannot read the kubeconfig {}", path.display()))?;
            Config::from_custom_kubeconfig(found, &Default::default()).await?
        }
        None => Config::incluster()
            .context("this runs in no pod that may use the API; say --kubeconfig")?,
    };
    // Whoever asks tries again by himself, and an eviction that is refused is an answer.
    config.default_retry = false;
    Client::try_from(config).context("the API cannot be used")
}

/// The lease of those controllers that do the work, as KubeVirt's.
const LEASE: &str = "virt-controller";

/// Runs the controllers until SIGTERM or SIGINT, whenever no other replica does.
///
/// # Errors
/// When there is no way to the API.
pub async fn controller(arguments: cli::Controller) -> Result<ExitCode> {
    let client = client(arguments.kubeconfig.as_deref()).await?;
    let ca = arguments.ca.map(|path| {
        let read = std::fs::read_to_string(&path);
        read.with_context(|| format!("cannot read the CA {}", path.display()))
    });
    let ca = ca.transpose()?;
    let name = arguments.name.unwrap_or_else(|| {
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        format!("{}_{}", host.trim(), uuid::Uuid::new_v4())
    });
    let end = asked_to_end();
    let ended = async {
        if let Err(error) = end.await {
            tracing::error!("signals cannot be heard: {error:#}");
        }
    };
    lead(client, &name, &arguments.image, ca, ended).await;
    Ok(ExitCode::SUCCESS)
}

/// Runs the controllers until `end`, whenever nobody else does: under a name that nobody else has,
/// with pods of an image. `ca`: the cluster's CAs, PEM, where nobody else tells whom it believes.
pub(crate) async fn lead(
    client: Client,
    name: &str,
    image: &str,
    ca: Option<String>,
    end: impl Future<Output = ()>,
) {
    let candidate = Candidate::new(client.clone(), api::NAMESPACE, LEASE, name);
    let work = || async {
        let trust = async {
            let Some(ca) = ca.clone() else { return };
            if let Err(error) = trust::keep(client.clone(), ca).await {
                tracing::error!("nobody is told whom to believe: {error:#}");
            }
        };
        tokio::join!(controllers::run(client.clone(), image), trust);
    };
    candidate.run(work, end).await;
}

/// Stands before commands that read what is not trusted.
///
/// # Errors
/// When this program cannot be found.
pub fn confine() -> Result<Vec<OsString>> {
    let own = std::env::current_exe().context("cannot find this program")?;
    Ok(vec![own.into(), "confine".into(), "--".into()])
}

/// New credentials are looked for this often.
const LOOK: Duration = Duration::from_millis(250);

/// Runs a node's handler until SIGTERM or SIGINT.
///
/// # Errors
/// When it cannot begin.
pub async fn handler(arguments: cli::Handler) -> Result<ExitCode> {
    let client = client(arguments.kubeconfig.as_deref()).await?;
    let credentials = Credentials::follow(&arguments.identity, LOOK)
        .with_context(|| format!("there are no credentials in {}", arguments.identity.display()))?;
    let credentials = trust::follow(&client, credentials);
    let config = handler::cluster::Config {
        node: arguments.node,
        folder: std::path::absolute(&arguments.folder)?,
        listen: arguments.listen,
        networks: cli::pairs(&arguments.migration_network, "--migration-network", "NAME=ADDRESS")?,
        credentials,
        devices: arguments.device_plugins,
        confine: confine()?,
    };
    tokio::select! {
        ended = handler::cluster::run(client, config) => ended?,
        asked = asked_to_end() => asked?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Runs the cluster's synchronizer until SIGTERM or SIGINT.
///
/// # Errors
/// When it cannot begin.
pub async fn synchronizer(arguments: cli::Synchronizer) -> Result<ExitCode> {
    let client = client(arguments.kubeconfig.as_deref()).await?;
    let credentials = Credentials::follow(&arguments.identity, LOOK)
        .with_context(|| format!("there are no credentials in {}", arguments.identity.display()))?;
    let credentials = trust::follow(&client, credentials);
    let advertise = match (arguments.advertise, arguments.service) {
        (Some(address), _) => Advertise::At(address),
        (None, Some(service)) => Advertise::Service(service),
        (None, None) => Advertise::Here,
    };
    let mut places = BTreeMap::new();
    for (name, place) in
        cli::pairs(&arguments.migration_network, "--migration-network", "NAME=ADDRESS")?
    {
        let address = handler::cluster::address_of(&place).await;
        let address = address.map_err(|why| anyhow!("migration network {name}: {why}"))?;
        places.insert(name, address);
    }
    let config = synchronizer::Config {
        address: arguments.listen,
        networks: places,
        remembered: arguments.remember,
        advertise,
        ground: Arc::new(Ground::new(&client, &credentials)),
        credentials,
    };
    tokio::select! {
        () = synchronizer::run(client, config) => {}
        asked = asked_to_end() => asked?,
    }
    Ok(ExitCode::SUCCESS)
}

/// The folder that stands for `/` in a container without a file system of its own.
pub(crate) fn root() -> Option<PathBuf> {
    std::env::var_os("GODWIT_ROOT").map(PathBuf::from)
}

/// A folder by its path, in such a container by what was mounted there.
fn place(path: &Path) -> Result<PathBuf> {
    match (root(), path.strip_prefix("/")) {
        (Some(root), Ok(below)) => std::fs::canonicalize(root.join(below))
            .with_context(|| format!("{} is not mounted here", path.display())),
        _ => Ok(std::path::absolute(path)?),
    }
}

/// A spec is a page of text.
const MAX_SPEC: u64 = 1 << 20;

/// Runs one VM until SIGTERM or SIGINT.
///
/// # Errors
/// When the spec is wrong or the VM cannot be started.
pub async fn launcher(arguments: cli::Launcher) -> Result<ExitCode> {
    let spec = arguments.spec.as_deref().map(read_spec).transpose()?;
    let vm = match (&spec, arguments.vm) {
        (Some(spec), _) => spec.name.clone(),
        (None, vm) => vm.context("say --spec or --vm")?,
    };
    let own = std::env::current_exe().context("cannot find this program")?;
    let config = launcher::vm::Config {
        host: place(&arguments.host)?,
        vm,
        root: root(),
        grace: Duration::from_secs(arguments.grace),
        shim: vec![own.into(), "exec".into()],
        failpoints: arguments.failpoints || std::env::var_os("GODWIT_FAILPOINTS").is_some(),
        fault: arguments.inject.unwrap_or_default(),
    };
    launcher::run(config, spec, arguments.force).await?;
    Ok(ExitCode::SUCCESS)
}

fn read_spec(path: &Path) -> Result<VmSpec> {
    let mut text = String::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(MAX_SPEC).read_to_string(&mut text))
        .with_context(|| format!("cannot read the spec {}", path.display()))?;
    let mut spec: VmSpec = serde_saphyr::from_str(&text)
        .with_context(|| format!("{} is no VM spec", path.display()))?;
    // Paths in a spec are relative to it.
    let base = std::path::absolute(path)?.parent().map(Path::to_owned).unwrap_or_default();
    for disk in &mut spec.disks {
        disk.path = base.join(&disk.path);
    }
    if let Some(boot) = &mut spec.boot {
        boot.kernel = base.join(&boot.kernel);
        boot.initrd = boot.initrd.as_ref().map(|initrd| base.join(initrd));
    }
    Ok(spec)
}
