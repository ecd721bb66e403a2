//! KubeVirt: the settings of a cluster.

use crate::conditions::Condition;
use kube::CustomResource;
use serde::{Deserialize, Serialize};

/// What is wanted.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, CustomResource)]
#[kube(
    group = "kubevirt.io",
    version = "v1",
    kind = "KubeVirt",
    plural = "kubevirts",
    namespaced,
    status = "Status",
    schema = "disabled"
)]
#[serde(rename_all = "camelCase", default)]
pub struct Spec {
    /// How VMs are run.
    pub configuration: Configuration,
}

/// How VMs are run.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Configuration {
    /// What is not for everybody.
    pub developer_configuration: Developer,
    /// The machine type of VMs that name none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub machine_type: Option<String>,
    /// The CPU model of VMs that name none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_model: Option<String>,
    /// What happens to VMs that say nothing when their node is drained.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eviction_strategy: Option<String>,
    /// Whether changes reach a running VM: `LiveUpdate`, or `Stage`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vm_rollout_strategy: Option<String>,
}

/// What is not for everybody.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Developer {
    /// QEMU emulates the processor.
    pub use_emulation: bool,
    /// What is switched on.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub feature_gates: Vec<String>,
    /// What is switched off.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub disabled_feature_gates: Vec<String>,
}

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Status {
    /// `Deployed` when all roles are ready.
    pub phase: String,
    /// What holds and what does not.
    pub conditions: Vec<Condition>,
    /// The generation that was last seen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Godwit's version.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub operator_version: Option<String>,
    /// Godwit's version, as tools of KubeVirt read it.
    #[serde(rename = "observedKubeVirtVersion", skip_serializing_if = "Option::is_none")]
    pub observed_version: Option<String>,
}

/// Gates that do something here, and those of KubeVirt that are on for good.
pub const KNOWN_GATES: [&str; 16] = [
    "DecentralizedLiveMigration",
    "DeclarativeHotplugVolumes",
    "ExpandDisks",
    "HostDisk",
    "ImageVolume",
    "LiveMigration",
    "MigrationPriorityQueue",
    "NodeRestriction",
    "KubevirtSeccompProfile",
    "SRIOVLiveMigration",
    "VMLiveUpdateFeatures",
    "VMPersistentState",
    "VmiMemoryOverheadReport",
    "VolumeMigration",
    "VolumesUpdateStrategy",
    "LiveUpdateNADRef",
];

impl Spec {
    /// Whether a gate is open: a Beta one of KubeVirt's is unless it is closed.
    pub fn gate(&self, name: &str) -> bool {
        const OPEN: [&str; 3] = ["DecentralizedLiveMigration", "NodeRestriction", "ImageVolume"];
        let developer = &self.configuration.developer_configuration;
        let has = |list: &[String]| list.iter().any(|gate| gate == name);
        !has(&developer.disabled_feature_gates)
            && (has(&developer.feature_gates) || OPEN.contains(&name))
    }
}
