//! What the two launchers tell each other before anything moves: the bodies of
//! `Offer` and `Prepared`, version 1.

use crate::spec::VmSpec;
use channel::tokens::Token;
use handover::record::InstanceId;
use serde::{Deserialize, Serialize};

/// What is to be moved.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Offer {
    /// The VM, with the source's paths.
    pub spec: VmSpec,
    /// The source's epoch.
    pub epoch: u64,
    /// The source.
    pub source: InstanceId,
    /// Which copy: a later attempt with the same name goes on from it.
    pub copy: String,
    /// The disks' sizes in bytes, in the spec's order.
    pub sizes: Vec<u64>,
    /// Size of the UEFI firmware in bytes: QEMU loads it, as memory, only into one of that size.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub firmware: Option<u64>,
    /// How many disk streams there will be.
    pub disk_streams: u16,
    /// QEMU's additional memory channels; 0 is none.
    pub multifd: u8,
    /// Memory is compressed, by the additional channels.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub zstd: bool,
    /// The guest stands still, and is to stand still there.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub paused: bool,
}

/// What the target has.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prepared {
    /// Per disk, in the spec's order.
    pub disks: Vec<Holds>,
    /// For the disk streams.
    pub disk_tokens: Vec<Token>,
    /// For the memory streams.
    pub memory_tokens: Vec<Token>,
}

/// What a target's disk holds before the move.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Holds {
    /// It is the source's own disk.
    Shared,
    /// Zeros: it was just created.
    Zeros,
    /// An unfinished copy.
    Copy(String),
    /// This VM, as it left it at the end of that epoch, untouched since.
    Left(u64),
    /// Nobody knows.
    Anything,
}

/// Most disk streams.
pub const MAX_DISK_STREAMS: u16 = 16;
/// Most additional memory channels.
pub const MAX_MULTIFD: u8 = 16;
