//! KubeVirt: the settings of a cluster.

use crate::conditions::Condition;
use crate::duration;
use crate::migration::Options;
use kube::CustomResource;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;

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
    /// How long certificates last.
    pub certificate_rotate_strategy: CertificateRotateStrategy,
    /// What becomes of guests whose launchers are of an earlier version.
    pub workload_update_strategy: WorkloadUpdateStrategy,
    /// The port at which other clusters find the synchronizer; none: 9185.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub synchronization_port: Option<String>,
}

/// The settings that count, where there are several: the first by namespace and name.
pub fn foremost(all: Vec<Arc<KubeVirt>>) -> Option<Arc<KubeVirt>> {
    all.into_iter().min_by_key(|one| (one.metadata.namespace.clone(), one.metadata.name.clone()))
}

/// What becomes of guests whose launchers are of an earlier version.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct WorkloadUpdateStrategy {
    /// How they get new ones: [`LIVE_MIGRATE`], [`EVICT`]; none: not by themselves.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub workload_update_methods: Vec<String>,
    /// So many are evicted at a time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub batch_eviction_size: Option<u32>,
    /// And the next after this: `1m`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub batch_eviction_interval: Option<String>,
}

/// Guests move to new launchers.
pub const LIVE_MIGRATE: &str = "LiveMigrate";
/// Guests end, and begin anew in new launchers.
pub const EVICT: &str = "Evict";
/// Guests that are evicted at a time where nothing is said; as KubeVirt.
pub const BATCH: u32 = 10;
/// The time between batches where nothing is said; as KubeVirt.
pub const BATCH_INTERVAL: Duration = Duration::from_secs(60);

impl WorkloadUpdateStrategy {
    /// Whether guests get new launchers in this way.
    pub fn does(&self, method: &str) -> bool {
        self.workload_update_methods.iter().any(|m| m == method)
    }

    /// How many are evicted at a time.
    pub fn batch(&self) -> usize {
        self.batch_eviction_size.unwrap_or(BATCH) as usize
    }

    /// The time from one batch to the next.
    pub fn interval(&self) -> Duration {
        let said = self.batch_eviction_interval.as_deref().and_then(duration::parse);
        said.unwrap_or(BATCH_INTERVAL)
    }
}

/// How long certificates last.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct CertificateRotateStrategy {
    /// Those of the cluster's own CA.
    pub self_signed: SelfSigned,
}

/// How long the certificates of a cluster's own CA last.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SelfSigned {
    /// The CA's; default: a week.
    pub ca: Certificate,
    /// Those that it vouches for; default: a day.
    pub server: Certificate,
}

/// How long a certificate lasts.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Certificate {
    /// From its making to its end: `24h`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub duration: Option<String>,
    /// It is renewed so long before its end; default: 20 % of its life.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub renew_before: Option<String>,
}

impl Certificate {
    /// From its making to its end, where it is said.
    pub fn duration(&self) -> Option<Duration> {
        duration::parse(self.duration.as_deref()?)
    }

    /// How long before its end it is renewed, where it is said.
    pub fn renew_before(&self) -> Option<Duration> {
        duration::parse(self.renew_before.as_deref()?)
    }
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
    /// How VMs are moved.
    pub migrations: Options,
    /// What VMs are given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub virtual_machine_options: Option<MachineOptions>,
}

/// What VMs are given.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct MachineOptions {
    /// Guests do not give back memory that they do not use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disable_free_page_reporting: Option<serde_json::Map<String, serde_json::Value>>,
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
    /// How many guests have launchers of another version.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub outdated_virtual_machine_instance_workloads: Option<i64>,
    /// Where other clusters find the synchronizer.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub synchronization_addresses: Vec<String>,
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

/// The feature gate without which there is no synchronizer.
pub const DECENTRALIZED: &str = "DecentralizedLiveMigration";
/// The synchronizer's port, where nobody names one; as KubeVirt.
pub const SYNCHRONIZATION_PORT: u16 = 9185;

impl Spec {
    /// Whether a gate is open: a Beta one of KubeVirt's is unless it is closed.
    pub fn gate(&self, name: &str) -> bool {
        const OPEN: [&str; 3] = [DECENTRALIZED, "NodeRestriction", "ImageVolume"];
        let developer = &self.configuration.developer_configuration;
        let has = |list: &[String]| list.iter().any(|gate| gate == name);
        !has(&developer.disabled_feature_gates)
            && (has(&developer.feature_gates) || OPEN.contains(&name))
    }

    /// The port of the synchronizer, where these settings want one: a named one, or any. None: they do not.
    pub fn synchronizer(&self) -> Option<Option<u16>> {
        let named = self.synchronization_port.as_deref().and_then(|port| port.parse().ok());
        self.gate(DECENTRALIZED).then_some(named)
    }
}
