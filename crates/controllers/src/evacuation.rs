//! Guests that are to leave their nodes: migrations are made until they have.
//!
//! ```text
//! eviction of the pod --> VMI's status.evacuationNodeName --+
//! taint of the node ----------------------------------------+--> EvictionRequested, and a migration
//!                                                                  |  failed: another, after a wait
//!                                                                  v
//!                                                  the guest is elsewhere: nothing is asked for
//! ```
//!
//! When a migration begins, and after how long a wait, decides [`crate::migration`].

mod plan;

use crate::AT_ONCE;
use crate::vm::ignore_gone;
use crate::world::{Key, World, get, key};
use api::eviction::is_drained;
use api::migration::VirtualMachineInstanceMigration as Migration;
use api::vmi::VirtualMachineInstance;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::ResourceExt;
use kube::api::{Patch, PatchParams};
use kube::runtime::reflector::ObjectRef;
use plan::{Action, Snapshot};
use reconcile::kept::reference;
use reconcile::queue::Next;
use serde_json::json;
use std::sync::Arc;

/// Runs the reconciler. Never ends by itself.
pub async fn run(world: World) {
    let queue = world.evacuation_queue.clone();
    queue.run(AT_ONCE, move |key| reconcile(world.clone(), key)).await;
}

async fn reconcile(world: World, key: Key) -> Next {
    let (world, key) = (&world, &key);
    let Some(vmi) = get(&world.vmis, key) else { return Next::Rest };
    let snapshot = look(world, key, vmi);
    for action in plan::plan(&snapshot) {
        if let Err(error) = act(world, &snapshot, &action).await {
            return world.failed(&*snapshot.vmi, &action, "FailedCreate", &error).await;
        }
    }
    Next::Rest
}

fn look(world: &World, key: &Key, vmi: Arc<VirtualMachineInstance>) -> Snapshot {
    let cluster = world.cluster().map(|cluster| cluster.spec.clone()).unwrap_or_default();
    let node = vmi.status.as_ref().and_then(|status| status.node_name.clone());
    let node = node.and_then(|name| world.nodes.get(&ObjectRef::<Node>::new(&name)));
    Snapshot {
        drained: node.is_some_and(|node| is_drained(&node, &cluster)),
        moving: world.moves_of(key).iter().any(|migration| !migration.is_over()),
        pods: world.pods_of(&vmi.uid().unwrap_or_default()),
        owner: get(&world.owners, key),
        now: Timestamp::now(),
        cluster,
        vmi,
    }
}

async fn act(world: &World, snapshot: &Snapshot, action: &Action) -> kube::Result<()> {
    let vmi = &snapshot.vmi;
    let (namespace, name) = key(&**vmi);
    let vmis = world.api::<VirtualMachineInstance>(&namespace);
    let version = vmi.resource_version();
    match action {
        Action::PatchStatus(status) => {
            let patch = json!({"metadata": {"resourceVersion": version}, "status": status});
            let patch = Patch::Merge(&patch);
            ignore_gone(vmis.patch_status(&name, &PatchParams::default(), &patch).await)
        }
        Action::Annotate(annotations) => {
            let patch = json!({"metadata": {"annotations": annotations}});
            let patch = Patch::Merge(&patch);
            ignore_gone(vmis.patch(&name, &PatchParams::default(), &patch).await)
        }
        Action::AnnotatePod { pod, annotations } => {
            let patch = json!({"metadata": {"annotations": annotations}});
            let patch = Patch::Merge(&patch);
            let pods = world.api::<Pod>(&namespace);
            ignore_gone(pods.patch(pod, &PatchParams::default(), &patch).await)
        }
        Action::Migrate(migration) => migrate(world, vmi, migration).await,
    }
}

/// Makes a migration, if its VMI is still as it was seen: a guest that has just come elsewhere, or
/// may stay again, is not moved.
async fn migrate(
    world: &World,
    vmi: &VirtualMachineInstance,
    migration: &Migration,
) -> kube::Result<()> {
    let (namespace, name) = key(vmi);
    let now = world.api::<VirtualMachineInstance>(&namespace).get_opt(&name).await?;
    let place = |vmi: &VirtualMachineInstance| {
        let status = vmi.status.clone().unwrap_or_default();
        (vmi.uid(), status.node_name, status.evacuation_node_name)
    };
    if now.as_ref().map(place) != Some(place(vmi)) {
        return Ok(());
    }
    world.migrate(&namespace, migration, &reference(vmi)).await
}
