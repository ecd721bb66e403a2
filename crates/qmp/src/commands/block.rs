//! The block graph, its devices and its jobs.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Empty;
use crate::Command;

/// Adds a node to the graph. The value is its `BlockdevOptions`.
///
/// `blockdev-add`
#[derive(Debug, Clone, Serialize)]
pub struct BlockdevAdd(pub Value);

impl Command for BlockdevAdd {
    const NAME: &'static str = "blockdev-add";
    type Return = Empty;
}

command! {
    /// Removes a node that nothing uses.
    BlockdevDel = "blockdev-del" {
        /// The node.
        node_name: String,
    } -> Empty
}

command! {
    /// Gives nodes new options; what is left out becomes the default.
    BlockdevReopen = "blockdev-reopen" {
        /// All of each node's `BlockdevOptions`.
        options: Vec<Value>,
    } -> Empty
}

command! {
    /// Changes the size of a disk, and tells the guest.
    BlockResize = "block_resize" {
        /// Bytes.
        size: u64,
    } optional {
        /// The node. This or `device`.
        node_name: String,
        /// The backend's name.
        device: String,
    } -> Empty
}

command! {
    /// The nodes of the graph.
    QueryNamedBlockNodes = "query-named-block-nodes" {} optional {
        /// Leaves out what lies below each node: it has an entry of its own.
        flat: bool,
    } -> Vec<BlockNode>
}

/// One node of the graph.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BlockNode {
    /// Its name.
    #[serde(rename = "node-name")]
    pub node_name: Option<String>,
    /// Its driver, such as `raw`.
    pub drv: String,
    /// The file, or QEMU's `json:` name of it.
    pub file: String,
    /// Whether it is read-only.
    pub ro: bool,
    /// Its image.
    pub image: ImageInfo,
    /// How the host's cache is used.
    pub cache: BlockCache,
    /// Its dirty bitmaps.
    #[serde(rename = "dirty-bitmaps", default)]
    pub dirty_bitmaps: Vec<DirtyBitmap>,
}

/// The image of a node.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ImageInfo {
    /// The file.
    pub filename: String,
    /// Its format, such as `raw`.
    pub format: String,
    /// Bytes that the guest sees.
    pub virtual_size: u64,
    /// Bytes that it takes on the host.
    pub actual_size: Option<u64>,
}

/// How the host's cache is used.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockCache {
    /// Writes are done when they are in a cache.
    pub writeback: bool,
    /// The host's page cache is passed by (O_DIRECT).
    pub direct: bool,
    /// Flushes are ignored.
    pub no_flush: bool,
}

/// A dirty bitmap.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DirtyBitmap {
    /// Its name; `None` for those of QEMU's own jobs.
    pub name: Option<String>,
    /// Bytes that it says are dirty.
    pub count: u64,
    /// Bytes per bit.
    pub granularity: u64,
    /// Whether it records.
    pub recording: bool,
    /// Whether an export or a job uses it.
    pub busy: bool,
    /// Whether it is kept in the image.
    pub persistent: bool,
    /// Whether it was not stored in order: its content is lost.
    #[serde(default)]
    pub inconsistent: bool,
}

command! {
    /// The guest's disks.
    QueryBlock = "query-block" -> Vec<BlockInfo>
}

/// One disk of the guest.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BlockInfo {
    /// The backend's name; empty when it has none.
    pub device: String,
    /// The device's id or QOM path.
    pub qdev: Option<String>,
    /// Whether its medium can be taken out.
    pub removable: bool,
    /// Whether the guest holds the medium.
    pub locked: bool,
    /// The medium.
    pub inserted: Option<BlockNode>,
    /// Whether it met an error; only with a policy that stops the guest.
    #[serde(rename = "io-status")]
    pub io_status: Option<IoStatus>,
}

open_enum! {
    /// Whether a disk or a job met an error.
    IoStatus {
        Ok = "ok",
        Failed = "failed",
        Nospace = "nospace",
    }
}

command! {
    /// How much was read and written.
    QueryBlockstats = "query-blockstats" {} optional {
        /// By node instead of by the guest's disks.
        query_nodes: bool,
    } -> Vec<BlockStats>
}

/// What was read from and written to one disk or node.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BlockStats {
    /// The backend's name.
    pub device: Option<String>,
    /// The device's id or QOM path.
    pub qdev: Option<String>,
    /// The node.
    #[serde(rename = "node-name")]
    pub node_name: Option<String>,
    /// The counters.
    pub stats: BlockCounters,
}

/// The counters of [`BlockStats`], since QEMU began.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BlockCounters {
    /// Bytes read.
    pub rd_bytes: u64,
    /// Bytes written.
    pub wr_bytes: u64,
    /// Bytes discarded.
    pub unmap_bytes: u64,
    /// Reads.
    pub rd_operations: u64,
    /// Writes.
    pub wr_operations: u64,
    /// Flushes.
    pub flush_operations: u64,
    /// Discards.
    pub unmap_operations: u64,
    /// ns spent reading.
    pub rd_total_time_ns: u64,
    /// ns spent writing.
    pub wr_total_time_ns: u64,
    /// ns spent flushing.
    pub flush_total_time_ns: u64,
    /// The end of the last byte written so far.
    pub wr_highest_offset: u64,
}

open_enum! {
    /// What a mirror copies.
    MirrorSync {
        Full = "full",
        Top = "top",
        None = "none",
    }
}

open_enum! {
    /// Who writes to a mirror's target.
    MirrorCopyMode {
        /// The job, later.
        Background = "background",
        /// The guest's write itself, too.
        WriteBlocking = "write-blocking",
    }
}

command! {
    /// Copies a node to another and keeps it equal. Godwit's own mover does not use it.
    BlockdevMirror = "blockdev-mirror" {
        /// The job's id.
        job_id: String,
        /// The node or device that is copied.
        device: String,
        /// The node that receives.
        target: String,
        /// What to copy.
        sync: MirrorSync,
    } optional {
        /// Bytes per second.
        speed: u64,
        /// Bytes per bit of the job's bitmap.
        granularity: u32,
        /// Bytes in flight.
        buf_size: u64,
        /// Who writes.
        copy_mode: MirrorCopyMode,
        /// Whether the job is completed without `job-finalize`.
        auto_finalize: bool,
        /// Whether a job that ended goes away by itself.
        auto_dismiss: bool,
    } -> Empty
}

command! {
    /// Ends a job. A mirror that is ready ends well, unless forced.
    BlockJobCancel = "block-job-cancel" {
        /// The job's id.
        device: String,
    } optional {
        /// Ends a mirror that is ready at once.
        force: bool,
    } -> Empty
}

command! {
    /// The block jobs.
    QueryBlockJobs = "query-block-jobs" -> Vec<BlockJobInfo>
}

/// One block job.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockJobInfo {
    /// What it does, such as `mirror`.
    pub r#type: String,
    /// Its id.
    pub device: String,
    /// All of its work, in bytes; may grow.
    pub len: u64,
    /// What is done of it, in bytes.
    pub offset: u64,
    /// Whether it has requests in flight.
    pub busy: bool,
    /// Whether it is paused.
    pub paused: bool,
    /// Bytes per second; 0 for no limit.
    pub speed: u64,
    /// Whether it met an error.
    pub io_status: IoStatus,
    /// Whether it can be completed.
    pub ready: bool,
    /// Its status.
    pub status: JobStatus,
    /// Why it failed.
    pub error: Option<String>,
}

open_enum! {
    /// The status of a job.
    JobStatus {
        Undefined = "undefined",
        Created = "created",
        Running = "running",
        Paused = "paused",
        Ready = "ready",
        Standby = "standby",
        Waiting = "waiting",
        Pending = "pending",
        Aborting = "aborting",
        Concluded = "concluded",
        Null = "null",
    }
}
