//! Disks that only one node can use follow a guest that goes to another: to new claims like theirs,
//! or to those that it left there before. Pure.

use super::plan::Snapshot;
use crate::vmi::claim_info;
use api::keys;
use api::vmi::{MigratedVolume, Spec, VirtualMachineInstance};
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use kube::{Resource, ResourceExt};
use serde_json::{Value, json};

/// The node for which a claim was bound; as Kubernetes has it.
const SELECTED_NODE: &str = "volume.kubernetes.io/selected-node";
/// Labels of nodes: their names.
const HOSTNAME: &str = "kubernetes.io/hostname";

/// What is needed for the disks to follow.
#[derive(Debug, Default)]
pub struct Follow {
    /// Claims to be made.
    pub claims: Vec<Value>,
    /// Where each disk goes.
    pub moves: Vec<MigratedVolume>,
}

/// What a claim that is left is called by: its VM and its volume.
pub fn left_by(vm: &str, volume: &str) -> String {
    format!("{vm}/{volume}")
}

/// Whether a claim is or was a disk of a VM that has moved.
pub fn is_left_by(claim: &PersistentVolumeClaim, vm: &str) -> bool {
    let note = claim.annotations().get(keys::LEFT_BY).and_then(|note| note.split_once('/'));
    note.is_some_and(|(of, _)| of == vm)
}

/// Whether a later migration can find a claim again: one that says where it is.
pub fn is_found_again(claim: &PersistentVolumeClaim) -> bool {
    claim.annotations().contains_key(SELECTED_NODE)
}

/// For the disks of a VMI that its target's node could not use.
///
/// # Errors
/// What is missing, for people.
pub fn follow(
    snapshot: &Snapshot,
    vmi: &VirtualMachineInstance,
    spec: &Spec,
) -> Result<Follow, String> {
    let mut follow = Follow::default();
    let moves = vmi.status.as_ref().map(|status| status.migrated_volumes.clone());
    let moves = moves.unwrap_or_default();
    for (volume, name) in spec.claims() {
        if moves.iter().any(|moved| moved.volume_name == volume) {
            continue;
        }
        let claim = snapshot.claims.iter().find(|(n, _)| *n == name).map(|(_, claim)| claim);
        let claim = claim.ok_or(format!("claim {name} of volume {volume} is not there"))?;
        if is_shared(claim) {
            continue;
        }
        let source = claim_info(claim);
        let destination = match earlier(snapshot, vmi, &volume, claim) {
            Some(earlier) => claim_info(earlier),
            None => {
                let made = like(snapshot, vmi, &volume, claim);
                let mut info = source.clone();
                info.claim_name = made["metadata"]["name"].as_str().unwrap_or_default().into();
                info.capacity.clear();
                follow.claims.push(made);
                info
            }
        };
        follow.moves.push(MigratedVolume { volume_name: volume, source, destination });
    }
    // N.B. all of them are said at once.
    if !follow.moves.is_empty() {
        follow.moves.extend(moves);
    }
    Ok(follow)
}

/// Whether all nodes can use a claim at once.
fn is_shared(claim: &PersistentVolumeClaim) -> bool {
    let modes = claim.spec.as_ref().and_then(|spec| spec.access_modes.as_ref());
    modes.is_some_and(|modes| modes.iter().any(|mode| mode == "ReadWriteMany"))
}

/// A claim that this volume has left on a node to which it may go.
fn earlier<'a>(
    snapshot: &'a Snapshot,
    vmi: &VirtualMachineInstance,
    volume: &str,
    now: &PersistentVolumeClaim,
) -> Option<&'a PersistentVolumeClaim> {
    let left = left_by(&vmi.name_any(), volume);
    let source = vmi.status.as_ref().and_then(|status| status.node_name.clone())?;
    let wanted = snapshot.migration.spec.added_node_selector.get(HOSTNAME);
    let kind = |claim: &PersistentVolumeClaim| {
        let spec = claim.spec.clone().unwrap_or_default();
        let size = spec.resources.and_then(|resources| resources.requests);
        (spec.storage_class_name, spec.volume_mode, size)
    };
    let fits = |claim: &&PersistentVolumeClaim| {
        let node = claim.annotations().get(SELECTED_NODE);
        claim.annotations().get(keys::LEFT_BY) == Some(&left)
            && claim.metadata.deletion_timestamp.is_none()
            && kind(claim) == kind(now)
            && node.is_some_and(|node| *node != source)
            && (wanted.is_none() || wanted == node)
    };
    snapshot.left.iter().map(|claim| &**claim).find(fits)
}

/// A new claim like another. It goes with the VM if the other does.
fn like(
    snapshot: &Snapshot,
    vmi: &VirtualMachineInstance,
    volume: &str,
    claim: &PersistentVolumeClaim,
) -> Value {
    /// Names of objects are bounded.
    const LONGEST: usize = 200;
    let uid = snapshot.migration.uid().unwrap_or_default();
    let stem = claim.annotations().get(keys::COPY_OF).cloned().unwrap_or_else(|| claim.name_any());
    let short: String = stem.chars().take(LONGEST).collect();
    let suffix: String = uid.chars().filter(|c| *c != '-').take(8).collect();
    let spec = claim.spec.clone().unwrap_or_default();
    let owners: Vec<_> = match claim.owner_references().is_empty() {
        true => Vec::new(),
        false => vmi.owner_references().iter().filter(|o| o.kind == "VirtualMachine").collect(),
    };
    json!({
        "apiVersion": "v1", "kind": PersistentVolumeClaim::kind(&()),
        "metadata": {
            "name": format!("{short}-{suffix}"), "namespace": claim.namespace(),
            "labels": {keys::MIGRATION: uid},
            "annotations": {keys::COPY_OF: stem, keys::LEFT_BY: left_by(&vmi.name_any(), volume)},
            "ownerReferences": owners,
        },
        "spec": {
            "accessModes": spec.access_modes, "storageClassName": spec.storage_class_name,
            "volumeMode": spec.volume_mode,
            "resources": {"requests": spec.resources.and_then(|resources| resources.requests)},
        },
    })
}
