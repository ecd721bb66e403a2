//! A VMI whose guest runs, or ran.

use super::{AGAIN, Action, Plan, Snapshot, active, ending, fail, is_terminal};
use crate::versioned;
use crate::world::label;
use api::conditions::{self, Condition, types};
use api::keys;
use api::owner::Ledger;
use api::vmi::{Phase, Status};
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use serde_json::json;

/// A VMI that its handler has. Ours is to see when its pod is gone.
pub(super) fn supervise(
    snapshot: &Snapshot,
    mut status: Status,
    plan: &mut Plan,
) -> Option<Status> {
    let now = snapshot.now;
    status.active_pods = active(snapshot);
    follow_guest(snapshot, &status, plan);
    if snapshot.has_left() {
        return Some(left(snapshot, status, plan));
    }
    let receives = snapshot.vmi.annotations().contains_key(keys::RECEIVES);
    if receives && status.phase == Phase::Running {
        let arrived = json!({"metadata": {"annotations": {keys::RECEIVES: null}}});
        plan.actions.push(Action::Patch(arrived));
    }
    let pod = snapshot.launcher();
    if pod.is_some_and(|pod| !is_terminal(pod)) {
        // It was thought lost, and is not.
        let gone = [types::IN_DOUBT];
        if status.phase == Phase::Unknown {
            status.enter(Phase::Running, now);
        }
        status.conditions = conditions::merge(&status.conditions, Vec::new(), &gone, now);
        status.launcher_container_image_version = pod.and_then(|pod| image_of(pod));
        return Some(status);
    }
    if let Some(to) = snapshot.is_astray() {
        stray(snapshot, &mut status, &to, plan);
        return Some(status);
    }
    if !snapshot.is_over() {
        doubt(snapshot, &mut status, plan);
        return Some(status);
    }
    let message = match pod {
        Some(pod) => format!("pod {} ended: {}", pod.name_any(), ending(pod)),
        None => "its pod is gone".into(),
    };
    Some(fail(snapshot, status, "PodFailed", &message, plan))
}

/// A VMI that waits for its guest. One whose guest has come and ended, before its handler could say that it was
/// there, has ended: it begins anew on the disk that came.
pub(super) fn expect(snapshot: &Snapshot, mut status: Status, plan: &mut Plan) -> Status {
    status.active_pods = active(snapshot);
    let record = snapshot.owner.as_ref().and_then(|owner| owner.status.as_ref());
    let came = record.is_some_and(|record| record.came_and_ended());
    let lives = snapshot.launcher().is_some_and(|pod| !is_terminal(pod));
    if !came || lives {
        return status;
    }
    if let Some(state) = status.migration_state.as_mut().filter(|state| !state.is_over()) {
        state.completed = Some(true);
        state.end_timestamp = Some(conditions::moment(snapshot.now));
    }
    let message = "the guest came, and its pod ended before it was seen to run";
    fail(snapshot, status, "PodFailed", message, plan)
}

/// A VMI whose guest has left for another VMI and ended here before it was known to be there: the record
/// there is asked (by the synchronizer), and says that it came, or lets it go.
fn stray(snapshot: &Snapshot, status: &mut Status, to: &Ledger, plan: &mut Plan) {
    let Ledger { cluster, namespace, name } = to;
    let message = format!(
        "the guest has left for {namespace}/{name} of cluster {cluster}, and ended here before that said \
         that it runs there: its owner record is asked, and until it answers nothing is started"
    );
    be_in_doubt(snapshot, status, "HeirNotHeardOf", &message, plan);
}

/// A VMI whose guest is another VMI's now. Its handler says how it left, as long as there is its pod.
fn left(snapshot: &Snapshot, mut status: Status, plan: &mut Plan) -> Status {
    let lives = snapshot.launcher().is_some_and(|pod| !is_terminal(pod));
    if let Some(state) = status.migration_state.as_mut().filter(|state| !state.is_over()) {
        if lives {
            plan.again = Some(AGAIN);
            return status;
        }
        state.completed = Some(true);
        state.end_timestamp = Some(conditions::moment(snapshot.now));
    }
    status.enter(Phase::Succeeded, snapshot.now);
    status
}

/// A launcher's image, and the version of Godwit that made its pod: none is one that said none.
fn image_of(pod: &Pod) -> Option<String> {
    let image = pod.spec.as_ref()?.containers.first()?.image.as_deref()?;
    Some(versioned(image, pod.annotations().get(keys::VERSION).map(String::as_str)))
}

/// A guest that has moved: its VMI is found by its node, and the pod that it has left goes.
fn follow_guest(snapshot: &Snapshot, status: &Status, plan: &mut Plan) {
    if let Some(node) = &status.node_name
        && label(&*snapshot.vmi, keys::NODE) != Some(node)
    {
        plan.actions.push(Action::Patch(json!({"metadata": {"labels": {keys::NODE: node}}})));
    }
    let record = snapshot.owner.as_ref().and_then(|owner| owner.status.as_ref());
    let (Some(state), Some(record)) = (&status.migration_state, record) else { return };
    let settled = record.state == "idle" && record.pod == state.target_pod;
    if state.completed != Some(true) || !settled || state.source_pod == state.target_pod {
        return;
    }
    let left = snapshot.pods.iter().find(|pod| pod.metadata.name == state.source_pod);
    if let Some(pod) = left.filter(|pod| pod.metadata.deletion_timestamp.is_none()) {
        plan.actions.push(Action::DeletePod(pod.name_any()));
    }
}

/// Nobody knows whether the guest runs.
pub(super) fn doubt(snapshot: &Snapshot, status: &mut Status, plan: &mut Plan) {
    let record = snapshot.owner.as_ref().and_then(|owner| owner.status.clone()).unwrap_or_default();
    let node = record.node.unwrap_or_else(|| "its node".into());
    let message = format!(
        "the guest may still run on {node}, whose handler has not said that it ended: no second one is \
         started. If that node is off for certain, taint it with {}=nodeshutdown:NoExecute",
        keys::OUT_OF_SERVICE
    );
    be_in_doubt(snapshot, status, "OwnerNotHeardOf", &message, plan);
}

/// Shows that nobody knows whether the guest runs, and why.
fn be_in_doubt(
    snapshot: &Snapshot,
    status: &mut Status,
    reason: &str,
    message: &str,
    plan: &mut Plan,
) {
    if !conditions::is(&status.conditions, types::IN_DOUBT) {
        plan.actions.push(Action::Say {
            warning: true,
            reason: "InDoubt",
            message: message.to_owned(),
        });
    }
    let doubt = Condition::new(types::IN_DOUBT, true, reason, message);
    let ready = Condition::new(types::READY, false, reason, message);
    status.conditions =
        conditions::merge(&status.conditions, vec![doubt, ready], &[], snapshot.now);
    plan.again = Some(AGAIN);
}
