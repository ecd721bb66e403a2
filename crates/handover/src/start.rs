//! A start of a VM: takes the next epoch before its QEMU may run. Pure.
//!
//! ```text
//! Starting ------> Started
//!   |  ^  | refused
//!   |  |  +------> Refused
//!   |  |               ^ the heir has adopted it
//!   |  +-- Taking <- Recalling
//!   | it has left        ^
//!   +--------------------+
//! ```
//!
//! A VM that has left is first recalled: if both launchers of a move died
//! between the commit and the adoption, the ledger of the host to which it went
//! still grants that its heir will never run it.

use crate::record::{self, Epoch, HostId, InstanceId, Move, Record, Swap};
use crate::source::Answer;

/// Who starts.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Starter {
    /// The launcher.
    pub instance: InstanceId,
    /// Its host.
    pub host: HostId,
    /// A person insists, whatever the record says.
    pub forced: bool,
}

/// A VM that has left, as this host's tombstone has it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Gone {
    /// Its epoch here.
    pub epoch: Epoch,
    /// Its owner here.
    pub owner: InstanceId,
    /// Where it went.
    pub to: Move,
}

/// Where the start stands.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum State {
    /// The next epoch is being taken.
    Starting {
        /// The epoch that the record had.
        seen: Option<Epoch>,
    },
    /// The ledger of the host to which the VM went is being asked.
    Recalling(Gone),
    /// That ledger has let it go, and this is on its way to the own ledger.
    Taking(Gone),
    /// QEMU may run the guest.
    Started {
        /// In this epoch.
        epoch: Epoch,
    },
    /// It may not.
    Refused {
        /// Why, and what to do.
        why: String,
    },
}

/// What the shell tells.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Event {
    /// The own ledger answered.
    Swapped(Answer),
    /// The other host's ledger answered.
    Recalled(Answer),
}

/// What the shell is to do. An answer that settles nothing has the same asked
/// again: wait a little before that, and give up when the user's patience ends.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Action {
    /// Ask the own ledger; answered by [`Event::Swapped`].
    Swap(Swap),
    /// Ask that host's ledger; answered by [`Event::Recalled`].
    AskPeer(HostId, Swap),
}

/// A start.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Start {
    /// Who starts.
    pub starter: Starter,
    /// Where it stands.
    pub state: State,
}

impl Start {
    /// Begins a start, given what the record was read to say.
    pub fn begin(starter: Starter, record: Option<&Record>) -> (Self, Vec<Action>) {
        let seen = record.map(|r| r.epoch);
        let mut start = Self { starter, state: State::Starting { seen } };
        let actions = match record.and_then(|r| start.detour(r)) {
            Some(detour) => start.go(detour),
            None => start.act(),
        };
        (start, actions)
    }

    /// The next state, and what to do.
    pub fn step(mut self, event: Event) -> (Self, Vec<Action>) {
        let actions = self.react(event);
        (self, actions)
    }

    fn react(&mut self, event: Event) -> Vec<Action> {
        use {Answer as A, Event as E, State as S};
        match (self.state.clone(), event) {
            (S::Starting { .. }, E::Swapped(A::Done(record))) => {
                if record.owner == self.starter.instance {
                    return self.go(S::Started { epoch: record.epoch });
                }
                vec![]
            }
            (S::Starting { .. }, E::Swapped(A::Refused(record))) => {
                match record.as_ref().and_then(|r| self.detour(r)) {
                    Some(detour) => self.go(detour),
                    None => self.refuse(record),
                }
            }
            (S::Recalling(gone), E::Recalled(A::Done(_))) => self.go(S::Taking(gone)),
            (S::Recalling(gone), E::Recalled(A::Refused(Some(record))))
                if record.epoch > gone.epoch =>
            {
                let Move { heir, peer, .. } = gone.to;
                let why =
                    format!("the VM lives on {peer}, where it went as {heir}: start it there");
                self.go(S::Refused { why })
            }
            (S::Taking(_), E::Swapped(A::Done(record))) => {
                self.go(S::Starting { seen: Some(record.epoch) })
            }
            (S::Taking(_), E::Swapped(A::Refused(record))) => self.refuse(record),
            (S::Starting { .. } | S::Taking(_), E::Swapped(A::Unknown))
            | (S::Recalling(_), E::Recalled(_)) => self.act(),
            _ => vec![],
        }
    }

    /// What comes before a start of a VM that has left.
    fn detour(&self, record: &Record) -> Option<State> {
        let Record { epoch, owner, .. } = record.clone();
        match &record.state {
            _ if self.starter.forced => None,
            record::State::Committed(to) => {
                Some(State::Recalling(Gone { epoch, owner, to: to.clone() }))
            }
            // The same ledger for both hosts: the heir has given it back already.
            record::State::Returned(of) if of.peer == self.starter.host => {
                let epoch = epoch.saturating_sub(1);
                Some(State::Taking(Gone { epoch, owner, to: of.clone() }))
            }
            _ => None,
        }
    }

    fn go(&mut self, state: State) -> Vec<Action> {
        self.state = state;
        self.act()
    }

    fn refuse(&mut self, record: Option<Record>) -> Vec<Action> {
        let why = match record {
            Some(record) => format!("the owner record says that {record}"),
            None => "the owner record is gone".into(),
        };
        self.go(State::Refused { why })
    }

    fn act(&self) -> Vec<Action> {
        let Starter { instance, host, forced } = self.starter.clone();
        match self.state.clone() {
            State::Starting { seen } => vec![Action::Swap(Swap::Start { seen, instance, forced })],
            State::Recalling(Gone { epoch, owner: source, to: Move { attempt, peer, .. } }) => {
                let has_guest = false;
                let swap = Swap::Relinquish {
                    epoch,
                    source,
                    attempt,
                    peer: host,
                    adopted: None,
                    has_guest,
                };
                vec![Action::AskPeer(peer, swap)]
            }
            State::Taking(Gone { epoch, owner, to: Move { attempt, .. } }) => {
                vec![Action::Swap(Swap::HandBack { epoch, owner, attempt })]
            }
            State::Started { .. } | State::Refused { .. } => vec![],
        }
    }
}
