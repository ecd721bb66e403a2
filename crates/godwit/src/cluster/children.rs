//! Roles that run as processes of their own: `godwit up --separate`.
//!
//! ```text
//! ROLES/NAME/process.json   which process it is
//!            kubeconfig     how it reaches the API, as itself
//!            identity/      who it is to other roles
//! LOGS/NAME.log             what it says
//! ```
//!
//! One that ends is started again. None is left over: it is killed with the process that started
//! it, and the next `godwit up` looks after that once more.

use super::nodes::own_program;
use anyhow::{Context, Result, bail};
use node::agent::record::{self, Process};
use rustix::process::Signal;
use std::ffi::OsString;
use std::fs::{DirBuilder, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};
use tokio::process::{Child, Command};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// One that ends at once is started again after pauses from the first to the last.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LAST_PAUSE: Duration = Duration::from_secs(30);
/// One that has run for so long did not end at once.
const STEADY: Duration = Duration::from_secs(60);
/// One that is asked to end has this long to do so.
const LEAVING: Duration = Duration::from_secs(5);
/// One that is killed is gone within this time.
const GONE: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(20);
/// A log that is larger is put aside when its role starts.
const LARGEST_LOG: u64 = 16 << 20;

/// The folders of a cluster's roles.
#[derive(Debug, Clone)]
pub struct Places {
    cluster: PathBuf,
}

impl Places {
    /// In a cluster's folder.
    pub fn of(cluster: &Path) -> Self {
        Self { cluster: cluster.into() }
    }

    /// A role's.
    pub fn role(&self, name: &str) -> PathBuf {
        self.cluster.join("roles").join(name)
    }

    fn process(&self, name: &str) -> PathBuf {
        self.role(name).join("process.json")
    }

    /// The roles that run, and their processes.
    pub fn running(&self) -> Vec<(String, Process)> {
        let entries = std::fs::read_dir(self.cluster.join("roles")).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        let read = |name: &str| -> Option<Process> {
            serde_json::from_slice(&std::fs::read(self.process(name)).ok()?).ok()
        };
        let process = |name: String| Some((read(&name)?, name));
        let mut found: Vec<_> = names
            .filter_map(process)
            .filter(|(process, _)| process.is_alive())
            .map(|(process, name)| (name, process))
            .collect();
        found.sort_by(|one, other| one.0.cmp(&other.0));
        found
    }

    /// Ends what a cluster that was killed has left running.
    ///
    /// # Errors
    /// When one cannot be ended.
    pub async fn end_left_over(&self) -> Result<()> {
        for (name, process) in self.running() {
            process.signal(Signal::KILL);
            let until = Instant::now() + GONE;
            while process.is_alive() {
                if Instant::now() > until {
                    bail!("{name} of an earlier run, process {}, cannot be ended", process.pid);
                }
                tokio::time::sleep(POLL).await;
            }
        }
        Ok(())
    }

    fn log(&self, name: &str) -> Result<File> {
        let folder = self.cluster.join("logs");
        let file = folder.join(format!("{name}.log"));
        let open = || {
            DirBuilder::new().recursive(true).mode(0o700).create(&folder)?;
            if std::fs::metadata(&file).is_ok_and(|found| found.len() > LARGEST_LOG) {
                std::fs::rename(&file, file.with_extension("log.1"))?;
            }
            OpenOptions::new().append(true).create(true).mode(0o600).open(&file)
        };
        open().with_context(|| format!("cannot write {}", file.display()))
    }
}

/// The pause before a role is started again that has ended so often at once.
fn pause(failures: u32) -> Duration {
    LAST_PAUSE.min(FIRST_PAUSE * 2_u32.saturating_pow(failures.min(16)))
}

/// Waits until it is to end: it is asked to, or there is nobody left to ask.
async fn asked(ends: &mut watch::Receiver<bool>) {
    let _ = ends.wait_for(|end| *end).await;
}

/// A role that is kept running.
struct Role {
    name: String,
    arguments: Vec<OsString>,
    places: Places,
}

/// Roles that are kept running. When they are dropped they are killed.
pub struct Children {
    places: Places,
    ending: Vec<(watch::Sender<bool>, JoinHandle<()>)>,
}

impl Children {
    /// None yet, in a cluster's folder; what an earlier run has left there is ended, and its
    /// credentials are removed.
    ///
    /// # Errors
    /// When that cannot be.
    pub async fn open(cluster: &Path) -> Result<Self> {
        let places = Places::of(cluster);
        places.end_left_over().await?;
        let old = cluster.join("roles");
        match std::fs::remove_dir_all(&old) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("cannot remove {}", old.display()))
            }
            _ => Ok(Self { places, ending: Vec::new() }),
        }
    }

    /// Where a role's files go.
    ///
    /// # Errors
    /// When its folder cannot be made.
    pub fn place(&self, name: &str) -> Result<PathBuf> {
        let place = self.places.role(name);
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&place);
        made.with_context(|| format!("cannot make the folder {}", place.display()))?;
        Ok(place)
    }

    /// Starts a role, and keeps it running.
    pub fn start(&mut self, name: &str, arguments: Vec<OsString>) {
        let (end, ends) = watch::channel(false);
        let role = Role { name: name.into(), arguments, places: self.places.clone() };
        self.ending.push((end, tokio::spawn(role.supervise(ends))));
    }

    /// Ends them, one after another, the one that was started last first.
    pub async fn end(mut self) {
        while let Some((end, supervisor)) = self.ending.pop() {
            end.send_replace(true);
            // It has limits of its own.
            let _ = supervisor.await;
        }
    }
}

impl Role {
    async fn supervise(self, mut ends: watch::Receiver<bool>) {
        let mut failures = 0;
        loop {
            let began = Instant::now();
            let why = match self.spawn() {
                Ok(mut child) => tokio::select! {
                    status = child.wait() => match status {
                        Ok(status) => format!("it has ended ({status})"),
                        Err(error) => error.to_string(),
                    },
                    () = asked(&mut ends) => return self.stop(child).await,
                },
                Err(error) => format!("{error:#}"),
            };
            if began.elapsed() > STEADY {
                failures = 0;
            }
            let pause = pause(failures);
            failures = failures.saturating_add(1);
            tracing::warn!(role = self.name, why, "it is started again after {pause:?}");
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = asked(&mut ends) => return,
            }
        }
    }

    /// Starts it, so that it ends with this process.
    ///
    /// N.B. it is killed when the *thread* ends that starts it: a worker of the runtime, which ends
    /// with the runtime.
    fn spawn(&self) -> Result<Child> {
        let own = own_program()?;
        let log = self.places.log(&self.name)?;
        let child = Command::new(&own)
            .args(["exec", "--parent", &std::process::id().to_string(), "--"])
            .arg(&own)
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            // A terminal's Ctrl-C is not for it: it ends in its turn.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .context("cannot run this program again")?;
        let process = child.id().and_then(|pid| Process::of(i32::try_from(pid).ok()?));
        // One that has ended already is waited for as any other.
        if let Some(process) = process {
            record::write(&self.places.process(&self.name), &process)
                .with_context(|| format!("cannot write down which process {} is", self.name))?;
        }
        Ok(child)
    }

    async fn stop(&self, mut child: Child) {
        if let Some(process) = child.id().and_then(|pid| Process::of(i32::try_from(pid).ok()?)) {
            process.signal(Signal::TERM);
        }
        if tokio::time::timeout(LEAVING, child.wait()).await.is_err() {
            tracing::warn!(role = self.name, "it has not ended after {LEAVING:?}, and is killed");
            // It may have ended just now.
            let _ = child.kill().await;
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn pauses_grow_and_have_an_end() {
        let pauses: Vec<_> = (0..40).map(pause).collect();
        assert!(pauses.is_sorted());
        assert_eq!((pauses[0], pauses[39]), (FIRST_PAUSE, LAST_PAUSE));
    }
}
