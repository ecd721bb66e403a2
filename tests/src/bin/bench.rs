//! `make bench`: figures, each beside what it is compared with, from one run on
//! one machine. Written to docs/benchmarks.md.

use anyhow::{Context, Result, bail};
use e2e::bench::libvirt::{Guest, Pair};
use e2e::guest;
use e2e::witness::{Line, Witness};
use e2e::world::{Host, Process, World};
use launcher::migration::progress::Progress;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{Read, Write as _};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

const VM: &str = "bench";
const SOON: Duration = Duration::from_secs(120);
const DISK_MIB: u64 = 2048;
const MEMORY_MIB: u64 = 512;
const RUNS: usize = 3;
/// The oracle's load in every run: 50 durable writes/s, 500 pages/s, a tick each 2 ms.
const LOAD: [&str; 3] = [
    "write start dev=/dev/vda offset=32M len=8M rate=50 seed=7",
    "memory start mib=32 rate=500",
    "tick start us=2000",
];

fn main() -> ExitCode {
    match bench() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench FAILED: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// One whole move.
struct Run {
    took: Duration,
    pause: Duration,
}

fn bench() -> Result<()> {
    let mut ours = Vec::new();
    let mut theirs = Vec::new();
    // In turn, so that both see the same machine.
    for n in 1..=RUNS {
        theirs.push(libvirt().context("libvirt")?);
        let (run, _) = godwit(|_, _| Ok(()))?;
        ours.push(run);
        eprintln!("run {n} of {RUNS}: {}", line(&ours[n - 1], &theirs[n - 1]));
    }
    let way_back = way_back()?;
    let cut = cut_at_half()?;
    let (rss, idle) = idle()?;
    let mut table = String::from("| what | Godwit | libvirt | ratio |\n|---|---|---|---|\n");
    let took = |runs: &[Run]| median(runs.iter().map(|r| r.took.as_secs_f64()));
    let pause = |runs: &[Run]| median(runs.iter().map(|r| r.pause.as_secs_f64() * 1e3));
    let (a, b) = (took(&ours), took(&theirs));
    writeln!(
        table,
        "| whole move, {DISK_MIB} MiB full disk + {MEMORY_MIB} MiB guest, s | {a:.1} | {b:.1} | {:.2} |",
        a / b
    )?;
    let (a, b) = (pause(&ours), pause(&theirs));
    writeln!(table, "| pause that the guest saw, ms | {a:.0} | {b:.0} | {:.2} |", a / b)?;
    writeln!(table, "| disk bytes sent back / bytes changed | {way_back:.2} | | |")?;
    writeln!(
        table,
        "| sent again after the link was cut at half, share of the disk | {:.2} % | | |",
        cut * 100.0
    )?;
    writeln!(table, "| launcher's memory, {idle}, MiB | {rss:.1} | | |")?;
    print!("{table}");
    write_down(&table)
}

fn line(ours: &Run, theirs: &Run) -> String {
    format!(
        "Godwit {:.1} s, {} ms; libvirt {:.1} s, {} ms",
        ours.took.as_secs_f64(),
        ours.pause.as_millis(),
        theirs.took.as_secs_f64(),
        theirs.pause.as_millis()
    )
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Fills a disk with bytes that do not compress.
fn full_disk(path: &Path) -> Result<()> {
    let (mut from, mut to) = (File::open("/dev/urandom")?, File::create(path)?);
    let mut buffer = vec![0; 4 << 20];
    for _ in 0..DISK_MIB / 4 {
        from.read_exact(&mut buffer)?;
        to.write_all(&buffer)?;
    }
    to.sync_all()?;
    Ok(())
}

fn load(witness: &Witness, line: &mut Line) -> Result<()> {
    witness.wait_ready(SOON)?;
    for command in LOAD {
        line.command(command, SOON)?;
    }
    witness.wait_written(50, SOON)
}

fn whole(line: &mut Line) -> Result<()> {
    let sums = line.check()?;
    if sums.lost + sums.stale > 0 {
        bail!("the guest lost {} writes and {} pages", sums.lost, sums.stale);
    }
    Ok(())
}

fn libvirt() -> Result<Run> {
    let folder = tempfile::Builder::new().prefix("lv-").tempdir()?;
    let pair = Pair::start(folder.path())?;
    full_disk(&pair.source_disk())?;
    let cmdline = std::fs::read_to_string(guest::image("cmdline")?)?;
    pair.boot(&Guest {
        kernel: guest::image("vmlinuz")?,
        initrd: guest::image("initramfs.img")?,
        cmdline: cmdline.trim().to_owned(),
        memory_mib: MEMORY_MIB,
        cpus: 1,
    })?;
    let witness = Witness::new();
    let mut line = witness.listen(&pair.source_serial())?;
    load(&witness, &mut line)?;
    let begun = Instant::now();
    let (took, mut line) = pair.migrate(|serial| witness.listen(serial))?;
    witness.wait_alive(SOON)?;
    whole(&mut line)?;
    Ok(Run { took, pause: witness.longest_pause_since(begun) })
}

struct Scene {
    world: World,
    a: Host,
    b: Host,
    on_a: Process,
    _on_b: Process,
    witness: Witness,
}

fn scene() -> Result<Scene> {
    let world = World::new(&std::env::current_exe()?.with_file_name("godwit"))?;
    let (a, b) = (world.host("a", "127.0.0.2")?, world.host("b", "127.0.0.3")?);
    let disk = world.path("a/root.raw");
    full_disk(&disk)?;
    let on_a = a.launch(VM, &guest::spec(VM, &disk, MEMORY_MIB)?, &[])?;
    let on_b = b.receive(VM, &[])?;
    let witness = Witness::new();
    let mut line = witness.listen(&a.folder(VM).join("oracle.sock"))?;
    load(&witness, &mut line)?;
    Ok(Scene { world, a, b, on_a, _on_b: on_b, witness })
}

impl Scene {
    /// Moves the guest; follows it. Returns the run and the line to its oracle.
    fn hop(&self, from: &Host, to: &Host, more: &[&str]) -> Result<(Run, Line)> {
        let begun = Instant::now();
        let mut command = self.world.move_command(VM, from, to, more);
        command.stderr(File::create(self.world.path("move.log"))?);
        let mut moving = command.spawn()?;
        let socket = to.folder(VM).join("oracle.sock");
        let line = loop {
            match self.witness.listen(&socket) {
                Ok(line) => break line,
                Err(error) if begun.elapsed() > SOON => return Err(error),
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        if !moving.wait()?.success() {
            bail!("{}", std::fs::read_to_string(self.world.path("move.log"))?);
        }
        let took = begun.elapsed();
        self.witness.wait_alive(SOON)?;
        Ok((Run { took, pause: self.witness.longest_pause_since(begun) }, line))
    }

    fn progress(&self, host: &Host) -> Result<Progress> {
        Ok(self.world.status(host, VM)?.migration.context("no move")?.progress)
    }
}

fn godwit(then: impl FnOnce(&Scene, &mut Line) -> Result<()>) -> Result<(Run, Scene)> {
    let scene = scene()?;
    let (run, mut line) = scene.hop(&scene.a, &scene.b, &[])?;
    whole(&mut line)?;
    then(&scene, &mut line)?;
    Ok((run, scene))
}

/// Disk bytes that a way back sends, for each byte that was changed.
fn way_back() -> Result<f64> {
    let mut changed = 0;
    let (_, scene) = godwit(|_, line| {
        line.command("write stop", SOON)?;
        line.command("write start dev=/dev/vda offset=64M len=20M batch=64 seed=9 id=1", SOON)?;
        std::thread::sleep(Duration::from_secs(10));
        line.command("write stop id=1", SOON)?;
        // Both writers' slots: what may have changed since the move.
        changed = line.check()?.slots * 4096;
        Ok(())
    })?;
    let disk = format!("root={}", scene.world.path("a/root.raw").display());
    scene.hop(&scene.b, &scene.a, &["--disk", &disk])?;
    Ok(scene.progress(&scene.b)?.bytes_sent as f64 / changed as f64)
}

/// The share of the disk that is sent again when the target's gateway dies at half.
fn cut_at_half() -> Result<f64> {
    let mut scene = scene()?;
    let mut command = scene.world.move_command(VM, &scene.a, &scene.b, &[]);
    command.stderr(File::create(scene.world.path("move.log"))?);
    let mut moving = command.spawn()?;
    loop {
        let progress = scene.world.status(&scene.a, VM)?.migration.map(|m| m.progress);
        let progress = progress.unwrap_or_default();
        if progress.bytes_total > 0 && progress.bytes_left < progress.bytes_total / 2 {
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    scene.b.kill_gateway();
    scene.b.start_gateway()?;
    if !moving.wait()?.success() {
        bail!("{}", std::fs::read_to_string(scene.world.path("move.log"))?);
    }
    let progress = scene.progress(&scene.a)?;
    Ok(progress.bytes_again as f64 / (DISK_MIB << 20) as f64)
}

/// Resident memory of a launcher whose guest runs and does not move.
fn idle() -> Result<(f64, &'static str)> {
    let scene = scene()?;
    let status = std::fs::read_to_string(format!("/proc/{}/status", scene.on_a.pid()))?;
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).context("no VmRSS")?;
    let kib: f64 = line.split_whitespace().nth(1).context("no VmRSS")?.parse()?;
    Ok((kib / 1024.0, "idle VM"))
}

fn write_down(table: &str) -> Result<()> {
    let processor = std::fs::read_to_string("/proc/cpuinfo")?;
    let model = processor.lines().find_map(|l| l.strip_prefix("model name")).unwrap_or("unknown");
    let model = model.trim_start_matches([' ', '\t', ':']);
    let cores = std::thread::available_parallelism()?;
    let load = std::fs::read_to_string("/proc/loadavg")?;
    let text = format!(
        "# Benchmarks\n\nWritten by `make bench`: one run on one machine, the two sides in turn, medians of {RUNS}. \
         Godwit's streams are encrypted, libvirt's are not. The pause is read from the same ticks inside the guest. \
         Quote the ratios, not the seconds.\n\n{table}\nMachine: {model}, {cores} cores, QEMU under TCG, \
         disks on one filesystem, load average at the end {}.\n",
        load.split(' ').next().unwrap_or("unknown")
    );
    let path = guest::root().join("docs/benchmarks.md");
    std::fs::create_dir_all(guest::root().join("docs"))?;
    std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
}
