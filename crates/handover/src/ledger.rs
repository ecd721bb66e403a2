//! How a handler is asked: by the launchers of its host, and by other hosts.

use crate::record::{InstanceId, Record, Refused, Swap, VmId};
use crate::source::Answer;
use serde::{Deserialize, Serialize};

/// A question.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "kebab-case")]
pub enum Request {
    /// What does the record say? Launchers of this host only.
    Read {
        /// The VM.
        vm: VmId,
    },
    /// Change the record.
    Swap {
        /// The VM.
        vm: VmId,
        /// How.
        change: Swap,
    },
    /// Watch this QEMU, so that its end is known without its launcher.
    Watch {
        /// The owner that started it.
        instance: InstanceId,
        /// Its process id.
        pid: u32,
        /// When that process began, as the kernel counts it.
        start_time: u64,
    },
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub enum Response {
    /// What the record says.
    Record {
        /// None: there is none.
        record: Option<Record>,
    },
    /// The swap is written.
    Done {
        /// What is written.
        record: Record,
    },
    /// The swap does not fit.
    Refused {
        /// Why, and what is written.
        refused: Refused,
    },
    /// The process is watched.
    Watching,
    /// It could not be carried out; nobody knows how far it came.
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
