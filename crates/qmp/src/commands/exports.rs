//! QEMU's NBD server and its exports.

use serde::{Deserialize, Serialize};

use super::{BitmapRef, Empty};

command! {
    /// Starts the NBD server.
    NbdServerStart = "nbd-server-start" {
        /// Where it listens.
        addr: NbdAddress,
    } optional {
        /// How many clients at a time; 0 for any number. QEMU before 9.1 takes any number when
        /// this is left out, later ones 100.
        max_connections: u32,
    } -> Empty
}

/// Where an NBD server listens. Never a TCP port: only the channel opens those.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "type", content = "data", rename_all = "kebab-case")]
pub enum NbdAddress {
    /// A socket that QEMU creates.
    Unix {
        /// Its path, up to 107 bytes.
        path: String,
    },
}

impl Default for NbdAddress {
    fn default() -> Self {
        Self::Unix { path: String::new() }
    }
}

command! {
    /// Stops the NBD server and deletes its exports.
    NbdServerStop = "nbd-server-stop" -> Empty
}

open_enum! {
    /// How a node is exported.
    ExportType {
        Nbd = "nbd",
        VhostUserBlk = "vhost-user-blk",
        Fuse = "fuse",
        VduseBlk = "vduse-blk",
    }
}

command! {
    /// Exports a node over NBD.
    BlockExportAdd = "block-export-add" {
        /// [`ExportType::Nbd`]; the optional members are of that type.
        r#type: ExportType,
        /// The export's id.
        id: String,
        /// The node.
        node_name: String,
    } optional {
        /// The name that clients ask for. Default: the node's.
        name: String,
        /// Whether clients may write.
        writable: bool,
        /// Bitmaps to show as `qemu:dirty-bitmap:NAME`. A recording one is refused.
        bitmaps: Vec<BitmapRef>,
        /// Whether to show `qemu:allocation-depth`.
        allocation_depth: bool,
    } -> Empty
}

command! {
    /// Deletes an export. It is gone, and its bitmaps no longer busy, at the event
    /// `BLOCK_EXPORT_DELETED`.
    BlockExportDel = "block-export-del" {
        /// The export's id.
        id: String,
    } optional {
        /// What about its clients. Default: [`ExportRemoveMode::Safe`].
        mode: ExportRemoveMode,
    } -> Empty
}

open_enum! {
    /// What to do about an export's clients.
    ExportRemoveMode {
        /// Refuses while there are any.
        Safe = "safe",
        /// Cuts them off.
        Hard = "hard",
    }
}

command! {
    /// The exports.
    QueryBlockExports = "query-block-exports" -> Vec<BlockExport>
}

/// One export.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockExport {
    /// Its id.
    pub id: String,
    /// How the node is exported.
    pub r#type: ExportType,
    /// The node.
    pub node_name: String,
    /// Whether it is being deleted.
    pub shutting_down: bool,
}
