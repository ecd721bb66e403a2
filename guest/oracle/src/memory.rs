//! Counters in memory: a page that goes back in time is found by the next visit.
//!
//! Round `r` visits the pages in order, finds `r - 1` in each and leaves `r`.
//! Between two visits a page before the sweep's position therefore holds `r`,
//! one behind it `r - 1`, and nothing else.

use std::fs;
use std::io;
use std::time::Instant;

use crate::output::Output;
use crate::page;
use crate::protocol::{Check, Report};
use crate::region::Buffer;
use crate::worker::{Pace, Task};
use crate::writer::MAX_LINES;

/// Pages visited before the host is listened to again.
const STEP: u64 = 256;
/// What the guest itself needs beside the pages.
const RESERVE_MIB: u64 = 3;

/// The pages and where the sweep is.
pub struct Memory {
    pages: Buffer,
    count: u64,
    round: u64,
    position: u64,
    stale: u64,
    pace: Pace,
    output: Output,
}

impl Memory {
    /// Makes `mib` MiB of pages, all at 0; visits `rate` pages per second (0: all it can).
    ///
    /// # Errors
    /// When the guest has not that much to spare.
    pub fn new(mib: u64, rate: u64, output: Output) -> io::Result<Self> {
        let mut pages = allocate(mib)?;
        let count = mib << 8;
        for (index, page) in (0..).zip(pages.bytes().chunks_mut(page::SIZE)) {
            page::init(page, index);
        }
        let pace = Pace::new(rate);
        Ok(Memory { pages, count, round: 1, position: 0, stale: 0, pace, output })
    }

    /// What page `index` must hold at this moment.
    fn expected(&self, index: u64) -> u64 {
        if index < self.position { self.round } else { self.round - 1 }
    }

    fn lost(&mut self, page: u64, expected: u64, found: Option<u64>) {
        self.stale += 1;
        if self.stale <= MAX_LINES {
            let found = found.map_or("broken".into(), |found| found.to_string());
            self.output.report(Report::LostPage { page, expected, found });
        }
    }
}

impl Task for Memory {
    fn name(&self) -> String {
        "memory".into()
    }

    fn step(&mut self) -> io::Result<Instant> {
        let portion = self.pace.portion(STEP).min(self.count - self.position);
        for index in self.position..self.position + portion {
            let expected = self.round - 1;
            let page = one(&mut self.pages, index);
            let found = page::counter(page, index);
            if found != Some(expected) {
                page::init(page, index);
            }
            page::set_counter(page, self.round);
            if found != Some(expected) {
                self.lost(index, expected, found);
            }
        }
        self.position += portion;
        if self.position == self.count {
            self.position = 0;
            self.round += 1;
        }
        Ok(self.pace.spend(portion))
    }

    fn check(&mut self) -> io::Result<Check> {
        let mut scratch = vec![0; page::SIZE];
        for index in 0..self.count {
            let expected = self.expected(index);
            let page = one(&mut self.pages, index);
            let found = page::counter_checked(page, index, &mut scratch);
            if found != Some(expected) {
                // Mended, so that the sweep does not count it once more.
                page::init(page, index);
                page::set_counter(page, expected);
                self.lost(index, expected, found);
            }
        }
        Ok(Check { pages: self.count, stale: self.stale, ..Check::default() })
    }

    fn status(&self) -> String {
        format!("pages={} round={} stale={}", self.count, self.round, self.stale)
    }
}

fn one(pages: &mut Buffer, index: u64) -> &mut [u8] {
    let start = index as usize * page::SIZE;
    &mut pages.bytes()[start..start + page::SIZE]
}

/// `mib` MiB, if the guest can spare them: beyond, the kernel would kill us.
///
/// # Errors
/// When it cannot.
pub fn allocate(mib: u64) -> io::Result<Buffer> {
    let available = available_mib()?;
    if mib + RESERVE_MIB > available {
        let most = available.saturating_sub(RESERVE_MIB);
        return Err(io::Error::new(
            io::ErrorKind::OutOfMemory,
            format!("mib={mib} is more than the guest can spare: ask for {most} or give it more"),
        ));
    }
    Ok(Buffer::new((mib << 20) as usize))
}

fn available_mib() -> io::Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    kib.map(|kib| kib >> 10).ok_or_else(|| io::Error::other("/proc/meminfo has no MemAvailable"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sweep over one MiB, and a copy of `index` as it was `steps` ago.
    fn swept(steps: u32, index: u64) -> (Memory, Vec<u8>) {
        let (output, _) = Output::start(io::sink());
        let mut memory = Memory::new(1, 0, output).expect("one MiB");
        let old = one(&mut memory.pages, index).to_vec();
        for _ in 0..steps {
            memory.step().expect("a step");
        }
        (memory, old)
    }

    #[test]
    fn a_stale_page_is_found_by_the_sweep_and_counted_once() {
        for position in [0, 100, 255] {
            let (mut memory, old) = swept(3, position);
            assert_eq!(memory.check().expect("readable").stale, 0);
            one(&mut memory.pages, position).copy_from_slice(&old);
            memory.step().expect("a step");
            assert_eq!(memory.stale, 1);
            assert_eq!(memory.check().expect("readable").stale, 1);
        }
    }

    #[test]
    fn a_changed_byte_that_the_sweep_does_not_read_is_found_by_the_check() {
        let (mut memory, _) = swept(2, 7);
        one(&mut memory.pages, 7)[2000] ^= 1;
        memory.step().expect("a step");
        assert_eq!(memory.stale, 0);
        assert_eq!(memory.check().expect("readable").stale, 1);
        assert_eq!(memory.check().expect("readable").stale, 1, "mended");
    }
}
