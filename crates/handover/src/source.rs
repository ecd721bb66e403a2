//! The source's half of a move. Pure: `step` takes an event and returns what to do.
//!
//! ```text
//! Preparing -> Seeding -> Arming -> Converging -> Paused -> Loading -> Committing -> Committed -> Released
//!     |           |          |          |           |          |           |            |
//!     +-----------+----------+----------+-----------+----------+-----------+            | the heir gave it back
//!                                       |                                               v
//!                                   Aborting ----------> Resuming <---------------- HandingBack
//!                                       |                    |
//!         Ended <-----------------------+--------------------+
//! ```
//!
//! Until `Loading` the target has not got all of the memory and can never run,
//! so the guest runs on, or is resumed at once, when something fails. From
//! `Loading` on it is resumed only when an abort was acknowledged by the ledger.

use crate::record::{self, Epoch, HostId, InstanceId, Move, Record, Swap, Verdict};
use crate::{Failure, Waiting};

/// Who takes part: fixed for the attempt.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Parties {
    /// The source's epoch.
    pub epoch: Epoch,
    /// The source.
    pub owner: InstanceId,
    /// The source's host.
    pub host: HostId,
    /// The attempt, the heir and its host.
    pub to: Move,
}

/// Where the attempt stands.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum State {
    /// Waiting for the target to be prepared.
    Preparing,
    /// The disks' first rounds.
    Seeding,
    /// The record is being armed.
    Arming,
    /// Memory and disk rounds flow; the guest runs.
    Converging,
    /// The guest stands at QEMU's pre-switchover; the last delta flows.
    Paused,
    /// The rest of the memory flows; the target may be complete at any moment.
    Loading,
    /// The commit is on its way to the ledger.
    Committing,
    /// The guest is the target's.
    Committed,
    /// The target runs it: this side is done.
    Released,
    /// The abort is on its way to the ledger.
    Aborting {
        /// Whether the guest stands still until the abort is acknowledged.
        stopped: bool,
        /// Why.
        failure: Failure,
    },
    /// The heir has given the VM back; that is on its way to the ledger.
    HandingBack {
        /// Why it did.
        failure: Failure,
    },
    /// The guest is being resumed.
    Resuming {
        /// Why the move failed.
        failure: Failure,
    },
    /// The guest is this side's, and the move is over.
    Ended {
        /// Why it failed.
        failure: Failure,
    },
}

/// What the shell tells.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Event {
    /// The target is ready to receive.
    PeerPrepared,
    /// The disks' delta fits the pause.
    DeltaFits,
    /// The ledger answered the last swap.
    Swapped(Answer),
    /// QEMU stopped the guest at pre-switchover.
    GuestPaused,
    /// The last delta is on the target's stable storage.
    LastDeltaSafe,
    /// The target says that it has everything.
    PeerLoaded,
    /// The target says that it runs the guest.
    PeerRunning,
    /// The target says that it gave the VM back, and that its ledger has it so.
    PeerGaveBack(Failure),
    /// The target's ledger answered a Relinquish.
    Relinquished(Answer),
    /// The control stream is lost for good.
    PeerLost,
    /// Something failed here or there, or a deadline passed.
    Failed(Failure),
    /// The user wants the move to end.
    Cancel,
    /// The guest runs again.
    GuestResumed,
    /// This side's QEMU ended.
    QemuEnded,
}

/// What a ledger made of a swap.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Answer {
    /// It is written, now or before.
    Done(Record),
    /// It does not fit what is written.
    Refused(Option<Record>),
    /// Nobody knows whether it was or will be written.
    Unknown,
}

/// What the shell is to do, in order.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Action {
    /// Begin the disks' rounds.
    StartSeeding,
    /// Begin the memory.
    StartMemory,
    /// Send the last delta.
    SendLastDelta,
    /// Let QEMU send the rest of the memory.
    FinishMemory,
    /// End the memory migration; QEMU resumes the guest if it had stopped it.
    CancelMemory,
    /// Ask this host's ledger; answered by [`Event::Swapped`].
    Swap(Swap),
    /// Ask the target's ledger; answered by [`Event::Relinquished`].
    AskPeer(Swap),
    /// Tell the target that the guest is its.
    SendCommit,
    /// Tell the target that the attempt is over and will never be committed.
    SendAborted(Failure),
    /// Let the guest run again here, whatever state QEMU is in.
    ResumeGuest,
    /// End QEMU: the guest lives elsewhere.
    EndQemu,
    /// Mark the disks that were copied.
    MarkSuperseded,
}

/// The source's half.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Source {
    /// Who takes part.
    pub parties: Parties,
    /// Where the attempt stands.
    pub state: State,
    /// This side's QEMU has ended by itself.
    pub qemu_ended: bool,
    /// The control stream is gone: what is sent does not arrive.
    pub peer_lost: bool,
    /// The target gave the guest back, perhaps before this side knew that it was committed.
    pub given_back: bool,
}

impl Source {
    /// An attempt that begins.
    pub fn new(parties: Parties) -> Self {
        Self {
            parties,
            state: State::Preparing,
            qemu_ended: false,
            peer_lost: false,
            given_back: false,
        }
    }

    /// The next state, and what to do.
    pub fn step(mut self, event: Event) -> (Self, Vec<Action>) {
        let actions = self.react(event);
        (self, actions)
    }

    fn react(&mut self, event: Event) -> Vec<Action> {
        use {Event as E, State as S};
        match &event {
            E::QemuEnded => self.qemu_ended = true,
            E::PeerLost => self.peer_lost = true,
            E::PeerGaveBack(_) => self.given_back = true,
            _ => {}
        }
        match (self.state.clone(), event) {
            (S::Preparing, E::PeerPrepared) => self.go(S::Seeding, [Action::StartSeeding]),
            (S::Seeding, E::DeltaFits) => self.go(S::Arming, [Action::Swap(self.arm())]),
            (S::Arming, E::Swapped(Answer::Done(record))) if self.is_armed(&record) => {
                self.go(S::Converging, [Action::StartMemory])
            }
            (S::Converging, E::GuestPaused) => self.go(S::Paused, [Action::SendLastDelta]),
            (S::Paused, E::LastDeltaSafe) => self.go(S::Loading, [Action::FinishMemory]),
            (S::Loading, E::PeerLoaded) => self.go(S::Committing, [Action::Swap(self.commit())]),

            // It runs only what was committed to it, whatever this side has heard of that.
            (
                S::Loading | S::Committing | S::Aborting { stopped: true, .. } | S::Committed,
                E::PeerRunning,
            ) => self.release(),
            (S::Committed, E::PeerGaveBack(failure)) => self.hand_back(failure),
            // N.B. also when the target takes too long: then its ledger says who is to run it.
            (S::Committed, E::PeerLost | E::Failed(_)) => vec![self.relinquish()],
            (S::Committed, E::Relinquished(answer)) => self.relinquished(answer),

            (S::Committing, E::Swapped(answer)) => {
                let failure = Failure::Other("the target had the attempt aborted".into());
                self.settle(failure, true, answer)
            }
            (S::Aborting { stopped, failure }, E::Swapped(answer)) => {
                self.settle(failure, stopped, answer)
            }
            (S::HandingBack { failure }, E::Swapped(answer)) => self.settle(failure, true, answer),
            (S::Resuming { failure }, E::GuestResumed | E::QemuEnded) => {
                self.go(S::Ended { failure }, [])
            }
            (state, event) => self.fail(state, event),
        }
    }

    fn go<const N: usize>(&mut self, state: State, actions: [Action; N]) -> Vec<Action> {
        self.state = state;
        actions.into()
    }

    /// Something failed while nothing is decided.
    fn fail(&mut self, state: State, event: Event) -> Vec<Action> {
        use {Event as E, State as S};
        let Some(failure) = failure_of(&event) else { return vec![] };
        match (state, event) {
            (S::Arming, _) => self.abort(false, failure, []),
            // The answer to a swap that no longer matters.
            (_, E::Swapped(_)) => vec![],
            // N.B. an abort takes the next epoch also where nothing was armed: so each
            // attempt has an epoch of its own, by which the target's ledger tells them apart.
            (S::Preparing | S::Seeding, _) => self.abort(false, failure, []),
            (S::Converging | S::Paused, _) => self.abort(false, failure, [Action::CancelMemory]),
            // The target may have got everything: then the guest survives its source.
            (S::Loading, E::QemuEnded) => vec![],
            // N.B. the record stays armed, for the target to ask and to be given the guest.
            (S::Loading, E::PeerLost) if self.qemu_ended => self.go(S::Ended { failure }, []),
            (S::Loading, _) => self.abort(true, failure, []),
            // The commit may be written. An abort that is acknowledged settles it.
            (S::Committing, E::PeerLost) if !self.qemu_ended => self.abort(true, failure, []),
            _ => vec![],
        }
    }

    fn abort<const N: usize>(
        &mut self,
        stopped: bool,
        failure: Failure,
        first: [Action; N],
    ) -> Vec<Action> {
        self.state = State::Aborting { stopped, failure };
        let mut actions: Vec<Action> = first.into();
        actions.extend(self.ask_again());
        actions
    }

    /// Acts on what the own ledger says of the attempt. N.B. an answer to an
    /// earlier swap may come late: only the record's words count, not which
    /// swap was meant.
    fn settle(&mut self, failure: Failure, stopped: bool, answer: Answer) -> Vec<Action> {
        let (record, refused) = match answer {
            Answer::Done(record) => (record, false),
            Answer::Refused(Some(record)) => (record, true),
            Answer::Refused(None) | Answer::Unknown => return self.ask_again(),
        };
        match (self.verdict(&record), &self.state) {
            (Verdict::Committed | Verdict::Adopted, State::Committing | State::Aborting { .. }) => {
                self.decided()
            }
            // N.B. when handing back this is old news, the heir's word is newer.
            (Verdict::Committed | Verdict::Adopted | Verdict::Open, _) => {
                if refused {
                    self.ask_again()
                } else {
                    vec![]
                }
            }
            (Verdict::GivenBack, _) => self.hand_back(failure),
            (Verdict::Over, _) => {
                let mut actions = vec![Action::SendAborted(failure.clone())];
                actions.extend(self.resume(stopped, failure));
                actions
            }
            (Verdict::Taken, _) => {
                let tell = Action::SendAborted(failure.clone());
                self.go(State::Ended { failure }, [tell, Action::EndQemu])
            }
        }
    }

    /// The swap whose outcome is waited for, once more.
    fn ask_again(&self) -> Vec<Action> {
        let attempt = self.parties.to.attempt.clone();
        let Parties { epoch, owner, .. } = self.parties.clone();
        match self.state {
            State::Committing => vec![Action::Swap(self.commit())],
            State::Aborting { .. } => vec![Action::Swap(Swap::Abort { epoch, attempt })],
            State::HandingBack { .. } => {
                vec![Action::Swap(Swap::HandBack { epoch, owner, attempt })]
            }
            _ => vec![],
        }
    }

    fn resume(&mut self, stopped: bool, failure: Failure) -> Vec<Action> {
        match stopped && !self.qemu_ended {
            true => self.go(State::Resuming { failure }, [Action::ResumeGuest]),
            false => self.go(State::Ended { failure }, []),
        }
    }

    /// THE point of no return lies behind: the record is committed.
    fn decided(&mut self) -> Vec<Action> {
        if self.given_back {
            return self.hand_back(Failure::Other("the target gave the guest back".into()));
        }
        let mut actions = self.go(State::Committed, [Action::SendCommit]);
        if self.peer_lost {
            actions.push(self.relinquish());
        }
        actions
    }

    fn release(&mut self) -> Vec<Action> {
        self.go(State::Released, [Action::EndQemu, Action::MarkSuperseded])
    }

    fn relinquished(&mut self, answer: Answer) -> Vec<Action> {
        match answer {
            // The target's ledger promises that the heir will never run it.
            Answer::Done(_) => self.hand_back(Failure::PeerLost),
            Answer::Refused(Some(record)) => match self.verdict(&record) {
                // The heir has adopted it: it runs, or is its to start again.
                Verdict::Adopted | Verdict::Taken => self.release(),
                // A start of the VM took it back for this launcher.
                Verdict::GivenBack | Verdict::Over => self.hand_back(Failure::PeerLost),
                Verdict::Committed | Verdict::Open => vec![self.relinquish()],
            },
            Answer::Refused(None) | Answer::Unknown => vec![self.relinquish()],
        }
    }

    fn hand_back(&mut self, failure: Failure) -> Vec<Action> {
        self.state = State::HandingBack { failure };
        self.ask_again()
    }

    fn verdict(&self, record: &Record) -> Verdict {
        record.verdict(self.parties.epoch, &self.parties.owner, &self.parties.to)
    }

    fn is_armed(&self, record: &Record) -> bool {
        record.epoch == self.parties.epoch
            && record.state == record::State::Armed(self.parties.to.clone())
    }

    fn arm(&self) -> Swap {
        let Parties { epoch, owner, to, .. } = self.parties.clone();
        Swap::Arm { epoch, owner, to }
    }

    fn commit(&self) -> Swap {
        Swap::Commit { epoch: self.parties.epoch, attempt: self.parties.to.attempt.clone() }
    }

    fn relinquish(&self) -> Action {
        Action::AskPeer(Swap::Relinquish {
            epoch: self.parties.epoch,
            source: self.parties.owner.clone(),
            attempt: self.parties.to.attempt.clone(),
            peer: self.parties.host.clone(),
            adopted: None,
            has_guest: !self.qemu_ended,
        })
    }

    /// Whether a cancel would still be heard, else why not.
    ///
    /// # Errors
    /// The reason for a person.
    pub fn can_cancel(&self) -> Result<(), &'static str> {
        match self.state {
            State::Committing => {
                Err("the switchover is being committed: it can no longer be cancelled")
            }
            State::Committed | State::Released => {
                Err("the guest already belongs to the target; move it back instead")
            }
            _ => Ok(()),
        }
    }

    /// What this state waits for. The deadline's end is a [`Event::Failed`]; where
    /// a ledger decides it has no effect but to make the doubt visible.
    pub fn waiting(&self) -> Option<Waiting> {
        Some(match self.state {
            State::Preparing => Waiting::for_peer("the target to be prepared"),
            State::Seeding => Waiting::for_data("the disks to be copied"),
            State::Arming => Waiting::for_ledger("this host's ledger to arm the owner record"),
            State::Converging => Waiting::for_data("the memory to be copied"),
            State::Paused => Waiting::for_pause("the last delta to be safe at the target"),
            State::Loading => Waiting::for_pause("the target to load the guest"),
            State::Committing => Waiting::for_ledger("this host's ledger to commit the move"),
            State::Committed => Waiting::for_decision("the target to run the guest"),
            State::Aborting { .. } => Waiting::for_ledger("this host's ledger to abort the move"),
            State::HandingBack { .. } => {
                Waiting::for_ledger("this host's ledger to take the VM back")
            }
            State::Resuming { .. } => Waiting::for_decision("QEMU to run the guest again here"),
            State::Released | State::Ended { .. } => return None,
        })
    }

    /// The state's name.
    pub fn phase(&self) -> &'static str {
        match self.state {
            State::Preparing => "Preparing",
            State::Seeding => "Seeding",
            State::Arming => "Arming",
            State::Converging => "Converging",
            State::Paused => "Paused",
            State::Loading => "Loading",
            State::Committing => "Committing",
            State::Committed => "Committed",
            State::Released => "Released",
            State::Aborting { .. } => "Aborting",
            State::HandingBack { .. } => "HandingBack",
            State::Resuming { .. } => "Resuming",
            State::Ended { .. } => "Ended",
        }
    }
}

fn failure_of(event: &Event) -> Option<Failure> {
    match event {
        Event::Failed(failure) | Event::PeerGaveBack(failure) => Some(failure.clone()),
        Event::Cancel => Some(Failure::Cancelled),
        Event::PeerLost => Some(Failure::PeerLost),
        Event::QemuEnded => Some(Failure::QemuEnded),
        Event::Swapped(Answer::Refused(record)) => Some(Failure::Other(match record {
            Some(record) => format!("the owner record says that {record}"),
            None => "this host's ledger does not know the VM".into(),
        })),
        Event::Swapped(Answer::Unknown) => {
            Some(Failure::Other("this host's ledger did not answer".into()))
        }
        _ => None,
    }
}
