//! The link between clusters.
//!
//! ```text
//!  east                                               west
//!  VMIM, VMI -- halves --> synchronizer ==TLS 1.3==> synchronizer --> VMIM's status.peer
//!  handler --- "the other end's record" --> |           |--> owner record, by compare-and-swap
//! ```
//!
//! Each side of a migration between two VMIs tells the other its [half](api::migration::Half), and
//! hears the other's in the same breath: whoever asks waits until there is news ([`wire`]). A side
//! writes nothing of the other cluster's but what it was told, into the one place that is for it, and
//! only of a migration that both name. What a half says is a pure function of objects ([`halves`]).
//!
//! It also carries questions to the owner record at the other end ([`records`]), which handlers ask
//! through their own synchronizer ([`link`]). It keeps nothing in memory that matters.

pub mod ground;
pub mod halves;
pub mod join;
pub mod link;
mod links;
pub mod passage;
mod place;
mod recall;
pub mod records;
mod relocation;
mod serve;
mod tell;
pub mod wire;
mod world;

use channel::identity::{Credentials, Role};
use ground::Ground;
use kube::Client;
use place::Place;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinSet;
use world::World;

/// The instance in a synchronizer's certificate: there is one of a cluster at a time.
pub const INSTANCE: &str = "synchronizer";
/// The role that a synchronizer's certificate has.
pub const ROLE: Role = Role::Synchronizer;
/// A port that cannot be had is tried again after this.
const AGAIN: Duration = Duration::from_secs(2);

/// Where others find a synchronizer.
#[derive(Debug, Clone)]
pub enum Advertise {
    /// Where it listens.
    Here,
    /// At this `host:port`.
    At(String),
    /// Where this Service of its namespace is: its load balancer's address if it has one, else its own.
    Service(String),
}

/// How a synchronizer is run.
pub struct Config {
    /// Where it listens.
    pub address: IpAddr,
    /// Where it listens in networks for migrations, by their names.
    pub networks: BTreeMap<String, IpAddr>,
    /// Where the port is written down that it has, so that it has it again: then one that is taken is no
    /// reason not to listen. None: the port is the settings', and no other.
    pub remembered: Option<PathBuf>,
    /// Where others find it.
    pub advertise: Advertise,
    /// Who it is and whom it believes, as they are renewed.
    pub credentials: watch::Receiver<Credentials>,
    /// The rest of the cluster.
    pub ground: Arc<dyn Ground>,
}

/// Runs a synchronizer, as long as the settings want one. Never ends by itself.
pub async fn run(client: Client, config: Config) {
    let (world, _keeper) = World::open(client, &config);
    let world = Arc::new(world);
    world.ready().await;
    let mut changes = world.changes.clone();
    loop {
        changes.borrow_and_update();
        let Some(wanted) = world.wanted() else {
            world.publish(None).await;
            // Its sender lives as long as the watches do.
            drop(changes.changed().await);
            continue;
        };
        let Place { listener, bound } = match place::take(&config, &wanted).await {
            Ok(place) => place,
            Err(why) => {
                tracing::warn!("the synchronizer does not listen: {why}");
                tokio::time::sleep(AGAIN).await;
                continue;
            }
        };
        tracing::info!(address = %bound, "the synchronizer listens");
        let mut tasks = JoinSet::new();
        tasks.spawn(serve::run(Arc::clone(&world), listener));
        tasks.spawn(tell::run(Arc::clone(&world)));
        tasks.spawn(links::run(Arc::clone(&world)));
        tasks.spawn(relocation::run(Arc::clone(&world)));
        tasks.spawn(recall::run(Arc::clone(&world)));
        loop {
            changes.borrow_and_update();
            if world.wanted().as_ref() != Some(&wanted) {
                break;
            }
            match place::advertised(&config.advertise, world.service().as_deref(), bound) {
                Ok(address) => {
                    world.be_at(&address);
                    world.publish(Some(&address)).await;
                }
                Err(why) => tracing::warn!("nobody is told where the synchronizer is: {why}"),
            }
            drop(changes.changed().await);
        }
        tracing::info!(address = %bound, "the synchronizer does not listen there any more");
    }
}
