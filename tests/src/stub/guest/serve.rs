//! The oracle's commands, as the guest answers them.

use super::Board;
use super::disk::{DirtyDisk, Writer};
use super::jobs::{Job, Jobs, Ticker};
use super::memory::{Counters, DirtyMemory};
use oracle::protocol::{Command, MAX_LINE, Report};
use std::io;

/// Adds one byte to the line that comes in; gives the line when it is whole.
/// A line is cut off at the protocol's longest.
pub fn collect(line: &mut Vec<u8>, byte: u8) -> Option<String> {
    line.push(byte);
    if byte != b'\n' && line.len() < MAX_LINE {
        return None;
    }
    let whole = std::mem::take(line);
    let text = String::from_utf8_lossy(&whole).trim().to_owned();
    (!text.is_empty()).then_some(text)
}

/// Carries out one line and reports.
pub fn answer(jobs: &mut Jobs, mut board: Board<'_>, line: &str) {
    let done = match line.parse::<Command>() {
        Ok(command) => run(jobs, &mut board, command).map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    };
    match done {
        Ok(report) => board.report(report),
        Err(reason) => board.report(Report::Err(reason)),
    }
}

fn run(jobs: &mut Jobs, board: &mut Board<'_>, command: Command) -> io::Result<Report> {
    let ok = |command: &str| Ok(Report::Ok(command.into()));
    match command {
        Command::Ping => Ok(Report::Pong),
        Command::Status => Ok(Report::Status(jobs.status(board.uptime))),
        Command::Check => jobs.check(board).map(Report::Check),
        Command::Quit => {
            *jobs = Jobs::default();
            board.report(Report::Bye);
            Ok(Report::Died("0".into()))
        }
        Command::TickStart { us } => {
            jobs.ticker = Some(Ticker::new(us));
            ok("tick start")
        }
        Command::TickStop => {
            jobs.ticker.iter_mut().for_each(|job| job.schedule().running = false);
            ok("tick stop")
        }
        Command::WriteStart(options) => {
            jobs.writers.remove(&options.id);
            jobs.writers.insert(options.id, Writer::new(options, board.disks)?);
            ok("write start")
        }
        Command::WriteStop { id } => {
            jobs.writers.get_mut(&id).into_iter().for_each(|job| job.schedule().running = false);
            ok("write stop")
        }
        Command::MemoryStart { mib, rate } => {
            jobs.counters = None;
            let dirt = jobs.dirty_memory.as_ref();
            jobs.counters = Some(Counters::new(mib, rate, dirt, board.ram)?);
            ok("memory start")
        }
        Command::MemoryStop => {
            jobs.counters.iter_mut().for_each(|job| job.schedule().running = false);
            ok("memory stop")
        }
        Command::DirtyMemory { mib, mibps } => {
            jobs.dirty_memory = None;
            let counters = jobs.counters.as_ref();
            jobs.dirty_memory = Some(DirtyMemory::new(mib, mibps, counters, board.ram)?);
            ok("dirty memory")
        }
        Command::DirtyDisk { range, mibps } => {
            jobs.dirty_disk = None;
            jobs.dirty_disk = Some(DirtyDisk::new(range, mibps, board.disks)?);
            ok("dirty disk")
        }
        Command::DirtyStop => {
            jobs.dirty_memory = None;
            jobs.dirty_disk = None;
            ok("dirty stop")
        }
    }
}
