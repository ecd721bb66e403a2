//! Imports.

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::progress::{Reports, Step, report};
use crate::sparse::{PIECE, extent, read_up_to};
use crate::target::{Disk, Opened, open};
use crate::work::{self, DOWNLOAD, Held, IMAGE, Work};
use crate::{Error, Format, Source, convert, format, http, peer, registry, unpack};

/// The target's inode, in the work folder.
const TARGET_STATE: &str = "target.json";
/// What came out, in the work folder, once it is complete.
const DONE: &str = "done.json";

/// An import: what to bring where.
#[derive(Debug, Clone)]
pub struct Job {
    /// Where the image comes from.
    pub source: Source,
    /// Where its disk goes.
    pub target: Target,
    /// A folder of this job's own. Its content survives restarts, so that the job goes on; the
    /// caller removes it when it no longer asks for this import.
    pub work: PathBuf,
    /// Stands before each command that reads an image that is not trusted, and confines it:
    /// a program that calls [`confine`](crate::confine), or otherwise becomes the command (by
    /// exec), so that it ends with the import. Empty to run them as they are.
    pub shim: Vec<OsString>,
    /// What it may use.
    pub limits: Limits,
}

/// Where a disk goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// A raw file, which must not exist before the job's first run.
    File {
        /// Its path.
        path: PathBuf,
        /// Its size in bytes. What the image does not fill reads as zeros.
        size: u64,
    },
    /// A block device, all of which is overwritten.
    Block {
        /// Its path, which must not be a link.
        path: PathBuf,
    },
    /// A regular file that stands for a block device: it exists, keeps its size, and all of it is
    /// overwritten.
    Allotted {
        /// Its path, which must not be a link.
        path: PathBuf,
    },
}

/// What an import may use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// The most that is downloaded, and the most that it may be when decompressed.
    pub max_bytes: u64,
    /// A download without any progress for so long is broken.
    pub stall: Duration,
    /// How often in a row a broken download is tried again without having made progress.
    pub retries: u32,
    /// The wait before the first of these tries; it doubles with each.
    pub backoff: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_bytes: 1 << 40,
            stall: Duration::from_secs(30),
            retries: 5,
            backoff: Duration::from_millis(500),
        }
    }
}

/// What an import has brought.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Imported {
    /// Size of the disk in the image; 0 if there was no image.
    pub virtual_size: u64,
    /// The image's format, after decompression.
    pub format: Format,
    /// How many bytes this run fetched over the network.
    pub bytes_moved: u64,
}

/// An image that is here and can be written to a disk.
pub(crate) struct Image {
    pub path: PathBuf,
    pub format: Format,
    pub virtual_size: u64,
    pub bytes_moved: u64,
}

/// Brings a job's image to its target.
///
/// When this future is dropped, or the process dies, a later import of the same job goes on
/// with what is in its work folder; it waits until what the dropped one still does has ended.
/// An import that was complete before does nothing, so that a disk is not overwritten which a
/// guest may use already.
///
/// # Errors
///
/// See [`Error`]. Nothing is written to the target unless the image is complete, verified, in
/// a format that is taken, and fits; but what a peer lends is written as it comes.
///
/// # Panics
///
/// If the source is HTTP or a registry and the process has no TLS provider.
pub async fn import(job: &Job, progress: &Reports) -> Result<Imported, Error> {
    let work = Work::open(&job.work, progress).await?;
    work.claim(&job.identity()).await?;
    if let Some(imported) = finished(job, &work).await? {
        // The run that completed it may have died before it could do this.
        work.clear().await?;
        return Ok(imported);
    }
    let imported = bring(job, &work, progress).await?;
    let (path, done) = (work.path(DONE), imported.clone());
    work.blocking(move |_| work::save(&path, &done)).await?;
    work.clear().await?;
    Ok(imported)
}

impl Job {
    fn identity(&self) -> String {
        format!("{} to {:?}", self.source.identity(), self.target)
    }
}

async fn finished(job: &Job, work: &Work) -> Result<Option<Imported>, Error> {
    let (target, state) = (job.target.clone(), work.path(TARGET_STATE));
    let done = work.path(DONE);
    work.blocking(move |_| match work::load(&done)? {
        Some(imported) if target.is_made(&state)? => Ok(Some(imported)),
        _ => work::remove(&done).map(|()| None),
    })
    .await
}

async fn bring(job: &Job, work: &Work, reports: &Reports) -> Result<Imported, Error> {
    if let Source::Peer(it) = &job.source {
        let disk = open_target(job, work).await?;
        return peer::bring(it, disk, work, &job.limits, reports).await;
    }
    let (target, state) = (job.target.clone(), work.path(TARGET_STATE));
    let size = work.blocking(move |_| target.size(&state)).await?;
    let image = obtain(&job.source, work, &job.limits, size, reports).await?;
    if let Some(image) = &image {
        if image.virtual_size > size {
            return Err(Error::TooLarge { image: image.virtual_size, disk: size });
        }
        convert::inspect(image, work, &job.shim, size).await?;
    }
    let disk = open_target(job, work).await?;
    write(image.as_ref(), disk, work, &job.shim, reports).await?;
    Ok(image.map_or(Imported { virtual_size: 0, format: Format::Raw, bytes_moved: 0 }, |it| {
        Imported { virtual_size: it.virtual_size, format: it.format, bytes_moved: it.bytes_moved }
    }))
}

async fn open_target(job: &Job, work: &Work) -> Result<Disk, Error> {
    let (target, state) = (job.target.clone(), work.path(TARGET_STATE));
    work.blocking(move |_| target.open(&state)).await
}

/// Brings an image to the work folder, decompressed, as far as it is not there yet.
async fn obtain(
    source: &Source,
    work: &Work,
    limits: &Limits,
    disk: u64,
    reports: &Reports,
) -> Result<Option<Image>, Error> {
    let unpacked = work.path(IMAGE);
    let mut bytes_moved = 0;
    let (path, known) = match source {
        Source::Blank | Source::Peer(_) => return Ok(None),
        Source::File { path, format: Some(format) } => (path.clone(), Some(*format)),
        _ if unpacked.exists() => (unpacked, None),
        Source::File { path, format: None } => {
            (unpack::file(path, work, limits, disk, reports).await?, None)
        }
        Source::Http(_) | Source::Registry(_) => {
            if !work.path(DOWNLOAD).exists() {
                bytes_moved = fetch(source, work, limits, reports).await?;
            }
            (unpack::download(work, limits, disk, reports).await?, None)
        }
    };
    work.blocking(move |_| Image::open(path, known, bytes_moved).map(Some)).await
}

impl Image {
    /// Looks at an image whose format is known, or is to be detected.
    pub(crate) fn open(
        path: PathBuf,
        known: Option<Format>,
        bytes_moved: u64,
    ) -> Result<Self, Error> {
        let format = known.map_or_else(|| format::detect(&path), Ok)?;
        let virtual_size = format::size_as(&path, format)?;
        Ok(Self { path, format, virtual_size, bytes_moved })
    }
}

async fn fetch(
    source: &Source,
    work: &Work,
    limits: &Limits,
    reports: &Reports,
) -> Result<u64, Error> {
    report(reports, Step::Downloading, 0, None);
    match source {
        Source::Http(http) => http::download(http, work, limits, reports).await,
        Source::Registry(it) => registry::download(it, work, limits, reports).await,
        Source::Blank | Source::Peer(_) | Source::File { .. } => Ok(0),
    }
}

/// Writes an image, or nothing, to a disk, all of which is defined afterwards.
pub(crate) async fn write(
    image: Option<&Image>,
    disk: Disk,
    work: &Work,
    shim: &[OsString],
    reports: &Reports,
) -> Result<(), Error> {
    let reports = reports.clone();
    match image {
        Some(image) if image.format == Format::Qcow2 => {
            convert::convert(image, &disk, work, shim, &reports).await?;
            let start = image.virtual_size;
            work.blocking(move |held| disk.finish(start, held)).await
        }
        Some(image) => {
            let path = image.path.clone();
            work.blocking(move |held| copy(&path, &disk, held, &reports)).await
        }
        None => work.blocking(move |held| disk.finish(0, held)).await,
    }
}

/// Copies a raw image.
fn copy(path: &Path, disk: &Disk, held: &Held, reports: &Reports) -> Result<(), Error> {
    let opened = open(path, std::fs::OpenOptions::new().read(true), 0)?;
    let length = opened.length()?;
    if length > disk.size {
        return Err(Error::TooLarge { image: length, disk: disk.size });
    }
    let (Opened::File(file, _) | Opened::Block(file, _)) = &opened;
    let mut piece = vec![0; PIECE];
    let mut position = 0;
    while position < length {
        let extent = extent(file, position, length);
        let end = extent.range.end;
        if extent.data {
            copy_data(path, file, position..end, disk, &mut piece, |done| {
                report(reports, Step::Writing, done, Some(length));
                held.check()
            })?;
        } else {
            disk.zero_extent(position..end, held)?;
        }
        position = end;
    }
    disk.finish(length, held)
}

fn copy_data(
    path: &Path,
    file: &File,
    range: std::ops::Range<u64>,
    disk: &Disk,
    piece: &mut [u8],
    each: impl Fn(u64) -> Result<(), Error>,
) -> Result<(), Error> {
    let mut position = range.start;
    while position < range.end {
        let wanted = (range.end - position).min(piece.len() as u64) as usize;
        let count =
            read_up_to(file, &mut piece[..wanted], position).map_err(Error::io("read", path))?;
        // A source that became shorter meanwhile reads as zeros.
        piece[count..wanted].fill(0);
        disk.write(&piece[..wanted], position)?;
        position += wanted as u64;
        each(position)?;
    }
    Ok(())
}
