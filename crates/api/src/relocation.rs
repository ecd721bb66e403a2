//! VirtualMachineMove: a VM that is to go to another cluster, with all that it needs.

use crate::conditions::{Condition, Transition};
use kube::CustomResource;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;

/// What is wanted.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, CustomResource)]
#[kube(
    group = "godwit.dev",
    version = "v1alpha1",
    kind = "VirtualMachineMove",
    plural = "virtualmachinemoves",
    namespaced,
    status = "Status",
    schema = "disabled"
)]
#[serde(rename_all = "camelCase", default)]
pub struct Spec {
    /// Which VM of the namespace.
    pub vm: String,
    /// To which cluster: the name of its ClusterLink.
    pub cluster: String,
    /// To which namespace; none: to one of the same name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Under which name; none: its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// To which storage class; none: those of the same names.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub storage_class: Option<String>,
    /// What networks of the other cluster are called, by those of this one: where they differ.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub network_map: BTreeMap<String, String>,
    /// Compare the disks that the guest leaves with those on which it runs then.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub verify: bool,
    /// Only find out what would make it fail, and what it would take.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub check_only: bool,
}

/// Where a move is.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
pub enum Phase {
    /// New.
    #[default]
    #[serde(rename = "")]
    Unset,
    /// Both clusters are asked for all that would make it fail.
    Checking,
    /// The other cluster makes what the guest needs there.
    Preparing,
    /// The guest moves.
    Moving,
    /// What was made for the move goes, on both sides.
    Settling,
    /// The VM is the other cluster's.
    Succeeded,
    /// The VM is this cluster's, as before.
    Failed,
}

impl Phase {
    /// Whether it is over.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed)
    }
}

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Status {
    /// How far it is.
    pub phase: Phase,
    /// When it came to each phase.
    pub phase_transition_timestamps: Vec<Transition<Phase>>,
    /// What holds and what does not.
    pub conditions: Vec<Condition>,
    /// What would make it fail, or has: all of it.
    pub faults: Vec<String>,
    /// What does not stand in its way, and is worth knowing.
    pub warnings: Vec<String>,
    /// Of one that only finds out: what was measured, and what it would take.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub outlook: Option<Value>,
    /// The migration by which the guest moves, in this namespace.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub migration: Option<String>,
}

impl Status {
    /// Comes to a phase, and writes down when.
    pub fn enter(&mut self, phase: Phase, now: jiff::Timestamp) {
        if self.phase != phase {
            self.phase = phase;
            self.phase_transition_timestamps.push(Transition::new(phase, now));
        }
    }

    /// When it came to the phase in which it is.
    pub fn since(&self) -> Option<jiff::Timestamp> {
        self.phase_transition_timestamps.last()?.at()
    }
}
