//! Which QEMU processes live, as the kernel says it.
//!
//! A process is named by its id and the moment at which it began, and is held
//! by a pidfd: a later process that gets the same id is never taken for it.
//! What is watched is written down, so that a handler that starts again knows
//! what it knew before; after a reboot it knows that all have ended.

use handover::handler::Qemu;
use handover::ledger;
use handover::record::InstanceId;
use launcher::qemu::{pid_namespace, start_time};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags};
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Processes that are remembered; of those that have ended the oldest go first.
const MAX_WATCHED: usize = 10_000;
/// What is read of the list: more than it can have grown to.
const MAX_LIST: u64 = 16 << 20;

/// The processes that are watched.
#[derive(Debug)]
pub struct Watch {
    path: PathBuf,
    boot: String,
    list: Mutex<List>,
}

#[derive(Debug)]
struct List {
    file: File,
    /// Lines in the file: it is rewritten when it has grown too long.
    lines: usize,
    watched: Vec<Watched>,
}

#[derive(Debug)]
struct Watched {
    process: Process,
    /// None: it has ended.
    descriptor: Option<OwnedFd>,
}

/// One line of the file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Process {
    instance: InstanceId,
    pid: u32,
    start_time: u64,
    boot: String,
}

impl Watch {
    /// The processes that are watched on the host whose folder this is.
    ///
    /// # Errors
    /// Those of the file system, and the kernel's when it gives no descriptor
    /// for a process that lives.
    pub fn open(host: &Path) -> io::Result<Self> {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned();
        let path = host.join("watched");
        let (mut watched, mut known) = (Vec::new(), HashSet::new());
        for process in read(&path)?.into_iter().rev() {
            if known.insert(process.instance.clone()) {
                let descriptor = hold(&process, &boot)?;
                watched.push(Watched { process, descriptor });
            }
        }
        watched.reverse();
        forget(&mut watched);
        let file = write(&path, &watched)?;
        Ok(Self { path, boot, list: Mutex::new(List { file, lines: watched.len(), watched }) })
    }

    /// Watches the process that stands for an instance from now on: first the
    /// launcher's own, then its QEMU's. One that is not the one meant counts as
    /// ended: its id was given to another.
    ///
    /// # Errors
    /// When the process is of another namespace and not seen from this one, the
    /// kernel gives no descriptor for a process that lives, or the list cannot be
    /// written.
    pub fn add(&self, instance: &InstanceId, told: &ledger::Process) -> io::Result<()> {
        let (pid, start_time, boot) = (own_pid(told)?, told.start_time, self.boot.clone());
        let process = Process { instance: instance.clone(), pid, start_time, boot };
        let mut guard = self.lock();
        let list = &mut *guard;
        if list.watched.iter().any(|watched| watched.process == process) {
            return Ok(());
        }
        let descriptor = hold(&process, &self.boot)?;
        // N.B. written first: what is answered is never forgotten.
        list.file.write_all(&line(&process)?)?;
        list.file.sync_data()?;
        list.lines += 1;
        list.watched.retain(|watched| watched.process.instance != *instance);
        list.watched.push(Watched { process, descriptor });
        if list.watched.len() > MAX_WATCHED {
            list.watched.iter_mut().for_each(Watched::look);
            forget(&mut list.watched);
        }
        if list.lines > 2 * MAX_WATCHED {
            list.file = write(&self.path, &list.watched)?;
            list.lines = list.watched.len();
        }
        Ok(())
    }

    /// What is known of an instance's QEMU.
    pub fn qemu_of(&self, instance: &InstanceId) -> Qemu {
        let mut list = self.lock();
        let Some(watched) = list.watched.iter_mut().find(|w| w.process.instance == *instance)
        else {
            return Qemu::Unknown;
        };
        watched.look();
        if watched.descriptor.is_some() { Qemu::Alive } else { Qemu::Ended }
    }

    fn lock(&self) -> MutexGuard<'_, List> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Watched {
    /// Asks the kernel whether it has ended: then its pidfd is readable.
    fn look(&mut self) {
        let Some(descriptor) = &self.descriptor else { return };
        let mut poll = [PollFd::new(descriptor, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        // An error says nothing: then it still lives.
        if let Ok(1..) = rustix::event::poll(&mut poll, Some(&now))
            && poll[0].revents().contains(PollFlags::IN)
        {
            self.descriptor = None;
        }
    }
}

/// A process by the id that it has here: a launcher in a pod knows another one.
///
/// N.B. one of another namespace that is not seen may have ended, or this handler does not see that
/// namespace. It is not said to have ended.
fn own_pid(told: &ledger::Process) -> io::Result<u32> {
    let ledger::Process { pid, start_time: began, namespace } = *told;
    let Some(namespace) = namespace.filter(|there| pid_namespace(None) != Some(*there)) else {
        return Ok(pid);
    };
    let is_meant = |candidate: &u32| {
        pid_namespace(Some(*candidate)) == Some(namespace)
            && innermost_pid(*candidate) == Some(pid)
            && start_time(*candidate) == Some(began)
    };
    let all = std::fs::read_dir("/proc")?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    all.into_iter().find(is_meant).ok_or_else(|| {
        let why = format!(
            "process {pid} of namespace {namespace} is not seen from here: it has ended, or this handler \
             does not share its node's process ids (hostPID)"
        );
        io::Error::new(io::ErrorKind::NotFound, why)
    })
}

/// A process's id in its own namespace: the last of those that it has.
fn innermost_pid(pid: u32) -> Option<u32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
    line.split_whitespace().next_back()?.parse().ok()
}

/// Holds a process, if it is the one that is meant and lives.
fn hold(process: &Process, boot: &str) -> io::Result<Option<OwnedFd>> {
    if process.boot != boot {
        return Ok(None);
    }
    let pid = i32::try_from(process.pid).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| io::Error::other(format!("{} is no process id", process.pid)))?;
    let descriptor = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
        Ok(descriptor) => descriptor,
        Err(rustix::io::Errno::SRCH) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    };
    // N.B. after the descriptor was opened: from here on it names one process.
    let same = start_time(process.pid) == Some(process.start_time);
    Ok(same.then_some(descriptor))
}

/// Forgets what is too much, of those that have ended the oldest first.
fn forget(watched: &mut Vec<Watched>) {
    let mut surplus = watched.len().saturating_sub(MAX_WATCHED);
    watched.retain(|watched| {
        let goes = surplus > 0 && watched.descriptor.is_none();
        surplus -= usize::from(goes);
        !goes
    });
}

fn line(process: &Process) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(process)?;
    line.push(b'\n');
    Ok(line)
}

/// The list of an earlier handler. A line that was cut off is nobody's knowledge.
fn read(path: &Path) -> io::Result<Vec<Process>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let lines = BufReader::new(file.take(MAX_LIST)).split(b'\n');
    lines.filter_map(|line| line.map(|l| serde_json::from_slice(&l).ok()).transpose()).collect()
}

/// Writes the list anew and returns the file, open for what follows.
fn write(path: &Path, watched: &[Watched]) -> io::Result<File> {
    let draft = path.with_extension("new");
    let mut text = Vec::new();
    for watched in watched {
        text.extend(line(&watched.process)?);
    }
    let mut file = File::create(&draft)?;
    file.write_all(&text)?;
    file.sync_all()?;
    std::fs::rename(&draft, path)?;
    OpenOptions::new().append(true).open(path)
}
