//! The target's half of a move. Pure: `step` takes an event and returns what to do.
//!
//! ```text
//! Receiving -> Loaded -> Adopting -> Activating -> Running
//!     |          |  ^        |           | `cont` refused
//!     |   lost   v  |        |           v
//!     |         Asking       |       Withdrawing
//!     |          |   |       | refused   | QEMU ended
//!     v          |   |       v           v
//! Discarded <----+   +---> GivingBack <--+
//!          aborted             |
//!                              +-----> GaveBack
//! ```
//!
//! Before it has said Loaded the target may go at any time: nothing can have
//! been committed to it. After that it goes only on the word of a ledger, and
//! runs only on the word of its own.
//!
//! N.B. before the target says that it is prepared, its own ledger has to
//! acknowledge [`Parties::expect`].

use crate::record::{self, AttemptId, Epoch, HostId, InstanceId, Move, Record, Swap, Verdict};
use crate::source::Answer;
use crate::{Failure, Waiting};

/// Who takes part: fixed for the attempt.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Parties {
    /// The source's epoch.
    pub epoch: Epoch,
    /// This launcher.
    pub heir: InstanceId,
    /// The source.
    pub source: InstanceId,
    /// The attempt.
    pub attempt: AttemptId,
    /// The source's host.
    pub peer: HostId,
}

impl Parties {
    /// Has the own ledger expect the VM. It must be acknowledged before the
    /// target says that it is prepared.
    pub fn expect(&self) -> Swap {
        let Self { epoch, source, .. } = self.clone();
        Swap::Expect { epoch, source, from: self.from() }
    }

    fn from(&self) -> Move {
        let Self { attempt, heir, peer, .. } = self.clone();
        Move { attempt, heir, peer }
    }
}

/// Where the attempt stands.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum State {
    /// Disks and memory arrive.
    Receiving,
    /// Everything is here and safe; the guest stands.
    Loaded,
    /// The source is silent: its ledger is being asked.
    Asking,
    /// The guest is this side's, and this is on its way to the own ledger.
    Adopting,
    /// QEMU is told to run the guest.
    Activating,
    /// The guest runs here.
    Running,
    /// QEMU refused to run the guest and is being ended, before that is told to anybody.
    Withdrawing {
        /// Why.
        failure: Failure,
    },
    /// The guest never ran here, and this is on its way to the own ledger.
    GivingBack {
        /// Why.
        failure: Failure,
        /// Whether the own ledger may have adopted it.
        adopted: bool,
    },
    /// The own ledger has it: the guest is the source's again.
    GaveBack {
        /// Why.
        failure: Failure,
    },
    /// The attempt is over and was never committed.
    Discarded {
        /// Why.
        failure: Failure,
    },
}

/// What the shell tells.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Event {
    /// QEMU here says that all memory is in. The disks are: the source lets
    /// QEMU finish only after the last delta was acknowledged.
    MemoryLoaded,
    /// The source says that the guest is this side's.
    PeerCommitted,
    /// The source says that the attempt is over.
    PeerAborted(Failure),
    /// The control stream is lost for good.
    PeerLost,
    /// What the source's ledger says of the attempt, asked or aborted.
    Owner(Answer),
    /// The own ledger answered the last swap.
    Swapped(Answer),
    /// QEMU runs the guest.
    GuestRunning,
    /// QEMU refused to run the guest, before its first instruction.
    ActivateFailed(String),
    /// Something failed here, or a deadline passed.
    Failed(Failure),
    /// QEMU here ended.
    QemuEnded,
}

/// What the shell is to do, in order.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Action {
    /// Tell the source that everything is here.
    SendLoaded,
    /// Tell the source that the guest runs here.
    SendRunning,
    /// Tell the source that something failed here.
    SendFailed(Failure),
    /// Tell the source that the guest is its again.
    SendGaveBack(Failure),
    /// Ask the source's ledger by this swap; answered by [`Event::Owner`].
    AskOwner(Swap),
    /// Ask this host's ledger; answered by [`Event::Swapped`].
    Swap(Swap),
    /// Have QEMU take the disks' locks and run the guest.
    Activate,
    /// Announce the guest's addresses to the network.
    Announce,
    /// End QEMU; its end comes as [`Event::QemuEnded`].
    EndQemu,
}

/// The target's half.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Target {
    /// Who takes part.
    pub parties: Parties,
    /// Where the attempt stands.
    pub state: State,
}

impl Target {
    /// An attempt that was prepared.
    pub fn new(parties: Parties) -> Self {
        Self { parties, state: State::Receiving }
    }

    /// The next state, and what to do.
    pub fn step(mut self, event: Event) -> (Self, Vec<Action>) {
        let actions = self.react(event);
        (self, actions)
    }

    fn react(&mut self, event: Event) -> Vec<Action> {
        use {Event as E, State as S};
        match (self.state.clone(), event) {
            (S::Receiving, E::MemoryLoaded) => self.go(S::Loaded, [Action::SendLoaded]),
            (S::Receiving, E::PeerAborted(failure)) => self.discard(failure),
            (S::Receiving, E::PeerLost) => self.discard(Failure::PeerLost),
            (S::Receiving, E::Failed(failure)) => self.quit(failure),
            (S::Receiving, E::QemuEnded) => self.quit(Failure::QemuEnded),

            (S::Loaded | S::Asking, E::PeerCommitted) => self.adopt(),
            (S::Loaded | S::Asking, E::PeerAborted(failure)) => self.discard(failure),
            // N.B. asking is aborting: who asks and may not discard learns nothing that helps.
            (S::Loaded, E::PeerLost | E::Failed(_)) => self.go(S::Asking, [self.ask()]),
            // QEMU is gone, and the guest's memory with it: see that nobody counts on it.
            (S::Loaded | S::Asking, E::QemuEnded) => self.give_back(Failure::QemuEnded, false),
            (S::Asking, E::Owner(answer)) => self.judged(answer),

            (S::Adopting, E::Swapped(answer)) => match answer {
                Answer::Done(record) if self.is_ours(&record) => {
                    self.go(S::Activating, [Action::Activate])
                }
                Answer::Done(_) => vec![],
                Answer::Unknown => self.adopt(),
                Answer::Refused(record) => self.refused(record),
            },
            (S::Adopting, E::QemuEnded) => self.give_back(Failure::QemuEnded, true),

            (S::Activating, E::GuestRunning) => {
                self.go(S::Running, [Action::Announce, Action::SendRunning])
            }
            (S::Activating, E::ActivateFailed(why)) => {
                self.go(S::Withdrawing { failure: Failure::Other(why) }, [Action::EndQemu])
            }
            (S::Withdrawing { failure }, E::QemuEnded) => self.give_back(failure, true),
            // It may have run: it is this side's, and a start from its disk is a start here.
            (S::Activating, E::QemuEnded) => self.go(S::Running, [Action::SendRunning]),
            // The message may have been lost.
            (S::Running, E::PeerCommitted) => self.go(S::Running, [Action::SendRunning]),

            (S::GivingBack { failure, adopted }, E::Swapped(answer)) => {
                self.given_back(failure, adopted, answer)
            }
            (S::GaveBack { failure }, E::PeerCommitted) => {
                let tell = Action::SendGaveBack(failure.clone());
                self.go(S::GaveBack { failure }, [tell])
            }
            _ => vec![],
        }
    }

    fn go<const N: usize>(&mut self, state: State, actions: [Action; N]) -> Vec<Action> {
        self.state = state;
        actions.into()
    }

    fn discard(&mut self, failure: Failure) -> Vec<Action> {
        self.go(State::Discarded { failure }, [Action::EndQemu])
    }

    /// Goes by itself, and says so.
    fn quit(&mut self, failure: Failure) -> Vec<Action> {
        let tell = Action::SendFailed(failure.clone());
        self.go(State::Discarded { failure }, [tell, Action::EndQemu])
    }

    fn adopt(&mut self) -> Vec<Action> {
        let Parties { epoch, heir, .. } = self.parties.clone();
        self.go(State::Adopting, [Action::Swap(Swap::Adopt { epoch, instance: heir })])
    }

    fn ask(&self) -> Action {
        let Parties { epoch, attempt, .. } = self.parties.clone();
        Action::AskOwner(Swap::Abort { epoch, attempt })
    }

    /// The source's ledger has spoken.
    fn judged(&mut self, answer: Answer) -> Vec<Action> {
        let record = match answer {
            Answer::Done(record) | Answer::Refused(Some(record)) => record,
            // Not found, or no answer: stay stopped and ask again.
            Answer::Refused(None) | Answer::Unknown => {
                return self.go(State::Asking, [self.ask()]);
            }
        };
        match record.verdict(self.parties.epoch, &self.parties.source, &self.parties.from()) {
            Verdict::Committed | Verdict::Adopted => self.adopt(),
            Verdict::Over | Verdict::Taken | Verdict::GivenBack => self.discard(Failure::PeerLost),
            Verdict::Open => self.go(State::Asking, [self.ask()]),
        }
    }

    /// The own ledger does not let this launcher run the VM.
    fn refused(&mut self, record: Option<Record>) -> Vec<Action> {
        let why = match record {
            Some(record) => format!("the target's owner record says that {record}"),
            None => "the target's ledger refuses the VM".into(),
        };
        let mut actions = vec![Action::EndQemu];
        actions.extend(self.give_back(Failure::Other(why), false));
        actions
    }

    fn give_back(&mut self, failure: Failure, adopted: bool) -> Vec<Action> {
        let swap = self.relinquish(adopted);
        self.go(State::GivingBack { failure, adopted }, [Action::Swap(swap)])
    }

    fn relinquish(&self, adopted: bool) -> Swap {
        let Parties { epoch, heir, source, attempt, peer } = self.parties.clone();
        let adopted = adopted.then_some(heir);
        // What matters to an heir that lives does not matter to the heir itself.
        Swap::Relinquish { epoch, source, attempt, peer, adopted, has_guest: true }
    }

    fn given_back(&mut self, failure: Failure, adopted: bool, answer: Answer) -> Vec<Action> {
        let record = match answer {
            Answer::Unknown => return self.give_back(failure, adopted),
            // N.B. an answer to the adoption may come late.
            Answer::Done(record) if self.is_ours(&record) => return vec![],
            Answer::Done(record) => Some(record),
            Answer::Refused(record) => record,
        };
        let of = self.parties.from();
        match record.map(|r| r.verdict(self.parties.epoch, &self.parties.source, &of)) {
            Some(Verdict::GivenBack | Verdict::Over) => {
                let tell = Action::SendGaveBack(failure.clone());
                self.go(State::GaveBack { failure }, [tell])
            }
            // Another launcher took it, by force: that is between it and the source.
            _ => self.go(State::Discarded { failure }, []),
        }
    }

    fn is_ours(&self, record: &Record) -> bool {
        record.epoch == self.parties.epoch + 1
            && record.owner == self.parties.heir
            && record.state == record::State::Idle
    }

    /// What this state waits for. N.B. in `Receiving` the deadline's end is a
    /// [`Event::Failed`]; afterwards it only makes the doubt visible.
    pub fn waiting(&self) -> Option<Waiting> {
        Some(match self.state {
            State::Receiving => Waiting::for_data("disks and memory to arrive"),
            State::Loaded => Waiting::for_decision("the source to commit the move"),
            State::Asking => Waiting::for_decision("the source's ledger to say whose the guest is"),
            State::Adopting => Waiting::for_ledger("this host's ledger to adopt the guest"),
            State::Activating => Waiting::for_decision("QEMU to run the guest"),
            State::Withdrawing { .. } => Waiting::for_peer("QEMU to end"),
            State::GivingBack { .. } => {
                Waiting::for_ledger("this host's ledger to give the guest back")
            }
            State::Running | State::GaveBack { .. } | State::Discarded { .. } => return None,
        })
    }

    /// The state's name.
    pub fn phase(&self) -> &'static str {
        match self.state {
            State::Receiving => "Receiving",
            State::Loaded => "Loaded",
            State::Asking => "Asking",
            State::Adopting => "Adopting",
            State::Activating => "Activating",
            State::Running => "Running",
            State::Withdrawing { .. } => "Withdrawing",
            State::GivingBack { .. } => "GivingBack",
            State::GaveBack { .. } => "GaveBack",
            State::Discarded { .. } => "Discarded",
        }
    }
}
