//! The table, and where it is written down.

use super::{DISK_MIB, MEMORY_MIB, Run};
use crate::guest;
use anyhow::{Context, Result};
use std::fmt::Write;
use std::process::Command;
use std::time::Duration;

/// Everything that was measured.
#[derive(Debug)]
pub struct Figures {
    /// Whole moves: Godwit's, QEMU's own way, libvirt's; in turn.
    pub moves: [Vec<Run>; 3],
    /// Bytes per second of the seed, by RTT.
    pub rates: Vec<(Duration, f64)>,
    /// Seconds for each GiB of hole.
    pub hole: f64,
    /// Share of the disk sent again after a cut at half.
    pub again: f64,
    /// The way back.
    pub way_back: super::godwit::WayBack,
    /// Bytes per second of the channel and of plain TCP.
    pub wire: (f64, f64),
    /// Resident MiB of an idle launcher.
    pub idle: f64,
}

/// The middle of some figures.
pub fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

impl Figures {
    /// The table, in Markdown.
    ///
    /// # Errors
    /// Never: text has room.
    pub fn table(&self) -> Result<String> {
        let mut table = String::from(
            "| what | Godwit | QEMU's own way | libvirt | Godwit / QEMU | Godwit / libvirt |\n\
             |---|---|---|---|---|---|\n",
        );
        let took = self.moves.each_ref().map(|r| median(r.iter().map(|r| r.took.as_secs_f64())));
        let ms = |of: fn(&Run) -> Duration| {
            self.moves.each_ref().map(|r| median(r.iter().map(|r| of(r).as_secs_f64() * 1e3)))
        };
        for (what, [g, q, l], digits) in [
            (
                format!("whole move of {DISK_MIB} MiB full disk and {MEMORY_MIB} MiB memory, s"),
                took,
                1,
            ),
            ("pause at the switchover, as the guest saw it, ms".to_owned(), ms(|r| r.pause), 0),
            ("longest stall of the guest in the whole move, ms".to_owned(), ms(|r| r.stall), 0),
        ] {
            let (by_q, by_l) = (g / q, g / l);
            writeln!(
                table,
                "| {what} | {g:.digits$} | {q:.digits$} | {l:.digits$} | {by_q:.2} | {by_l:.2} |"
            )?;
        }
        table.push_str("\nGoals: whole move <= 0.8 of QEMU's own way and <= 0.5 of libvirt; pause <= 50 ms, below libvirt's.\n\n| what | figure | goal |\n|---|---|---|\n");
        let near = self.rates.first().map_or(f64::NAN, |(_, rate)| *rate);
        for (rtt, rate) in &self.rates {
            writeln!(
                table,
                "| disk rate at {} ms RTT | {:.0} MiB/s, {:.2} of that at 0 ms | {} |",
                rtt.as_millis(),
                rate / 1048576.0,
                rate / near,
                if rtt.as_millis() == 100 { ">= 0.95" } else { "" }
            )?;
        }
        writeln!(table, "| a GiB of hole costs | {:.1} ms | <= 50 ms |", self.hole * 1e3)?;
        writeln!(
            table,
            "| sent again after the target's gateway died at half, share of the disk | {:.2} % | <= 2 % |",
            self.again * 100.0
        )?;
        let super::godwit::WayBack { changed, sent_per_changed } = self.way_back;
        writeln!(
            table,
            "| disk bytes sent back after {:.1} % changed, per byte changed | {sent_per_changed:.2} | <= 1.1 |",
            changed * 100.0
        )?;
        let (channel, tcp) = self.wire;
        writeln!(
            table,
            "| channel, one stream, beside plain TCP | {:.0} of {:.0} MiB/s: {:.2} | |",
            channel / 1048576.0,
            tcp / 1048576.0,
            channel / tcp
        )?;
        writeln!(
            table,
            "| memory of a launcher whose VM is idle | {:.1} MiB | <= 15 MiB |",
            self.idle
        )?;
        Ok(table)
    }
}

/// Writes docs/benchmarks.md.
///
/// # Errors
/// When it cannot be written.
pub fn write_down(table: &str, runs: usize) -> Result<()> {
    let processor = std::fs::read_to_string("/proc/cpuinfo")?;
    let model = processor.lines().find_map(|l| l.strip_prefix("model name")).unwrap_or("unknown");
    let model = model.trim_start_matches([' ', '\t', ':']);
    let cores = std::thread::available_parallelism()?;
    let load = std::fs::read_to_string("/proc/loadavg")?;
    let load = load.split(' ').next().unwrap_or("unknown");
    let (qemu, libvirt) = (version("qemu-system-x86_64")?, version("libvirtd")?);
    let text = format!(
        "# Benchmarks\n\nWritten by `make bench`: one run on one machine; the moves in turn, medians of {runs}. \
         Quote the ratios, not the seconds.\n\n\
         QEMU's own way is `blockdev-mirror` to an NBD export and `migrate`, both through Godwit's \
         gateways. libvirt's is `virsh migrate --live --p2p --copy-storage-all`: its streams are not \
         encrypted, Godwit's are. All three have the same guest under the same load, and their pause is \
         read from the same ticks inside it. QEMU and libvirt have their own defaults (QEMU's bandwidth \
         is not limited; both aim at a pause of 300 ms, Godwit at 50 ms). Guests of \
         Godwit and of QEMU have 8 KiB more memory than they are said to have: else QEMU before 9.0 under \
         TCG may lose what they write, which libvirt does not let us avoid; the price is a stall when \
         the memory's first pass begins. After every move the guest \
         checks its writes and its memory; a run that lost something fails.\n\n{table}\n\
         Machine: {model}, {cores} cores, guests under TCG, disks on one filesystem, both hosts on one \
         loopback, load average at the end {load}. {qemu}; {libvirt}.\n",
    );
    let path = guest::root().join("docs/benchmarks.md");
    std::fs::create_dir_all(guest::root().join("docs"))?;
    std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
}

fn version(program: &str) -> Result<String> {
    let out = Command::new(program).arg("--version").output()?.stdout;
    Ok(String::from_utf8_lossy(&out).lines().next().unwrap_or(program).to_owned())
}
