//! Where disks are written to.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Seek as _, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, OFlags, fallocate};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::sparse::{BLOCK, PIECE, runs};
use crate::work::{self, Held, load, save, sync_folder};
use crate::{Error, Target};

/// Zeros are asked for in steps of this, so that an import can be given up between them.
const ZERO_STEP: u64 = 1 << 30;
const HOLES: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);

/// The inode that a job made, so that it knows it again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Made {
    path: PathBuf,
    /// None between the decision to make it and the record that it is made.
    inode: Option<(u64, u64)>,
}

/// An open target.
pub(crate) struct Disk {
    pub file: File,
    pub path: PathBuf,
    pub size: u64,
    /// Whether it reads as zeros where nothing was written.
    pub zero: bool,
    /// How a range is made zeros: a device keeps its room, a file gives it back.
    zeros: FallocateFlags,
}

impl Target {
    /// Its size, if it can be written to, without changing anything.
    pub(crate) fn size(&self, state: &Path) -> Result<u64, Error> {
        let mut options = OpenOptions::new();
        options.read(true);
        match self {
            Self::File { path, size } => existing(path, &options, state).map(|_| *size),
            Self::Block { path } => block(path, &options, OFlags::empty())?.length(),
            Self::Allotted { path } => allotted(path, &options)?.length(),
        }
    }

    /// Opens it for a job that keeps its state in the given file; a file becomes empty.
    pub(crate) fn open(&self, state: &Path) -> Result<Disk, Error> {
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        match self {
            Self::File { path, size } => {
                let file = make(path, &options, state)?;
                file.set_len(0)
                    .and_then(|()| file.set_len(*size))
                    .map_err(Error::io("resize", path))?;
                let path = path.clone();
                Ok(Disk { file, path, size: *size, zero: true, zeros: HOLES })
            }
            Self::Block { path } => {
                // Exclusively, since a mounted device must not be overwritten.
                let opened = block(path, &options, OFlags::EXCL)?;
                let size = opened.length()?;
                let (Opened::File(file, _) | Opened::Block(file, _)) = opened;
                let path = path.clone();
                Ok(Disk { file, path, size, zero: false, zeros: FallocateFlags::ZERO_RANGE })
            }
            Self::Allotted { path } => {
                let opened = allotted(path, &options)?;
                let size = opened.length()?;
                let (Opened::File(file, _) | Opened::Block(file, _)) = opened;
                let path = path.clone();
                Ok(Disk { file, path, size, zero: false, zeros: HOLES })
            }
        }
    }

    /// Whether a file is there which this job made. What is not made by jobs always is.
    pub(crate) fn is_made(&self, state: &Path) -> Result<bool, Error> {
        let Self::File { path, .. } = self else { return Ok(true) };
        let Ok(metadata) = path.symlink_metadata() else { return Ok(false) };
        let inode = Some((metadata.dev(), metadata.ino()));
        Ok(load(state)? == Some(Made { path: path.clone(), inode }))
    }
}

/// What a path led to.
pub(crate) enum Opened {
    File(File, PathBuf),
    Block(File, PathBuf),
}

impl Opened {
    pub fn length(&self) -> Result<u64, Error> {
        let (Self::File(file, path) | Self::Block(file, path)) = self;
        let mut file = file;
        file.seek(SeekFrom::End(0)).map_err(Error::io("measure", path))
    }
}

/// Opens a regular file or block device, and never what a link leads to.
pub(crate) fn open(path: &Path, options: &mut OpenOptions, flags: u32) -> Result<Opened, Error> {
    // Without NONBLOCK, the opening of a pipe would wait for its other end.
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits() | flags;
    let file =
        options.custom_flags(flags as i32).open(path).map_err(|error| refused(path, error))?;
    let kind = file.metadata().map_err(Error::io("inspect", path))?.file_type();
    match () {
        () if kind.is_file() => Ok(Opened::File(file, path.to_owned())),
        () if kind.is_block_device() => Ok(Opened::Block(file, path.to_owned())),
        () => Err(not_a_disk(path)),
    }
}

fn refused(path: &Path, error: io::Error) -> Error {
    match Errno::from_io_error(&error) {
        Some(Errno::LOOP | Errno::ISDIR | Errno::NXIO) => not_a_disk(path),
        _ => Error::io("open", path)(error),
    }
}

fn not_a_disk(path: &Path) -> Error {
    Error::Kind { path: path.to_owned(), expected: "a regular file or a block device" }
}

fn block(path: &Path, options: &OpenOptions, flags: OFlags) -> Result<Opened, Error> {
    match open(path, &mut options.clone(), flags.bits())? {
        opened @ Opened::Block(..) => Ok(opened),
        Opened::File(..) => Err(Error::Kind { path: path.to_owned(), expected: "a block device" }),
    }
}

fn allotted(path: &Path, options: &OpenOptions) -> Result<Opened, Error> {
    match open(path, &mut options.clone(), 0)? {
        opened @ Opened::File(..) => Ok(opened),
        Opened::Block(..) => Err(Error::Kind { path: path.to_owned(), expected: "a regular file" }),
    }
}

/// Creates a file, or opens it if an earlier run of this job created it.
fn make(path: &Path, options: &OpenOptions, state: &Path) -> Result<File, Error> {
    match existing(path, options, state)? {
        Some(file) => Ok(file),
        None => make_new(path, options, state),
    }
}

/// Opens a file that an earlier run of this job created, if there is one.
fn existing(path: &Path, options: &OpenOptions, state: &Path) -> Result<Option<File>, Error> {
    let made = load::<Made>(state)?.filter(|made| made.path == path);
    match open(path, &mut options.clone(), 0) {
        Ok(Opened::File(file, _)) if is_ours(&file, path, made.as_ref())? => Ok(Some(file)),
        Ok(Opened::File(..)) => Err(Error::Taken { path: path.to_owned() }),
        Ok(Opened::Block(..)) => {
            Err(Error::Kind { path: path.to_owned(), expected: "a regular file" })
        }
        Err(Error::Io { source, .. }) if source.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn make_new(path: &Path, options: &OpenOptions, state: &Path) -> Result<File, Error> {
    // Recorded before it is made: after a crash between the two it is known again.
    save(state, &Made { path: path.to_owned(), inode: None })?;
    let file = options
        .clone()
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(Error::io("create", path))?;
    let inode = Some(inode_of(&file, path)?);
    sync_folder(path)?;
    save(state, &Made { path: path.to_owned(), inode })?;
    Ok(file)
}

fn is_ours(file: &File, path: &Path, made: Option<&Made>) -> Result<bool, Error> {
    Ok(match made {
        None => false,
        Some(Made { inode: Some(inode), .. }) => *inode == inode_of(file, path)?,
        // The crash was before the first byte of it.
        Some(Made { inode: None, .. }) => {
            file.metadata().map_err(Error::io("inspect", path))?.blocks() == 0
        }
    })
}

fn inode_of(file: &File, path: &Path) -> Result<(u64, u64), Error> {
    let metadata = file.metadata().map_err(Error::io("inspect", path))?;
    Ok((metadata.dev(), metadata.ino()))
}

impl Disk {
    /// Creates a file anew in a folder of ours.
    pub fn create(path: &Path, size: u64) -> Result<Self, Error> {
        let file = work::create(path)?;
        file.set_len(size).map_err(Error::io("resize", path))?;
        Ok(Self { file, path: path.to_owned(), size, zero: true, zeros: HOLES })
    }

    /// Writes a piece; its zeros become holes where that is possible.
    pub fn write(&self, piece: &[u8], offset: u64) -> Result<(), Error> {
        for (range, data) in runs(piece) {
            let at = offset + range.start as u64;
            match data {
                true => self.put(&piece[range], at)?,
                false => self.zero(at, range.len() as u64)?,
            }
        }
        Ok(())
    }

    fn zero(&self, offset: u64, length: u64) -> Result<(), Error> {
        if self.zero || length == 0 {
            return Ok(());
        }
        let end = offset + length;
        let block = BLOCK as u64;
        let (first, last) = (offset.next_multiple_of(block).min(end), end / block * block);
        self.put_zeros(offset, first)?;
        if last > first {
            match fallocate(&self.file, self.zeros, first, last - first) {
                Ok(()) => {}
                Err(Errno::OPNOTSUPP | Errno::INVAL | Errno::NODEV) => {
                    self.put_zeros(first, last)?;
                }
                Err(error) => return Err(Error::io("write zeros to", &self.path)(error.into())),
            }
        }
        self.put_zeros(last.max(first), end)
    }

    /// Makes an extent read as zeros, however long it is.
    pub fn zero_extent(&self, extent: Range<u64>, held: &Held) -> Result<(), Error> {
        let mut offset = extent.start;
        while !self.zero && offset < extent.end {
            held.check()?;
            let length = ZERO_STEP.min(extent.end - offset);
            self.zero(offset, length)?;
            offset += length;
        }
        Ok(())
    }

    /// Makes everything from an offset on read as zeros, and all of it durable.
    pub fn finish(&self, offset: u64, held: &Held) -> Result<(), Error> {
        self.zero_extent(offset..self.size, held)?;
        self.file.sync_all().map_err(Error::io("write", &self.path))
    }

    fn put(&self, data: &[u8], offset: u64) -> Result<(), Error> {
        self.file.write_all_at(data, offset).map_err(Error::io("write", &self.path))
    }

    fn put_zeros(&self, mut start: u64, end: u64) -> Result<(), Error> {
        static ZEROS: [u8; PIECE] = [0; PIECE];
        while start < end {
            let length = (end - start).min(PIECE as u64);
            self.put(&ZEROS[..length as usize], start)?;
            start += length;
        }
        Ok(())
    }
}
