//! A host file or block device, and its lock.

use crate::stub::error::Error;
use oracle::region::Buffer;
use rustix::fs::OFlags;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::sync::Arc;

/// What O_DIRECT wants everything aligned to, whatever the disk.
const ALIGNMENT: u64 = 4096;

/// A file that a node stands for.
#[derive(Debug)]
pub struct Image {
    /// As it was named.
    pub path: String,
    /// Open, past the page cache if [`Image::direct`].
    pub file: Arc<File>,
    /// Whether the host's page cache is passed by.
    pub direct: bool,
    /// Whether it is a block device.
    pub device: bool,
    locking: bool,
    claim: Claim,
}

/// What its user wants of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Claim {
    /// Nothing yet: no device is attached.
    None,
    /// To read, or to write beside others.
    Shared,
    /// To write alone.
    Alone,
}

impl Image {
    /// Opens a file.
    ///
    /// # Errors
    /// As QEMU, with the host's reason.
    pub fn open(path: &str, direct: bool, read_only: bool, locking: bool) -> Result<Self, Error> {
        let fail = |error: io::Error| {
            Error::generic(format!("Could not open '{path}': {}", reason(&error)))
        };
        let flags = if direct { OFlags::DIRECT.bits() as i32 } else { 0 };
        let mut options = OpenOptions::new();
        let file = options.read(true).write(!read_only).custom_flags(flags).open(path);
        let file = file.map_err(fail)?;
        let device = file.metadata().map_err(fail)?.file_type().is_block_device();
        let (path, file) = (path.to_owned(), Arc::new(file));
        Ok(Self { path, file, direct, device, locking, claim: Claim::None })
    }

    /// Bytes that it has.
    ///
    /// # Errors
    /// When the host cannot tell.
    pub fn len(&self) -> io::Result<u64> {
        (&*self.file).seek(SeekFrom::End(0))
    }

    /// A device of the guest uses it from now on.
    pub fn use_by_device(&mut self, read_only: bool, share: bool) {
        self.claim = if read_only || share { Claim::Shared } else { Claim::Alone };
    }

    /// Takes the lock; false when somebody else has it.
    pub fn lock(&self) -> bool {
        match self.claim {
            Claim::Alone if self.locking => {
                self.file.try_lock().is_ok() && mover::locks::take(&self.file).is_ok_and(|had| had)
            }
            Claim::Shared if self.locking => self.file.try_lock_shared().is_ok(),
            _ => true,
        }
    }

    /// Gives the lock back.
    pub fn unlock(&self) {
        // Nobody else can hold this description's locks: it cannot fail.
        let _ = self.file.unlock();
        let _ = mover::locks::release(&self.file);
    }

    /// QEMU's words when the lock is not to be had.
    pub fn refusal(&self) -> Error {
        let bit = if self.claim == Claim::Shared { "shared \"write\"" } else { "\"write\"" };
        Error::generic(format!("Failed to get {bit} lock"))
    }

    /// Changes the file's length.
    ///
    /// # Errors
    /// As QEMU: a block device cannot; or the host refuses.
    pub fn resize(&self, size: u64) -> Result<(), Error> {
        if self.device {
            return match self.len() {
                Ok(len) if len == size => Ok(()),
                _ => Err(Error::generic("Cannot resize device files")),
            };
        }
        let fail = |e| Error::generic(format!("Failed to resize the file: {}", reason(&e)));
        self.file.set_len(size).map_err(fail)
    }

    /// Writes; through an aligned copy where O_DIRECT needs one.
    ///
    /// # Errors
    /// The host's.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let aligned = bytes.as_ptr().align_offset(ALIGNMENT as usize) == 0;
        if !self.direct || aligned {
            return self.file.write_all_at(bytes, offset);
        }
        let mut copy = Buffer::new(bytes.len());
        copy.bytes().copy_from_slice(bytes);
        self.file.write_all_at(copy.bytes(), offset)
    }
}

/// Reads `len` bytes at `offset`; what lies beyond the file's end is zero.
///
/// # Errors
/// The host's.
pub fn read_at(file: &File, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    let begin = offset / ALIGNMENT * ALIGNMENT;
    let end = (offset + len as u64).next_multiple_of(ALIGNMENT);
    let mut buffer = Buffer::new((end - begin) as usize);
    let mut filled = 0;
    while begin + (filled as u64) < end {
        match file.read_at(&mut buffer.bytes()[filled..], begin + filled as u64) {
            // A short read past the page cache ends unaligned: only at the file's end.
            Ok(n) if n == 0 || !(n as u64).is_multiple_of(ALIGNMENT) => break,
            Ok(n) => filled += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    let skip = (offset - begin) as usize;
    Ok(buffer.bytes()[skip..skip + len].to_vec())
}

/// The host's reason without Rust's number after it, as QEMU prints it.
pub fn reason(error: &io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or_default().to_owned()
}
