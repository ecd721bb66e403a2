//! Deliberate mistakes, each between the crate's functions and the world: the
//! model must find every one of them.

use handover::handler::{self, Qemu};
use handover::record::{HostId, InstanceId, Record, Refused, State as RecordState, Swap, VmId};
use handover::source::{self, Answer, Source};
use handover::target::{self, Target};

/// What is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Twist {
    Nothing,
    /// The target does not wait for the commit.
    RunsWithoutCommit,
    /// The source takes the guest back although the record is the target's.
    ResumesAfterCommit,
    /// The source takes a lost answer for a refusal.
    ResumesOnUnknown,
    /// The target goes although nobody told it that the attempt is over.
    DiscardsUndecided,
    /// The source's handler promotes a target whose source had aborted.
    PromotesAborted,
    /// The target's handler lets the VM go although the heir has adopted it.
    RelinquishesAdopted,
    /// The handler does not care whether the last owner's QEMU has ended.
    StartsBesideLiving,
    /// The target's ledger lets an earlier attempt replace a later one.
    ExpectsAnything,
}

impl Twist {
    pub fn source(self, mut source: Source, event: source::Event) -> (Source, Vec<source::Action>) {
        use source::{Event as E, State as S};
        let wrong = matches!(
            (self, &source.state, &event),
            (Self::ResumesAfterCommit, S::Committed, E::PeerLost)
                | (Self::ResumesOnUnknown, S::Committing, E::Swapped(Answer::Unknown))
        );
        if !wrong {
            return source.step(event);
        }
        source.state = S::Resuming { failure: handover::Failure::PeerLost };
        (source, vec![source::Action::ResumeGuest])
    }

    pub fn target(self, mut target: Target, event: target::Event) -> (Target, Vec<target::Action>) {
        use target::{Event as E, State as S};
        match (self, &target.state, &event) {
            (Self::RunsWithoutCommit, S::Loaded, E::PeerLost) => target.step(E::PeerCommitted),
            (
                Self::DiscardsUndecided,
                S::Asking,
                E::Owner(Answer::Unknown | Answer::Refused(None)),
            ) => {
                target.state = S::Discarded { failure: handover::Failure::PeerLost };
                (target, vec![target::Action::EndQemu])
            }
            _ => target.step(event),
        }
    }

    pub fn local(
        self,
        vm: &VmId,
        current: Option<&Record>,
        qemu_of: impl Fn(&InstanceId) -> Qemu,
        swap: &Swap,
    ) -> Result<Record, Refused> {
        match self {
            Self::StartsBesideLiving => handler::local(vm, current, |_| Qemu::Ended, swap),
            Self::ExpectsAnything if matches!(swap, Swap::Expect { .. }) => {
                handler::local(vm, None, qemu_of, swap)
            }
            _ => handler::local(vm, current, qemu_of, swap),
        }
    }

    pub fn peer(
        self,
        vm: &VmId,
        current: Option<&Record>,
        asker: &HostId,
        qemu_of: impl Fn(&InstanceId) -> Qemu,
        swap: &Swap,
    ) -> Result<Record, Refused> {
        let honest = handler::peer(vm, current, asker, qemu_of, swap);
        match (self, swap, current) {
            (Self::PromotesAborted, Swap::Abort { epoch, attempt }, Some(now))
                if now.epoch > *epoch =>
            {
                let to = handover::record::Move {
                    attempt: attempt.clone(),
                    heir: "b1".into(),
                    peer: asker.clone(),
                };
                let state = RecordState::Committed(to);
                Ok(Record { epoch: *epoch, state, ..now.clone() })
            }
            (Self::RelinquishesAdopted, Swap::Relinquish { .. }, Some(now)) if honest.is_err() => {
                Ok(now.clone())
            }
            _ => honest,
        }
    }
}
