//! The table, and where it is written down.

use super::godwit::WayBack;
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
    /// Pauses of QEMU's `migrate` alone.
    pub bare: Vec<Duration>,
    /// Of the disk, by RTT; the first is the one that the others are compared with.
    pub rates: Vec<Rates>,
    /// Seconds for each GiB of hole.
    pub hole: f64,
    /// Share of the disk sent again after a cut at half.
    pub again: f64,
    /// The way back.
    pub way_back: WayBack,
    /// Bytes per second of the channel and of plain TCP.
    pub wire: (f64, f64),
    /// Resident MiB of an idle launcher.
    pub idle: f64,
}

/// Bytes per second over a link, in turn.
#[derive(Debug)]
pub struct Rates {
    /// Its round trip.
    pub rtt: Duration,
    /// Of Godwit's seed.
    pub godwit: Vec<f64>,
    /// Of QEMU's mirror.
    pub qemu: Vec<f64>,
}

/// The middle of some figures.
fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Their middle and their range, with so many digits.
fn spread(values: &[f64], digits: usize) -> String {
    let least = values.iter().copied().fold(f64::INFINITY, f64::min);
    let most = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    format!("{:.digits$} ({least:.digits$} to {most:.digits$})", median(values))
}

/// A goal, and whether it was reached.
fn goal(text: &str, reached: bool) -> String {
    format!("{text}: {}", if reached { "reached" } else { "**missed**" })
}

/// The goals of a row, for the figures of Godwit, of QEMU's own way and of libvirt.
type Goals = fn([f64; 3]) -> String;

fn took_goals([godwit, qemu, libvirt]: [f64; 3]) -> String {
    let by_libvirt = goal("<= 0.5 of libvirt", godwit / libvirt <= 0.5);
    format!("{}; {by_libvirt}", goal("<= 0.8 of QEMU", godwit / qemu <= 0.8))
}

fn pause_goals([godwit, _, libvirt]: [f64; 3]) -> String {
    format!("{}; {}", goal("<= 50 ms", godwit <= 50.0), goal("below libvirt", godwit < libvirt))
}

impl Figures {
    /// The tables, in Markdown.
    ///
    /// # Errors
    /// Never: text has room.
    pub fn table(&self) -> Result<String> {
        let mut table = String::new();
        self.moves_into(&mut table)?;
        self.rates_into(&mut table)?;
        self.costs_into(&mut table)?;
        Ok(table)
    }

    fn moves_into(&self, table: &mut String) -> Result<()> {
        let all = |of: fn(&Run) -> f64| -> [Vec<f64>; 3] {
            self.moves.each_ref().map(|runs| runs.iter().map(of).collect())
        };
        let took = format!("whole move, {DISK_MIB} MiB full disk, {MEMORY_MIB} MiB memory, s");
        let rows = [
            (took.as_str(), all(|run| run.took.as_secs_f64()), 1, took_goals as Goals),
            (
                "pause at the switchover, as the guest saw it, ms",
                all(|r| ms(r.pause)),
                0,
                pause_goals,
            ),
            ("longest stall in the whole move, ms", all(|run| ms(run.stall)), 0, |_| String::new()),
        ];
        table.push_str(
            "| what | Godwit | QEMU's own way | libvirt | Godwit / QEMU | Godwit / libvirt | goal |\n\
             |---|---|---|---|---|---|---|\n",
        );
        for (what, of, digits, goals) in &rows {
            let [g, q, l] = of.each_ref().map(|values| median(values));
            let (by_q, by_l, goals) = (g / q, g / l, goals([g, q, l]));
            let [sg, sq, sl] = of.each_ref().map(|values| spread(values, *digits));
            writeln!(table, "| {what} | {sg} | {sq} | {sl} | {by_q:.2} | {by_l:.2} | {goals} |")?;
        }
        Ok(())
    }

    fn rates_into(&self, table: &mut String) -> Result<()> {
        table.push_str(
            "\n| disk rate, MiB/s | Godwit | of that at 0 ms | QEMU's mirror | of that at 0 ms | goal |\n\
             |---|---|---|---|---|---|\n",
        );
        let near = self.rates.first().context("no rates")?;
        for Rates { rtt, godwit, qemu } in &self.rates {
            let share = median(godwit) / median(&near.godwit);
            let theirs = median(qemu) / median(&near.qemu);
            let rtt = rtt.as_millis();
            let goal = if rtt == 100 { goal(">= 0.95", share >= 0.95) } else { String::new() };
            let mib = |rates: &[f64]| {
                spread(&rates.iter().map(|rate| rate / 1048576.0).collect::<Vec<_>>(), 0)
            };
            let (g, q) = (mib(godwit), mib(qemu));
            writeln!(table, "| at {rtt} ms RTT | {g} | {share:.2} | {q} | {theirs:.2} | {goal} |")?;
        }
        Ok(())
    }

    fn costs_into(&self, table: &mut String) -> Result<()> {
        let WayBack { changed, sent_per_changed } = self.way_back;
        let (channel, tcp) = self.wire;
        table.push_str("\n| what | figure | goal |\n|---|---|---|\n");
        let bare: Vec<_> = self.bare.iter().map(|pause| ms(*pause)).collect();
        for (what, figure, goal) in [
            (
                "pause of QEMU's `migrate` alone, one disk for both, aiming at 50 ms".to_owned(),
                format!("{} ms", spread(&bare, 0)),
                String::new(),
            ),
            (
                "a GiB of hole costs the whole move".to_owned(),
                format!("{:.2} ms", self.hole * 1e3),
                goal("<= 50 ms", self.hole <= 0.05),
            ),
            (
                "sent again after the target's gateway died at half".to_owned(),
                format!("{:.2} % of the disk", self.again * 100.0),
                goal("<= 2 %", self.again <= 0.02),
            ),
            (
                format!("disk bytes sent back after {:.1} % changed", changed * 100.0),
                format!("{sent_per_changed:.2} per byte changed"),
                goal("<= 1.1", sent_per_changed <= 1.1),
            ),
            (
                "channel, one stream, beside plain TCP".to_owned(),
                format!(
                    "{:.0} of {:.0} MiB/s: {:.2}",
                    channel / 1048576.0,
                    tcp / 1048576.0,
                    channel / tcp
                ),
                String::new(),
            ),
            (
                "memory of a launcher whose VM is idle".to_owned(),
                format!("{:.1} MiB", self.idle),
                goal("<= 15 MiB", self.idle <= 15.0),
            ),
        ] {
            writeln!(table, "| {what} | {figure} | {goal} |")?;
        }
        Ok(())
    }
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
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
        "# Benchmarks\n\nWritten by `make bench`: one run on one machine; the moves and the disk rates in turn, medians and ranges of {runs}. \
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
