//! A region of a disk that is written block by block, and its comparison with
//! what must be there: the guest's own after each run, the host's at rest.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use rustix::fs::OFlags;

use crate::block::{Found, decode, slot_of};
use crate::protocol::Range;

/// Bytes read at once; a guest of 64 MiB has no more to spare.
const CHUNK: u64 = 256 << 10;
/// O_DIRECT wants its memory aligned to the device's logical block.
const ALIGNMENT: usize = 4096;
const MAX_BLOCK: u64 = 1 << 20;
const MAX_SLOTS: u64 = 1 << 22;

/// Why a range cannot be a region.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// Blocks that O_DIRECT cannot write.
    #[error("block={0}: choose a multiple of 512 from 512 to {MAX_BLOCK}")]
    Block(u64),
    /// An offset that O_DIRECT cannot write at.
    #[error("offset={0}: choose a multiple of 512")]
    Offset(u64),
    /// No block fits, or too many do to remember each.
    #[error("len={len} holds {slots} blocks: choose a length of 1 to {MAX_SLOTS} blocks")]
    Slots {
        /// The length in bytes.
        len: u64,
        /// The blocks that fit.
        slots: u64,
    },
}

/// A range cut into blocks. Slot `s` lies at `offset + s * block`.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    /// Bytes before slot 0.
    pub offset: u64,
    /// Bytes of a slot.
    pub block: u64,
    /// How many there are.
    pub slots: u64,
}

/// What a slot must hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// The expected write: whoever asks knows everything that was written.
    Exactly,
    /// The expected write or a later one of the same run: whoever asks knows
    /// only what was acknowledged.
    AtLeast,
}

/// A slot that does not hold what it must.
pub struct Loss {
    /// The slot.
    pub slot: u64,
    /// The write that it must hold.
    pub expected: u64,
    /// What it holds: a number, `foreign` or `torn`.
    pub found: String,
}

/// What a comparison counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Comparison {
    /// Slots of which something is expected.
    pub slots: u64,
    /// Slots that do not hold what they must.
    pub lost: u64,
    /// The highest write number of this run seen anywhere.
    pub newest: u64,
}

impl Region {
    /// Cuts `range` into blocks of `block` bytes; a rest is left alone.
    ///
    /// # Errors
    /// When O_DIRECT could not write it so.
    pub fn new(range: &Range, block: u64) -> Result<Self, Error> {
        if block == 0 || !block.is_multiple_of(512) || block > MAX_BLOCK {
            return Err(Error::Block(block));
        }
        if !range.offset.is_multiple_of(512) {
            return Err(Error::Offset(range.offset));
        }
        let slots = range.len / block;
        if slots == 0 || slots > MAX_SLOTS {
            return Err(Error::Slots { len: range.len, slots });
        }
        Ok(Region { offset: range.offset, block, slots })
    }

    /// Where `slot` lies, in bytes.
    pub fn at(&self, slot: u64) -> u64 {
        self.offset + slot * self.block
    }

    /// Reads every slot and compares it with `expected` (per slot, 0: nothing).
    /// `lost` is told of each slot that breaks the `rule`.
    ///
    /// # Errors
    /// When the disk cannot be read, or ends before the region does.
    pub fn compare(
        &self,
        disk: &File,
        seed: u64,
        expected: &[u64],
        rule: Rule,
        mut lost: impl FnMut(Loss),
    ) -> io::Result<Comparison> {
        let per_chunk = (CHUNK / self.block).max(1);
        let mut buffer = Buffer::new((per_chunk * self.block) as usize);
        let mut sums = Comparison::default();
        for first in (0..self.slots).step_by(per_chunk as usize) {
            let count = per_chunk.min(self.slots - first);
            let bytes = &mut buffer.bytes()[..(count * self.block) as usize];
            disk.read_exact_at(bytes, self.at(first))?;
            for (slot, block) in (first..).zip(bytes.chunks_mut(self.block as usize)) {
                let found = decode(block);
                let number = self.sequence_in(slot, seed, found);
                sums.newest = sums.newest.max(number.unwrap_or(0));
                let expected = expected.get(slot as usize).copied().unwrap_or(0);
                if expected == 0 {
                    continue;
                }
                sums.slots += 1;
                let kept = match rule {
                    Rule::Exactly => number == Some(expected),
                    Rule::AtLeast => number.is_some_and(|number| number >= expected),
                };
                if !kept {
                    sums.lost += 1;
                    lost(Loss { slot, expected, found: describe(found, number) });
                }
            }
        }
        Ok(sums)
    }

    /// The number of the write in `slot`, if it is one of this run and belongs there.
    fn sequence_in(&self, slot: u64, seed: u64, found: Found) -> Option<u64> {
        match found {
            Found::Whole { seed: wrote, sequence, slot: says }
                if wrote == seed && says == slot && slot_of(seed, sequence, self.slots) == slot =>
            {
                Some(sequence)
            }
            _ => None,
        }
    }
}

fn describe(found: Found, number: Option<u64>) -> String {
    match (found, number) {
        (_, Some(number)) => number.to_string(),
        (Found::Torn, None) => "torn".into(),
        (_, None) => "foreign".into(),
    }
}

/// Opens a disk past the page cache, which would hide a lost write.
///
/// # Errors
/// When it is not there, or does not know O_DIRECT.
pub fn open_direct(dev: &str) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(OFlags::DIRECT.bits() as i32)
        .open(dev)
        .map_err(|error| io::Error::new(error.kind(), format!("{dev}: {error}")))
}

/// Memory aligned as O_DIRECT wants it.
pub struct Buffer {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl Buffer {
    /// `len` zero bytes.
    pub fn new(len: usize) -> Self {
        let memory = vec![0; len + ALIGNMENT];
        let start = memory.as_ptr().align_offset(ALIGNMENT);
        Buffer { memory, start, len }
    }

    /// The aligned bytes.
    pub fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}
