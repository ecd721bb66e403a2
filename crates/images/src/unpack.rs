//! Decompression, told by magic and bounded.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, Cursor, Read};
use std::path::{Path, PathBuf};

use liblzma::stream::{CONCATENATED, Stream};

use crate::format::{HEAD, of_head};
use crate::progress::{Reports, Step, Watched};
use crate::sparse::{Failed, pour, read_up_to};
use crate::target::{Opened, open};
use crate::work::{self, DOWNLOAD, Held, IMAGE, IMAGE_PARTIAL, Work};
use crate::{Error, Format, Limits};

/// Enough for what `xz -9` makes.
const XZ_MEMORY: u64 = 256 << 20;

/// Turns the complete download into the complete image.
pub(crate) async fn download(
    work: &Work,
    limits: &Limits,
    disk: u64,
    reports: &Reports,
) -> Result<PathBuf, Error> {
    let path = work.path(DOWNLOAD);
    let image = file(&path, work, limits, disk, reports).await?;
    let unpacked = work.path(IMAGE);
    work.blocking(move |_| {
        if image == unpacked {
            work::remove(&path)?;
        } else {
            fs::rename(&path, &unpacked).map_err(Error::io("rename", &path))?;
        }
        Ok(unpacked)
    })
    .await
}

/// Decompresses a file into the work folder's image; one that is not compressed stays.
pub(crate) async fn file(
    path: &Path,
    work: &Work,
    limits: &Limits,
    disk: u64,
    reports: &Reports,
) -> Result<PathBuf, Error> {
    let (partial, unpacked) = (work.path(IMAGE_PARTIAL), work.path(IMAGE));
    let (path, reports) = (path.to_owned(), reports.clone());
    let bounds = Bounds { max_bytes: limits.max_bytes, disk };
    work.blocking(move |held| {
        let opened = open(&path, OpenOptions::new().read(true), 0)?;
        let total = opened.length()?;
        let (Opened::File(mut file, _) | Opened::Block(mut file, _)) = opened;
        let mut head = vec![0; HEAD];
        let count = read_up_to(&file, &mut head, 0).map_err(Error::io("read", &path))?;
        let kind = of_head(&head[..count]);
        if !is_compressed(kind) {
            return Ok(path);
        }
        // To measure it has moved its position.
        io::Seek::rewind(&mut file).map_err(Error::io("read", &path))?;
        let reader = watch(file, held, &reports, total);
        let sink = work::create(&partial)?;
        decompress(kind, reader, &sink, &path, &partial, bounds).inspect_err(|_| {
            // The failure says more than one of this.
            let _ = work::remove(&partial);
        })?;
        work::publish(&sink, &partial, &unpacked)?;
        Ok(unpacked)
    })
    .await
}

fn watch<'a>(
    file: File,
    held: &'a Held,
    reports: &'a Reports,
    total: u64,
) -> BufReader<Watched<'a, File>> {
    let what = Step::Unpacking;
    let watched = Watched { inner: file, held, reports, what, done: 0, total: Some(total) };
    BufReader::with_capacity(256 << 10, watched)
}

#[derive(Clone, Copy)]
struct Bounds {
    max_bytes: u64,
    disk: u64,
}

impl Bounds {
    /// A raw image must not be longer than its disk; of others only their own headers tell.
    fn limit(self, format: Format) -> u64 {
        if format == Format::Raw { self.max_bytes.min(self.disk) } else { self.max_bytes }
    }

    fn passed(self, format: Format) -> Error {
        let limit = self.limit(format);
        if limit == self.max_bytes {
            Error::TooManyBytes { what: "the decompressed image".to_owned(), limit }
        } else {
            Error::Overflow { disk: self.disk }
        }
    }
}

fn decompress<'a>(
    kind: Format,
    reader: impl io::BufRead + 'a,
    sink: &File,
    path: &Path,
    partial: &Path,
    bounds: Bounds,
) -> Result<(), Error> {
    let damaged = |source| Error::Decompress { path: path.to_owned(), kind: name(kind), source };
    let mut plain = decoder(kind, reader).map_err(damaged)?;
    let mut head = Vec::with_capacity(HEAD);
    plain.by_ref().take(HEAD as u64).read_to_end(&mut head).map_err(damaged)?;
    let format = of_head(&head);
    let limit = bounds.limit(format);
    let mut bounded = Cursor::new(head).chain(plain).take(limit.saturating_add(1));
    match pour(&mut bounded, sink) {
        Ok(length) if length > limit => Err(bounds.passed(format)),
        Ok(_) => Ok(()),
        Err(Failed::Read(source)) => Err(damaged(source)),
        Err(Failed::Write(source)) => Err(Error::io("write", partial)(source)),
    }
}

/// Whether data of this format is decompressed before it is looked at.
pub(crate) fn is_compressed(kind: Format) -> bool {
    matches!(kind, Format::Gzip | Format::Xz | Format::Zstd)
}

/// Reads compressed data as what it was; other data as it is.
pub(crate) fn decoder<'a>(
    kind: Format,
    reader: impl io::BufRead + 'a,
) -> io::Result<Box<dyn Read + 'a>> {
    Ok(match kind {
        Format::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(reader)),
        Format::Xz => {
            let stream = Stream::new_stream_decoder(XZ_MEMORY, CONCATENATED)?;
            Box::new(liblzma::bufread::XzDecoder::new_stream(reader, stream))
        }
        Format::Zstd => Box::new(zstd::Decoder::with_buffer(reader)?),
        _ => Box::new(reader),
    })
}

fn name(kind: Format) -> &'static str {
    match kind {
        Format::Gzip => "gzip",
        Format::Xz => "xz",
        _ => "zstd",
    }
}
