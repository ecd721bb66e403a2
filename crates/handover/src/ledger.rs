//! How a handler is asked: by the launchers of its host, and by other hosts.
//!
//! Each question and answer carries its version in its name. What a later build
//! asks differently gets a variant of its own, and the one before stays for a
//! release; a host that does not know a name answers `failed`, which settles nothing.

use crate::record::{InstanceId, Record, Refused, Swap, VmId};
use crate::source::Answer;
use serde::{Deserialize, Serialize};

/// A question.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "ask")]
pub enum Request {
    /// What does the record say? Launchers of this host only.
    #[serde(rename = "read/1")]
    Read {
        /// The VM.
        vm: VmId,
    },
    /// Change the record.
    #[serde(rename = "swap/1")]
    Swap {
        /// The VM.
        vm: VmId,
        /// How.
        change: Swap,
    },
    /// Watch this QEMU, so that its end is known without its launcher.
    #[serde(rename = "watch/1")]
    Watch {
        /// The owner that started it.
        instance: InstanceId,
        /// Its process.
        #[serde(flatten)]
        process: Process,
    },
}

/// A process, as those name it who run where it runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its id.
    pub pid: u32,
    /// When it began, as the kernel counts it.
    pub start_time: u64,
    /// The kernel's number of the namespace of process ids in which that is its id: a pod has one of its
    /// own. None: the handler's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<u64>,
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer")]
pub enum Response {
    /// What the record says.
    #[serde(rename = "record/1")]
    Record {
        /// None: there is none.
        record: Option<Record>,
    },
    /// The swap is written.
    #[serde(rename = "done/1")]
    Done {
        /// What is written.
        record: Record,
    },
    /// The swap does not fit.
    #[serde(rename = "refused/1")]
    Refused {
        /// Why, and what is written.
        refused: Refused,
    },
    /// The process is watched.
    #[serde(rename = "watching/1")]
    Watching,
    /// It could not be carried out; nobody knows how far it came.
    #[serde(rename = "failed/1")]
    Failed {
        /// Why.
        why: String,
    },
}

impl Response {
    /// The answer to a swap.
    pub fn into_answer(self) -> Answer {
        match self {
            Response::Done { record } => Answer::Done(record),
            Response::Refused { refused } => Answer::Refused(refused.current),
            Response::Record { .. } | Response::Watching | Response::Failed { .. } => {
                Answer::Unknown
            }
        }
    }
}
