//! The guest's memory, and which pages of it are still to be sent.
//!
//! As in QEMU a page that was sent and is dirtied again is sent again only in
//! the next pass: the log is read by [`Ram::sync`].

use oracle::page;
use oracle::region::Buffer;

/// Bytes of a page.
pub const PAGE: usize = page::SIZE;

/// Memory.
pub struct Ram {
    bytes: Buffer,
    pages: usize,
    /// Written since the last sync; empty while nobody logs.
    log: Vec<bool>,
    /// To be sent in this pass.
    pending: Vec<bool>,
    left: usize,
    cursor: usize,
}

/// A page on its way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// Its number.
    pub index: u32,
    /// What it holds; `None` when that is zeros.
    pub bytes: Option<Vec<u8>>,
}

impl Ram {
    /// Memory full of zeros.
    pub fn new(mib: u64) -> Self {
        let pages = (mib << 20) as usize / PAGE;
        let bytes = Buffer::new(pages * PAGE);
        Self { bytes, pages, log: Vec::new(), pending: Vec::new(), left: 0, cursor: 0 }
    }

    /// How many pages there are.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// A page, to read.
    pub fn page(&mut self, index: usize) -> &[u8] {
        &self.bytes.bytes()[index * PAGE..(index + 1) * PAGE]
    }

    /// A page, to write.
    pub fn page_mut(&mut self, index: usize) -> &mut [u8] {
        if let Some(dirty) = self.log.get_mut(index) {
            *dirty = true;
        }
        &mut self.bytes.bytes()[index * PAGE..(index + 1) * PAGE]
    }

    /// Begins to log: everything is to be sent.
    pub fn log(&mut self) {
        self.log = vec![false; self.pages];
        self.pending = vec![true; self.pages];
        self.left = self.pages;
        self.cursor = 0;
    }

    /// Ends the log.
    pub fn unlog(&mut self) {
        self.log.clear();
        self.pending.clear();
        self.left = 0;
    }

    /// Takes what was written since the last call into the pass; tells how many
    /// pages are to be sent now.
    pub fn sync(&mut self) -> usize {
        for (pending, dirty) in self.pending.iter_mut().zip(&mut self.log) {
            *pending |= std::mem::take(dirty);
        }
        self.left = self.pending.iter().filter(|pending| **pending).count();
        self.left
    }

    /// Takes up to `most` pages out of the pass, and tells how many are left in it.
    pub fn take(&mut self, most: usize) -> (Vec<Page>, usize) {
        let mut taken = Vec::new();
        while taken.len() < most && self.left > 0 {
            let index = self.cursor % self.pages;
            self.cursor = index + 1;
            if std::mem::take(&mut self.pending[index]) {
                self.left -= 1;
                let bytes = self.page(index);
                let bytes = bytes.iter().any(|byte| *byte != 0).then(|| bytes.to_vec());
                taken.push(Page { index: index as u32, bytes });
            }
        }
        (taken, self.left)
    }

    /// Puts a page that came in; false when there is no such page.
    pub fn put(&mut self, page: &Page) -> bool {
        let index = page.index as usize;
        let fits = index < self.pages && page.bytes.as_ref().is_none_or(|b| b.len() == PAGE);
        if fits {
            match &page.bytes {
                Some(bytes) => self.page_mut(index).copy_from_slice(bytes),
                None => self.page_mut(index).fill(0),
            }
        }
        fits
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_page_dirtied_after_it_was_sent_is_sent_in_the_next_pass() {
        let mut ram = Ram::new(1);
        ram.log();
        ram.page_mut(3)[0] = 1;
        let (first, left) = ram.take(10);
        assert_eq!((first.len(), left), (10, 246));
        assert_eq!(first[3].bytes.as_ref().map(|b| b[0]), Some(1));
        assert_eq!(first[4].bytes, None);
        ram.page_mut(3)[0] = 2;
        ram.page_mut(200)[0] = 2;
        assert_eq!(ram.take(1000).0.len(), 246);
        assert_eq!(ram.sync(), 2);
        let again: Vec<u32> = ram.take(1000).0.iter().map(|page| page.index).collect();
        assert_eq!(again, [3, 200]);
        ram.page_mut(3)[0] = 3;
        assert_eq!(ram.sync(), 1);
    }
}
