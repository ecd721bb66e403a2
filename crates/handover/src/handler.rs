//! What a host's handler answers when launchers and other hosts ask its ledger. Pure.

use crate::record::{HostId, InstanceId, Record, Refused, State, Swap, VmId, apply};

/// What the handler knows of an instance's QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Qemu {
    /// Its process, or its launcher's, lives.
    Alive,
    /// It was seen to end.
    Ended,
    /// Nobody knows.
    Unknown,
}

/// Answers a swap that a launcher of this host asks for.
///
/// A start needs the end of the QEMU that the record's owner had: two
/// instances of one host are kept apart here, as those of two hosts are by the
/// epochs. A person may insist where nobody knows, not where it lives.
///
/// # Errors
/// [`Refused`]: the record stays as it is.
pub fn local(
    vm: &VmId,
    current: Option<&Record>,
    qemu_of: impl Fn(&InstanceId) -> Qemu,
    swap: &Swap,
) -> Result<Record, Refused> {
    let refuse = |why: String| Refused { current: current.cloned(), why };
    match (swap, current) {
        (Swap::Start { instance, forced, .. }, Some(now)) if now.owner != *instance => {
            match qemu_of(&now.owner) {
                Qemu::Alive => {
                    return Err(refuse(format!(
                        "QEMU of {} still lives; stop it first",
                        now.owner
                    )));
                }
                // The owner of a VM that has left, or is expected, is not to be known here.
                Qemu::Unknown if !forced && matches!(now.state, State::Idle | State::Armed(_)) => {
                    return Err(refuse(format!(
                        "nobody knows whether QEMU of {} still lives; make sure, then insist with --force",
                        now.owner
                    )));
                }
                Qemu::Unknown | Qemu::Ended => {}
            }
        }
        (Swap::Expect { from, .. }, Some(Record { state: State::Expected(old), .. }))
            if old.peer != from.peer && qemu_of(&old.heir) == Qemu::Alive =>
        {
            return Err(refuse("another host moves a VM of this name here".into()));
        }
        _ => {}
    }
    apply(vm, current, swap)
}

/// Answers a swap that another host asks for. It may ask only about an attempt
/// whose other end it is by the record:
/// - the target's host: an Abort. If the owner's QEMU was seen to end while the
///   attempt is armed it is committed instead: the guest survives its source.
/// - the source's host: a Relinquish of the heir. An asker without the guest
///   leaves a heir alone that lives.
///
/// Of anything else a peer learns at most that an epoch which it named is over.
///
/// # Errors
/// [`Refused`]: the record stays as it is; with `current: None` when the peer
/// is to learn nothing.
pub fn peer(
    vm: &VmId,
    current: Option<&Record>,
    asker: &HostId,
    qemu_of: impl Fn(&InstanceId) -> Qemu,
    swap: &Swap,
) -> Result<Record, Refused> {
    let nothing = |why: &str| Refused { current: None, why: why.to_owned() };
    let Some(now) = current else { return Err(nothing("no move of yours is known here")) };
    match swap {
        Swap::Abort { epoch, attempt } => match &now.state {
            State::Armed(to) | State::Committed(to)
                if to.peer == *asker && to.attempt == *attempt && now.epoch == *epoch =>
            {
                let survived =
                    matches!(now.state, State::Armed(_)) && qemu_of(&now.owner) == Qemu::Ended;
                if survived {
                    let commit = Swap::Commit { epoch: *epoch, attempt: attempt.clone() };
                    apply(vm, current, &commit)
                } else {
                    apply(vm, current, swap)
                }
            }
            State::Expected(_) => Err(nothing("no attempt of yours is under way")),
            _ if now.epoch > *epoch => {
                // N.B. refused: what is granted is written.
                let current = Some(veiled(now, None));
                Err(Refused { current, why: "the attempt is over".into() })
            }
            _ => Err(nothing("no attempt of yours is under way")),
        },
        Swap::Relinquish { epoch, source, attempt, peer, adopted: None, has_guest }
            if peer == asker =>
        {
            match &now.state {
                // N.B. `Committed` where the ledger is the same as the source's.
                State::Expected(of) | State::Committed(of) | State::Returned(of)
                    if of.peer == *asker && of.attempt == *attempt =>
                {
                    let open = !matches!(now.state, State::Returned(_));
                    if open && !has_guest && qemu_of(&of.heir) == Qemu::Alive {
                        return Err(nothing("its heir lives and is about to run it"));
                    }
                    apply(vm, current, swap)
                }
                State::Expected(_) => Err(nothing("no attempt of yours is expected here")),
                _ if now.epoch > *epoch => {
                    let current = Some(veiled(now, Some(source)));
                    Err(Refused { current, why: "the heir has adopted it".into() })
                }
                _ => Err(nothing("no attempt of yours is expected here")),
            }
        }
        _ => Err(nothing("another host may not ask this")),
    }
}

/// The heir of which a peer learns by asking this that it has adopted the VM. The peer may end its own QEMU
/// then, for good: so that heir may not give the VM back any more, see [`is_too_late`].
///
/// N.B. to be written down before the peer is answered, and only if the record is still as it was judged.
pub fn told_of<'a>(current: Option<&'a Record>, swap: &Swap) -> Option<&'a InstanceId> {
    let (Some(now), Swap::Relinquish { epoch, source, adopted: None, .. }) = (current, swap) else {
        return None;
    };
    let adopted = now.state == State::Idle && now.epoch.checked_sub(1) == Some(*epoch);
    (adopted && now.owner != *source).then_some(&now.owner)
}

/// Whether an heir wants to give a VM back of which a peer was `told` that it is that heir's. Refused, it is
/// this host's to start again, from a disk that was complete before the memory was.
pub fn is_too_late(told: Option<&InstanceId>, swap: &Swap) -> bool {
    matches!(swap, Swap::Relinquish { adopted: Some(heir), .. } if told == Some(heir))
}

/// What an heir is answered for which it is too late.
pub fn too_late(current: Option<&Record>) -> Refused {
    let why = "the other end was told that the heir has the VM: it is started again here".into();
    Refused { current: current.cloned(), why }
}

/// The epoch alone, and whether the owner is the one that was named.
fn veiled(now: &Record, named: Option<&InstanceId>) -> Record {
    let owner = named.filter(|named| **named == now.owner).cloned();
    Record {
        vm: now.vm.clone(),
        epoch: now.epoch,
        owner: owner.unwrap_or_else(|| "(not told to other hosts)".into()),
        state: State::Idle,
    }
}
