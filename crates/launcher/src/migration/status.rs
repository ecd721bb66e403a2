//! A move as its launcher shows it.

use super::policy::Policy;
use super::progress::Progress;
use super::verify::VerifyReport;
use handover::Deadline;
use serde::{Deserialize, Serialize};

/// Which half of the move this launcher is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Half {
    /// The guest leaves.
    Source,
    /// The guest arrives.
    Target,
}

/// How the move ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "result", rename_all = "kebab-case")]
pub enum Outcome {
    /// The guest runs at the target.
    Succeeded,
    /// The guest runs where it ran.
    Failed {
        /// What happened, and what to do.
        reason: String,
        /// Whether the next attempt goes on from what was copied.
        resumable: bool,
    },
    /// The guest runs where it ran, because the user wanted it so.
    Cancelled,
    /// Neither side may run the guest until the owner record can be asked.
    InDoubt {
        /// What is missing.
        reason: String,
    },
}

/// What a move waits for, and for how long at most.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Waiting {
    /// For what.
    pub reason: String,
    /// Seconds until that is given up, counted from the phase's begin; None in doubt.
    pub deadline_seconds: Option<f64>,
}

/// What was said of a move when it could first be told.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Predicted {
    /// How long it takes from its begin to the guest's run at the target.
    pub seconds: f64,
    /// How long the guest stands still, in milliseconds.
    pub downtime_ms: f64,
}

/// What a comparison of the disks that a guest left with those on which it runs has shown.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "disks", rename_all = "lowercase")]
pub enum Verified {
    /// They are the same, but for what the guest has written since.
    Verified {
        /// Bytes compared.
        compared: u64,
        /// Bytes that differ because the guest has written them since.
        changed: u64,
    },
    /// They differ though the guest has not written there.
    Differ {
        /// Where first, on each disk: its name and the offset.
        first: Vec<(String, u64)>,
    },
    /// They could not be compared.
    Unknown {
        /// Why.
        why: String,
    },
}

impl From<VerifyReport> for Verified {
    fn from(report: VerifyReport) -> Self {
        let VerifyReport { compared, changed, wrong } = report;
        if wrong.is_empty() {
            return Self::Verified { compared, changed };
        }
        let mut first: Vec<_> = wrong.into_iter().map(|w| (w.disk, w.extent.offset)).collect();
        first.sort();
        first.dedup_by(|later, earlier| later.0 == earlier.0);
        Self::Differ { first }
    }
}

impl std::fmt::Display for Verified {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Verified { compared, changed } => write!(
                f,
                "disks verified: {compared} bytes compared, {changed} of them changed by the guest since"
            ),
            Self::Differ { first } => {
                write!(f, "DISKS DIFFER where the guest has not written since it came:")?;
                first
                    .iter()
                    .try_for_each(|(disk, at)| write!(f, " disk {disk} from byte {at} on;"))?;
                write!(f, " keep the disks that it left")
            }
            Self::Unknown { why } => write!(f, "disks could not be compared: {why}"),
        }
    }
}

/// A move at one moment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The move's id.
    pub migration: String,
    /// Which half.
    pub half: Half,
    /// The handover's state, by name.
    pub phase: String,
    /// When the phase began, seconds since 1970.
    pub since: f64,
    /// What it waits for.
    pub waiting: Option<Waiting>,
    /// Measured.
    pub progress: Progress,
    /// How long the guest stood still, as this launcher measured it, milliseconds.
    pub paused_ms: Option<f64>,
    /// What was said of it at first, to be held against what it took.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub predicted: Option<Predicted>,
    /// Seconds that it took, once it is over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub took_seconds: Option<f64>,
    /// What a comparison of the disks has shown, where one was asked for: its handler tells it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verified: Option<Verified>,
    /// Set when it is over.
    pub outcome: Option<Outcome>,
    /// The failpoint at which it stands, in a test.
    pub failpoint: Option<String>,
}

impl Status {
    /// A move that begins now.
    pub fn begin(migration: &str, half: Half, phase: &str) -> Self {
        Self {
            migration: migration.to_owned(),
            half,
            phase: phase.to_owned(),
            since: now(),
            waiting: None,
            progress: Progress::default(),
            paused_ms: None,
            predicted: None,
            took_seconds: None,
            verified: None,
            outcome: None,
            failpoint: None,
        }
    }
}

impl Status {
    /// A half has entered a phase, and waits there.
    pub fn enter(&mut self, phase: &str, waiting: Option<handover::Waiting>, policy: &Policy) {
        self.phase = phase.to_owned();
        self.since = now();
        self.waiting = waiting.map(|waiting| Waiting {
            reason: waiting.reason.to_owned(),
            deadline_seconds: match waiting.deadline {
                Deadline::Data => None,
                kind => Some(policy.deadline(kind).as_secs_f64()),
            },
        });
        self.outcome = None;
    }
}

/// Seconds since 1970.
pub fn now() -> f64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0.0, |d| d.as_secs_f64())
}
