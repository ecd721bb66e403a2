//! Identities, mTLS streams, preface, gateway and relay.
//!
//! The only way by which migration data leaves a host:
//!
//! ```text
//! source launcher        source host            target host        target launcher
//!   resumable  --unix-->  gateway  ==TLS 1.3==>  gateway  --unix-->  resumable
//! ```
//!
//! Two gateways know each other by [`identity`], speak [`tls`] and nothing plainer, and
//! name what they connect in a [`preface`]. The [`gateway`] keeps no state of any
//! migration: the launchers issue and check [`tokens`], and carry their bytes across
//! cut links and restarted gateways with [`resumable`]. A launcher reaches its host's
//! gateway through [`client`].
//!
//! This crate knows nothing of Kubernetes, QEMU, disks or owner records.

pub mod client;
mod copy;
pub mod gateway;
pub mod identity;
pub mod passage;
pub mod preface;
pub mod relay;
pub mod resumable;
pub mod socket;
pub mod tcp;
pub mod tls;
pub mod tokens;
mod traffic;
pub mod wire;

/// An error and its causes on one line, for a log or a peer.
pub fn with_source(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text += &format!(": {cause}");
        source = cause.source();
    }
    text
}
