//! What runs pods in an embedded cluster: each part in this process, under its own identity.

use super::children::{Children, Places};
use super::components::Components;
use super::vms::{self, Vms};
use crate::cli;
use anyhow::{Context, Result, anyhow, bail};
use apiserver::auth::User;
use apiserver::embedded::Server;
use apiserver::quantity::Quantity;
use jiff::SignedDuration;
use kube::Client;
use node::agent::images::{Image, Images};
use node::agent::{self, Ending, pod_address};
use node::storage::disks::Disks;
use node::{lifecycle, scheduler, storage};
use reconcile::why;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinSet;

/// When a cluster ends, its containers have this long to do so.
const LEAVING: SignedDuration = SignedDuration::from_secs(10);

/// The parts that run.
pub struct Nodes {
    ending: watch::Sender<Ending>,
    agents: JoinSet<()>,
    /// They end when they are dropped.
    _controllers: JoinSet<()>,
    /// Those that are processes of their own.
    children: Option<Children>,
}

/// A part's client: the API in this process, as a user.
pub fn client(server: &Server, user: &str, groups: &[&str]) -> Client {
    Client::new(server.api.as_user(User::new(user, groups)), "default")
}

/// Where a cluster's volumes and pods are.
pub fn disks(folder: &Path) -> Disks {
    Disks::new(folder.join("machine"))
}

/// Ends what a cluster that was killed has left running. Returns how many containers.
///
/// # Errors
/// When a container's record cannot be used.
pub async fn end_left_over(folder: &Path) -> Result<usize> {
    let leaving = Duration::try_from(LEAVING)?;
    let mut ended = 0;
    for node in disks(folder).nodes() {
        let left = agent::end_left_over(&node, leaving).await;
        ended += left.with_context(|| format!("cannot end what is left in {}", node.display()))?;
    }
    Ok(ended)
}

impl Nodes {
    /// Starts them all.
    ///
    /// # Errors
    /// When what was asked for makes no sense, or the API refuses.
    pub async fn start(server: &Server, folder: &Path, arguments: &cli::Up) -> Result<Self> {
        let disks = disks(folder);
        let pool = pool(folder, arguments.storage.as_deref())?;
        let images = images(&arguments.image)?;
        let mut controllers = JoinSet::new();
        if arguments.nodes > 0 {
            let binder = client(server, "system:persistent-volume-binder", &[]);
            storage::make_classes(&binder).await.context("cannot make the storage classes")?;
            let config = storage::Config { disks: disks.clone(), shared: pool };
            controllers.spawn(storage::run(binder, config));
            controllers.spawn(scheduler::run(client(server, "system:kube-scheduler", &[])));
            controllers.spawn(lifecycle::run(client(server, "system:node-controller", &[])));
        }
        let mut vms = Vms::prepare(server, folder, arguments).await?;
        vms.start_controllers(server, &mut controllers)?;
        let networks = arguments.migration_network.iter();
        let networks = networks.map(|n| (n.name.clone(), n.synchronizer().into())).collect();
        vms.start_synchronizer(server, folder, networks, &mut controllers)?;
        let (ending, ends) = watch::channel(Ending::Not);
        let mut agents = JoinSet::new();
        for number in 1..=arguments.nodes {
            let name = format!("{}-{number}", arguments.name);
            let config = agent::Config {
                address: pod_address(&format!("{} {name}", folder.display())),
                labels: BTreeMap::new(),
                taints: Vec::new(),
                extended: extended(),
                pool,
                images: images.clone(),
                host_paths: vms::host_paths(&disks.node(&name)),
                environment: environment(server),
                folder: disks.node(&name),
                supervisor: own_program()?,
                leaving: LEAVING,
                name: name.clone(),
            };
            let client = client(server, &format!("system:node:{name}"), &["system:nodes"]);
            // Who waits for the cluster finds its nodes.
            let node = agent::register::register(&client, &config)
                .await
                .map_err(|error| anyhow!("cannot register node {name}: {}", why(&error)))?;
            agents.spawn(agent::run(client, config, node, ends.clone()));
            let networks = arguments.migration_network.iter();
            let networks = networks.map(|n| (n.name.clone(), n.address(number).to_string()));
            let (folder, networks) = (disks.node(&name), networks.collect());
            vms.start_handler(server, &name, &folder, networks, &mut controllers)?;
        }
        let nodes = (1..=arguments.nodes).map(|number| format!("{}-{number}", arguments.name));
        let components = Components {
            api: server.api.as_user(User::new("system:apiserver", &[apiserver::auth::MASTERS])),
            nodes: nodes.collect(),
            handlers: vms.handlers(),
            processes: arguments.separate.then(|| Places::of(folder)),
        };
        controllers.spawn(components.run());
        let children = vms.go_on(server, &mut controllers);
        Ok(Self { ending, agents, _controllers: controllers, children })
    }

    /// Ends them, and what runs on them or not.
    pub async fn end(mut self, how: Ending) {
        self.ending.send_replace(how);
        // Each has a limit of its own.
        while self.agents.join_next().await.is_some() {}
        if let Some(children) = self.children.take() {
            children.end().await;
        }
    }
}

pub fn own_program() -> Result<PathBuf> {
    std::env::current_exe().context("cannot find this program")
}

/// What nodes have besides: kubelets know it from who offers it.
fn extended() -> BTreeMap<String, String> {
    let kvm = handler::cluster::devices::kvm();
    kvm.is_there().then(|| (kvm.resource, kvm.shares.to_string())).into_iter().collect()
}

/// How programs in pods find the API.
fn environment(server: &Server) -> Vec<(String, String)> {
    let pair = |name: &str, value: String| (name.to_owned(), value);
    // Which QEMU this program was told to take, launchers take too; and tests stop their moves.
    let own = ["GODWIT_QEMU", "GODWIT_FAILPOINTS"].into_iter();
    let own = own.filter_map(|name| Some(pair(name, std::env::var(name).ok()?)));
    let mut all = vec![
        pair("KUBERNETES_SERVICE_HOST", server.address.ip().to_string()),
        pair("KUBERNETES_SERVICE_PORT", server.address.port().to_string()),
        pair("KUBERNETES_SERVICE_PORT_HTTPS", server.address.port().to_string()),
    ];
    all.extend(own);
    all
}

/// How many bytes volumes may take.
fn pool(folder: &Path, asked: Option<&str>) -> Result<i64> {
    if let Some(text) = asked {
        return match Quantity::parse(text).map(Quantity::units) {
            Some(size) if size > 0 => Ok(size),
            _ => bail!("--storage {text} is no size: say 20Gi, or 500Mi"),
        };
    }
    let found = rustix::fs::statvfs(folder)
        .with_context(|| format!("cannot ask for the file system of {}", folder.display()))?;
    Ok(i64::try_from(found.f_blocks.saturating_mul(found.f_frsize)).unwrap_or(i64::MAX))
}

/// The images that nodes have: this program, and those that were named.
fn images(named: &[String]) -> Result<Images> {
    let program = own_program()?;
    let own = Image {
        entrypoint: vec!["godwit".into()],
        programs: BTreeMap::from([("godwit".into(), program)]),
        machine: false,
    };
    let mut all = BTreeMap::from([(controllers::IMAGE.to_owned(), own)]);
    for text in named {
        let Some((name, program)) = text.split_once('=') else {
            bail!("--image {text} is not NAME=PROGRAM, like example.org/shell=/bin/sh");
        };
        if agent::images::name(name) != name || name.is_empty() {
            bail!("--image {text}: give the name without tag or digest");
        }
        if !Path::new(program).is_absolute() || !Path::new(program).is_file() {
            bail!("--image {text}: {program} is no program; give its whole path");
        }
        let image = Image {
            entrypoint: vec![program.to_owned()],
            programs: BTreeMap::new(),
            machine: true,
        };
        all.insert(name.to_owned(), image);
    }
    Ok(Images(all))
}
