//! Disks that are read for another node.

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};

use bytes::Bytes;

use crate::sparse::{PIECE, extent, read_up_to};
use crate::target::{Opened, open};
use crate::{Error, frames};

/// A disk that is lent: a raw file or a device, to which nobody writes meanwhile.
pub struct Lent {
    file: File,
    path: PathBuf,
    size: u64,
}

impl Lent {
    /// Opens one, and never what a link leads to.
    ///
    /// # Errors
    /// When it cannot be read, or is neither a file nor a device.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let opened = open(path, OpenOptions::new().read(true), 0)?;
        let size = opened.length()?;
        let (Opened::File(file, path) | Opened::Block(file, path)) = opened;
        Ok(Self { file, path, size })
    }

    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Sends what is not zero of it from an offset on, as [`Source::Peer`](crate::Source::Peer)
    /// takes it, until it ends or is no longer wanted: `send` says so. It blocks.
    ///
    /// # Errors
    /// When it cannot be read. What was sent has no end then, and is not taken for all of it.
    pub fn send(&self, from: u64, mut send: impl FnMut(Bytes) -> bool) -> Result<(), Error> {
        let mut piece = vec![0; PIECE];
        let mut position = from.min(self.size);
        while position < self.size {
            let found = extent(&self.file, position, self.size);
            let end = match found.data {
                true => found.range.end.min(position + PIECE as u64),
                false => found.range.end,
            };
            if found.data {
                let piece = &mut piece[..(end - position) as usize];
                let count = read_up_to(&self.file, piece, position)
                    .map_err(Error::io("read", &self.path))?;
                // What became shorter meanwhile reads as zeros.
                piece[count..].fill(0);
                let frames = frames::of_piece(position, piece);
                if !frames.is_empty() && !send(frames) {
                    return Ok(());
                }
            }
            position = end;
        }
        send(frames::end(self.size));
        Ok(())
    }
}
