//! The swaps: what each expects of a record, and what it makes of it.

use super::{AttemptId, Epoch, HostId, InstanceId, Move, Record, State, VmId};
use serde::{Deserialize, Serialize};

/// No VM changes its owner that often: a peer that names a later epoch lies,
/// and would leave none for this host. Also the last that JSON can carry exactly.
pub const MAX_EPOCH: Epoch = 1 << 53;

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
        /// The source.
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

/// Applies a swap to a VM's record; returns the record as it is to be written.
///
/// # Errors
/// [`Refused`] names what the record says instead; nothing changes then.
pub fn apply(vm: &VmId, current: Option<&Record>, swap: &Swap) -> Result<Record, Refused> {
    let swapped = match (swap, current) {
        (Swap::Start { seen, instance, forced }, now) => start(now, *seen, instance, *forced),
        (Swap::Expect { epoch, source, from }, now) => expect(now, *epoch, source, from),
        (_, None) => Err("there is no such VM here"),
        (Swap::Arm { epoch, owner, to }, Some(now)) => arm(now, *epoch, owner, to),
        (Swap::Commit { epoch, attempt }, Some(now)) => commit(now, *epoch, attempt),
        (Swap::Abort { epoch, attempt }, Some(now)) => abort(now, *epoch, attempt),
        (Swap::Adopt { epoch, instance }, Some(now)) => adopt(now, *epoch, instance),
        (Swap::Relinquish { epoch, source, attempt, peer, adopted, has_guest: _ }, Some(now)) => {
            relinquish(now, *epoch, source, (attempt, peer), adopted.as_ref())
        }
        (Swap::HandBack { epoch, owner, attempt }, Some(now)) => {
            hand_back(now, *epoch, owner, attempt)
        }
    };
    match swapped {
        Ok((epoch, owner, state)) => Ok(Record { vm: vm.clone(), epoch, owner, state }),
        Err(why) => Err(Refused { current: current.cloned(), why: why.to_owned() }),
    }
}

/// The record's new content, or why the swap does not fit.
type Swapped = Result<(Epoch, InstanceId, State), &'static str>;

fn kept(now: &Record) -> Swapped {
    Ok((now.epoch, now.owner.clone(), now.state.clone()))
}

fn start(
    current: Option<&Record>,
    seen: Option<Epoch>,
    instance: &InstanceId,
    forced: bool,
) -> Swapped {
    let idle = |epoch| Ok((epoch, instance.clone(), State::Idle));
    let Some(now) = current else {
        return if seen.is_none() { idle(1) } else { Err("the record that was read is gone") };
    };
    match &now.state {
        // Done already.
        State::Idle | State::Armed(_) if now.owner == *instance && Some(now.epoch) > seen => {
            kept(now)
        }
        _ if seen != Some(now.epoch) => Err("it has changed meanwhile"),
        State::Committed(_) if !forced => Err("start the VM where it went, or insist with --force"),
        State::Expected(_) | State::Returned(_) if !forced => {
            Err("start the VM where it is, or insist with --force")
        }
        // N.B. by force: the epoch after this one may be the heir's.
        State::Committed(_) => idle(next(next(now.epoch))),
        _ => idle(next(now.epoch)),
    }
}

fn arm(now: &Record, epoch: Epoch, owner: &InstanceId, to: &Move) -> Swapped {
    match &now.state {
        _ if now.epoch != epoch || now.owner != *owner => Err("it is not the source's any more"),
        State::Idle => Ok((epoch, owner.clone(), State::Armed(to.clone()))),
        State::Armed(armed) if armed == to => kept(now),
        _ => Err("another move is under way"),
    }
}

fn commit(now: &Record, epoch: Epoch, attempt: &AttemptId) -> Swapped {
    match &now.state {
        _ if now.epoch != epoch => Err("the attempt was aborted"),
        State::Armed(to) if to.attempt == *attempt => {
            Ok((epoch, now.owner.clone(), State::Committed(to.clone())))
        }
        State::Committed(to) if to.attempt == *attempt => kept(now),
        _ => Err("it is not armed for this attempt"),
    }
}

/// N.B. takes the next epoch also where nothing is armed yet, so that an Arm
/// that comes late finds nothing.
fn abort(now: &Record, epoch: Epoch, attempt: &AttemptId) -> Swapped {
    match &now.state {
        _ if now.epoch > epoch => kept(now),
        _ if now.epoch < epoch => Err("it is older than the attempt"),
        State::Idle => Ok((next(epoch), now.owner.clone(), State::Idle)),
        State::Armed(to) if to.attempt == *attempt => {
            Ok((next(epoch), now.owner.clone(), State::Idle))
        }
        State::Committed(to) if to.attempt == *attempt => Err("the attempt is committed"),
        // The epoch saw another attempt, so this one can never be committed.
        State::Armed(_) | State::Committed(_) => kept(now),
        State::Expected(_) | State::Returned(_) => Err("the VM is another host's"),
    }
}

fn expect(current: Option<&Record>, epoch: Epoch, source: &InstanceId, from: &Move) -> Swapped {
    let expected = Ok((epoch, source.clone(), State::Expected(from.clone())));
    let Some(now) = current else {
        return if epoch > MAX_EPOCH { Err("no VM reaches that epoch") } else { expected };
    };
    match &now.state {
        _ if epoch > MAX_EPOCH => Err("no VM reaches that epoch"),
        State::Expected(old) if old == from && now.epoch == epoch => kept(now),
        // N.B. each attempt has an epoch of its own, so an earlier one is over.
        State::Expected(_) if now.epoch < epoch => expected,
        State::Expected(_) => Err("a later attempt is expected here"),
        State::Committed(_) | State::Returned(_) if now.epoch < epoch => expected,
        State::Committed(_) | State::Returned(_) => Err("it knows a later epoch of the VM"),
        // The same ledger as the source's.
        State::Idle | State::Armed(_) if now.epoch == epoch && now.owner == *source => kept(now),
        State::Idle | State::Armed(_) => Err("a VM of this name lives here"),
    }
}

fn adopt(now: &Record, epoch: Epoch, instance: &InstanceId) -> Swapped {
    match &now.state {
        // N.B. `Committed` where the ledger is the same as the source's.
        State::Expected(of) | State::Committed(of)
            if now.epoch == epoch && of.heir == *instance =>
        {
            Ok((next(epoch), instance.clone(), State::Idle))
        }
        State::Idle | State::Armed(_) if now.epoch == next(epoch) && now.owner == *instance => {
            kept(now)
        }
        _ => Err("the VM is not this launcher's to run"),
    }
}

/// N.B. the next epoch, so that an Expect that comes late does not undo it.
fn relinquish(
    now: &Record,
    epoch: Epoch,
    source: &InstanceId,
    (attempt, peer): (&AttemptId, &HostId),
    adopted: Option<&InstanceId>,
) -> Swapped {
    let returned = |heir: &InstanceId| {
        let of = Move { attempt: attempt.clone(), heir: heir.clone(), peer: peer.clone() };
        Ok((next(epoch), source.clone(), State::Returned(of)))
    };
    match &now.state {
        State::Returned(of) if of.attempt == *attempt => kept(now),
        // N.B. `Committed` where the ledger is the same as the source's.
        State::Expected(of) | State::Committed(of)
            if now.epoch == epoch && now.owner == *source && of.attempt == *attempt =>
        {
            returned(&of.heir)
        }
        State::Idle if now.epoch == next(epoch) && adopted == Some(&now.owner) => {
            returned(&now.owner)
        }
        _ if now.epoch > epoch => Err("the heir has adopted the VM"),
        _ => Err("this attempt was never expected here"),
    }
}

fn hand_back(now: &Record, epoch: Epoch, owner: &InstanceId, attempt: &AttemptId) -> Swapped {
    let after = next(next(epoch));
    match &now.state {
        State::Committed(of)
            if of.attempt == *attempt && now.epoch == epoch && now.owner == *owner =>
        {
            Ok((after, owner.clone(), State::Idle))
        }
        // The same ledger as the target's.
        State::Returned(of)
            if of.attempt == *attempt && now.epoch == next(epoch) && now.owner == *owner =>
        {
            Ok((after, owner.clone(), State::Idle))
        }
        State::Idle if now.epoch == after && now.owner == *owner => kept(now),
        _ => Err("it is not committed for this attempt"),
    }
}

/// The epoch after this one.
fn next(epoch: Epoch) -> Epoch {
    epoch.saturating_add(1)
}
