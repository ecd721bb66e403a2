//! A cluster's folder: who runs it, where it listens, what it said.

use anyhow::{Context, Result, bail};
use node::agent::record::Process;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A process that was killed is gone within this time.
const ENDING: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(20);
/// Of a log, what is shown when a cluster could not start.
const LAST_WORDS: u64 = 2000;

/// A cluster's folder.
pub struct Folder {
    name: String,
    path: PathBuf,
}

/// A cluster that runs, or ran last.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Running {
    /// Its name.
    pub name: String,
    /// Of its API.
    pub address: SocketAddr,
    /// Its process.
    #[serde(flatten)]
    pub process: Process,
}

/// The lock of a cluster that runs; let go with its process at the latest.
pub struct Lock(#[expect(dead_code, reason = "it is held")] File);

fn base(dir: Option<&Path>) -> Result<PathBuf> {
    if let Some(dir) = dir {
        return Ok(std::path::absolute(dir)?);
    }
    let data = std::env::var_os("XDG_DATA_HOME").filter(|d| !d.is_empty()).map(PathBuf::from);
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local/share"));
    let data = data.or_else(home).context("HOME is not set; say --dir")?;
    Ok(data.join("godwit/clusters"))
}

/// The folders of all clusters, by name.
///
/// # Errors
/// When they cannot be listed.
pub fn all(dir: Option<&Path>) -> Result<Vec<Folder>> {
    let base = base(dir)?;
    let entries = match std::fs::read_dir(&base) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", base.display())),
    };
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| base.join(name).join("cluster.json").is_file())
        .collect();
    names.sort();
    Ok(names.into_iter().map(|name| Folder { path: base.join(&name), name }).collect())
}

impl Folder {
    /// That of a name, which need not exist.
    ///
    /// # Errors
    /// When the name is none.
    pub fn of(dir: Option<&Path>, name: &str) -> Result<Self> {
        if let Some(why) = apiserver::names::label(name) {
            bail!("{name:?} is no name of a cluster: {why}");
        }
        Ok(Self { path: base(dir)?.join(name), name: name.to_owned() })
    }

    /// The cluster's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The administrator's kubeconfig.
    pub fn kubeconfig(&self) -> PathBuf {
        self.path.join("kubeconfig")
    }

    /// What a detached cluster says.
    pub fn log(&self) -> PathBuf {
        self.path.join("log")
    }

    fn record(&self) -> PathBuf {
        self.path.join("cluster.json")
    }

    fn open_lock(&self) -> std::io::Result<File> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).mode(0o600).open(self.path.join("lock"))
    }

    /// Makes the folder, and takes its lock.
    ///
    /// # Errors
    /// When the cluster runs, or the folder cannot be made.
    pub fn lock(&self) -> Result<Lock> {
        let cannot = || format!("cannot use the folder {}", self.path.display());
        let mut builder = DirBuilder::new();
        builder.recursive(true).mode(0o700).create(&self.path).with_context(cannot)?;
        let file = self.open_lock().with_context(cannot)?;
        let mut taken = flock(&file, FlockOperation::NonBlockingLockExclusive);
        let until = Instant::now() + ENDING;
        // One that was killed lets go of it only when its last thread has ended.
        let ends = || self.last().is_some_and(|last| !last.process.is_alive());
        while taken == Err(Errno::WOULDBLOCK) && ends() && Instant::now() < until {
            std::thread::sleep(POLL);
            taken = flock(&file, FlockOperation::NonBlockingLockExclusive);
        }
        match taken {
            Ok(()) => Ok(Lock(file)),
            Err(Errno::WOULDBLOCK) => {
                let by = self.last().map(|last| format!(" as process {}", last.process.pid));
                bail!(
                    "cluster {} runs already{}; end it by `godwit down --name {}`, or choose another name",
                    self.name,
                    by.unwrap_or_default(),
                    self.name
                );
            }
            Err(error) => Err(error).with_context(cannot),
        }
    }

    /// Says where the cluster is to be found.
    ///
    /// # Errors
    /// When that cannot be written.
    pub fn publish(&self, running: &Running) -> Result<()> {
        let draft = self.path.join("cluster.json.new");
        let written = std::fs::write(&draft, serde_json::to_vec_pretty(running)?)
            .and_then(|()| std::fs::rename(&draft, self.record()));
        written.with_context(|| format!("cannot write {}", self.record().display()))
    }

    /// Where it was when it last ran.
    pub fn last(&self) -> Option<Running> {
        let text = std::fs::read(self.record()).ok()?;
        serde_json::from_slice(&text).ok()
    }

    /// It runs: its lock is held.
    pub fn running(&self) -> Option<Running> {
        let lock = self.open_lock().ok()?;
        match flock(&lock, FlockOperation::NonBlockingLockShared) {
            Ok(()) => None,
            Err(_) => self.last(),
        }
    }

    /// The log, to be written to from its end.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn open_log(&self) -> Result<File> {
        let mut options = OpenOptions::new();
        let opened = options.append(true).create(true).mode(0o600).open(self.log());
        // A full disk is told of here: later there is nowhere to.
        let begun =
            opened.and_then(|mut log| writeln!(log, "cluster {} begins", self.name).map(|()| log));
        begun.with_context(|| format!("cannot write {}", self.log().display()))
    }

    /// The end of the log.
    pub fn last_words(&self) -> String {
        let read = || {
            let mut file = File::open(self.log())?;
            let size = file.metadata()?.len();
            file.seek(SeekFrom::Start(size.saturating_sub(LAST_WORDS)))?;
            let mut bytes = Vec::new();
            file.take(LAST_WORDS).read_to_end(&mut bytes)?;
            std::io::Result::Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        read().unwrap_or_default()
    }
}
