//! The source's half of a move. Pure: `step` takes an event and returns what to do.
//!
//! ```text
//! Preparing -> Seeding -> Arming -> Converging -> Paused -> Loading -> Committing -> Committed -> Released
//!     |           |          |          |           |          |           |            |
//!     +-----------+          +----------+-----------+----------+-----------+            | the heir gave it back
//!           |                                       |  Abort                            v
//!           |                                    Aborting ------> Resuming <------ HandingBack
//!           v                                       |                |
//!         Ended <-----------------------------------+----------------+
//! ```
//!
//! Until `Loading` the target has not got all of the memory and can never run,
//! so the guest is resumed at once when something fails. From `Loading` on it
//! is resumed only when an abort was acknowledged by the ledger.

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
}

impl Source {
    /// An attempt that begins.
    pub fn new(parties: Parties) -> Self {
        Self { parties, state: State::Preparing, qemu_ended: false, peer_lost: false }
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
            _ => {}
        }
        match (self.state.clone(), event) {
            (S::Preparing, E::PeerPrepared) => self.go(S::Seeding, [Action::StartSeeding]),
            (S::Seeding, E::DeltaFits) => self.go(S::Arming, [Action::Swap(self.arm())]),
            (S::Arming, E::Swapped(Answer::Done(record))) if self.is_open(&record) => {
                self.go(S::Converging, [Action::StartMemory])
            }
            (S::Converging, E::GuestPaused) => self.go(S::Paused, [Action::SendLastDelta]),
            (S::Paused, E::LastDeltaSafe) => self.go(S::Loading, [Action::FinishMemory]),
            (S::Loading, E::PeerLoaded) => self.go(S::Committing, [Action::Swap(self.commit())]),
            (S::Committing, E::Swapped(answer)) => self.committed(answer),
            (S::Committed, E::PeerRunning) => self.release(),
            (S::Committed, E::PeerGaveBack(failure)) => self.hand_back(failure),
            (S::Committed, E::PeerLost) => self.go(S::Committed, [self.relinquish()]),
            (S::Committed, E::Relinquished(answer)) => self.relinquished(answer),
            (S::HandingBack { failure }, E::Swapped(answer)) => match answer {
                Answer::Done(record) if self.is_ours(&record) => self.resume(failure),
                Answer::Done(_) => vec![],
                // Only a forced start refuses it: then the VM is that launcher's.
                Answer::Refused(_) => self.go(S::Ended { failure }, [Action::EndQemu]),
                Answer::Unknown => self.hand_back(failure),
            },
            (S::Aborting { stopped, failure }, E::Swapped(answer)) => {
                self.aborted(stopped, failure, answer)
            }
            (S::Resuming { failure }, E::GuestResumed | E::QemuEnded) => {
                self.go(S::Ended { failure }, [])
            }
            (state, event) => match failure_of(event) {
                Some(failure) => self.fail(state, failure),
                None => vec![],
            },
        }
    }

    fn go<const N: usize>(&mut self, state: State, actions: [Action; N]) -> Vec<Action> {
        self.state = state;
        actions.into()
    }

    /// Something failed while nothing is decided.
    fn fail(&mut self, state: State, failure: Failure) -> Vec<Action> {
        use State as S;
        match state {
            S::Preparing | S::Seeding => {
                let tell = Action::SendAborted(failure.clone());
                self.go(S::Ended { failure }, [tell])
            }
            S::Arming => self.abort(false, failure, []),
            S::Converging | S::Paused => self.abort(false, failure, [Action::CancelMemory]),
            // QEMU's end is survived if the target has got everything.
            S::Loading if failure == Failure::QemuEnded => vec![],
            S::Loading => self.abort(true, failure, []),
            // The commit may be written. An abort that is acknowledged settles it.
            S::Committing if failure == Failure::PeerLost => self.abort(true, failure, []),
            _ => vec![],
        }
    }

    fn abort<const N: usize>(
        &mut self,
        stopped: bool,
        failure: Failure,
        first: [Action; N],
    ) -> Vec<Action> {
        let mut actions: Vec<Action> = first.into();
        actions.push(Action::Swap(Swap::Abort {
            epoch: self.parties.epoch,
            attempt: self.parties.to.attempt.clone(),
        }));
        self.state = State::Aborting { stopped, failure };
        actions
    }

    fn aborted(&mut self, stopped: bool, failure: Failure, answer: Answer) -> Vec<Action> {
        match answer {
            Answer::Unknown => self.abort(stopped, failure, []),
            Answer::Refused(Some(record)) if self.verdict(&record) == Verdict::Committed => {
                self.decided()
            }
            // The record is another launcher's: it took the VM by force.
            Answer::Refused(_) => self.go(State::Ended { failure }, [Action::EndQemu]),
            // N.B. an answer to an earlier swap may come first: only the record's words count.
            Answer::Done(record) => match self.verdict(&record) {
                Verdict::Committed => self.decided(),
                Verdict::Aborted => self.back(stopped, failure, &record),
                Verdict::Open => vec![],
            },
        }
    }

    /// The attempt will never be committed, by the word of `record`.
    fn back(&mut self, stopped: bool, failure: Failure, record: &Record) -> Vec<Action> {
        let tell = Action::SendAborted(failure.clone());
        if record.owner != self.parties.owner {
            // Somebody started the VM elsewhere with a later epoch.
            return self.go(State::Ended { failure }, [tell, Action::EndQemu]);
        }
        if !stopped {
            return self.go(State::Ended { failure }, [tell]);
        }
        let mut actions = vec![tell];
        actions.extend(self.resume(failure));
        actions
    }

    fn resume(&mut self, failure: Failure) -> Vec<Action> {
        match self.qemu_ended {
            true => self.go(State::Ended { failure }, []),
            false => self.go(State::Resuming { failure }, [Action::ResumeGuest]),
        }
    }

    fn committed(&mut self, answer: Answer) -> Vec<Action> {
        match answer {
            Answer::Done(record) => match self.verdict(&record) {
                Verdict::Committed => self.decided(),
                Verdict::Aborted | Verdict::Open => vec![],
            },
            Answer::Refused(Some(record)) => {
                let failure = Failure::Other("the target had the attempt aborted".into());
                self.back(true, failure, &record)
            }
            Answer::Refused(None) | Answer::Unknown => {
                self.go(State::Committing, [Action::Swap(self.commit())])
            }
        }
    }

    /// THE point of no return lies behind: the record is committed.
    fn decided(&mut self) -> Vec<Action> {
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
            // The heir has adopted it: it runs, or is its to start again.
            Answer::Refused(Some(record)) if record.epoch > self.parties.epoch => self.release(),
            Answer::Refused(_) | Answer::Unknown => self.go(State::Committed, [self.relinquish()]),
        }
    }

    fn hand_back(&mut self, failure: Failure) -> Vec<Action> {
        let swap = Swap::HandBack {
            epoch: self.parties.epoch,
            owner: self.parties.owner.clone(),
            attempt: self.parties.to.attempt.clone(),
        };
        self.go(State::HandingBack { failure }, [Action::Swap(swap)])
    }

    fn verdict(&self, record: &Record) -> Verdict {
        record.verdict(self.parties.epoch, &self.parties.to.attempt)
    }

    fn is_open(&self, record: &Record) -> bool {
        self.verdict(record) == Verdict::Open && record.state != record::State::Idle
    }

    fn is_ours(&self, record: &Record) -> bool {
        record.owner == self.parties.owner && record.state == record::State::Idle
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

    /// What this state waits for. N.B. where nothing was decided yet the
    /// deadline's end is a [`Event::Failed`]; where the ledger decides it only
    /// makes the doubt visible.
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
            State::Resuming { .. } => Waiting::for_peer("the guest to run again here"),
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

fn failure_of(event: Event) -> Option<Failure> {
    match event {
        Event::Failed(failure) | Event::PeerGaveBack(failure) => Some(failure),
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
