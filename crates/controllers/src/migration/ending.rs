//! A migration that is over: what it has made goes, and what holds it. Pure.

use super::disks;
use super::plan::{AGAIN, Action, Plan, Snapshot};
use api::keys;
use api::migration::{Phase, Status};
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use kube::ResourceExt;
use serde_json::json;

/// Migrations of a VMI that are kept when they are over; as KubeVirt.
const KEPT: usize = 5;

/// One that is over: what it has made goes, and then what holds it.
pub(super) fn clear_away(snapshot: &Snapshot, status: &Status, plan: &mut Plan) {
    let target = snapshot.target().filter(|_| status.phase == Phase::Failed);
    if let Some(pod) = target.map(|pod| pod.name_any()) {
        if snapshot.may_own(&pod) {
            // The owner record rings when that is decided.
            return;
        }
        if snapshot.target().is_some_and(|pod| pod.metadata.deletion_timestamp.is_none()) {
            plan.actions.push(Action::DeletePod(pod));
        }
    }
    match status.phase {
        Phase::Failed if !forget_disks(snapshot, plan) => return,
        Phase::Failed => {}
        _ => forget_copies(snapshot, plan),
    }
    if let Some(binder) = snapshot.binder().filter(|p| p.metadata.deletion_timestamp.is_none()) {
        plan.actions.push(Action::DeletePod(binder.name_any()));
    }
    let label = snapshot.label();
    if label.is_some() && snapshot.state().is_some_and(|s| s.target_node.as_deref() == label) {
        plan.actions.push(Action::Label(json!({keys::TARGET_NODE: null})));
    }
    let finalizers = snapshot.migration.finalizers();
    if finalizers.iter().any(|f| f == keys::MIGRATION_FINALIZER) {
        let kept: Vec<_> = finalizers.iter().filter(|f| *f != keys::MIGRATION_FINALIZER).collect();
        let version = snapshot.migration.resource_version();
        plan.actions.push(Action::Patch(
            json!({"metadata": {"finalizers": kept, "resourceVersion": version}}),
        ));
    } else if snapshot.later >= KEPT && !snapshot.leaves() {
        plan.actions.push(Action::Delete);
    }
}

/// Half copies that earlier migrations left go: the disks have come elsewhere.
fn forget_copies(snapshot: &Snapshot, plan: &mut Plan) {
    // N.B. right after its end: a later migration may go on from what is there then.
    let holds = snapshot.migration.finalizers().iter().any(|f| f == keys::MIGRATION_FINALIZER);
    let moves = snapshot.vmi.as_ref().and_then(|vmi| Some(&vmi.status.as_ref()?.migrated_volumes));
    let goes = |name: &str| moves.into_iter().flatten().any(|m| m.destination.claim_name == name);
    let stale = snapshot.left.iter().filter(|claim| {
        is_half_copy(claim)
            && claim.labels().contains_key(keys::MIGRATION)
            && holds
            && !goes(&claim.name_any())
    });
    plan.actions.extend(stale.map(|claim| Action::DeleteClaim(claim.name_any())));
}

fn is_half_copy(claim: &PersistentVolumeClaim) -> bool {
    claim.annotations().contains_key(keys::INCOMPLETE)
        && claim.metadata.deletion_timestamp.is_none()
}

/// Disks that were to follow stay: whether nothing is left of that. What was copied of them is kept
/// for the next migration, unless this one was not wanted any more.
fn forget_disks(snapshot: &Snapshot, plan: &mut Plan) -> bool {
    let found = snapshot.vmi.as_ref().and_then(|vmi| vmi.status.as_ref());
    let moves = found.is_some_and(|status| !status.migrated_volumes.is_empty());
    if moves && !snapshot.is_volume_update() {
        plan.actions.push(Action::PatchVmi(json!({"migratedVolumes": null})));
    }
    let record = snapshot.owner.as_ref().and_then(|owner| owner.status.clone()).unwrap_or_default();
    let own = snapshot.left.iter().filter(|claim| {
        claim.labels().get(keys::MIGRATION) == snapshot.migration.uid().as_ref()
            && claim.metadata.deletion_timestamp.is_none()
            && (snapshot.leaves() || !is_half_copy(claim) || !disks::is_found_again(claim))
            && !record.volumes.values().any(|volume| *volume == claim.name_any())
    });
    let own: Vec<String> = own.map(|claim| claim.name_any()).collect();
    if own.is_empty() {
        return true;
    }
    // The pod that has them goes first.
    if snapshot.of_migration().next().is_none() {
        plan.actions.extend(own.into_iter().map(Action::DeleteClaim));
        return true;
    }
    plan.again = Some(AGAIN);
    false
}
