//! What has come so far of the reply to one request. Pure: chunks in, done or a [`Violation`] out.

use std::ops::Range;

use crate::{
    Violation,
    wire::{self, Run},
};

/// The part of a read's reply that has come.
#[derive(Debug)]
pub(crate) struct Read {
    offset: u64,
    pub(crate) buffer: Vec<u8>,
    /// What of `buffer` has come: ordered, disjoint, never touching.
    covered: Vec<Range<usize>>,
    pub(crate) holes: Vec<Range<u64>>,
}

impl Read {
    pub(crate) fn new(offset: u64, buffer: Vec<u8>) -> Self {
        Self { offset, buffer, covered: Vec::new(), holes: Vec::new() }
    }

    /// Where in the buffer `len` bytes at `offset` of the export belong. Each byte but once.
    pub(crate) fn claim(&mut self, offset: u64, len: u64) -> Result<&mut [u8], Violation> {
        let range = self.locate(offset, len).ok_or(Violation::Outside { offset, len })?;
        let next = self.covered.partition_point(|covered| covered.end < range.start);
        let touches_before = self.covered.get(next).is_some_and(|c| c.end == range.start);
        let after = next + usize::from(touches_before);
        if self.covered.get(after).is_some_and(|covered| covered.start < range.end) {
            return Err(Violation::Overlap { offset, len });
        }
        let touches_after = self.covered.get(after).is_some_and(|c| c.start == range.end);
        match (touches_before, touches_after) {
            (true, true) => self.covered[next].end = self.covered.remove(after).end,
            (true, false) => self.covered[next].end = range.end,
            (false, true) => self.covered[next].start = range.start,
            (false, false) => self.covered.insert(next, range.clone()),
        }
        // A sector is the least that a server has a reason to send apart.
        if self.covered.len() + self.holes.len() > 2 + self.buffer.len() / 512 {
            return Err(Violation::Pieces);
        }
        Ok(&mut self.buffer[range])
    }

    /// Takes a hole's payload.
    pub(crate) fn hole(&mut self, data: &[u8]) -> Result<(), Violation> {
        let (offset, len) = wire::hole_chunk(data)?;
        let len = u64::from(len);
        self.claim(offset, len)?.fill(0);
        match self.holes.last_mut() {
            Some(last) if last.end == offset => last.end += len,
            _ => self.holes.push(offset..offset + len),
        }
        Ok(())
    }

    fn is_complete(&self) -> bool {
        let covered: usize = self.covered.iter().map(ExactSizeIterator::len).sum();
        covered == self.buffer.len()
    }

    fn locate(&self, offset: u64, len: u64) -> Option<Range<usize>> {
        let start = usize::try_from(offset.checked_sub(self.offset)?).ok()?;
        let end = start.checked_add(usize::try_from(len).ok()?)?;
        (start < end && end <= self.buffer.len()).then_some(start..end)
    }
}

/// The part of a block status' reply that has come.
#[derive(Debug)]
pub(crate) struct Status {
    wanted: u32,
    /// The other contexts that were negotiated and have not come.
    others: Vec<u32>,
    pub(crate) runs: Vec<Run>,
}

impl Status {
    /// Of the context `wanted`, on a connection where `negotiated` come along.
    pub(crate) fn new(wanted: u32, negotiated: impl Iterator<Item = u32>) -> Self {
        let others = negotiated.filter(|id| *id != wanted).collect();
        Self { wanted, others, runs: Vec::new() }
    }

    /// Takes a block status chunk's payload.
    pub(crate) fn accept(&mut self, data: &[u8]) -> Result<(), Violation> {
        let (context, runs) = wire::block_status_chunk(data)?;
        if context == self.wanted && self.runs.is_empty() {
            self.runs = runs;
            return Ok(());
        }
        let other = self.others.iter().position(|id| *id == context);
        self.others.swap_remove(other.ok_or(Violation::Context(context))?);
        Ok(())
    }
}

/// The part of any reply that has come.
#[derive(Debug)]
pub(crate) enum Body {
    Read(Read),
    Status(Status),
}

impl Body {
    /// Whether a reply without error may end here.
    pub(crate) fn finish(&self) -> Result<(), Violation> {
        match self {
            Self::Read(read) if !read.is_complete() => Err(Violation::Incomplete("bytes")),
            Self::Status(status) if status.runs.is_empty() => {
                Err(Violation::Incomplete("the context that was asked"))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod test {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Against a plain list of bytes: a claim is granted exactly where nothing lay before.
        #[test]
        fn each_byte_is_claimed_once(claims in prop::collection::vec((90..230u64, 0..40u64), 0..40)) {
            let mut read = Read::new(100, vec![0; 64 * 1024]);
            let mut taken = vec![false; 1024];
            for (offset, len) in claims {
                let bytes = offset as usize..(offset + len) as usize;
                let inside = offset >= 100 && len > 0;
                let free = !taken[bytes.clone()].contains(&true);
                let claimed = read.claim(offset, len).map(|bytes| bytes.len() as u64);
                match claimed {
                    Ok(granted) => {
                        prop_assert!(inside && free);
                        prop_assert_eq!(granted, len);
                        taken[bytes].fill(true);
                    }
                    Err(Violation::Overlap { .. }) => prop_assert!(inside && !free),
                    Err(_) => prop_assert!(!inside),
                }
                prop_assert!(read.covered.windows(2).all(|pair| pair[0].end < pair[1].start));
            }
            let covered: usize = read.covered.iter().map(|range| range.len()).sum();
            prop_assert_eq!(covered, taken.iter().filter(|taken| **taken).count());
        }
    }
}
