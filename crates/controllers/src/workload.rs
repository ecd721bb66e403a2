//! Guests in launchers of another version of Godwit get new ones, as the cluster's settings want it
//! (`workloadUpdateStrategy`): those that can move do, and others are evicted batch by batch.

mod plan;

use crate::vm::ignore_gone;
use crate::world::{Key, World, get, key};
use crate::{VERSION, versioned};
use api::conditions::{self, types};
use api::eviction::Strategy;
use api::keys;
use api::kubevirt::KubeVirt;
use api::migration::PER_CLUSTER;
use api::vmi::{Phase, VirtualMachineInstance};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use kube::api::{EvictParams, Patch, PatchParams};
use plan::{Guest, Plan, Snapshot};
use reconcile::events::{Kind, why};
use reconcile::kept::reference;
use reconcile::queue::Next;
use serde_json::json;
use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Changes that come within this time are looked at together.
const GATHER: Duration = Duration::from_secs(1);

/// When guests were last evicted.
type Last = Arc<Mutex<Option<Timestamp>>>;

/// Runs the reconciler. Never ends by itself.
pub async fn run(world: World) {
    let (queue, last) = (world.workload_queue.clone(), Last::default());
    queue
        .run(1, move |()| {
            let (world, last) = (world.clone(), Arc::clone(&last));
            async move {
                let next = match reconcile(&world, &last).await {
                    Ok(next) => next,
                    Err(error) => {
                        tracing::warn!("launchers cannot be renewed: {}", why(&error));
                        Next::Failed
                    }
                };
                // All guests were looked at; each change of each of them rings.
                tokio::time::sleep(GATHER).await;
                next
            }
        })
        .await;
}

async fn reconcile(world: &World, last: &Last) -> kube::Result<Next> {
    let Some(cluster) = world.cluster() else { return Ok(Next::Rest) };
    let lock = || last.lock().unwrap_or_else(PoisonError::into_inner);
    let plan = plan::plan(&look(world, &cluster, *lock()));
    count(world, &cluster, plan.outdated).await?;
    for (guest, is_outdated) in &plan.labels {
        let patch = json!({"metadata": {"labels": {keys::OUTDATED: is_outdated.then_some("")}}});
        let vmis = world.api::<VirtualMachineInstance>(&guest.0);
        let patch = Patch::Merge(&patch);
        ignore_gone(vmis.patch(&guest.1, &PatchParams::default(), &patch).await)?;
    }
    for guest in &plan.migrate {
        migrate(world, guest).await?;
    }
    if !plan.evict.is_empty() {
        *lock() = Some(Timestamp::now());
    }
    for guest in &plan.evict {
        evict(world, guest).await?;
    }
    Ok(next(&plan))
}

fn next(plan: &Plan) -> Next {
    match plan.again {
        Some(pause) => Next::After(pause),
        None => Next::Rest,
    }
}

fn look(world: &World, cluster: &KubeVirt, last: Option<Timestamp>) -> Snapshot {
    let migrations = world.migrations.state();
    let moving: HashSet<Key> = migrations
        .iter()
        .filter(|m| !m.is_over())
        .map(|m| (m.namespace().unwrap_or_default(), m.spec.vmi_name.clone()))
        .collect();
    let ours = versioned(&world.image, Some(VERSION));
    let guest = |vmi: Arc<VirtualMachineInstance>| {
        let status = vmi.status.clone().unwrap_or_default();
        let lives = status.phase == Phase::Running && vmi.metadata.deletion_timestamp.is_none();
        let strategy = Strategy::of(&vmi.parse().unwrap_or_default(), &cluster.spec);
        lives.then(|| Guest {
            is_outdated: status.launcher_container_image_version.is_some_and(|own| own != ours),
            is_labelled: vmi.labels().contains_key(keys::OUTDATED),
            can_move: conditions::is(&status.conditions, types::LIVE_MIGRATABLE),
            // What is evicted is moved all the same, or stays.
            moves_only: strategy == Strategy::LiveMigrate,
            moves: moving.contains(&key(&*vmi)),
            key: key(&*vmi),
        })
    };
    let limit = cluster.spec.configuration.migrations.parallel_migrations_per_cluster;
    Snapshot {
        guests: world.vmis.state().into_iter().filter_map(guest).collect(),
        strategy: cluster.spec.workload_update_strategy.clone(),
        places: (limit.unwrap_or(PER_CLUSTER) as usize).saturating_sub(moving.len()),
        last,
        now: Timestamp::now(),
    }
}

/// Says in the cluster's settings how many are outdated.
async fn count(world: &World, cluster: &KubeVirt, outdated: usize) -> kube::Result<()> {
    let outdated = i64::try_from(outdated).unwrap_or(i64::MAX);
    let said = cluster.status.as_ref();
    if said.and_then(|status| status.outdated_virtual_machine_instance_workloads) == Some(outdated)
    {
        return Ok(());
    }
    let (namespace, name) = key(cluster);
    let patch = json!({"status": {"outdatedVirtualMachineInstanceWorkloads": outdated}});
    let settings = world.api::<KubeVirt>(&namespace);
    ignore_gone(settings.patch_status(&name, &PatchParams::default(), &Patch::Merge(&patch)).await)
}

async fn migrate(world: &World, guest: &Key) -> kube::Result<()> {
    let Some(vmi) = get(&world.vmis, guest) else { return Ok(()) };
    match world.migrate(&guest.0, &plan::renewing(guest), &reference(&*vmi)).await {
        // Another has begun to move it, or it cannot any more.
        Err(kube::Error::Api(status)) if status.code == 422 => Ok(()),
        made => made,
    }
}

/// Asks that a guest's pod may go: its VM begins it anew.
async fn evict(world: &World, guest: &Key) -> kube::Result<()> {
    let Some(vmi) = get(&world.vmis, guest) else { return Ok(()) };
    let record = get(&world.owners, guest);
    let Some(pod) = record.and_then(|record| record.status.clone()?.pod) else { return Ok(()) };
    let about = reference(&*vmi);
    let asked = world.api::<Pod>(&guest.0).evict(&pod, &EvictParams::default()).await;
    match asked {
        Ok(_) => {
            let message = format!("Evicted pod {pod} for automated workload update");
            world.events.say(&about, Kind::Normal, "SuccessfulDelete", &message).await;
        }
        Err(kube::Error::Api(status)) if status.code == 404 => {}
        Err(kube::Error::Api(status)) if status.code == 429 => {
            world.events.say(&about, Kind::Warning, "FailedEvict", &status.message).await;
        }
        Err(error) => return Err(error),
    }
    Ok(())
}
