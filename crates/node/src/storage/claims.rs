//! What claims ask for, and what volumes give.

use crate::scheduler::nodes;
use apiserver::quantity::Quantity;
use apiserver::selector::Labels;
use k8s_openapi::api::core::v1::{Node, PersistentVolume, PersistentVolumeClaim};
use k8s_openapi::api::storage::v1::StorageClass;
use serde_json::{Map, Value};
use std::sync::Arc;

/// The node for whose sake a claim is to get a volume.
pub const SELECTED_NODE: &str = "volume.kubernetes.io/selected-node";
/// Both sides of a binding have been written.
pub const BIND_COMPLETED: &str = "pv.kubernetes.io/bind-completed";
/// The binding was made by a controller, not by a person.
pub const BOUND_BY_CONTROLLER: &str = "pv.kubernetes.io/bound-by-controller";
/// What made a volume.
pub const PROVISIONED_BY: &str = "pv.kubernetes.io/provisioned-by";
/// What is to make a claim's volume.
pub const PROVISIONER: &str = "volume.kubernetes.io/storage-provisioner";
/// How many bytes a node has for volumes of its own: an annotation of the node.
pub const POOL: &str = "storage.godwit.dev/capacity";
/// What all of our provisioners' names begin with.
pub const OURS: &str = "storage.godwit.dev/";
const NO_PROVISIONER: &str = "kubernetes.io/no-provisioner";

/// What there is to know of a claim.
pub trait Claim {
    /// It has its volume, and both sides say so.
    fn is_bound(&self) -> bool;
    /// The node for which its volume is being made.
    fn selected_node(&self) -> Option<&str>;
    /// What it asks for, in bytes.
    fn size(&self) -> i64;
}

impl Claim for PersistentVolumeClaim {
    fn is_bound(&self) -> bool {
        let named = self.spec.as_ref().and_then(|spec| spec.volume_name.as_deref());
        let annotations = self.metadata.annotations.as_ref();
        named.is_some_and(|name| !name.is_empty())
            && annotations.is_some_and(|all| all.contains_key(BIND_COMPLETED))
    }

    fn selected_node(&self) -> Option<&str> {
        let annotations = self.metadata.annotations.as_ref()?;
        annotations.get(SELECTED_NODE).map(String::as_str).filter(|name| !name.is_empty())
    }

    fn size(&self) -> i64 {
        let requests = self.spec.as_ref().and_then(|s| s.resources.as_ref()?.requests.as_ref());
        bytes(requests.and_then(|r| r.get("storage")).map(|q| q.0.as_str()))
    }
}

fn bytes(text: Option<&str>) -> i64 {
    text.and_then(Quantity::parse).unwrap_or(Quantity::ZERO).units()
}

/// A volume's size in bytes.
pub fn capacity(volume: &PersistentVolume) -> i64 {
    let capacity = volume.spec.as_ref().and_then(|spec| spec.capacity.as_ref());
    bytes(capacity.and_then(|c| c.get("storage")).map(|q| q.0.as_str()))
}

/// Whether a class makes volumes only where a pod needs them.
pub fn waits_for_consumer(class: &StorageClass) -> bool {
    class.volume_binding_mode.as_deref() == Some("WaitForFirstConsumer")
}

/// Whether a class makes volumes at all.
pub fn provisions(class: &StorageClass) -> bool {
    class.provisioner != NO_PROVISIONER
}

/// Whether a volume can be used on a node.
pub fn reaches(volume: &PersistentVolume, node: &Node) -> bool {
    let affinity = volume.spec.as_ref().and_then(|spec| spec.node_affinity.as_ref());
    let required = affinity.and_then(|affinity| affinity.required.as_ref());
    required.is_none_or(|required| nodes::selects(required, node))
}

/// What a node has left for new volumes, in bytes; None where that is not known.
pub fn free(node: &Node, volumes: &[Arc<PersistentVolume>]) -> Option<i64> {
    let all = node.metadata.annotations.as_ref()?.get(POOL)?;
    let all = Quantity::parse(all)?.units();
    // A volume without affinity is shared, and takes from no node.
    let own = |volume: &&Arc<PersistentVolume>| {
        let spec = volume.spec.as_ref();
        spec.is_some_and(|spec| spec.node_affinity.is_some()) && reaches(volume, node)
    };
    let used: i64 = volumes.iter().filter(own).map(|volume| capacity(volume)).sum();
    Some(all.saturating_sub(used))
}

/// Whether a volume that nobody has would do for a claim.
pub fn satisfies(volume: &PersistentVolume, claim: &PersistentVolumeClaim) -> bool {
    let (Some(has), Some(wants)) = (&volume.spec, &claim.spec) else { return false };
    let text = |field: &Option<String>| field.clone().unwrap_or_default();
    let mode = |field: &Option<String>| field.clone().unwrap_or_else(|| "Filesystem".into());
    let reserved = has.claim_ref.as_ref().is_some_and(|by| !refers(by, claim));
    let named = text(&wants.volume_name);
    let named_other = !named.is_empty() && Some(&named) != volume.metadata.name.as_ref();
    let modes = wants.access_modes.as_deref().unwrap_or_default();
    let offered = has.access_modes.as_deref().unwrap_or_default();
    !reserved
        && !named_other
        && volume.metadata.deletion_timestamp.is_none()
        && text(&has.storage_class_name) == text(&wants.storage_class_name)
        && mode(&has.volume_mode) == mode(&wants.volume_mode)
        && modes.iter().all(|wanted| offered.contains(wanted))
        && capacity(volume) >= claim.size()
        && is_selected(volume, claim)
}

/// Whether a volume's reference is to this claim. One without uid was made by a person beforehand.
pub fn refers(
    reference: &k8s_openapi::api::core::v1::ObjectReference,
    claim: &PersistentVolumeClaim,
) -> bool {
    reference.namespace == claim.metadata.namespace
        && reference.name == claim.metadata.name
        && reference
            .uid
            .as_ref()
            .is_none_or(|uid| uid.is_empty() || Some(uid) == claim.metadata.uid.as_ref())
}

fn is_selected(volume: &PersistentVolume, claim: &PersistentVolumeClaim) -> bool {
    let Some(selector) = claim.spec.as_ref().and_then(|spec| spec.selector.as_ref()) else {
        return true;
    };
    let Ok(value) = serde_json::to_value(selector) else { return false };
    let labels: Map<String, Value> = volume
        .metadata
        .labels
        .iter()
        .flatten()
        .map(|(key, value)| (key.clone(), Value::from(value.clone())))
        .collect();
    matches!(Labels::from_object(&value), Ok(Some(parsed)) if parsed.matches(Some(&labels)))
}
