//! What a host's handler answers when launchers and other hosts ask its ledger. Pure.

use crate::record::{self, HostId, InstanceId, Record, Refused, State, Swap, Verdict, VmId, apply};

/// What the handler knows of the record's owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Owner {
    /// The owner's QEMU was seen to end.
    QemuEnded,
    /// It runs, or nobody knows.
    Unknown,
}

/// Answers a swap that a launcher of this host asks for.
///
/// # Errors
/// [`Refused`]: the record stays as it is.
pub fn local(vm: &VmId, current: Option<&Record>, swap: &Swap) -> Result<Record, Refused> {
    apply(vm, current, swap)
}

/// Answers a swap that another host asks for. It may ask only what concerns an
/// attempt of its own:
/// - the target's host: an Abort of the attempt that would make its launcher
///   the heir. If the owner's QEMU was seen to end while the attempt is armed,
///   it is committed instead: the guest survives its source.
/// - the source's host: a Relinquish of the heir it made.
///
/// # Errors
/// [`Refused`]: the record stays as it is. With `current: None` also when the
/// peer has no business with the VM: it learns nothing.
pub fn peer(
    vm: &VmId,
    current: Option<&Record>,
    asker: &HostId,
    owner_of: impl Fn(&InstanceId) -> Owner,
    swap: &Swap,
) -> Result<Record, Refused> {
    let nothing = |why: &str| Refused { current: None, why: why.to_owned() };
    match swap {
        Swap::Abort { epoch, attempt } => {
            let Some(now) = current else { return Err(nothing("there is no such VM here")) };
            let concerns = |to: &record::Move| to.peer == *asker && to.attempt == *attempt;
            match &now.state {
                State::Armed(to) if concerns(to) && owner_of(&now.owner) == Owner::QemuEnded => {
                    let commit = Swap::Commit { epoch: *epoch, attempt: attempt.clone() };
                    apply(vm, current, &commit)
                }
                State::Armed(to) | State::Committed(to) if concerns(to) => apply(vm, current, swap),
                // Its attempt is over: that it may know.
                _ if now.verdict(*epoch, attempt) == Verdict::Aborted => Ok(now.clone()),
                _ => Err(nothing("no attempt of yours is under way")),
            }
        }
        Swap::Relinquish { peer, adopted: None, .. } if peer == asker => apply(vm, current, swap),
        _ => Err(nothing("another host may not ask this")),
    }
}
