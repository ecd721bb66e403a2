//! The machine that all threads share: run states, starting, stopping, ending.
//!
//! [`Qemu::lock`] is QEMU's big lock: a command runs under it, and so does the
//! switchover. Below it may be taken, in this order: the exports, the graph. The
//! guest's thread takes the graph alone.

use super::block::Graph;
use super::chardev::Chardev;
use super::error::Error;
use super::export::Exports;
use super::guest;
use super::lock;
use super::migration::{Incoming, Migration, Status, Streams};
use super::qmp::Monitors;
use super::schema::Schema;
use serde_json::{Value, json};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// The state of the machine, as `query-status` names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunState {
    Prelaunch,
    Inmigrate,
    Running,
    Paused,
    FinishMigrate,
    Postmigrate,
    Shutdown,
}

impl RunState {
    const ALL: [Self; 7] = [
        Self::Prelaunch,
        Self::Inmigrate,
        Self::Running,
        Self::Paused,
        Self::FinishMigrate,
        Self::Postmigrate,
        Self::Shutdown,
    ];

    /// QEMU's word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prelaunch => "prelaunch",
            Self::Inmigrate => "inmigrate",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::FinishMigrate => "finish-migrate",
            Self::Postmigrate => "postmigrate",
            Self::Shutdown => "shutdown",
        }
    }

    /// The state of this name.
    pub fn by_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.name() == name)
    }
}

/// What is put off until the command at hand is answered.
pub type BottomHalf = Box<dyn FnOnce(&Qemu) + Send>;

/// What the big lock guards.
pub struct Machine {
    /// What it does.
    pub state: RunState,
    /// Whether a guest that comes in runs at once.
    pub autostart: bool,
    /// The migration away from here.
    pub migration: Migration,
    /// The migration to here.
    pub incoming: Incoming,
    /// The seconds for which dirty pages were counted, once they were.
    pub counted: Option<i64>,
    /// In this order.
    pub bottom_halves: Vec<BottomHalf>,
    run_lock: RunLock,
}

/// All of the stub.
pub struct Qemu {
    /// The block graph.
    pub graph: Arc<Mutex<Graph>>,
    /// The guest.
    pub guest: guest::Handle,
    /// KiB of memory that `-m` asked for.
    pub asked_memory: u64,
    /// MiB of memory that the guest really has.
    pub memory: u64,
    /// How many vCPUs to tell of.
    pub cpus: u64,
    /// Whether a guest's shutdown leaves the process.
    pub no_shutdown: bool,
    /// Whoever hears events.
    pub monitors: Monitors,
    /// What QMP consists of.
    pub schema: Schema,
    /// The NBD server.
    pub exports: Mutex<Exports>,
    /// Rings when an export has lost a client.
    pub exports_changed: Condvar,
    /// The migration's connections, to be cut without the big lock.
    pub streams: Streams,
    /// Chardevs by id, for `query-chardev`.
    pub chardevs: Vec<(String, String)>,
    /// Sockets to be removed at the end.
    pub sockets: Vec<String>,
    machine: Mutex<Machine>,
    changed: Condvar,
}

/// The parts of a [`Qemu`] that the command line decides.
pub struct Parts {
    pub graph: Arc<Mutex<Graph>>,
    pub guest: guest::Handle,
    pub asked_memory: u64,
    pub memory: u64,
    pub cpus: u64,
    pub no_shutdown: bool,
    pub chardevs: Vec<(String, String)>,
    pub sockets: Vec<String>,
    pub autostart: bool,
    pub incoming: bool,
}

impl Qemu {
    /// A machine that stands still.
    pub fn new(parts: Parts) -> Self {
        let state = if parts.incoming { RunState::Inmigrate } else { RunState::Prelaunch };
        let machine = Machine {
            state,
            autostart: parts.autostart,
            migration: Migration::default(),
            incoming: Incoming::new(parts.incoming),
            counted: None,
            bottom_halves: Vec::new(),
            run_lock: RunLock::from_environment(),
        };
        Self {
            graph: parts.graph,
            guest: parts.guest,
            asked_memory: parts.asked_memory,
            memory: parts.memory,
            cpus: parts.cpus,
            no_shutdown: parts.no_shutdown,
            monitors: Monitors::default(),
            schema: Schema::load(),
            exports: Mutex::default(),
            exports_changed: Condvar::new(),
            streams: Streams::default(),
            chardevs: parts.chardevs,
            sockets: parts.sockets,
            machine: Mutex::new(machine),
            changed: Condvar::new(),
        }
    }

    /// The big lock.
    pub fn lock(&self) -> MutexGuard<'_, Machine> {
        lock(&self.machine)
    }

    /// Gives the big lock up until [`Qemu::wake`], or for `most`.
    pub fn wait<'a>(
        &self,
        machine: MutexGuard<'a, Machine>,
        most: Duration,
    ) -> MutexGuard<'a, Machine> {
        self.changed.wait_timeout(machine, most).unwrap_or_else(PoisonError::into_inner).0
    }

    /// Wakes whoever waits for a change of the machine.
    pub fn wake(&self) {
        self.changed.notify_all();
    }

    /// Lets the guest run.
    pub fn start(&self, machine: &mut Machine) {
        if machine.state == RunState::Running {
            return;
        }
        machine.run_lock.take();
        machine.state = RunState::Running;
        self.monitors.event("RESUME", None);
        self.guest.with(guest::Guest::resume);
    }

    /// Stops the guest if it runs. Its writes are on disk when this returns.
    pub fn stop(&self, machine: &mut Machine, state: RunState) {
        if machine.state != RunState::Running {
            return;
        }
        self.guest.with(guest::Guest::pause);
        machine.state = state;
        machine.run_lock.release();
        self.monitors.event("STOP", None);
        self.flush();
    }

    fn flush(&self) {
        let files: Vec<_> = {
            let graph = lock(&self.graph);
            (0..graph.disks()).filter_map(|disk| graph.file(disk)).collect()
        };
        for file in files {
            if let Err(error) = file.sync_data() {
                eprintln!("stub-qemu: cannot flush a disk: {error}");
            }
        }
    }

    /// `cont`.
    ///
    /// # Errors
    /// As QEMU.
    pub fn cont(&self, machine: &mut Machine) -> Result<(), Error> {
        match machine.state {
            RunState::Shutdown => {
                return Err(Error::generic("Resetting the Virtual Machine is required"));
            }
            RunState::FinishMigrate => {
                return Err(Error::generic("Migration is not finalized yet"));
            }
            _ => {}
        }
        lock(&self.graph).activate()?;
        if machine.state == RunState::Inmigrate {
            // N.B. QEMU asks for the images already now, but keeps them only once the guest runs.
            lock(&self.graph).inactivate();
            machine.autostart = true;
        } else {
            self.start(machine);
        }
        Ok(())
    }

    /// The guest has shut itself down.
    pub fn guest_shut_down(&self) {
        let mut machine = self.lock();
        let data = json!({"guest": true, "reason": "guest-shutdown"});
        self.monitors.event("SHUTDOWN", Some(data));
        if self.no_shutdown {
            self.stop(&mut machine, RunState::Shutdown);
        } else {
            self.end(0);
        }
    }

    /// Ends the process for a reason of the host's.
    pub fn quit(&self, reason: &str) -> ! {
        self.monitors.event("SHUTDOWN", Some(json!({"guest": false, "reason": reason})));
        self.end(0)
    }

    /// Ends the process.
    pub fn end(&self, code: i32) -> ! {
        for socket in &self.sockets {
            let _ = std::fs::remove_file(socket);
        }
        std::process::exit(code)
    }

    /// `query-status`.
    pub fn status(machine: &Machine) -> Value {
        let running = machine.state == RunState::Running;
        json!({"status": machine.state.name(), "singlestep": false, "running": running})
    }

    /// Changes the status of the migration away if it is `from`; tells whether it was.
    pub fn set_status(&self, machine: &mut Machine, from: Status, to: Status) -> bool {
        let holds = machine.migration.status == from;
        if holds {
            machine.migration.status = to;
            self.tell_status(machine, to);
            self.wake();
        }
        holds
    }

    /// Sends the event `MIGRATION`, if events were asked for.
    pub fn tell_status(&self, machine: &Machine, status: Status) {
        if machine.migration.has("events") {
            let data = json!({"status": status.name()});
            self.monitors.event("MIGRATION", Some(data));
        }
    }

    /// Connects the guest's serial lines.
    pub fn connect_serials(&self, console: Chardev, line: Chardev) {
        self.guest.connect(console, line);
    }
}

/// Proves that two instances of a guest never run at once: a lock that every
/// instance holds while it runs. Whoever cannot have it at once says so in a file.
struct RunLock {
    path: Option<PathBuf>,
    held: Option<File>,
}

impl RunLock {
    fn from_environment() -> Self {
        Self { path: std::env::var_os("STUB_QEMU_RUN_LOCK").map(PathBuf::from), held: None }
    }

    fn take(&mut self) {
        let Some(path) = &self.path else { return };
        let held = OpenOptions::new().create(true).append(true).open(path).and_then(|file| {
            file.try_lock()?;
            Ok(file)
        });
        match held {
            Ok(file) => self.held = Some(file),
            Err(error) => self.violated(path.clone(), &error),
        }
    }

    fn violated(&self, mut path: PathBuf, error: &std::io::Error) {
        path.as_mut_os_string().push(".violation");
        let folder = std::env::current_dir().unwrap_or_default();
        let line = format!(
            "process {} in {} runs beside another: {error}\n",
            std::process::id(),
            folder.display()
        );
        let file = OpenOptions::new().create(true).append(true).open(&path);
        if let Err(error) = file.and_then(|mut file| file.write_all(line.as_bytes())) {
            eprintln!("stub-qemu: cannot write {}: {error}; {line}", path.display());
        }
    }

    fn release(&mut self) {
        self.held = None;
    }
}
