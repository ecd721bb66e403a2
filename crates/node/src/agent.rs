//! A node's agent: runs the pods that are bound to its node.
//!
//! ```text
//! watch of pods -> worker of each: see (record, container) -> plan (machine) -> act
//!                                    -> tell (status) -> wait
//! ```
//!
//! What runs goes on when the agent does not: all that it knows is in the pods' folders, and the
//! next agent takes it up from there.

pub mod command;
pub mod container;
pub mod files;
pub mod images;
pub mod machine;
pub mod probes;
pub mod record;
pub mod register;
pub mod status;
pub mod volumes;
pub mod worker;

use container::Kept;
use images::Images;
use jiff::SignedDuration;
use k8s_openapi::api::core::v1::{Node, Pod, Taint};
use kube::runtime::watcher;
use kube::{Api, Client, ResourceExt};
use reconcile::events::Recorder;
use reconcile::kept::Keeper;
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio::task::JoinSet;
use uuid::Uuid;
use volumes::HostPaths;
use worker::{Shared, Wish};

/// Annotation of a pod that only tells of something that runs elsewhere, as static pods have it.
pub const MIRROR: &str = "kubernetes.io/config.mirror";
/// What has not ended this long after it was killed is stuck in the kernel, and is left.
const STUCK: Duration = Duration::from_secs(10);

/// A node.
#[derive(Debug, Clone)]
pub struct Config {
    /// Its name.
    pub name: String,
    /// Its address.
    pub address: String,
    /// Labels besides those that every node has.
    pub labels: BTreeMap<String, String>,
    /// Its taints.
    pub taints: Vec<Taint>,
    /// Extended resources, by name.
    pub extended: BTreeMap<String, String>,
    /// Bytes for volumes of its own.
    pub pool: i64,
    /// What it can run.
    pub images: Images,
    /// What pods may see of the machine.
    pub host_paths: HostPaths,
    /// Variables that every container has.
    pub environment: Vec<(String, String)>,
    /// The folder of its pods.
    pub folder: PathBuf,
    /// The program that supervises containers: see [`crate::supervise`].
    pub supervisor: PathBuf,
    /// How long containers may take to end when the node does.
    pub leaving: SignedDuration,
}

/// What the agent is to do when it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// Nothing yet: it runs.
    Not,
    /// End all that runs.
    WithPods,
    /// Let all that runs go on, for the next agent.
    WithoutPods,
}

/// The address of a pod: one of the machine's own, and by its uid another for each.
pub fn pod_address(uid: &str) -> String {
    let hash = Uuid::new_v5(&Uuid::NAMESPACE_OID, uid.as_bytes());
    let [a, b, c, ..] = *hash.as_bytes();
    // Neither 127.0.0.x, which others use, nor an address that ends in 0 or 255.
    format!("127.{}.{b}.{}", 16 + a % 224, 1 + c % 254)
}

/// Runs the agent of a node, as it was registered (see [`register`]), until it is told to end.
pub async fn run(client: Client, config: Config, node: Node, mut ending: watch::Receiver<Ending>) {
    let (config, node) = (Arc::new(config), Arc::new(node));
    let events = Recorder::new(client.clone(), "kubelet", Some(&config.name));
    let mut keeper = Keeper::default();
    let mine = watcher::Config::default().fields(&format!("spec.nodeName={}", config.name));
    let pods = keeper.keep(Api::<Pod>::all(client.clone()), mine);
    let mut beats = JoinSet::new();
    beats.spawn({
        let (client, config) = (client.clone(), Arc::clone(&config));
        async move { register::beat(client, &config).await }
    });
    let shared = Shared { client, config, node, events };
    let mut agent = Agent { shared, workers: HashMap::new(), tasks: JoinSet::new() };
    // Its first list tells which pods of its folders are gone; it waits for as long as it takes.
    let listed = tokio::select! {
        listed = pods.wait_until_ready() => listed.is_ok(),
        _ = ending.wait_for(|ending| *ending != Ending::Not) => false,
    };
    if listed {
        agent.find_left_over(&pods.state());
    }
    let how = loop {
        let now = *ending.borrow();
        if now != Ending::Not || !listed {
            break now;
        }
        agent.give_out(&pods.state());
        tokio::select! {
            () = keeper.bell.notified() => {}
            Some(_) = agent.tasks.join_next() => {}
            changed = ending.changed() => if changed.is_err() { break Ending::WithoutPods },
        }
    };
    if how == Ending::WithPods {
        agent.end().await;
    }
}

/// Ends all containers of a node whose agent is gone, and has left them running: at once those that
/// have not ended in the time they get. Returns how many there were.
///
/// # Errors
/// When a container's record cannot be read or written.
pub async fn end_left_over(node: &Path, leaving: Duration) -> io::Result<usize> {
    let below = |folder: &Path| -> Vec<PathBuf> {
        std::fs::read_dir(folder).into_iter().flatten().flatten().map(|e| e.path()).collect()
    };
    let pods = below(&node.join("pods"));
    let containers = pods.iter().flat_map(|pod| below(&pod.join("containers")));
    let mut running: Vec<Kept> =
        containers.map(|folder| Kept::new(folder, Arc::default())).collect();
    let began = Instant::now();
    let mut found = None;
    loop {
        let mut left = Vec::new();
        for mut kept in running {
            if kept.see()?.runs() {
                left.push(kept);
            }
        }
        let count = *found.get_or_insert(left.len());
        let late = began.elapsed() >= leaving;
        if left.is_empty() || began.elapsed() >= leaving + STUCK {
            return Ok(count);
        }
        for kept in &mut left {
            match kept.asked {
                _ if late => kept.signal(true),
                None => kept.ask(),
                Some(_) => {}
            }
        }
        running = left;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

struct Agent {
    shared: Shared,
    /// By uid.
    workers: HashMap<String, watch::Sender<Wish>>,
    tasks: JoinSet<()>,
}

impl Agent {
    fn pods_folder(&self) -> PathBuf {
        self.shared.config.folder.join("pods")
    }

    fn spawn(&mut self, uid: &str, wish: Wish) {
        let (send, wishes) = watch::channel(wish);
        self.workers.insert(uid.to_owned(), send);
        let (shared, folder) = (self.shared.clone(), self.pods_folder().join(uid));
        let uid = uid.to_owned();
        self.tasks.spawn(async move { worker::run(shared, folder, &uid, wishes).await });
    }

    /// Looks after what is left of pods that went while no agent was there.
    fn find_left_over(&mut self, pods: &[Arc<Pod>]) {
        let is_known = |uid: &String| pods.iter().any(|p| p.metadata.uid.as_ref() == Some(uid));
        let entries = std::fs::read_dir(self.pods_folder()).into_iter().flatten().flatten();
        let uids: Vec<String> = entries
            .filter(|entry| worker::owner(&entry.path()).is_some())
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|uid| !is_known(uid))
            .collect();
        for uid in uids {
            self.spawn(&uid, Wish::Gone);
        }
    }

    /// Tells every worker what has become of its pod, and makes those that lack.
    fn give_out(&mut self, pods: &[Arc<Pod>]) {
        self.workers.retain(|_, worker| !worker.is_closed());
        let uid = |pod: &Pod| pod.metadata.uid.clone().unwrap_or_default();
        // Records of what runs elsewhere are nobody's to run.
        let runs = |pod: &&Arc<Pod>| !pod.annotations().contains_key(MIRROR);
        let known: HashMap<String, &Arc<Pod>> =
            pods.iter().filter(runs).map(|pod| (uid(pod), pod)).collect();
        for (uid, worker) in &self.workers {
            let wish = known.get(uid).map_or(Wish::Gone, |pod| Wish::Pod(Arc::clone(pod)));
            worker.send_if_modified(|now| {
                let same = match (&*now, &wish) {
                    (Wish::Pod(now), Wish::Pod(new)) => {
                        now.metadata.resource_version == new.metadata.resource_version
                    }
                    (Wish::Gone, Wish::Gone) => true,
                    _ => false,
                };
                *now = wish;
                !same
            });
        }
        for (uid, pod) in known {
            if !self.workers.contains_key(&uid) {
                self.spawn(&uid, Wish::Pod(Arc::clone(pod)));
            }
        }
    }

    /// Ends all that runs.
    async fn end(&mut self) {
        for worker in self.workers.values() {
            worker.send_replace(Wish::Leave);
        }
        // Each ends what runs by force after a while; what is stuck even so is left.
        let leaving = Duration::try_from(self.shared.config.leaving).unwrap_or_default();
        let all = async { while self.tasks.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(leaving + STUCK, all).await;
    }
}
