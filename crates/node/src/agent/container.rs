//! One container on this machine: started, seen, ended.

use super::images::Image;
use super::machine::{Contained, State};
use super::probes::{Asked, Health};
use super::record::{Exit, Files, Process, Run, Started};
use super::worker::ROOT;
use crate::supervise::{COMMAND, KILL};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, LifecycleHandler};
use rustix::process::{Pid, PidfdFlags, Signal};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::io::unix::AsyncFd;
use tokio::process::Command;
use tokio::sync::Notify;
use tokio::task::JoinSet;

/// A supervisor has taken its run within this time, or never will.
const TAKEN: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(2);
/// Of a process's environment, what is read.
const ENVIRONMENT: u64 = 1 << 20;

/// A container, and what the agent remembers of it.
pub struct Kept {
    folder: PathBuf,
    bell: Arc<Notify>,
    /// Why it could not be started last, since when, and how often so far.
    pub refused: Option<((&'static str, String), Timestamp, u32)>,
    /// When it was asked to end.
    pub asked: Option<Timestamp>,
    health: Arc<Mutex<Health>>,
    /// Nothing is left of the run that has ended.
    swept: bool,
    /// Of the run with this number.
    watched: Option<u32>,
    watches: JoinSet<()>,
    /// What was told of its health.
    told: Option<String>,
}

impl Kept {
    /// The container with this folder; the bell rings when something happens to it.
    pub fn new(folder: PathBuf, bell: Arc<Notify>) -> Self {
        let (health, watches) = (Arc::default(), JoinSet::new());
        Self {
            folder,
            bell,
            refused: None,
            asked: None,
            health,
            swept: false,
            watched: None,
            watches,
            told: None,
        }
    }

    /// How it is.
    ///
    /// # Errors
    /// When what was found cannot be written down.
    pub fn see(&mut self) -> io::Result<Contained> {
        let Some(files) = Files::newest(&self.folder) else {
            return Ok(Contained { refused: self.refused.clone(), ..Contained::default() });
        };
        let state = state(&files)?;
        if !matches!(state, State::Running(_)) {
            (self.asked, self.watched) = (None, None);
            self.watches.abort_all();
            *lock(&self.health) = Health::default();
            if !self.swept {
                // What its probes and hooks have started is not its supervisor's.
                end_strays(&self.folder);
                self.swept = true;
            }
        }
        let before = files.previous().and_then(|previous| match state_of(&previous) {
            Some(State::Ended(at, exit)) => Some((at, exit)),
            _ => None,
        });
        let health = lock(&self.health).clone();
        Ok(Contained {
            state,
            attempt: files.attempt,
            backoff: files.run().map_or(0, |run| run.backoff),
            before,
            refused: self.refused.clone(),
            asked: self.asked,
            started: health.started,
            ready: health.ready,
            sick: health.sick,
        })
    }

    /// What is wrong with it, when it has not been told yet.
    pub fn complaint(&mut self) -> Option<String> {
        let health = lock(&self.health);
        let now = health.sick.clone().or_else(|| health.unhealthy.clone());
        drop(health);
        if now == self.told {
            return None;
        }
        self.told.clone_from(&now);
        now
    }

    /// Watches the run that is under way: its end, and its probes.
    ///
    /// # Errors
    /// When its supervisor cannot be watched.
    pub fn watch(&mut self, container: &Container, image: &Image, address: &str) -> io::Result<()> {
        let Some(files) = Files::newest(&self.folder) else { return Ok(()) };
        if self.watched == Some(files.attempt) {
            return Ok(());
        }
        let (Some(run), Some(by)) = (files.run(), files.started().and_then(|s| s.by)) else {
            return Ok(());
        };
        self.watched = Some(files.attempt);
        self.watches.abort_all();
        let bell = Arc::clone(&self.bell);
        if let Some(ended) = ended(by)? {
            self.watches.spawn(async move {
                let _ = ended.readable().await;
                bell.notify_one();
            });
        }
        let asked = Asked {
            container: container.clone(),
            run,
            address: address.to_owned(),
            image: image.clone(),
        };
        let (health, bell) = (Arc::clone(&self.health), Arc::clone(&self.bell));
        self.watches.spawn(asked.watch_over(move |now| {
            *lock(&health) = now;
            bell.notify_one();
        }));
        Ok(())
    }

    /// Starts it once more.
    ///
    /// # Errors
    /// When it cannot be.
    pub async fn start(&mut self, run: &Run, supervisor: &Path) -> io::Result<()> {
        std::fs::create_dir_all(&self.folder)?;
        let first = Files { folder: self.folder.clone(), attempt: 0 };
        let files = Files::newest(&self.folder).map_or(first, |newest| newest.next());
        if let Some(old) = files.previous().and_then(|previous| previous.previous()) {
            old.remove();
        }
        let _ = std::fs::remove_file(&run.message.0);
        self.swept = false;
        files.write_run(run)?;
        let mut child = Command::new(supervisor)
            .arg(COMMAND)
            .arg(&self.folder)
            .arg(files.attempt.to_string())
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // A terminal's signals are not for it.
            .process_group(0)
            .spawn()?;
        let until = Instant::now() + TAKEN;
        while files.child().is_none() && files.exit().is_none() && Instant::now() < until {
            if let Ok(Some(_)) = child.try_wait() {
                break;
            }
            tokio::time::sleep(POLL).await;
        }
        // It is reaped when it ends; who watches it does so by its number.
        tokio::spawn(async move { child.wait().await });
        self.refused = None;
        Ok(())
    }

    /// Says why it was not started.
    pub fn refuse(&mut self, why: (&'static str, String)) -> u32 {
        let times = self.refused.as_ref().map_or(0, |(_, _, times)| *times) + 1;
        self.refused = Some((why, Timestamp::now(), times));
        times
    }

    /// Asks it to end.
    pub fn ask(&mut self) {
        self.asked = Some(Timestamp::now());
        self.signal(false);
    }

    /// Runs its hook, and asks it to end then. The hook ends with the container at the latest.
    pub fn ask_by<F: Future<Output = ()> + Send + 'static>(
        &mut self,
        hook: LifecycleHandler,
        container: &Container,
        image: Image,
        address: &str,
        failed: impl FnOnce(String) -> F + Send + 'static,
    ) {
        self.asked = Some(Timestamp::now());
        let Some(files) = Files::newest(&self.folder) else { return };
        let Some(run) = files.run() else { return signal(&files, false) };
        let asked = Asked { container: container.clone(), run, address: address.into(), image };
        self.watches.spawn(async move {
            if let Err(why) = asked.hook(&hook).await {
                failed(why).await;
            }
            signal(&files, false);
        });
    }

    /// Asks it to end, or ends it.
    pub fn signal(&self, kill: bool) {
        if let Some(files) = Files::newest(&self.folder) {
            signal(&files, kill);
        }
    }
}

/// Has a run's supervisor ask its container to end, or end it.
fn signal(files: &Files, kill: bool) {
    if let Some(by) = files.started().and_then(|started| started.by) {
        by.signal(if kill { KILL } else { Signal::TERM });
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Turns readable when a process ends; None for one that has.
#[expect(deprecated, reason = "an owned descriptor stays open, which is all that it asks for")]
fn ended(process: Process) -> io::Result<Option<AsyncFd<std::os::fd::OwnedFd>>> {
    let Some(pid) = Pid::from_raw(process.pid).filter(|_| process.is_alive()) else {
        return Ok(None);
    };
    match rustix::process::pidfd_open(pid, PidfdFlags::NONBLOCK) {
        Ok(fd) => AsyncFd::new(fd).map(Some),
        Err(rustix::io::Errno::SRCH) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// How a run that was looked after ended, or that it goes on.
fn state_of(files: &Files) -> Option<State> {
    let started = files.started()?;
    match files.exit() {
        Some(exit) => Some(State::Ended(started.at, exit)),
        None => started.by.filter(|by| by.is_alive()).map(|_| State::Running(started.at)),
    }
}

/// Ends all that is left of a container that does not run: whatever has its root in its
/// environment, as all that was started in it has.
fn end_strays(folder: &Path) {
    let mark = format!("{ROOT}={}", folder.join("root").display());
    let is_stray = |pid: i32| {
        let mut environment = Vec::new();
        let file = std::fs::File::open(format!("/proc/{pid}/environ"));
        let read = file.and_then(|file| file.take(ENVIRONMENT).read_to_end(&mut environment));
        read.is_ok() && environment.split(|byte| *byte == 0).any(|v| v == mark.as_bytes())
    };
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    for stray in pids.filter(|pid| is_stray(*pid)).filter_map(Process::of) {
        stray.signal(Signal::KILL);
    }
}

/// How a run is. One that nobody looks after any more is ended, and written down as such.
fn state(files: &Files) -> io::Result<State> {
    let lost = |reason: &str, message: &str| Exit {
        code: 137,
        signal: None,
        reason: reason.into(),
        message: message.into(),
        at: Timestamp::now(),
    };
    if files.started().is_none() {
        // Whose supervisor has not begun by now never will.
        match files.claim(&Started { by: None, at: Timestamp::now() }) {
            Ok(()) => files.write_exit(&lost("StartError", "its supervisor did not start"))?,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    if let Some(state) = state_of(files) {
        return Ok(state);
    }
    // It may have ended between the two looks.
    if files.exit().is_none() {
        files.write_exit(&lost("ContainerStatusUnknown", "its supervisor was killed"))?;
    }
    Ok(state_of(files).unwrap_or_default())
}
