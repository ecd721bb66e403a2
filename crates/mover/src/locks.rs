//! QEMU's locks on images, which all its tools respect (`block/file-posix.c`):
//! byte 100 + n is read-locked by whoever uses permission n, byte 200 + n by
//! whoever does not let others use it.
//!
//! QEMU takes them when it activates a disk. One that waits for a guest has
//! not, so until then the mover holds them in its stead: neither a VM nor a
//! second move gets at a disk that is being written.

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use std::fs::File;
use std::io;

/// `RAW_LOCK_PERM_BASE`, `RAW_LOCK_SHARED_BASE`.
const BASES: [i64; 2] = [100, 200];
/// Permissions that QEMU has: read, write, write without a change, resize.
const PERMISSIONS: i64 = 4;
/// Bytes that QEMU keeps for permissions to come.
const ROOM: i64 = 64;

/// Takes all of an image for this open file. False: somebody else uses it;
/// then nothing is held.
///
/// # Errors
/// Those of the system, where it cannot lock.
pub fn take(file: &File) -> io::Result<bool> {
    // N.B. like QEMU first lock, then look: of two that come at once at least one sees the other.
    for base in BASES {
        set(file, libc::F_RDLCK, base, PERMISSIONS)?;
    }
    for base in BASES {
        let mut other = lock(libc::F_WRLCK, base, ROOM);
        fcntl(file, FcntlArg::F_OFD_GETLK(&mut other))?;
        if i32::from(other.l_type) != libc::F_UNLCK {
            release(file)?;
            return Ok(false);
        }
    }
    Ok(true)
}

/// Lets go of an image.
///
/// # Errors
/// Those of the system.
pub fn release(file: &File) -> io::Result<()> {
    BASES.iter().try_for_each(|base| set(file, libc::F_UNLCK, *base, ROOM))
}

fn set(file: &File, kind: i32, start: i64, len: i64) -> io::Result<()> {
    fcntl(file, FcntlArg::F_OFD_SETLK(&lock(kind, start, len)))?;
    Ok(())
}

fn lock(kind: i32, start: i64, len: i64) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start,
        l_len: len,
        // The lock is the open file's, not a process's.
        l_pid: 0,
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn one_holder_at_a_time_until_it_lets_go_or_is_closed() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let open = || File::options().read(true).write(true).open(image.path()).unwrap();
        let (first, second) = (open(), open());
        assert!(take(&first).unwrap());
        assert!(!take(&second).unwrap());
        release(&first).unwrap();
        assert!(take(&second).unwrap());
        assert!(!take(&first).unwrap(), "a refused holder held something");
        drop(second);
        assert!(take(&first).unwrap());
    }
}
