//! Dirt: memory or disk rewritten at a rate, to be faster than a link.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use crate::block::{fill, mix};
use crate::memory::allocate;
use crate::page;
use crate::protocol::Range;
use crate::region::{Buffer, Region, open_direct};
use crate::worker::{Pace, Task};
use crate::writer;

/// Pages touched before the host is listened to again.
const STEP: u64 = 256;
/// One disk write, in bytes.
const DISK_BLOCK: u64 = 64 << 10;

/// A working set of incompressible pages, changed one after another.
pub struct DirtyMemory {
    pages: Buffer,
    count: u64,
    position: u64,
    touched: u64,
    pace: Pace,
}

impl DirtyMemory {
    /// `mib` MiB of pages, of which `mibps` MiB are changed per second (0: all it can).
    ///
    /// # Errors
    /// When the guest has not that much to spare.
    pub fn new(mib: u64, mibps: u64) -> io::Result<Self> {
        let mut pages = allocate(mib)?;
        fill(pages.bytes(), mib);
        let pace = Pace::new(mibps << 8);
        Ok(DirtyMemory { pages, count: mib << 8, position: 0, touched: 0, pace })
    }
}

impl Task for DirtyMemory {
    fn name(&self) -> String {
        "dirty memory".into()
    }

    fn step(&mut self) -> io::Result<Instant> {
        let portion = self.pace.portion(STEP);
        for _ in 0..portion {
            self.touched += 1;
            let start = self.position as usize * page::SIZE;
            let change = mix(self.touched).to_le_bytes();
            let bytes = &mut self.pages.bytes()[start..start + page::SIZE];
            // Some bytes of every 512, so that a delta of the page is not tiny.
            for sector in bytes.chunks_mut(512) {
                sector[..8].copy_from_slice(&change);
            }
            self.position = (self.position + 1) % self.count;
        }
        Ok(self.pace.spend(portion))
    }

    fn status(&self) -> String {
        format!("mib={} touched={}", self.count >> 8, self.touched)
    }
}

/// A range of a disk, rewritten in no order, without flushes.
pub struct DirtyDisk {
    dev: String,
    disk: File,
    region: Region,
    buffer: Buffer,
    written: u64,
    pace: Pace,
}

impl DirtyDisk {
    /// Writes `mibps` MiB per second (0: all it can) to `range`.
    ///
    /// # Errors
    /// When the range cannot be written so, or the disk does not open.
    pub fn new(range: &Range, mibps: u64) -> Result<Self, writer::Error> {
        let block = if range.len < DISK_BLOCK { 512 } else { DISK_BLOCK };
        let region = Region::new(range, block)?;
        Ok(DirtyDisk {
            dev: range.dev.clone(),
            disk: open_direct(&range.dev)?,
            region,
            buffer: Buffer::new(block as usize),
            written: 0,
            pace: Pace::new(mibps << 20),
        })
    }
}

impl Task for DirtyDisk {
    fn name(&self) -> String {
        format!("dirty disk {}", self.dev)
    }

    fn step(&mut self) -> io::Result<Instant> {
        let due = self.pace.spend(self.region.block);
        self.written += 1;
        let slot = mix(self.written) % self.region.slots;
        let block = self.buffer.bytes();
        fill(block, self.written);
        self.disk.write_all_at(block, self.region.at(slot))?;
        Ok(due)
    }

    fn status(&self) -> String {
        format!("written={} block={}", self.written, self.region.block)
    }
}
