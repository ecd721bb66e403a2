//! The figures of VMs in an embedded cluster: `make bench`, written to docs/benchmarks-vms.md.
//!
//! QEMU is the tests' stub, so that what is measured is Godwit: API server, controllers, handlers and
//! launchers; but for the time from a manifest to a real QEMU that runs its guest.

use anyhow::{Context, Result, ensure};
use e2e::cluster::{Cluster, memory};
use serde_json::{Value, json};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// VMs in one cluster.
const VMS: usize = 500;
/// Nodes that they are on: each runs 110 pods at most.
const NODES: &str = "5";
/// Starts of a real QEMU.
const STARTS: usize = 15;
const PATH: &str = "/apis/kubevirt.io/v1/namespaces/default/virtualmachines";
const VMIS: &str = "/apis/kubevirt.io/v1/namespaces/default/virtualmachineinstances";
/// All of them run within this time, on a slow machine too.
const PATIENCE: Duration = Duration::from_secs(900);
/// What was started settles in this time.
const SETTLES: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    e2e::exit("bench", bench())
}

fn bench() -> Result<()> {
    let here = std::env::current_exe()?;
    let folder = here.parent().context("a folder")?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let starts = runtime.block_on(starts(folder))?;
    let many = runtime.block_on(many(folder))?;
    let report = report(&starts, &many);
    print!("{report}");
    let path = e2e::guest::root().join("docs/benchmarks-vms.md");
    std::fs::write(&path, report).with_context(|| format!("cannot write {}", path.display()))
}

fn vm(name: &str) -> Value {
    json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "metadata": {"name": name},
        "spec": {
            "runStrategy": "Always",
            "template": {"spec": {
                "terminationGracePeriodSeconds": 0,
                "domain": {
                    "memory": {"guest": "64Mi"},
                    // Or the nodes would be full: each has the machine's processors only.
                    "resources": {"requests": {"cpu": "1m"}},
                    "devices": {"disks": [{"name": "scratch", "disk": {"bus": "virtio"}}]},
                },
                "volumes": [{"name": "scratch", "emptyDisk": {"capacity": "16Mi"}}],
            }},
        },
    })
}

/// From a manifest that is sent to a QEMU that runs, in milliseconds, sorted.
async fn starts(folder: &Path) -> Result<Vec<f64>> {
    let program = folder.join("godwit");
    let cluster = Cluster::new(program.to_str().context("a path")?, &[]).await?;
    cluster.until("/apis/kubevirt.io/v1/namespaces/kubevirt/kubevirts/kubevirt", |_| true).await?;
    let mut times = Vec::new();
    for number in 0..STARTS {
        let name = format!("one-{number}");
        let began = Instant::now();
        cluster.create(PATH, vm(&name)).await?;
        let runs = |vmi: &Value| vmi["status"]["phase"] == "Running";
        cluster.until(&format!("{VMIS}/{name}"), runs).await?;
        times.push(began.elapsed().as_secs_f64() * 1000.0);
        cluster.send("DELETE", &format!("{PATH}/{name}"), None).await?;
        cluster.until_gone(&format!("{PATH}/{name}")).await?;
    }
    times.sort_by(f64::total_cmp);
    Ok(times)
}

struct Many {
    seconds: f64,
    idle: f64,
    after: f64,
    launcher: f64,
    stopped: f64,
}

async fn many(folder: &Path) -> Result<Many> {
    let program = folder.join("godwit");
    // N.B. before there are threads that could read it: the program that is run takes it over.
    let stub = folder.join("stub-qemu");
    let cluster = Cluster::with(
        program.to_str().context("a path")?,
        &["--nodes", NODES, "--storage", "100Gi"],
        &[("GODWIT_QEMU", stub.to_str().context("a path")?)],
    )
    .await?;
    cluster.until("/apis/kubevirt.io/v1/namespaces/kubevirt/kubevirts/kubevirt", |_| true).await?;
    tokio::time::sleep(SETTLES).await;
    let main = cluster.pid()?;
    let idle = memory(main)?;
    let began = Instant::now();
    for number in 0..VMS {
        cluster.create(PATH, vm(&format!("vm-{number}"))).await?;
    }
    loop {
        let all = cluster.send("GET", VMIS, None).await?;
        let items = all["items"].as_array().cloned().unwrap_or_default();
        let running = items.iter().filter(|vmi| vmi["status"]["phase"] == "Running").count();
        if running == VMS {
            break;
        }
        ensure!(began.elapsed() < PATIENCE, "only {running} of {VMS} run after {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let seconds = began.elapsed().as_secs_f64();
    tokio::time::sleep(SETTLES).await;
    let after = memory(main)?;
    let launchers: Vec<f64> = cluster
        .processes()?
        .into_iter()
        .filter(|pid| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.split(|byte| *byte == 0).nth(1) == Some(b"launcher")
        })
        .filter_map(|pid| memory(pid).ok())
        .collect();
    let launcher = launchers.iter().sum::<f64>() / launchers.len().max(1) as f64;
    let began = Instant::now();
    cluster.send("DELETE", PATH, None).await?;
    loop {
        let all = cluster.send("GET", PATH, None).await?;
        if all["items"].as_array().is_none_or(Vec::is_empty) {
            break;
        }
        ensure!(began.elapsed() < PATIENCE, "VMs are still there after {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    Ok(Many { seconds, idle, after, launcher, stopped: began.elapsed().as_secs_f64() })
}

fn report(starts: &[f64], many: &Many) -> String {
    const MIB: f64 = 1024.0 * 1024.0;
    let at = |share: f64| starts[((starts.len() - 1) as f64 * share) as usize];
    let each = (many.after - many.idle) / VMS as f64 / 1024.0;
    format!(
        "# VMs in an embedded cluster\n\n\
         By `target/release/bench-vms` on {} processors; a part of `make bench`. Real QEMU under \
         TCG in the first row, the tests' stub in the others.\n\n\
         | what | figure |\n|---|---|\n\
         | a manifest to a QEMU that runs, {STARTS} times one after another | p50 {:.0} ms, at most {:.0} ms |\n\
         | {VMS} VMs at once on {NODES} nodes, all run after | {:.1} s, {:.0} ms each |\n\
         | all of them deleted after | {:.1} s |\n\
         | API server, controllers, handlers, agents without VMs | {:.1} MiB |\n\
         | the same with {VMS} VMs | {:.1} MiB, {each:.0} KiB each |\n\
         | a launcher (PSS) | {:.1} MiB |\n",
        std::thread::available_parallelism().map_or(0, usize::from),
        at(0.5),
        at(1.0),
        many.seconds,
        many.seconds * 1000.0 / VMS as f64,
        many.stopped,
        many.idle / MIB,
        many.after / MIB,
        many.launcher / MIB,
    )
}
