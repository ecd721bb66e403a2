//! Migration of the machine's state.

use serde::{Deserialize, Serialize};

use super::Empty;
use crate::OutOfBand;

command! {
    /// Begins to send the machine's state. Returns at once; see [`QueryMigrate`].
    Migrate = "migrate" {
        /// Where to, such as `unix:/run/vm/out.sock`.
        uri: String,
    } -> Empty
}

command! {
    /// Lets a QEMU that was started with `-incoming defer` listen.
    MigrateIncoming = "migrate-incoming" {
        /// Where to listen, such as `unix:/run/vm/in.sock`.
        uri: String,
    } -> Empty
}

command! {
    /// Cancels the migration; the guest goes on here. Done when the status is `cancelled`.
    MigrateCancel = "migrate_cancel" -> Empty
}

command! {
    /// Goes on from a status that waits for it.
    MigrateContinue = "migrate-continue" {
        /// The status it must be in, such as [`MigrationStatus::PreSwitchover`].
        state: MigrationStatus,
    } -> Empty
}

command! {
    /// Turns capabilities on and off. Only between migrations.
    MigrateSetCapabilities = "migrate-set-capabilities" {
        /// Which, and to what.
        capabilities: Vec<MigrationCapabilityStatus>,
    } -> Empty
}

command! {
    /// The capabilities of this QEMU, and which are on.
    QueryMigrateCapabilities = "query-migrate-capabilities" -> Vec<MigrationCapabilityStatus>
}

/// A capability and whether it is on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationCapabilityStatus {
    /// Which.
    pub capability: MigrationCapability,
    /// Whether it is on.
    pub state: bool,
}

open_enum! {
    /// A capability of migration. Both sides must agree on most of them.
    MigrationCapability {
        AutoConverge = "auto-converge",
        BackgroundSnapshot = "background-snapshot",
        DirtyBitmaps = "dirty-bitmaps",
        /// Since QEMU 8.1.
        DirtyLimit = "dirty-limit",
        Events = "events",
        LateBlockActivate = "late-block-activate",
        /// Since QEMU 9.0.
        MappedRam = "mapped-ram",
        Multifd = "multifd",
        PauseBeforeSwitchover = "pause-before-switchover",
        PostcopyBlocktime = "postcopy-blocktime",
        PostcopyPreempt = "postcopy-preempt",
        PostcopyRam = "postcopy-ram",
        ReleaseRam = "release-ram",
        ReturnPath = "return-path",
        /// Since QEMU 8.1.
        SwitchoverAck = "switchover-ack",
        ValidateUuid = "validate-uuid",
        Xbzrle = "xbzrle",
        ZeroCopySend = "zero-copy-send",
    }
}

command! {
    /// The parameters in force.
    QueryMigrateParameters = "query-migrate-parameters" -> MigrationParameters
}

/// Sets those parameters that are given. Also while a migration runs.
///
/// `migrate-set-parameters`
#[derive(Debug, Clone, Default, Serialize)]
pub struct MigrateSetParameters(pub MigrationParameters);

impl crate::Command for MigrateSetParameters {
    const NAME: &'static str = "migrate-set-parameters";
    type Return = Empty;
}

/// Parameters of migration; those that are `None` are not touched, or unknown to this QEMU.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MigrationParameters {
    /// ms before the first announcement of the NICs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub announce_initial: Option<u64>,
    /// The most ms between two announcements.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub announce_max: Option<u64>,
    /// How many announcements are sent once the state is loaded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub announce_rounds: Option<u64>,
    /// By how many ms the time between two announcements grows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub announce_step: Option<u64>,
    /// Bytes per second; 0 for no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_bandwidth: Option<u64>,
    /// Bytes per second that the switchover may count on; 0 to measure. Since QEMU 8.2.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub avail_switchover_bandwidth: Option<u64>,
    /// ms that the guest may stand still.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downtime_limit: Option<u64>,
    /// How many streams carry memory with `multifd`, 1 to 255.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub multifd_channels: Option<u8>,
    /// How those streams are compressed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub multifd_compression: Option<MultifdCompression>,
    /// 0 to 20.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub multifd_zstd_level: Option<u8>,
    /// Who finds zero pages. Since QEMU 9.0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zero_page_detection: Option<ZeroPageDetection>,
    /// Percent by which `auto-converge` slows the vCPUs at first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_throttle_initial: Option<u8>,
    /// Percent by which it then slows them more each time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_throttle_increment: Option<u8>,
    /// The most percent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_cpu_throttle: Option<u8>,
    /// Percent of what was sent that, when dirtied again, begins it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub throttle_trigger_threshold: Option<u8>,
    /// Bytes per second for post-copy in the background; 0 for no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_postcopy_bandwidth: Option<u64>,
    /// Bytes of cache for `xbzrle`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub xbzrle_cache_size: Option<u64>,
}

open_enum! {
    /// How `multifd` compresses.
    MultifdCompression {
        None = "none",
        Zlib = "zlib",
        Zstd = "zstd",
    }
}

open_enum! {
    /// Who finds zero pages.
    ZeroPageDetection {
        None = "none",
        Legacy = "legacy",
        Multifd = "multifd",
    }
}

command! {
    /// Begins to measure how fast the guest dirties its memory; see [`QueryDirtyRate`].
    CalcDirtyRate = "calc-dirty-rate" {
        /// For how long, in seconds.
        calc_time: i64,
    } -> Empty
}

command! {
    /// How fast the guest dirties its memory.
    QueryDirtyRate = "query-dirty-rate" -> DirtyRate
}

/// The reply of [`QueryDirtyRate`].
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct DirtyRate {
    /// MiB per second, once it is measured.
    pub dirty_rate: Option<i64>,
    /// Whether it is.
    pub status: DirtyRateStatus,
}

open_enum! {
    /// How far the measurement of [`CalcDirtyRate`] is.
    DirtyRateStatus {
        Unstarted = "unstarted",
        Measuring = "measuring",
        Measured = "measured",
    }
}

command! {
    /// How the migration goes, on either side.
    QueryMigrate = "query-migrate" -> MigrationInfo
}

/// The reply of [`QueryMigrate`]; what does not apply to the status is `None`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MigrationInfo {
    /// `None` before the first migration.
    pub status: Option<MigrationStatus>,
    /// The memory; source only.
    pub ram: Option<RamStats>,
    /// ms since the begin, or from begin to end.
    pub total_time: Option<u64>,
    /// ms the guest would stand still if it switched over now. QEMU's guess: may be nonsense.
    pub expected_downtime: Option<i64>,
    /// ms the guest stood still; once completed.
    pub downtime: Option<u64>,
    /// ms from the command to the first byte.
    pub setup_time: Option<u64>,
    /// Percent by which the vCPUs are slowed now.
    pub cpu_throttle_percentage: Option<u8>,
    /// Why it failed.
    pub error_desc: Option<String>,
    /// Why a migration would be refused.
    pub blocked_reasons: Option<Vec<String>>,
}

open_enum! {
    /// The status of a migration.
    MigrationStatus {
        None = "none",
        Setup = "setup",
        Cancelling = "cancelling",
        Cancelled = "cancelled",
        Active = "active",
        PostcopyActive = "postcopy-active",
        PostcopyPaused = "postcopy-paused",
        /// Since QEMU 9.1.
        PostcopyRecoverSetup = "postcopy-recover-setup",
        PostcopyRecover = "postcopy-recover",
        Completed = "completed",
        Failed = "failed",
        Colo = "colo",
        PreSwitchover = "pre-switchover",
        Device = "device",
        WaitUnplug = "wait-unplug",
    }
}

/// The memory part of [`MigrationInfo`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct RamStats {
    /// Bytes sent.
    pub transferred: u64,
    /// Bytes of memory still to be sent, before compression.
    pub remaining: u64,
    /// Bytes of memory that the guest has.
    pub total: u64,
    /// Zero pages found.
    pub duplicate: u64,
    /// Pages sent whole.
    pub normal: u64,
    /// Pages that the guest dirties per second.
    pub dirty_pages_rate: u64,
    /// Megabits per second.
    pub mbps: f64,
    /// How often the dirty log was read.
    pub dirty_sync_count: u64,
    /// Bytes.
    pub page_size: u64,
    /// Bytes sent by `multifd`.
    pub multifd_bytes: u64,
    /// Pages sent per second.
    pub pages_per_second: u64,
    /// Bytes sent before the guest was stopped.
    pub precopy_bytes: u64,
    /// Bytes sent while it was stopped.
    pub downtime_bytes: u64,
    /// How often `zero-copy-send` had to copy all the same.
    pub dirty_sync_missed_zero_copy: u64,
}

command! {
    /// Tells the network where the NICs are now.
    AnnounceSelf = "announce-self" {
        /// ms before the first announcement.
        initial: u64,
        /// The most ms between two.
        max: u64,
        /// How many.
        rounds: u64,
        /// By how many ms the time between two grows.
        step: u64,
    } optional {
        /// Only these network devices.
        interfaces: Vec<String>,
        /// A name to replace or stop it by.
        id: String,
    } -> Empty
}

command! {
    /// Cuts connections that QEMU may hang on. Works out of band.
    Yank = "yank" {
        /// What to cut.
        instances: Vec<YankInstance>,
    } -> Empty
}

impl OutOfBand for Yank {}

/// What [`Yank`] cuts.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "type", rename_all = "kebab-case", rename_all_fields = "kebab-case")]
pub enum YankInstance {
    /// The connection of an NBD client node.
    BlockNode {
        /// The node.
        node_name: String,
    },
    /// The connection of a character device.
    Chardev {
        /// The device.
        id: String,
    },
    /// The migration's connections.
    Migration,
}
