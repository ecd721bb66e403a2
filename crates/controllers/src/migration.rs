//! VirtualMachineInstanceMigration: its turn, its target's pod, and what becomes of it.
//!
//! ```text
//! Pending --turn--> Scheduling --pod ready--> Scheduled --> PreparingTarget --> TargetReady --> Running
//!                    (the target's pod)         | VMI's migrationState: from here on handlers and
//!                                               v launchers have it, and tell of it there
//! ```
//!
//! Who runs the guest says the owner record: a target's pod goes only when the guest cannot be its.

mod backoff;
mod disks;
mod ending;
mod halves;
#[cfg(test)]
mod laws;
mod plan;
mod policy;
pub mod preflight;
mod turn;

pub(crate) use disks::left_by;

use crate::AT_ONCE;
use crate::vm::ignore_gone;
use crate::vmi::is_lent;
use crate::world::{Key, World, get, key, refusal};
use api::conditions::{self, Condition};
use api::datavolume::Phase as Making;
use api::kubevirt::{Configuration, KubeVirt};
use api::migration::{Phase, Side, VirtualMachineInstanceMigration as Migration};
use api::owner::OwnerRecord;
use api::vmi::VirtualMachineInstance;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Node, PersistentVolumeClaim, Pod};
use kube::ResourceExt;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use kube::runtime::reflector::ObjectRef;
use plan::{Action, Snapshot};
use reconcile::events::{Kind, why};
use reconcile::kept::reference;
use reconcile::queue::Next;
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A quota that is full is tried again after this.
const QUOTA: Duration = Duration::from_secs(5);

/// Uids of migrations that were let in and are not seen to be yet.
type Admitted = Arc<Mutex<HashSet<String>>>;
/// The last heartbeats of nodes' handlers, and since when they are seen: clocks of two machines are
/// never compared.
type Beats = Arc<Mutex<HashMap<String, (String, Instant)>>>;

/// What is kept between one look and the next.
#[derive(Clone, Default)]
struct Kept {
    admitted: Admitted,
    beats: Beats,
    lately: Arc<preflight::Lately>,
}

/// Runs the reconciler. Never ends by itself.
pub async fn run(world: World) {
    let queue = world.migration_queue.clone();
    let kept = Kept::default();
    queue
        .run(AT_ONCE, move |key| {
            let (world, kept) = (world.clone(), kept.clone());
            async move { reconcile(&world, &kept, &key).await }
        })
        .await;
}

async fn reconcile(world: &World, kept: &Kept, key: &Key) -> Next {
    let Some(migration) = get(&world.migrations, key) else {
        ring_waiting(world);
        return Next::Rest;
    };
    let mut snapshot = look(world, kept, migration);
    if snapshot.begins() {
        snapshot.faults = faults(world, &kept.lately, &snapshot).await;
    }
    let plan = plan::plan(&snapshot);
    for action in &plan.actions {
        if let Err(error) = act(world, &snapshot, action).await {
            return went_wrong(world, &snapshot, action, &error).await;
        }
    }
    if snapshot.migration.is_over() {
        ring_waiting(world);
    }
    match plan.again {
        Some(pause) => Next::After(pause),
        None => Next::Rest,
    }
}

/// A place may be free for those that wait.
fn ring_waiting(world: &World) {
    let waits = |m: &&Arc<Migration>| m.phase() <= Phase::Pending;
    world
        .migrations
        .state()
        .iter()
        .filter(waits)
        .for_each(|m| world.migration_queue.ring(key(&**m)));
}

async fn went_wrong(
    world: &World,
    snapshot: &Snapshot,
    action: &Action,
    error: &kube::Error,
) -> Next {
    let is_quota =
        matches!(error, kube::Error::Api(s) if s.code == 403 && s.message.contains("quota"));
    if is_quota {
        let text = why(error);
        let (namespace, name) = key(&*snapshot.migration);
        let full = Condition::new(plan::QUOTA, true, "ExceededQuota", &text);
        let old = snapshot.migration.status.as_ref().map(|s| s.conditions.clone());
        let mut told = snapshot.foretold();
        told.push(full);
        let merged = conditions::merge(&old.unwrap_or_default(), told, &[], snapshot.now);
        let patch = json!({"status": {"phase": "Pending", "conditions": merged}});
        let migrations = world.api::<Migration>(&namespace);
        let patched =
            migrations.patch_status(&name, &PatchParams::default(), &Patch::Merge(&patch)).await;
        if let Err(error) = patched {
            tracing::warn!("the condition of migration {name} cannot be written: {}", why(&error));
        }
        return Next::After(QUOTA);
    }
    world.failed(&*snapshot.migration, action, "FailedCreate", error).await
}

fn look(world: &World, kept: &Kept, migration: Arc<Migration>) -> Snapshot {
    let namespace = migration.namespace().unwrap_or_default();
    let of_vmi = (namespace.clone(), migration.spec.vmi_name.clone());
    let vmi = get(&world.vmis, &of_vmi);
    let cluster = world.cluster();
    let configuration = cluster.as_ref().map(|c| c.spec.configuration.clone()).unwrap_or_default();
    let spec = vmi.as_ref().and_then(|vmi| vmi.parse().ok()).unwrap_or_default();
    let found = vmi.as_ref().and_then(|vmi| vmi.status.as_ref());
    let moves = found.map(|status| status.migrated_volumes.clone()).unwrap_or_default();
    let mut to: Vec<String> = moves.into_iter().map(|moved| moved.destination.claim_name).collect();
    if migration.spec.half().is_some_and(|(side, _)| side == Side::Target) {
        // Its own disks are those to which the guest comes.
        to.extend(spec.claims().into_values());
    }
    let unmade = unmade(world, &namespace, &to);
    let claims = spec.claims().into_values().chain(to).filter_map(|name| {
        let claim = get(&world.claims, &(namespace.clone(), name.clone()))?;
        Some((name, claim))
    });
    let uid = vmi.as_ref().and_then(|vmi| vmi.uid()).unwrap_or_default();
    let now = Timestamp::now();
    // N.B. all migrations are looked at for that: not for those that have had their turn.
    let (turn, backoff) = match migration.phase() <= Phase::Pending {
        true => may_begin(world, &kept.admitted, &migration, vmi.as_deref(), cluster.as_deref()),
        false => (Ok(()), None),
    };
    Snapshot {
        claims: claims.collect(),
        left: left(world, &of_vmi),
        unmade,
        pods: world.pods_of(&uid),
        owner: get(&world.owners, &of_vmi),
        turn,
        backoff,
        options: options(world, &namespace, vmi.as_deref(), cluster.as_deref()),
        processor: processor(
            node(world, vmi.as_deref()).as_deref(),
            vmi.as_deref(),
            &configuration,
        ),
        emulated: configuration.developer_configuration.use_emulation,
        faults: None,
        heard: heard(world, &kept.beats, vmi.as_deref(), now),
        later: if migration.is_over() { later(world, &migration) } else { 0 },
        addresses: cluster
            .as_ref()
            .and_then(|cluster| cluster.status.as_ref())
            .map(|status| status.synchronization_addresses.clone())
            .unwrap_or_default(),
        now,
        vmi,
        migration,
    }
}

/// All that would make a migration fail, if that can be looked at.
async fn faults(
    world: &World,
    lately: &preflight::Lately,
    snapshot: &Snapshot,
) -> Option<Vec<preflight::Fault>> {
    let vmi = snapshot.vmi.as_deref()?.clone();
    let selector = snapshot.migration.spec.added_node_selector.clone();
    let disks = match snapshot.is_volume_update() {
        true => preflight::Disks::Named,
        false => preflight::Disks::Follow,
    };
    let settings = world.cluster().map(|c| c.spec.configuration.clone()).unwrap_or_default();
    match preflight::gather(&world.client, lately, vmi, selector, disks, settings).await {
        Ok(mut facts) => {
            facts.migrations.retain(|other| other.uid() != snapshot.migration.uid());
            Some(preflight::check(&facts).faults)
        }
        Err(error) => {
            let name = snapshot.migration.name_any();
            tracing::warn!("migration {name} begins without a preflight: {}", why(&error));
            None
        }
    }
}

/// The claims that are or were disks of a VMI that has moved.
fn left(world: &World, (namespace, name): &Key) -> Vec<Arc<PersistentVolumeClaim>> {
    let mut all = world.claims.state();
    all.retain(|claim| {
        claim.namespace().as_ref() == Some(namespace) && disks::is_left_by(claim, name)
    });
    all
}

/// Whether one of these disks is being made, and waits for its first consumer.
fn unmade(world: &World, namespace: &str, claims: &[String]) -> Option<bool> {
    let phases = claims.iter().filter_map(|name| {
        let volume = get(&world.volumes, &(namespace.to_owned(), name.clone()))?;
        Some(volume.status.as_ref().map(|status| status.phase).unwrap_or_default())
    });
    let phases: Vec<_> = phases.filter(|phase| *phase != Making::Succeeded).collect();
    (!phases.is_empty()).then(|| phases.contains(&Making::WaitForFirstConsumer))
}

fn options(
    world: &World,
    namespace: &str,
    vmi: Option<&VirtualMachineInstance>,
    cluster: Option<&KubeVirt>,
) -> (Option<String>, api::migration::Options) {
    let of_namespace = world.namespaces.get(&ObjectRef::new(namespace));
    let labels = of_namespace.map(|namespace| namespace.labels().clone()).unwrap_or_default();
    let of_vmi = vmi.map(|vmi| vmi.labels().clone()).unwrap_or_default();
    let policies = world.policies.state();
    let of_cluster = cluster.map(|c| c.spec.configuration.migrations.clone()).unwrap_or_default();
    policy::resolve(policies.iter().map(|policy| &**policy), &labels, &of_vmi, &of_cluster)
}

/// The node that runs the guest.
fn node(world: &World, vmi: Option<&VirtualMachineInstance>) -> Option<Arc<Node>> {
    let name = vmi?.status.as_ref()?.node_name.as_deref()?;
    world.nodes.get(&ObjectRef::<Node>::new(name))
}

/// What the target's node must have, by what the guest's processor really is; `node` runs it.
fn processor(
    node: Option<&Node>,
    vmi: Option<&VirtualMachineInstance>,
    configuration: &Configuration,
) -> BTreeMap<String, String> {
    let wanted =
        |vmi| api::processor::wanted_for(vmi, configuration, node.map(|node| node.labels()));
    vmi.map(wanted).unwrap_or_default()
}

/// Whether a migration may begin, or why not; and until when it waits because others failed.
fn may_begin(
    world: &World,
    admitted: &Admitted,
    migration: &Migration,
    vmi: Option<&VirtualMachineInstance>,
    cluster: Option<&KubeVirt>,
) -> (Result<(), String>, Option<Timestamp>) {
    let all = world.migrations.state();
    let held = backoff::held_back(all.iter().map(|m| &**m), Timestamp::now());
    let backoff = migration.uid().and_then(|uid| held.get(&uid).copied());
    let turn = match (backoff, vmi.and_then(plan::not_yet)) {
        (Some(until), _) => Err(format!("it waits until {until}, since the one before it failed")),
        (None, _) if migration.spec.half().is_some() && migration.phase() < Phase::Pending => {
            Err("it waits for its other side".into())
        }
        (None, Some(why)) if !is_let_in(admitted, migration) => Err(why.into()),
        (None, _) => turn_of(world, admitted, migration, &all, &held, cluster),
    };
    (turn, backoff)
}

/// Whether a migration has its turn, though that cannot be seen yet.
fn is_let_in(admitted: &Admitted, migration: &Migration) -> bool {
    let admitted = admitted.lock().unwrap_or_else(PoisonError::into_inner);
    migration.uid().is_some_and(|uid| admitted.contains(&uid))
}

fn turn_of(
    world: &World,
    admitted: &Admitted,
    migration: &Migration,
    all: &[Arc<Migration>],
    held: &HashMap<String, Timestamp>,
    cluster: Option<&KubeVirt>,
) -> Result<(), String> {
    // N.B. one at a time: two that are let in at once know of each other.
    let mut admitted = admitted.lock().unwrap_or_else(PoisonError::into_inner);
    let uids: HashSet<String> = all.iter().filter_map(|m| m.uid()).collect();
    admitted.retain(|uid| uids.contains(uid));
    // N.B. one that was let in has a second pod already, which is its own.
    let let_in = admitted.clone();
    let one = |m: &Arc<Migration>| {
        let status = m.status.as_ref();
        let uid = m.uid().unwrap_or_default();
        let seen = status.map(|status| status.phase).unwrap_or_default();
        if seen > Phase::Pending {
            admitted.remove(&uid);
        }
        let vmi = get(&world.vmis, &(m.namespace().unwrap_or_default(), m.spec.vmi_name.clone()));
        let of_vmi = vmi.as_ref().and_then(|vmi| vmi.status.as_ref());
        let moves =
            of_vmi.and_then(|s| s.migration_state.as_ref()).filter(|_| seen.is_handed_off());
        let node = moves.map_or_else(|| of_vmi?.node_name.clone(), |s| s.source_node.clone());
        // One that is received leaves no node of ours.
        let receives = m.spec.half().is_some_and(|(side, _)| side == Side::Target);
        let node = if receives { Some(uid.clone()) } else { node };
        turn::One {
            phase: if admitted.contains(&uid) { Phase::Scheduling } else { seen },
            weight: turn::weight(m.spec.priority.as_deref()),
            made: m.creation_timestamp().map(|at| at.0.as_second()).unwrap_or_default(),
            node: node.unwrap_or_default(),
            uid,
        }
    };
    // Nobody waits for those that may not begin.
    let vmi_of = |m: &Migration| {
        get(&world.vmis, &(m.namespace().unwrap_or_default(), m.spec.vmi_name.clone()))
    };
    let waits = |m: &Migration| {
        m.phase() <= Phase::Pending
            && !m.uid().is_some_and(|uid| let_in.contains(&uid))
            && vmi_of(m).is_none_or(|vmi| plan::not_yet(&vmi).is_some())
    };
    // Nor for those that wait for another side.
    let syncs =
        |m: &Migration| m.spec.half().is_some() && m.phase() < Phase::Pending && !m.is_over();
    let may_begin = |m: &&Arc<Migration>| {
        !syncs(m) && !m.uid().is_some_and(|uid| held.contains_key(&uid)) && !waits(m)
    };
    let ones: Vec<turn::One> = all.iter().filter(may_begin).map(one).collect();
    let limits = cluster.map(|c| c.spec.configuration.migrations.clone()).unwrap_or_default();
    let own = migration.uid().unwrap_or_default();
    turn::turn(&own, &ones, &limits)?;
    admitted.insert(own);
    Ok(())
}

/// When the handler of the node that a guest leaves was last heard of: since when its heartbeat, or that
/// its node is gone, has been seen as it is.
fn heard(
    world: &World,
    beats: &Beats,
    vmi: Option<&VirtualMachineInstance>,
    now: Timestamp,
) -> Option<Timestamp> {
    let state = vmi?.status.as_ref()?.migration_state.as_ref().filter(|state| !state.is_over())?;
    if state.source_state.is_some() {
        // Another cluster's node.
        return None;
    }
    let name = state.source_node.clone()?;
    let node = world.nodes.get(&ObjectRef::<Node>::new(&name));
    let beat = node.and_then(|node| node.annotations().get(api::keys::HEARTBEAT).cloned());
    let beat = beat.unwrap_or_default();
    let mut beats = beats.lock().unwrap_or_else(PoisonError::into_inner);
    let seen = beats.entry(name).or_insert_with(|| (beat.clone(), Instant::now()));
    if seen.0 != beat {
        *seen = (beat, Instant::now());
    }
    now.checked_sub(SignedDuration::try_from(seen.1.elapsed()).ok()?).ok()
}

/// How many migrations of the same VMI are over and were made after this one.
fn later(world: &World, migration: &Migration) -> usize {
    let made = |m: &Migration| m.creation_timestamp().map(|at| at.0);
    let all = world
        .moves_of(&(migration.namespace().unwrap_or_default(), migration.spec.vmi_name.clone()));
    let counts = |m: &&Arc<Migration>| {
        m.is_over() && (made(m), m.name_any()) > (made(migration), migration.name_any())
    };
    all.iter().filter(counts).count()
}

async fn act(world: &World, snapshot: &Snapshot, action: &Action) -> kube::Result<()> {
    let migration = &snapshot.migration;
    let (namespace, name) = key(&**migration);
    let migrations = world.api::<Migration>(&namespace);
    match action {
        Action::CreatePod(pod) => {
            if is_lent(world, &namespace, pod).await? {
                let why = "a claim of the pod is being cloned: it is made once that is over";
                return Err(refusal(422, "Invalid", why));
            }
            match world.create_pod(pod).await {
                Err(kube::Error::Api(status)) if status.reason == "AlreadyExists" => {}
                other => {
                    let message = format!("Created migration target pod {}", other?.name_any());
                    let about = reference(&**migration);
                    world.events.say(&about, Kind::Normal, "SuccessfulCreate", &message).await;
                }
            }
        }
        Action::DeletePod(pod) => {
            let attempt = migration.uid();
            if owner_of(world, snapshot).await?.may_be_in(pod, attempt.as_deref()) {
                return Err(refusal(409, "Conflict", "the guest may be in that pod"));
            }
            let pods = world.api::<Pod>(&namespace);
            ignore_gone(pods.delete(pod, &DeleteParams::default()).await)?;
        }
        Action::CreateClaim(object) => {
            let claim = serde_json::from_value(object.clone()).map_err(kube::Error::SerdeError)?;
            let claims = world.api::<PersistentVolumeClaim>(&namespace);
            match claims.create(&PostParams::default(), &claim).await {
                Err(kube::Error::Api(status)) if status.reason == "AlreadyExists" => {}
                other => {
                    let message = format!("Created claim {} for a disk", other?.name_any());
                    let about = reference(&**migration);
                    world.events.say(&about, Kind::Normal, "SuccessfulCreate", &message).await;
                }
            }
        }
        Action::DeleteClaim(claim) => {
            let owner = owner_of(world, snapshot).await?;
            let undecided = migration.uid().is_some_and(|uid| owner.may_come_by(&uid));
            if undecided || owner.volumes.values().any(|own| own == claim) {
                return Err(refusal(409, "Conflict", "the claim may be the VM's"));
            }
            // N.B. as it was looked at: a migration that begins to copy to it writes that on it first.
            let Some(found) = snapshot.left.iter().find(|c| c.name_any() == *claim) else {
                return Ok(());
            };
            let (uid, resource_version) = (found.uid(), found.resource_version());
            let exactly = DeleteParams {
                preconditions: Some(Preconditions { uid, resource_version }),
                ..DeleteParams::default()
            };
            let claims = world.api::<PersistentVolumeClaim>(&namespace);
            ignore_gone(claims.delete(claim, &exactly).await)?;
        }
        Action::Label(labels) => {
            let vmis = world.api::<VirtualMachineInstance>(&namespace);
            let patch = json!({"metadata": {"labels": labels}});
            let of = &migration.spec.vmi_name;
            ignore_gone(vmis.patch(of, &PatchParams::default(), &Patch::Merge(&patch)).await)?;
        }
        Action::PatchVmi(status) => patch_vmi(world, snapshot, status).await?,
        Action::Patch(patch) => {
            let patch = Patch::Merge(patch);
            ignore_gone(migrations.patch(&name, &PatchParams::default(), &patch).await)?;
        }
        Action::PatchStatus(status) => {
            let read = json!({"resourceVersion": migration.resource_version()});
            let patch = json!({"metadata": read, "status": status});
            let patch = Patch::Merge(&patch);
            ignore_gone(migrations.patch_status(&name, &PatchParams::default(), &patch).await)?;
        }
        Action::Delete => {
            ignore_gone(migrations.delete(&name, &DeleteParams::default()).await)?;
        }
        Action::Say { warning, reason, message } => {
            let kind = if *warning { Kind::Warning } else { Kind::Normal };
            world.events.say(&reference(&**migration), kind, reason, message).await;
        }
        Action::WarnOfVmi { reason, message } => {
            if let Some(vmi) = &snapshot.vmi {
                world.events.say(&reference(&**vmi), Kind::Warning, reason, message).await;
            }
        }
    }
    Ok(())
}

/// Who may run the guest, as the API has it now: what is to be taken away is asked for there.
async fn owner_of(world: &World, snapshot: &Snapshot) -> kube::Result<api::owner::Status> {
    let migration = &snapshot.migration;
    let records = world.api::<OwnerRecord>(&migration.namespace().unwrap_or_default());
    let record = records.get_opt(&migration.spec.vmi_name).await?;
    Ok(record.and_then(|record| record.status).unwrap_or_default())
}

/// N.B. only the VMI that was looked at, as it was: handlers write it as well, and one that was made
/// anew has its name.
async fn patch_vmi(world: &World, snapshot: &Snapshot, status: &Value) -> kube::Result<()> {
    let Some(vmi) = &snapshot.vmi else { return Ok(()) };
    let (namespace, name) = key(&**vmi);
    let vmis = world.api::<VirtualMachineInstance>(&namespace);
    let patch = json!({"metadata": {
        "uid": vmi.uid(), "resourceVersion": vmi.resource_version(),
    }, "status": status});
    ignore_gone(vmis.patch_status(&name, &PatchParams::default(), &Patch::Merge(&patch)).await)
}
