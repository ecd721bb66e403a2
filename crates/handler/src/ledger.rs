//! The owner records of a host, one file each.
//!
//! A record is replaced as a whole: written beside the old one, fsynced,
//! renamed, and the folder fsynced. At any moment a reader finds the old record
//! or the new one. A lock on the folder makes compare-and-swap of it, across
//! processes.

use handover::record::{InstanceId, Record, Refused, VmId};
use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// A record is a few hundred bytes; whatever is larger was not written by us.
const MAX_RECORD: u64 = 64 << 10;
/// The file format. A file of a later one is left alone.
const FORMAT: u32 = 1;

/// What went wrong with a ledger.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file system refused.
    #[error("cannot {what} the owner record of {vm} in {folder}")]
    Io {
        /// read, write, lock
        what: &'static str,
        /// The VM.
        vm: VmId,
        /// The ledger.
        folder: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file is there but cannot be understood. It is never overwritten.
    #[error(
        "the owner record {file} cannot be understood ({why}); find out where the VM runs, then repair or remove the file by hand"
    )]
    Broken {
        /// The file.
        file: PathBuf,
        /// Why.
        why: String,
    },
    /// Not a VM's name.
    #[error("'{0}' is no VM name: use 1 to 63 of a-z, 0-9, '-' and '.'")]
    Name(VmId),
}

#[derive(PartialEq, Serialize, Deserialize)]
struct Stored {
    format: u32,
    record: Record,
    /// The owner of which the other end was told that it has the VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    told: Option<InstanceId>,
}

/// The ledger of one host.
#[derive(Debug)]
pub struct Ledger {
    path: PathBuf,
    folder: OwnedFd,
}

impl Ledger {
    /// Opens the ledger in `host`'s folder, and makes it if there is none.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn open(host: &Path) -> io::Result<Self> {
        let path = host.join("ledger");
        match std::fs::create_dir(&path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            // N.B. in both cases: whoever made it may not have come to make it last.
            _ => File::open(host)?.sync_all()?,
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let folder = rustix::fs::open(&path, flags, Mode::empty())?;
        Ok(Self { path, folder })
    }

    /// What a VM's record says.
    ///
    /// # Errors
    /// [`Error`]: a record that cannot be read is never taken for none.
    pub fn read(&self, vm: &VmId) -> Result<Option<Record>, Error> {
        Ok(self.stored(vm)?.map(|stored| stored.record))
    }

    fn stored(&self, vm: &VmId) -> Result<Option<Stored>, Error> {
        let name = file_name(vm)?;
        let broken = |why: String| Error::Broken { file: self.path.join(&name), why };
        let io = |error: io::Error| self.fail("read", vm, error);
        // N.B. a pipe of that name must not make anybody wait.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = match rustix::fs::openat(&self.folder, &name, flags, Mode::empty()) {
            Ok(fd) => File::from(fd),
            Err(rustix::io::Errno::NOENT) => return Ok(None),
            Err(rustix::io::Errno::LOOP) => return Err(broken("it is a symbolic link".into())),
            Err(errno) => return Err(io(errno.into())),
        };
        if !file.metadata().map_err(io)?.is_file() {
            return Err(broken("it is no regular file".into()));
        }
        let mut text = Vec::new();
        file.take(MAX_RECORD).read_to_end(&mut text).map_err(io)?;
        let head: serde_json::Value =
            serde_json::from_slice(&text).map_err(|e| broken(e.to_string()))?;
        if head["format"] != FORMAT {
            return Err(broken(format!(
                "it has format {}, this build knows {FORMAT}; use the build that wrote it",
                head["format"]
            )));
        }
        let stored: Stored = serde_json::from_value(head).map_err(|e| broken(e.to_string()))?;
        if stored.record.vm != *vm {
            return Err(broken(format!("it is the record of {}", stored.record.vm)));
        }
        Ok(Some(stored))
    }

    /// Compares and swaps: writes what `change` makes of the record, if it
    /// makes something of it, and returns what is written.
    ///
    /// # Errors
    /// [`Error`]: then the old record or the new one is written.
    pub fn swap(
        &self,
        vm: &VmId,
        change: impl FnOnce(Option<&Record>) -> Result<Record, Refused>,
    ) -> Result<Result<Record, Refused>, Error> {
        self.swap_telling(vm, |current, told| (change(current), told.cloned()))
    }

    /// The same, for changes that depend on of which owner the other end was told that it has the VM, or
    /// tell it: that is written even if the change is refused, and before anybody is answered.
    ///
    /// # Errors
    /// As [`Ledger::swap`].
    pub fn swap_telling(
        &self,
        vm: &VmId,
        change: impl FnOnce(
            Option<&Record>,
            Option<&InstanceId>,
        ) -> (Result<Record, Refused>, Option<InstanceId>),
    ) -> Result<Result<Record, Refused>, Error> {
        let lock = self.lock().map_err(|e| self.fail("lock", vm, e))?;
        let before = self.stored(vm)?;
        let current = before.as_ref().map(|stored| &stored.record);
        let (answer, told) = change(current, before.as_ref().and_then(|b| b.told.as_ref()));
        let Some(record) = answer.as_ref().ok().or(current).cloned() else {
            return Ok(answer);
        };
        let next = Stored { format: FORMAT, record, told };
        let written = match before.as_ref() == Some(&next) {
            true if answer.is_err() => Ok(()),
            // N.B. whoever renamed it may have been killed before it made that last.
            true => rustix::fs::fsync(&self.folder).map_err(io::Error::from),
            false => self.write(vm, &next),
        };
        written.map_err(|e| self.fail("write", vm, e))?;
        drop(lock);
        Ok(answer)
    }

    fn lock(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let own = rustix::fs::openat(&self.folder, ".", flags, Mode::empty())?;
        // Held for one small write; another holder is another short one.
        rustix::io::retry_on_intr(|| rustix::fs::flock(&own, FlockOperation::LockExclusive))?;
        Ok(own)
    }

    fn write(&self, vm: &VmId, stored: &Stored) -> io::Result<()> {
        let name = format!("{vm}.json");
        let draft = format!("{vm}.new");
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&self.folder, &draft, flags, Mode::from_raw_mode(0o600))?;
        let mut file = File::from(fd);
        let written = serde_json::to_vec(stored)
            .map_err(io::Error::from)
            .and_then(|bytes| file.write_all(&bytes))
            .and_then(|()| file.sync_all());
        if let Err(error) = written {
            // The draft is nobody's truth.
            let _ = rustix::fs::unlinkat(&self.folder, &draft, AtFlags::empty());
            return Err(error);
        }
        rustix::fs::renameat(&self.folder, &draft, &self.folder, &name)?;
        Ok(rustix::fs::fsync(&self.folder)?)
    }

    fn fail(&self, what: &'static str, vm: &VmId, source: io::Error) -> Error {
        Error::Io { what, vm: vm.clone(), folder: self.path.clone(), source }
    }
}

fn file_name(vm: &VmId) -> Result<String, Error> {
    let bytes = vm.0.as_bytes();
    let valid = (1..=63).contains(&bytes.len())
        && bytes[0].is_ascii_alphanumeric()
        && bytes.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-.".contains(b));
    if valid { Ok(format!("{vm}.json")) } else { Err(Error::Name(vm.clone())) }
}
