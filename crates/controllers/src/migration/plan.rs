//! What is to be done about a migration. Pure.

use super::halves::Gone;
use super::{disks, ending, halves, preflight};
use crate::vmi::pod::{Target, Wanted};
use crate::vmi::{is_ready, is_terminal, launches, trouble};
use api::conditions::{self, Condition, moment};
use api::keys;
use api::migration::{Options, Phase, Side, State, Status, VirtualMachineInstanceMigration};
use api::owner::OwnerRecord;
use api::vmi::{self, Spec, VirtualMachineInstance};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use kube::ResourceExt;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// What nobody rings for is looked at again after this.
pub(super) const AGAIN: Duration = Duration::from_secs(1);
/// A pod that was just made may not be seen yet.
const UNSEEN: SignedDuration = SignedDuration::from_secs(10);
/// A pod that finds no node is given up after this; as KubeVirt.
const UNSCHEDULABLE: SignedDuration = SignedDuration::from_mins(5);
/// A pod that does not become ready is given up after this; as KubeVirt.
pub(super) const PENDING: SignedDuration = SignedDuration::from_mins(15);
/// A source's handler begins within this time, or says why not: it has a deadline itself.
pub(super) const BEGIN: SignedDuration = SignedDuration::from_mins(6);
/// A source that is silent although its guest runs at the target.
const SILENT: SignedDuration = SignedDuration::from_mins(1);
/// A source's handler that is silent for so long does not tell any more how its move ends: five
/// heartbeats.
const GONE: SignedDuration = SignedDuration::from_mins(5);
/// The quota lets no pod in.
pub const QUOTA: &str = "migrationRejectedByResourceQuota";
/// It waits, and for what.
const WAITS: &str = "migrationWaits";
/// It waits until the disks to which it goes are made.
const DISKS: &str = "migrationWaitsForDisks";
/// It is not wanted any more.
const ABORT: &str = "migrationAbortRequested";

/// A migration and what there is of it.
pub struct Snapshot {
    /// The migration.
    pub migration: Arc<VirtualMachineInstanceMigration>,
    /// Its VMI.
    pub vmi: Option<Arc<VirtualMachineInstance>>,
    /// The claims that the VMI names or goes to, that there are.
    pub claims: Vec<(String, Arc<PersistentVolumeClaim>)>,
    /// The claims that the VMI has left, or may have.
    pub left: Vec<Arc<PersistentVolumeClaim>>,
    /// Whether a disk to which it goes is being made, and whether it waits for a first consumer.
    pub unmade: Option<bool>,
    /// The VMI's pods.
    pub pods: Vec<Arc<Pod>>,
    /// Who may run the guest.
    pub owner: Option<Arc<OwnerRecord>>,
    /// Whether it may begin, or why not.
    pub turn: Result<(), String>,
    /// Until when it waits because those before it failed.
    pub backoff: Option<Timestamp>,
    /// How it is made, and by which policy.
    pub options: (Option<String>, Options),
    /// What the target's node must have, for the guest's processor.
    pub processor: BTreeMap<String, String>,
    /// Guests are emulated.
    pub emulated: bool,
    /// What would make it fail, where it was looked for: right before it begins.
    pub faults: Option<Vec<preflight::Fault>>,
    /// When the handler of the node that the guest leaves was last heard of.
    pub heard: Option<Timestamp>,
    /// How many migrations of the VMI are over and were made after this one.
    pub later: usize,
    /// Where this cluster's synchronizer is found.
    pub addresses: Vec<String>,
    /// Now.
    pub now: Timestamp,
}

/// What is to be done, in this order.
#[derive(Debug, Default)]
pub struct Plan {
    /// Each is done once the one before is.
    pub actions: Vec<Action>,
    /// When to look again though nothing has changed.
    pub again: Option<Duration>,
}

/// One thing to be done.
#[derive(Debug)]
pub enum Action {
    /// Make the target's pod.
    CreatePod(Box<Pod>),
    /// Delete it, if the owner record still says that it cannot have the guest.
    DeletePod(String),
    /// Make a claim for a disk that follows.
    CreateClaim(Value),
    /// Delete a claim that was made for it, if the owner record still says that it is not the VM's.
    DeleteClaim(String),
    /// Change the VMI's labels.
    Label(Value),
    /// Change the VMI's status.
    PatchVmi(Value),
    /// Change the migration itself.
    Patch(Value),
    /// Change its status.
    PatchStatus(Value),
    /// Delete it.
    Delete,
    /// Tell people.
    Say {
        /// Something is wrong.
        warning: bool,
        /// In one word.
        reason: &'static str,
        /// What.
        message: String,
    },
    /// Tell people who look at the VMI.
    WarnOfVmi {
        /// In one word.
        reason: &'static str,
        /// What is wrong.
        message: String,
    },
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Action::CreatePod(pod) => write!(f, "create pod {}", pod.name_any()),
            Action::DeletePod(pod) => write!(f, "delete pod {pod}"),
            Action::CreateClaim(claim) => write!(f, "create claim {}", claim["metadata"]["name"]),
            Action::DeleteClaim(claim) => write!(f, "delete claim {claim}"),
            Action::Label(_) | Action::PatchVmi(_) => f.write_str("change the instance"),
            Action::Patch(_) => f.write_str("change the migration"),
            Action::PatchStatus(_) => f.write_str("write the migration's status"),
            Action::Delete => f.write_str("delete the migration"),
            Action::Say { .. } | Action::WarnOfVmi { .. } => f.write_str("tell of it"),
        }
    }
}

impl Snapshot {
    pub(super) fn uid(&self) -> String {
        self.migration.uid().unwrap_or_default()
    }

    /// The target's pod.
    pub(super) fn target(&self) -> Option<&Arc<Pod>> {
        self.of_migration().find(|pod| launches(pod))
    }

    /// The pod that has the target's claims bound.
    pub(super) fn binder(&self) -> Option<&Arc<Pod>> {
        self.of_migration().find(|pod| !launches(pod))
    }

    pub(super) fn of_migration(&self) -> impl Iterator<Item = &Arc<Pod>> {
        let uid = self.migration.uid();
        self.pods.iter().filter(move |pod| pod.labels().get(keys::MIGRATION) == uid.as_ref())
    }

    /// Whether it is made for disks that are to go to claims which the VM's template names.
    pub fn is_volume_update(&self) -> bool {
        self.migration.labels().contains_key(keys::VOLUME_UPDATE)
    }

    /// Whether it has its turn now, and nothing is made for it yet.
    pub fn begins(&self) -> bool {
        let runs = self.vmi.as_ref().and_then(|vmi| vmi.status.as_ref()).map(|status| status.phase);
        self.migration.phase() <= Phase::Pending
            && self.side().is_none()
            && self.turn.is_ok()
            && runs == Some(vmi::Phase::Running)
            && self.of_migration().next().is_none()
            && !self.leaves()
    }

    /// What is told of what would make it fail.
    pub fn foretold(&self) -> Vec<Condition> {
        self.faults.iter().map(|faults| preflight::condition(faults)).collect()
    }

    pub(super) fn leaves(&self) -> bool {
        self.migration.metadata.deletion_timestamp.is_some()
    }

    /// What every migration says when handlers are told of it.
    pub(super) fn begun(&self) -> State {
        let (policy, options) = self.options.clone();
        let is_apart = options.network.as_ref().is_some_and(|network| !network.is_empty());
        State {
            migration_uid: Some(self.uid()),
            migration_policy_name: policy,
            migration_configuration: Some(options),
            migration_network_type: Some(if is_apart { "Migration" } else { "Pod" }.into()),
            ..State::default()
        }
    }

    /// What the VMI says of this migration.
    pub(super) fn state(&self) -> Option<State> {
        let state = self.vmi.as_ref()?.status.as_ref()?.migration_state.clone()?;
        (state.migration_uid == self.migration.uid()).then_some(state)
    }

    /// The node to which the VMI is said to go.
    pub(super) fn label(&self) -> Option<&str> {
        self.vmi.as_ref()?.labels().get(keys::TARGET_NODE).map(String::as_str)
    }

    /// Whether the guest may be that pod's now, or may become so: then the pod stays.
    pub(super) fn may_own(&self, pod: &str) -> bool {
        let record = self.owner.as_ref().and_then(|owner| owner.status.as_ref());
        record.is_some_and(|record| record.may_be_in(pod, Some(&self.uid())))
    }

    /// Seconds that the migration says by an annotation, or the default.
    pub(super) fn patience(&self, key: &str, default: SignedDuration) -> SignedDuration {
        let said = self.migration.annotations().get(key).and_then(|text| text.parse::<u32>().ok());
        said.map_or(default, |seconds| SignedDuration::from_secs(seconds.into()))
    }
}

/// Why a VMI cannot begin to move now, whoever's turn it is.
pub fn not_yet(vmi: &VirtualMachineInstance) -> Option<&'static str> {
    if halves::waits_for_guest(vmi) {
        return None;
    }
    let status = vmi.status.as_ref();
    match status.map(|status| (status.phase, status.active_pods.len())) {
        Some((vmi::Phase::Running, 0 | 1)) => None,
        Some((vmi::Phase::Running, _)) => Some("it waits until an earlier pod of the VMI is gone"),
        _ => Some("it waits until the VMI runs"),
    }
}

/// What is to be done.
pub fn plan(snapshot: &Snapshot) -> Plan {
    let mut plan = Plan::default();
    let before = snapshot.migration.status.clone().unwrap_or_default();
    let mut status = before.clone();
    match status.phase.is_final() {
        true => ending::clear_away(snapshot, &status, &mut plan),
        false => advance(snapshot, &mut status, &mut plan),
    }
    if let Some(mut state) = snapshot.state() {
        let had = status.migration_state.take().filter(|_| status.phase == Phase::Failed);
        if let Some(had) = had {
            // N.B. the VMI may not say so yet.
            state.failed = Some(true);
            state.failure_reason = state.failure_reason.or(had.failure_reason);
        }
        status.migration_state = Some(state);
    }
    if status != before {
        let status = serde_json::to_value(&status).unwrap_or_default();
        plan.actions.push(Action::PatchStatus(status));
    }
    plan
}

fn advance(snapshot: &Snapshot, status: &mut Status, plan: &mut Plan) {
    if let Some(side) = snapshot.side() {
        if !halves::follow_other(snapshot, side, status, plan) {
            return;
        }
        if status.phase == Phase::Unset {
            halves::synchronize(snapshot, side, status, plan);
        }
    }
    if status.phase == Phase::Unset {
        status.enter(Phase::Pending, snapshot.now);
        if let (Some(_), Err(why)) = (snapshot.backoff, &snapshot.turn) {
            let message = format!("migration {}: {why}", snapshot.migration.name_any());
            plan.actions.push(Action::WarnOfVmi { reason: "MigrationBackoff", message });
        }
    }
    let arrived = |state: State| state.completed == Some(true) && state.failed != Some(true);
    if status.phase.is_handed_off() && snapshot.state().is_some_and(arrived) {
        // N.B. a VMI whose guest has left for another has ended with that.
        return follow(snapshot, status, plan);
    }
    let found = snapshot.vmi.as_ref().and_then(|vmi| Some((vmi, vmi.status.as_ref()?)));
    let Some((vmi, of_vmi)) = found.filter(|(_, status)| !status.phase.is_final()) else {
        match halves::gone(snapshot) {
            // The guest has survived its source.
            Some(Gone::Arrived) => return status.enter(Phase::Succeeded, snapshot.now),
            // The record rings when that is known.
            Some(Gone::Astray) => return,
            Some(Gone::Armed)
                if status.since().is_some_and(|at| snapshot.now.duration_since(at) < GONE) =>
            {
                plan.again = Some(AGAIN);
                return;
            }
            _ => {}
        }
        let why = "its virtual machine instance has ended or is gone";
        return fail(snapshot, status, why, plan);
    };
    if snapshot.leaves() && !conditions::is(&status.conditions, ABORT) {
        let wanted = Condition::new(ABORT, true, "MigrationDeleted", "it was deleted");
        status.conditions = conditions::merge(&status.conditions, vec![wanted], &[], snapshot.now);
    }
    match status.phase {
        phase if phase.is_handed_off() => follow(snapshot, status, plan),
        _ if snapshot.leaves() => fail(snapshot, status, "it was cancelled before it began", plan),
        Phase::WaitingForSync | Phase::Synchronizing => {
            halves::synchronize(snapshot, snapshot.side().unwrap_or(Side::Source), status, plan);
        }
        Phase::Pending => begin(snapshot, vmi, status, plan),
        _ if snapshot.side() == Some(Side::Source) => halves::hand_off(snapshot, status, plan),
        _ => hand_off(snapshot, of_vmi, status, plan),
    }
}

/// One that waits for its turn.
fn begin(snapshot: &Snapshot, vmi: &VirtualMachineInstance, status: &mut Status, plan: &mut Plan) {
    let now = snapshot.now;
    // N.B. one whose pod is made has had its turn: that pod is one of the VMI's now.
    if let (Err(why), None) = (&snapshot.turn, snapshot.target()) {
        let waits = Condition::new(WAITS, true, "Waiting", why);
        status.conditions = conditions::merge(&status.conditions, vec![waits], &[], now);
        // Whoever makes room rings.
        plan.again = Some(AGAIN * 10);
        return;
    }
    status.conditions = conditions::merge(&status.conditions, snapshot.foretold(), &[WAITS], now);
    if snapshot.side() == Some(Side::Source) {
        // The pod is the target's to make.
        return status.enter(Phase::Scheduling, now);
    }
    match follow_disks(snapshot, vmi, plan) {
        Ok(true) => {}
        Ok(false) => return,
        Err(why) => return fail(snapshot, status, &why, plan),
    }
    let binds = snapshot.unmade.is_some();
    let pod = match target_pod(snapshot, vmi, binds) {
        Ok(pod) => pod,
        Err(why) => return fail(snapshot, status, &why, plan),
    };
    if let Some(waits) = snapshot.unmade {
        // N.B. the disk is made first: whoever makes it would write to it beside the guest.
        let why = "the disks to which it goes are being made";
        let making = Condition::new(DISKS, true, "DisksNotReady", why);
        status.conditions = conditions::merge(&status.conditions, vec![making], &[], now);
        let since = status.conditions.iter().find(|c| c.kind == DISKS).and_then(Condition::since);
        let patience = snapshot.patience(keys::PENDING_TIMEOUT, PENDING);
        if since.is_some_and(|since| now.duration_since(since) > patience) {
            let why = format!("{why}, and were not within {} s", patience.as_secs());
            return fail(snapshot, status, &why, plan);
        }
        if waits && snapshot.binder().is_none() {
            plan.actions.push(Action::CreatePod(Box::new(pod)));
        }
        plan.again = Some(AGAIN);
        return;
    }
    if let Some(binder) = snapshot.binder() {
        plan.actions.push(Action::DeletePod(binder.name_any()));
    }
    if snapshot.target().is_none() {
        plan.actions.push(Action::CreatePod(Box::new(pod)));
    }
    status.conditions = conditions::merge(&status.conditions, Vec::new(), &[QUOTA, DISKS], now);
    status.enter(Phase::Scheduling, snapshot.now);
}

/// Whether all disks have places to go to; those that have none get some.
fn follow_disks(
    snapshot: &Snapshot,
    vmi: &VirtualMachineInstance,
    plan: &mut Plan,
) -> Result<bool, String> {
    if snapshot.is_volume_update() || snapshot.side().is_some() {
        return Ok(true);
    }
    let disks::Follow { claims, moves } = disks::follow(snapshot, vmi, &vmi.parse()?)?;
    if moves.is_empty() {
        return Ok(true);
    }
    plan.actions.extend(claims.into_iter().map(Action::CreateClaim));
    plan.actions.push(Action::PatchVmi(json!({"migratedVolumes": moves})));
    plan.again = Some(AGAIN);
    Ok(false)
}

/// The pod to which the guest is to go.
///
/// # Errors
/// Why it cannot be made, for people.
pub fn target_pod(
    snapshot: &Snapshot,
    vmi: &VirtualMachineInstance,
    binds: bool,
) -> Result<Pod, String> {
    let mut spec: Spec = vmi.parse()?;
    let moves = vmi.status.as_ref().map(|status| &status.migrated_volumes).into_iter().flatten();
    let to: BTreeMap<String, String> = moves
        .map(|moved| (moved.volume_name.clone(), moved.destination.claim_name.clone()))
        .collect();
    spec.use_claims(&to);
    let claims: Vec<(&str, &PersistentVolumeClaim)> =
        snapshot.claims.iter().map(|(name, claim)| (&**name, &**claim)).collect();
    // What the VM asks for cannot be widened by who moves it.
    let mut selector = snapshot.migration.spec.added_node_selector.clone();
    selector.extend(snapshot.processor.clone());
    let other = snapshot.other().filter(|_| snapshot.side() == Some(Side::Target));
    selector.extend(other.iter().flat_map(|other| other.node_selectors.clone()));
    let name = snapshot.migration.name_any();
    let uid = snapshot.uid();
    let mut suffix: String = uid.chars().filter(|c| *c != '-').take(8).collect();
    if binds {
        suffix.push_str("-binds");
    }
    // Disks may move to other storage of the same node.
    let apart = !snapshot.is_volume_update();
    let target = Target { migration: &uid, name: &name, selector: &selector, apart };
    let wanted = Wanted {
        vmi,
        spec: &spec,
        claims: &claims,
        suffix: &suffix,
        emulated: snapshot.emulated,
        binds,
        target: Some(target),
    };
    wanted.pod().map_err(|error| format!("the target's pod cannot be made: {error}"))
}

/// One whose target's pod is being made ready; when it is, handlers are told.
fn hand_off(snapshot: &Snapshot, of_vmi: &vmi::Status, status: &mut Status, plan: &mut Plan) {
    let now = snapshot.now;
    let since = status.since().unwrap_or(now);
    let waited = now.duration_since(since);
    let Some(pod) = snapshot.target() else {
        if waited < UNSEEN {
            plan.again = Some(AGAIN);
            return;
        }
        return fail(snapshot, status, "the target's pod is gone", plan);
    };
    if is_terminal(pod) || pod.metadata.deletion_timestamp.is_some() {
        let why = format!("the target's pod {} ended before it was used", pod.name_any());
        return fail(snapshot, status, &why, plan);
    }
    let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone());
    let Some(node) = node.filter(|_| is_ready(pod)) else {
        let why = trouble(pod);
        let unschedulable = why.as_ref().is_some_and(|(reason, _)| reason == "Unschedulable");
        let patience = match unschedulable {
            true => snapshot.patience(keys::UNSCHEDULABLE_TIMEOUT, UNSCHEDULABLE),
            false => snapshot.patience(keys::PENDING_TIMEOUT, PENDING),
        };
        if waited > patience {
            let why = why.map_or(String::new(), |(reason, text)| format!(": {reason}: {text}"));
            let seconds = patience.as_secs();
            let why = format!("the target's pod was not ready within {seconds} s{why}");
            return fail(snapshot, status, &why, plan);
        }
        plan.again = Some(AGAIN);
        return;
    };
    if status.phase == Phase::Scheduling {
        status.enter(Phase::Scheduled, now);
    }
    // N.B. handlers are told once: they have written more since.
    if snapshot.state().is_some() {
        return status.enter(Phase::PreparingTarget, now);
    }
    let busy = of_vmi.migration_state.as_ref().is_some_and(|state| {
        !state.is_over() && state.migration_uid.as_deref() != Some(&*snapshot.uid())
    });
    if busy {
        plan.again = Some(AGAIN);
        return;
    }
    let record = snapshot.owner.as_ref().and_then(|owner| owner.status.clone()).unwrap_or_default();
    let mut state = State {
        source_node: of_vmi.node_name.clone(),
        source_pod: record.pod,
        target_node: Some(node),
        target_pod: Some(pod.name_any()),
        ..snapshot.begun()
    };
    if snapshot.side() == Some(Side::Target) {
        halves::from_other(snapshot, &mut state);
    }
    plan.actions.push(Action::PatchVmi(json!({"migrationState": state})));
    status.enter(Phase::PreparingTarget, now);
}

/// One that handlers and launchers have in hand.
fn follow(snapshot: &Snapshot, status: &mut Status, plan: &mut Plan) {
    let now = snapshot.now;
    let Some(state) = snapshot.state() else {
        // It may not be seen yet, right after it was written.
        if status.since().is_some_and(|since| now.duration_since(since) < UNSEEN) {
            plan.again = Some(AGAIN);
            return;
        }
        return fail(snapshot, status, "another migration has taken its place", plan);
    };
    if state.failed == Some(true) {
        let why = state.failure_reason.unwrap_or_else(|| "nobody says why".into());
        return fail(snapshot, status, &why, plan);
    }
    if state.target_node_address.is_some() && status.phase < Phase::TargetReady {
        status.enter(Phase::TargetReady, now);
    }
    if state.start_timestamp.is_some() {
        status.enter(Phase::Running, now);
    }
    if state.completed == Some(true) {
        status.enter(Phase::Succeeded, now);
        let message = "Source node reported migration succeeded".into();
        plan.actions.push(Action::Say { warning: false, reason: "SuccessfulMigration", message });
        return;
    }
    if state.target_node_domain_ready_timestamp.is_some() {
        return settle(snapshot, &state, plan);
    }
    if let Some(since) = snapshot.heard.filter(|since| now.duration_since(*since) > GONE) {
        // N.B. nothing is known of the guest: its record keeps what may have it.
        let node = state.source_node.unwrap_or_default();
        let why = format!(
            "node {node}, which runs the guest, is silent since {since}: who has the guest is known once \
             it is back, or a person has tainted it as out of service"
        );
        return fail(snapshot, status, &why, plan);
    }
    plan.again = Some(AGAIN * 10);
    // N.B. after the state is there: by that, migrations before this one know that it is not theirs.
    if snapshot.label() != state.target_node.as_deref() {
        plan.actions.push(Action::Label(json!({keys::TARGET_NODE: state.target_node})));
    }
    if let Some(side) = snapshot.side() {
        halves::hear(snapshot, side, &state, status, plan);
        if side == Side::Target {
            // Its source ends it, and says so.
            return;
        }
    }
    let begun = state.start_timestamp.is_some();
    let late = !begun && status.since().is_some_and(|since| now.duration_since(since) > BEGIN);
    if (snapshot.leaves() || late) && state.abort_requested != Some(true) {
        plan.actions.push(Action::PatchVmi(json!({"migrationState": {"abortRequested": true}})));
    }
}

/// The guest runs at the target, but its source has not said that it has left.
fn settle(snapshot: &Snapshot, state: &State, plan: &mut Plan) {
    let source = snapshot.pods.iter().find(|pod| pod.metadata.name == state.source_pod);
    let ready = state.target_node_domain_ready_timestamp.as_deref();
    let ready = ready.and_then(|at| at.parse::<Timestamp>().ok());
    let silent = ready.is_some_and(|at| snapshot.now.duration_since(at) > SILENT);
    if source.is_none_or(|pod| is_terminal(pod)) || silent {
        let end = moment(snapshot.now);
        plan.actions.push(Action::PatchVmi(json!({
            "migrationState": {"completed": true, "endTimestamp": end},
        })));
    } else {
        plan.again = Some(AGAIN * 10);
    }
}

pub(super) fn fail(snapshot: &Snapshot, status: &mut Status, why: &str, plan: &mut Plan) {
    status.enter(Phase::Failed, snapshot.now);
    let state = status.migration_state.get_or_insert_default();
    state.failed = Some(true);
    state.failure_reason.get_or_insert_with(|| why.to_owned());
    let open = snapshot.state().is_some_and(|state| !state.is_over());
    if open && snapshot.side() == Some(Side::Target) {
        // Whose source is elsewhere: nobody else ends it here.
        let ended = json!({
            "failed": true, "completed": true, "failureReason": why,
            "endTimestamp": moment(snapshot.now),
        });
        plan.actions.push(Action::PatchVmi(json!({"migrationState": ended})));
    }
    plan.actions.push(Action::Say {
        warning: true,
        reason: "FailedMigration",
        message: format!("Migration failed: {why}"),
    });
}
