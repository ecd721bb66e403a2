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
//!                                     |     Relinquish             | Relinquish, by the heir
//!                                     +-----------> Committed <----+ whose guest never ran
//!                                              (back to the source)
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

/// No VM changes its owner that often: a peer that names a later epoch lies,
/// and would leave none for this host. Also the last that JSON can carry exactly.
pub const MAX_EPOCH: Epoch = 1 << 53;

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
    /// In the target's ledger: the VM may arrive. Nobody else of this host may
    /// start it meanwhile.
    Expect {
        /// The source's epoch.
        epoch: Epoch,
        /// The source.
        source: InstanceId,
        /// The attempt, its heir, and the source's host.
        from: Move,
    },
    /// In the target's ledger: the heir takes over.
    Adopt {
        /// The source's epoch; the heir's is the next.
        epoch: Epoch,
        /// The heir.
        instance: InstanceId,
    },
    /// In the target's ledger: the heir shall never run the VM. Granted unless
    /// it has adopted; then only to the heir itself, whose guest never ran.
    Relinquish {
        /// The source's epoch.
        epoch: Epoch,
        /// The source, who is the heir's heir.
        source: InstanceId,
        /// The attempt.
        attempt: AttemptId,
        /// The source's host.
        peer: HostId,
        /// Set by the heir alone, when it may have adopted but has not run.
        adopted: Option<InstanceId>,
        /// Whether the asker still has the guest. A start has not: it leaves a
        /// heir alone that lives and may still adopt.
        has_guest: bool,
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
            State::Expected(from) => write!(
                f,
                "{vm} is {owner}'s on {} in epoch {epoch} and may arrive in attempt {}",
                from.peer, from.attempt
            ),
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
    /// What became of the attempt `to` that `source` began in `epoch`.
    ///
    /// Every verdict but `Open` is final for the heir of `Over` and `Taken`,
    /// and for the source of `Adopted` and `Taken`: no later swap revives them.
    pub fn verdict(&self, epoch: Epoch, source: &InstanceId, of: &Move) -> Verdict {
        let Move { attempt, heir, .. } = of;
        let mine = if self.owner == *source { Verdict::Over } else { Verdict::Taken };
        match &self.state {
            State::Expected(_) => Verdict::Open,
            _ if self.epoch < epoch => Verdict::Open,
            State::Idle if self.epoch == epoch => Verdict::Open,
            State::Armed(to) if self.epoch == epoch => {
                if to.attempt == *attempt {
                    Verdict::Open
                } else {
                    mine
                }
            }
            State::Committed(to) if self.epoch == epoch => {
                if to.attempt == *attempt {
                    Verdict::Committed
                } else {
                    Verdict::Taken
                }
            }
            State::Committed(to) if to.attempt == *attempt && to.heir == *source => {
                Verdict::GivenBack
            }
            _ if self.owner == *heir => Verdict::Adopted,
            State::Committed(_) => Verdict::Taken,
            State::Idle | State::Armed(_) => mine,
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
            Some(now) if seen.map_or(1, next) == now.epoch && now.owner == *instance => {
                Ok(now.clone())
            }
            Some(now) if *seen != Some(now.epoch) => Err(refuse("it has changed meanwhile")),
            Some(Record { state: State::Committed(_), .. }) if !forced => {
                Err(refuse("start the VM where it went, or insist with --force"))
            }
            Some(Record { state: State::Expected(_), .. }) if !forced => {
                Err(refuse("start the VM where it is, or insist with --force"))
            }
            Some(now) => Ok(record(next(now.epoch), instance, State::Idle)),
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
            Some(now) if now.epoch > *epoch => Ok(now.clone()),
            Some(now) if now.epoch < *epoch => Err(refuse("it is older than the attempt")),
            Some(now) => match &now.state {
                State::Idle => Ok(record(next(*epoch), &now.owner, State::Idle)),
                State::Armed(to) if to.attempt == *attempt => {
                    Ok(record(next(*epoch), &now.owner, State::Idle))
                }
                State::Committed(to) if to.attempt == *attempt => {
                    Err(refuse("the attempt is committed"))
                }
                // The epoch saw another attempt, so this one can never be committed.
                State::Armed(_) | State::Committed(_) => Ok(now.clone()),
                State::Expected(_) => Err(refuse("the VM is another host's")),
            },
        },
        Swap::Expect { epoch, .. } if *epoch > MAX_EPOCH => {
            Err(refuse("the other host names an epoch that no VM reaches"))
        }
        Swap::Expect { epoch, source, from } => {
            let expected = || Ok(record(*epoch, source, State::Expected(from.clone())));
            match current {
                None => expected(),
                Some(now) => match &now.state {
                    State::Committed(_) if now.epoch <= *epoch => expected(),
                    State::Committed(_) => Err(refuse("it knows a later epoch of the VM")),
                    State::Expected(old) if now.epoch < *epoch || old.peer == from.peer => {
                        if now.epoch <= *epoch {
                            expected()
                        } else {
                            Err(refuse("it knows a later epoch of the VM"))
                        }
                    }
                    State::Expected(_) => Err(refuse("another host moves a VM of this name here")),
                    // The same ledger as the source's.
                    State::Idle | State::Armed(_)
                        if now.epoch == *epoch && now.owner == *source =>
                    {
                        Ok(now.clone())
                    }
                    State::Idle | State::Armed(_) => Err(refuse("a VM of this name lives here")),
                },
            }
        }
        Swap::Adopt { epoch, instance } => {
            let adopted = || Ok(record(next(*epoch), instance, State::Idle));
            match current {
                None => Err(refuse("the VM is not expected here")),
                Some(now) => match &now.state {
                    State::Expected(from) if now.epoch == *epoch && from.heir == *instance => {
                        adopted()
                    }
                    // The same ledger as the source's.
                    State::Committed(to) if now.epoch == *epoch && to.heir == *instance => {
                        adopted()
                    }
                    // Done already.
                    State::Idle | State::Armed(_)
                        if now.epoch == next(*epoch) && now.owner == *instance =>
                    {
                        Ok(now.clone())
                    }
                    _ => Err(refuse("the VM is not this launcher's to run")),
                },
            }
        }
        Swap::Relinquish { epoch, source, attempt, peer, adopted, has_guest: _ } => {
            let back = Move { attempt: attempt.clone(), heir: source.clone(), peer: peer.clone() };
            let tombstone = |heir| Ok(record(next(*epoch), heir, State::Committed(back.clone())));
            let Some(now) = current else { return Err(refuse("the VM was never expected here")) };
            match &now.state {
                // Done already.
                State::Committed(to) if *to == back => Ok(now.clone()),
                State::Expected(from)
                    if now.epoch == *epoch
                        && now.owner == *source
                        && from.attempt == *attempt
                        && from.peer == *peer =>
                {
                    tombstone(&from.heir)
                }
                // The same ledger as the source's.
                State::Committed(to)
                    if now.epoch == *epoch && now.owner == *source && to.attempt == *attempt =>
                {
                    tombstone(&to.heir)
                }
                State::Idle
                    if now.epoch == next(*epoch) && adopted.as_ref() == Some(&now.owner) =>
                {
                    tombstone(&now.owner)
                }
                _ if now.epoch > *epoch => Err(refuse("the heir has adopted the VM")),
                _ => Err(refuse("this attempt was never expected here")),
            }
        }
        Swap::HandBack { epoch, owner, attempt } => {
            let after = next(next(*epoch));
            let Some(now) = current else { return Err(refuse("there is no such VM here")) };
            match &now.state {
                State::Committed(to) if to.attempt == *attempt => {
                    let own = now.epoch == *epoch && now.owner == *owner;
                    // The same ledger as the target's.
                    let given_back = now.epoch == next(*epoch) && to.heir == *owner;
                    if own || given_back {
                        Ok(record(after, owner, State::Idle))
                    } else {
                        Err(refuse("it is not the source's to take back"))
                    }
                }
                // Done already.
                State::Idle if now.epoch == after && now.owner == *owner => Ok(now.clone()),
                _ => Err(refuse("it is not committed for this attempt")),
            }
        }
    }
}

/// The epoch after this one.
fn next(epoch: Epoch) -> Epoch {
    epoch.saturating_add(1)
}
