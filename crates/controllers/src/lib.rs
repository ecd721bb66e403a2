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
pub mod components;
pub mod datavolume;
pub mod evacuation;
pub mod migration;
pub mod settings;
pub mod synchronizer;
pub mod vm;
pub mod vmi;
pub mod workload;
pub mod world;

pub use vmi::pod::FOLDERS;

use kube::Client;
use tokio::task::JoinSet;

/// The image in which all roles are, unless another is named.
pub const IMAGE: &str = "godwit.dev/godwit";
/// Godwit's version.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Objects that one reconciler looks at the same time.
const AT_ONCE: usize = 8;

/// An image as statuses tell it: a tag or a digest says its version; without one it has the version
/// of whoever made a pod of it.
fn versioned(image: &str, version: Option<&str>) -> String {
    let name = image.rsplit('/').next().unwrap_or_default();
    match version {
        Some(version) if !name.contains([':', '@']) => format!("{image}:v{version}"),
        _ => image.to_owned(),
    }
}

/// Runs all of them; pods that they make are of an image. Never ends by itself.
pub async fn run(client: Client, image: &str) {
    let (world, mut keeper) = world::World::open(client, image);
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

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_tag_or_a_digest_says_an_images_version() {
        let of = |image| versioned(image, Some("1.2.3"));
        assert_eq!(of("godwit.dev/godwit"), "godwit.dev/godwit:v1.2.3");
        assert_eq!(of("localhost:5000/godwit"), "localhost:5000/godwit:v1.2.3");
        for whole in ["example.org/godwit:1", "example.org/godwit@sha256:00"] {
            assert_eq!(of(whole), whole);
        }
        assert_eq!(versioned(IMAGE, None), IMAGE);
    }
}
