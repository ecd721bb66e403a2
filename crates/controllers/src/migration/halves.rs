//! Migrations between two VMIs, of one cluster or of two: each side's own waits and what it takes from
//! the other's [half](api::migration::Half). Pure.
//!
//! ```text
//! source: Synchronizing --target is there--> Pending --turn--> Scheduling --its pod is ready--> PreparingTarget
//! target: WaitingForSync --source has its turn--> Pending --> Scheduling --pod is ready--> PreparingTarget
//! ```
//!
//! From there on handlers and launchers have it, on both sides.

use super::plan::{Action, BEGIN, Plan, Snapshot, fail};
use api::conditions::{self, Condition};
use api::keys;
use api::migration::{End, Half, Phase, Side, State, Status};
use jiff::SignedDuration;
use kube::ResourceExt;
use serde_json::json;
use std::time::Duration;

/// A side that hears nothing of the other is given up after this, unless its annotation says otherwise.
const SYNC: SignedDuration = SignedDuration::from_mins(30);
/// The other side does not answer; as KubeVirt has it.
const BLOCKED: &str = "decentralizedMigrationBlocked";
/// What nobody rings for is looked at again after this.
const AGAIN: Duration = Duration::from_secs(5);

impl Snapshot {
    /// Which side it is of a migration between two VMIs.
    pub(super) fn side(&self) -> Option<Side> {
        self.migration.spec.half().map(|(side, _)| side)
    }

    /// What the other side said last.
    pub(super) fn other(&self) -> Option<&Half> {
        self.migration.status.as_ref()?.peer.as_ref()?.half.as_ref()
    }

    /// Whether the other side's cluster is not believed any more.
    fn is_revoked(&self) -> bool {
        let peer = self.migration.status.as_ref().and_then(|status| status.peer.as_ref());
        peer.is_some_and(|peer| peer.revoked)
    }

    fn trouble(&self) -> Option<&str> {
        self.migration.status.as_ref()?.peer.as_ref()?.trouble.as_deref()
    }
}

/// What holds on every side at any time: where it is found, and whether the other is heard of. True: it
/// goes on as its phase has it.
pub(super) fn follow_other(
    snapshot: &Snapshot,
    side: Side,
    status: &mut Status,
    plan: &mut Plan,
) -> bool {
    let now = snapshot.now;
    if side == Side::Target && status.synchronization_addresses != snapshot.addresses {
        status.synchronization_addresses.clone_from(&snapshot.addresses);
    }
    let blocked =
        snapshot.trouble().map(|why| Condition::new(BLOCKED, true, "PeerNotHeardOf", why));
    let blocked: Vec<_> = blocked.into_iter().collect();
    status.conditions = conditions::merge(&status.conditions, blocked, &[BLOCKED], now);
    let Some(other) = snapshot.other() else { return true };
    if may_have_come(snapshot, side) {
        // A guest survives its source: whose it is, the record says.
        plan.again = Some(AGAIN);
        return true;
    }
    if let Some(why) = &other.failed {
        let why = format!("it failed at the other side, cluster {}: {why}", other.cluster);
        fail(snapshot, status, &why, plan);
        return false;
    }
    if snapshot.is_revoked() && !status.phase.is_handed_off() {
        let why = format!("cluster {} is not believed any more: was it unlinked?", other.cluster);
        fail(snapshot, status, &why, plan);
        return false;
    }
    if other.aborts && !status.phase.is_handed_off() {
        let why = format!("it was cancelled at the other side, cluster {}", other.cluster);
        fail(snapshot, status, &why, plan);
        return false;
    }
    true
}

/// Whether a target has the guest, or may come to have it, whatever became of the source.
fn may_have_come(snapshot: &Snapshot, side: Side) -> bool {
    let record = snapshot.owner.as_ref().and_then(|owner| owner.status.as_ref());
    let (Some(record), Some(pod)) = (record, snapshot.target()) else { return false };
    let uid = snapshot.migration.uid().unwrap_or_default();
    let has = record.state == "idle" && record.pod == pod.metadata.name && !record.is_over();
    side == Side::Target && (has || record.may_come_by(&uid))
}

/// What a source's record says of a guest that does not run at its VMI any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Gone {
    /// It may yet be found to have left by this migration.
    Armed,
    /// It has left by it, and is not known to have come.
    Astray,
    /// It has come.
    Arrived,
}

/// What became of a source's guest whose VMI has ended. None: it has not left by this migration.
pub(super) fn gone(snapshot: &Snapshot) -> Option<Gone> {
    let record = snapshot.owner.as_ref()?.status.as_ref()?;
    let other = snapshot.other().filter(|_| snapshot.side() == Some(Side::Source))?;
    record.of.as_ref().filter(|of| of.attempt == other.migration)?;
    record.other_ledger()?;
    match &*record.state {
        "committed" if record.has_arrived().is_some() => Some(Gone::Arrived),
        "committed" => Some(Gone::Astray),
        "armed" => Some(Gone::Armed),
        _ => None,
    }
}

/// One that waits for its other side to say that it is there.
pub(super) fn synchronize(snapshot: &Snapshot, side: Side, status: &mut Status, plan: &mut Plan) {
    let now = snapshot.now;
    let waits = match side {
        Side::Source => Phase::Synchronizing,
        Side::Target => Phase::WaitingForSync,
    };
    status.enter(waits, now);
    let is_there = snapshot.other().is_some_and(|other| match side {
        Side::Source => other.phase >= Phase::WaitingForSync,
        Side::Target => other.phase >= Phase::Scheduling && other.node.is_some(),
    });
    if is_there {
        return status.enter(Phase::Pending, now);
    }
    let patience = snapshot.patience(keys::SYNC_TIMEOUT, SYNC);
    let since = status.since().unwrap_or(now);
    if now.duration_since(since) > patience {
        let why = snapshot.trouble().unwrap_or("nobody has called");
        let seconds = patience.as_secs();
        let why = format!("its other side was not heard of within {seconds} s: {why}");
        return fail(snapshot, status, &why, plan);
    }
    plan.again = Some(AGAIN);
}

/// A source that has its turn: its handler is told once the target's pod is ready.
pub(super) fn hand_off(snapshot: &Snapshot, status: &mut Status, plan: &mut Plan) {
    let now = snapshot.now;
    // N.B. a half is made of several objects, of which its synchronizer may have seen one before another.
    let whole = |other: &&Half| {
        other.phase >= Phase::PreparingTarget
            && [&other.node, &other.pod, &other.gateway].iter().all(|part| part.is_some())
    };
    let Some(other) = snapshot.other().filter(whole) else {
        let patience = snapshot.patience(keys::PENDING_TIMEOUT, super::plan::PENDING);
        if status.since().is_some_and(|since| now.duration_since(since) > patience) {
            let seconds = patience.as_secs();
            let why = format!("the target was not ready within {seconds} s");
            let why = snapshot.trouble().map_or(why.clone(), |trouble| format!("{why}: {trouble}"));
            return fail(snapshot, status, &why, plan);
        }
        plan.again = Some(AGAIN);
        return;
    };
    if snapshot.state().is_none() {
        let found = snapshot.vmi.as_ref().and_then(|vmi| vmi.status.clone()).unwrap_or_default();
        let record =
            snapshot.owner.as_ref().and_then(|owner| owner.status.clone()).unwrap_or_default();
        let mut state = snapshot.begun();
        state.source_node = found.node_name;
        state.source_pod = record.pod;
        state.target_node.clone_from(&other.node);
        state.target_pod.clone_from(&other.pod);
        state.target_state = Some(End::from(other));
        plan.actions.push(Action::PatchVmi(json!({"migrationState": state})));
    }
    status.enter(Phase::PreparingTarget, now);
}

/// What a target's state says of its source.
pub(super) fn from_other(snapshot: &Snapshot, state: &mut State) {
    if let Some(other) = snapshot.other() {
        state.source_node.clone_from(&other.node);
        state.source_pod.clone_from(&other.pod);
        state.source_state = Some(End::from(other));
    }
}

/// What a side takes from the other's half, once handlers have it in hand. A target ends by itself if its
/// launcher has given the guest up, or none has begun to come: its source may be gone for good.
pub(super) fn hear(
    snapshot: &Snapshot,
    side: Side,
    state: &State,
    status: &mut Status,
    plan: &mut Plan,
) {
    let Some(other) = snapshot.other() else { return };
    let record = snapshot.owner.as_ref().and_then(|owner| owner.status.as_ref());
    let uid = snapshot.migration.uid().unwrap_or_default();
    let given_up = record.is_some_and(|record| {
        record.state == "expected"
            && record.of.as_ref().is_some_and(|of| of.attempt == uid)
            && !record.may_come_by(&uid)
    });
    let waited = status.since().map(|since| snapshot.now.duration_since(since));
    let late = state.target_node_address.is_none() && waited.is_some_and(|waited| waited > BEGIN);
    if side == Side::Target && (given_up || late) {
        let why = match given_up {
            true => "the guest has not come: its launcher here has given it up",
            false => "its source has not begun to send it",
        };
        return fail(snapshot, status, why, plan);
    }
    // N.B. a launcher that is past its commit does not stop any more.
    let aborts = snapshot.is_revoked() || other.aborts && side == Side::Source;
    match side {
        _ if aborts && state.abort_requested != Some(true) => {
            plan.actions
                .push(Action::PatchVmi(json!({"migrationState": {"abortRequested": true}})));
        }
        Side::Target if other.started.is_some() && state.start_timestamp.is_none() => {
            let started = json!({"startTimestamp": other.started, "mode": "PreCopy"});
            plan.actions.push(Action::PatchVmi(json!({"migrationState": started})));
        }
        _ => {}
    }
}

/// A VMI that waits for a guest can take it.
pub(super) fn waits_for_guest(vmi: &api::vmi::VirtualMachineInstance) -> bool {
    vmi.annotations().contains_key(keys::RECEIVES)
        && vmi.status.as_ref().is_some_and(|s| s.phase == api::vmi::Phase::WaitingForSync)
}
