//! Jobs in memory: counters that find a page gone back in time, and dirt.
//!
//! Counted pages lie at the bottom of the guest's memory, dirt at its top.

use super::jobs::{Job, MAX_LINES, Schedule};
use super::{Board, Ram};
use oracle::block::{fill, mix};
use oracle::page;
use oracle::protocol::{Check, Report};
use serde::{Deserialize, Serialize};
use std::io;
use std::time::Instant;

/// Pages visited in one step.
const STEP: u64 = 256;

/// So many MiB as pages, if the guest can spare them beside `used` pages.
fn pages(mib: u64, used: u64, ram: &Ram) -> io::Result<u64> {
    let spare = (ram.pages() as u64).saturating_sub(used) >> 8;
    if mib <= spare {
        return Ok(mib << 8);
    }
    Err(io::Error::new(
        io::ErrorKind::OutOfMemory,
        format!("mib={mib} is more than the guest can spare: ask for {spare} or give it more"),
    ))
}

/// Round `r` visits the pages in order, finds `r - 1` in each and leaves `r`.
#[derive(Serialize, Deserialize)]
pub struct Counters {
    schedule: Schedule,
    count: u64,
    round: u64,
    position: u64,
    stale: u64,
}

impl Counters {
    /// `mib` MiB of pages, all at 0.
    ///
    /// # Errors
    /// When the guest has not that much beside `dirt`.
    pub fn new(mib: u64, rate: u64, dirt: Option<&DirtyMemory>, ram: &mut Ram) -> io::Result<Self> {
        let count = pages(mib, dirt.map_or(0, |dirt| dirt.count), ram)?;
        for index in 0..count {
            page::init(ram.page_mut(index as usize), index);
        }
        Ok(Self { schedule: Schedule::new(rate), count, round: 1, position: 0, stale: 0 })
    }

    fn expected(&self, index: u64) -> u64 {
        if index < self.position { self.round } else { self.round - 1 }
    }

    fn lost(&mut self, page: u64, expected: u64, found: Option<u64>, board: &mut Board<'_>) {
        self.stale += 1;
        if self.stale <= MAX_LINES {
            let found = found.map_or("broken".into(), |found| found.to_string());
            board.report(Report::LostPage { page, expected, found });
        }
    }
}

impl Job for Counters {
    fn name(&self) -> String {
        "memory".into()
    }

    fn schedule(&mut self) -> &mut Schedule {
        &mut self.schedule
    }

    fn step(&mut self, board: &mut Board<'_>) -> io::Result<Instant> {
        let portion = self.schedule.pace().portion(STEP).min(self.count - self.position);
        for index in self.position..self.position + portion {
            let expected = self.round - 1;
            let page = board.ram.page_mut(index as usize);
            let found = page::counter(page, index);
            if found != Some(expected) {
                page::init(page, index);
            }
            page::set_counter(page, self.round);
            if found != Some(expected) {
                self.lost(index, expected, found, board);
            }
        }
        self.position += portion;
        if self.position == self.count {
            self.position = 0;
            self.round += 1;
        }
        Ok(self.schedule.pace().spend(portion))
    }

    fn check(&mut self, board: &mut Board<'_>) -> io::Result<Check> {
        let mut scratch = vec![0; page::SIZE];
        for index in 0..self.count {
            let expected = self.expected(index);
            let found = page::counter_checked(board.ram.page(index as usize), index, &mut scratch);
            if found != Some(expected) {
                // Mended, so that the sweep does not count it once more.
                let page = board.ram.page_mut(index as usize);
                page::init(page, index);
                page::set_counter(page, expected);
                self.lost(index, expected, found, board);
            }
        }
        Ok(Check { pages: self.count, stale: self.stale, ..Check::default() })
    }

    fn status(&self) -> String {
        format!("pages={} round={} stale={}", self.count, self.round, self.stale)
    }
}

/// A working set of incompressible pages, changed one after another.
#[derive(Serialize, Deserialize)]
pub struct DirtyMemory {
    schedule: Schedule,
    count: u64,
    position: u64,
    touched: u64,
}

impl DirtyMemory {
    /// `mib` MiB of pages, of which `mibps` MiB are changed per second (0: all it can).
    ///
    /// # Errors
    /// When the guest has not that much beside `counters`.
    pub fn new(
        mib: u64,
        mibps: u64,
        counters: Option<&Counters>,
        ram: &mut Ram,
    ) -> io::Result<Self> {
        let count = pages(mib, counters.map_or(0, |counters| counters.count), ram)?;
        let first = ram.pages() - count as usize;
        for index in first..ram.pages() {
            fill(ram.page_mut(index), index as u64);
        }
        Ok(Self { schedule: Schedule::new(mibps << 8), count, position: 0, touched: 0 })
    }
}

impl Job for DirtyMemory {
    fn name(&self) -> String {
        "dirty memory".into()
    }

    fn schedule(&mut self) -> &mut Schedule {
        &mut self.schedule
    }

    fn step(&mut self, board: &mut Board<'_>) -> io::Result<Instant> {
        let portion = self.schedule.pace().portion(STEP);
        let first = board.ram.pages() - self.count as usize;
        for _ in 0..portion {
            self.touched += 1;
            let change = mix(self.touched).to_le_bytes();
            let page = board.ram.page_mut(first + self.position as usize);
            for sector in page.chunks_mut(512) {
                sector[..8].copy_from_slice(&change);
            }
            self.position = (self.position + 1) % self.count;
        }
        Ok(self.schedule.pace().spend(portion))
    }

    fn status(&self) -> String {
        format!("mib={} touched={}", self.count >> 8, self.touched)
    }
}
