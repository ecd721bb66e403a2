//! Both halves of a move, put together from the mover, the channel, QEMU and
//! the handover's pure core.
//!
//! ```text
//! source                                     target
//! send ----- control: Hello, Offer --------> hall -> target
//!   disks -- disk streams -----------------> receiver -> files
//!   memory - QEMU -> resumable ------------> resumable -> QEMU
//!   owner -> this host's ledger              owner -> this host's ledger
//! ```

pub mod bitmaps;
pub mod control;
pub mod disks;
pub mod failpoint;
pub mod fault;
pub mod hall;
pub mod history;
pub mod links;
pub mod marks;
pub mod memory;
pub mod offer;
pub mod policy;
pub mod progress;
pub mod source;
pub mod status;
pub mod target;
pub mod ticket;
pub mod verify;

pub use disks::Carried;
pub use fault::Fault;
pub use hall::serve;
pub use source::{SendRequest, cancel, disrupt, send};
pub use target::{PrepareRequest, prepare};
pub use verify::{verify_begin, verify_judge, verify_send};

use std::sync::Arc;

/// Why a move cannot be begun.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request is wrong.
    #[error("the move cannot begin: {0}")]
    Request(String),
    /// The host's gateway has not said where it is.
    #[error("cannot read {path}; is `godwit gateway` running for this host?")]
    NoGateway {
        /// Where the gateway says it.
        path: std::path::PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The verification cannot be carried out.
    #[error("the disks cannot be compared: {0}")]
    Verify(String),
}

/// A move that is under way.
#[derive(Debug, Clone)]
pub enum Moving {
    /// Away from here.
    Away(source::Remote),
    /// To here.
    Here(Arc<hall::Gate>),
    /// None is: disks that the VM has left are compared with its own. It stands in nobody's way.
    Compared(Arc<hall::Gate>),
}

impl Moving {
    /// Whether the guest is on its way, and whatever else is wanted has to wait.
    pub fn is_move(&self) -> bool {
        !matches!(self, Self::Compared(_))
    }
}
