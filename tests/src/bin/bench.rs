//! `make bench`: figures, each beside what it is compared with, from one run on
//! one machine. Written to docs/benchmarks.md.

use anyhow::{Context, Result};
use e2e::bench::report::{Figures, Rates, write_down};
use e2e::bench::{Run, godwit, libvirt, qemu, wire};
use e2e::world::World;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

/// Of each kind of whole move, and of each rate.
const RUNS: usize = 3;
/// Round trips, in milliseconds.
const RTTS: [u64; 3] = [0, 20, 100];
/// Disk for the rates, and hole for its cost.
const RATE_MIB: u64 = 4096;
const HOLE_GIB: u64 = 256;

fn main() -> ExitCode {
    e2e::exit("bench", bench())
}

fn bench() -> Result<()> {
    let program = std::env::current_exe()?.with_file_name("godwit");
    let figures = measure(&program)?;
    let table = figures.table()?;
    print!("{table}");
    write_down(&table, RUNS)
}

fn measure(program: &Path) -> Result<Figures> {
    let mut moves = [vec![], vec![], vec![]];
    let mut bare = vec![];
    // In turn, so that all see the same machine.
    for n in 1..=RUNS {
        moves[0].push(told(n, "Godwit", godwit::run(program))?);
        moves[1].push(told(n, "QEMU's own way", qemu::run(program))?);
        moves[2].push(told(n, "libvirt", libvirt::run())?);
        bare.push(qemu::bare_pause(program)?);
    }
    let mut rates =
        RTTS.map(|ms| Rates { rtt: Duration::from_millis(ms), godwit: vec![], qemu: vec![] });
    for n in 1..=RUNS {
        for Rates { rtt, godwit, qemu } in &mut rates {
            eprintln!("run {n} of {RUNS}: disk rate at {} ms", rtt.as_millis());
            godwit.push(self::godwit::disk_rate(program, *rtt, RATE_MIB)?);
            qemu.push(self::qemu::disk_rate(program, *rtt, RATE_MIB)?);
        }
    }
    eprintln!("holes");
    let hole = godwit::hole_cost(program, HOLE_GIB)?;
    eprintln!("a cut at half");
    let again = godwit::sent_again_after_a_cut(program)?;
    eprintln!("there and back");
    let way_back = godwit::way_back(program)?;
    eprintln!("the channel and plain TCP");
    let wire = (wire::channel(program)?, wire::plain_tcp(&World::new(program)?)?);
    let idle = godwit::idle_launcher(program)?;
    Ok(Figures { moves, bare, rates: rates.into(), hole, again, way_back, wire, idle })
}

fn told(n: usize, who: &str, run: Result<Run>) -> Result<Run> {
    let run = run.with_context(|| format!("{who}, run {n}"))?;
    let (pause, stall) = (run.pause.as_millis(), run.stall.as_millis());
    let took = run.took.as_secs_f64();
    eprintln!("run {n} of {RUNS}: {who} {took:.1} s, pause {pause} ms, longest stall {stall} ms");
    Ok(run)
}
