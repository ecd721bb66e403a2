//! What the user asks of a move.

use mover::codec::Compression;
use serde::{Deserialize, Serialize};

/// How a move is to be made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Policy {
    /// Limit on disks and memory together, bytes per second; None is none.
    pub bandwidth: Option<u64>,
    /// Whether disks are compressed on the way; by Zstandard, memory is too.
    pub compression: Compression,
    /// Whether a guest that cannot be caught is stopped until it is through.
    pub disrupt: bool,
    /// Pauses and throttling.
    pub rounds: mover::rounds::Policy,
    /// Disk streams.
    pub disk_streams: u16,
    /// QEMU's additional memory channels; 0 is none.
    pub multifd: u8,
    /// Seconds that a lost link may take to come back.
    pub reconnect_seconds: f64,
    /// Seconds for an answer of the other launcher, of QEMU or of a handler.
    pub answer_seconds: f64,
    /// Seconds without any progress before copying is given up.
    pub stall_seconds: f64,
    /// Seconds that the guest may stand still before the switchover is given up.
    pub pause_seconds: f64,
    /// Seconds after which an undecided owner record is called doubt.
    pub commit_seconds: f64,
    /// Times that the memory is sent again because the disks' last delta was too large.
    pub memory_retries: u32,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            bandwidth: None,
            compression: Compression::Auto,
            disrupt: false,
            rounds: mover::rounds::Policy::default(),
            disk_streams: 2,
            multifd: memory_channels(),
            reconnect_seconds: 30.0,
            answer_seconds: 30.0,
            stall_seconds: 60.0,
            pause_seconds: 30.0,
            commit_seconds: 30.0,
            memory_retries: 2,
        }
    }
}

/// As many additional memory channels as there are cores to fill them, up to four:
/// one thread of QEMU's cannot fill a fast link.
fn memory_channels() -> u8 {
    std::thread::available_parallelism().map_or(0, |cores| cores.get().min(4) as u8)
}

impl Policy {
    /// Checks the numbers.
    ///
    /// # Errors
    /// All that is wrong, for a person.
    pub fn validate(&self) -> Result<(), String> {
        let mut faults = Vec::new();
        if !(1..=super::offer::MAX_DISK_STREAMS).contains(&self.disk_streams) {
            faults.push(format!("disk_streams must be 1 to {}", super::offer::MAX_DISK_STREAMS));
        }
        if self.multifd > super::offer::MAX_MULTIFD {
            faults.push(format!("multifd must be at most {}", super::offer::MAX_MULTIFD));
        }
        if self.rounds.downtime_ms > self.rounds.max_downtime_ms {
            faults.push("downtime_ms must not exceed max_downtime_ms".to_owned());
        }
        let times = [
            ("reconnect_seconds", self.reconnect_seconds),
            ("answer_seconds", self.answer_seconds),
            ("stall_seconds", self.stall_seconds),
            ("pause_seconds", self.pause_seconds),
            ("commit_seconds", self.commit_seconds),
        ];
        for (name, value) in times {
            if !(0.1..=86_400.0).contains(&value) {
                faults.push(format!("{name} must be 0.1 to 86400"));
            }
        }
        if faults.is_empty() { Ok(()) } else { Err(faults.join("; ")) }
    }

    /// How long a kind of wait may take.
    pub fn deadline(&self, kind: handover::Deadline) -> std::time::Duration {
        std::time::Duration::from_secs_f64(match kind {
            handover::Deadline::Answer => self.answer_seconds,
            handover::Deadline::Data => self.stall_seconds,
            handover::Deadline::Pause => self.pause_seconds,
            handover::Deadline::Ledger | handover::Deadline::Decision => self.commit_seconds,
        })
    }
}
