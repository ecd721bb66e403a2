//! What becomes of a guest whose launcher's pod is to leave its node. Pure.

use crate::migration::DRAIN_TAINT;
use crate::{kubevirt, vmi};
use k8s_openapi::api::core::v1::Node;

/// How a guest leaves its node, as KubeVirt has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strategy {
    /// It ends.
    None,
    /// It moves; where it cannot, it stays.
    LiveMigrate,
    /// It moves; where it cannot, it ends.
    LiveMigrateIfPossible,
    /// Another controller sees to it.
    External,
}

impl Strategy {
    /// What each is called.
    pub const NAMES: [&str; 4] = ["None", "LiveMigrate", "LiveMigrateIfPossible", "External"];

    /// A VMI's own, else the cluster's, else none.
    pub fn of(vmi: &vmi::Spec, cluster: &kubevirt::Spec) -> Self {
        let own = vmi.eviction_strategy.as_deref().filter(|name| !name.is_empty());
        match own.or(cluster.configuration.eviction_strategy.as_deref()) {
            Some("LiveMigrate") => Self::LiveMigrate,
            Some("LiveMigrateIfPossible") => Self::LiveMigrateIfPossible,
            Some("External") => Self::External,
            _ => Self::None,
        }
    }

    /// Whether Godwit moves the guest.
    pub fn migrates(self) -> bool {
        matches!(self, Self::LiveMigrate | Self::LiveMigrateIfPossible)
    }
}

/// Whether a node has the taint by which its guests are to leave it.
pub fn is_drained(node: &Node, cluster: &kubevirt::Spec) -> bool {
    let key = cluster.configuration.migrations.node_drain_taint_key.as_deref();
    let key = key.unwrap_or(DRAIN_TAINT);
    let taints = node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
    taints.into_iter().any(|taint| taint.key == key && taint.effect == "NoSchedule")
}
