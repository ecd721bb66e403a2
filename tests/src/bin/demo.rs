//! `make demo`: a VM goes from one cluster to another and back while an oracle in it looks for lost
//! writes and lost memory: there by KubeVirt's manifests and kubectl, back by one command.
//!
//! `KEEP=1` leaves both clusters up.

use anyhow::{Context, Result, bail, ensure};
use e2e::cluster::{Cluster, contexts};
use e2e::guest;
use e2e::registry::Registry;
use e2e::vms::{MOVES, Oracle, VMIS, VMS, import, is_running, shows, vm};
use godwit::view::bytes;
use launcher::migration::status::Verified;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

const UP: [&str; 4] = ["--nodes", "2", "--storage", "2Gi"];

fn main() -> ExitCode {
    e2e::exit("demo", demo())
}

fn demo() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let began = Instant::now();
    let stage = runtime.block_on(Stage::new())?;
    let done = runtime.block_on(stage.play());
    println!("\n{:.0} s in all", began.elapsed().as_secs_f64());
    if std::env::var_os("KEEP").is_some_and(|keep| keep == "1") {
        stage.keep();
    }
    done
}

/// Two clusters, an image, and a person.
struct Stage {
    program: PathBuf,
    east: Cluster,
    west: Cluster,
    registry: Registry,
    /// The kubeconfig with a context for each.
    kubeconfig: PathBuf,
}

/// Says what happens.
fn say(text: &str) {
    println!("\n{text}");
}

impl Stage {
    async fn new() -> Result<Self> {
        let program = std::env::current_exe()?.with_file_name("godwit");
        let text = program.to_str().context("a path")?;
        say("Two clusters, each with its own API, CA, nodes and storage:");
        let mut clusters = Vec::new();
        for name in ["east", "west"] {
            println!("$ godwit up --detach --name {name} {}", UP.join(" "));
            clusters.push(Cluster::named(name, text, &UP, &[]).await?);
        }
        let (Some(west), Some(east)) = (clusters.pop(), clusters.pop()) else {
            bail!("two clusters were made");
        };
        let kubeconfig = contexts(&[&east, &west])?;
        Ok(Self { program, east, west, registry: Registry::start()?, kubeconfig })
    }

    /// Runs what a person would type, and shows it.
    fn run(&self, program: &str, arguments: &[&str]) -> Result<String> {
        println!("$ {program} {}", arguments.join(" "));
        let path = if program == "godwit" { self.program.clone() } else { program.into() };
        let mut command = Command::new(path);
        command.args(arguments).env("KUBECONFIG", &self.kubeconfig);
        command.env("HOME", self.east.dir());
        let output = command.output().with_context(|| format!("cannot run {program}"))?;
        let (out, err) = (
            String::from_utf8_lossy(&output.stdout).into_owned(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        );
        for line in out.lines().chain(err.lines()) {
            println!("  {line}");
        }
        ensure!(output.status.success(), "{program} {arguments:?} failed");
        Ok(out)
    }

    /// Applies a manifest, and shows it.
    fn apply(&self, context: &str, file: &str, object: &Value) -> Result<()> {
        let path = self.east.dir().join(file);
        std::fs::write(&path, serde_json::to_string_pretty(object)?)?;
        let text = path.to_str().context("a path")?;
        self.run("kubectl", &["--context", context, "apply", "-f", text]).map(|_| ())
    }

    async fn play(&self) -> Result<()> {
        say("They are linked: each believes the other's CA from now on, through every rotation.");
        self.run("godwit", &["cluster", "link", "godwit-east", "godwit-west"])?;
        let pause = self.begin().await?;
        let there = self.to_west().await?;
        self.see(&self.west, pause)?;
        let back = self.to_east().await?;
        self.see(&self.east, pause)?;
        say("In figures, as the migrations' status has them:");
        for (way, of) in [("east to west", &there), ("west to east", &back)] {
            println!(
                "  {way}: {} of disks and {} of memory sent in {:.1} s, the guest stood still for {:.0} ms",
                bytes(of["progress"]["bytes_sent"].as_u64().unwrap_or_default()),
                bytes(of["progress"]["memory"]["sent"].as_u64().unwrap_or_default()),
                of["took_seconds"].as_f64().unwrap_or_default(),
                of["paused_ms"].as_f64().unwrap_or_default(),
            );
            // N.B. read by all that it may say: else the demo says so.
            let verified: Verified = serde_json::from_value(of["verified"].clone())?;
            println!("    {verified}");
            ensure!(matches!(verified, Verified::Verified { .. }), "the disks are not verified");
        }
        Ok(())
    }

    /// A VM in east, from an image in a registry; a file is written on its console.
    async fn begin(&self) -> Result<u64> {
        let image = self.registry.push("guest", "disk/guest.raw", &guest::image("disk.raw")?)?;
        say(&format!("A VM in east, from the image {image}:"));
        let root = json!({"name": "root", "dataVolume": {"name": "web-root"}});
        let template = as_template(import("web-root", &image, storage()));
        self.apply("godwit-east", "web.json", &vm("web", "Always", vec![root], vec![template]))?;
        self.east.until(&format!("{VMS}/web"), is_running).await?;
        say(
            "On its console a file is written, and an oracle begins to write its disk and its memory:",
        );
        println!("$ godwit console web --context godwit-east");
        let mut console = self.east.terminal("web")?;
        console.run("echo 'written in east' > /data/letter; sync")?;
        println!("  guest# echo 'written in east' > /data/letter; sync");
        Oracle::begin(&mut console)?;
        uptime(&console.run("cat /proc/uptime")?)
    }

    /// KubeVirt's way, by its manifests.
    async fn to_west(&self) -> Result<Value> {
        say("To west by KubeVirt's manifests: a VM that waits for its guest, on a blank disk;");
        let blank = json!({
            "apiVersion": "cdi.kubevirt.io/v1beta1", "kind": "DataVolume",
            "metadata": {"name": "web-root"},
            "spec": {"source": {"blank": {}}, "storage": storage()},
        });
        let root = json!({"name": "root", "dataVolume": {"name": "web-root"}});
        let mut waits = vm("web", "WaitAsReceiver", vec![root], vec![as_template(blank)]);
        waits["metadata"]["annotations"] = json!({"kubevirt.io/restore-run-strategy": "Always"});
        self.apply("godwit-west", "waits.json", &waits)?;
        let sync = |vmi: &Value| vmi["status"]["phase"] == "WaitingForSync";
        self.west.until(&format!("{VMIS}/web"), sync).await?;
        let half = |part: Value, verify: bool| {
            let annotations = verify.then(|| json!({"godwit.dev/verify": "true"}));
            let mut spec = json!({"vmiName": "web"});
            for (field, value) in part.as_object().into_iter().flatten() {
                spec[field] = value.clone();
            }
            json!({
                "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstanceMigration",
                "metadata": {"name": "to-west", "annotations": annotations}, "spec": spec,
            })
        };
        say("a migration that receives, and one that sends to where west's KubeVirt object says:");
        let receive = half(json!({"receive": {"migrationID": "to-west"}}), false);
        self.apply("godwit-west", "receive.json", &receive)?;
        let path = "jsonpath={.status.synchronizationAddresses[0]}";
        let place = ["--context", "godwit-west", "-n", "kubevirt", "get", "kubevirt", "kubevirt"];
        let address = self.run("kubectl", &[&place[..], &["-o", path]].concat())?;
        let send = json!({"sendTo": {"migrationID": "to-west", "connectURL": address.trim()}});
        let send = half(send, true);
        self.apply("godwit-east", "send.json", &send)?;
        println!("$ godwit watch vm/web --context godwit-east");
        let mut watch = Command::new(&self.program);
        watch.args(["watch", "vm/web", "--context", "godwit-east"]);
        let mut watch = watch.env("KUBECONFIG", &self.kubeconfig).spawn()?;
        let moved = self.east.until_moved("to-west", "Succeeded").await;
        // It has seen the end by now, or has come too late for the beginning.
        tokio::time::sleep(Duration::from_millis(500)).await;
        let _ = watch.kill();
        watch.wait()?;
        let moved = moved?;
        self.west.until(&format!("{VMS}/web"), is_running).await?;
        self.east.until(&format!("{VMS}/web"), shows("Stopped")).await?;
        Ok(moved["status"]["progress"].clone())
    }

    /// Godwit's way, by one command.
    async fn to_east(&self) -> Result<Value> {
        say("And back, by one command:");
        let back = ["migrate", "vm/web", "--to", "east", "--verify", "--context", "godwit-west"];
        self.run("godwit", &back)?;
        self.east.until(&format!("{VMS}/web"), is_running).await?;
        let moves = self.west.send("GET", MOVES, None).await?;
        let all = moves["items"].as_array().cloned().unwrap_or_default();
        let sent = all.into_iter().find(|m| !m["spec"]["sendTo"].is_null());
        Ok(sent.context("west has sent it")?["status"]["progress"].clone())
    }

    /// The same session, the same file, the same guest; and nothing lost.
    fn see(&self, cluster: &Cluster, since: u64) -> Result<()> {
        let name = if std::ptr::eq(cluster, &self.east) { "east" } else { "west" };
        say(&format!("The same guest, now in {name}:"));
        println!("$ godwit console web --context godwit-{name}");
        let mut console = cluster.console("web")?;
        let letter = console.run("cat /data/letter")?;
        let up = uptime(&console.run("cat /proc/uptime")?)?;
        println!("  guest# cat /data/letter\n  {}", letter.trim());
        println!("  guest# cat /proc/uptime\n  {up} s: it has not booted again");
        ensure!(letter.trim() == "written in east" && up >= since, "it is another guest");
        let writes = Oracle::again(&mut console).check()?;
        println!("  oracle: {writes} acknowledged writes: 0 lost writes, 0 lost pages");
        Ok(())
    }

    /// Leaves both clusters up.
    fn keep(self) {
        let dirs = [("east", self.east.dir()), ("west", self.west.dir())];
        println!(
            "\nBoth clusters stay. To go on:\n  export KUBECONFIG={}",
            self.kubeconfig.display()
        );
        println!("  godwit migrate vm/web --to west --context godwit-east");
        println!(
            "  kubectl --context godwit-west get vm,vmi,vmim,clusterlinks,virtualmachinemoves"
        );
        for (name, dir) in dirs {
            println!("  godwit down --name {name} --dir {}   # ends it", dir.display());
        }
        std::mem::forget((self.east, self.west, self.registry));
    }
}

/// A DataVolume as a VM's template.
fn as_template(mut volume: Value) -> Value {
    for field in ["apiVersion", "kind"] {
        volume.as_object_mut().map(|fields| fields.remove(field));
    }
    volume
}

fn storage() -> Value {
    json!({
        "accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "100Mi"}},
        "storageClassName": "local",
    })
}

/// Whole seconds.
fn uptime(text: &str) -> Result<u64> {
    let first = text.split('.').next().unwrap_or_default();
    first.trim().parse().with_context(|| format!("no uptime: {text}"))
}
