//! VirtualMachineInstance: a VM that runs, or is to.

mod spec;

use crate::conditions::{Condition, Transition, types};
use crate::{migration, support};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::CustomResource;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;

pub use spec::*;

/// What is wanted. As it was sent: see [`VirtualMachineInstance::parse`].
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, CustomResource)]
#[kube(
    group = "kubevirt.io",
    version = "v1",
    kind = "VirtualMachineInstance",
    plural = "virtualmachineinstances",
    namespaced,
    status = "Status",
    schema = "disabled"
)]
#[serde(transparent)]
pub struct RawSpec(pub Value);

impl VirtualMachineInstance {
    /// What Godwit does of its spec.
    ///
    /// # Errors
    /// Where the spec is none.
    pub fn parse(&self) -> Result<Spec, String> {
        let parsed = support::parse(&self.spec.0);
        parsed.map(|(spec, _)| spec).map_err(|misfit| misfit.to_string())
    }
}

/// Where a VMI is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash, Serialize, Deserialize)]
pub enum Phase {
    /// New.
    #[default]
    #[serde(rename = "")]
    Unset,
    /// It waits for what it needs.
    Pending,
    /// Its pod looks for a node and is made ready.
    Scheduling,
    /// Its pod is ready; its node's handler has it now.
    Scheduled,
    /// QEMU runs.
    Running,
    /// The guest has ended by itself or was stopped.
    Succeeded,
    /// The guest, or what it needs, broke.
    Failed,
    /// It waits for a guest from elsewhere.
    WaitingForSync,
    /// Its node does not answer.
    Unknown,
}

impl Phase {
    /// Whether it will never run again.
    pub fn is_final(self) -> bool {
        matches!(self, Phase::Succeeded | Phase::Failed)
    }

    /// As the API has it.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Unset => "",
            Phase::Pending => "Pending",
            Phase::Scheduling => "Scheduling",
            Phase::Scheduled => "Scheduled",
            Phase::Running => "Running",
            Phase::Succeeded => "Succeeded",
            Phase::Failed => "Failed",
            Phase::WaitingForSync => "WaitingForSync",
            Phase::Unknown => "Unknown",
        }
    }
}

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Status {
    /// Where it is in its life.
    pub phase: Phase,
    /// When it came to each phase.
    pub phase_transition_timestamps: Vec<Transition<Phase>>,
    /// Why it is there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The node on which it runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_name: Option<String>,
    /// What holds and what does not.
    pub conditions: Vec<Condition>,
    /// Its network cards.
    pub interfaces: Vec<InterfaceStatus>,
    /// Its volumes.
    pub volume_status: Vec<VolumeStatus>,
    /// The nodes of its launchers' pods, by uid.
    pub active_pods: BTreeMap<String, String>,
    /// The machine type that it got.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub machine: Option<Machine>,
    /// The topology that it got.
    #[serde(rename = "currentCPUTopology", skip_serializing_if = "Option::is_none")]
    pub current_cpu_topology: Option<Topology>,
    /// The memory that it got.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryStatus>,
    /// The node that it is to leave.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub evacuation_node_name: Option<String>,
    /// The image of its launcher, with the version of Godwit that made its pod.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub launcher_container_image_version: Option<String>,
    /// Its migration, or its last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub migration_state: Option<migration::State>,
    /// `LiveMigration`, or `BlockMigration` where disks are copied.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub migration_method: Option<String>,
    /// Volumes whose disks are to move to other claims.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub migrated_volumes: Vec<MigratedVolume>,
    /// `Unix`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub migration_transport: Option<String>,
}

impl Status {
    /// What its handler says of whether the guest can move; None: nothing yet.
    pub fn live_migratable(&self) -> Option<&Condition> {
        self.conditions.iter().find(|c| c.kind == types::LIVE_MIGRATABLE)
    }

    /// Comes to a phase, and writes down when. It is let be where it is already.
    pub fn enter(&mut self, phase: Phase, now: jiff::Timestamp) {
        if self.phase == phase && !self.phase_transition_timestamps.is_empty() {
            return;
        }
        self.phase = phase;
        self.phase_transition_timestamps.push(Transition::new(phase, now));
    }
}

/// A network card that runs.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct InterfaceStatus {
    /// As in the spec.
    pub name: String,
    /// Its address on the network.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ip_address: Option<String>,
    /// All of them.
    pub ip_addresses: Vec<String>,
    /// Its hardware address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// Who knows: `domain`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub info_source: Option<String>,
}

/// A volume that is used.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct VolumeStatus {
    /// As in the spec.
    pub name: String,
    /// How the guest calls it: `vda`.
    pub target: String,
    /// How many bytes it has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<i64>,
    /// The claim behind it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub persistent_volume_claim_info: Option<ClaimInfo>,
}

/// A volume whose disk moves from one claim to another.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct MigratedVolume {
    /// As in the spec.
    pub volume_name: String,
    /// The claim that it leaves.
    #[serde(rename = "sourcePVCInfo")]
    pub source: ClaimInfo,
    /// The claim to which it goes.
    #[serde(rename = "destinationPVCInfo")]
    pub destination: ClaimInfo,
}

/// A claim that is used.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ClaimInfo {
    /// Its name.
    pub claim_name: String,
    /// Who may use it at once.
    pub access_modes: Vec<String>,
    /// Filesystem or Block.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub volume_mode: Option<String>,
    /// What it has.
    pub capacity: BTreeMap<String, Quantity>,
    /// What was asked for.
    pub requests: BTreeMap<String, Quantity>,
}

/// The memory of a guest.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct MemoryStatus {
    /// At its start.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guest_at_boot: Option<Quantity>,
    /// Now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guest_current: Option<Quantity>,
    /// Asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guest_requested: Option<Quantity>,
}
