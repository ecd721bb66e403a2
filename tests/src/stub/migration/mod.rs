//! Migration: what QMP sets and sees of it. The two ends are [`source`] and
//! [`target`]; statuses change as QEMU 7.2's do, down to the traps.
//!
//! ```text
//! none -> setup -> active -> pre-switchover -> device -> completed
//!           |        |             |             |
//!           +--------+---> failed  +-------------+---> cancelling -> cancelled
//! ```

pub mod source;
mod stream;
pub mod target;

use super::error::Error;
use super::guest::PAGE;
use super::lock;
use super::machine::Machine;
use serde_json::{Map, Value, json};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// A migration's status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Status {
    #[default]
    None,
    Setup,
    Active,
    PreSwitchover,
    Device,
    Completed,
    Failed,
    Cancelling,
    Cancelled,
}

impl Status {
    /// QEMU's word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Setup => "setup",
            Self::Active => "active",
            Self::PreSwitchover => "pre-switchover",
            Self::Device => "device",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelling => "cancelling",
            Self::Cancelled => "cancelled",
        }
    }

    /// Whether a migration is under way.
    pub fn is_running(self) -> bool {
        matches!(
            self,
            Self::Setup | Self::Active | Self::PreSwitchover | Self::Device | Self::Cancelling
        )
    }
}

/// QEMU 7.2's capabilities.
const CAPABILITIES: [&str; 21] = [
    "xbzrle",
    "rdma-pin-all",
    "auto-converge",
    "zero-blocks",
    "compress",
    "events",
    "postcopy-ram",
    "x-colo",
    "release-ram",
    "block",
    "return-path",
    "pause-before-switchover",
    "multifd",
    "dirty-bitmaps",
    "postcopy-blocktime",
    "late-block-activate",
    "x-ignore-shared",
    "validate-uuid",
    "background-snapshot",
    "zero-copy-send",
    "postcopy-preempt",
];

/// The migration away from here; what was set also holds for one to here.
#[derive(Debug)]
pub struct Migration {
    /// Its status.
    pub status: Status,
    capabilities: [bool; CAPABILITIES.len()],
    parameters: Map<String, Value>,
    /// Why it failed.
    error: Option<String>,
    ram: Ram,
    times: Times,
    /// How often `migrate-continue` came and nobody waited: QEMU's semaphore.
    posts: u32,
    /// Whether a thread has it in hand: QEMU's yank instance.
    in_hand: bool,
    vm_was_running: bool,
    block_inactive: bool,
}

/// What `query-migrate` says of the memory.
#[derive(Debug, Default)]
struct Ram {
    total: u64,
    left: u64,
    normal: u64,
    zero: u64,
    transferred: u64,
    multifd: u64,
    precopy: u64,
    downtime: u64,
    passes: u64,
    dirty_rate: u64,
}

#[derive(Debug, Default)]
struct Times {
    begun: Option<Instant>,
    setup: Duration,
    stopped: Option<Instant>,
    downtime: Duration,
    total: Duration,
    /// What QEMU thinks that the pause would be.
    expected: Duration,
}

impl Default for Migration {
    fn default() -> Self {
        let parameters = json!({
            "announce-initial": 50, "announce-max": 550, "announce-rounds": 5,
            "announce-step": 100, "compress-level": 1, "compress-threads": 8,
            "compress-wait-thread": true, "decompress-threads": 2,
            "throttle-trigger-threshold": 50, "cpu-throttle-initial": 20,
            "cpu-throttle-increment": 10, "cpu-throttle-tailslow": false, "tls-creds": "",
            "tls-hostname": "", "tls-authz": "", "max-bandwidth": 134_217_728u64,
            "downtime-limit": 300, "x-checkpoint-delay": 20000, "block-incremental": false,
            "multifd-channels": 2, "xbzrle-cache-size": 67_108_864u64,
            "max-postcopy-bandwidth": 0, "max-cpu-throttle": 99, "multifd-compression": "none",
            "multifd-zlib-level": 1, "multifd-zstd-level": 1,
        });
        Self {
            status: Status::None,
            capabilities: [false; CAPABILITIES.len()],
            parameters: parameters.as_object().cloned().unwrap_or_default(),
            error: None,
            ram: Ram::default(),
            times: Times::default(),
            posts: 0,
            in_hand: false,
            vm_was_running: false,
            block_inactive: false,
        }
    }
}

impl Migration {
    /// Whether a capability is on.
    pub fn has(&self, capability: &str) -> bool {
        let index = CAPABILITIES.iter().position(|name| *name == capability);
        index.is_some_and(|index| self.capabilities[index])
    }

    /// `query-migrate-capabilities`.
    pub fn capabilities(&self) -> Value {
        let one = |(name, state)| json!({"capability": name, "state": state});
        CAPABILITIES.iter().zip(self.capabilities).map(one).collect()
    }

    /// `migrate-set-capabilities`.
    ///
    /// # Errors
    /// While a migration is under way.
    pub fn set_capabilities(&mut self, all: &[Value]) -> Result<(), Error> {
        if self.status.is_running() {
            return Err(Error::generic("There's a migration process in progress"));
        }
        for one in all {
            let index = CAPABILITIES.iter().position(|name| one["capability"] == *name);
            if let Some(index) = index {
                self.capabilities[index] = one["state"] == true;
            }
        }
        Ok(())
    }

    /// `query-migrate-parameters`.
    pub fn parameters(&self) -> Value {
        self.parameters.clone().into()
    }

    /// `migrate-set-parameters`.
    ///
    /// # Errors
    /// As QEMU, for values out of range; then nothing is set.
    pub fn set_parameters(&mut self, given: &Map<String, Value>) -> Result<(), Error> {
        for (name, value) in given {
            let number = value.as_u64();
            let refuse = |what: &str| {
                let name = name.replace('-', "_");
                Err(Error::generic(format!("Parameter '{name}' expects {what}")))
            };
            match (name.as_str(), number) {
                ("multifd-channels" | "multifd-zstd-level" | "multifd-zlib-level", Some(256..)) => {
                    let text = format!("Parameter '{name}' expects uint8_t");
                    return Err(Error::generic(text));
                }
                ("multifd-channels", Some(0)) => return refuse("a value between 1 and 255"),
                ("downtime-limit", Some(2_000_001..)) => {
                    return refuse("an integer in the range of 0 to (2000 * 1000) ms");
                }
                ("announce-rounds", Some(1001..)) => return refuse("a value between 0 and 1000"),
                _ => {}
            }
        }
        self.parameters.extend(given.clone());
        Ok(())
    }

    fn number(&self, parameter: &str) -> u64 {
        // A negative size is, to QEMU, a very large one.
        self.parameters.get(parameter).map_or(0, |value| value.as_u64().unwrap_or(u64::MAX))
    }

    /// Lets a migration that waits before the switchover go on.
    pub fn release(&mut self) {
        self.posts += 1;
    }
}

/// The migration to here.
#[derive(Debug)]
pub struct Incoming {
    status: Status,
    /// Whether `-incoming` was given.
    wanted: bool,
    begun: bool,
    /// Where it listens, until it is done.
    path: Option<String>,
}

impl Incoming {
    /// Nothing came yet.
    pub fn new(wanted: bool) -> Self {
        Self { status: Status::None, wanted, begun: false, path: None }
    }
}

/// The connections of the migration that is under way.
#[derive(Default)]
pub struct Streams {
    all: Mutex<Vec<UnixStream>>,
}

impl Streams {
    fn set(&self, streams: Vec<UnixStream>) {
        *lock(&self.all) = streams;
    }

    /// Whether there are any.
    pub fn is_open(&self) -> bool {
        !lock(&self.all).is_empty()
    }

    /// Cuts them; whoever uses them fails at once.
    pub fn cut(&self) {
        for stream in lock(&self.all).iter() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

/// `query-migrate`.
pub fn query(machine: &Machine) -> Value {
    let mut all = json!({});
    if let Some(path) = &machine.incoming.path {
        all["socket-address"] = json!([{"type": "unix", "path": path}]);
    }
    let migration = &machine.migration;
    match (machine.incoming.status, migration.status) {
        (Status::None | Status::Setup, Status::None) => return all,
        (incoming, Status::None) => {
            all["status"] = incoming.name().into();
            return all;
        }
        (_, status) => all["status"] = status.name().into(),
    }
    let times = &migration.times;
    let ms = |time: Duration| Value::from(time.as_millis() as u64);
    match migration.status {
        Status::Failed => {
            if let Some(error) = &migration.error {
                all["error-desc"] = error.clone().into();
            }
        }
        Status::Completed => {
            all["setup-time"] = ms(times.setup);
            all["downtime"] = ms(times.downtime);
            all["total-time"] = ms(times.total);
            all["ram"] = migration.ram.query(times.total);
        }
        Status::Active | Status::PreSwitchover | Status::Device | Status::Cancelling => {
            let total = times.begun.map_or(Duration::ZERO, |begun| begun.elapsed());
            all["setup-time"] = ms(times.setup);
            all["expected-downtime"] = ms(times.expected);
            all["total-time"] = ms(total);
            all["ram"] = migration.ram.query(total);
        }
        _ => {}
    }
    all
}

impl Ram {
    fn query(&self, time: Duration) -> Value {
        let seconds = time.as_secs_f64().max(0.001);
        json!({
            "total": self.total, "remaining": self.left, "transferred": self.transferred,
            "normal": self.normal, "normal-bytes": self.normal * PAGE as u64,
            "duplicate": self.zero, "skipped": 0, "page-size": PAGE,
            "dirty-sync-count": self.passes, "dirty-sync-missed-zero-copy": 0,
            "dirty-pages-rate": self.dirty_rate, "multifd-bytes": self.multifd,
            "precopy-bytes": self.precopy, "downtime-bytes": self.downtime, "postcopy-bytes": 0,
            "postcopy-requests": 0, "mbps": self.transferred as f64 * 8e-6 / seconds,
            "pages-per-second": ((self.normal + self.zero) as f64 / seconds) as u64,
        })
    }
}
