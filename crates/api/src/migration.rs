//! VirtualMachineInstanceMigration: one live migration.

use crate::conditions::Condition;
use kube::CustomResource;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What is wanted.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, CustomResource)]
#[kube(
    group = "kubevirt.io",
    version = "v1",
    kind = "VirtualMachineInstanceMigration",
    plural = "virtualmachineinstancemigrations",
    namespaced,
    status = "Status",
    schema = "disabled"
)]
#[serde(rename_all = "camelCase", default)]
pub struct Spec {
    /// Of which VMI.
    pub vmi_name: String,
    /// What the target's node must have besides.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub added_node_selector: BTreeMap<String, String>,
}

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Status {
    /// How far it is.
    pub phase: String,
    /// What holds and what does not.
    pub conditions: Vec<Condition>,
}
