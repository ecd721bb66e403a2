//! The folder that keeps what an import has done so far.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde::{Serialize, de::DeserializeOwned};

use crate::progress::{Reports, Step, report};
use crate::{Error, checksum};

/// Bytes from the source as they were sent; complete and verified.
pub(crate) const DOWNLOAD: &str = "download";
/// The same, while they are still being fetched.
pub(crate) const DOWNLOAD_PARTIAL: &str = "download.partial";
/// What is known about a partial download.
pub(crate) const DOWNLOAD_STATE: &str = "download.json";
/// A disk while it is taken out of a layer.
pub(crate) const DISK_PARTIAL: &str = "disk.partial";
/// The decompressed image, complete.
pub(crate) const IMAGE: &str = "image";
/// The same, while it is being written.
pub(crate) const IMAGE_PARTIAL: &str = "image.partial";

const POLL: Duration = Duration::from_millis(50);

/// A work folder, which nobody else uses as long as this or a task of it lives.
pub(crate) struct Work {
    folder: PathBuf,
    held: Arc<Held>,
}

/// What keeps a work folder ours. Blocking tasks go on for a moment when the import's future
/// was dropped: they hold this too, so that a later import waits for their end.
pub(crate) struct Held {
    _lock: File,
    stop: AtomicBool,
}

impl Held {
    /// Fails once the import was given up.
    pub fn check(&self) -> Result<(), Error> {
        if self.stop.load(Ordering::Relaxed) { Err(Error::Stopped) } else { Ok(()) }
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        self.held.stop.store(true, Ordering::Relaxed);
    }
}

impl Work {
    /// Opens a folder, and waits until it is free.
    pub async fn open(folder: &Path, reports: &Reports) -> Result<Self, Error> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .map_err(Error::io("create", folder))?;
        let path = folder.join("lock");
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(Error::io("open", &path))?;
        loop {
            match lock.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) => {
                    report(reports, Step::Waiting, 0, None);
                    tokio::time::sleep(POLL).await;
                }
                Err(TryLockError::Error(source)) => return Err(Error::io("lock", &path)(source)),
            }
        }
        let held = Arc::new(Held { _lock: lock, stop: AtomicBool::new(false) });
        Ok(Self { folder: folder.to_owned(), held })
    }

    /// The path of a file of this folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// What a task has to hold that may outlive this.
    pub fn held(&self) -> Arc<Held> {
        self.held.clone()
    }

    /// Runs what blocks where it may block, with this folder held until it has ended.
    pub async fn blocking<T: Send + 'static>(
        &self,
        task: impl FnOnce(&Held) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let held = self.held();
        unblock(move || task(&held)).await
    }

    /// Makes sure that this folder's state is of the job with this identity.
    pub async fn claim(&self, identity: &str) -> Result<(), Error> {
        let (folder, path) = (self.folder.clone(), self.path("job.json"));
        // The identity may contain addresses with tokens: its hash does as well.
        let own = checksum::name_of(identity);
        self.blocking(move |_| match load::<String>(&path)? {
            None => save(&path, &own),
            Some(recorded) if recorded == own => Ok(()),
            Some(_) => Err(Error::OtherJob { path: folder }),
        })
        .await
    }

    /// Removes what is only needed until the disk is complete.
    pub async fn clear(&self) -> Result<(), Error> {
        let folder = self.folder.clone();
        self.blocking(move |_| {
            let downloads = [DOWNLOAD, DOWNLOAD_PARTIAL, DOWNLOAD_STATE];
            for name in downloads.into_iter().chain([DISK_PARTIAL, IMAGE, IMAGE_PARTIAL]) {
                remove(&folder.join(name))?;
            }
            Ok(())
        })
        .await
    }
}

/// Runs what blocks where it may block.
pub(crate) async fn unblock<T: Send + 'static>(
    task: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    match tokio::task::spawn_blocking(task).await {
        Ok(result) => result,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => Err(Error::Stopped),
    }
}

/// Removes a file that may be gone already.
pub(crate) fn remove(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io("remove", path)(error)),
        _ => Ok(()),
    }
}

/// Creates a file anew that only its owner may read.
pub(crate) fn create(path: &Path) -> Result<File, Error> {
    remove(path)?;
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(Error::io("create", path))
}

/// Gives a complete file its final name so that a crash leaves one or the other.
pub(crate) fn publish(file: &File, from: &Path, to: &Path) -> Result<(), Error> {
    file.sync_all().map_err(Error::io("write", from))?;
    fs::rename(from, to).map_err(Error::io("rename", from))?;
    sync_folder(to)
}

/// Makes the name of a file durable.
pub(crate) fn sync_folder(path: &Path) -> Result<(), Error> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    File::open(folder).and_then(|it| it.sync_all()).map_err(Error::io("write", folder))
}

/// Reads a small state file; one that a crash has damaged counts as none.
pub(crate) fn load<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, Error> {
    match fs::read(path) {
        Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io("read", path)(error)),
    }
}

/// Writes a small state file so that a crash leaves the old or the new one.
pub(crate) fn save<T: Serialize>(path: &Path, value: &T) -> Result<(), Error> {
    let partial = path.with_extension("new");
    let mut file = create(&partial)?;
    serde_json::to_vec(value)
        .map_err(std::io::Error::from)
        .and_then(|bytes| file.write_all(&bytes))
        .map_err(Error::io("write", &partial))?;
    publish(&file, &partial, path)
}
