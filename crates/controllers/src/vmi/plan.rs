//! What is to be done about a VMI. Pure.

mod supervise;

use super::launches;
use super::pod::{Wanted, is_block};
use crate::world::label;
use api::conditions::{self, Condition, types};
use api::datavolume::{self, DataVolume};
use api::keys;
use api::kubevirt::KubeVirt;
use api::owner::OwnerRecord;
use api::vmi::{ClaimInfo, Phase, Spec, Status, VirtualMachineInstance, VolumeStatus};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, PersistentVolumeClaim, Pod};
use kube::ResourceExt;
use serde_json::{Value, json};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;
use supervise::{doubt, expect, supervise};

/// What nobody rings for is looked at again after this.
const AGAIN: Duration = Duration::from_secs(2);

/// A claim's name, the claim, and the DataVolume that fills it.
pub type ClaimOf = (String, Option<Arc<PersistentVolumeClaim>>, Option<Arc<DataVolume>>);

/// A VMI and what there is of it.
pub struct Snapshot {
    /// The VMI.
    pub vmi: Arc<VirtualMachineInstance>,
    /// What Godwit does of its spec.
    pub spec: Result<Spec, String>,
    /// The claims that it names.
    pub claims: Vec<ClaimOf>,
    /// The DataVolumes to which one of these claims is being cloned.
    pub readers: Vec<String>,
    /// Its pods.
    pub pods: Vec<Arc<Pod>>,
    /// Who may run its guest.
    pub owner: Option<Arc<OwnerRecord>>,
    /// The owner's node.
    pub node: Option<Arc<Node>>,
    /// The node of the heir, where a move is not decided.
    pub heir_node: Option<Arc<Node>>,
    /// The cluster's settings.
    pub cluster: Option<Arc<KubeVirt>>,
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
    /// Make the owner record.
    CreateRecord,
    /// Make a pod.
    CreatePod(Box<Pod>),
    /// Delete a pod.
    DeletePod(String),
    /// Write down that the owner has ended, since a person said that its node is off.
    Fence {
        /// As it was read.
        record: Arc<OwnerRecord>,
        /// Which node.
        node: String,
        /// Who has ended.
        instance: String,
        /// Where that is said.
        field: &'static str,
    },
    /// Change the VMI itself.
    Patch(Value),
    /// Change its status.
    PatchStatus(Value),
    /// Tell people.
    Say {
        /// Something is wrong.
        warning: bool,
        /// In one word.
        reason: &'static str,
        /// What.
        message: String,
    },
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Action::CreateRecord => f.write_str("create the owner record"),
            Action::CreatePod(pod) => write!(f, "create pod {}", pod.name_any()),
            Action::DeletePod(pod) => write!(f, "delete pod {pod}"),
            Action::Fence { node, .. } => write!(f, "write down that {node} is out of service"),
            Action::Patch(_) => f.write_str("change the virtual machine instance"),
            Action::PatchStatus(_) => f.write_str("write the virtual machine instance's status"),
            Action::Say { .. } => f.write_str("tell of it"),
        }
    }
}

impl Snapshot {
    fn status(&self) -> Status {
        self.vmi.status.clone().unwrap_or_default()
    }

    /// Nobody runs the guest, for certain.
    fn is_over(&self) -> bool {
        let status = self.owner.as_ref().and_then(|owner| owner.status.as_ref());
        status.is_none_or(api::owner::Status::is_over)
    }

    /// Whether the guest is another VMI's, and its QEMU here has ended.
    fn has_left(&self) -> bool {
        let status = self.owner.as_ref().and_then(|owner| owner.status.as_ref());
        status.is_some_and(|status| status.has_arrived().is_some() && status.is_over())
    }

    /// Where the guest was to go, that has ended here and may not have come there.
    fn is_astray(&self) -> Option<api::owner::Ledger> {
        self.owner.as_ref()?.status.as_ref()?.is_astray()
    }

    /// The pods of a VMI that has ended, but for those to which a move that is not decided may still
    /// bring the guest.
    fn spent(&self) -> impl Iterator<Item = &Arc<Pod>> {
        let record = self.owner.as_ref().and_then(|owner| owner.status.as_ref());
        let comes = move |pod: &Pod| {
            let attempt = label(pod, keys::MIGRATION);
            let open = |record: &api::owner::Status| record.may_be_in(&pod.name_any(), attempt);
            attempt.is_some() && record.is_some_and(open)
        };
        self.pods.iter().filter(move |pod| pod.metadata.deletion_timestamp.is_none() && !comes(pod))
    }

    /// The pod that runs the guest, or is to begin it: not one to which it may move.
    fn launcher(&self) -> Option<&Arc<Pod>> {
        let owner = self.owner.as_ref().and_then(|owner| owner.status.as_ref()?.pod.as_deref());
        let mut launching = self.pods.iter().filter(|pod| launches(pod));
        let owning = launching.clone().find(|pod| pod.metadata.name.as_deref() == owner);
        owning.or_else(|| launching.find(|pod| label(&***pod, keys::MIGRATION).is_none()))
    }
}

fn phase_of(pod: &Pod) -> &str {
    pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or_default()
}

pub(crate) fn is_terminal(pod: &Pod) -> bool {
    matches!(phase_of(pod), "Succeeded" | "Failed")
}

pub(crate) fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    phase_of(pod) == "Running"
        && conditions.into_iter().any(|c| c.type_ == "Ready" && c.status == "True")
}

/// What is to be done.
pub fn plan(snapshot: &Snapshot) -> Plan {
    let mut plan = Plan::default();
    fence(snapshot, &mut plan);
    let status = snapshot.status();
    let leaves = snapshot.vmi.metadata.deletion_timestamp.is_some();
    if leaves && let Some(done) = leave(snapshot, &status, &mut plan) {
        write(snapshot, done, &mut plan);
        return plan;
    }
    if let Some(next) = advance(snapshot, status, &mut plan) {
        write(snapshot, next, &mut plan);
    }
    let ended = snapshot.status().phase.is_final();
    if ended && !snapshot.is_over() {
        // A person's word about a node does not ring.
        plan.again.get_or_insert(AGAIN);
    }
    plan
}

/// A person's word that a node is off stands for the end of what ran on it: of the owner, and of the
/// heir of a move.
fn fence(snapshot: &Snapshot, plan: &mut Plan) {
    let record = snapshot.owner.as_ref().and_then(|owner| Some((owner, owner.status.as_ref()?)));
    let Some((owner, record)) = record.filter(|(_, record)| !record.is_over()) else { return };
    let heir = record.of.as_ref().map(|of| &of.heir);
    let both =
        [("ended", Some(&record.owner), &snapshot.node), ("heirEnded", heir, &snapshot.heir_node)];
    for (field, instance, node) in both {
        let (Some(instance), Some(node)) = (instance, node) else { continue };
        let taints = node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
        let is_off = taints.into_iter().any(|taint| taint.key == keys::OUT_OF_SERVICE);
        if !is_off || record.has_ended(instance) {
            continue;
        }
        let node = node.name_any();
        let message = format!(
            "node {node} is marked as out of service: what ran on it counts as ended, by the word of \
             whoever marked it"
        );
        let (record, instance) = (Arc::clone(owner), instance.clone());
        plan.actions.push(Action::Fence { record, node, instance, field });
        plan.actions.push(Action::Say { warning: true, reason: "OutOfService", message });
    }
}

/// A VMI that is deleted. None: there is a guest, which its handler lets shut down first.
fn leave(snapshot: &Snapshot, status: &Status, plan: &mut Plan) -> Option<Status> {
    let held = snapshot.vmi.finalizers().iter().any(|f| f == keys::VMI_FINALIZER);
    let with_handler = matches!(status.phase, Phase::Scheduled | Phase::Running | Phase::Unknown);
    let unborn = snapshot.is_over() && !with_handler;
    if !unborn && !status.phase.is_final() {
        return None;
    }
    plan.actions.extend(snapshot.spent().map(|pod| Action::DeletePod(pod.name_any())));
    let mut next = status.clone();
    if !next.phase.is_final() {
        next.enter(Phase::Succeeded, snapshot.now);
    }
    if snapshot.pods.is_empty() && snapshot.is_over() && held {
        let kept: Vec<_> =
            snapshot.vmi.finalizers().iter().filter(|f| *f != keys::VMI_FINALIZER).collect();
        let version = snapshot.vmi.resource_version();
        plan.actions.push(Action::Patch(
            json!({"metadata": {"finalizers": kept, "resourceVersion": version}}),
        ));
        return None;
    }
    if snapshot.pods.is_empty() && !snapshot.is_over() {
        doubt(snapshot, &mut next, plan);
    }
    Some(next)
}

/// The next step of a VMI's life. None: nothing of its status is ours to change now.
fn advance(snapshot: &Snapshot, mut status: Status, plan: &mut Plan) -> Option<Status> {
    let now = snapshot.now;
    match status.phase {
        Phase::Unset => {
            status.enter(Phase::Pending, now);
            let reason = Condition::new(
                types::READY,
                false,
                "PodNotExists",
                "virt-launcher pod has not yet been scheduled",
            );
            status.conditions = conditions::merge(&status.conditions, vec![reason], &[], now);
            Some(status)
        }
        Phase::Pending => Some(prepare(snapshot, status, plan)),
        Phase::Scheduling => Some(schedule(snapshot, status, plan)),
        Phase::Scheduled | Phase::Running | Phase::Unknown => supervise(snapshot, status, plan),
        Phase::Succeeded | Phase::Failed => {
            plan.actions.extend(snapshot.spent().map(|pod| Action::DeletePod(pod.name_any())));
            let ended = Condition::new(types::READY, false, "GuestNotRunning", "");
            status.conditions =
                conditions::merge(&status.conditions, vec![ended], &[types::PAUSED], now);
            status.active_pods = active(snapshot);
            Some(status)
        }
        Phase::WaitingForSync => Some(expect(snapshot, status, plan)),
    }
}

/// Why a VMI waits, as a condition.
struct Waits(&'static str, String);

/// A VMI that waits for what its pod needs.
fn prepare(snapshot: &Snapshot, mut status: Status, plan: &mut Plan) -> Status {
    let now = snapshot.now;
    let spec = match &snapshot.spec {
        Ok(spec) => spec,
        Err(why) => {
            let message = format!("the spec cannot be understood: {why}");
            let wrong = Condition::new(types::SYNCHRONIZED, false, "InvalidSpec", &message);
            status.conditions = conditions::merge(&status.conditions, vec![wrong], &[], now);
            return status;
        }
    };
    if snapshot.cluster.is_none() {
        plan.again = Some(AGAIN);
        return status;
    }
    let claims = match claims(snapshot) {
        Ok(claims) => claims,
        Err(Waits(reason, message)) => return wait(snapshot, status, reason, message, plan),
    };
    if snapshot.owner.is_none() {
        plan.actions.push(Action::CreateRecord);
    } else if !snapshot.is_over() {
        // A guest of this name may run somewhere: no pod is made that could become a second one.
        doubt(snapshot, &mut status, plan);
        return status;
    }
    if let Some(Waits(reason, message)) = is_cloned(snapshot) {
        return wait(snapshot, status, reason, message, plan);
    }
    if snapshot.vmi.annotations().contains_key(keys::RECEIVES) {
        // A migration makes its pod.
        let message = "it waits for a guest from elsewhere";
        let waits = Condition::new(types::READY, false, "WaitingForSync", message);
        let gone = [types::SYNCHRONIZED, types::IN_DOUBT];
        status.conditions = conditions::merge(&status.conditions, vec![waits], &gone, now);
        status.volume_status = volumes(snapshot);
        status.enter(Phase::WaitingForSync, now);
        return status;
    }
    let pending = |volume: &Option<Arc<DataVolume>>| {
        let phase = volume.as_ref().map(|v| v.status.as_ref().map(|s| s.phase).unwrap_or_default());
        phase.filter(|phase| *phase != datavolume::Phase::Succeeded)
    };
    let waiting: Vec<_> = snapshot.claims.iter().filter_map(|(_, _, v)| pending(v)).collect();
    let suffix =
        suffix(&snapshot.vmi.uid().unwrap_or_default(), status.phase_transition_timestamps.len());
    let settings = snapshot.cluster.as_ref().map(|cluster| &cluster.spec.configuration);
    let emulated = settings.is_some_and(|all| all.developer_configuration.use_emulation);
    let wanted = |binds| {
        // N.B. names of their own: the one may still be about to go when the other is made.
        let suffix = if binds { format!("{suffix}-binds") } else { suffix.clone() };
        let (vmi, suffix) = (&*snapshot.vmi, &*suffix);
        Wanted { vmi, spec, claims: &claims, suffix, emulated, binds, target: None }.pod()
    };
    let (pod, ready) = if waiting.is_empty() {
        for pod in snapshot.pods.iter().filter(|pod| !launches(pod)) {
            plan.actions.push(Action::DeletePod(pod.name_any()));
        }
        (snapshot.launcher().is_none().then(|| wanted(false)), true)
    } else {
        let binds = waiting.contains(&datavolume::Phase::WaitForFirstConsumer)
            && snapshot.pods.iter().all(|pod| launches(pod));
        (binds.then(|| wanted(true)), false)
    };
    let volumes = match ready {
        true => Condition::new(
            types::DATA_VOLUMES_READY,
            true,
            "AllDVsReady",
            "All of the VMI's DVs are bound and not running",
        ),
        false => Condition::new(
            types::DATA_VOLUMES_READY,
            false,
            "NotAllDVsReady",
            "Not all of the VMI's DVs are ready",
        ),
    };
    status.conditions = conditions::merge(
        &status.conditions,
        vec![volumes],
        &[types::SYNCHRONIZED, types::IN_DOUBT],
        now,
    );
    match pod {
        Some(Ok(pod)) => plan.actions.push(Action::CreatePod(Box::new(pod))),
        Some(Err(error)) => {
            let message = format!("its pod cannot be made: {error}");
            let wrong = Condition::new(types::SYNCHRONIZED, false, "FailedCreate", &message);
            status.conditions = conditions::merge(&status.conditions, vec![wrong], &[], now);
            return status;
        }
        None => {}
    }
    if ready {
        status.enter(Phase::Scheduling, now);
    }
    status
}

/// It waits, and says why.
fn wait(
    snapshot: &Snapshot,
    mut status: Status,
    reason: &'static str,
    message: String,
    plan: &mut Plan,
) -> Status {
    let waits = Condition::new(types::SYNCHRONIZED, false, reason, &message);
    if !status.conditions.iter().any(|c| c.reason.as_deref() == Some(reason)) {
        let warning = reason == "ErrorPvcNotFound";
        plan.actions.push(Action::Say { warning, reason, message });
    }
    status.conditions = conditions::merge(&status.conditions, vec![waits], &[], snapshot.now);
    status
}

/// A guest must not write to what a clone reads.
fn is_cloned(snapshot: &Snapshot) -> Option<Waits> {
    if snapshot.readers.is_empty() || snapshot.launcher().is_some() {
        return None;
    }
    let message = format!(
        "a disk of it is being cloned, to DataVolume {}: it starts once that is complete or deleted",
        snapshot.readers.join(", ")
    );
    Some(Waits("CloneInProgress", message))
}

/// A short name that two lives of a VMI's pods do not share.
fn suffix(uid: &str, turn: usize) -> String {
    let hash = uuid::Uuid::new_v5(&uuid::Uuid::NAMESPACE_OID, format!("{uid} {turn}").as_bytes());
    hash.simple().to_string().chars().take(5).collect()
}

type Found<'a> = Vec<(&'a str, &'a PersistentVolumeClaim)>;

/// The claims that it names, when all are there.
fn claims(snapshot: &Snapshot) -> Result<Found<'_>, Waits> {
    let mut found = Vec::new();
    for (name, claim, volume) in &snapshot.claims {
        match (claim, volume) {
            (Some(claim), _) => found.push((&**name, &**claim)),
            (None, Some(_)) => {
                let message = format!("DataVolume {name} has no claim yet");
                return Err(Waits("DataVolumePending", message));
            }
            (None, None) => {
                let message = format!(
                    "there is no claim {name} in namespace {}: make it, or correct the volume that \
                     names it",
                    snapshot.vmi.namespace().unwrap_or_default()
                );
                return Err(Waits("ErrorPvcNotFound", message));
            }
        }
    }
    Ok(found)
}

/// A VMI whose pod looks for a node.
fn schedule(snapshot: &Snapshot, mut status: Status, plan: &mut Plan) -> Status {
    let now = snapshot.now;
    status.active_pods = active(snapshot);
    let Some(pod) = snapshot.launcher() else {
        // It may not be seen yet, right after it was made.
        let since = status.phase_transition_timestamps.last();
        let since = since.and_then(|t| t.at());
        let patience = jiff::SignedDuration::from_secs(10);
        if since.is_some_and(|since| now.duration_since(since) < patience) {
            plan.again = Some(AGAIN);
            return status;
        }
        return fail(
            snapshot,
            status,
            "PodDeleted",
            "its pod was deleted before it could start",
            plan,
        );
    };
    if is_terminal(pod) {
        let message =
            format!("pod {} ended before the guest could start: {}", pod.name_any(), ending(pod));
        return fail(snapshot, status, "PodFailed", &message, plan);
    }
    let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone());
    if let (true, Some(node)) = (is_ready(pod), node) {
        status.enter(Phase::Scheduled, now);
        status.node_name = Some(node.clone());
        status.volume_status = volumes(snapshot);
        let gone = [types::SYNCHRONIZED];
        status.conditions = conditions::merge(&status.conditions, Vec::new(), &gone, now);
        plan.actions.push(Action::Patch(json!({"metadata": {"labels": {keys::NODE: node}}})));
        return status;
    }
    if let Some((reason, message)) = trouble(pod) {
        let waits = Condition::new(types::SYNCHRONIZED, false, &reason, &message);
        status.conditions = conditions::merge(&status.conditions, vec![waits], &[], now);
    }
    status
}

/// Why a pod does not start.
pub(crate) fn trouble(pod: &Pod) -> Option<(String, String)> {
    let status = pod.status.as_ref()?;
    let scheduled = status.conditions.iter().flatten().find(|c| c.type_ == "PodScheduled");
    if let Some(c) = scheduled.filter(|c| c.status == "False") {
        return Some((c.reason.clone()?, c.message.clone().unwrap_or_default()));
    }
    let waiting =
        status.container_statuses.iter().flatten().find_map(|container| {
            container.state.as_ref().and_then(|state| state.waiting.clone())
        })?;
    let reason = waiting.reason?;
    (reason != "ContainerCreating").then(|| (reason, waiting.message.unwrap_or_default()))
}

/// How a pod's container ended.
fn ending(pod: &Pod) -> String {
    let statuses = pod.status.iter().flat_map(|s| s.container_statuses.iter().flatten());
    let ended = statuses.into_iter().find_map(|c| c.state.as_ref()?.terminated.clone());
    match ended {
        Some(ended) => {
            let said = ended.message.map(|said| format!(": {}", said.trim())).unwrap_or_default();
            format!("exit code {}{said}", ended.exit_code)
        }
        None => pod.status.as_ref().and_then(|s| s.message.clone()).unwrap_or_default(),
    }
}

fn fail(
    snapshot: &Snapshot,
    mut status: Status,
    reason: &'static str,
    message: &str,
    plan: &mut Plan,
) -> Status {
    let leaves = snapshot.vmi.metadata.deletion_timestamp.is_some();
    status.enter(if leaves { Phase::Succeeded } else { Phase::Failed }, snapshot.now);
    status.reason = Some(reason.into());
    let wrong = Condition::new(types::READY, false, reason, message);
    status.conditions =
        conditions::merge(&status.conditions, vec![wrong], &[types::IN_DOUBT], snapshot.now);
    plan.actions.push(Action::Say { warning: true, reason, message: message.into() });
    status
}

fn active(snapshot: &Snapshot) -> std::collections::BTreeMap<String, String> {
    let live = snapshot.pods.iter().filter(|pod| launches(pod) && !is_terminal(pod));
    live.map(|pod| {
        let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone());
        (pod.uid().unwrap_or_default(), node.unwrap_or_default())
    })
    .collect()
}

fn volumes(snapshot: &Snapshot) -> Vec<VolumeStatus> {
    let Ok(spec) = &snapshot.spec else { return Vec::new() };
    let info = |name: &str| {
        let claim = snapshot.claims.iter().find(|(n, _, _)| n == name)?.1.clone()?;
        Some(claim_info(&claim))
    };
    let of = |volume: &api::vmi::Volume| VolumeStatus {
        name: volume.name.clone(),
        persistent_volume_claim_info: volume.claim().and_then(info),
        ..VolumeStatus::default()
    };
    spec.volumes.iter().map(of).collect()
}

/// What a VMI's status says of a claim.
pub(crate) fn claim_info(claim: &PersistentVolumeClaim) -> ClaimInfo {
    let asked = claim.spec.clone().unwrap_or_default();
    ClaimInfo {
        claim_name: claim.name_any(),
        access_modes: asked.access_modes.clone().unwrap_or_default(),
        volume_mode: Some(if is_block(claim) { "Block" } else { "Filesystem" }.into()),
        capacity: claim.status.as_ref().and_then(|s| s.capacity.clone()).unwrap_or_default(),
        requests: asked.resources.and_then(|r| r.requests).unwrap_or_default(),
    }
}

fn write(snapshot: &Snapshot, status: Status, plan: &mut Plan) {
    if snapshot.vmi.status.as_ref() == Some(&status) {
        return;
    }
    let mut patch = serde_json::to_value(&status).unwrap_or_default();
    // A merge patch removes what is null.
    for uid in snapshot.status().active_pods.keys() {
        if !status.active_pods.contains_key(uid) {
            patch["activePods"][uid] = Value::Null;
        }
    }
    plan.actions.push(Action::PatchStatus(patch));
}
