//! Marks on a host's disks: which of them must not be started, and why.
//!
//! A mark lies in the host's folder (`disks/<hash of the path>.json`), not in
//! the disk, because a raw disk has no room for one. It says which disk it
//! means (device, inode, size): a mark of a disk that was replaced by another
//! is no mark.

use handover::record::Record;
use mover::disk::{Disk, Identity};
use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// A mark is small; whatever is larger was not written by us.
const MAX_MARK: u64 = 64 << 10;

/// Why a disk must not be started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "mark", rename_all = "kebab-case")]
pub enum Mark {
    /// Its VM went on on another disk.
    Superseded {
        /// The VM.
        vm: String,
        /// The epoch in which this disk was the VM's.
        epoch: u64,
        /// The launcher instance that took over.
        heir: String,
        /// The disk as it was left: if this still holds, nobody wrote it since.
        left_as: Identity,
    },
    /// A copy to it began and has not ended, unless its heir owns the VM.
    Incomplete {
        /// The VM.
        vm: String,
        /// Which copy.
        copy: String,
        /// The launcher instance that adopts the VM once the copy is whole.
        heir: String,
        /// The disk.
        disk: Identity,
    },
}

impl Mark {
    /// Whether it means nothing any more, as `record` of the disk's host shows: an
    /// heir adopts only a whole copy. It may have died before it took the mark away.
    pub fn is_void(&self, record: &Record) -> bool {
        matches!(self, Mark::Incomplete { vm, heir, .. }
            if record.vm.0 == *vm && record.owner.0 == *heir)
    }

    /// Whether it means this disk, as far as one can see: not another in its place.
    pub fn is_of(&self, disk: &Disk) -> bool {
        let then = self.disk();
        disk.identity().is_ok_and(|now| {
            (then.device, then.inode, then.size) == (now.device, now.inode, now.size)
        })
    }

    /// Whether it tells if the disk was written since: a device does not say when it was.
    pub fn is_dated(&self) -> bool {
        self.disk().modified_ns != 0
    }

    fn disk(&self) -> &Identity {
        match self {
            Mark::Superseded { left_as, .. } => left_as,
            Mark::Incomplete { disk, .. } => disk,
        }
    }
}

impl std::fmt::Display for Mark {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Mark::Superseded { vm, epoch, heir, .. } => write!(
                f,
                "VM {vm} left it in epoch {epoch} and went on as {heir}: it holds old data"
            ),
            Mark::Incomplete { vm, copy, .. } => {
                write!(f, "copy {copy} of VM {vm} to it has not ended: it holds half a disk")
            }
        }
    }
}

/// What went wrong with a mark.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The folder or the file cannot be used.
    #[error("cannot {what} the mark of disk {disk} in {folder}")]
    Io {
        /// read, write, remove
        what: &'static str,
        /// The disk.
        disk: PathBuf,
        /// The marks' folder.
        folder: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is there but cannot be understood; the disk counts as marked.
    #[error(
        "the mark {file} of disk {disk} cannot be understood ({why}); find out whether the disk is in use elsewhere, then remove the mark"
    )]
    Broken {
        /// The mark's file.
        file: PathBuf,
        /// The disk.
        disk: PathBuf,
        /// Why.
        why: String,
    },
    /// The disk itself cannot be examined.
    #[error(transparent)]
    Disk(#[from] mover::disk::Error),
}

/// The marks of one host.
#[derive(Debug, Clone)]
pub struct Marks {
    folder: PathBuf,
}

impl Marks {
    /// The marks in `host`'s folder.
    pub fn of_host(host: &Path) -> Self {
        Self { folder: host.join("disks") }
    }

    /// The mark that a disk carries.
    ///
    /// # Errors
    /// [`Error`]: a mark that cannot be read is never taken for none.
    pub fn get(&self, disk: &Disk) -> Result<Option<Mark>, Error> {
        let name = name_of(disk.path());
        let Some(mut file) = self.open(disk, &name)? else { return Ok(None) };
        let mut text = String::new();
        (&mut file)
            .take(MAX_MARK)
            .read_to_string(&mut text)
            .map_err(|source| self.fail("read", disk, source))?;
        let mark: Mark = serde_json::from_str(&text).map_err(|error| Error::Broken {
            file: self.folder.join(&name),
            disk: disk.path().into(),
            why: error.to_string(),
        })?;
        // A disk that cannot be examined is none without a mark.
        disk.identity()?;
        // A grown or replaced disk keeps an `Incomplete` mark's meaning only if it is the same inode.
        Ok(Some(mark).filter(|mark| mark.is_of(disk)))
    }

    fn open(&self, disk: &Disk, name: &str) -> Result<Option<File>, Error> {
        let folder = match self.folder_fd() {
            Ok(folder) => folder,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(self.fail("read", disk, error)),
        };
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match rustix::fs::openat(&folder, name, flags, Mode::empty()) {
            Ok(fd) => Ok(Some(File::from(fd))),
            Err(rustix::io::Errno::NOENT) => Ok(None),
            Err(errno) => Err(self.fail("read", disk, errno.into())),
        }
    }

    /// Marks a disk; survives a loss of power.
    ///
    /// # Errors
    /// [`Error`]; then the disk has its old mark or the new one.
    pub fn set(&self, disk: &Disk, mark: &Mark) -> Result<(), Error> {
        self.write(&name_of(disk.path()), mark).map_err(|e| self.fail("write", disk, e))
    }

    fn write(&self, name: &str, mark: &Mark) -> io::Result<()> {
        match std::fs::create_dir(&self.folder) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        let folder = self.folder_fd()?;
        let draft = format!("{name}.{}.new", std::process::id());
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(0o600);
        let mut file = File::from(rustix::fs::openat(&folder, &draft, flags, mode)?);
        serde_json::to_writer(&mut file, mark)?;
        file.flush()?;
        file.sync_all()?;
        rustix::fs::renameat(&folder, &draft, &folder, name)?;
        Ok(rustix::fs::fsync(&folder)?)
    }

    /// Takes a disk's mark away; survives a loss of power.
    ///
    /// # Errors
    /// [`Error`]; then the mark may still be there.
    pub fn clear(&self, disk: &Disk) -> Result<(), Error> {
        let folder = match self.folder_fd() {
            Ok(folder) => folder,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(self.fail("remove", disk, error)),
        };
        let none = rustix::fs::AtFlags::empty();
        match rustix::fs::unlinkat(&folder, name_of(disk.path()), none) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => {}
            Err(errno) => return Err(self.fail("remove", disk, errno.into())),
        }
        rustix::fs::fsync(&folder).map_err(|errno| self.fail("remove", disk, errno.into()))
    }

    fn folder_fd(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(rustix::fs::open(&self.folder, flags, Mode::empty())?)
    }

    fn fail(&self, what: &'static str, disk: &Disk, source: io::Error) -> Error {
        Error::Io { what, disk: disk.path().into(), folder: self.folder.clone(), source }
    }
}

fn name_of(disk: &Path) -> String {
    let absolute = std::path::absolute(disk).unwrap_or_else(|_| disk.into());
    let hash = xxhash_rust::xxh3::xxh3_128(absolute.as_os_str().as_encoded_bytes());
    format!("{hash:032x}.json")
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_mark_means_one_disk_and_a_broken_one_is_never_taken_for_none() {
        let host = tempfile::tempdir().unwrap();
        let path = host.path().join("disk.raw");
        let (disk, _) = Disk::target(&path, 4096).unwrap();
        let marks = Marks::of_host(host.path());
        assert_eq!(marks.get(&disk).unwrap(), None);
        let mark = Mark::Incomplete {
            vm: "web".into(),
            copy: "1".into(),
            heir: "2".into(),
            disk: disk.identity().unwrap(),
        };
        marks.set(&disk, &mark).unwrap();
        assert_eq!(marks.get(&disk).unwrap(), Some(mark));
        // Another disk at the same path.
        std::fs::rename(&path, host.path().join("old")).unwrap();
        let (other, _) = Disk::target(&path, 4096).unwrap();
        assert_eq!(marks.get(&other).unwrap(), None);
        let file = marks.folder.join(name_of(&path));
        std::fs::write(&file, "{\"mark\":").unwrap();
        assert!(matches!(marks.get(&other), Err(Error::Broken { .. })));
        std::fs::remove_file(&file).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", &file).unwrap();
        assert!(matches!(marks.get(&other), Err(Error::Io { .. })));
        marks.clear(&other).unwrap();
        assert_eq!(marks.get(&other).unwrap(), None);
    }
}
