//! QEMU as a process that never outlives its launcher.

use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};
use std::collections::VecDeque;
use std::ffi::OsString;
use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::io::AsyncReadExt;
use tokio::sync::{mpsc, watch};

/// The last words of QEMU that are kept for error messages.
const LAST_WORDS: usize = 4096;
/// The most that one QEMU may write into its log.
const MAX_LOG: u64 = 1 << 20;

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
    /// It ended before it was ready.
    #[error("QEMU ended before it was ready ({exit}): {words}")]
    Ended {
        /// How.
        exit: Exit,
        /// What it said last.
        words: String,
    },
    /// It runs but does not answer.
    #[error("QEMU does not answer on its QMP socket: {why}; it said: {words}")]
    Mute {
        /// What failed.
        why: String,
        /// What it said last.
        words: String,
    },
}

/// How QEMU ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit(Option<ExitStatus>);

impl Exit {
    /// It ended by its own decision, without an error.
    pub fn is_clean(&self) -> bool {
        self.0.is_some_and(|status| status.success())
    }
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some(status) => status.fmt(f),
            None => f.write_str("status unknown"),
        }
    }
}

/// A running QEMU. Ended when the last handle is dropped.
#[derive(Debug, Clone)]
pub struct Process {
    pid: u32,
    kill: mpsc::Sender<()>,
    exit: watch::Receiver<Option<Exit>>,
    words: Arc<Mutex<VecDeque<u8>>>,
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
    /// Starts `program` through `shim` (a command that ends in [`shim`]) in `folder`.
    ///
    /// N.B. to be called from a thread that lives as long as the launcher: the
    /// kernel sends the death signal when the *thread* ends.
    ///
    /// # Errors
    /// [`Error::Run`].
    pub fn start(
        shim: &[OsString],
        program: &Path,
        arguments: &[OsString],
        folder: &Path,
    ) -> Result<Self, Error> {
        let fail = |source| Error::Run { program: program.display().to_string(), source };
        let empty = || io::Error::new(io::ErrorKind::InvalidInput, "no shim is configured");
        let (first, rest) = shim.split_first().ok_or_else(empty).map_err(fail)?;
        let mut child = tokio::process::Command::new(first)
            .args(rest)
            .args(["--parent", &std::process::id().to_string(), "--"])
            .arg(program)
            .args(arguments)
            .current_dir(folder)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(fail)?;
        let pid = child.id().unwrap_or_default();
        let (kill, mut killed) = mpsc::channel(1);
        let (ended, exit) = watch::channel(None);
        let words = Arc::new(Mutex::new(VecDeque::new()));
        let stderr = child.stderr.take();
        let log = tokio::spawn(keep_words(stderr, words.clone(), folder.join("qemu.log")));
        tokio::spawn(async move {
            let status = tokio::select! {
                status = child.wait() => status,
                // A request, or the last handle is gone.
                _ = killed.recv() => {
                    // It may have ended by itself: that is the aim.
                    let _ = child.start_kill();
                    child.wait().await
                }
            };
            let _ = log.await;
            ended.send_replace(Some(Exit(status.ok())));
        });
        Ok(Self { pid, kill, exit, words })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// How it ended, if it did.
    pub fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Waits for its end.
    pub async fn ended(&self) -> Exit {
        let mut exit = self.exit.clone();
        match exit.wait_for(Option::is_some).await {
            Ok(value) => value.unwrap_or(Exit(None)),
            Err(_) => Exit(None),
        }
    }

    /// Ends it at once and waits until it has.
    pub async fn kill(&self) -> Exit {
        // A full queue: somebody else has asked already.
        let _ = self.kill.try_send(());
        self.ended().await
    }

    /// What it said last on stderr.
    pub fn last_words(&self) -> String {
        let words = self.words.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes: Vec<u8> = words.iter().copied().collect();
        String::from_utf8_lossy(&bytes).trim().to_owned()
    }
}

async fn keep_words(
    stderr: Option<tokio::process::ChildStderr>,
    words: Arc<Mutex<VecDeque<u8>>>,
    log: PathBuf,
) {
    let Some(mut stderr) = stderr else { return };
    // Without a log the last words are still kept.
    let mut file = std::fs::File::create(log).ok();
    let (mut written, mut buffer) = (0u64, vec![0; 4096]);
    while let Ok(n @ 1..) = stderr.read(&mut buffer).await {
        if written < MAX_LOG
            && let Some(file) = &mut file
        {
            let _ = file.write_all(&buffer[..n]);
            written += n as u64;
        }
        let mut words = words.lock().unwrap_or_else(PoisonError::into_inner);
        words.extend(&buffer[..n]);
        let excess = words.len().saturating_sub(LAST_WORDS);
        words.drain(..excess);
    }
}

/// The moment at which a process began, as the kernel counts it: with it a
/// process id names one process for ever.
pub fn start_time(pid: u32) -> Option<u64> {
    Pid::from_raw(i32::try_from(pid).ok()?)?;
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name may hold anything, even brackets: fields are counted from its last one.
    let after_name = &stat[stat.rfind(')')? + 2..];
    after_name.split(' ').nth(19)?.parse().ok()
}
