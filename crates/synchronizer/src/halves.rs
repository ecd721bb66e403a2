//! What a side of a migration between two VMIs has to say. Pure.

use api::keys;
use api::kubevirt::Configuration;
use api::migration::{Half, Side, VirtualMachineInstanceMigration as Migration};
use api::owner::OwnerRecord;
use api::processor;
use api::vmi::VirtualMachineInstance;
use k8s_openapi::api::core::v1::Node;
use kube::ResourceExt;
use std::collections::BTreeMap;

/// What there is of a side.
pub struct Facts<'a> {
    /// The cluster's id.
    pub cluster: &'a str,
    /// Where its synchronizer is found.
    pub address: &'a str,
    /// The migration.
    pub migration: &'a Migration,
    /// Its VMI.
    pub vmi: Option<&'a VirtualMachineInstance>,
    /// Who may run the guest.
    pub owner: Option<&'a OwnerRecord>,
    /// A node by its name.
    pub node: &'a dyn Fn(&str) -> Option<std::sync::Arc<Node>>,
    /// The settings.
    pub settings: &'a Configuration,
}

/// The half of a migration. None: it is none between two VMIs.
pub fn half(facts: &Facts<'_>) -> Option<(Side, Half)> {
    let Facts { migration, vmi, .. } = facts;
    let (side, _) = migration.spec.half()?;
    let status = migration.status.clone().unwrap_or_default();
    let of_vmi = vmi.and_then(|vmi| vmi.status.clone()).unwrap_or_default();
    let own = |state: &api::migration::State| state.migration_uid == migration.uid();
    let state = of_vmi.migration_state.clone().filter(own).unwrap_or_default();
    let record = facts.owner.and_then(|owner| owner.status.as_ref());
    let (node, pod) = match side {
        Side::Source => (of_vmi.node_name.clone(), record.and_then(|record| record.pod.clone())),
        Side::Target => (state.target_node.clone(), state.target_pod.clone()),
    };
    let found = node.as_deref().and_then(|name| (facts.node)(name));
    let gateway = found.as_ref().and_then(|node| node.annotations().get(keys::GATEWAY).cloned());
    let why = status.migration_state.as_ref().and_then(|state| state.failure_reason.clone());
    let failed = (status.phase == api::migration::Phase::Failed)
        .then(|| why.unwrap_or_else(|| "nobody says why".into()));
    let half = Half {
        sequence: version(*migration).max(vmi.map_or(0, version)),
        cluster: facts.cluster.into(),
        namespace: migration.namespace().unwrap_or_default(),
        name: migration.spec.vmi_name.clone(),
        vmi: vmi.and_then(|vmi| vmi.uid()).unwrap_or_default(),
        migration: migration.uid().unwrap_or_default(),
        phase: status.phase,
        address: Some(facts.address.into()),
        node_selectors: match side {
            Side::Source => {
                vmi.map(|vmi| selectors(vmi, found.as_deref(), facts.settings)).unwrap_or_default()
            }
            Side::Target => BTreeMap::new(),
        },
        started: state.start_timestamp.filter(|_| side == Side::Source),
        arrived: state.target_node_domain_ready_timestamp.filter(|_| side == Side::Target),
        aborts: migration.metadata.deletion_timestamp.is_some()
            || vmi.is_some_and(|vmi| vmi.metadata.deletion_timestamp.is_some()),
        node,
        gateway,
        pod,
        failed,
    };
    Some((side, half))
}

/// How new an object is: numbers of one cluster's API only grow.
fn version(object: &impl ResourceExt) -> u64 {
    object.resource_version().and_then(|version| version.parse().ok()).unwrap_or_default()
}

/// What a node must have for a guest that is on `node`.
pub fn selectors(
    vmi: &VirtualMachineInstance,
    node: Option<&Node>,
    settings: &Configuration,
) -> BTreeMap<String, String> {
    processor::wanted_for(vmi, settings, node.map(|node| node.labels()))
}
