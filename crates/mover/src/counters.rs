//! What a move's data path has done so far, and what holds it back.

use serde::{Deserialize, Serialize};

/// Running totals of the source's side of the disk streams.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Bytes of disk that were ever asked for (a byte of two rounds counts twice).
    pub asked: u64,
    /// Of those, bytes that are safe at the target.
    pub safe: u64,
    /// Bytes of disk read at the source.
    pub read: u64,
    /// Bytes handed to the streams, after compression, heads included.
    pub sent: u64,
    /// Bytes that had to be sent again after a stream broke.
    pub again: u64,
    /// How often a stream that had broken went on.
    pub resumes: u64,
    /// Time that all streams spent reading the source, nanoseconds.
    pub read_ns: u64,
    /// … hashing and compressing.
    pub cpu_ns: u64,
    /// … waiting for the link to take bytes, or for the rate limit.
    pub wire_ns: u64,
    /// … waiting for acknowledgements because the window was full.
    pub window_ns: u64,
    /// … with nothing to send.
    pub idle_ns: u64,
    /// Time that the target spent writing and syncing, all streams.
    pub target_ns: u64,
}

impl Counters {
    /// What happened since `before`.
    pub fn since(&self, before: &Counters) -> Counters {
        Counters {
            asked: self.asked - before.asked,
            safe: self.safe - before.safe,
            read: self.read - before.read,
            sent: self.sent - before.sent,
            again: self.again - before.again,
            resumes: self.resumes - before.resumes,
            read_ns: self.read_ns - before.read_ns,
            cpu_ns: self.cpu_ns - before.cpu_ns,
            wire_ns: self.wire_ns - before.wire_ns,
            window_ns: self.window_ns - before.window_ns,
            idle_ns: self.idle_ns - before.idle_ns,
            target_ns: self.target_ns.saturating_sub(before.target_ns),
        }
    }

    /// What held the streams back most, in a span of counters. None when they had nothing to do.
    pub fn limit(&self) -> Option<Limit> {
        let waited = self.wire_ns + self.window_ns;
        let busy = self.read_ns + self.cpu_ns + waited;
        if busy == 0 || self.idle_ns > 4 * busy {
            return None;
        }
        // A target that writes most of the time makes the link and the window look full.
        let (wire, window) = match self.target_ns > busy * 7 / 10 {
            true => (0, 0),
            false => (self.wire_ns, self.window_ns),
        };
        let shares = [
            (Limit::SourceRead, self.read_ns),
            (Limit::Cpu, self.cpu_ns),
            (Limit::Wire, wire),
            (Limit::Window, window),
            (Limit::TargetWrite, waited - wire - window),
        ];
        shares.into_iter().max_by_key(|(_, ns)| *ns).map(|(limit, _)| limit)
    }
}

/// What limits a move at this moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Limit {
    /// The link, or the rate limit that was asked for.
    Wire,
    /// Reading the source's disk.
    SourceRead,
    /// Writing the target's disk.
    TargetWrite,
    /// Hashing and compressing.
    Cpu,
    /// The bytes allowed on their way: a long link that was just opened.
    Window,
    /// The guest writes as fast as the link carries.
    GuestDirtyRate,
}

impl std::fmt::Display for Limit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Limit::Wire => "wire",
            Limit::SourceRead => "source-read",
            Limit::TargetWrite => "target-write",
            Limit::Cpu => "cpu",
            Limit::Window => "window",
            Limit::GuestDirtyRate => "guest-dirty-rate",
        })
    }
}
