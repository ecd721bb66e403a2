//! Events: raw as they come, typed on demand.
//!
//! Every subscriber has its own place in one bounded queue. One that falls behind by more than
//! the queue holds is told how many events it missed ([`Error::Lagged`]) and goes on with the
//! oldest that is left; nothing is lost without being said. Whoever lagged asks QEMU for its state.

use std::time::Duration;

use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;
use tokio::sync::{broadcast, watch};

use crate::{
    Closed,
    commands::{JobStatus, MigrationStatus},
};

/// One event as QEMU sent it.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Its name, such as `STOP`.
    pub name: Box<str>,
    /// Its data; null when it has none.
    pub data: Value,
    /// The host's time when it happened, since the Unix epoch; zero when QEMU could not tell.
    pub timestamp: Duration,
}

/// Why there is no next event.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The subscriber was too slow. The next call returns the oldest event that is left.
    #[error("{missed} QMP events were missed; ask QEMU for its state instead")]
    Lagged {
        /// How many.
        missed: u64,
    },
    /// The connection ended and every event of it was delivered.
    #[error("the QMP connection ended")]
    Closed(#[source] Closed),
}

/// A subscription, from [`Client::events`](crate::Client::events).
#[derive(Debug)]
pub struct Events {
    receiver: broadcast::Receiver<Event>,
    closed: watch::Receiver<Option<Closed>>,
}

impl Events {
    pub(crate) fn new(
        receiver: broadcast::Receiver<Event>,
        closed: watch::Receiver<Option<Closed>>,
    ) -> Self {
        Self { receiver, closed }
    }

    /// The next event. Nothing is lost when the future is dropped.
    pub async fn next(&mut self) -> Result<Event, Error> {
        self.receiver.recv().await.map_err(|error| match error {
            broadcast::error::RecvError::Lagged(missed) => Error::Lagged { missed },
            broadcast::error::RecvError::Closed => {
                Error::Closed(self.closed.borrow().clone().unwrap_or(Closed::Eof))
            }
        })
    }
}

/// The events that this crate knows.
#[derive(Debug, Clone, PartialEq)]
pub enum Typed {
    /// The vCPUs stopped.
    Stop,
    /// The vCPUs run again.
    Resume,
    /// The machine shuts down.
    Shutdown(Shutdown),
    /// The machine was reset.
    Reset(Shutdown),
    /// The power button was pressed.
    Powerdown,
    /// The migration's status changed (capability `events`).
    Migration(Migration),
    /// A new pass over the memory began (capability `events`).
    MigrationPass(MigrationPass),
    /// A disk failed.
    BlockIoError(BlockIoError),
    /// A block job completed.
    BlockJobCompleted(BlockJob),
    /// A block job was cancelled.
    BlockJobCancelled(BlockJob),
    /// A block job can be completed.
    BlockJobReady(BlockJob),
    /// A block job met an error.
    BlockJobError(BlockJobError),
    /// A block job waits for `job-finalize`.
    BlockJobPending(BlockJobPending),
    /// A job's status changed.
    JobStatusChange(JobStatusChange),
    /// The guest panicked.
    GuestPanicked(GuestPanicked),
    /// A block export is gone, with its node and bitmaps free again.
    BlockExportDeleted(BlockExportDeleted),
    /// A device was unplugged.
    DeviceDeleted(DeviceDeleted),
    /// Any other.
    Other,
}

impl Event {
    /// What the event says, if this crate knows it. An error means that QEMU changed its data.
    pub fn typed(&self) -> Result<Typed, serde_json::Error> {
        Ok(match &*self.name {
            "STOP" => Typed::Stop,
            "RESUME" => Typed::Resume,
            "SHUTDOWN" => Typed::Shutdown(self.parse()?),
            "RESET" => Typed::Reset(self.parse()?),
            "POWERDOWN" => Typed::Powerdown,
            "MIGRATION" => Typed::Migration(self.parse()?),
            "MIGRATION_PASS" => Typed::MigrationPass(self.parse()?),
            "BLOCK_IO_ERROR" => Typed::BlockIoError(self.parse()?),
            "BLOCK_JOB_COMPLETED" => Typed::BlockJobCompleted(self.parse()?),
            "BLOCK_JOB_CANCELLED" => Typed::BlockJobCancelled(self.parse()?),
            "BLOCK_JOB_READY" => Typed::BlockJobReady(self.parse()?),
            "BLOCK_JOB_ERROR" => Typed::BlockJobError(self.parse()?),
            "BLOCK_JOB_PENDING" => Typed::BlockJobPending(self.parse()?),
            "JOB_STATUS_CHANGE" => Typed::JobStatusChange(self.parse()?),
            "GUEST_PANICKED" => Typed::GuestPanicked(self.parse()?),
            "BLOCK_EXPORT_DELETED" => Typed::BlockExportDeleted(self.parse()?),
            "DEVICE_DELETED" => Typed::DeviceDeleted(self.parse()?),
            _ => Typed::Other,
        })
    }

    fn parse<T: DeserializeOwned>(&self) -> Result<T, serde_json::Error> {
        T::deserialize(&self.data)
    }
}

open_enum! {
    /// Why the machine shuts down or was reset.
    ShutdownCause {
        None = "none",
        HostError = "host-error",
        HostQmpQuit = "host-qmp-quit",
        HostQmpSystemReset = "host-qmp-system-reset",
        HostSignal = "host-signal",
        HostUi = "host-ui",
        GuestShutdown = "guest-shutdown",
        GuestReset = "guest-reset",
        GuestPanic = "guest-panic",
        SubsystemReset = "subsystem-reset",
        SnapshotLoad = "snapshot-load",
    }
}

open_enum! {
    /// What QEMU did about a failed disk request.
    IoErrorAction {
        Ignore = "ignore",
        Report = "report",
        Stop = "stop",
    }
}

open_enum! {
    /// The direction of a failed disk request.
    IoOperation {
        Read = "read",
        Write = "write",
    }
}

open_enum! {
    /// What QEMU did about a guest's panic.
    PanicAction {
        Pause = "pause",
        Poweroff = "poweroff",
        Run = "run",
    }
}

/// `SHUTDOWN` and `RESET`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Shutdown {
    /// Whether the guest asked for it.
    pub guest: bool,
    /// Why.
    pub reason: ShutdownCause,
}

/// `MIGRATION`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Migration {
    /// The new status.
    pub status: MigrationStatus,
}

/// `MIGRATION_PASS`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct MigrationPass {
    /// The number of the pass that begins, from 1.
    pub pass: u64,
}

/// `BLOCK_IO_ERROR`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockIoError {
    /// The device's or backend's id; empty when it has none.
    pub device: String,
    /// The block node.
    pub node_name: Option<String>,
    /// Read or write.
    pub operation: IoOperation,
    /// What was done about it.
    pub action: IoErrorAction,
    /// Whether the host's storage is full.
    #[serde(default)]
    pub nospace: bool,
    /// The error, for a human.
    pub reason: String,
}

/// `BLOCK_JOB_COMPLETED`, `_CANCELLED` and `_READY`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct BlockJob {
    /// The job's id.
    pub device: String,
    /// What it does, such as `mirror`.
    #[serde(rename = "type")]
    pub kind: String,
    /// All of its work, in bytes.
    pub len: u64,
    /// What is done of it, in bytes.
    pub offset: u64,
    /// Why it failed, if it did.
    pub error: Option<String>,
}

/// `BLOCK_JOB_ERROR`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct BlockJobError {
    /// The job's id.
    pub device: String,
    /// Read or write.
    pub operation: IoOperation,
    /// What was done about it.
    pub action: IoErrorAction,
}

/// `BLOCK_JOB_PENDING`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct BlockJobPending {
    /// The job's id.
    pub id: String,
}

/// `JOB_STATUS_CHANGE`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct JobStatusChange {
    /// The job's id.
    pub id: String,
    /// Its new status.
    pub status: JobStatus,
}

/// `GUEST_PANICKED`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct GuestPanicked {
    /// What was done about it.
    pub action: PanicAction,
}

/// `BLOCK_EXPORT_DELETED`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct BlockExportDeleted {
    /// The export's id.
    pub id: String,
}

/// `DEVICE_DELETED`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct DeviceDeleted {
    /// The device's id, if it has one.
    pub device: Option<String>,
    /// Its QOM path.
    pub path: String,
}
