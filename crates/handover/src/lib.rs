//! Who may run a VM while it moves: states, events, actions and wire messages.
//!
//! Pure: no I/O, no clock, no runtime. The launchers run [`start::Start`],
//! [`source::Source`] and [`target::Target`], the handlers [`handler::local`] and
//! [`handler::peer`] over [`record::apply`]; the model in `tests/` runs the same
//! functions against every interleaving.
//!
//! ```text
//!  source's ledger      source           target        target's ledger
//!        | <--- Arm ------|  disks, memory |                  |
//!        |                |--------------->|                  |
//!        |                |<--- Loaded ----|                  |
//!        | <-- Commit ----|                |                  |   point of no return
//!        |                |---- Commit --->|                  |
//!        |                |                |---- Adopt -----> |   it expected that
//!        |                |<--- Running ---|  cont            |
//! ```

pub mod handler;
pub mod ledger;
pub mod record;
pub mod source;
pub mod start;
pub mod target;
pub mod wire;

use std::fmt;

/// Why a move did not succeed.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Failure {
    /// The user wanted it so.
    Cancelled,
    /// The other launcher could not be reached for too long.
    PeerLost,
    /// A QEMU ended by itself.
    QemuEnded,
    /// Something else, in words for a person.
    Other(String),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Failure::Cancelled => "it was cancelled",
            Failure::PeerLost => "the other host could not be reached for too long",
            Failure::QemuEnded => "QEMU ended by itself",
            Failure::Other(why) => why,
        })
    }
}

/// How long a wait may take; the shell knows the numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Deadline {
    /// An answer of the other launcher or of QEMU.
    Answer,
    /// Copying: as long as there is progress.
    Data,
    /// The guest stands still.
    Pause,
    /// An answer of this host's ledger.
    Ledger,
    /// Another host's decision: afterwards the guest is shown to be in doubt.
    Decision,
}

/// What is waited for, and how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Waiting {
    /// For what, in words for a person.
    pub reason: &'static str,
    /// How long.
    pub deadline: Deadline,
}

impl Waiting {
    fn for_peer(reason: &'static str) -> Self {
        Self { reason, deadline: Deadline::Answer }
    }

    fn for_data(reason: &'static str) -> Self {
        Self { reason, deadline: Deadline::Data }
    }

    fn for_pause(reason: &'static str) -> Self {
        Self { reason, deadline: Deadline::Pause }
    }

    fn for_ledger(reason: &'static str) -> Self {
        Self { reason, deadline: Deadline::Ledger }
    }

    fn for_decision(reason: &'static str) -> Self {
        Self { reason, deadline: Deadline::Decision }
    }
}
