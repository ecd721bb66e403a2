//! VMs that go to other clusters with all that they need: VirtualMachineMove.
//!
//! ```text
//!  Checking --offer, to be judged--> the other synchronizer: what stands in its way there
//!  Preparing --offer, to be made---> it makes the VM and what that names, and the receiving migration
//!  Moving: the sending migration, as a person would make it
//!  Settling: the other forgets the move; one that failed takes away what it made
//! ```
//!
//! Whatever phase it is found in, it goes on from there: each step can be done twice.

mod along;
mod checks;
mod offer;
mod receive;
mod types;

pub use offer::Offer;
pub(crate) use receive::{offered, settle};

use self::checks::Finding;
use crate::ground::Departure;
use crate::records::OfVm;
use crate::wire::{self, Ask, Spot, Told};
use crate::world::World;
use api::conditions::{self, Condition};
use api::keys;
use api::migration::{
    Phase as MigrationPhase, SendTo, Spec as MigrationSpec,
    VirtualMachineInstanceMigration as Migration,
};
use api::owner::Status as Owned;
use api::relocation::{Phase, Status, VirtualMachineMove};
use api::vm::VirtualMachine;
use api::vmi::VirtualMachineInstance;
use channel::identity::soonest_end;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::{Api, ResourceExt};
use reconcile::Queue;
use reconcile::events::why;
use reconcile::queue::Next;
use reconcile::taken::{object, taken};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;

/// Moves that are looked at the same time.
const AT_ONCE: usize = 8;
/// What nobody rings for is looked at again after this: the other cluster's objects.
const AGAIN: Duration = Duration::from_millis(500);
/// What rings is looked at all the same after this.
const RARELY: Duration = Duration::from_secs(10);
/// The other cluster answers, and has made what is needed, within this time.
const PATIENCE: SignedDuration = SignedDuration::from_mins(10);
/// What keeps a move from going before it is over.
const FINALIZER: &str = "godwit.dev/move";
/// Why one ended that was deleted.
const CANCELLED: &str = "it was cancelled";
/// Why one cannot end yet.
const UNDECIDED: &str = "whose the guest is is not decided yet";
/// Why a move waits.
const WAITS: &str = "Waiting";

/// Looks after all of them. Never ends by itself.
pub async fn run(world: Arc<World>) {
    let queue: Queue<(String, String)> = Queue::default();
    let ring = {
        let (queue, world) = (queue.clone(), Arc::clone(&world));
        async move {
            let mut changes = world.changes.clone();
            loop {
                for open in world.moves.state().iter().filter(|open| is_open(open)) {
                    queue.ring((open.namespace().unwrap_or_default(), open.name_any()));
                }
                // Its sender lives as long as the watches do.
                if changes.changed().await.is_err() {
                    return;
                }
            }
        }
    };
    let look = queue.run(AT_ONCE, move |key| {
        let world = Arc::clone(&world);
        async move { reconcile(&world, &key).await }
    });
    tokio::join!(ring, look);
}

/// Whether there is something to be done about it.
fn is_open(one: &VirtualMachineMove) -> bool {
    !is_over(one) || one.finalizers().iter().any(|finalizer| finalizer == FINALIZER)
}

/// Whether it is not wanted any more.
fn leaves(one: &VirtualMachineMove) -> bool {
    one.metadata.deletion_timestamp.is_some()
}

fn is_over(one: &VirtualMachineMove) -> bool {
    one.status.as_ref().is_some_and(|status| status.phase.is_final())
}

/// What became of a step.
enum Step {
    /// To this phase.
    To(Phase),
    /// It waits, for this.
    Wait(String),
    /// It fails: all that is wrong.
    Fail(Vec<String>),
    /// It is over, though the other cluster cannot be told.
    GiveUp(String),
}

async fn reconcile(world: &World, (namespace, name): &(String, String)) -> Next {
    let moves: Api<VirtualMachineMove> = Api::namespaced(world.client.clone(), namespace);
    // N.B. as it is: a step that was taken must not be taken for one that was not.
    let one = match moves.get_opt(name).await {
        Ok(Some(one)) => one,
        Ok(None) => return Next::Rest,
        Err(error) => {
            tracing::warn!("move {namespace}/{name} cannot be read: {}", why(&error));
            return Next::Failed;
        }
    };
    // N.B. one that is deleted half-way is cancelled, and what was made for it goes, before it does.
    let held = one.finalizers().iter().any(|finalizer| finalizer == FINALIZER);
    match (is_over(&one), leaves(&one)) {
        (true, _) if held => return hold(&moves, &one, false).await,
        (false, false) if !held => return hold(&moves, &one, true).await,
        (true, _) => return Next::Rest,
        // It goes before it could be taken up.
        (false, true) if !held => return Next::Rest,
        (false, _) => {}
    }
    let mut status = one.status.clone().unwrap_or_default();
    let before = status.clone();
    let now = Timestamp::now();
    match step(world, &one, &mut status).await {
        Step::To(phase) => {
            status.conditions = conditions::merge(&status.conditions, vec![], &[WAITS], now);
            status.enter(phase, now);
        }
        Step::Wait(reason) => {
            let since = status.since().unwrap_or(now);
            let late = now.duration_since(since) > PATIENCE;
            match status.phase {
                // Its migration has deadlines of its own.
                Phase::Moving => status.conditions = waiting(&status, &reason, now),
                _ if !late => status.conditions = waiting(&status, &reason, now),
                Phase::Settling => give_up(&mut status, &reason, now),
                phase => {
                    status.faults = vec![format!("it took too long: {reason}")];
                    status.enter(after_failure(phase), now);
                }
            }
        }
        Step::GiveUp(reason) => give_up(&mut status, &reason, now),
        Step::Fail(faults) => {
            status.faults = faults;
            status.enter(after_failure(status.phase), now);
        }
    }
    if status != before {
        let version = one.resource_version();
        let patch = json!({"metadata": {"resourceVersion": version}, "status": status});
        let patch = Patch::Merge(&patch);
        if let Err(error) = moves.patch_status(name, &PatchParams::default(), &patch).await {
            tracing::debug!("move {namespace}/{name}: {}", why(&error));
        }
    }
    match status.phase {
        phase if phase.is_final() => Next::Rest,
        // Its migration rings.
        Phase::Moving => Next::After(RARELY),
        _ => Next::After(AGAIN),
    }
}

/// The conditions of a move that waits.
fn waiting(status: &Status, reason: &str, now: Timestamp) -> Vec<Condition> {
    let waits = Condition::new(WAITS, true, "Waiting", reason);
    conditions::merge(&status.conditions, vec![waits], &[], now)
}

/// A move that is over, and of which the other cluster could not be told.
fn give_up(status: &mut Status, reason: &str, now: Timestamp) {
    if status.faults.is_empty() {
        status.warnings.push(format!("the other cluster does not know that it is over: {reason}"));
        return status.enter(Phase::Succeeded, now);
    }
    status.faults.push(format!("what was made for it there may be there still: {reason}"));
    status.enter(Phase::Failed, now);
}

/// Keeps a move from going before it is over, or lets it go.
async fn hold(moves: &Api<VirtualMachineMove>, one: &VirtualMachineMove, held: bool) -> Next {
    let mut finalizers = one.finalizers().to_vec();
    finalizers.retain(|finalizer| finalizer != FINALIZER);
    if held {
        finalizers.push(FINALIZER.into());
    }
    let version = one.resource_version();
    let patch = json!({"metadata": {"resourceVersion": version, "finalizers": finalizers}});
    let patched =
        moves.patch(&one.name_any(), &PatchParams::default(), &Patch::Merge(&patch)).await;
    if let Err(error) = patched {
        tracing::debug!("move {}: {}", one.name_any(), why(&error));
    }
    Next::After(AGAIN)
}

/// One that failed before anything was made is over; else what was made goes first.
fn after_failure(phase: Phase) -> Phase {
    match phase {
        Phase::Unset | Phase::Checking => Phase::Failed,
        _ => Phase::Settling,
    }
}

async fn step(world: &World, one: &VirtualMachineMove, status: &mut Status) -> Step {
    match status.phase {
        Phase::Unset | Phase::Checking if leaves(one) => Step::Fail(vec![CANCELLED.into()]),
        Phase::Unset => Step::To(Phase::Checking),
        Phase::Checking => check(world, one, status).await,
        Phase::Preparing => prepare(world, one).await,
        Phase::Moving => follow(world, one, status).await,
        Phase::Settling => end(world, one, status).await,
        Phase::Succeeded | Phase::Failed => Step::To(status.phase),
    }
}

fn id(one: &VirtualMachineMove) -> String {
    one.uid().unwrap_or_default()
}

/// Asks both sides for all that would make it fail.
async fn check(world: &World, one: &VirtualMachineMove, status: &mut Status) -> Step {
    let cluster = &one.spec.cluster;
    let mut faults = Vec::new();
    if world.link(cluster).is_none() {
        faults.push(format!(
            "this cluster has no link to a cluster {cluster}: `godwit cluster link` makes one"
        ));
    }
    let offered = match gather(world, one).await {
        Ok(offered) => Some(offered),
        Err(more) => {
            faults.extend(more);
            None
        }
    };
    let (Some(offer), true) = (offered, faults.is_empty()) else { return Step::Fail(faults) };
    status.warnings = offer.warnings.clone();
    status.warnings.extend(checks::networks(cluster, &offer.vm["spec"]["template"]["spec"]));
    match certificates(world, cluster) {
        Some(Finding::Fault(why)) => faults.push(why),
        Some(Finding::Warning(why)) => status.warnings.push(why),
        None => {}
    }
    let ask = Ask::Offer { id: id(one), offer: Box::new(offer), check: true };
    let asked = Timestamp::now();
    match ask_there(world, cluster, &ask).await {
        Ok(Told::Offered { faults: theirs, warnings, spot, now, protocol, .. }) => {
            status.warnings.extend(warnings);
            faults.extend(theirs);
            faults.extend(checks::protocol(cluster, protocol));
            let between = (asked, Timestamp::now());
            faults.extend(now.and_then(|there| checks::clocks(cluster, there, between)));
            if let Some(spot) = spot {
                faults.extend(way(world, one, &spot, status).await.err());
            }
            match (faults.is_empty(), one.spec.check_only) {
                (false, _) => Step::Fail(faults),
                (true, true) => Step::To(Phase::Succeeded),
                (true, false) => Step::To(Phase::Preparing),
            }
        }
        Ok(Told::Refused { why }) => Step::Fail(vec![why]),
        Ok(_) => Step::Fail(vec!["the other cluster answers what was not asked".into()]),
        Err(why) => Step::Wait(why),
    }
}

/// Whether a cluster's CAs will be believed for a while.
fn certificates(world: &World, cluster: &str) -> Option<Finding> {
    let link = world.link(cluster);
    let ends = link.and_then(|link| soonest_end(&link.spec.ca_bundle));
    let ends = ends.and_then(|at| Timestamp::try_from(at).ok());
    checks::certificates(cluster, ends, Timestamp::now())
}

/// Tries the way that the guest would take: as its own node has it. A move that is not made is measured.
async fn way(
    world: &World,
    one: &VirtualMachineMove,
    spot: &Spot,
    status: &mut Status,
) -> Result<(), String> {
    let namespace = one.namespace().unwrap_or_default();
    let Some(node) = world.node_of(&namespace, &one.spec.vm) else { return Ok(()) };
    let Spot { node: to, gateway, id } = spot;
    let name = &one.spec.vm;
    let departure = Departure { node: &node, namespace: &namespace, name, to, gateway, id };
    let way = format!("the way from node {node} to node {to} of cluster {}", one.spec.cluster);
    let reached = world.ground.reach(departure).await;
    let through = reached.map_err(|why| format!("{way} cannot be used: {why}"))?;
    status.warnings.extend(through);
    if one.spec.check_only {
        match world.ground.forecast(departure).await {
            Ok(outlook) => status.outlook = Some(outlook),
            Err(why) => status.warnings.push(format!("{way} could not be measured: {why}")),
        }
    }
    Ok(())
}

/// Has the other cluster make what the guest needs there, and sends it off.
async fn prepare(world: &World, one: &VirtualMachineMove) -> Step {
    let migrations: Api<Migration> =
        Api::namespaced(world.client.clone(), &one.namespace().unwrap_or_default());
    let name = migration_name(one);
    match migrations.get_opt(&name).await {
        Ok(Some(_)) => return Step::To(Phase::Moving),
        Ok(None) if leaves(one) => return Step::Fail(vec![CANCELLED.into()]),
        Ok(None) => {}
        Err(error) => return Step::Wait(why(&error)),
    }
    let offer = match gather(world, one).await {
        Ok(offer) => offer,
        Err(faults) => return Step::Fail(faults),
    };
    let ask = Ask::Offer { id: id(one), offer: Box::new(offer), check: false };
    let address = match ask_there(world, &one.spec.cluster, &ask).await {
        Ok(Told::Offered { faults, .. }) if !faults.is_empty() => return Step::Fail(faults),
        Ok(Told::Offered { address: Some(address), .. }) => address,
        Ok(Told::Offered { waits, .. }) => {
            return Step::Wait(waits.unwrap_or_else(|| "it is made".into()));
        }
        Ok(Told::Refused { why }) => return Step::Fail(vec![why]),
        Ok(_) => return Step::Fail(vec!["the other cluster answers what was not asked".into()]),
        Err(why) => return Step::Wait(why),
    };
    let spec = MigrationSpec {
        vmi_name: one.spec.vm.clone(),
        send_to: Some(SendTo { migration_id: id(one), connect_url: address }),
        ..MigrationSpec::default()
    };
    let mut migration = Migration::new(&name, spec);
    migration.labels_mut().insert(offer::MOVE.into(), id(one));
    if one.spec.verify {
        migration.annotations_mut().insert(keys::VERIFY.into(), "true".into());
    }
    match migrations.create(&PostParams::default(), &migration).await {
        Ok(_) => Step::To(Phase::Moving),
        Err(kube::Error::Api(status)) if status.reason == "AlreadyExists" => {
            Step::To(Phase::Moving)
        }
        Err(kube::Error::Api(status)) if status.code == 422 || status.code == 403 => {
            Step::Fail(vec![status.message.clone()])
        }
        Err(error) => Step::Wait(why(&error)),
    }
}

fn migration_name(one: &VirtualMachineMove) -> String {
    let id: String = id(one).chars().filter(|c| *c != '-').take(8).collect();
    format!("move-{id}")
}

/// Waits for the guest's migration.
async fn follow(world: &World, one: &VirtualMachineMove, status: &mut Status) -> Step {
    let name = migration_name(one);
    status.migration = Some(name.clone());
    let migrations: Api<Migration> =
        Api::namespaced(world.client.clone(), &one.namespace().unwrap_or_default());
    let migration = match migrations.get_opt(&name).await {
        Ok(Some(migration)) => migration,
        // Those that are over are cleared away: whose the guest is, its record says.
        Ok(None) => {
            return match record_of(world, one).await {
                Ok(record) if record.has_arrived().is_some() => Step::To(Phase::Settling),
                Ok(record) if record.has_left().is_some() => Step::Wait(UNDECIDED.into()),
                Ok(_) => Step::Fail(vec![format!("its migration {name} was deleted")]),
                Err(why) => Step::Wait(why),
            };
        }
        Err(error) => return Step::Wait(why(&error)),
    };
    if leaves(one) && !migration.is_over() && migration.metadata.deletion_timestamp.is_none() {
        let _ = migrations.delete(&name, &DeleteParams::default()).await;
    }
    match migration.phase() {
        MigrationPhase::Succeeded => Step::To(Phase::Settling),
        MigrationPhase::Failed => {
            let state = migration.status.and_then(|status| status.migration_state);
            let reason = state.and_then(|state| state.failure_reason);
            Step::Fail(vec![reason.unwrap_or_else(|| "its migration failed".into())])
        }
        phase => Step::Wait(format!("its migration is {phase}")),
    }
}

/// Who may run the VM's guest.
///
/// # Errors
/// Why that is not known: then nothing may be concluded.
async fn record_of(world: &World, one: &VirtualMachineMove) -> Result<Owned, String> {
    let namespace = one.namespace().unwrap_or_default();
    let name = one.spec.vm.clone();
    let record = OfVm { client: world.client.clone(), namespace, name };
    Ok(record.read().await?.0.status.unwrap_or_default())
}

/// Has the other cluster forget the move; one that failed takes away there what was made for it, if
/// the guest is not there.
async fn end(world: &World, one: &VirtualMachineMove, status: &mut Status) -> Step {
    // N.B. the owner record here is asked first: a guest that has left, or may yet be found to have, has
    // nothing but what was made for it there.
    let record = match record_of(world, one).await {
        Ok(record) => record,
        Err(why) => return Step::Wait(why),
    };
    let armed = record.state == "armed" && record.other_ledger().is_some() && !record.is_over();
    if armed || record.has_left().is_some() && record.has_arrived().is_none() {
        return Step::Wait(UNDECIDED.into());
    }
    if record.has_left().is_some() {
        status.warnings.append(&mut status.faults);
    }
    let succeeded = status.faults.is_empty();
    if world.link(&one.spec.cluster).is_none() {
        return Step::GiveUp(format!("there is no link to cluster {} any more", one.spec.cluster));
    }
    let ask = Ask::Settle {
        id: id(one),
        namespace: one.spec.namespace.clone().or_else(|| one.namespace()).unwrap_or_default(),
        name: one.spec.name.clone().unwrap_or_else(|| one.spec.vm.clone()),
        succeeded,
    };
    match ask_there(world, &one.spec.cluster, &ask).await {
        Ok(Told::Settled { waits: None }) if succeeded => Step::To(Phase::Succeeded),
        Ok(Told::Settled { waits: None }) => Step::To(Phase::Failed),
        Ok(Told::Settled { waits: Some(why) } | Told::Refused { why }) | Err(why) => {
            Step::Wait(why)
        }
        Ok(_) => Step::Wait("the other cluster answers what was not asked".into()),
    }
}

async fn ask_there(world: &World, cluster: &str, ask: &Ask) -> Result<Told, String> {
    let Some(link) = world.link(cluster) else {
        return Err(format!("there is no link to cluster {cluster} any more"));
    };
    let credentials = world.credentials.borrow().clone();
    let mut last = format!("the link to cluster {cluster} does not say where that is");
    for address in &link.spec.addresses {
        match wire::ask(&credentials, address, Some(cluster), ask).await {
            Ok((_, told)) => return Ok(told),
            Err(why) => last = why,
        }
    }
    Err(last)
}

/// The VM as the other cluster is to make it, and what it brings.
async fn gather(world: &World, one: &VirtualMachineMove) -> Result<Offer, Vec<String>> {
    let namespace = one.namespace().unwrap_or_default();
    let client = &world.client;
    let failed = |error: kube::Error| vec![why(&error)];
    let vms: Api<VirtualMachine> = Api::namespaced(client.clone(), &namespace);
    let name = &one.spec.vm;
    let vm = vms.get_opt(name).await.map_err(failed)?;
    let vm = vm.ok_or_else(|| vec![format!("there is no VM {name} in namespace {namespace}")])?;
    let vmis: Api<VirtualMachineInstance> = Api::namespaced(client.clone(), &namespace);
    let vmi = vmis.get_opt(name).await.map_err(failed)?;
    let vmi = vmi.ok_or_else(|| vec![format!("VM {name} does not run")])?;
    let claims: Api<PersistentVolumeClaim> = Api::namespaced(client.clone(), &namespace);
    let claims = claims.list(&ListParams::default()).await.map_err(failed)?.items;
    let migrations: Api<Migration> = Api::namespaced(client.clone(), &namespace);
    let of_vmi = ListParams::default().labels(&format!("{}={name}", keys::MIGRATES));
    let mut migrations = migrations.list(&of_vmi).await.map_err(failed)?.items;
    let own = id(one);
    migrations.retain(|migration| migration.labels().get(offer::MOVE) != Some(&own));
    let taken = taken(client, &namespace, &vm.spec, vm.status.as_ref()).await.map_err(failed)?;
    let facts = offer::Facts {
        id: &own,
        wanted: &one.spec,
        vm: &vm,
        vmi: &vmi,
        claims: &claims,
        taken: &taken,
        migrations: &migrations,
    };
    let mut offer = offer::offer(&facts)?;
    offer.selectors = world.selectors(&vmi);
    let mut faults = Vec::new();
    for (kind, name) in offer::named(&vmi.spec.0) {
        match read(world, kind, &namespace, &name).await {
            Ok(object) => offer.brings.push(offer::brought(&object, kind, &offer.namespace, &own)),
            Err(why) => faults.push(format!("{kind} {name}, which the VM names: {why}")),
        }
    }
    // N.B. as they are: what the guest has is in the revisions. One that is gone is not missed.
    for one in taken.iter().filter(|_| !offer.revisions.is_empty()) {
        let kind = one.wanted.kind;
        let live = object(client, kind, &namespace, &one.wanted.name).await.map_err(failed)?;
        let place = Some(&*offer.namespace).filter(|_| kind.namespaced);
        let live = live.map(|live| types::brought(&live, place, &own));
        offer.brings.extend(live);
    }
    if faults.is_empty() { Ok(offer) } else { Err(faults) }
}

async fn read(world: &World, kind: &str, namespace: &str, name: &str) -> Result<Value, String> {
    let kind = along::Kind::named(kind).ok_or("it is of no kind that goes along")?;
    let api = kind.api(world.client.clone(), namespace);
    let found = api.get(name).await.map_err(|error| why(&error))?;
    serde_json::to_value(found).map_err(|error| error.to_string())
}
