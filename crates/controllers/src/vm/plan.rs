//! What is to be done about a VM. Pure.

use super::elsewhere;
use super::printable::printable;
use super::shape::{self, Shape};
use super::volumes::{self, Change};
use api::conditions::{self, Condition, types};
use api::datavolume::DataVolume;
use api::instancetype::{Expanded, Taken};
use api::keys;
use api::kubevirt::KubeVirt;
use api::migration::VirtualMachineInstanceMigration;
use api::owner::OwnerRecord;
use api::vm::{
    Action as Asked, Printable, Request, RunStrategy, StartFailure, Status, VirtualMachine,
};
use api::vmi::{Phase, VirtualMachineInstance};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use kube::{Resource, ResourceExt};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

/// A guest that failed before it had run so long counts as one that did not start.
const LASTING: SignedDuration = SignedDuration::from_secs(60);
/// Pauses between starts that go wrong double, from the first to the last.
const FIRST_PAUSE: i64 = 10;
const LAST_PAUSE: i64 = 300;

/// A VM and what there is of it.
pub struct Snapshot {
    /// The VM.
    pub vm: Arc<VirtualMachine>,
    /// Its VMI.
    pub vmi: Option<Arc<VirtualMachineInstance>>,
    /// Its owner record.
    pub owner: Option<Arc<OwnerRecord>>,
    /// The DataVolumes that it names, and those of them that are there.
    pub volumes: Vec<(String, Option<Arc<DataVolume>>)>,
    /// The claims that it and its VMI name, and those of them that are there.
    pub claims: Vec<(String, Option<Arc<PersistentVolumeClaim>>)>,
    /// What it takes from its instancetype and its preference.
    pub taken: Vec<Taken>,
    /// Its VMI's migrations.
    pub moves: Vec<Arc<VirtualMachineInstanceMigration>>,
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
    pub again: Option<Timestamp>,
}

/// One thing to be done.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Make a revision that holds what it takes.
    Pin(Value),
    /// Make a DataVolume.
    CreateVolume(Value),
    /// Make the VMI.
    Start(Value),
    /// Delete the VMI.
    Stop {
        /// This one.
        uid: String,
        /// For people.
        why: &'static str,
    },
    /// Change the VM itself.
    Patch(Value),
    /// Change its status.
    PatchStatus(Value),
    /// Change the VMI's status, if it is as it was read.
    PatchVmi(Value),
    /// Let the VMI say which volumes its guest has.
    UseVolumes(Value),
    /// Mark a claim that the guest has left.
    Supersede {
        /// Which.
        claim: String,
        /// Who left it, when, and for what.
        note: String,
        /// Of which VM and volume it was.
        left_by: String,
    },
    /// Have the guest moved.
    Migrate(Value),
    /// Cancel a migration.
    Cancel(String),
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

impl Action {
    /// The reason of the event that tells that it could not be done.
    pub fn failed(&self) -> &'static str {
        match self {
            Action::CreateVolume(_) => "FailedDataVolumeCreate",
            Action::Start(_) => "FailedCreate",
            Action::Stop { .. } => "FailedDelete",
            _ => "FailedUpdate",
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Action::Pin(object) => {
                write!(f, "create ControllerRevision {}", object["metadata"]["name"])
            }
            Action::CreateVolume(object) => {
                write!(f, "create DataVolume {}", object["metadata"]["name"])
            }
            Action::Start(_) => f.write_str("create the virtual machine instance"),
            Action::Stop { .. } => f.write_str("delete the virtual machine instance"),
            Action::Patch(_) => f.write_str("change the virtual machine"),
            Action::PatchStatus(_) => f.write_str("write the virtual machine's status"),
            Action::PatchVmi(_) | Action::UseVolumes(_) => {
                f.write_str("change the virtual machine instance")
            }
            Action::Supersede { claim, .. } => write!(f, "mark claim {claim} as superseded"),
            Action::Migrate(_) => f.write_str("create a migration"),
            Action::Cancel(name) => write!(f, "cancel migration {name}"),
            Action::Say { .. } => f.write_str("tell of it"),
        }
    }
}

/// The DataVolumes that a VM's volumes name.
pub fn data_volumes(vm: &VirtualMachine) -> Vec<String> {
    let volumes = vm.spec.template.spec["volumes"].as_array().into_iter().flatten();
    let names = volumes.filter_map(|volume| volume["dataVolume"]["name"].as_str());
    let templates = vm.spec.data_volume_templates.iter().filter_map(|t| t.metadata.name.as_deref());
    let mut all: Vec<String> = names.chain(templates).map(str::to_owned).collect();
    all.sort();
    all.dedup();
    all
}

/// What a run strategy wants of the VMI now.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Wish {
    /// Let it be as it is.
    Nothing,
    /// Make one, standing still or not.
    Start { paused: bool },
    /// Make one, but not before then.
    StartAt(Timestamp),
    /// Delete it.
    Stop(&'static str),
}

/// What is to be done.
pub fn plan(snapshot: &Snapshot) -> Plan {
    let mut plan = Plan::default();
    let vm = &snapshot.vm;
    if vm.metadata.deletion_timestamp.is_some() {
        leave(snapshot, &mut plan);
        return plan;
    }
    if !vm.finalizers().iter().any(|f| f == keys::VM_FINALIZER) {
        let mut finalizers = vm.finalizers().to_vec();
        finalizers.push(keys::VM_FINALIZER.into());
        let version = vm.metadata.resource_version.clone();
        let metadata = json!({"finalizers": finalizers, "resourceVersion": version});
        plan.actions.push(Action::Patch(json!({"metadata": metadata})));
        return plan;
    }
    let mut status = vm.status.clone().unwrap_or_default();
    if shape::pin(snapshot, &mut status, &mut plan) {
        write(snapshot, status, &mut plan);
        return plan;
    }
    let shape = shape::shape(snapshot);
    match &shape {
        Ok(shape) => make_volumes(snapshot, shape, &mut plan),
        Err(trouble) => shape::tell(trouble, &status, &mut plan),
    }
    if let Some(patch) = elsewhere::settle(snapshot) {
        plan.actions.push(Action::Patch(patch));
    }
    count_failures(snapshot, &mut status);
    let change = volumes::follow(snapshot, &mut status, &mut plan);
    let wish = shape::as_it_can(wish(snapshot, &status), &shape);
    let done = follow(snapshot, &wish, &shape, &mut plan);
    status.state_change_requests = left_over(snapshot, &status.state_change_requests);
    show(snapshot, &wish, done, &shape, &change, &mut status);
    write(snapshot, status, &mut plan);
    plan
}

/// A VM that is deleted goes once its VMI has: its owner record and disks go with it.
fn leave(snapshot: &Snapshot, plan: &mut Plan) {
    let vm = &snapshot.vm;
    if let Some(vmi) = &snapshot.vmi {
        if vmi.metadata.deletion_timestamp.is_none() {
            let uid = vmi.uid().unwrap_or_default();
            plan.actions.push(Action::Stop { uid, why: "the virtual machine is deleted" });
        }
        let mut status = vm.status.clone().unwrap_or_default();
        status.printable_status = Printable::Terminating;
        write(snapshot, status, plan);
        return;
    }
    // N.B. a VMI can be taken away by force: its guest is the owner record's to tell of.
    let owner = snapshot.owner.as_ref().and_then(|owner| owner.status.as_ref());
    if owner.is_some_and(|status| !status.is_over()) {
        let mut status = vm.status.clone().unwrap_or_default();
        status.printable_status = Printable::Terminating;
        write(snapshot, status, plan);
        return;
    }
    let finalizers: Vec<_> = vm.finalizers().iter().filter(|f| *f != keys::VM_FINALIZER).collect();
    if finalizers.len() < vm.finalizers().len() {
        let version = vm.metadata.resource_version.clone();
        let metadata = json!({"finalizers": finalizers, "resourceVersion": version});
        plan.actions.push(Action::Patch(json!({"metadata": metadata})));
    }
}

fn make_volumes(snapshot: &Snapshot, shape: &Expanded, plan: &mut Plan) {
    let vm = &snapshot.vm;
    let missing = |name: &str| snapshot.volumes.iter().any(|(n, v)| n == name && v.is_none());
    for template in &vm.spec.data_volume_templates {
        let name = template.metadata.name.clone().unwrap_or_default();
        if !missing(&name) {
            continue;
        }
        let mut metadata = json!({
            "name": name, "namespace": vm.namespace(),
            "labels": template.metadata.labels, "annotations": template.metadata.annotations,
            "ownerReferences": [vm.controller_owner_ref(&())],
        });
        prune(&mut metadata);
        plan.actions.push(Action::CreateVolume(json!({
            "apiVersion": "cdi.kubevirt.io/v1beta1", "kind": "DataVolume",
            "metadata": metadata, "spec": shape.disk(&template.spec),
        })));
    }
}

/// Without fields that say nothing.
fn prune(object: &mut Value) {
    if let Some(fields) = object.as_object_mut() {
        fields.retain(|_, value| !value.is_null());
    }
}

/// Counts starts that went wrong, each VMI once; one that has run for a while ends the count.
fn count_failures(snapshot: &Snapshot, status: &mut Status) {
    let Some(vmi) = &snapshot.vmi else { return };
    let found = vmi.status.clone().unwrap_or_default();
    let began = found
        .phase_transition_timestamps
        .iter()
        .find(|t| t.phase == Phase::Running)
        .and_then(|t| t.at());
    let lasted = |until: Timestamp| began.is_some_and(|at| until.duration_since(at) >= LASTING);
    match found.phase {
        Phase::Failed => {
            let uid = vmi.uid().unwrap_or_default();
            let before = status.start_failure.clone().unwrap_or_default();
            if before.last_failed_vmi_uid == uid {
                return;
            }
            let ended = found.phase_transition_timestamps.last();
            let ended = ended.and_then(|t| t.at());
            let before = if lasted(ended.unwrap_or(snapshot.now)) {
                0
            } else {
                before.consecutive_fail_count
            };
            // One that has run is started again at once, the first time.
            let turn = if began.is_some() { before } else { before + 1 };
            let pause = match turn.checked_sub(1) {
                None => 0,
                Some(turn) => FIRST_PAUSE.saturating_mul(1 << turn.min(10)).min(LAST_PAUSE),
            };
            let at = snapshot.now + SignedDuration::from_secs(pause);
            status.start_failure = Some(StartFailure {
                consecutive_fail_count: before + 1,
                last_failed_vmi_uid: uid,
                retry_after_timestamp: Some(conditions::moment(at)),
            });
        }
        Phase::Running if lasted(snapshot.now) => status.start_failure = None,
        Phase::Succeeded => status.start_failure = None,
        _ => {}
    }
}

fn asked(requests: &[Request], what: Asked) -> Option<&Request> {
    requests.iter().find(|request| request.action == what)
}

fn wish(snapshot: &Snapshot, status: &Status) -> Wish {
    let strategy = snapshot.vm.spec.strategy();
    if elsewhere::has_left(snapshot) && strategy != RunStrategy::WaitAsReceiver {
        // N.B. what it has here is old: whoever started it would have two of it.
        let runs =
            snapshot.vmi.as_ref().is_some_and(|vmi| vmi.metadata.deletion_timestamp.is_none());
        let over = snapshot.moves.iter().all(|migration| migration.is_over());
        return match runs && over && elsewhere::has_arrived(snapshot) {
            true => Wish::Stop("its guest has left for another virtual machine"),
            false => Wish::Nothing,
        };
    }
    let requests = &status.state_change_requests;
    let start = asked(requests, Asked::Start);
    let paused = start.is_some_and(|start| {
        start.data.as_ref().is_some_and(|data| data.get("paused").is_some_and(|p| p == "true"))
    });
    let Some(vmi) = &snapshot.vmi else {
        let begins = match strategy {
            RunStrategy::Halted => false,
            RunStrategy::Manual => start.is_some(),
            RunStrategy::Always
            | RunStrategy::RerunOnFailure
            | RunStrategy::Once
            | RunStrategy::WaitAsReceiver => true,
        };
        if !begins {
            return Wish::Nothing;
        }
        let after = status.start_failure.as_ref().and_then(|f| f.retry_after_timestamp.as_deref());
        let after = after.and_then(|text| text.parse::<Timestamp>().ok());
        // A person who asks does not wait.
        return match after.filter(|at| *at > snapshot.now && start.is_none()) {
            Some(at) => Wish::StartAt(at),
            None => Wish::Start { paused },
        };
    };
    if vmi.metadata.deletion_timestamp.is_some() {
        return Wish::Nothing;
    }
    let uid = vmi.uid().unwrap_or_default();
    let phase = vmi.status.as_ref().map(|s| s.phase).unwrap_or_default();
    let stop =
        asked(requests, Asked::Stop).is_some_and(|r| r.uid.as_deref().is_none_or(|u| u == uid));
    match strategy {
        _ if stop => Wish::Stop("a stop was asked for"),
        RunStrategy::Halted => Wish::Stop("the virtual machine is to be halted"),
        RunStrategy::Always if phase.is_final() => Wish::Stop("it has ended, and runs always"),
        RunStrategy::WaitAsReceiver if phase.is_final() => {
            Wish::Stop("it has ended, and another guest is waited for")
        }
        RunStrategy::RerunOnFailure if phase == Phase::Failed => {
            Wish::Stop("it has failed, and is run again")
        }
        RunStrategy::RerunOnFailure | RunStrategy::Manual | RunStrategy::Once
            if phase.is_final() && start.is_some() =>
        {
            Wish::Stop("it has ended, and a start was asked for")
        }
        _ => Wish::Nothing,
    }
}

/// Plans what is wished. Whether there is a VMI then.
fn follow(snapshot: &Snapshot, wish: &Wish, shape: &Shape, plan: &mut Plan) -> bool {
    match wish {
        Wish::Nothing => {}
        Wish::StartAt(at) => plan.again = Some(*at),
        Wish::Start { paused } => {
            if snapshot.cluster.is_none() {
                // The settings come: whoever writes them is rung by the first look again.
                plan.again = Some(snapshot.now + SignedDuration::from_millis(200));
                return false;
            }
            if snapshot.owner.as_ref().is_some_and(|o| o.metadata.deletion_timestamp.is_some()) {
                plan.again = Some(snapshot.now + SignedDuration::from_secs(1));
                return false;
            }
            let followed = volumes::followed(snapshot);
            if !followed.is_empty() {
                // The start comes with the change.
                plan.actions.push(Action::Patch(volumes::template_with(snapshot, &followed)));
                return false;
            }
            let Ok(shape) = shape else { return false };
            let claims = volumes::not_left(snapshot);
            plan.actions.push(Action::Start(instance(&snapshot.vm, shape, *paused, &claims)));
            return true;
        }
        Wish::Stop(why) => {
            let uid = snapshot.vmi.as_ref().and_then(|vmi| vmi.uid()).unwrap_or_default();
            plan.actions.push(Action::Stop { uid, why });
        }
    }
    snapshot.vmi.is_some()
}

/// The VMI of a VM, of its template with all that it takes; `claims` are its disks where the template names
/// others.
fn instance(
    vm: &VirtualMachine,
    shape: &Expanded,
    paused: bool,
    claims: &BTreeMap<String, String>,
) -> Value {
    let template = vm.spec.template.metadata.clone().unwrap_or_default();
    let mut labels = template.labels.unwrap_or_default();
    labels.insert(keys::VM.into(), vm.name_any());
    let mut spec = shape.spec.clone();
    if !claims.is_empty() {
        spec["volumes"] = volumes::with_claims(&spec["volumes"], claims);
    }
    if paused {
        spec["startStrategy"] = "Paused".into();
    }
    let firmware = &mut spec["domain"]["firmware"];
    if firmware["uuid"].is_null() {
        // The guest is the same machine at each start.
        let name = format!("{}/{}", vm.namespace().unwrap_or_default(), vm.name_any());
        let uuid = uuid::Uuid::new_v5(&uuid::Uuid::NAMESPACE_OID, name.as_bytes());
        firmware["uuid"] = uuid.to_string().into();
    }
    let mut annotations = shape.annotations.clone();
    if vm.spec.strategy() == RunStrategy::WaitAsReceiver {
        let receives = (keys::RECEIVES.to_owned(), "true".to_owned());
        annotations.extend([receives]);
    }
    let mut metadata = json!({
        "name": vm.name_any(), "namespace": vm.namespace(), "labels": labels,
        "ownerReferences": [vm.controller_owner_ref(&())],
    });
    if !annotations.is_empty() {
        metadata["annotations"] = json!(annotations);
    }
    prune(&mut metadata);
    json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance",
        "metadata": metadata, "spec": spec,
    })
}

/// Requests that are not done yet.
fn left_over(snapshot: &Snapshot, requests: &[Request]) -> Vec<Request> {
    let uid = snapshot.vmi.as_ref().and_then(|vmi| vmi.uid());
    let is_final = snapshot
        .vmi
        .as_ref()
        .and_then(|vmi| vmi.status.as_ref())
        .is_some_and(|status| status.phase.is_final());
    let leaves = snapshot.vmi.as_ref().is_some_and(|v| v.metadata.deletion_timestamp.is_some());
    let open = |request: &&Request| match request.action {
        Asked::Stop => {
            uid.is_some() && request.uid.as_ref().is_none_or(|u| Some(u) == uid.as_ref())
        }
        // It runs: that was done.
        Asked::Start => {
            uid.is_none() || is_final || leaves || asked(requests, Asked::Stop).is_some()
        }
    };
    requests.iter().filter(open).cloned().collect()
}

fn show(
    snapshot: &Snapshot,
    wish: &Wish,
    created: bool,
    shape: &Shape,
    change: &Change,
    status: &mut Status,
) {
    let vm = &snapshot.vm;
    let found = snapshot.vmi.as_ref().and_then(|vmi| vmi.status.clone());
    let ready = found.as_ref().is_some_and(|s| conditions::is(&s.conditions, types::READY));
    status.created = created;
    status.ready = ready;
    status.run_strategy = Some(vm.spec.strategy());
    status.desired_generation = vm.metadata.generation;
    status.observed_generation = vm.metadata.generation;
    status.printable_status = printable(snapshot, wish, status);
    let mut new = Vec::new();
    match found.as_ref().and_then(|s| s.conditions.iter().find(|c| c.kind == types::READY)) {
        Some(ready) => new.push(ready.clone()),
        None => new.push(Condition::new(types::READY, false, "VMINotExists", "VMI does not exist")),
    }
    let mut gone = vec![
        types::PAUSED,
        types::LIVE_MIGRATABLE,
        types::STORAGE_LIVE_MIGRATABLE,
        types::VOLUMES_CHANGE,
    ];
    for kind in gone.clone() {
        let mirrored = found.as_ref().and_then(|s| s.conditions.iter().find(|c| c.kind == kind));
        new.extend(mirrored.cloned());
    }
    gone.extend([types::RESTART_REQUIRED, types::UNSUPPORTED_FIELDS, types::FAILURE]);
    if shape.as_ref().is_ok_and(|shape| needs_restart(snapshot, shape)) {
        let message = "the template has changed since the virtual machine instance was started";
        new.push(Condition::new(types::RESTART_REQUIRED, true, "SpecChanged", message));
    } else if let Change::Restart(why) = change {
        new.push(Condition::new(types::RESTART_REQUIRED, true, "VolumesChanged", why));
    }
    let whole = shape.as_ref().map_or(&vm.spec.template.spec, |shape| &shape.spec);
    let template = api::support::parse::<api::vmi::Spec>(whole);
    if let Ok((_, unknown)) = &template
        && !unknown.is_empty()
    {
        let message = format!("these have no effect: {}", unknown.join(", "));
        new.push(Condition::new(types::UNSUPPORTED_FIELDS, true, "NotSupported", &message));
    }
    if let Err(trouble) = shape {
        new.push(shape::condition(trouble));
    } else if let Some(failure) = &status.start_failure
        && !created
    {
        let message = format!(
            "{} starts have failed one after another; the next is not before {}",
            failure.consecutive_fail_count,
            failure.retry_after_timestamp.as_deref().unwrap_or("now")
        );
        new.push(Condition::new(types::FAILURE, true, "FailedStart", &message));
    }
    status.conditions = conditions::merge(&status.conditions, new, &gone, snapshot.now);
}

/// Whether the VMI is of an older template.
fn needs_restart(snapshot: &Snapshot, shape: &Expanded) -> bool {
    let Some(vmi) = snapshot.vmi.as_ref().filter(|v| v.metadata.deletion_timestamp.is_none())
    else {
        return false;
    };
    let mut wanted = instance(&snapshot.vm, shape, false, &Default::default())["spec"].clone();
    // Other claims are not a restart's matter alone: see `volumes`.
    let has = vmi.parse().map(|spec| spec.claims()).unwrap_or_default();
    wanted["volumes"] = volumes::with_claims(&wanted["volumes"], &has);
    let found = volumes::with_claims(&vmi.spec.0["volumes"], &has);
    // What was filled in when it was made is not a change; nor is how it began.
    let fills = |field: &&str| !matches!(*field, "startStrategy");
    let fields = wanted.as_object().into_iter().flatten();
    fields.filter(|(name, _)| fills(&name.as_str())).any(|(name, value)| match name.as_str() {
        "volumes" => !within(value, &found),
        name => !within(value, &vmi.spec.0[name]),
    })
}

/// Whether everything that `wanted` says is in `found`: lists as wholes.
fn within(wanted: &Value, found: &Value) -> bool {
    match (wanted, found) {
        (Value::Object(wanted), Value::Object(found)) => wanted.iter().all(|(name, value)| {
            value.is_null() || found.get(name).is_some_and(|f| within(value, f))
        }),
        (Value::Array(wanted), Value::Array(found)) => {
            wanted.len() == found.len() && wanted.iter().zip(found).all(|(w, f)| within(w, f))
        }
        _ => wanted == found,
    }
}

/// Plans to write a status, if it is another.
fn write(snapshot: &Snapshot, status: Status, plan: &mut Plan) {
    let old = snapshot.vm.status.clone().unwrap_or_default();
    if status == old && snapshot.vm.status.is_some() {
        return;
    }
    if status.start_failure != old.start_failure
        && let Some(failure) = &status.start_failure
    {
        let message = format!(
            "the virtual machine instance {} has failed; the next start is not before {}",
            failure.last_failed_vmi_uid,
            failure.retry_after_timestamp.as_deref().unwrap_or("now")
        );
        plan.actions.push(Action::Say { warning: true, reason: "FailedStart", message });
    }
    let mut value = serde_json::to_value(&status).unwrap_or_default();
    // A merge patch removes what is null.
    for field in ["startFailure", "instancetypeRef", "preferenceRef"] {
        if value.get(field).is_none() {
            value[field] = Value::Null;
        }
    }
    plan.actions.push(Action::PatchStatus(value));
}
