//! The figures of moves between clusters: `make bench`, written to docs/benchmarks-across.md.
//! `bench-across RUNS` for other than 3 whole moves of each kind.

use anyhow::{Context, Result, ensure};
use e2e::bench::{DISK_MIB, MEMORY_MIB, Run, fill, libvirt};
use e2e::cluster::{Cluster, link};
use e2e::detour::Detour;
use e2e::guest;
use e2e::registry::Registry;
use e2e::vms::{MOVES, Oracle, SETTINGS, VMS, import, is_running, shows, vm};
use serde_json::{Value, json};
use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Whole moves of each kind.
const RUNS: usize = 3;
/// Round trips between the clusters' gateways, in milliseconds, beside that of this machine's loopback.
const RTTS: [u64; 2] = [50, 100];
/// VMs that go at once.
const MANY: usize = 10;
/// All of them are there within this time.
const PATIENCE: Duration = Duration::from_secs(600);
const UP: [&str; 4] = ["--nodes", "1", "--storage", "20Gi"];
const MOVED: &str = "/apis/godwit.dev/v1alpha1/namespaces/default/virtualmachinemoves";

fn main() -> ExitCode {
    e2e::exit("bench", bench())
}

fn bench() -> Result<()> {
    let program = std::env::current_exe()?.with_file_name("godwit");
    let program = program.to_str().context("a path")?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    let world = runtime.block_on(World::new(program))?;
    let runs: usize = std::env::args().nth(1).map_or(Ok(RUNS), |runs| runs.parse())?;
    ensure!(runs > 0, "nothing is compared in no run: say 1 or more");
    for number in 1..=runs {
        let trip = runtime.block_on(world.round_trip(0))?;
        eprintln!(
            "run {number} of {runs}: Godwit {:.1} s there, {:.1} s back",
            trip.there.took, trip.back.took
        );
        ours.push(trip);
        let run = libvirt::run()?;
        eprintln!("run {number} of {runs}: libvirt {:.1} s", run.took.as_secs_f64());
        theirs.push(run);
    }
    let mut far = Vec::new();
    for rtt in RTTS {
        let trip = runtime.block_on(world.round_trip(rtt)).with_context(|| {
            let logs = [world.east.keep_logs(), world.west.keep_logs()];
            format!("{rtt} ms; logs are in {}, {}", logs[0].display(), logs[1].display())
        })?;
        far.push((rtt, trip));
        eprintln!("{rtt} ms there and back: {:.1} s", far[far.len() - 1].1.there.took);
    }
    let many = runtime.block_on(world.many())?;
    let report = report(&ours, &theirs, &far, many)?;
    print!("{report}");
    let path = guest::root().join("docs/benchmarks-across.md");
    std::fs::write(&path, report).with_context(|| format!("cannot write {}", path.display()))
}

/// One way of a guest.
#[derive(Debug, Clone, Copy)]
struct Way {
    /// From the command to its end, in seconds.
    took: f64,
    /// How long the guest stood still, in milliseconds.
    paused: f64,
    /// Bytes of disks that were sent.
    disks: u64,
    /// Bytes of memory that were sent.
    memory: u64,
}

struct Trip {
    there: Way,
    back: Way,
}

/// Two clusters, and a guest in east with a full disk.
struct World {
    east: Cluster,
    west: Cluster,
    image: String,
    _registry: Registry,
}

fn storage(size: &str) -> Value {
    json!({"storageClassName": "local", "resources": {"requests": {"storage": size}}})
}

impl World {
    async fn new(program: &str) -> Result<Self> {
        let registry = Registry::start()?;
        let image = registry.push("guest", "disk/guest.raw", &guest::image("disk.raw")?)?;
        let east = Cluster::named("east", program, &UP, &[]).await?;
        let west = Cluster::named("west", program, &UP, &[]).await?;
        for cluster in [&east, &west] {
            let is_found = |s: &Value| s["status"]["synchronizationAddresses"][0].is_string();
            cluster.until(SETTINGS, is_found).await?;
        }
        link(&east, &west)?;
        let world = Self { east, west, image, _registry: registry };
        world.begin().await?;
        Ok(world)
    }

    /// A guest with a disk full of what does not compress, whose oracle works.
    async fn begin(&self) -> Result<()> {
        let size = format!("{DISK_MIB}Mi");
        let blank = json!({
            "metadata": {"name": "data"}, "spec": {"source": {"blank": {}}, "storage": storage(&size)},
        });
        let volumes = vec![
            json!({"name": "root", "dataVolume": {"name": "root"}}),
            json!({"name": "data", "dataVolume": {"name": "data"}}),
        ];
        let templates = vec![import("root", &self.image, storage("100Mi")), blank];
        let mut big = vm("web", "Halted", volumes, templates);
        big["spec"]["template"]["spec"]["domain"]["memory"]["guest"] =
            format!("{MEMORY_MIB}Mi").into();
        self.east.create(VMS, big).await?;
        let web = format!("{VMS}/web");
        let start = json!({"spec": {"runStrategy": "Always"}});
        self.east.send("PATCH", &web, Some(start)).await?;
        self.east.until(&web, is_running).await?;
        // The disk is where its guest was started; it is filled while that does not run.
        self.east.does(&["vm", "stop", "web"])?;
        self.east.until(&web, shows("Stopped")).await?;
        let has_size = |file: &PathBuf| file.metadata().is_ok_and(|f| f.len() == DISK_MIB << 20);
        let disk = guest::files(self.east.dir())?.into_iter().find(has_size);
        let disk = disk.context("the disk is nowhere")?;
        fill(&mut std::fs::OpenOptions::new().write(true).open(disk)?, DISK_MIB)?;
        self.east.does(&["vm", "start", "web"])?;
        self.east.until(&web, is_running).await?;
        let mut console = self.east.terminal("web")?;
        Oracle::begin(&mut console).map(|_| ())
    }

    /// To west, and back to the disks that it left.
    async fn round_trip(&self, rtt: u64) -> Result<Trip> {
        let there = self.go(&self.east, &self.west, "west", rtt).await?;
        let back = self.go(&self.west, &self.east, "east", rtt).await?;
        // The next one finds nothing there.
        self.west.send("DELETE", &format!("{VMS}/web"), None).await?;
        self.west.until(VMS, |all| all["items"].as_array().is_some_and(Vec::is_empty)).await?;
        Ok(Trip { there, back })
    }

    async fn go(&self, from: &Cluster, to: &Cluster, name: &str, rtt: u64) -> Result<Way> {
        let far = match rtt {
            0 => None,
            rtt => Some(Detour::to(to, &format!("{name}-1"), Duration::from_millis(rtt)).await?),
        };
        let began = Instant::now();
        from.does(&["migrate", "vm/web", "--to", name])?;
        let took = began.elapsed().as_secs_f64();
        if let Some(far) = far {
            far.end(to).await?;
        }
        to.until(&format!("{VMS}/web"), is_running).await?;
        Oracle::again(&mut to.console("web")?).check()?;
        let moves = from.send("GET", MOVES, None).await?;
        let all = moves["items"].as_array().cloned().unwrap_or_default();
        let sent = all.into_iter().filter(|m| !m["spec"]["sendTo"].is_null());
        let last = sent.max_by_key(|m| m["metadata"]["creationTimestamp"].to_string());
        let progress = last.context("nothing was sent")?["status"]["progress"].clone();
        let number = |value: &Value| value.as_u64().unwrap_or_default();
        Ok(Way {
            took,
            paused: progress["paused_ms"].as_f64().context("no pause")?,
            disks: number(&progress["progress"]["bytes_sent"]),
            memory: number(&progress["progress"]["memory"]["sent"]),
        })
    }

    /// Small guests, all at once; the seconds until the last one is there.
    async fn many(&self) -> Result<f64> {
        let names: Vec<String> = (0..MANY).map(|number| format!("small-{number}")).collect();
        for name in &names {
            let root = json!({"name": "root", "dataVolume": {"name": name}});
            let mut small =
                vm(name, "Always", vec![root], vec![import(name, &self.image, storage("100Mi"))]);
            small["spec"]["template"]["spec"]["domain"]["resources"] =
                json!({"requests": {"cpu": "1m"}});
            self.east.create(VMS, small).await?;
            // One after the other: they boot on the machine's processors.
            self.east.until(&format!("{VMS}/{name}"), is_running).await?;
            self.east.terminal(name)?;
        }
        let began = Instant::now();
        for name in &names {
            self.east.does(&["migrate", &format!("vm/{name}"), "--to", "west", "--no-wait"])?;
        }
        loop {
            let moves = self.east.send("GET", MOVED, None).await?;
            let of = |m: &&Value| names.iter().any(|name| m["spec"]["vm"] == name.as_str());
            let all = moves["items"].as_array().cloned().unwrap_or_default();
            let ended = |phase: &str| {
                all.iter().filter(of).filter(|m| m["status"]["phase"] == phase).count()
            };
            ensure!(ended("Failed") == 0, "{moves}");
            if ended("Succeeded") == MANY {
                return Ok(began.elapsed().as_secs_f64());
            }
            ensure!(began.elapsed() < PATIENCE, "not all are there: {moves}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut all: Vec<f64> = values.collect();
    all.sort_by(f64::total_cmp);
    all.get(all.len() / 2).copied().unwrap_or(f64::NAN)
}

fn report(ours: &[Trip], theirs: &[Run], far: &[(u64, Trip)], many: f64) -> Result<String> {
    const MIB: f64 = 1024.0 * 1024.0;
    let godwit = median(ours.iter().map(|trip| trip.there.took));
    let libvirt = median(theirs.iter().map(|run| run.took.as_secs_f64()));
    let pause = median(ours.iter().map(|trip| trip.there.paused));
    let still = median(theirs.iter().map(|run| run.pause.as_secs_f64() * 1e3));
    let processors = std::thread::available_parallelism().map_or(0, usize::from);
    let mut text = format!(
        "# Moves between clusters\n\n\
         By `target/release/bench-across` on {processors} processors; a part of `make bench`. Real QEMU under TCG: a guest \
         of {MEMORY_MIB} MiB with a full disk of {DISK_MIB} MiB, in which an oracle writes; nothing was lost in any run. \
         Godwit's time is that of `godwit migrate vm/web --to west`, from the command to its end: checks of both \
         clusters, the VM and its disks made there, the move, mTLS on, and all cleared away. libvirt's is that of \
         `virsh migrate --live --p2p --copy-storage-all` between two hosts, in plain text, to a disk that is there.\n\n\
         | median of {} | Godwit | libvirt | ratio |\n|---|---|---|---|\n\
         | whole move | {godwit:.1} s | {libvirt:.1} s | {:.2} |\n\
         | how long the guest stood still | {pause:.0} ms | {still:.0} ms | {:.2} |\n\n\
         | round trip | there | disks sent | back | disks sent | of what was sent there |\n|---|---|---|---|---|---|\n",
        ours.len(),
        godwit / libvirt,
        pause / still,
    );
    let near = ours.iter().map(|trip| (0, trip)).take(1);
    for (rtt, Trip { there, back }) in near.chain(far.iter().map(|(rtt, trip)| (*rtt, trip))) {
        writeln!(
            text,
            "| {rtt} ms | {:.1} s, pause {:.0} ms | {:.0} MiB | {:.1} s, pause {:.0} ms | {:.1} MiB | {:.1} % |",
            there.took,
            there.paused,
            there.disks as f64 / MIB,
            back.took,
            back.paused,
            back.disks as f64 / MIB,
            back.disks as f64 / there.disks as f64 * 100.0,
        )?;
    }
    let memory = median(ours.iter().map(|trip| trip.there.memory as f64)) / MIB;
    writeln!(
        text,
        "\nMemory sent in a move: {memory:.0} MiB. {MANY} small Linux guests sent off at once, with the default limits \
         (2 at a time from a node): {many:.1} s, {:.2} s each.",
        many / MANY as f64
    )?;
    Ok(text)
}
