//! The figures of moves inside a cluster: `make bench`, written to docs/benchmarks-moves.md.
//! `bench-moves ROUNDS` for other than 20 moves of each stub guest.

use anyhow::{Context, Result, ensure};
use e2e::cluster::{Cluster, memory};
use e2e::guest;
use e2e::registry::Registry;
use e2e::vms::{MOVES, SETTINGS, VMIS, VMS, is_running, migration};
use launcher::client::Client as Launcher;
use serde_json::{Value, json};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime};

/// Moves of one guest, whose first byte is awaited.
const SINGLE: usize = 10;
/// Guests that leave a node.
const DRAINED: usize = 20;
/// Guests of the stub, and how often each of them moves, where nothing else is said.
const STUBS: usize = 50;
const ROUNDS: usize = 20;
/// All of it happens within this time, on a slow machine too.
const PATIENCE: Duration = Duration::from_secs(1200);
/// What was started settles in this time.
const SETTLES: Duration = Duration::from_secs(5);
const NODES: [&str; 4] = ["--nodes", "3", "--storage", "20Gi"];

fn main() -> ExitCode {
    e2e::exit("bench", bench())
}

fn bench() -> Result<()> {
    let here = std::env::current_exe()?;
    let folder = here.parent().context("a folder")?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let first = runtime.block_on(first_bytes(folder))?;
    let drained = runtime.block_on(drain(folder))?;
    let rounds = std::env::args().nth(1).map_or(Ok(ROUNDS), |rounds| rounds.parse())?;
    let many = runtime.block_on(many(folder, rounds))?;
    let report = report(&first, &drained, &many);
    print!("{report}");
    let path = guest::root().join("docs/benchmarks-moves.md");
    std::fs::write(&path, report).with_context(|| format!("cannot write {}", path.display()))
}

fn program(folder: &Path) -> Result<String> {
    Ok(folder.join("godwit").to_str().context("a path")?.to_owned())
}

/// A small VM whose disk is its own node's, and goes along: `image` boots from a container disk.
fn vm(name: &str, image: Option<&str>) -> Value {
    let volume = match image {
        Some(image) => json!({"name": "root", "containerDisk": {"image": image}}),
        None => json!({"name": "root", "emptyDisk": {"capacity": "1Mi"}}),
    };
    json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "metadata": {"name": name},
        "spec": {"runStrategy": "Always", "template": {"spec": {
            "terminationGracePeriodSeconds": 0,
            "evictionStrategy": "LiveMigrate",
            "domain": {
                "memory": {"guest": "96Mi"},
                // Or the nodes would be full: each has the machine's processors only.
                "resources": {"requests": {"cpu": "1m"}},
                "devices": {"disks": [{"name": "root", "disk": {"bus": "virtio"}}]},
            },
            "volumes": [volume],
        }}},
    })
}

async fn runs(cluster: &Cluster, names: &[String]) -> Result<()> {
    for name in names {
        cluster.until(&format!("{VMS}/{name}"), is_running).await?;
    }
    Ok(())
}

/// The launcher of a VMI that runs.
async fn launcher_of(cluster: &Cluster, name: &str) -> Result<Launcher> {
    let vmi = cluster.send("GET", &format!("{VMIS}/{name}"), None).await?;
    let node = vmi["status"]["nodeName"].as_str().context("no node")?;
    let record = format!("{}/{name}", e2e::vms::OWNERS);
    let record = cluster.send("GET", &record, None).await?;
    let pod = record["status"]["pod"].as_str().context("no pod")?;
    let folder = cluster.path(&format!("machine/nodes/{node}/handler/pods/default_{pod}"));
    Ok(Launcher::new(&folder, &format!("default.{name}")))
}

/// From a request to the first byte that moves, in milliseconds, sorted: the launcher says when.
async fn first_bytes(folder: &Path) -> Result<Vec<f64>> {
    let cluster = Cluster::new(&program(folder)?, &NODES).await?;
    cluster.until(SETTINGS, |_| true).await?;
    cluster.create(VMS, vm("one", None)).await?;
    runs(&cluster, &["one".into()]).await?;
    tokio::time::sleep(SETTLES).await;
    let mut times = Vec::new();
    for number in 0..SINGLE {
        let launcher = launcher_of(&cluster, "one").await?;
        let name = format!("move-{number}");
        let began = SystemTime::now();
        cluster.create(MOVES, migration(&name, "one")).await?;
        let mut seen = launcher.status().await?.generation;
        let at = loop {
            let status = launcher.status_after(seen, Duration::from_secs(10)).await?;
            seen = status.generation;
            // What comes after is later: so this is no less than it was.
            if let Some(of) = status.migration.filter(|of| of.phase != "Preparing") {
                break of.since;
            }
            ensure!(began.elapsed()? < PATIENCE, "{name} has not begun after {PATIENCE:?}");
        };
        let began = began.duration_since(SystemTime::UNIX_EPOCH)?.as_secs_f64();
        times.push((at - began) * 1e3);
        cluster.until_moved(&name, "Succeeded").await?;
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    times.sort_by(f64::total_cmp);
    Ok(times)
}

struct Drained {
    seconds: f64,
    /// Milliseconds for which each guest stood still, sorted.
    pauses: Vec<f64>,
}

/// Real guests leave a node, two at a time as the defaults have it.
async fn drain(folder: &Path) -> Result<Drained> {
    let registry = Registry::start()?;
    let image = registry.push("guest", "disk/guest.raw", &guest::image("disk.raw")?)?;
    let cluster = Cluster::new(&program(folder)?, &NODES).await?;
    cluster.until(SETTINGS, |_| true).await?;
    let kubectl = |arguments: &[&str]| match cluster.kubectl(arguments) {
        Some((true, said)) => Ok(said),
        Some((false, said)) => anyhow::bail!("kubectl {arguments:?}: {said}"),
        None => anyhow::bail!("there is no kubectl of 1.27 or later: run `make setup`"),
    };
    kubectl(&["cordon", "local-2", "local-3"])?;
    let names: Vec<String> = (0..DRAINED).map(|number| format!("vm-{number}")).collect();
    for name in &names {
        cluster.create(VMS, vm(name, Some(&image))).await?;
        // One after the other: they boot on two processors.
        runs(&cluster, std::slice::from_ref(name)).await?;
        cluster.terminal(name)?;
    }
    kubectl(&["uncordon", "local-2", "local-3"])?;
    let began = Instant::now();
    let flags = ["--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=1200s"];
    kubectl(&[&["drain", "local-1"], &flags[..]].concat())?;
    let seconds = began.elapsed().as_secs_f64();
    let moves = cluster.send("GET", MOVES, None).await?;
    let all = moves["items"].as_array().cloned().unwrap_or_default();
    let mut pauses: Vec<f64> =
        all.iter().filter_map(|m| m["status"]["progress"]["paused_ms"].as_f64()).collect();
    ensure!(pauses.len() >= DRAINED, "only {} of {DRAINED} guests moved", pauses.len());
    pauses.sort_by(f64::total_cmp);
    Ok(Drained { seconds, pauses })
}

struct Many {
    moves: usize,
    seconds: f64,
    writes: u64,
    before: f64,
    after: f64,
}

/// Moves of guests that do nothing: what is measured is Godwit.
async fn many(folder: &Path, rounds: usize) -> Result<Many> {
    // N.B. before there are threads that could read it: the program that is run takes it over.
    let stub = folder.join("stub-qemu");
    let environment = [("GODWIT_QEMU", stub.to_str().context("a path")?)];
    let cluster = Cluster::with(&program(folder)?, &NODES, &environment).await?;
    cluster.until(SETTINGS, |_| true).await?;
    let limits = json!({"spec": {"configuration": {"migrations": {
        "parallelMigrationsPerCluster": STUBS, "parallelOutboundMigrationsPerNode": STUBS,
    }}}});
    cluster.send("PATCH", SETTINGS, Some(limits)).await?;
    let names: Vec<String> = (0..STUBS).map(|number| format!("vm-{number}")).collect();
    for name in &names {
        cluster.create(VMS, vm(name, None)).await?;
    }
    runs(&cluster, &names).await?;
    tokio::time::sleep(SETTLES).await;
    let main = cluster.pid()?;
    let (before, writes) = (memory(main)?, version(&cluster).await?);
    let began = Instant::now();
    for round in 0..rounds {
        for name in &names {
            cluster.create(MOVES, migration(&format!("{name}-{round}"), name)).await?;
        }
        for name in &names {
            cluster.until_moved(&format!("{name}-{round}"), "Succeeded").await?;
        }
        ensure!(began.elapsed() < PATIENCE, "only {round} rounds after {PATIENCE:?}");
    }
    let seconds = began.elapsed().as_secs_f64();
    let writes = version(&cluster).await? - writes;
    tokio::time::sleep(SETTLES).await;
    Ok(Many { moves: STUBS * rounds, seconds, writes, before, after: memory(main)? })
}

/// The API's newest version: it grows by one with each write.
async fn version(cluster: &Cluster) -> Result<u64> {
    let list = cluster.send("GET", MOVES, None).await?;
    Ok(list["metadata"]["resourceVersion"].as_str().context("no version")?.parse()?)
}

fn report(first: &[f64], drained: &Drained, many: &Many) -> String {
    const MIB: f64 = 1024.0 * 1024.0;
    let at = |all: &[f64], share: f64| all[((all.len() - 1) as f64 * share) as usize];
    let moves = many.moves as f64;
    format!(
        "# Moves inside a cluster\n\n\
         By `target/release/bench-moves` on {} processors; a part of `make bench`. Real QEMU under TCG \
         in the first rows, the tests' stub in the last ones.\n\n\
         | what | figure |\n|---|---|\n\
         | a migration that is asked for to its first byte that moves, {SINGLE} times | p50 {:.0} ms, at most {:.0} ms |\n\
         | `kubectl drain` of a node with {DRAINED} Linux guests, 2 at a time | {:.1} s, {:.2} s each |\n\
         | how long these guests stood still | p50 {:.0} ms, at most {:.0} ms |\n\
         | {moves} moves of {STUBS} stub guests, all at once | {:.1} s, {:.0} ms each |\n\
         | writes to the API for each of them | {:.1} |\n\
         | memory of the one process with all roles before and after them | {:.1} MiB, {:.1} MiB |\n",
        std::thread::available_parallelism().map_or(0, usize::from),
        at(first, 0.5),
        at(first, 1.0),
        drained.seconds,
        drained.seconds / DRAINED as f64,
        at(&drained.pauses, 0.5),
        at(&drained.pauses, 1.0),
        many.seconds,
        many.seconds * 1e3 / moves,
        many.writes as f64 / moves,
        many.before / MIB,
        many.after / MIB,
    )
}
