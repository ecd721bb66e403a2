//! What a source needs in order to reach the target that was prepared for it.

use super::Error;
use channel::identity::SpiffeId;
use channel::tokens::Token;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// A host's gateway.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// Its address, `host:port`.
    pub address: String,
    /// Who must answer there.
    pub id: SpiffeId,
}

/// Leave to move one VM to one launcher, once.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Ticket {
    /// The attempt.
    pub migration: String,
    /// The VM.
    pub vm: String,
    /// What it is called at the source, if otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub known_as: Option<String>,
    /// The target's gateway.
    pub peer: Peer,
    /// The launcher instance that will own the VM.
    pub heir: String,
    /// For the control stream.
    pub token: Token,
}

/// What a gateway writes for the launchers of its host (`gateway.json`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Here {
    /// How it is reached, and who it is.
    #[serde(flatten)]
    pub peer: Peer,
}

impl Here {
    /// As the gateway of `host`'s folder wrote it.
    ///
    /// # Errors
    /// [`Error::NoGateway`].
    pub fn of(host: &Path) -> Result<Self, Error> {
        let path = host.join("gateway.json");
        let read = || Ok(serde_json::from_str(&std::fs::read_to_string(&path)?)?);
        read().map_err(|source| Error::NoGateway { path: path.clone(), source })
    }
}
