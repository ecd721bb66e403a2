//! What Godwit is measured with, and against.

pub mod godwit;
pub mod libvirt;
pub mod qemu;
pub mod report;
pub mod tunnel;
pub mod wire;

use crate::witness::{Line, Witness};
use crate::world::{Host, World};
use anyhow::{Result, bail};
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

/// Whatever is awaited is there sooner, on a busy machine too.
pub const SOON: Duration = Duration::from_secs(120);
/// The guest's disk, full of what does not compress.
pub const DISK_MIB: u64 = 2048;
/// The guest's memory.
pub const MEMORY_MIB: u64 = 512;
/// The oracle's load in every run: 50 durable writes/s, 500 pages/s, a tick each 2 ms.
const LOAD: [&str; 3] = [
    "write start dev=/dev/vda offset=32M len=8M rate=50 seed=7",
    "memory start mib=32 rate=500",
    "tick start us=2000",
];

/// One whole move.
#[derive(Debug, Clone, Copy)]
pub struct Run {
    /// From the command to the guest at its new place.
    pub took: Duration,
    /// How long the guest stood still at the switchover, by its own ticks.
    pub pause: Duration,
    /// The longest time it stood still at all during the move, by its own ticks.
    pub stall: Duration,
}

impl Run {
    fn since(begun: Instant, took: Duration, witness: &Witness) -> Self {
        let pause = witness.pause_at_switchover_since(begun);
        Self { took, pause, stall: witness.longest_pause_since(begun) }
    }
}

/// Makes a disk full of bytes that do not compress.
///
/// # Errors
/// When there is no room.
pub fn full_disk(path: &Path, mib: u64) -> Result<()> {
    fill(&mut File::create(path)?, mib)
}

/// Fills a file with bytes that do not compress.
///
/// # Errors
/// When there is no room.
pub fn fill(to: &mut File, mib: u64) -> Result<()> {
    let mut buffer = vec![0; 4 << 20];
    for n in 0..mib / 4 {
        oracle::block::fill(&mut buffer, n);
        to.write_all(&buffer)?;
    }
    to.sync_all()?;
    Ok(())
}

/// A host and, this far away, another.
fn two_hosts(world: &World, delay: Option<Duration>) -> Result<(Host, Host)> {
    let a = world.host("a", 2)?;
    let b = match delay {
        Some(delay) => world.far_host("b", 3, delay)?,
        None => world.host("b", 3)?,
    };
    Ok((a, b))
}

/// Puts the guest under the load that all runs have.
///
/// # Errors
/// When its oracle does not work.
fn load(witness: &Witness, line: &mut Line) -> Result<()> {
    witness.wait_ready(SOON)?;
    for command in LOAD {
        line.command(command, SOON)?;
    }
    witness.wait_written(50, SOON)
}

/// A run counts only if nothing was lost in it.
fn whole(line: &mut Line) -> Result<()> {
    let sums = line.check()?;
    if sums.lost + sums.stale > 0 {
        bail!("the guest lost {} writes and {} pages", sums.lost, sums.stale);
    }
    Ok(())
}

/// Listens to the oracle on a host where the guest is about to be.
fn listen(witness: &Witness, socket: &Path) -> Result<Line> {
    let until = Instant::now() + SOON;
    loop {
        match witness.listen(socket) {
            Ok(line) => return Ok(line),
            Err(error) if Instant::now() > until => return Err(error),
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}
