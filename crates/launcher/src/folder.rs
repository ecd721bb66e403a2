//! A launcher's folder: one launcher at a time holds it.
//!
//! QEMU works in it too, and may be in a guest's hands. So whatever is opened
//! in it is opened beneath it, and never through a link.

use rustix::fs::{AtFlags, Dir, FileType, FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// The file that carries the lock. It stays when the launcher ends: a file that
/// comes and goes would let two launchers lock two files of one name.
const LOCK: &str = "lock";

/// Why a launcher's folder cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another launcher holds it.
    #[error("another launcher holds {}; end it first", folder.display())]
    Held {
        /// The folder.
        folder: PathBuf,
    },
    /// Something in it cannot be made or opened.
    #[error("cannot use {}; links are not followed here", path.display())]
    Io {
        /// The folder or what is in it.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A folder that is held; free again when this is dropped, or its process ends however it may.
#[derive(Debug)]
pub struct Held {
    folder: PathBuf,
    _lock: File,
}

/// Makes a launcher's folder and takes it for this process alone.
///
/// # Errors
/// [`Error`].
pub fn take(folder: &Path) -> Result<Held, Error> {
    let failed = |source| Error::Io { path: folder.into(), source };
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed)?;
    // N.B. not the folder itself: whoever binds a socket in it locks that for a moment.
    let lock = open(folder, LOCK, OFlags::RDWR | OFlags::CREATE)?;
    match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Held { folder: folder.into(), _lock: lock }),
        Err(Errno::WOULDBLOCK) => Err(Error::Held { folder: folder.into() }),
        Err(errno) => Err(Error::Io { path: folder.join(LOCK), source: errno.into() }),
    }
}

impl Held {
    /// Removes the sockets in it: nobody listens on them any more.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn sweep(&self) -> Result<(), Error> {
        let failed = |errno: Errno| Error::Io { path: self.folder.clone(), source: errno.into() };
        let own = own_fd(&self.folder)?;
        for entry in Dir::read_from(&own).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            if entry.file_type() == FileType::Socket {
                remove_at(&own, entry.file_name()).map_err(failed)?;
            }
        }
        Ok(())
    }
}

/// Opens a regular file of a launcher's folder, `0600` if it is new.
///
/// # Errors
/// [`Error::Io`], also for what is no regular file.
pub fn open(folder: &Path, name: &str, flags: OFlags) -> Result<File, Error> {
    let failed = |source| Error::Io { path: folder.join(name), source };
    // N.B. NONBLOCK: a pipe in its place must not hold up the launcher.
    let flags = flags | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let mode = Mode::RUSR | Mode::WUSR;
    let file = rustix::fs::openat(own_fd(folder)?, name, flags, mode)
        .map(File::from)
        .map_err(|errno| failed(errno.into()))?;
    match file.metadata() {
        Ok(meta) if meta.is_file() => Ok(file),
        Ok(_) => Err(failed(io::Error::other("it is no regular file; remove it"))),
        Err(source) => Err(failed(source)),
    }
}

/// Removes a file of a launcher's folder, if there is one; of a link, the link.
///
/// # Errors
/// [`Error::Io`].
pub fn remove(folder: &Path, name: &str) -> Result<(), Error> {
    let failed = |errno: Errno| Error::Io { path: folder.join(name), source: errno.into() };
    remove_at(&own_fd(folder)?, name).map_err(failed)
}

/// Renames a file of a launcher's folder over another.
///
/// # Errors
/// [`Error::Io`].
pub fn rename(folder: &Path, from: &str, to: &str) -> Result<(), Error> {
    let own = own_fd(folder)?;
    rustix::fs::renameat(&own, from, &own, to)
        .map_err(|errno| Error::Io { path: folder.join(from), source: errno.into() })
}

fn remove_at(own: &OwnedFd, name: impl rustix::path::Arg) -> Result<(), Errno> {
    match rustix::fs::unlinkat(own, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(errno),
    }
}

fn own_fd(folder: &Path) -> Result<OwnedFd, Error> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::open(folder, flags, Mode::empty())
        .map_err(|errno| Error::Io { path: folder.into(), source: errno.into() })
}
