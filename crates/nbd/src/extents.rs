//! From runs, as they come, to extents of a range. Pure.

use std::ops::Range;

use crate::wire::Run;

/// A stretch of an export whose flags, in one context, are the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Where it begins, in bytes.
    pub offset: u64,
    /// Its length in bytes; never 0.
    pub len: u64,
    /// What the context says of it.
    pub flags: u32,
}

impl Extent {
    /// Where it ends.
    pub fn end(&self) -> u64 {
        self.offset + self.len
    }
}

/// Lays runs one after another into a range, each joined to one before it of the same flags.
pub(crate) struct Layer {
    extents: Vec<Extent>,
    rest: Range<u64>,
    limit: usize,
}

impl Layer {
    pub(crate) fn new(range: Range<u64>, limit: usize) -> Self {
        Self { extents: Vec::new(), rest: range, limit }
    }

    /// What nothing is known of yet.
    pub(crate) fn rest(&self) -> Range<u64> {
        self.rest.clone()
    }

    /// Adds runs that begin where the rest does, and may reach beyond it. `None`: too many.
    pub(crate) fn add(&mut self, runs: &[Run]) -> Option<()> {
        for run in runs {
            let len = u64::from(run.len).min(self.rest.end - self.rest.start);
            if len == 0 {
                break;
            }
            let room = self.extents.len() < self.limit;
            match self.extents.last_mut() {
                Some(last) if last.flags == run.flags => last.len += len,
                _ if room => {
                    self.extents.push(Extent { offset: self.rest.start, len, flags: run.flags });
                }
                _ => return None,
            }
            self.rest.start += len;
        }
        Some(())
    }

    pub(crate) fn into_extents(self) -> Vec<Extent> {
        self.extents
    }
}
