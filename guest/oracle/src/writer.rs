//! Numbered writes to a region of a disk, each acknowledged only after its flush.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use crate::block::{encode, slot_of};
use crate::output::Output;
use crate::protocol::{Check, Report, Write};
use crate::region::{Buffer, Loss, Region, Rule, open_direct};
use crate::worker::{Pace, Task};

/// `LOST` lines of one comparison; the count goes on.
pub const MAX_LINES: u64 = 16;

/// Why a writer cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The range makes no region.
    #[error(transparent)]
    Region(#[from] crate::region::Error),
    /// The disk does not open.
    #[error(transparent)]
    Open(#[from] io::Error),
}

/// Writes for ever, as [`crate::block`] says.
pub struct Writer {
    options: Write,
    disk: File,
    region: Region,
    buffer: Buffer,
    /// The newest write of each slot, 0 for none.
    newest: Vec<u64>,
    last: u64,
    pace: Pace,
    output: Output,
}

impl Writer {
    /// Opens the disk; writes nothing yet.
    ///
    /// # Errors
    /// When the range cannot be written so, or the disk does not open.
    pub fn new(options: Write, output: Output) -> Result<Self, Error> {
        let region = Region::new(&options.range, options.block)?;
        Ok(Writer {
            disk: open_direct(&options.range.dev)?,
            region,
            buffer: Buffer::new(options.block as usize),
            newest: vec![0; region.slots as usize],
            last: 0,
            pace: Pace::new(options.rate),
            options,
            output,
        })
    }
}

impl Task for Writer {
    fn name(&self) -> String {
        format!("write {}", self.options.range.dev)
    }

    fn step(&mut self) -> io::Result<Instant> {
        let due = self.pace.spend(self.options.batch);
        for _ in 0..self.options.batch {
            let n = self.last + 1;
            let slot = slot_of(self.options.seed, n, self.region.slots);
            let block = self.buffer.bytes();
            encode(block, self.options.seed, n, slot);
            self.disk.write_all_at(block, self.region.at(slot))?;
            self.newest[slot as usize] = n;
            self.last = n;
        }
        // N.B. the host counts a write as acknowledged when it reads this line.
        self.disk.sync_data()?;
        self.output.report(Report::Written { n: self.last, id: self.options.id });
        Ok(due)
    }

    fn check(&mut self) -> io::Result<Check> {
        let mut lines = 0;
        let report = |Loss { slot, expected, found }: Loss| {
            lines += 1;
            if lines <= MAX_LINES {
                self.output.report(Report::LostWrite { slot, expected, found });
            }
        };
        let rule = Rule::Exactly;
        let sums =
            self.region.compare(&self.disk, self.options.seed, &self.newest, rule, report)?;
        Ok(Check { writes: self.last, slots: sums.slots, lost: sums.lost, ..Check::default() })
    }

    fn status(&self) -> String {
        format!("id={} durable={} slots={}", self.options.id, self.last, self.region.slots)
    }
}
