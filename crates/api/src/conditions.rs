//! Conditions, their types and reasons.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Types that VMs and VMIs have.
pub mod types {
    /// The guest runs.
    pub const READY: &str = "Ready";
    /// The guest stands still by a person's will.
    pub const PAUSED: &str = "Paused";
    /// Something cannot be done.
    pub const FAILURE: &str = "Failure";
    /// The VMI is not what the VM says now.
    pub const RESTART_REQUIRED: &str = "RestartRequired";
    /// The VMI's objects are as they should be.
    pub const SYNCHRONIZED: &str = "Synchronized";
    /// The VMI's DataVolumes are.
    pub const DATA_VOLUMES_READY: &str = "DataVolumesReady";
    /// The guest can move.
    pub const LIVE_MIGRATABLE: &str = "LiveMigratable";
    /// The guest can move with its disks.
    pub const STORAGE_LIVE_MIGRATABLE: &str = "StorageLiveMigratable";
    /// The guest's disks are to move to other claims.
    pub const VOLUMES_CHANGE: &str = "VolumesChange";
    /// The processor is emulated.
    pub const SOFTWARE_EMULATION: &str = "SoftwareEmulation";
    /// The spec has fields that have no effect here.
    pub const UNSUPPORTED_FIELDS: &str = "UnsupportedFields";
    /// The guest is to leave its node.
    pub const EVICTION_REQUESTED: &str = "EvictionRequested";
    /// Where the guest is cannot be known.
    pub const IN_DOUBT: &str = "InDoubt";
}

/// When something came to a phase.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Transition<P> {
    /// Which.
    pub phase: P,
    /// When.
    pub phase_transition_timestamp: String,
}

impl<P> Transition<P> {
    /// Now.
    pub fn new(phase: P, now: Timestamp) -> Self {
        Self { phase, phase_transition_timestamp: moment(now) }
    }

    /// When.
    pub fn at(&self) -> Option<Timestamp> {
        self.phase_transition_timestamp.parse().ok()
    }
}

/// A condition's status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Is {
    /// It holds.
    True,
    /// It does not.
    False,
    /// Nobody knows.
    Unknown,
}

impl From<bool> for Is {
    fn from(holds: bool) -> Self {
        if holds { Is::True } else { Is::False }
    }
}

impl fmt::Display for Is {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// A condition.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    /// Its type.
    #[serde(rename = "type")]
    pub kind: String,
    /// Whether it holds.
    pub status: Is,
    /// In one word.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// For people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// Since when.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_transition_time: Option<String>,
}

impl Condition {
    /// Since when it is as it is.
    pub fn since(&self) -> Option<Timestamp> {
        self.last_transition_time.as_deref()?.parse().ok()
    }

    /// One that holds, does not, or is unknown, since it is set.
    pub fn new(kind: &str, status: impl Into<Is>, reason: &str, message: &str) -> Self {
        let text = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        Self {
            kind: kind.into(),
            status: status.into(),
            reason: text(reason),
            message: text(message),
            last_transition_time: None,
        }
    }
}

/// Whether a condition holds.
pub fn is(conditions: &[Condition], kind: &str) -> bool {
    conditions.iter().any(|c| c.kind == kind && c.status == Is::True)
}

/// Puts new conditions in the place of those of their types; when one has changed is kept if its
/// status has not. Those of the types that are to go, go.
pub fn merge(
    old: &[Condition],
    new: Vec<Condition>,
    gone: &[&str],
    now: Timestamp,
) -> Vec<Condition> {
    let stays = |c: &&Condition| !gone.contains(&&*c.kind) && !new.iter().any(|n| n.kind == c.kind);
    let mut all: Vec<Condition> = old.iter().filter(stays).cloned().collect();
    for mut condition in new {
        let before = old.iter().find(|c| c.kind == condition.kind && c.status == condition.status);
        condition.last_transition_time = match before {
            Some(before) => before.last_transition_time.clone(),
            None => Some(moment(now)),
        };
        all.push(condition);
    }
    all.sort_by(|a, b| a.kind.cmp(&b.kind));
    all
}

/// A moment as the API writes it: seconds, UTC.
pub fn moment(at: Timestamp) -> String {
    at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}
