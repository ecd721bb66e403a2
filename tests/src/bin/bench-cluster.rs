//! The embedded cluster's figures: `make bench`, written to docs/benchmarks-cluster.md.

use anyhow::{Context, Result};
use futures_util::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{Api, ListParams, PostParams, WatchEvent, WatchParams};
use kube::{Client, Config, config::Kubeconfig};
use serde_json::json;
use std::collections::HashMap;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Clients that write at once.
const WRITERS: usize = 32;
/// Of the rate of writes, and of the latency of watches.
const LASTS: Duration = Duration::from_secs(5);
/// Writes per second while the latency is measured.
const PACE: u64 = 500;
const OBJECTS: usize = 10_000;
const WATCHERS: usize = 100;

fn main() -> ExitCode {
    e2e::exit("bench", bench())
}

/// A cluster in a folder of its own, ended with this.
struct Cluster {
    folder: tempfile::TempDir,
    process: Child,
    ready: Duration,
}

impl Cluster {
    fn start(program: &Path) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let began = Instant::now();
        let mut command = Command::new(program);
        command.args(["up", "--name", "bench", "--dir"]).arg(folder.path());
        let mut process = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        let mut line = String::new();
        BufReader::new(process.stdout.take().context("no output")?).read_line(&mut line)?;
        Ok(Self { folder, process, ready: began.elapsed() })
    }

    async fn client(&self) -> Result<Client> {
        let config = Kubeconfig::read_from(self.folder.path().join("bench/kubeconfig"))?;
        let config = Config::from_custom_kubeconfig(config, &Default::default()).await?;
        Ok(Client::try_from(config)?)
    }

    fn resident_mib(&self) -> Result<f64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process.id()))?;
        let line = status.lines().find(|l| l.starts_with("VmRSS:")).context("no VmRSS")?;
        let kib: f64 = line.split_whitespace().nth(1).context("no VmRSS")?.parse()?;
        Ok(kib / 1024.0)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // It is of no use any more.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn map(name: &str) -> Result<ConfigMap> {
    let object = json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name},
        "data": {"text": "x".repeat(500)},
    });
    Ok(serde_json::from_value(object)?)
}

#[tokio::main]
async fn bench() -> Result<()> {
    let program = std::env::current_exe()?.with_file_name("godwit");
    let mut ready = Vec::new();
    for _ in 0..4 {
        ready.push(Cluster::start(&program)?.ready);
    }
    ready.sort();
    let cluster = Cluster::start(&program)?;
    let client = cluster.client().await?;
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), "default");
    maps.list(&ListParams::default()).await?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let idle = cluster.resident_mib()?;
    eprintln!("writes");
    let rate = writes(&cluster).await?;
    eprintln!("latency of watches");
    let (median, worst) = latency(&maps).await?;
    eprintln!("{OBJECTS} objects, {WATCHERS} watchers");
    let (per_object, per_watcher) = memory(&program).await?;
    let judged = |reached: bool| if reached { "reached" } else { "**missed**" };
    let table = format!(
        "| what | figure | goal |\n|---|---|---|\n\
         | ready after `godwit up`, median of {} | {:.2} s | <= 2 s: {} |\n\
         | memory of an idle cluster | {idle:.1} MiB | <= 60 MiB: {} |\n\
         | creates of 0.5 KiB over TLS, {WRITERS} clients, each write synced | {rate:.0} per s | >= 2000 per s: {} |\n\
         | from the create's call to the watcher, at {PACE} per s, p50 | {:.1} ms |  |\n\
         | the same, p99 | {:.1} ms | <= 20 ms: {} |\n\
         | memory per object of 0.5 KiB, of {OBJECTS} | {per_object:.1} KiB |  |\n\
         | memory per watcher over TLS, of {WATCHERS} | {per_watcher:.0} KiB |  |\n",
        ready.len(),
        ready[ready.len() / 2].as_secs_f64(),
        judged(ready[ready.len() / 2] <= Duration::from_secs(2)),
        judged(idle <= 60.0),
        judged(rate >= 2000.0),
        median.as_secs_f64() * 1e3,
        worst.as_secs_f64() * 1e3,
        judged(worst <= Duration::from_millis(20)),
    );
    print!("{table}");
    write_down(&table)
}

/// Creates per second.
async fn writes(cluster: &Cluster) -> Result<f64> {
    let (done, over) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let mut tasks = tokio::task::JoinSet::new();
    for writer in 0..WRITERS {
        let maps: Api<ConfigMap> = Api::namespaced(cluster.client().await?, "default");
        let (done, over) = (done.clone(), over.clone());
        tasks.spawn(async move {
            for n in 0.. {
                if over.load(Ordering::Relaxed) {
                    break;
                }
                maps.create(&PostParams::default(), &map(&format!("w{writer}-{n}"))?).await?;
                done.fetch_add(1, Ordering::Relaxed);
            }
            anyhow::Ok(())
        });
    }
    let (began, before) = (Instant::now(), done.load(Ordering::Relaxed));
    tokio::time::sleep(LASTS).await;
    let rate = (done.load(Ordering::Relaxed) - before) as f64 / began.elapsed().as_secs_f64();
    over.store(true, Ordering::Relaxed);
    while let Some(ended) = tasks.join_next().await {
        ended??;
    }
    Ok(rate)
}

/// From a create's call to the event, p50 and p99.
async fn latency(maps: &Api<ConfigMap>) -> Result<(Duration, Duration)> {
    let from = maps.list(&ListParams::default().limit(1)).await?.metadata.resource_version;
    let from = from.context("a list without a revision")?;
    let stream = maps.watch(&WatchParams::default(), &from).await?.boxed();
    let begun: Arc<Mutex<HashMap<String, Instant>>> = Arc::default();
    let count = PACE * LASTS.as_secs();
    let seen = {
        let begun = begun.clone();
        tokio::spawn(async move {
            let mut stream = stream;
            let mut took = Vec::new();
            while took.len() < count as usize {
                let Some(event) = stream.try_next().await? else { break };
                if let WatchEvent::Added(object) = event {
                    let name = object.metadata.name.unwrap_or_default();
                    let begun = begun.lock().ok().and_then(|mut all| all.remove(&name));
                    took.extend(begun.map(|at| at.elapsed()));
                }
            }
            anyhow::Ok(took)
        })
    };
    let mut pace = tokio::time::interval(Duration::from_micros(1_000_000 / PACE));
    let mut writes = tokio::task::JoinSet::new();
    for n in 0..count {
        pace.tick().await;
        let (maps, begun, name) = (maps.clone(), begun.clone(), format!("l{n}"));
        writes.spawn(async move {
            if let Ok(mut all) = begun.lock() {
                all.insert(name.clone(), Instant::now());
            }
            maps.create(&PostParams::default(), &map(&name)?).await?;
            anyhow::Ok(())
        });
    }
    while let Some(written) = writes.join_next().await {
        written??;
    }
    let mut took = tokio::time::timeout(Duration::from_secs(30), seen).await???;
    took.sort();
    let at = |share: f64| took[((took.len() - 1) as f64 * share) as usize];
    Ok((at(0.5), at(0.99)))
}

/// KiB per object and per watcher, of a new cluster.
async fn memory(program: &Path) -> Result<(f64, f64)> {
    let cluster = Cluster::start(program)?;
    let maps: Api<ConfigMap> = Api::namespaced(cluster.client().await?, "default");
    maps.list(&ListParams::default()).await?;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let before = cluster.resident_mib()?;
    futures_util::stream::iter(0..OBJECTS)
        .map(|n| {
            let maps = maps.clone();
            async move {
                maps.create(&PostParams::default(), &map(&format!("o{n}"))?).await?;
                anyhow::Ok(())
            }
        })
        .buffer_unordered(WRITERS)
        .try_collect::<()>()
        .await?;
    let filled = cluster.resident_mib()?;
    let mut watches = Vec::new();
    for _ in 0..WATCHERS {
        let maps: Api<ConfigMap> = Api::namespaced(cluster.client().await?, "kube-system");
        let mut watch = maps.watch(&WatchParams::default(), "0").await?.boxed();
        watch.try_next().await?;
        watches.push(watch);
    }
    let watched = cluster.resident_mib()?;
    Ok(((filled - before) * 1024.0 / OBJECTS as f64, (watched - filled) * 1024.0 / WATCHERS as f64))
}

fn write_down(table: &str) -> Result<()> {
    let cores = std::thread::available_parallelism()?;
    let load = std::fs::read_to_string("/proc/loadavg")?;
    let load = load.split(' ').next().unwrap_or("unknown");
    let text = format!(
        "# Benchmarks of the embedded cluster\n\n\
         Written by `make bench`: one run on one machine, clients and server sharing its cores.\n\n\
         {table}\nMachine: {cores} cores, load average at the end {load}.\n"
    );
    std::fs::write("docs/benchmarks-cluster.md", text)
        .context("cannot write docs/benchmarks-cluster.md")
}
