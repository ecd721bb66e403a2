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
//! During a move the *source's* ledger decides: once it says Committed, the
//! source may not run any more. The target may run once its *own* ledger says
//! so (Adopt). In between stands nobody but the target's ledger: the source may
//! take the VM back only after that ledger has promised, by Relinquish, that
//! the target will never adopt.
//!
//! Every swap is idempotent: done twice it succeeds twice. So a swap whose
//! answer was lost is settled by repeating it, or by another that is acknowledged.

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

/// The attempt that a record is armed or committed for.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Move {
    /// Which attempt.
    pub attempt: AttemptId,
    /// The launcher that is to own the VM.
    pub heir: InstanceId,
    /// The host where the heir lives: only this peer may ask about the attempt.
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
}

/// Who may run a VM.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Record {
    /// The VM.
    pub vm: VmId,
    /// The owner's epoch.
    pub epoch: Epoch,
    /// The launcher that may run it, unless `Committed`.
    pub owner: InstanceId,
    /// The state of a move.
    #[serde(flatten)]
    pub state: State,
}

/// A change of a record: compare, then swap.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(tag = "swap", rename_all = "kebab-case")]
pub enum Swap {
    /// A launcher wants to start the VM: takes the epoch after `seen`.
    Start {
        /// The epoch that the record had when it was read; None: there was none.
        seen: Option<Epoch>,
        /// Who starts.
        instance: InstanceId,
        /// A person insists, though the VM has left.
        forced: bool,
    },
    /// The source says that the move may be committed soon.
    Arm {
        /// The source's epoch.
        epoch: Epoch,
        /// The source.
        owner: InstanceId,
        /// The move.
        #[serde(rename = "move")]
        to: Move,
    },
    /// The point of no return.
    Commit {
        /// The source's epoch.
        epoch: Epoch,
        /// The attempt that is armed.
        attempt: AttemptId,
    },
    /// The attempt shall never be committed.
    Abort {
        /// The source's epoch.
        epoch: Epoch,
        /// The attempt.
        attempt: AttemptId,
    },
    /// In the target's ledger: the heir takes over.
    Adopt {
        /// The source's epoch; the heir's is the next.
        epoch: Epoch,
        /// The heir.
        instance: InstanceId,
    },
    /// In the target's ledger: the heir shall never run the VM. Granted unless
    /// it has adopted, or by the heir itself when its QEMU never ran.
    Relinquish {
        /// The source's epoch.
        epoch: Epoch,
        /// The source, who is the heir's heir.
        source: InstanceId,
        /// The attempt.
        attempt: AttemptId,
        /// The source's host.
        peer: HostId,
        /// Set by the heir alone, when it adopted but has not run.
        adopted: Option<InstanceId>,
    },
    /// In the source's ledger, after a Relinquish: the VM is the source's again.
    HandBack {
        /// The source's epoch.
        epoch: Epoch,
        /// The source.
        owner: InstanceId,
        /// The attempt.
        attempt: AttemptId,
    },
}

/// A swap found something else than it expected.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize, thiserror::Error)]
#[error("the owner record says {}: {why}", .current.as_ref().map_or("nothing".into(), ToString::to_string))]
pub struct Refused {
    /// What the record says.
    pub current: Option<Record>,
    /// Why the swap does not fit it.
    pub why: String,
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
        }
    }
}

/// What became of an attempt, by the source's record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// The target may adopt; the source may not run.
    Committed,
    /// It will never be committed.
    Aborted,
    /// Not decided yet.
    Open,
}

impl Record {
    /// What became of an attempt that the owner of `epoch` began.
    pub fn verdict(&self, epoch: Epoch, attempt: &AttemptId) -> Verdict {
        match &self.state {
            _ if self.epoch != epoch => Verdict::Aborted,
            State::Committed(to) if to.attempt == *attempt => Verdict::Committed,
            State::Armed(to) if to.attempt == *attempt => Verdict::Open,
            State::Idle => Verdict::Open,
            State::Armed(_) | State::Committed(_) => Verdict::Aborted,
        }
    }
}

/// Applies a swap to a VM's record; returns the record as it is to be written.
///
/// # Errors
/// [`Refused`] names what the record says instead; nothing changes then.
pub fn apply(vm: &VmId, current: Option<&Record>, swap: &Swap) -> Result<Record, Refused> {
    let refuse = |why: &str| Refused { current: current.cloned(), why: why.to_owned() };
    let record = |epoch, owner: &InstanceId, state| Record {
        vm: vm.clone(),
        epoch,
        owner: owner.clone(),
        state,
    };
    match swap {
        Swap::Start { seen, instance, forced } => match current {
            None if seen.is_none() => Ok(record(1, instance, State::Idle)),
            None => Err(refuse("the record that was read is gone")),
            // Done already.
            Some(now) if next(*seen) == now.epoch && now.owner == *instance => Ok(now.clone()),
            Some(now) if *seen != Some(now.epoch) => Err(refuse("it has changed meanwhile")),
            Some(Record { state: State::Committed(_), .. }) if !forced => {
                Err(refuse("start the VM where it went, or insist with --force"))
            }
            Some(now) => Ok(record(now.epoch + 1, instance, State::Idle)),
        },
        Swap::Arm { epoch, owner, to } => match current {
            Some(now) if now.epoch == *epoch && now.owner == *owner => match &now.state {
                State::Idle => Ok(record(*epoch, owner, State::Armed(to.clone()))),
                State::Armed(armed) if armed == to => Ok(now.clone()),
                _ => Err(refuse("another move is under way")),
            },
            _ => Err(refuse("it is not the source's any more")),
        },
        Swap::Commit { epoch, attempt } => match current {
            Some(now) if now.epoch == *epoch => match &now.state {
                State::Armed(to) if to.attempt == *attempt => {
                    Ok(record(*epoch, &now.owner, State::Committed(to.clone())))
                }
                State::Committed(to) if to.attempt == *attempt => Ok(now.clone()),
                _ => Err(refuse("it is not armed for this attempt")),
            },
            _ => Err(refuse("the attempt was aborted")),
        },
        Swap::Abort { epoch, attempt } => match current {
            None => Err(refuse("there is no such VM here")),
            Some(now) => match now.verdict(*epoch, attempt) {
                Verdict::Committed => Err(refuse("the attempt is committed")),
                Verdict::Aborted => Ok(now.clone()),
                Verdict::Open => Ok(record(epoch + 1, &now.owner, State::Idle)),
            },
        },
        Swap::Adopt { epoch, instance } => match current {
            Some(now) if now.epoch == epoch + 1 && now.owner == *instance => match now.state {
                State::Committed(_) => Err(refuse("it was given back")),
                State::Idle | State::Armed(_) => Ok(now.clone()),
            },
            Some(now) if now.epoch > *epoch => Err(refuse("it was given back, or lives here")),
            Some(Record { state: State::Idle | State::Armed(_), .. }) => {
                Err(refuse("another VM of this name lives here"))
            }
            Some(_) | None => Ok(record(epoch + 1, instance, State::Idle)),
        },
        Swap::Relinquish { epoch, source, attempt, peer, adopted } => {
            let back = Move { attempt: attempt.clone(), heir: source.clone(), peer: peer.clone() };
            let tombstone = |owner| Ok(record(epoch + 1, owner, State::Committed(back.clone())));
            match current {
                Some(now) if now.epoch == epoch + 1 => match &now.state {
                    State::Committed(to) if *to == back => Ok(now.clone()),
                    State::Idle if adopted.as_ref() == Some(&now.owner) => tombstone(&now.owner),
                    _ => Err(refuse("the heir runs it")),
                },
                Some(now) if now.epoch > *epoch => Err(refuse("the heir has run it since")),
                // The same ledger as the source's, or a tombstone of an older visit.
                Some(Record { state: State::Committed(to), .. }) => tombstone(&to.heir),
                Some(_) => Err(refuse("another VM of this name lives here")),
                None => tombstone(source),
            }
        }
        Swap::HandBack { epoch, owner, attempt } => match current {
            Some(now) => match &now.state {
                State::Committed(to)
                    if to.attempt == *attempt
                        && ((now.epoch == *epoch && now.owner == *owner)
                            || (now.epoch == epoch + 1 && to.heir == *owner)) =>
                {
                    Ok(record(epoch + 2, owner, State::Idle))
                }
                State::Idle if now.epoch == epoch + 2 && now.owner == *owner => Ok(now.clone()),
                _ => Err(refuse("it is not committed for this attempt")),
            },
            None => Err(refuse("there is no such VM here")),
        },
    }
}

/// The epoch that a start takes.
fn next(seen: Option<Epoch>) -> Epoch {
    seen.unwrap_or(0) + 1
}
