//! Copies in which zeros stay holes.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read};
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;

use rustix::fs::{SeekFrom, ioctl_ficlone, seek};
use rustix::io::Errno;

/// The unit in which zeros are looked for: no common file system has smaller blocks.
pub(crate) const BLOCK: usize = 4 << 10;
/// How much is read at once.
pub(crate) const PIECE: usize = 1 << 20;

static ZEROS: [u8; BLOCK] = [0; BLOCK];

/// An extent of a file, which holds data or reads as zeros.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Extent {
    pub range: Range<u64>,
    pub data: bool,
}

/// Splits a piece into its runs of data and of zeros.
pub(crate) fn runs(piece: &[u8]) -> Vec<(Range<usize>, bool)> {
    let mut runs: Vec<(Range<usize>, bool)> = Vec::new();
    for start in (0..piece.len()).step_by(BLOCK) {
        let end = piece.len().min(start + BLOCK);
        let data = piece[start..end] != ZEROS[..end - start];
        match runs.last_mut() {
            Some((range, kind)) if *kind == data => range.end = end,
            _ => runs.push((start..end, data)),
        }
    }
    runs
}

/// The extent that begins at a position before the file's end.
///
/// Where the system cannot tell, as for devices, everything is data.
pub(crate) fn extent(file: &File, position: u64, length: u64) -> Extent {
    let next = |whence| match seek(file, whence) {
        Ok(found) => found.clamp(position, length),
        Err(Errno::NXIO) => length,
        Err(_) if matches!(whence, SeekFrom::Data(_)) => position,
        Err(_) => length,
    };
    let data = next(SeekFrom::Data(position));
    if data > position {
        return Extent { range: position..data, data: false };
    }
    let hole = next(SeekFrom::Hole(position));
    // A file that changes meanwhile must not make this stand still.
    let end = if hole > position { hole } else { length };
    Extent { range: position..end, data: true }
}

/// Which side of a copy failed.
#[derive(Debug)]
pub(crate) enum Failed {
    Read(io::Error),
    Write(io::Error),
}

/// Reads everything into a new file, and returns its length.
pub(crate) fn pour(reader: &mut dyn Read, sink: &File) -> Result<u64, Failed> {
    let mut piece = Vec::with_capacity(PIECE);
    let mut position = 0;
    loop {
        piece.clear();
        reader.take(PIECE as u64).read_to_end(&mut piece).map_err(Failed::Read)?;
        if piece.is_empty() {
            break;
        }
        for (range, _) in runs(&piece).into_iter().filter(|(_, data)| *data) {
            let at = position + range.start as u64;
            sink.write_all_at(&piece[range], at).map_err(Failed::Write)?;
        }
        position += piece.len() as u64;
    }
    sink.set_len(position).map_err(Failed::Write)?;
    Ok(position)
}

/// Makes a private copy of a disk, which takes room only for what differs if the file system
/// can share extents, and else for what is not zero.
///
/// # Errors
///
/// Fails if the target exists, or the system refuses; then nothing is left of the target.
pub fn ephemeral(cached: &Path, target: &Path) -> io::Result<()> {
    let source = File::open(cached)?;
    let copy =
        OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(target)?;
    clone(&source, &copy).inspect_err(|_| {
        // The first error says more than one of this.
        let _ = std::fs::remove_file(target);
    })
}

fn clone(source: &File, copy: &File) -> io::Result<()> {
    if ioctl_ficlone(copy, source).is_ok() {
        return Ok(());
    }
    let length = source.metadata()?.len();
    copy.set_len(length)?;
    let mut position = 0;
    while position < length {
        let extent = extent(source, position, length);
        if extent.data {
            copy_range(source, copy, extent.range.clone())?;
        }
        position = extent.range.end;
    }
    Ok(())
}

fn copy_range(source: &File, copy: &File, range: Range<u64>) -> io::Result<()> {
    let mut piece = vec![0; PIECE];
    let mut position = range.start;
    while position < range.end {
        let piece = &mut piece[..(range.end - position).min(PIECE as u64) as usize];
        source.read_exact_at(piece, position)?;
        for (run, _) in runs(piece).into_iter().filter(|(_, data)| *data) {
            copy.write_all_at(&piece[run.clone()], position + run.start as u64)?;
        }
        position += piece.len() as u64;
    }
    Ok(())
}

/// Fills a buffer as far as the file reaches.
pub(crate) fn read_up_to(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_cover_a_piece_without_gaps() {
        let mut piece = vec![0; 3 * BLOCK + 7];
        piece[BLOCK] = 1;
        let end = piece.len();
        assert_eq!(
            runs(&piece),
            [(0..BLOCK, false), (BLOCK..2 * BLOCK, true), (2 * BLOCK..end, false)]
        );
        assert!(runs(&[]).is_empty());
    }
}
