//! Extents: byte ranges of a disk, and ordered sets of them.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A byte range `offset..offset + len` of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Extent {
    /// First byte.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
}

impl Extent {
    /// The extent that starts at `offset` and is `len` bytes long.
    pub const fn new(offset: u64, len: u64) -> Self {
        Self { offset, len }
    }

    /// One past the last byte.
    pub const fn end(&self) -> u64 {
        self.offset + self.len
    }
}

/// A set of bytes of one disk, kept as disjoint extents that never touch.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Vec<Extent>", into = "Vec<Extent>")]
pub struct ExtentSet {
    /// Start to end (exclusive).
    runs: BTreeMap<u64, u64>,
    bytes: u64,
}

impl ExtentSet {
    /// The empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// All bytes of a disk of `size` bytes.
    pub fn whole(size: u64) -> Self {
        [Extent::new(0, size)].into_iter().collect()
    }

    /// How many bytes are in the set.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether no byte is in the set.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// How many separate extents the set has.
    pub fn extents(&self) -> usize {
        self.runs.len()
    }

    /// The extents in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = Extent> + '_ {
        self.runs.iter().map(|(&start, &end)| Extent::new(start, end - start))
    }

    /// Adds the bytes of `extent`.
    pub fn insert(&mut self, extent: Extent) {
        if extent.len == 0 {
            return;
        }
        let (mut start, mut end) = (extent.offset, extent.offset.saturating_add(extent.len));
        // Every run that overlaps or touches `start..end` melts into it.
        while let Some((&s, &e)) = self.runs.range(..=end).next_back() {
            if e < start {
                break;
            }
            self.runs.remove(&s);
            self.bytes -= e - s;
            start = start.min(s);
            end = end.max(e);
        }
        self.runs.insert(start, end);
        self.bytes += end - start;
    }

    /// Takes the bytes of `extent` out.
    pub fn remove(&mut self, extent: Extent) {
        if extent.len == 0 {
            return;
        }
        let (start, end) = (extent.offset, extent.offset.saturating_add(extent.len));
        while let Some((&s, &e)) = self.runs.range(..end).next_back() {
            if e <= start {
                break;
            }
            self.runs.remove(&s);
            self.bytes -= e - s;
            for (s, e) in [(s, start), (end, e)] {
                if s < e {
                    self.runs.insert(s, e);
                    self.bytes += e - s;
                }
            }
        }
    }

    /// Adds every byte of `other`.
    pub fn union_with(&mut self, other: &ExtentSet) {
        for extent in other.iter() {
            self.insert(extent);
        }
    }

    /// Takes every byte of `other` out.
    pub fn subtract(&mut self, other: &ExtentSet) {
        for extent in other.iter() {
            self.remove(extent);
        }
    }

    /// The bytes that are in `extent` too.
    pub fn within(&self, extent: Extent) -> ExtentSet {
        let mut found = ExtentSet::new();
        let before = self.runs.range(..extent.offset).next_back();
        for (&s, &e) in before.into_iter().chain(self.runs.range(extent.offset..extent.end())) {
            let (s, e) = (s.max(extent.offset), e.min(extent.end()));
            if s < e {
                found.insert(Extent::new(s, e - s));
            }
        }
        found
    }

    /// Takes out and returns the first extent, at most `max` bytes of it.
    /// The cut lies on a multiple of `max`, so that pieces stay aligned.
    pub fn pop_front(&mut self, max: u64) -> Option<Extent> {
        let (start, end) = self.runs.pop_first()?;
        let cut = end.min((start / max + 1) * max);
        if cut < end {
            self.runs.insert(cut, end);
        }
        self.bytes -= cut - start;
        Some(Extent::new(start, cut - start))
    }

    /// Every extent widened to multiples of `granularity`, clipped to `size`.
    ///
    /// A superset of the set with fewer extents: the way to bound the memory
    /// and the message that a scattered set needs.
    pub fn coarsened(&self, granularity: u64, size: u64) -> ExtentSet {
        self.iter()
            .map(|e| {
                let start = e.offset / granularity * granularity;
                let end = e.end().div_ceil(granularity).saturating_mul(granularity).min(size);
                Extent::new(start, end.saturating_sub(start))
            })
            .collect()
    }
}

impl FromIterator<Extent> for ExtentSet {
    fn from_iter<I: IntoIterator<Item = Extent>>(extents: I) -> Self {
        let mut set = ExtentSet::new();
        for extent in extents {
            set.insert(extent);
        }
        set
    }
}

impl From<Vec<Extent>> for ExtentSet {
    fn from(extents: Vec<Extent>) -> Self {
        extents.into_iter().collect()
    }
}

impl From<ExtentSet> for Vec<Extent> {
    fn from(set: ExtentSet) -> Self {
        set.iter().collect()
    }
}
