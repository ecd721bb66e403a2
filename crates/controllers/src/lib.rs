//! Reconcilers. Each: snapshot -> plan (pure) -> act.
//!
//! ```text
//! VirtualMachine  --(vm)-->  VirtualMachineInstance --(vmi)--> launcher's pod, OwnerRecord
//!        |                          ^
//!        |                          +--(migration)--> target's pod
//!        |                          +--(evacuation, workload)--> migrations
//!        +--(vm)--> DataVolume --(datavolume)--> claim, importer's pod
//! ```
//!
//! All are clients of the API: in an embedded cluster they are in its process, on another they are
//! a Deployment.

pub mod certificates;
pub mod datavolume;
pub mod evacuation;
pub mod migration;
pub mod settings;
pub mod vm;
pub mod vmi;
pub mod workload;
pub mod world;

use kube::Client;
use tokio::task::JoinSet;

/// The image in which all roles are.
pub const IMAGE: &str = "godwit.dev/godwit";
/// Godwit's version.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Objects that one reconciler looks at the same time.
const AT_ONCE: usize = 8;

/// Runs all of them. Never ends by itself.
pub async fn run(client: Client) {
    let (world, mut keeper) = world::World::open(client);
    world.wait().await;
    let mut tasks = JoinSet::new();
    tasks.spawn(vm::run(world.clone()));
    tasks.spawn(vmi::run(world.clone()));
    tasks.spawn(datavolume::run(world.clone()));
    tasks.spawn(migration::run(world.clone()));
    tasks.spawn(evacuation::run(world.clone()));
    tasks.spawn(workload::run(world.clone()));
    tasks.spawn(settings::run(world));
    let _keeper = &mut keeper;
    while tasks.join_next().await.is_some() {}
}
