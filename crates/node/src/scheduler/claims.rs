//! Which nodes a pod's claims allow.
//!
//! Source: Kubernetes' `VolumeBinding` and `VolumeRestrictions`.

use super::nodes;
use super::snapshot::Snapshot;
use crate::storage::claims::{self as storage, Claim};
use k8s_openapi::api::core::v1::{Node, PersistentVolumeClaim, Pod};

/// What a pod's claims say about all nodes at once.
#[derive(Debug, Default)]
pub struct Wants<'a> {
    /// Those that have a volume.
    bound: Vec<&'a PersistentVolumeClaim>,
    /// Those that get one once a node is chosen.
    waiting: Vec<&'a PersistentVolumeClaim>,
}

/// The claims of a pod by name.
pub fn names(pod: &Pod) -> impl Iterator<Item = &str> {
    let volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
    volumes.filter_map(|v| Some(v.persistent_volume_claim.as_ref()?.claim_name.as_str()))
}

impl<'a> Wants<'a> {
    /// Looks at the claims of a pod.
    ///
    /// # Errors
    /// Why no node will do, whichever it is.
    pub fn of(pod: &Pod, snapshot: &'a Snapshot) -> Result<Self, String> {
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        let mut wants = Self::default();
        for name in names(pod) {
            let Some(claim) = snapshot.claim(namespace, name) else {
                return Err(format!("persistentvolumeclaim \"{name}\" not found"));
            };
            if claim.metadata.deletion_timestamp.is_some() {
                return Err(format!("persistentvolumeclaim \"{name}\" is being deleted"));
            }
            if taken_alone(claim, pod, snapshot) {
                return Err("node has pod using PersistentVolumeClaim with the same name and ReadWriteOncePod access mode".into());
            }
            if claim.is_bound() {
                wants.bound.push(claim);
            } else if snapshot.class_of(claim).is_some_and(storage::waits_for_consumer) {
                wants.waiting.push(claim);
            } else {
                return Err("pod has unbound immediate PersistentVolumeClaims".into());
            }
        }
        Ok(wants)
    }

    /// Why a node will not do.
    pub fn refuse(&self, node: &Node, snapshot: &Snapshot) -> Option<&'static str> {
        for claim in &self.bound {
            let name = claim.spec.as_ref().and_then(|spec| spec.volume_name.as_deref());
            let Some(volume) = name.and_then(|name| snapshot.volume(name)) else {
                return Some(
                    "node(s) unavailable due to one or more pvc(s) bound to non-existent pv(s)",
                );
            };
            if !storage::reaches(volume, node) {
                return Some("node(s) had volume node affinity conflict");
            }
        }
        // Of the pool goes what others are promised, too.
        let promised = |claim: &&std::sync::Arc<PersistentVolumeClaim>| {
            !claim.is_bound()
                && claim.selected_node() == Some(nodes::name(node))
                && !self.waiting.iter().any(|own| own.metadata.uid == claim.metadata.uid)
        };
        let promised: i64 = snapshot.claims.iter().filter(promised).map(|claim| claim.size()).sum();
        let mut needed = 0_i64;
        for claim in &self.waiting {
            // One that was chosen for before stays where its volume is being made.
            if claim.selected_node().is_some_and(|chosen| chosen != nodes::name(node)) {
                return Some("node(s) had volume node affinity conflict");
            }
            let existing = snapshot
                .volumes
                .iter()
                .any(|volume| storage::satisfies(volume, claim) && storage::reaches(volume, node));
            let provisions = snapshot.class_of(claim).is_some_and(storage::provisions);
            match (existing, provisions) {
                (true, _) => {}
                (false, true) => needed = needed.saturating_add(claim.size()),
                (false, false) => {
                    return Some("node(s) didn't find available persistent volumes to bind");
                }
            }
        }
        let free = storage::free(node, &snapshot.volumes);
        (needed > 0 && free.is_some_and(|free| free.saturating_sub(promised) < needed))
            .then_some("node(s) did not have enough free storage")
    }

    /// The claims that must be told of the node that was chosen, and have their volumes, before
    /// the pod can be bound.
    pub fn waiting(&self) -> &[&'a PersistentVolumeClaim] {
        &self.waiting
    }
}

/// Whether another pod uses a claim that one pod alone may use.
fn taken_alone(claim: &PersistentVolumeClaim, pod: &Pod, snapshot: &Snapshot) -> bool {
    let modes = claim.spec.as_ref().and_then(|spec| spec.access_modes.as_deref());
    let alone = modes.unwrap_or_default().iter().any(|mode| mode == "ReadWriteOncePod");
    let same = |other: &Pod| {
        other.metadata.namespace == claim.metadata.namespace
            && other.metadata.uid != pod.metadata.uid
    };
    let name = claim.metadata.name.as_deref().unwrap_or_default();
    alone && snapshot.pods.iter().any(|other| same(other) && names(other).any(|n| n == name))
}
