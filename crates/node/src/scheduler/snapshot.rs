//! What the scheduler knows when it decides.

use super::nodes;
use super::resources::Resources;
use k8s_openapi::api::core::v1::{Namespace, Node, PersistentVolume, PersistentVolumeClaim, Pod};
use k8s_openapi::api::storage::v1::StorageClass;
use std::sync::Arc;

/// A cluster at one time.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// All nodes.
    pub nodes: Vec<Arc<Node>>,
    /// The pods that are on a node and have not ended.
    pub pods: Vec<Arc<Pod>>,
    /// All namespaces.
    pub namespaces: Vec<Arc<Namespace>>,
    /// All claims.
    pub claims: Vec<Arc<PersistentVolumeClaim>>,
    /// All volumes.
    pub volumes: Vec<Arc<PersistentVolume>>,
    /// All storage classes.
    pub classes: Vec<Arc<StorageClass>>,
}

/// The node that a pod is bound to.
pub fn node_name(pod: &Pod) -> Option<&str> {
    pod.spec.as_ref()?.node_name.as_deref().filter(|name| !name.is_empty())
}

/// Whether a pod has ended, and uses nothing any more.
pub fn has_ended(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

impl Snapshot {
    /// A namespace.
    pub fn namespace(&self, name: &str) -> Option<&Namespace> {
        let mut all = self.namespaces.iter().map(AsRef::as_ref);
        all.find(|namespace| namespace.metadata.name.as_deref() == Some(name))
    }

    /// The node that a pod is on.
    pub fn node_of(&self, pod: &Pod) -> Option<&Node> {
        let wanted = node_name(pod)?;
        self.nodes.iter().map(AsRef::as_ref).find(|node| nodes::name(node) == wanted)
    }

    /// The pods on a node.
    pub fn pods_on<'a>(&'a self, node: &'a str) -> impl Iterator<Item = &'a Pod> {
        let all = self.pods.iter().map(AsRef::as_ref);
        all.filter(move |pod| node_name(pod) == Some(node))
    }

    /// What the pods on a node take of it.
    pub fn used(&self, node: &str) -> Resources {
        let mut used = Resources::default();
        for pod in self.pods_on(node) {
            used.add(&Resources::of_pod(pod));
        }
        used
    }

    /// A claim.
    pub fn claim(&self, namespace: &str, name: &str) -> Option<&PersistentVolumeClaim> {
        let mut all = self.claims.iter().map(AsRef::as_ref);
        all.find(|claim| {
            claim.metadata.namespace.as_deref() == Some(namespace)
                && claim.metadata.name.as_deref() == Some(name)
        })
    }

    /// A volume.
    pub fn volume(&self, name: &str) -> Option<&PersistentVolume> {
        let mut all = self.volumes.iter().map(AsRef::as_ref);
        all.find(|volume| volume.metadata.name.as_deref() == Some(name))
    }

    /// A claim's class.
    pub fn class_of(&self, claim: &PersistentVolumeClaim) -> Option<&StorageClass> {
        let wanted = claim.spec.as_ref()?.storage_class_name.as_deref()?;
        let mut all = self.classes.iter().map(AsRef::as_ref);
        all.find(|class| class.metadata.name.as_deref() == Some(wanted))
    }
}
