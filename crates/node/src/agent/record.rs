//! What is kept of a container's runs: files that outlive the agent, and are all that it knows.
//!
//! ```text
//! PODS/UID/pod.json                       whose folder it is
//!          volumes/VOLUME/                what pods see of their volumes
//!          containers/NAME/root/          the container's `/`
//!                          N.run.json     how its run N is started
//!                          N.started.json by whom: its supervisor. Made once, or never.
//!                          N.child.json   the process that it supervises
//!                          N.exit.json    how it ended
//!                          N.log          what it said
//! ```

use jiff::Timestamp;
use rustix::process::{Pid, Signal};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// No file of ours is larger: what is was not written by us.
const LARGEST: u64 = 4 << 20;

/// How a run is started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// The program, as a path of this machine.
    pub program: PathBuf,
    /// What it is called with.
    pub arguments: Vec<String>,
    /// Its whole environment.
    pub environment: Vec<(String, String)>,
    /// Its working directory.
    pub directory: PathBuf,
    /// What it writes here goes into its last status: the file, and whether the end of its log
    /// stands in for an empty one when it fails.
    pub message: (PathBuf, bool),
    /// How long was waited before it was started, in seconds.
    pub backoff: u64,
}

/// A process, so that another that later has its number is not taken for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its number.
    pub pid: i32,
    /// When it began, in ticks since the machine did.
    pub began: u64,
}

/// Who runs a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Started {
    /// The supervisor; None when the agent gave the run up before it had one.
    pub by: Option<Process>,
    /// When.
    pub at: Timestamp,
}

/// How a container ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// Its exit code; 128 and more for a signal.
    pub code: i32,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// `Completed`, `Error` or what kept it from starting.
    pub reason: String,
    /// What it left to be said.
    pub message: String,
    /// When.
    pub at: Timestamp,
}

impl Process {
    /// The process of a number, if there is one that has not ended.
    pub fn of(pid: i32) -> Option<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name is in parentheses, and may hold anything.
        let mut fields = stat.rsplit_once(") ")?.1.split(' ');
        let state = fields.next()?;
        let began = fields.nth(18)?.parse().ok()?;
        (state != "Z" && state != "X").then_some(Self { pid, began })
    }

    /// This one.
    pub fn own() -> Option<Self> {
        Self::of(i32::try_from(std::process::id()).ok()?)
    }

    /// It still runs.
    pub fn is_alive(self) -> bool {
        Self::of(self.pid) == Some(self)
    }

    /// Sends it a signal; one that has ended gets none.
    pub fn signal(self, signal: Signal) {
        let Some(pid) = Pid::from_raw(self.pid).filter(|_| self.is_alive()) else { return };
        // It may have ended just now.
        let _ = rustix::process::kill_process(pid, signal);
    }
}

/// The files of one run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Files {
    /// The container's folder.
    pub folder: PathBuf,
    /// The run's number: how often it was started before.
    pub attempt: u32,
}

impl Files {
    fn file(&self, what: &str) -> PathBuf {
        self.folder.join(format!("{}.{what}", self.attempt))
    }

    /// What it said.
    pub fn log(&self) -> PathBuf {
        self.file("log")
    }

    /// How it is started.
    pub fn run(&self) -> Option<Run> {
        read(&self.file("run.json"))
    }

    /// By whom it was.
    pub fn started(&self) -> Option<Started> {
        read(&self.file("started.json"))
    }

    /// The container's own process.
    pub fn child(&self) -> Option<Process> {
        read(&self.file("child.json"))
    }

    /// How it ended.
    pub fn exit(&self) -> Option<Exit> {
        read(&self.file("exit.json"))
    }

    /// Says how it is started.
    ///
    /// # Errors
    /// When that cannot be written.
    pub fn write_run(&self, run: &Run) -> io::Result<()> {
        write(&self.file("run.json"), run)
    }

    /// Says which process it is.
    ///
    /// # Errors
    /// When that cannot be written.
    pub fn write_child(&self, child: Process) -> io::Result<()> {
        write(&self.file("child.json"), &child)
    }

    /// Says how it ended.
    ///
    /// # Errors
    /// When that cannot be written.
    pub fn write_exit(&self, exit: &Exit) -> io::Result<()> {
        write(&self.file("exit.json"), exit)
    }

    /// Takes the run: exactly one of all that try does, whenever they do.
    ///
    /// # Errors
    /// `AlreadyExists` when another has it; else when it cannot be written.
    pub fn claim(&self, started: &Started) -> io::Result<()> {
        let by = started.by.map_or(0, |by| by.pid);
        let draft = self.file(&format!("started.{by}.new"));
        write(&draft, started)?;
        let taken = std::fs::hard_link(&draft, self.file("started.json"));
        std::fs::remove_file(&draft)?;
        taken
    }

    /// Removes all that is kept of it.
    pub fn remove(&self) {
        for what in ["run.json", "started.json", "child.json", "exit.json", "log", "log.1"] {
            // What is not there need not go.
            let _ = std::fs::remove_file(self.file(what));
        }
    }

    /// The newest run in a container's folder.
    pub fn newest(folder: &Path) -> Option<Self> {
        let number = |entry: io::Result<std::fs::DirEntry>| -> Option<u32> {
            let name = entry.ok()?.file_name();
            name.to_str()?.strip_suffix(".run.json")?.parse().ok()
        };
        let attempt = std::fs::read_dir(folder).ok()?.filter_map(number).max()?;
        Some(Self { folder: folder.to_owned(), attempt })
    }

    /// The run before it.
    pub fn previous(&self) -> Option<Self> {
        let attempt = self.attempt.checked_sub(1)?;
        Some(Self { folder: self.folder.clone(), attempt })
    }

    /// The run after it.
    pub fn next(&self) -> Self {
        Self { folder: self.folder.clone(), attempt: self.attempt.saturating_add(1) }
    }
}

fn read<T: DeserializeOwned>(path: &Path) -> Option<T> {
    let file = File::open(path).ok()?;
    let mut bytes = Vec::new();
    io::Read::read_to_end(&mut io::Read::take(file, LARGEST), &mut bytes).ok()?;
    serde_json::from_slice(&bytes).ok()
}

/// Writes a file whole or not at all, and makes it last.
///
/// # Errors
/// When it cannot be written.
pub fn write<T: Serialize>(path: &Path, value: &T) -> io::Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(".draft");
    let mut file = File::create(&name)?;
    file.write_all(&serde_json::to_vec(value)?)?;
    file.sync_all()?;
    std::fs::rename(&name, path)?;
    File::open(path.parent().unwrap_or(path))?.sync_all()
}
