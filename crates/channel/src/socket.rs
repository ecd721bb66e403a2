//! Unix sockets beneath a folder, never through a link.
//!
//! A path is looked up once, beneath the folder and without following links; then it is
//! checked and used by file descriptor, so that nothing can be put in its place between.
//! That also takes folders whose path is longer than a socket's address may be (107).

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{self as rfs, AtFlags, CWD, FileType, FlockOperation, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tokio::net::{UnixListener, UnixStream};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;

/// Why a socket cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody listens there.
    #[error("{path} does not exist or nobody listens on it; is its process running?")]
    Absent {
        /// Folder and name.
        path: String,
    },
    /// Something that must not be connected to, or bound over.
    #[error("{path} is refused: {text}")]
    Unsafe {
        /// Folder and name.
        path: String,
        /// What is wrong with it.
        text: &'static str,
    },
    /// Another process listens there.
    #[error("{path} is in use by a live process; stop it first")]
    InUse {
        /// Folder and name.
        path: String,
    },
    /// The system refused.
    #[error("{path} cannot be {verb}")]
    Io {
        /// Folder and name.
        path: String,
        /// `connected to` or `bound`.
        verb: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Connects to a socket of this user: `name` may have several parts, none of them a link.
pub async fn connect_beneath(dir: &Path, name: &str) -> Result<UnixStream, Error> {
    let path = || dir.join(name).display().to_string();
    let untrusted = |text| Error::Unsafe { path: path(), text };
    let failed = |source| Error::Io { path: path(), verb: "connected to", source };
    let fd = open_beneath(dir, name).map_err(|e| match e {
        Errno::NOENT | Errno::NOTDIR => Error::Absent { path: path() },
        Errno::LOOP => untrusted("a symbolic link is in its path"),
        Errno::XDEV => untrusted("it leads out of its folder"),
        e => failed(e.into()),
    })?;
    if let Some(text) = flaw_of(&fd).map_err(|e| failed(e.into()))? {
        return Err(untrusted(text));
    }
    let through_fd = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let stream = UnixStream::connect(through_fd).await.map_err(|e| match e.kind() {
        io::ErrorKind::ConnectionRefused => Error::Absent { path: path() },
        _ => failed(e),
    })?;
    if !is_own(&stream).map_err(failed)? {
        return Err(untrusted("another user listens on it"));
    }
    Ok(stream)
}

/// Binds a listener with mode 0600. A dead process's socket is replaced, a live one's not.
pub fn bind_beneath(dir: &Path, name: &str) -> Result<UnixListener, Error> {
    let path = || dir.join(name).display().to_string();
    let failed = |source| Error::Io { path: path(), verb: "bound", source };
    if name.is_empty() || name.contains('/') || name == ".." || name == "." {
        return Err(Error::Unsafe { path: path(), text: "its name is not a plain name" });
    }
    let dirfd = open_dir(dir).map_err(|e| failed(e.into()))?;
    // Held while the old socket is judged, so that two processes cannot both find it dead.
    rfs::flock(&dirfd, FlockOperation::NonBlockingLockExclusive).map_err(|e| match e {
        Errno::WOULDBLOCK => Error::InUse { path: path() },
        e => failed(e.into()),
    })?;
    let bound = remove_stale(dir, &dirfd, name).and_then(|()| listen(&dirfd, name).map_err(failed));
    // N.B. closing it is not enough: a process that another thread forks holds it till it runs
    // its program, and the next name would be refused.
    let unlocked = rfs::flock(&dirfd, FlockOperation::Unlock).map_err(|e| failed(e.into()));
    bound.and_then(|listener| unlocked.map(|()| listener))
}

/// Whether this process's user is at the other end.
pub(crate) fn is_own(stream: &UnixStream) -> io::Result<bool> {
    Ok(stream.peer_cred()?.uid() == rustix::process::geteuid().as_raw())
}

fn open_dir(dir: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rfs::openat(CWD, dir, flags, Mode::empty())
}

/// A handle (`O_PATH`) on what `name` is.
fn open_beneath(dir: &Path, name: &str) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    rfs::openat2(open_dir(dir)?, name, flags, Mode::empty(), resolve)
}

/// What keeps it from being a socket of ours.
fn flaw_of(fd: &OwnedFd) -> Result<Option<&'static str>, Errno> {
    let stat = rfs::fstat(fd)?;
    Ok(match FileType::from_raw_mode(stat.st_mode) {
        // N.B. O_PATH with O_NOFOLLOW opens a link at the end of the path itself, whatever
        // RESOLVE_NO_SYMLINKS says; only this check keeps it from being followed later.
        FileType::Symlink => Some("it is a symbolic link"),
        FileType::Socket if stat.st_uid != rustix::process::geteuid().as_raw() => {
            Some("it belongs to another user")
        }
        FileType::Socket => None,
        _ => Some("it is not a socket"),
    })
}

/// Removes a socket of ours on which nobody listens.
fn remove_stale(dir: &Path, dirfd: &OwnedFd, name: &str) -> Result<(), Error> {
    let path = || dir.join(name).display().to_string();
    let failed = |e: Errno| Error::Io { path: path(), verb: "bound", source: e.into() };
    let fd = match open_beneath(dir, name) {
        Err(Errno::NOENT) => return Ok(()),
        other => other.map_err(failed)?,
    };
    if let Some(text) = flaw_of(&fd).map_err(failed)? {
        return Err(Error::Unsafe { path: path(), text });
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let probe = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
        .map_err(failed)?;
    let through_fd = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let address = SocketAddrUnix::new(through_fd.as_str()).map_err(failed)?;
    match rustix::net::connect(&probe, &address) {
        Err(Errno::CONNREFUSED) => {}
        // A full backlog is a sign of life too.
        Ok(()) | Err(Errno::AGAIN) => return Err(Error::InUse { path: path() }),
        Err(e) => return Err(failed(e)),
    }
    rfs::unlinkat(dirfd, name, AtFlags::empty()).map_err(failed)
}

fn listen(dirfd: &OwnedFd, name: &str) -> io::Result<UnixListener> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // The mode that bind gives to the file: set before, there is no moment when it is open.
    rfs::fchmod(&fd, Mode::RUSR | Mode::WUSR)?;
    let through_fd = format!("/proc/self/fd/{}/{name}", dirfd.as_raw_fd());
    rustix::net::bind(&fd, &SocketAddrUnix::new(through_fd.as_str())?)?;
    rustix::net::listen(&fd, BACKLOG)?;
    UnixListener::from_std(fd.into())
}
