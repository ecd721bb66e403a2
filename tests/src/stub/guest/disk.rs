//! Jobs on disks: numbered writes that can be checked, and dirt.

use super::jobs::{Job, MAX_LINES, Schedule};
use super::{Board, Disks};
use oracle::block::{encode, fill, mix, newest_per_slot, slot_of};
use oracle::protocol::{Check, Range, Report, Write};
use oracle::region::{self, Buffer, Loss, Region, Rule};
use serde::{Deserialize, Serialize};
use std::io;
use std::time::Instant;

/// One write of dirt, in bytes.
const DIRT: u64 = 64 << 10;

/// Where a job writes.
#[derive(Serialize, Deserialize)]
struct Place {
    dev: String,
    disk: usize,
    offset: u64,
    len: u64,
    block: u64,
}

impl Place {
    fn new(range: Range, block: u64, disks: &Disks) -> io::Result<Self> {
        let bad = |error: region::Error| io::Error::new(io::ErrorKind::InvalidInput, error);
        Region::new(&range, block).map_err(bad)?;
        let disk = disks.by_name(&range.dev)?;
        Ok(Self { dev: range.dev, disk, offset: range.offset, len: range.len, block })
    }

    fn region(&self) -> Region {
        Region { offset: self.offset, block: self.block, slots: self.len / self.block }
    }
}

/// Numbered writes, each acknowledged only after its flush.
#[derive(Serialize, Deserialize)]
pub struct Writer {
    schedule: Schedule,
    place: Place,
    id: u64,
    batch: u64,
    seed: u64,
    last: u64,
}

impl Writer {
    /// Writes nothing yet.
    ///
    /// # Errors
    /// When the range cannot be written so, or there is no such disk.
    pub fn new(options: Write, disks: &Disks) -> io::Result<Self> {
        let Write { id, range, block, rate, batch, seed } = options;
        let place = Place::new(range, block, disks)?;
        Ok(Self { schedule: Schedule::new(rate), place, id, batch, seed, last: 0 })
    }
}

impl Job for Writer {
    fn name(&self) -> String {
        format!("write {}", self.place.dev)
    }

    fn schedule(&mut self) -> &mut Schedule {
        &mut self.schedule
    }

    fn step(&mut self, board: &mut Board<'_>) -> io::Result<Instant> {
        let earliest = board.disks.earliest(self.place.disk);
        if earliest > Instant::now() {
            return Ok(earliest);
        }
        let due = self.schedule.pace().spend(self.batch);
        let region = self.place.region();
        let mut buffer = Buffer::new(self.place.block as usize);
        for _ in 0..self.batch {
            let n = self.last + 1;
            let slot = slot_of(self.seed, n, region.slots);
            encode(buffer.bytes(), self.seed, n, slot);
            board.disks.write(self.place.disk, region.at(slot), buffer.bytes())?;
            self.last = n;
        }
        // N.B. the host counts a write as acknowledged when it reads this line.
        board.disks.flush(self.place.disk)?;
        board.report(Report::Written { n: self.last, id: self.id });
        Ok(due)
    }

    fn check(&mut self, board: &mut Board<'_>) -> io::Result<Check> {
        let region = self.place.region();
        let expected = newest_per_slot(self.seed, self.last, region.slots);
        let file = board.disks.file(self.place.disk)?;
        let mut losses = Vec::new();
        let keep = |loss: Loss| {
            if losses.len() < MAX_LINES as usize {
                losses.push(loss);
            }
        };
        let sums = region.compare(&file, self.seed, &expected, Rule::Exactly, keep)?;
        for Loss { slot, expected, found } in losses {
            board.report(Report::LostWrite { slot, expected, found });
        }
        Ok(Check { writes: self.last, slots: sums.slots, lost: sums.lost, ..Check::default() })
    }

    fn status(&self) -> String {
        format!("id={} durable={} slots={}", self.id, self.last, self.place.region().slots)
    }
}

/// A range of a disk, rewritten in no order, without flushes.
#[derive(Serialize, Deserialize)]
pub struct DirtyDisk {
    schedule: Schedule,
    place: Place,
    written: u64,
}

impl DirtyDisk {
    /// Writes `mibps` MiB per second (0: all it can).
    ///
    /// # Errors
    /// When the range cannot be written so, or there is no such disk.
    pub fn new(range: Range, mibps: u64, disks: &Disks) -> io::Result<Self> {
        let block = if range.len < DIRT { 512 } else { DIRT };
        let place = Place::new(range, block, disks)?;
        Ok(Self { schedule: Schedule::new(mibps << 20), place, written: 0 })
    }
}

impl Job for DirtyDisk {
    fn name(&self) -> String {
        format!("dirty disk {}", self.place.dev)
    }

    fn schedule(&mut self) -> &mut Schedule {
        &mut self.schedule
    }

    fn step(&mut self, board: &mut Board<'_>) -> io::Result<Instant> {
        let earliest = board.disks.earliest(self.place.disk);
        if earliest > Instant::now() {
            return Ok(earliest);
        }
        let due = self.schedule.pace().spend(self.place.block);
        self.written += 1;
        let region = self.place.region();
        let slot = mix(self.written) % region.slots;
        let mut buffer = Buffer::new(self.place.block as usize);
        fill(buffer.bytes(), self.written);
        board.disks.write(self.place.disk, region.at(slot), buffer.bytes())?;
        Ok(due)
    }

    fn status(&self) -> String {
        format!("written={} block={}", self.written, self.place.block)
    }
}
