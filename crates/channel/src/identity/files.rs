//! Files of certificates and keys: bounded, never through a link, keys private.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use rustix::fs::{self as rfs, AtFlags, CWD, FileType, Mode, OFlags};

use super::Error;

/// More than any bundle of certificates needs.
const MAX_BYTES: u64 = 1 << 20;

/// Reads a file that is a regular file of ours (or root's), not a link; a `secret` one
/// must be closed to group and others.
pub(super) fn read(path: &Path, secret: bool) -> Result<Vec<u8>, Error> {
    let failed = |source| Error::File { path: path.into(), verb: "read", source };
    let untrusted = |text| Error::Unsafe { path: path.into(), text };
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let fd = rfs::openat(CWD, path, flags, Mode::empty()).map_err(|e| match e {
        rustix::io::Errno::LOOP => untrusted("it is a symbolic link; put the file itself there"),
        e => failed(e.into()),
    })?;
    let stat = rfs::fstat(&fd).map_err(|e| failed(e.into()))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(untrusted("it is not a regular file"));
    }
    if stat.st_uid != rustix::process::geteuid().as_raw() && stat.st_uid != 0 {
        return Err(untrusted("it belongs to another user; give it to the user of this process"));
    }
    if secret && stat.st_mode & 0o077 != 0 {
        return Err(untrusted("others may read this key; set its mode to 0600"));
    }
    let mut bytes = Vec::new();
    File::from(fd).take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(untrusted("it is larger than 1 MiB"));
    }
    Ok(bytes)
}

/// Reads text, as PEM is.
pub(super) fn read_text(path: &Path, secret: bool) -> Result<String, Error> {
    String::from_utf8(read(path, secret)?)
        .map_err(|_| Error::Unsafe { path: path.into(), text: "it is not PEM" })
}

/// Writes a file with mode 0600, whole or not at all; makes the folder (0700) if needed.
pub(super) fn write(dir: &Path, name: &str, bytes: &[u8]) -> Result<(), Error> {
    let path = dir.join(name);
    put(dir, name, bytes).map_err(|source| Error::File { path, verb: "written", source })
}

fn put(dir: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let dirfd = rfs::openat(CWD, dir, flags, Mode::empty())?;
    let temporary = PathBuf::from(format!(".{name}.{}", uuid::Uuid::new_v4().simple()));
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rfs::openat(&dirfd, &temporary, flags, Mode::RUSR | Mode::WUSR)?;
    let mut file = File::from(fd);
    let written = file.write_all(bytes).and_then(|()| file.sync_all());
    let renamed = written.and_then(|()| Ok(rfs::renameat(&dirfd, &temporary, &dirfd, name)?));
    if renamed.is_err() {
        // The first error is the one to tell; a file left behind harms nobody.
        let _ = rfs::unlinkat(&dirfd, &temporary, AtFlags::empty());
        return renamed;
    }
    rfs::fsync(&dirfd)?;
    Ok(())
}
