//! The owner record: who may run a VM, and the swaps that change it.
//!
//! ```text
//!            Start (next epoch)
//!   absent ---------------------> Idle <-----------------------------+
//!                                 |  ^                               |
//!                             Arm |  | Abort, Start (next epoch)     | HandBack
//!                                 v  |                               | (next epoch)
//!                                Armed ------ Commit ---------> Committed(heir)
//! ```
//!
//! and in the ledger of the host to which it goes:
//!
//! ```text
//!                    Expect                  Adopt (next epoch)
//!   absent, left ---------------> Expected --------------------> Idle
//!                                     |      Relinquish            | Relinquish, by the heir
//!                                     +-----------> Returned <-----+ whose guest never ran
//! ```
//!
//! During a move the *source's* ledger decides: once it says Committed, the
//! source may not run any more. The target may run once its *own* ledger says
//! so (Adopt). In between stands nobody but the target's ledger: the source may
//! take the VM back only after that ledger has promised, by Relinquish, that
//! the target will never adopt.
//!
//! Both ledgers may be the same one (two launchers of one host, or of one
//! cluster): then Expect changes nothing and Adopt follows Commit directly.
//!
//! Every swap is idempotent: done twice it succeeds twice. So a swap whose
//! answer was lost is settled by repeating it, or by another that is acknowledged.

mod swap;

pub use swap::{MAX_EPOCH, Refused, Swap, apply};

use serde::{Deserialize, Serialize};
use std::fmt;

macro_rules! id {
    ($(#[$meta:meta])* $name:ident) => {
        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub String);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl From<&str> for $name {
            fn from(text: &str) -> Self {
                Self(text.to_owned())
            }
        }
    };
}

id! {
    /// A VM's name.
    VmId
}
id! {
    /// One life of a launcher: never a host's name, never used again.
    InstanceId
}
id! {
    /// One attempt to move a VM.
    AttemptId
}
id! {
    /// A host's identity, as its certificate has it.
    HostId
}

/// The number of a VM's time with one owner. It only grows.
pub type Epoch = u64;

/// One attempt, as a ledger knows it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Move {
    /// Which attempt.
    pub attempt: AttemptId,
    /// The launcher that is to own the VM.
    pub heir: InstanceId,
    /// The host at the attempt's other end: only this peer may ask about it.
    pub peer: HostId,
}

/// What a record says of a move.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "lowercase")]
pub enum State {
    /// None is near its end.
    Idle,
    /// One may be committed.
    Armed(Move),
    /// The VM has left: a tombstone that names the heir.
    Committed(Move),
    /// The VM is another host's, in this epoch, and may arrive by this attempt.
    Expected(Move),
    /// The VM is another host's: it did not arrive by this attempt and never will.
    Returned(Move),
}

/// Who may run a VM.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Record {
    /// The VM.
    pub vm: VmId,
    /// The owner's epoch.
    pub epoch: Epoch,
    /// The launcher that may run it; if `Committed`, that did; if `Expected` or
    /// `Returned`, that does on the other host.
    pub owner: InstanceId,
    /// The state of a move.
    #[serde(flatten)]
    pub state: State,
}

impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Record { vm, epoch, owner, state } = self;
        match state {
            State::Idle => write!(f, "{owner} owns {vm} in epoch {epoch}"),
            State::Armed(to) => write!(
                f,
                "{owner} owns {vm} in epoch {epoch} and may give it to {} in attempt {}",
                to.heir, to.attempt
            ),
            State::Committed(to) => {
                write!(f, "{vm} left {owner} after epoch {epoch} for {} on {}", to.heir, to.peer)
            }
            State::Expected(from) => write!(
                f,
                "{vm} is {owner}'s on {} in epoch {epoch} and may arrive in attempt {}",
                from.peer, from.attempt
            ),
            State::Returned(from) => {
                write!(f, "{vm} is {owner}'s on {} and did not arrive here", from.peer)
            }
        }
    }
}

/// What became of an attempt, by the record of the ledger that decides it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// Not decided yet; or the record is older than the attempt and knows nothing.
    Open,
    /// The heir may adopt; the source may not run.
    Committed,
    /// The heir has adopted.
    Adopted,
    /// The heir has given the VM back, but the source has not taken it yet.
    GivenBack,
    /// It will never be committed, or was and was handed back: the source owns the VM.
    Over,
    /// It will never be committed, and neither side of it owns the VM any more.
    Taken,
}

impl Record {
    /// What became of the attempt `of` that `source` began in `epoch`. All but
    /// `Open`, `Committed` and `GivenBack` is final.
    pub fn verdict(&self, epoch: Epoch, source: &InstanceId, of: &Move) -> Verdict {
        let over = if self.owner == *source { Verdict::Over } else { Verdict::Taken };
        match &self.state {
            State::Returned(from) if from.attempt == of.attempt => Verdict::GivenBack,
            State::Expected(_) => Verdict::Open,
            _ if self.epoch < epoch => Verdict::Open,
            _ if self.epoch > epoch => match &self.state {
                _ if self.owner == of.heir => Verdict::Adopted,
                State::Idle | State::Armed(_) => over,
                _ => Verdict::Taken,
            },
            State::Idle => Verdict::Open,
            State::Armed(to) if to.attempt == of.attempt => Verdict::Open,
            State::Armed(_) => over,
            State::Committed(to) if to.attempt == of.attempt => Verdict::Committed,
            State::Committed(_) | State::Returned(_) => Verdict::Taken,
        }
    }
}
