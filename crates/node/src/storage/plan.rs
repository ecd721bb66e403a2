//! What is to be done for claims and volumes, seen at one time.
//!
//! Every step is written to the API before the next one depends on it, so that a controller that
//! ends in between goes on from what it finds. Source: Kubernetes' persistent volume controller.

use super::claims::{
    Claim, OURS, capacity, free, provisions, reaches, refers, satisfies, waits_for_consumer,
};
use crate::scheduler::nodes;
use k8s_openapi::api::core::v1::{Node, PersistentVolume, PersistentVolumeClaim};
use k8s_openapi::api::storage::v1::StorageClass;
use std::collections::BTreeMap;
use std::sync::Arc;

type Claimed = Arc<PersistentVolumeClaim>;
type Volume = Arc<PersistentVolume>;

/// What there is.
#[derive(Debug, Clone, Default)]
pub struct Stock {
    /// All claims.
    pub claims: Vec<Claimed>,
    /// All volumes.
    pub volumes: Vec<Volume>,
    /// All classes.
    pub classes: Vec<Arc<StorageClass>>,
    /// All nodes.
    pub nodes: Vec<Arc<Node>>,
    /// How many bytes there are for volumes that all nodes share.
    pub shared: i64,
}

/// One step.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// Make a volume for a claim, on a node or for all.
    Provision(Claimed, Arc<StorageClass>, Option<String>),
    /// Reserve a volume for a claim.
    Reserve(Volume, Claimed),
    /// Tell a claim of its volume.
    Bind(Claimed, Volume),
    /// Write what a bound claim has.
    ClaimStatus(Claimed, Volume),
    /// The volume of a claim is gone.
    Lost(Claimed),
    /// Make a volume as large as its claim wants it.
    Expand(Volume, Claimed),
    /// Write a volume's phase.
    Phase(Volume, &'static str),
    /// Delete a volume and its data: its claim is gone, and its policy wants it.
    Reclaim(Volume),
    /// Say why a claim waits.
    Say(Claimed, &'static str, String),
    /// Give up on the node that was chosen for a claim, so that another is.
    Unselect(Claimed, String),
}

/// All that can be done now.
pub fn plan(stock: &Stock) -> Vec<Step> {
    let mut given = Given::default();
    let mut steps: Vec<Step> =
        stock.claims.iter().flat_map(|claim| stock.claim(claim, &mut given)).collect();
    steps.extend(stock.volumes.iter().flat_map(|volume| stock.volume(volume)));
    steps
}

/// What one plan has given away already.
#[derive(Default)]
struct Given<'a> {
    /// Volumes that were there.
    volumes: Vec<&'a str>,
    /// Bytes of pools, by node; those of the shared pool under no name.
    bytes: BTreeMap<String, i64>,
}

impl Given<'_> {
    /// Takes bytes of a pool that has some left: else how many it has.
    fn take(&mut self, pool: &str, left: Option<i64>, wanted: i64) -> Result<(), i64> {
        let given = self.bytes.entry(pool.to_owned()).or_default();
        match left.map(|left| left.saturating_sub(*given)) {
            Some(left) if left < wanted => Err(left.max(0)),
            _ => {
                *given = given.saturating_add(wanted);
                Ok(())
            }
        }
    }
}

fn name(volume: &PersistentVolume) -> &str {
    volume.metadata.name.as_deref().unwrap_or_default()
}

fn is_gone<K: kube::Resource>(object: &K) -> bool {
    object.meta().deletion_timestamp.is_some()
}

/// The volume of ours that is made for a claim has this name, so that it is made once.
pub fn volume_name(claim: &PersistentVolumeClaim) -> String {
    format!("pvc-{}", claim.metadata.uid.as_deref().unwrap_or_default())
}

impl Stock {
    fn claim<'a>(&'a self, claim: &'a Claimed, given: &mut Given<'a>) -> Vec<Step> {
        if claim.is_bound() {
            return self.bound(claim, given);
        }
        if is_gone(claim.as_ref()) {
            return Vec::new();
        }
        let wanted = claim.spec.as_ref().and_then(|spec| spec.volume_name.as_deref());
        let wanted = wanted.filter(|name| !name.is_empty());
        let reserved = self.volumes.iter().find(|volume| {
            is_reserved(volume, claim) && wanted.is_none_or(|wanted| wanted == name(volume))
        });
        if let Some(volume) = reserved {
            return vec![match has_uid(volume) {
                true => Step::Bind(Arc::clone(claim), Arc::clone(volume)),
                // A person reserved it by name: from now on it is this claim's alone.
                false => Step::Reserve(Arc::clone(volume), Arc::clone(claim)),
            }];
        }
        let class = self.class_of(claim);
        let node = claim.selected_node();
        if node.is_none() && wanted.is_none() && class.is_some_and(|c| waits_for_consumer(c)) {
            let text = "waiting for first consumer to be created before binding";
            return vec![Step::Say(Arc::clone(claim), "WaitForFirstConsumer", text.into())];
        }
        let node = node.and_then(|n| self.nodes.iter().find(|node| nodes::name(node) == n));
        let fits = |volume: &&Volume| {
            satisfies(volume, claim)
                && node.is_none_or(|node| reaches(volume, node))
                && !given.volumes.contains(&name(volume))
        };
        let smallest = self.volumes.iter().filter(fits).min_by_key(|v| (capacity(v), name(v)));
        if let Some(volume) = smallest {
            given.volumes.push(name(volume));
            return vec![Step::Reserve(Arc::clone(volume), Arc::clone(claim))];
        }
        match (wanted, class) {
            (Some(wanted), _) => vec![self.unavailable(claim, wanted)],
            (None, Some(class)) if provisions(class) => self.provision(claim, class, given),
            (None, _) => {
                let text =
                    "no persistent volumes available for this claim and no storage class is set";
                vec![Step::Say(Arc::clone(claim), "FailedBinding", text.into())]
            }
        }
    }

    fn unavailable(&self, claim: &Claimed, wanted: &str) -> Step {
        let text = match self.volumes.iter().find(|volume| name(volume) == wanted) {
            None => format!("volume {wanted:?} not found"),
            Some(volume) if volume.spec.as_ref().is_some_and(|s| s.claim_ref.is_some()) => {
                format!("volume {wanted:?} already bound to a different claim.")
            }
            Some(_) => format!(
                "Cannot bind to requested volume {wanted:?}: its class, mode, access modes, size or labels do not satisfy the claim"
            ),
        };
        Step::Say(Arc::clone(claim), "FailedBinding", text)
    }

    fn class_of(&self, claim: &PersistentVolumeClaim) -> Option<&Arc<StorageClass>> {
        let wanted = claim.spec.as_ref()?.storage_class_name.as_deref()?;
        self.classes.iter().find(|class| class.metadata.name.as_deref() == Some(wanted))
    }

    fn provision(
        &self,
        claim: &Claimed,
        class: &Arc<StorageClass>,
        given: &mut Given<'_>,
    ) -> Vec<Step> {
        let (claim, class) = (Arc::clone(claim), Arc::clone(class));
        if !class.provisioner.starts_with(OURS) {
            let text = format!(
                "Waiting for a volume to be created either by the external provisioner '{}' or manually by the system administrator. If volume creation is delayed, please verify that the provisioner is running and correctly registered.",
                class.provisioner
            );
            return vec![Step::Say(claim, "ExternalProvisioning", text)];
        }
        if !waits_for_consumer(&class) {
            return vec![match given.take("", Some(self.shared_left()), claim.size()) {
                Ok(()) => Step::Provision(claim, class, None),
                Err(left) => {
                    let text = too_large(&claim, "the shared pool", left);
                    Step::Say(claim, "ProvisioningFailed", text)
                }
            }];
        }
        let Some(selected) = claim.selected_node().map(str::to_owned) else { return Vec::new() };
        let Some(node) = self.nodes.iter().find(|node| nodes::name(node) == selected) else {
            let text = format!("node {selected:?}, for which the volume was to be made, is gone");
            return vec![Step::Unselect(claim, text)];
        };
        vec![match given.take(&selected, free(node, &self.volumes), claim.size()) {
            Ok(()) => Step::Provision(claim, class, Some(selected)),
            Err(left) => {
                let text = too_large(&claim, &selected, left);
                Step::Unselect(claim, text)
            }
        }]
    }

    fn bound(&self, claim: &Claimed, given: &mut Given<'_>) -> Vec<Step> {
        let wanted = claim.spec.as_ref().and_then(|spec| spec.volume_name.as_deref());
        let phase = claim.status.as_ref().and_then(|status| status.phase.as_deref());
        let volume = self.volumes.iter().find(|volume| Some(name(volume)) == wanted);
        let Some(volume) = volume.filter(|volume| is_reserved(volume, claim)) else {
            let lost = phase != Some("Lost") && !is_gone(claim.as_ref());
            return lost.then(|| Step::Lost(Arc::clone(claim))).into_iter().collect();
        };
        let size = capacity(volume);
        let expands = self.class_of(claim).is_some_and(|class| {
            class.allow_volume_expansion == Some(true) && class.provisioner.starts_with(OURS)
        });
        if claim.size() > size && expands && !is_gone(claim.as_ref()) {
            if !provisioned_by_us(volume) {
                return Vec::new();
            }
            let more = claim.size() - size;
            let (pool, left) = self.pool_of(volume);
            return vec![match given.take(&pool, left, more) {
                Ok(()) => Step::Expand(Arc::clone(volume), Arc::clone(claim)),
                Err(left) => Step::Say(
                    Arc::clone(claim),
                    "VolumeResizeFailed",
                    format!("{more} bytes more are asked for, and its pool has {left} left"),
                ),
            }];
        }
        let said = claim.status.as_ref().and_then(|status| status.capacity.as_ref());
        let has = volume.spec.as_ref().and_then(|spec| spec.capacity.as_ref());
        let right = phase == Some("Bound") && said == has;
        (!right)
            .then(|| Step::ClaimStatus(Arc::clone(claim), Arc::clone(volume)))
            .into_iter()
            .collect()
    }

    fn shared_left(&self) -> i64 {
        let used: i64 = self.volumes.iter().filter(|v| is_shared(v)).map(|v| capacity(v)).sum();
        self.shared.saturating_sub(used)
    }

    /// The pool that a volume is of, and what that has left.
    fn pool_of(&self, volume: &PersistentVolume) -> (String, Option<i64>) {
        if is_shared(volume) {
            return (String::new(), Some(self.shared_left()));
        }
        match self.nodes.iter().find(|node| reaches(volume, node)) {
            Some(node) => (nodes::name(node).to_owned(), free(node, &self.volumes)),
            None => (String::new(), None),
        }
    }

    fn volume(&self, volume: &Volume) -> Option<Step> {
        let spec = volume.spec.as_ref()?;
        let phase = volume.status.as_ref().and_then(|status| status.phase.as_deref());
        let Some(reference) = &spec.claim_ref else {
            let says = phase == Some("Available");
            return (!says).then(|| Step::Phase(Arc::clone(volume), "Available"));
        };
        if !has_uid(volume) {
            let says = phase == Some("Available");
            return (!says).then(|| Step::Phase(Arc::clone(volume), "Available"));
        }
        if self.claims.iter().any(|claim| refers(reference, claim)) {
            return (phase != Some("Bound")).then(|| Step::Phase(Arc::clone(volume), "Bound"));
        }
        let deletes = spec.persistent_volume_reclaim_policy.as_deref() == Some("Delete");
        match (phase, deletes && provisioned_by_us(volume)) {
            // What was bound, or was made for a claim that went before it was bound.
            (Some("Released"), true) => Some(Step::Reclaim(Arc::clone(volume))),
            (Some("Released"), false) => None,
            _ => Some(Step::Phase(Arc::clone(volume), "Released")),
        }
    }
}

fn too_large(claim: &PersistentVolumeClaim, whose: &str, left: i64) -> String {
    format!(
        "failed to provision volume: {} bytes are asked for, and {whose} has {left} left; delete volumes that nobody needs, or ask for less",
        claim.size()
    )
}

fn is_reserved(volume: &PersistentVolume, claim: &PersistentVolumeClaim) -> bool {
    let reference = volume.spec.as_ref().and_then(|spec| spec.claim_ref.as_ref());
    reference.is_some_and(|reference| refers(reference, claim))
}

fn has_uid(volume: &PersistentVolume) -> bool {
    let uid = || volume.spec.as_ref()?.claim_ref.as_ref()?.uid.as_deref();
    uid().is_some_and(|uid| !uid.is_empty())
}

fn is_shared(volume: &PersistentVolume) -> bool {
    provisioned_by_us(volume) && volume.spec.as_ref().is_some_and(|s| s.node_affinity.is_none())
}

/// Whether a volume is one that we made.
pub fn provisioned_by_us(volume: &PersistentVolume) -> bool {
    let annotations = volume.metadata.annotations.as_ref();
    let by = annotations.and_then(|all| all.get(super::claims::PROVISIONED_BY));
    by.is_some_and(|by| by.starts_with(OURS))
}
