//! A raw disk: a file or a block device, read and written past the page cache
//! wherever the filesystem can.
//!
//! Every disk is opened once, without following a link, and checked through
//! its descriptor. All later work goes through that descriptor.

use crate::extent::{Extent, ExtentSet};
use crate::locks;
use rustix::fs::{FallocateFlags, FileType, Mode, OFlags, SeekFrom};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Alignment of offset, length and memory that direct I/O gets. 4096 covers
/// every logical block size that Linux has.
pub const ALIGN: u64 = 4096;
/// Disks are counted in sectors: a size that is no multiple cannot be shown to a guest.
pub const SECTOR: u64 = 512;

/// What went wrong with a disk, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be opened.
    #[error("cannot open disk {path}; check that it exists and that Godwit may read and write it")]
    Open {
        /// The disk.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is something else than a file or a block device.
    #[error(
        "{path} is neither a regular file nor a block device (links are not followed); give the disk's own path"
    )]
    Kind {
        /// The path.
        path: PathBuf,
    },
    /// Its size is no whole number of sectors.
    #[error(
        "disk {path} is {size} bytes, not a multiple of {SECTOR}; extend it with `truncate -s %512`"
    )]
    Sectors {
        /// The disk.
        path: PathBuf,
        /// Its size.
        size: u64,
    },
    /// The target is smaller than the source.
    #[error(
        "target disk {path} is {size} bytes, the source is {needed}; make it at least as large"
    )]
    TooSmall {
        /// The target.
        path: PathBuf,
        /// Its size.
        size: u64,
        /// The source's size.
        needed: u64,
    },
    /// Somebody else has it open as the disk of a VM.
    #[error(
        "disk {path} is in use by another VM or tool of QEMU; end that, or choose another disk"
    )]
    InUse {
        /// The disk.
        path: PathBuf,
    },
    /// An operation failed.
    #[error("cannot {what} {len} bytes at {offset} of disk {path}")]
    Io {
        /// read, write, …
        what: &'static str,
        /// The disk.
        path: PathBuf,
        /// Where.
        offset: u64,
        /// How much.
        len: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What holds the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Medium {
    /// A regular file: its holes can be told.
    File,
    /// A block device: its zeros are found by reading.
    Block,
}

/// Which disk it is, and whether somebody wrote it: equal identities taken at
/// two times mean that nobody touched the disk in between.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Device that holds the inode (files), or the device itself.
    pub device: u64,
    /// Inode (files), 0 for a device.
    pub inode: u64,
    /// Size in bytes.
    pub size: u64,
    /// Last write in nanoseconds since 1970 (files), 0 for a device, which keeps none.
    pub modified_ns: i64,
}

/// An open disk.
#[derive(Debug)]
pub struct Disk {
    path: PathBuf,
    medium: Medium,
    size: u64,
    /// For aligned I/O; without O_DIRECT where the filesystem has none.
    main: File,
    direct: bool,
    /// For what is not aligned: the tail of an odd-sized disk.
    cached: File,
}

impl Disk {
    /// Opens a disk for reading.
    ///
    /// # Errors
    /// [`Error::Open`], [`Error::Kind`], [`Error::Sectors`].
    pub fn source(path: &Path) -> Result<Self, Error> {
        Self::open(path, OFlags::RDONLY)
    }

    /// Opens a disk for writing, the target of a source of `size` bytes. A
    /// file that does not exist is created, sparse and of that size.
    /// Says whether it did.
    ///
    /// Until [`Disk::release`] nobody else may open it for a VM.
    ///
    /// # Errors
    /// Those of [`Disk::source`], [`Error::TooSmall`] and [`Error::InUse`].
    pub fn target(path: &Path, size: u64) -> Result<(Self, bool), Error> {
        let created = Self::create(path, size)?;
        let disk = Self::open(path, OFlags::RDWR)?;
        match locks::take(&disk.cached) {
            Ok(true) => {}
            Ok(false) => return Err(Error::InUse { path: path.into() }),
            Err(source) => return Err(disk.fail("lock", 0, disk.size, source)),
        }
        if disk.size < size {
            return Err(Error::TooSmall { path: path.into(), size: disk.size, needed: size });
        }
        Ok((disk, created))
    }

    /// Whether it is known to read as zeros: a file that has no data at all, as one that was just created.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn is_hole(&self) -> Result<bool, Error> {
        Ok(self.medium == Medium::File && self.seek(SeekFrom::Data(0))?.is_none())
    }

    /// Makes a file that nobody uses larger: what it gains reads as zeros.
    ///
    /// # Errors
    /// [`Error::Open`], [`Error::Io`].
    pub fn grow(path: &Path, size: u64) -> Result<(), Error> {
        let disk = Self::open(path, OFlags::RDWR)?;
        let grown = disk.cached.set_len(size).and_then(|()| disk.cached.sync_all());
        grown.map_err(|source| disk.fail("grow by", disk.size, size - disk.size, source))
    }

    /// Makes a file, sparse and of that size, where there is none.
    ///
    /// # Errors
    /// [`Error::Open`], [`Error::Io`].
    pub fn blank(path: &Path, size: u64) -> Result<(), Error> {
        Self::create(path, size).map(|_| ())
    }

    fn create(path: &Path, size: u64) -> Result<bool, Error> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let file = match rustix::fs::open(path, flags, Mode::from_raw_mode(0o600)) {
            Ok(fd) => File::from(fd),
            Err(Errno::EXIST) => return Ok(false),
            Err(errno) => return Err(Error::Open { path: path.into(), source: errno.into() }),
        };
        file.set_len(size).and_then(|()| file.sync_all()).map_err(|source| Error::Io {
            what: "reserve",
            path: path.into(),
            offset: 0,
            len: size,
            source,
        })?;
        Ok(true)
    }

    fn open(path: &Path, access: OFlags) -> Result<Self, Error> {
        let fail = |source: io::Error| Error::Open { path: path.into(), source };
        let flags = access | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let cached = match rustix::fs::open(path, flags | OFlags::NONBLOCK, Mode::empty()) {
            Ok(fd) => File::from(fd),
            Err(Errno::LOOP) => return Err(Error::Kind { path: path.into() }),
            Err(errno) => return Err(fail(errno.into())),
        };
        let stat = rustix::fs::fstat(&cached).map_err(|e| fail(e.into()))?;
        let medium = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => Medium::File,
            FileType::BlockDevice => Medium::Block,
            _ => return Err(Error::Kind { path: path.into() }),
        };
        let size = rustix::fs::seek(&cached, SeekFrom::End(0)).map_err(|e| fail(e.into()))?;
        if size % SECTOR != 0 {
            return Err(Error::Sectors { path: path.into(), size });
        }
        // N.B. reopened through the descriptor: the path may name something else by now.
        let same = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&cached));
        let flags = access | OFlags::CLOEXEC;
        let (main, direct) = match rustix::fs::open(&same, flags | OFlags::DIRECT, Mode::empty()) {
            Ok(fd) => (File::from(fd), true),
            Err(_) => (cached.try_clone().map_err(fail)?, false),
        };
        // N.B. QEMU finds out alike, and refuses to write past the cache what does not end with a block.
        let direct = direct && (size.is_multiple_of(ALIGN) || takes_sectors(&main));
        Ok(Self { path: path.into(), medium, size, main, direct, cached })
    }

    /// Whether no VM and no move uses it: nobody has QEMU's locks on it.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn is_free(&self) -> Result<bool, Error> {
        let taken = locks::take(&self.cached);
        let taken = taken.map_err(|e| self.fail("lock", 0, self.size, e))?;
        if taken {
            self.release()?;
        }
        Ok(taken)
    }

    /// Lets QEMU have a target's disk, which is written no more.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn release(&self) -> Result<(), Error> {
        locks::release(&self.cached).map_err(|e| self.fail("unlock", 0, self.size, e))
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What holds it.
    pub fn medium(&self) -> Medium {
        self.medium
    }

    /// Its size in bytes when it was opened.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether reads and writes pass the page cache by.
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// Which disk it is and when it was last written.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn identity(&self) -> Result<Identity, Error> {
        let meta = self.cached.metadata().map_err(|e| self.fail("examine", 0, 0, e))?;
        Ok(match self.medium {
            Medium::File => Identity {
                device: meta.dev(),
                inode: meta.ino(),
                size: self.size,
                // Good until 2262.
                modified_ns: meta.mtime().saturating_mul(1_000_000_000) + meta.mtime_nsec(),
            },
            Medium::Block => {
                Identity { device: meta.rdev(), inode: 0, size: self.size, modified_ns: 0 }
            }
        })
    }

    fn fail(&self, what: &'static str, offset: u64, len: u64, source: io::Error) -> Error {
        Error::Io { what, path: self.path.clone(), offset, len, source }
    }

    fn file_for(&self, offset: u64, len: usize) -> &File {
        let aligned = offset.is_multiple_of(ALIGN) && (len as u64).is_multiple_of(ALIGN);
        if aligned { &self.main } else { &self.cached }
    }

    /// Fills `buffer` (from [`aligned`]) with what is at `offset`.
    ///
    /// # Errors
    /// [`Error::Io`], also when the disk ends before the buffer is full.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Error> {
        let len = buffer.len();
        self.file_for(offset, len)
            .read_exact_at(buffer, offset)
            .map_err(|e| self.fail("read", offset, len as u64, e))
    }

    /// Writes `bytes` (from [`aligned`]) at `offset`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        self.file_for(offset, bytes.len())
            .write_all_at(bytes, offset)
            .map_err(|e| self.fail("write", offset, bytes.len() as u64, e))
    }

    /// Makes `extent` read as zeros, without allocation where the medium can.
    /// Never a bare discard, after which a device may return anything.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn zero(&self, extent: Extent) -> Result<(), Error> {
        for flags in [
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE,
        ] {
            match rustix::fs::fallocate(&self.cached, flags, extent.offset, extent.len) {
                Ok(()) => return Ok(()),
                // EINVAL: a block device takes only what is aligned to its logical blocks.
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {}
                Err(e) => return Err(self.fail("zero", extent.offset, extent.len, e.into())),
            }
        }
        let mut buffer = Vec::new();
        let zeros = aligned(&mut buffer, (1 << 20).min(extent.len as usize));
        let mut at = extent.offset;
        while at < extent.end() {
            let n = (zeros.len() as u64).min(extent.end() - at) as usize;
            self.write(at, &zeros[..n])?;
            at += n as u64;
        }
        Ok(())
    }

    /// Puts everything written so far on stable storage and out of the page
    /// cache: QEMU drops a whole cache inside the pause otherwise.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn sync(&self) -> Result<(), Error> {
        self.cached.sync_data().map_err(|e| self.fail("sync", 0, self.size, e))?;
        if !self.direct {
            // Only advice: a filesystem that ignores it costs time in the pause, nothing else.
            let _ = rustix::fs::fadvise(&self.cached, 0, None, rustix::fs::Advice::DontNeed);
        }
        Ok(())
    }

    /// Splits `extents` into what holds data and what is known to read as zeros.
    /// Costs per hole, not per byte. All of a block device counts as data.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn classify(&self, extents: &ExtentSet) -> Result<(ExtentSet, ExtentSet), Error> {
        let mut holes = ExtentSet::new();
        if self.medium == Medium::File {
            // N.B. behind its end a file looks like a hole: a source that was cut must not pass for zeros.
            let now = self.cached.metadata().map_err(|e| self.fail("examine", 0, self.size, e))?;
            if now.len() < self.size {
                let error = io::Error::new(io::ErrorKind::UnexpectedEof, "it has been cut");
                return Err(self.fail("read", now.len(), self.size - now.len(), error));
            }
            for extent in extents.iter() {
                self.holes_of(extent, &mut holes)?;
            }
        }
        let mut data = extents.clone();
        data.subtract(&holes);
        Ok((data, holes))
    }

    fn holes_of(&self, extent: Extent, holes: &mut ExtentSet) -> Result<(), Error> {
        let mut at = extent.offset;
        while at < extent.end() {
            let hole = self.seek(SeekFrom::Hole(at))?.unwrap_or(extent.end());
            if hole >= extent.end() {
                break;
            }
            let data = self.seek(SeekFrom::Data(hole))?.unwrap_or(extent.end()).min(extent.end());
            holes.insert(Extent::new(hole, data - hole));
            at = data;
        }
        Ok(())
    }

    /// None: no such place up to the end of the file.
    fn seek(&self, to: SeekFrom) -> Result<Option<u64>, Error> {
        match rustix::fs::seek(&self.cached, to) {
            Ok(at) => Ok(Some(at)),
            Err(Errno::NXIO) => Ok(None),
            Err(e) => Err(self.fail("find holes in", 0, self.size, e.into())),
        }
    }
}

/// Whether a file that is opened past the cache can be read by single sectors.
fn takes_sectors(direct: &File) -> bool {
    let mut buffer = Vec::new();
    direct.read_exact_at(aligned(&mut buffer, SECTOR as usize), SECTOR).is_ok()
}

/// A slice of `len` bytes of `buffer`, grown as needed, whose address is fit for direct I/O.
pub fn aligned(buffer: &mut Vec<u8>, len: usize) -> &mut [u8] {
    let align = ALIGN as usize;
    if buffer.len() < len + align {
        buffer.resize(len + align, 0);
    }
    let skip = buffer.as_ptr().align_offset(align);
    &mut buffer[skip..skip + len]
}
