//! Deliberate mistakes, each between the crate's functions and the world: the
//! model must find every one of them.

use crate::world::{Ask, vm};
use handover::handler::{self, Qemu};
use handover::record::{
    HostId, InstanceId, Move, Record, Refused, State as RecordState, Swap, VmId,
};
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
    /// The other cluster's record lets a guest go of whose heir nothing is written down.
    RecallsFromLiving,
    /// Nobody asks for a guest that has left and has not come.
    NeverRecalls,
    /// A target that has lost its source asks nobody.
    WaitsForEver,
    /// Who asked the other cluster's record takes no answer for a refusal.
    UnknownIsRefused,
    /// Who asked the record of a cluster that is not believed any more takes that for a grant.
    RevokedIsGranted,
    /// An heir gives a guest back after the other cluster was told that it has come.
    GivesBackWhatCame,
    /// A start takes a VM whose guest has left meanwhile.
    StartsAstray,
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
            (Self::WaitsForEver, S::Loaded, E::PeerLost | E::Failed(_)) => (target, vec![]),
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
            Self::StartsAstray if matches!(swap, Swap::Start { .. }) => {
                let idle = current.cloned().map(|now| match now.state {
                    RecordState::Committed(_) => Record { state: RecordState::Idle, ..now },
                    _ => now,
                });
                handler::local(vm, idle.as_ref(), qemu_of, swap)
            }
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
        if self == Self::RecallsFromLiving && matches!(swap, Swap::Relinquish { .. }) {
            return handler::peer(vm, current, asker, |_| Qemu::Ended, swap);
        }
        let honest = handler::peer(vm, current, asker, qemu_of, swap);
        match (self, swap, current) {
            (Self::PromotesAborted, Swap::Abort { epoch, attempt }, Some(now))
                if now.epoch > *epoch =>
            {
                let (attempt, peer) = (attempt.clone(), asker.clone());
                let to = Move { attempt, heir: "b1".into(), peer };
                let state = RecordState::Committed(to);
                Ok(Record { epoch: *epoch, state, ..now.clone() })
            }
            (Self::RelinquishesAdopted, Swap::Relinquish { .. }, Some(now)) if honest.is_err() => {
                Ok(now.clone())
            }
            _ => honest,
        }
    }

    /// What who asked makes of an answer from the other end.
    pub fn heard(self, ask: &Ask, revoked: bool, answer: Answer) -> Answer {
        let (Some(asker), Answer::Unknown) = (ask.as_peer, &answer) else { return answer };
        let (epoch, source, attempt) = match &ask.swap {
            Swap::Relinquish { epoch, source, attempt, .. } => (epoch + 1, source.clone(), attempt),
            Swap::Abort { epoch, attempt } => (epoch + 1, "somebody".into(), attempt),
            _ => return answer,
        };
        let record = |owner, state| Record { vm: vm(), epoch, owner, state };
        match self {
            Self::UnknownIsRefused => {
                Answer::Refused(Some(record("somebody".into(), RecordState::Idle)))
            }
            Self::RevokedIsGranted if revoked => {
                let (attempt, peer) = (attempt.clone(), asker.name().into());
                let of = Move { attempt, heir: "somebody".into(), peer };
                Answer::Done(record(source, RecordState::Returned(of)))
            }
            _ => answer,
        }
    }
}
