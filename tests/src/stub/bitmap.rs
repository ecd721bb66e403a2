//! A dirty bitmap: one bit per `granularity` bytes of a node. Pure.

use std::ops::Range;

/// A bitmap and what QEMU knows of it.
#[derive(Debug, Clone)]
pub struct Bitmap {
    /// Its name.
    pub name: String,
    /// Bytes per bit: a power of two of at least 512.
    pub granularity: u64,
    /// Whether writes are recorded.
    pub recording: bool,
    /// How many exports show it.
    pub exports: usize,
    size: u64,
    words: Vec<u64>,
}

/// A stretch of the node that is all dirty or all clean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// How many bytes.
    pub len: u64,
    /// Whether they are dirty.
    pub dirty: bool,
}

impl Bitmap {
    /// A clean bitmap of a node of `size` bytes.
    pub fn new(name: &str, size: u64, granularity: u64, recording: bool) -> Self {
        let mut bitmap = Self {
            name: name.to_owned(),
            granularity,
            recording,
            exports: 0,
            size: 0,
            words: Vec::new(),
        };
        bitmap.resize(size);
        bitmap
    }

    /// Whether an export shows it: it must not change then.
    pub fn is_busy(&self) -> bool {
        self.exports > 0
    }

    /// Follows the node's size; what is new is clean.
    pub fn resize(&mut self, size: u64) {
        self.size = size;
        let bits = size.div_ceil(self.granularity);
        self.words.resize(bits.div_ceil(64) as usize, 0);
        if !bits.is_multiple_of(64)
            && let Some(last) = self.words.last_mut()
        {
            *last &= (1 << (bits % 64)) - 1;
        }
    }

    /// Marks all that overlaps a range as dirty.
    pub fn mark(&mut self, offset: u64, len: u64) {
        let end = (offset + len).min(self.size);
        if len == 0 || offset >= end {
            return;
        }
        for bit in offset / self.granularity..=(end - 1) / self.granularity {
            self.words[(bit / 64) as usize] |= 1 << (bit % 64);
        }
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// Bytes that it says are dirty: whole bits, even beyond the node's end.
    pub fn count(&self) -> u64 {
        let bits: u64 = self.words.iter().map(|word| u64::from(word.count_ones())).sum();
        bits * self.granularity
    }

    /// Adds what another bitmap, of any granularity, says.
    pub fn merge(&mut self, other: &Self) {
        let mut offset = 0;
        for run in other.runs(0..other.size) {
            if run.dirty {
                self.mark(offset, run.len);
            }
            offset += run.len;
        }
    }

    /// The range in stretches, in order, without gaps, neighbours different.
    pub fn runs(&self, range: Range<u64>) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        let mut offset = range.start;
        while offset < range.end {
            let bit = offset / self.granularity;
            let len = ((bit + 1) * self.granularity).min(range.end) - offset;
            let word = self.words.get((bit / 64) as usize).copied().unwrap_or(0);
            let dirty = word >> (bit % 64) & 1 == 1;
            match runs.last_mut() {
                Some(last) if last.dirty == dirty => last.len += len,
                _ => runs.push(Run { len, dirty }),
            }
            offset += len;
        }
        runs
    }
}

#[cfg(test)]
mod test {
    use super::*;

    fn runs(bitmap: &Bitmap, range: Range<u64>) -> Vec<(u64, bool)> {
        bitmap.runs(range).iter().map(|run| (run.len, run.dirty)).collect()
    }

    #[test]
    fn a_write_marks_every_granule_that_it_touches_and_no_other() {
        let mut bitmap = Bitmap::new("b", 1 << 20, 4096, true);
        bitmap.mark(4095, 2);
        bitmap.mark(65536, 4096);
        bitmap.mark(1 << 20, 4096);
        assert_eq!(bitmap.count(), 3 * 4096);
        let expected = vec![(8192, true), (57344, false), (4096, true), (4096, false)];
        assert_eq!(runs(&bitmap, 0..73728), expected);
        assert_eq!(runs(&bitmap, 8000..8200), vec![(192, true), (8, false)]);
    }

    #[test]
    fn a_merge_into_a_coarser_bitmap_loses_nothing() {
        let mut fine = Bitmap::new("fine", 100_000, 4096, false);
        fine.mark(99_999, 1);
        fine.mark(0, 1);
        let mut coarse = Bitmap::new("coarse", 100_000, 65536, true);
        coarse.merge(&fine);
        assert_eq!(runs(&coarse, 0..100_000), vec![(100_000, true)]);
        assert_eq!(coarse.count(), 2 * 65536);
    }

    #[test]
    fn a_grown_bitmap_is_clean_where_it_grew() {
        let mut bitmap = Bitmap::new("b", 6000, 4096, true);
        bitmap.mark(0, 6000);
        bitmap.resize(20_000);
        assert_eq!(runs(&bitmap, 0..20_000), vec![(8192, true), (11_808, false)]);
        bitmap.resize(4096);
        bitmap.resize(20_000);
        assert_eq!(runs(&bitmap, 0..20_000), vec![(4096, true), (15_904, false)]);
    }
}
