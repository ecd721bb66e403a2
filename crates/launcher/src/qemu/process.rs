//! QEMU as a process that never outlives its launcher.

use super::Config;
use super::log::{Log, Words};
use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};
use std::ffi::OsString;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;
use tokio::sync::{mpsc, watch};

/// What QEMU said before its end is in the pipe already.
const LAST_WORDS_DEADLINE: Duration = Duration::from_secs(1);

/// Why QEMU could not be started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The program could not be run.
    #[error("cannot run {program}; install QEMU (qemu-system-x86) or set GODWIT_QEMU to its path")]
    Run {
        /// The program.
        program: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The launcher's folder does not take what QEMU needs.
    #[error(transparent)]
    Folder(#[from] crate::folder::Error),
    /// It ended before it was ready.
    #[error("QEMU ended before it was ready ({exit}): {words}")]
    Ended {
        /// How.
        exit: Exit,
        /// What it said last.
        words: String,
    },
    /// It does not know the machine type.
    #[error(
        "{program} does not know machine type {machine}; install a QEMU that does, or start the VM \
         anew with a machine type that all its hosts know"
    )]
    Machine {
        /// The program.
        program: String,
        /// The machine type.
        machine: String,
    },
    /// It does not tell what its machine types are.
    #[error("QEMU does not tell its machine types")]
    Machines(#[source] qmp::Error),
    /// It runs but does not answer.
    #[error("QEMU runs but cannot be spoken to; it said: '{words}'")]
    Mute {
        /// What it said last.
        words: String,
        /// What failed.
        #[source]
        source: qmp::connect::Error,
    },
    /// It is too old.
    #[error("{program} is QEMU {version}; install {oldest} or later, or set GODWIT_QEMU")]
    Old {
        /// The program.
        program: String,
        /// Its version.
        version: String,
        /// The oldest that will do.
        oldest: String,
    },
}

/// How QEMU ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Exit {
    status: Option<ExitStatus>,
    asked: bool,
}

impl Exit {
    /// It ended by its own decision, without an error.
    pub fn is_clean(&self) -> bool {
        self.status.is_some_and(|status| status.success())
    }

    /// [`Process::kill`] ended it.
    pub fn is_asked(&self) -> bool {
        self.asked
    }
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.status {
            Some(status) => status.fmt(f),
            None => f.write_str("status unknown"),
        }
    }
}

/// A running QEMU. Ended when the last handle is dropped.
#[derive(Debug, Clone)]
pub struct Process {
    pid: u32,
    program: PathBuf,
    kill: mpsc::Sender<()>,
    exit: watch::Receiver<Option<Exit>>,
    words: Words,
}

/// The body of the hidden `exec` command: becomes `argv`, tied to the life of
/// the process `parent` that started it.
///
/// # Errors
/// Why it could not.
pub fn shim(parent: u32, argv: &[OsString]) -> io::Error {
    let Some((program, arguments)) = argv.split_first() else {
        return io::Error::new(io::ErrorKind::InvalidInput, "no program to run");
    };
    if let Err(errno) = set_parent_process_death_signal(Some(Signal::KILL)) {
        return errno.into();
    }
    // N.B. after the request: a parent that died before it sends no signal.
    if getppid().map(|pid| pid.as_raw_nonzero().get()) != i32::try_from(parent).ok() {
        return io::Error::new(io::ErrorKind::NotFound, "the launcher is gone");
    }
    std::process::Command::new(program).args(arguments).exec()
}

impl Process {
    /// Starts QEMU through the shim, in the launcher's folder.
    ///
    /// N.B. to be called from a thread that lives as long as the launcher: the
    /// kernel sends the death signal when the *thread* ends.
    ///
    /// # Errors
    /// [`Error::Run`], [`Error::Folder`].
    pub fn start(config: &Config, arguments: &[OsString]) -> Result<Self, Error> {
        let fail = |source| Error::Run { program: config.program.display().to_string(), source };
        let empty = || io::Error::new(io::ErrorKind::InvalidInput, "no shim is configured");
        let (first, rest) = config.shim.split_first().ok_or_else(empty).map_err(fail)?;
        let program = find(&config.program).map_err(fail)?;
        let mut log = Log::open(&config.folder)?;
        log.write(line_of(&program, arguments).as_bytes());
        let mut child = tokio::process::Command::new(first)
            .args(rest)
            .args(["--parent", &std::process::id().to_string(), "--"])
            .arg(&program)
            .args(arguments)
            .current_dir(&config.folder)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(fail)?;
        let pid = child.id().unwrap_or_default();
        let words = Words::default();
        let hearing =
            child.stderr.take().map(|stderr| tokio::spawn(words.clone().hear(stderr, log)));
        let (kill, killed) = mpsc::channel(1);
        let (ended, exit) = watch::channel(None);
        tokio::spawn(async move {
            let exit = run(&mut child, killed).await;
            if let Some(hearing) = hearing {
                let _ = tokio::time::timeout(LAST_WORDS_DEADLINE, hearing).await;
            }
            ended.send_replace(Some(exit));
        });
        Ok(Self { pid, program, kill, exit, words })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// What it runs.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// How it ended, if it did.
    pub fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Waits for its end.
    pub async fn ended(&self) -> Exit {
        let mut exit = self.exit.clone();
        match exit.wait_for(Option::is_some).await {
            Ok(value) => value.unwrap_or_default(),
            Err(_) => Exit::default(),
        }
    }

    /// Ends it at once and waits until it has.
    pub async fn kill(&self) -> Exit {
        // A full queue: somebody else has asked already.
        let _ = self.kill.try_send(());
        self.ended().await
    }

    /// What it said last on stderr, at most 4 KiB.
    pub fn last_words(&self) -> String {
        self.words.last()
    }
}

/// Until it ends by itself, it is asked for, or the last handle is gone.
async fn run(child: &mut tokio::process::Child, mut killed: mpsc::Receiver<()>) -> Exit {
    tokio::select! {
        status = child.wait() => Exit { status: status.ok(), asked: false },
        _ = killed.recv() => {
            // It may have ended by itself: that is the aim.
            let _ = child.start_kill();
            Exit { status: child.wait().await.ok(), asked: true }
        }
    }
}

/// Where a program is: the shim could say only in QEMU's stead that it is nowhere.
fn find(program: &Path) -> io::Result<PathBuf> {
    let is_program = |path: &PathBuf| {
        rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok() && path.is_file()
    };
    let missing = || io::Error::new(io::ErrorKind::NotFound, "there is no such program");
    if program.components().count() > 1 {
        let path = std::path::absolute(program)?;
        return Some(path).filter(is_program).ok_or_else(missing);
    }
    let folders = std::env::var_os("PATH").unwrap_or_default();
    let mut paths = std::env::split_paths(&folders).map(|folder| folder.join(program));
    paths.find(is_program).ok_or_else(missing)
}

fn line_of(program: &Path, arguments: &[OsString]) -> String {
    let arguments: Vec<_> =
        arguments.iter().map(|a| format!("'{}'", a.to_string_lossy())).collect();
    format!("{} {}\n", program.display(), arguments.join(" "))
}

/// The kernel's number of the namespace of process ids in which a process, or this one, runs.
pub fn pid_namespace(pid: Option<u32>) -> Option<u64> {
    let process = pid.map_or_else(|| "self".to_owned(), |pid| pid.to_string());
    Some(std::fs::metadata(format!("/proc/{process}/ns/pid")).ok()?.ino())
}

/// The moment at which a process began, as the kernel counts it: with it a
/// process id names one process for ever.
pub fn start_time(pid: u32) -> Option<u64> {
    Pid::from_raw(i32::try_from(pid).ok()?)?;
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name may hold anything, even brackets: fields are counted from its last one.
    let after_name = stat.get(stat.rfind(')')? + 2..)?;
    after_name.split(' ').nth(19)?.parse().ok()
}
