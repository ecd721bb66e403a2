//! What the two launchers say to each other on the control stream.
//!
//! ```text
//! source                                   target
//!   Hello{versions} ----------------------->
//!   <---------------- Welcome{version} or Unwelcome
//!   Offer{..}, what is to be moved -------->
//!   <--------------- Prepared{..}, what is there already
//!   ... disks and memory on their own streams ...
//!   <-------------------------------- Loaded
//!   Commit -------------------------------->
//!   <------------------------------- Running
//! ```
//!
//! Messages are JSON, one object each, at most [`MAX_MESSAGE`] bytes. The
//! version is agreed on first; only the current and the previous are spoken.
//! Each version is a module of its own: a new one does not touch the old.

use crate::Failure;
use serde::{Deserialize, Serialize};

/// Most bytes of one message. The largest are lists of extents.
pub const MAX_MESSAGE: usize = 1 << 20;
/// Newest version that this build speaks.
pub const CURRENT: u32 = 1;
/// Oldest version that this build speaks.
pub const OLDEST: u32 = 1;

/// The first message, and the only one that never changes: what the source speaks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Always "godwit".
    pub protocol: String,
    /// Oldest version it speaks.
    pub oldest: u32,
    /// Newest version it speaks.
    pub newest: u32,
}

/// The answer to [`Hello`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Welcome {
    /// Both speak this version.
    Version(u32),
    /// They have none in common.
    Unwelcome(String),
}

/// The two builds cannot talk.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No version in common.
    #[error(
        "the source speaks versions {theirs_oldest} to {theirs_newest} of the move protocol, this host {OLDEST} to {CURRENT}; update the older one"
    )]
    NoVersion {
        /// Oldest of theirs.
        theirs_oldest: u32,
        /// Newest of theirs.
        theirs_newest: u32,
    },
    /// Not our protocol.
    #[error("the other side does not speak Godwit's move protocol")]
    Stranger,
    /// A message that makes no sense.
    #[error("a message of the other side cannot be understood: {0}")]
    Message(String),
}

impl Hello {
    /// What this build says.
    pub fn ours() -> Self {
        Self { protocol: "godwit".into(), oldest: OLDEST, newest: CURRENT }
    }

    /// The newest version that both speak.
    ///
    /// # Errors
    /// [`Error::NoVersion`], [`Error::Stranger`].
    pub fn negotiate(&self) -> Result<u32, Error> {
        if self.protocol != "godwit" || self.oldest > self.newest {
            return Err(Error::Stranger);
        }
        let version = self.newest.min(CURRENT);
        if version < self.oldest.max(OLDEST) {
            return Err(Error::NoVersion {
                theirs_oldest: self.oldest,
                theirs_newest: self.newest,
            });
        }
        Ok(version)
    }
}

/// Version 1.
pub mod v1 {
    use super::{Deserialize, Error, Failure, Serialize};
    use serde_json::Value;

    /// A message of the source.
    #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
    #[serde(tag = "type", content = "body", rename_all = "kebab-case")]
    pub enum FromSource {
        /// What is to be moved: the launchers' own affair.
        Offer(Value),
        /// The memory streams are about to be connected.
        MemoryStarts(Value),
        /// The guest is the target's.
        Commit,
        /// The attempt is over and will never be committed.
        #[serde(with = "reason")]
        Aborted(Failure),
        /// What has changed since older epochs: for a way back. After `Running`.
        History(Value),
    }

    /// A message of the target.
    #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
    #[serde(tag = "type", content = "body", rename_all = "kebab-case")]
    pub enum FromTarget {
        /// What is there already, and the tokens for the streams: the launchers' own affair.
        Prepared(Value),
        /// Everything is here.
        Loaded,
        /// The guest runs here.
        Running,
        /// Something failed here, and nothing was committed to it.
        #[serde(with = "reason")]
        Failed(Failure),
        /// The guest is the source's again.
        #[serde(with = "reason")]
        GaveBack(Failure),
    }

    /// A failure as this version says it, whatever becomes of [`Failure`].
    mod reason {
        use super::Failure;
        use serde::{Deserialize, Deserializer, Serialize, Serializer};

        #[derive(Serialize, Deserialize)]
        #[serde(rename_all = "kebab-case")]
        enum Reason {
            Cancelled,
            PeerLost,
            QemuEnded,
            Other(String),
        }

        pub fn serialize<S: Serializer>(failure: &Failure, to: S) -> Result<S::Ok, S::Error> {
            let reason = match failure.clone() {
                Failure::Cancelled => Reason::Cancelled,
                Failure::PeerLost => Reason::PeerLost,
                Failure::QemuEnded => Reason::QemuEnded,
                Failure::Other(why) => Reason::Other(why),
            };
            reason.serialize(to)
        }

        pub fn deserialize<'a, D: Deserializer<'a>>(from: D) -> Result<Failure, D::Error> {
            Ok(match Reason::deserialize(from)? {
                Reason::Cancelled => Failure::Cancelled,
                Reason::PeerLost => Failure::PeerLost,
                Reason::QemuEnded => Failure::QemuEnded,
                Reason::Other(why) => Failure::Other(why),
            })
        }
    }

    /// A message as bytes.
    ///
    /// # Errors
    /// [`Error::Message`] when it cannot be told in JSON or is too long.
    pub fn encode<M: Serialize>(message: &M) -> Result<Vec<u8>, Error> {
        let bytes = serde_json::to_vec(message).map_err(|e| Error::Message(e.to_string()))?;
        if bytes.len() > super::MAX_MESSAGE {
            return Err(Error::Message(format!("it would be {} bytes long", bytes.len())));
        }
        Ok(bytes)
    }

    /// A message from bytes.
    ///
    /// # Errors
    /// [`Error::Message`].
    pub fn decode<'a, M: Deserialize<'a>>(bytes: &'a [u8]) -> Result<M, Error> {
        if bytes.len() > super::MAX_MESSAGE {
            return Err(Error::Message(format!("it is {} bytes long", bytes.len())));
        }
        serde_json::from_slice(bytes).map_err(|e| Error::Message(e.to_string()))
    }
}
