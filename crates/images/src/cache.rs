//! The disks of container images, kept on a node.

use std::ffi::OsString;
use std::fs::{self, File, Permissions, TryLockError};
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use crate::job::{self, Image};
use crate::progress::Reports;
use crate::registry::{Resolved, resolve};
use crate::source::public;
use crate::target::Disk;
use crate::work::{self, DOWNLOAD, IMAGE, Work};
use crate::{Error, Limits, Registry, Source, checksum, convert, unpack};

/// Disks are multiples of this: they are opened past the cache, and a file system may take
/// whole blocks alone.
const BLOCK: u64 = 4096;

/// When an image is asked for at its registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Pull {
    /// Each time, so that a tag is always what it is at the registry; what did not change is
    /// not fetched again.
    Always,
    /// Only if nothing is here. Who asks for what another one has brought needs no credentials.
    IfNotPresent,
    /// Never.
    Never,
}

/// A folder of disks that many virtual machines of a node share.
///
/// Several processes may use one folder at once.
#[derive(Debug, Clone)]
pub struct Cache {
    folder: PathBuf,
    limits: Limits,
}

/// A disk in a cache, which stays there as long as this lives.
#[derive(Debug)]
pub struct Cached {
    /// The raw file, which is only to be read.
    pub path: PathBuf,
    /// The digest of the image's manifest.
    pub digest: String,
    /// Size of the disk, which is also the file's length.
    pub virtual_size: u64,
    /// Its lock, which says that it is in use.
    _lease: File,
}

/// What a name was found to mean.
#[derive(Debug, Serialize, Deserialize)]
struct Meaning {
    digest: String,
    key: String,
}

impl Cache {
    /// A cache in a folder, which is made when it is needed.
    pub fn new(folder: impl Into<PathBuf>, limits: Limits) -> Self {
        Self { folder: folder.into(), limits }
    }

    /// Brings a container image's disk here, unless it is.
    ///
    /// When several ask for one image at once, one of them downloads it and the others wait.
    ///
    /// # Errors
    ///
    /// See [`Error`]; [`Error::NotCached`] if it is not here and must not be pulled.
    ///
    /// # Panics
    ///
    /// If the image is in a registry and the process has no TLS provider.
    pub async fn get(
        &self,
        registry: &Registry,
        policy: Pull,
        shim: &[OsString],
        progress: &Reports,
    ) -> Result<Cached, Error> {
        self.make_folders().await?;
        if policy != Pull::Always
            && let Some(cached) = self.known(registry).await?
        {
            return Ok(cached);
        }
        if policy == Pull::Never {
            return Err(Error::NotCached { reference: public(&registry.url) });
        }
        let resolved = resolve(registry, &self.limits).await?;
        let meaning = Meaning::new(&resolved, registry);
        let work = Work::open(&self.folder.join("work").join(&meaning.key), progress).await?;
        let cached = match self.lease(&meaning).await? {
            Some(cached) => cached,
            None => {
                self.fill(&resolved, registry, &meaning, &work, shim, progress).await?;
                let cached = self.lease(&meaning).await?;
                cached.ok_or_else(|| Error::NotCached { reference: public(&registry.url) })?
            }
        };
        let name = self.name_of(registry);
        work::unblock(move || work::save(&name, &meaning)).await?;
        Ok(cached)
    }

    /// Removes disks that nobody uses and nobody has asked for since that time, and what was
    /// left of downloads that were given up. A disk is in use as long as its [`Cached`] lives,
    /// or another name leads to its file (a hard link). Returns what was removed.
    ///
    /// # Errors
    ///
    /// Fails if the folder cannot be used.
    pub async fn evict(&self, older_than: Duration) -> Result<Vec<PathBuf>, Error> {
        self.make_folders().await?;
        let folder = self.folder.clone();
        work::unblock(move || {
            let before =
                SystemTime::now().checked_sub(older_than).unwrap_or(SystemTime::UNIX_EPOCH);
            let mut removed = Vec::new();
            for path in list(&folder.join("disks"))? {
                if remove_unused(&path, before)? {
                    removed.push(path);
                }
            }
            forget(&folder)?;
            for path in list(&folder.join("work"))? {
                abandon(&path, before)?;
            }
            Ok(removed)
        })
        .await
    }

    async fn make_folders(&self) -> Result<(), Error> {
        let folders = ["disks", "names", "work"].map(|name| self.folder.join(name));
        work::unblock(move || {
            folders
                .iter()
                .try_for_each(|path| fs::create_dir_all(path).map_err(Error::io("create", path)))
        })
        .await
    }

    fn name_of(&self, registry: &Registry) -> PathBuf {
        let identity = Source::Registry(registry.clone()).identity();
        self.folder.join("names").join(checksum::name_of(&identity)).with_extension("json")
    }

    async fn known(&self, registry: &Registry) -> Result<Option<Cached>, Error> {
        let name = self.name_of(registry);
        match work::unblock(move || work::load::<Meaning>(&name)).await? {
            Some(meaning) => self.lease(&meaning).await,
            None => Ok(None),
        }
    }

    /// Opens a disk so that it stays, if it is here.
    async fn lease(&self, meaning: &Meaning) -> Result<Option<Cached>, Error> {
        let (path, digest) = (self.disk(meaning), meaning.digest.clone());
        work::unblock(move || {
            let lease = match File::open(&path) {
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
                opened => opened.map_err(Error::io("open", &path))?,
            };
            lease.lock_shared().map_err(Error::io("lock", &path))?;
            let metadata = lease.metadata().map_err(Error::io("inspect", &path))?;
            if metadata.nlink() == 0 {
                // It was evicted between the opening and the lock.
                return Ok(None);
            }
            lease.set_modified(SystemTime::now()).map_err(Error::io("touch", &path))?;
            Ok(Some(Cached { path, digest, virtual_size: metadata.len(), _lease: lease }))
        })
        .await
    }

    fn disk(&self, meaning: &Meaning) -> PathBuf {
        self.folder.join("disks").join(&meaning.key).with_extension("raw")
    }

    async fn fill(
        &self,
        resolved: &Resolved,
        registry: &Registry,
        meaning: &Meaning,
        work: &Work,
        shim: &[OsString],
        reports: &Reports,
    ) -> Result<(), Error> {
        let image = self.obtain(resolved, registry, work, reports).await?;
        let size = image.virtual_size.next_multiple_of(BLOCK);
        if size > self.limits.max_bytes {
            let (what, limit) =
                (format!("the disk of {}", public(&registry.url)), self.limits.max_bytes);
            return Err(Error::TooManyBytes { what, limit });
        }
        convert::inspect(&image, work, shim, size).await?;
        let (partial, path) = (work.path("disk.raw"), self.disk(meaning));
        let new = partial.clone();
        let disk = work.blocking(move |_| Disk::create(&new, size)).await?;
        job::write(Some(&image), disk, work, shim, reports).await?;
        work.blocking(move |_| {
            let file = File::open(&partial).map_err(Error::io("open", &partial))?;
            file.set_permissions(Permissions::from_mode(0o444))
                .map_err(Error::io("protect", &partial))?;
            work::publish(&file, &partial, &path)
        })
        .await?;
        work.clear().await
    }

    async fn obtain(
        &self,
        resolved: &Resolved,
        registry: &Registry,
        work: &Work,
        reports: &Reports,
    ) -> Result<Image, Error> {
        let path = work.path(IMAGE);
        if !path.exists() {
            if !work.path(DOWNLOAD).exists() {
                let disk_path = registry.disk_path.clone();
                resolved.download(disk_path, work, &self.limits, reports).await?;
            }
            unpack::download(work, &self.limits, u64::MAX, reports).await?;
        }
        work.blocking(move |_| Image::open(path, None, 0)).await
    }
}

impl Meaning {
    fn new(resolved: &Resolved, registry: &Registry) -> Self {
        let key = match &registry.disk_path {
            None => resolved.digest.hex().to_owned(),
            Some(path) => checksum::name_of(&format!("{} {path}", resolved.digest)),
        };
        Self { digest: resolved.digest.to_string(), key }
    }
}

fn list(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let entries = fs::read_dir(folder).map_err(Error::io("list", folder))?;
    entries.map(|entry| entry.map(|it| it.path()).map_err(Error::io("list", folder))).collect()
}

/// Removes a disk that has neither been asked for since then nor is in use.
fn remove_unused(path: &Path, before: SystemTime) -> Result<bool, Error> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(false),
        Err(TryLockError::Error(error)) => return Err(Error::io("lock", path)(error)),
    }
    // Who comes now waits for this file's lock, and finds that it is gone.
    let metadata = file.metadata().map_err(Error::io("inspect", path))?;
    let used = metadata.modified().map_err(Error::io("inspect", path))?;
    let unused = used <= before && metadata.nlink() == 1;
    if unused {
        work::remove(path)?;
    }
    Ok(unused)
}

/// Forgets names of disks that are gone.
fn forget(folder: &Path) -> Result<(), Error> {
    for name in list(&folder.join("names"))? {
        let meaning = work::load::<Meaning>(&name)?;
        let disk = |it: Meaning| folder.join("disks").join(it.key).with_extension("raw");
        if !meaning.is_some_and(|it| disk(it).exists()) {
            work::remove(&name)?;
        }
    }
    Ok(())
}

/// Removes what is left of a download that nobody goes on with, all but its lock, for which
/// somebody may be waiting.
fn abandon(folder: &Path, before: SystemTime) -> Result<(), Error> {
    let path = folder.join("lock");
    let Ok(lock) = File::open(&path) else { return Ok(()) };
    if lock.try_lock().is_err() {
        return Ok(());
    }
    for path in list(folder)?.into_iter().filter(|it| *it != path) {
        let modified = path.symlink_metadata().and_then(|it| it.modified());
        if modified.map_err(Error::io("inspect", &path))? <= before {
            work::remove(&path)?;
        }
    }
    Ok(())
}
