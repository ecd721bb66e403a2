//! VirtualMachine: makes its disks, and its VMI when that is to run.

mod elsewhere;
#[cfg(test)]
mod laws;
mod plan;
mod printable;
mod shape;
mod taken;
mod volumes;

use crate::AT_ONCE;
use crate::world::{Key, World, get, key};
use api::datavolume::DataVolume;
use api::keys;
use api::migration::VirtualMachineInstanceMigration;
use api::vm::VirtualMachine;
use api::vmi::VirtualMachineInstance;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::{Api, ResourceExt};
use plan::{Action, Snapshot};
use reconcile::events::Kind;
use reconcile::kept::reference;
use reconcile::queue::Next;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

/// Runs the reconciler. Never ends by itself.
pub async fn run(world: World) {
    let queue = world.vm_queue.clone();
    queue.run(AT_ONCE, move |key| reconcile(world.clone(), key)).await;
}

async fn reconcile(world: World, key: Key) -> Next {
    let (world, key) = (&world, &key);
    let Some(vm) = get(&world.vms, key) else { return Next::Rest };
    let now = Timestamp::now();
    let snapshot = Snapshot {
        vmi: get(&world.vmis, key),
        owner: get(&world.owners, key),
        volumes: volumes(world, &vm),
        claims: claims(world, &vm),
        taken: taken::taken(world, &vm),
        moves: world.moves_of(key),
        cluster: world.cluster(),
        now,
        vm,
    };
    let plan = plan::plan(&snapshot);
    for action in &plan.actions {
        if let Err(error) = act(world, &snapshot, action).await {
            return world.failed(&*snapshot.vm, action, action.failed(), &error).await;
        }
    }
    match plan.again {
        Some(at) => Next::After(Duration::try_from(at.duration_since(now)).unwrap_or_default()),
        None => Next::Rest,
    }
}

/// The DataVolumes that it names, with their templates' numbers or without.
fn volumes(world: &World, vm: &VirtualMachine) -> Vec<(String, Option<Arc<DataVolume>>)> {
    let namespace = vm.namespace().unwrap_or_default();
    let names = plan::data_volumes(vm);
    let find = |name: String| {
        let volume = get(&world.volumes, &(namespace.clone(), name.clone()));
        (name, volume)
    };
    names.into_iter().map(find).collect()
}

/// The claims that it and its VMI name.
fn claims(world: &World, vm: &VirtualMachine) -> Vec<(String, Option<Arc<PersistentVolumeClaim>>)> {
    let (namespace, name) = key(vm);
    let vmi = get(&world.vmis, &(namespace.clone(), name));
    let has = vmi.and_then(|vmi| vmi.parse().ok()).unwrap_or_default().claims();
    let wanted = api::support::parse::<api::vmi::Spec>(&vm.spec.template.spec);
    let wanted = wanted.map(|(spec, _)| spec.claims()).unwrap_or_default();
    let names: BTreeSet<String> = has.into_values().chain(wanted.into_values()).collect();
    let find = |name: String| {
        let claim = get(&world.claims, &(namespace.clone(), name.clone()));
        (name, claim)
    };
    names.into_iter().map(find).collect()
}

async fn act(world: &World, snapshot: &Snapshot, action: &Action) -> kube::Result<()> {
    let vm = &*snapshot.vm;
    let (namespace, name) = key(vm);
    let vms: Api<VirtualMachine> = world.api(&namespace);
    let vmis: Api<VirtualMachineInstance> = world.api(&namespace);
    let create = PostParams::default();
    match action {
        Action::Pin(object) => taken::pin(world, &namespace, object).await?,
        Action::CreateVolume(object) => {
            let volumes: Api<DataVolume> = world.api(&namespace);
            let volume = made(object)?;
            match volumes.create(&create, &volume).await {
                Err(kube::Error::Api(status)) if status.reason == "AlreadyExists" => {}
                other => {
                    let made = other?.name_any();
                    let message = format!("Created DataVolume {made}");
                    let about = reference(vm);
                    world
                        .events
                        .say(&about, Kind::Normal, "SuccessfulDataVolumeCreate", &message)
                        .await;
                }
            }
        }
        Action::Start(object) => {
            let vmi: VirtualMachineInstance = made(object)?;
            match vmis.create(&create, &vmi).await {
                Err(kube::Error::Api(status)) if status.reason == "AlreadyExists" => {}
                other => {
                    other?;
                    let message = format!(
                        "Started the virtual machine by creating the new virtual machine instance {name}"
                    );
                    world
                        .events
                        .say(&reference(vm), Kind::Normal, "SuccessfulCreate", &message)
                        .await;
                }
            }
        }
        Action::Stop { uid, why } => {
            let exactly = DeleteParams {
                preconditions: Some(kube::api::Preconditions {
                    uid: Some(uid.clone()),
                    resource_version: None,
                }),
                ..DeleteParams::default()
            };
            match vmis.delete(&name, &exactly).await {
                Err(kube::Error::Api(status)) if status.code == 404 => {}
                other => {
                    other?;
                    let message = format!(
                        "Stopped the virtual machine by deleting the virtual machine instance {uid}: {why}"
                    );
                    world
                        .events
                        .say(&reference(vm), Kind::Normal, "SuccessfulDelete", &message)
                        .await;
                }
            }
        }
        Action::Patch(patch) => {
            merge(&vms, &name, patch).await?;
        }
        Action::PatchStatus(status) => {
            // N.B. on the condition that nobody has asked for something meanwhile.
            let read = json!({"resourceVersion": vm.metadata.resource_version});
            let patch = json!({"metadata": read, "status": status});
            let patch = Patch::Merge(&patch);
            ignore_gone(vms.patch_status(&name, &PatchParams::default(), &patch).await)?;
        }
        Action::PatchVmi(patch) => {
            let Some(vmi) = &snapshot.vmi else { return Ok(()) };
            let mut patch = patch.clone();
            // N.B. its handler writes it as well.
            patch["metadata"] = json!({
                "uid": vmi.uid(), "resourceVersion": vmi.resource_version(),
            });
            let patch = Patch::Merge(patch);
            ignore_gone(vmis.patch_status(&name, &PatchParams::default(), &patch).await)?;
        }
        Action::UseVolumes(volumes) => {
            let Some(vmi) = &snapshot.vmi else { return Ok(()) };
            let patch = json!({"metadata": {"uid": vmi.uid()}, "spec": {"volumes": volumes}});
            ignore_gone(vmis.patch(&name, &PatchParams::default(), &Patch::Merge(patch)).await)?;
        }
        Action::Supersede { claim, note, left_by } => {
            let claims: Api<PersistentVolumeClaim> = world.api(&namespace);
            let patch = json!({"metadata": {"annotations": {
                keys::SUPERSEDED: note, keys::LEFT_BY: left_by,
            }}});
            ignore_gone(claims.patch(claim, &PatchParams::default(), &Patch::Merge(patch)).await)?;
        }
        Action::Migrate(object) => {
            world.migrate(&namespace, &made(object)?, &reference(vm)).await?;
        }
        Action::Cancel(migration) => {
            let moves: Api<VirtualMachineInstanceMigration> = world.api(&namespace);
            ignore_gone(moves.delete(migration, &DeleteParams::default()).await)?;
        }
        Action::Say { warning, reason, message } => {
            let kind = if *warning { Kind::Warning } else { Kind::Normal };
            world.events.say(&reference(vm), kind, reason, message).await;
        }
    }
    Ok(())
}

/// An object that a plan has made as JSON.
fn made<K: serde::de::DeserializeOwned>(object: &Value) -> kube::Result<K> {
    serde_json::from_value(object.clone()).map_err(kube::Error::SerdeError)
}

async fn merge(vms: &Api<VirtualMachine>, name: &str, patch: &Value) -> kube::Result<()> {
    ignore_gone(vms.patch(name, &PatchParams::default(), &Patch::Merge(patch)).await)
}

/// What is gone needs no change.
pub fn ignore_gone<T>(patched: kube::Result<T>) -> kube::Result<()> {
    match patched {
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        other => other.map(|_| ()),
    }
}
