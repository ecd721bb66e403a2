//! VirtualMachineInstance: its launcher's pod, and what becomes of it.
//!
//! The node's handler runs the guest; who may run it says the owner record, which is made here
//! before the first pod is. A VMI goes only when nobody runs its guest for certain.

#[cfg(test)]
mod laws;
pub(crate) mod plan;
pub(crate) mod pod;
pub(crate) use plan::{claim_info, is_ready, is_terminal, trouble};
pub(crate) use pod::is_block;

use crate::AT_ONCE;
use crate::vm::ignore_gone;
use crate::world::{Key, World, claims_of, get, key, label, lends_to, mounts, refusal};
use api::conditions::moment;
use api::keys;
use api::owner::OwnerRecord;
use api::vmi::VirtualMachineInstance;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::runtime::reflector::ObjectRef;
use plan::{Action, Snapshot};
use reconcile::events::{Kind, why};
use reconcile::kept::reference;
use reconcile::queue::Next;
use serde_json::{Value, json};
use std::sync::Arc;

/// Runs the reconciler. Never ends by itself.
pub async fn run(world: World) {
    let queue = world.vmi_queue.clone();
    queue.run(AT_ONCE, move |key| reconcile(world.clone(), key)).await;
}

async fn reconcile(world: World, key: Key) -> Next {
    let (world, key) = (&world, &key);
    let now = Timestamp::now();
    let Some(vmi) = get(&world.vmis, key) else { return forget(world, key).await };
    let snapshot = look(world, key, vmi, now);
    let plan = plan::plan(&snapshot);
    for action in &plan.actions {
        if let Err(error) = act(world, &snapshot, action).await {
            return world.failed(&*snapshot.vmi, action, "FailedCreate", &error).await;
        }
    }
    match plan.again {
        Some(pause) => Next::After(pause),
        None => Next::Rest,
    }
}

fn look(world: &World, key: &Key, vmi: Arc<VirtualMachineInstance>, now: Timestamp) -> Snapshot {
    let namespace = &key.0;
    let uid = vmi.uid().unwrap_or_default();
    let owner = get(&world.owners, key);
    let record = owner.as_ref().and_then(|owner| owner.status.as_ref());
    let state = vmi.status.as_ref().and_then(|status| status.migration_state.as_ref());
    let heirs = state.filter(|state| {
        let of = record.and_then(|record| record.of.as_ref());
        of.is_some_and(|of| state.migration_uid.as_ref() == Some(&of.attempt))
    });
    let node = |name: Option<&String>| world.nodes.get(&ObjectRef::new(name?));
    let heir_node = node(heirs.and_then(|state| state.target_node.as_ref()));
    let node = node(record.and_then(|record| record.node.as_ref()));
    let spec = vmi.parse();
    let names = spec.iter().flat_map(|spec| spec.volumes.iter().filter_map(|v| v.claim()));
    let names: Vec<String> = names.map(str::to_owned).collect();
    let claims = names.iter().map(|name| {
        let key = (namespace.clone(), name.clone());
        (name.clone(), get(&world.claims, &key), get(&world.volumes, &key))
    });
    let readers = world.pods.state().into_iter().filter(|pod| {
        let reads = || names.iter().any(|claim| mounts(pod, claim));
        pod.namespace().as_ref() == Some(namespace) && lends_to(pod).is_some() && reads()
    });
    let readers = readers.filter_map(|pod| lends_to(&pod));
    Snapshot {
        readers: readers.map(|(namespace, name)| format!("{namespace}/{name}")).collect(),
        claims: claims.collect(),
        pods: world.pods_of(&uid),
        cluster: world.cluster(),
        spec,
        owner,
        node,
        heir_node,
        vmi,
        now,
    }
}

/// A VM that is gone, and whose guest runs nowhere for certain, needs no owner record.
async fn forget(world: &World, key: &Key) -> Next {
    let Some(record) = get(&world.owners, key) else { return Next::Rest };
    let over = record.status.as_ref().is_none_or(api::owner::Status::is_over);
    if get(&world.vms, key).is_some() || !over {
        return Next::Rest;
    }
    match remove_record(world, &record).await {
        Ok(()) => Next::Rest,
        Err(error) => {
            tracing::warn!("cannot remove owner record {}/{}: {}", key.0, key.1, why(&error));
            Next::Failed
        }
    }
}

async fn remove_record(world: &World, record: &OwnerRecord) -> kube::Result<()> {
    let (namespace, name) = key(record);
    let records = world.api::<OwnerRecord>(&namespace);
    // N.B. exactly the one that was judged: a VM of this name may begin meanwhile.
    let exactly = json!({"metadata": {
        "finalizers": null, "resourceVersion": record.resource_version(),
    }});
    let patch = Patch::Merge(&exactly);
    let patched = match records.patch(&name, &PatchParams::default(), &patch).await {
        Err(kube::Error::Api(status)) if status.code == 404 || status.code == 409 => return Ok(()),
        other => other?,
    };
    let only = DeleteParams {
        preconditions: Some(kube::api::Preconditions {
            uid: patched.uid(),
            resource_version: patched.resource_version(),
        }),
        ..DeleteParams::default()
    };
    match records.delete(&name, &only).await {
        Err(kube::Error::Api(status)) if status.code == 404 || status.code == 409 => Ok(()),
        other => other.map(|_| ()),
    }
}

async fn act(world: &World, snapshot: &Snapshot, action: &Action) -> kube::Result<()> {
    let vmi = &snapshot.vmi;
    let (namespace, name) = key(&**vmi);
    let about = reference(&**vmi);
    match action {
        Action::CreateRecord => {
            let records = world.api::<OwnerRecord>(&namespace);
            let object = json!({
                "apiVersion": "godwit.dev/v1alpha1", "kind": "OwnerRecord",
                "metadata": {"name": name, "finalizers": [keys::OWNER_FINALIZER]},
                "spec": {"vm": api::owner::vm_id(&namespace, &name)},
            });
            let record = serde_json::from_value(object).map_err(kube::Error::SerdeError)?;
            match records.create(&PostParams::default(), &record).await {
                Err(kube::Error::Api(status)) if status.reason == "AlreadyExists" => {}
                other => {
                    other?;
                }
            }
        }
        Action::CreatePod(pod) => {
            if launches(pod) && is_lent(world, &namespace, pod).await? {
                return Err(refusal(409, "Conflict", "a claim of the pod is about to be cloned"));
            }
            let made = world.create_pod(pod).await;
            let made = match made {
                Err(kube::Error::Api(status)) if status.reason == "AlreadyExists" => return Ok(()),
                other => other?,
            };
            let message = format!("Created virtual machine pod {}", made.name_any());
            world.events.say(&about, Kind::Normal, "SuccessfulCreate", &message).await;
        }
        Action::DeletePod(pod) => {
            let pods = world.api::<Pod>(&namespace);
            match pods.delete(pod, &DeleteParams::default()).await {
                Err(kube::Error::Api(status)) if status.code == 404 => {}
                other => {
                    other?;
                    let message = format!("Deleted virtual machine pod {pod}");
                    world.events.say(&about, Kind::Normal, "SuccessfulDelete", &message).await;
                }
            }
        }
        Action::Fence { record, node, instance, field } => {
            let ended = json!({
                "instance": instance, "node": node, "at": moment(Timestamp::now()),
            });
            fence(world, record, field, &ended).await?;
        }
        Action::Patch(patch) => {
            let vmis = world.api::<VirtualMachineInstance>(&namespace);
            let patch = Patch::Merge(patch);
            ignore_gone(vmis.patch(&name, &PatchParams::default(), &patch).await)?;
        }
        Action::PatchStatus(status) => {
            let vmis = world.api::<VirtualMachineInstance>(&namespace);
            // N.B. the handler writes it as well: whoever has not seen the other's begins again.
            let read = json!({"resourceVersion": vmi.resource_version()});
            let patch = json!({"metadata": read, "status": status});
            let patch = Patch::Merge(&patch);
            ignore_gone(vmis.patch_status(&name, &PatchParams::default(), &patch).await)?;
        }
        Action::Say { warning, reason, message } => {
            let kind = if *warning { Kind::Warning } else { Kind::Normal };
            world.events.say(&about, kind, reason, message).await;
        }
    }
    Ok(())
}

/// Whether a claim of a pod is lent to a clone, as the API itself shows it: see `datavolume`.
pub(crate) async fn is_lent(world: &World, namespace: &str, pod: &Pod) -> kube::Result<bool> {
    let lenders = ListParams::default().labels(&format!("{}={}", keys::APP, keys::LENDER));
    let lenders = world.api::<Pod>(namespace).list(&lenders).await?;
    let mut claims = claims_of(pod);
    Ok(claims.any(|claim| lenders.iter().any(|lender| mounts(lender, claim))))
}

/// Writes down a person's word that a node is off: its guest has ended.
async fn fence(
    world: &World,
    record: &OwnerRecord,
    field: &str,
    ended: &Value,
) -> kube::Result<()> {
    let (namespace, name) = key(record);
    let status = record.status.clone().unwrap_or_default();
    let patch: json_patch::Patch = serde_json::from_value(json!([
        {"op": "test", "path": "/status/epoch", "value": status.epoch},
        {"op": "test", "path": "/status/owner", "value": status.owner},
        {"op": "test", "path": "/status/state", "value": status.state},
        {"op": "add", "path": format!("/status/{field}"), "value": ended},
    ]))
    .map_err(kube::Error::SerdeError)?;
    let records = world.api::<OwnerRecord>(&namespace);
    let patch: Patch<OwnerRecord> = Patch::Json(patch);
    ignore_gone(records.patch_status(&name, &PatchParams::default(), &patch).await)
}

/// A launcher's pod, not one that only binds claims.
pub(crate) fn launches(pod: &Pod) -> bool {
    label(pod, keys::BINDS).is_none()
}
