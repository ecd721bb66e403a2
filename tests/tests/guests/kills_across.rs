//! Every part of two clusters is killed, or cut off, while a guest goes from one to the other: one owner, nothing that
//! was acknowledged lost, both sides know how it ended, and it can be tried again at once.
//!
//! All pairs of steps and parts with `GODWIT_SOAK=1` (`make soak`); else each step and each part in some.

use crate::PROGRAM;
use anyhow::{Context, Result, ensure};
use e2e::cluster::{Cluster, link};
use e2e::detour::Detour;
use e2e::guest;
use e2e::registry::Registry;
use e2e::vms::{
    MOVES, OWNERS, Oracle, SETTINGS, SETTLED, Standstill, VMIS, VMS, import, is_alive, is_running,
    kill, kill_launcher, migration, until_at, vm,
};
use launcher::client::Client as Launcher;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

const UP: [&str; 5] = ["--nodes", "1", "--storage", "2Gi", "--separate"];
const NAMES: [&str; 2] = ["east", "west"];

/// What is killed, at the side that the guest leaves or at that to which it goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Role(End, &'static str),
    Handler(End),
    /// The process with the API, and all roles with it.
    Cluster(End),
    Launcher(End),
    /// Both launchers at once, and both QEMUs with them.
    Launchers,
    /// Both synchronizers at once.
    Link,
    /// All processes of a side at once, launchers and QEMUs too.
    Power(End),
    /// The process with the API: it stands still for a while.
    Api(End),
    /// What is between the clusters: nothing passes for a while.
    Wire,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Source,
    Target,
}

/// A step at which a half of the move stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Source(&'static str),
    Target(&'static str),
}

const PARTS: [Part; 17] = [
    Part::Role(End::Source, "synchronizer"),
    Part::Role(End::Target, "synchronizer"),
    Part::Role(End::Source, "controller"),
    Part::Role(End::Target, "controller"),
    Part::Handler(End::Source),
    Part::Handler(End::Target),
    Part::Cluster(End::Source),
    Part::Cluster(End::Target),
    Part::Launcher(End::Source),
    Part::Launcher(End::Target),
    Part::Launchers,
    Part::Link,
    Part::Power(End::Source),
    Part::Power(End::Target),
    Part::Api(End::Source),
    Part::Api(End::Target),
    Part::Wire,
];

const STEPS: [Step; 8] = [
    Step::Source("Seeding"),
    Step::Source("Converging"),
    Step::Source("Paused"),
    Step::Target("Loaded"),
    Step::Source("Committing"),
    Step::Source("Committed"),
    Step::Target("Adopting"),
    Step::Target("Activating"),
];

/// Each step and each part at least once.
const SOME: [(Step, Part); 16] = [
    (Step::Source("Seeding"), Part::Role(End::Source, "synchronizer")),
    (Step::Source("Seeding"), Part::Role(End::Target, "synchronizer")),
    (Step::Source("Converging"), Part::Handler(End::Source)),
    (Step::Source("Converging"), Part::Role(End::Target, "controller")),
    (Step::Source("Converging"), Part::Wire),
    (Step::Source("Paused"), Part::Launcher(End::Target)),
    (Step::Target("Loaded"), Part::Launcher(End::Source)),
    (Step::Target("Loaded"), Part::Api(End::Target)),
    (Step::Source("Committing"), Part::Link),
    (Step::Source("Committing"), Part::Api(End::Source)),
    (Step::Source("Committed"), Part::Launcher(End::Target)),
    (Step::Source("Committed"), Part::Launchers),
    (Step::Source("Committed"), Part::Power(End::Source)),
    (Step::Target("Adopting"), Part::Handler(End::Target)),
    (Step::Target("Adopting"), Part::Launchers),
    (Step::Target("Activating"), Part::Power(End::Target)),
];

/// What is cut off is so for this long.
const CUT: Duration = Duration::from_secs(4);

/// Two linked clusters, one guest, whose oracle works.
struct World {
    clusters: [Cluster; 2],
    /// Of the oracle's writer: another each time that it begins.
    seed: u64,
}

fn storage() -> Value {
    json!({"storageClassName": "local", "resources": {"requests": {"storage": "100Mi"}}})
}

impl World {
    async fn new(image: &str) -> Result<Self> {
        let environment = [("GODWIT_FAILPOINTS", "1")];
        let east = Cluster::named(NAMES[0], PROGRAM, &UP, &environment).await?;
        let west = Cluster::named(NAMES[1], PROGRAM, &UP, &environment).await?;
        for cluster in [&east, &west] {
            cluster.until(SETTINGS, |s| !s["status"]["synchronizationAddresses"].is_null()).await?;
        }
        link(&east, &west)?;
        let root = || vec![json!({"name": "root", "dataVolume": {"name": "web-root"}})];
        let template = import("web-root", image, storage());
        east.create(VMS, vm("web", "Always", root(), vec![template])).await?;
        east.until(&format!("{VMS}/web"), is_running).await?;
        let blank = json!({
            "apiVersion": "cdi.kubevirt.io/v1beta1", "kind": "DataVolume",
            "metadata": {"name": "web-root"},
            "spec": {"source": {"blank": {}}, "storage": storage()},
        });
        west.create(VMS, vm("web", "WaitAsReceiver", root(), vec![blank])).await?;
        let mut world = Self { clusters: [east, west], seed: 7 };
        world.begin(0)?;
        Ok(world)
    }

    /// Has the oracle begin, in a guest that has booted.
    fn begin(&mut self, at: usize) -> Result<()> {
        self.seed += 1;
        let mut console = self.clusters[at].terminal("web")?;
        Oracle::begin_with(&mut console, self.seed).map(|_| ())
    }

    /// Where the guest runs.
    async fn place(&self) -> Result<usize> {
        let began = Instant::now();
        loop {
            for (at, cluster) in self.clusters.iter().enumerate() {
                let vm = cluster.send("GET", &format!("{VMS}/web"), None).await;
                let vmi = cluster.send("GET", &format!("{VMIS}/web"), None).await;
                if let (Ok(vm), Ok(vmi)) = (vm, vmi)
                    && is_running(&vm)
                    && vmi["status"]["phase"] == "Running"
                {
                    return Ok(at);
                }
            }
            ensure!(began.elapsed() < SETTLED, "it runs nowhere");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// QEMUs of both clusters.
    fn qemus(&self) -> Result<Vec<i32>> {
        Ok([self.clusters[0].qemus()?, self.clusters[1].qemus()?].concat())
    }

    /// The launcher of a pod of the VM.
    fn launcher(&self, at: usize, pod: &str) -> Launcher {
        let folder = format!("machine/nodes/{}-1/handler/pods/default_{pod}", NAMES[at]);
        Launcher::new(&self.clusters[at].path(&folder), "default.web")
    }

    /// Kills a part at a step of a move, and sees what becomes of it.
    async fn try_out(&mut self, number: usize, step: Step, part: Part) -> Result<()> {
        let from = self.place().await?;
        let to = 1 - from;
        let mut console = self.clusters[from].console("web")?;
        let acknowledged = Oracle::again(&mut console).check()?;
        drop(console);
        let (source, target) = (&self.clusters[from], &self.clusters[to]);
        let record = source.send("GET", &format!("{OWNERS}/web"), None).await?;
        let pod = record["status"]["pod"].as_str().context("no pod")?;
        let vmi = source.send("GET", &format!("{VMIS}/web"), None).await?;
        let waits = json!({"spec": {"runStrategy": "WaitAsReceiver"}});
        target.send("PATCH", &format!("{VMS}/web"), Some(waits)).await?;
        let sync = |vmi: &Value| {
            vmi["status"]["phase"] == "WaitingForSync"
                && vmi["metadata"]["deletionTimestamp"].is_null()
        };
        let waiting = target.until(&format!("{VMIS}/web"), sync).await?;
        let node = format!("{}-1", NAMES[to]);
        let way = match part {
            Part::Wire => Some(Detour::to(target, &node, Duration::ZERO).await?),
            _ => None,
        };
        let leaving = self.launcher(from, pod);
        leaving.arm("source:Seeding").await?;
        let id = format!("move-{number}");
        let mut receive = migration(&id, "web");
        receive["spec"]["receive"] = json!({"migrationID": id});
        target.create(MOVES, receive).await?;
        let settings = target.send("GET", SETTINGS, None).await?;
        let address = &settings["status"]["synchronizationAddresses"][0];
        let mut send = migration(&id, "web");
        send["spec"]["sendTo"] = json!({"migrationID": id, "connectURL": address});
        source.create(MOVES, send).await?;
        until_at(&leaving, "source:Seeding").await?;
        let mut standing = Vec::new();
        match step {
            Step::Source(state) => {
                if state != "Seeding" {
                    leaving.arm(&format!("source:{state}")).await?;
                    leaving.release().await?;
                    until_at(&leaving, &format!("source:{state}")).await?;
                }
                standing.push(leaving);
            }
            Step::Target(state) => {
                let found = target.send("GET", &format!("{VMIS}/web"), None).await?;
                let pod = &found["status"]["migrationState"]["targetPod"];
                let there = self.launcher(to, pod.as_str().context("there is no target yet")?);
                there.arm(&format!("target:{state}")).await?;
                leaving.release().await?;
                until_at(&there, &format!("target:{state}")).await?;
                standing.push(there);
            }
        }
        if let Some(way) = &way {
            way.relay.cut();
        }
        let cut = self.kill(part, from).await?;
        for launcher in standing {
            // One that was killed does not stand any more.
            let _ = launcher.release().await;
        }
        if !cut.is_empty() {
            tokio::time::sleep(CUT).await;
        }
        drop(cut);
        if let Some(way) = &way {
            way.relay.restore();
        }
        self.settle(&id, [&vmi, &waiting], acknowledged).await?;
        match way {
            Some(way) => way.end(&self.clusters[to]).await,
            None => Ok(()),
        }
    }

    /// Kills a part, or cuts it off.
    async fn kill(&self, part: Part, from: usize) -> Result<Standstill> {
        let at = |end: End| if end == End::Source { from } else { 1 - from };
        let role = |at: usize, name: &str| -> Result<()> {
            let cluster = &self.clusters[at];
            let pid = *cluster.roles()?.get(name).with_context(|| format!("no {name}"))?;
            kill(pid)?;
            cluster.until_role(name, Some(pid)).map(|_| ())
        };
        match part {
            Part::Role(end, name) => role(at(end), name)?,
            Part::Handler(end) => role(at(end), &format!("handler-{}-1", NAMES[at(end)]))?,
            Part::Link => [0, 1].into_iter().try_for_each(|at| role(at, "synchronizer"))?,
            Part::Cluster(end) => {
                let cluster = &self.clusters[at(end)];
                cluster.kill()?;
                cluster.up(&UP)?;
            }
            Part::Power(end) => {
                let cluster = &self.clusters[at(end)];
                let (roles, qemus) = (cluster.roles()?, cluster.qemus()?);
                cluster.kill()?;
                qemus.into_iter().try_for_each(kill_launcher)?;
                for pid in roles.into_values().filter(|pid| is_alive(*pid)) {
                    // It goes with the process that has just been killed.
                    let _ = kill(pid);
                }
                cluster.up(&UP)?;
            }
            Part::Launcher(end) => kill_launcher(self.clusters[at(end)].until_qemus(1)?[0])?,
            Part::Launchers => self.qemus()?.into_iter().try_for_each(kill_launcher)?,
            Part::Api(end) => return Standstill::of(vec![self.clusters[at(end)].pid()?]),
            Part::Wire => {
                let of = |cluster: &Cluster| Some(*cluster.roles().ok()?.get("synchronizer")?);
                return Standstill::of(self.clusters.iter().filter_map(of).collect());
            }
        }
        Ok(Standstill::default())
    }

    /// Both sides know how it ended, and it ended the same way; one guest runs, in one place; what it was
    /// told is written is there.
    async fn settle(&mut self, id: &str, vmis: [&Value; 2], acknowledged: u64) -> Result<()> {
        let path = format!("{MOVES}/{id}");
        let mut ends = Vec::new();
        for cluster in &self.clusters {
            let began = Instant::now();
            loop {
                let found = cluster.send("GET", &path, None).await;
                let phase =
                    found.as_ref().map(|m| m["status"]["phase"].clone()).unwrap_or_default();
                if ["Succeeded", "Failed"].contains(&phase.as_str().unwrap_or_default()) {
                    ends.push(phase);
                    break;
                }
                ensure!(began.elapsed() < SETTLED, "it never ends: {found:?}");
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        }
        let at = self.place().await?;
        let began = Instant::now();
        while self.qemus()?.len() != 1 {
            ensure!(began.elapsed() < SETTLED, "{:?} run", self.qemus()?);
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let qemu = self.qemus()?;
        let owned = |record: &Value| {
            let status = &record["status"];
            status["state"] == "idle" && status["ended"]["instance"] != status["owner"]
        };
        self.clusters[at].until(&format!("{OWNERS}/web"), owned).await?;
        ensure!(self.qemus()? == qemu, "another guest came");
        let after = self.clusters[at].send("GET", &format!("{VMIS}/web"), None).await?;
        let [before, _] = vmis;
        let is_of = |vmi: &Value| vmi["metadata"]["uid"] == after["metadata"]["uid"];
        // Nobody types before a guest that has begun anew has booted; one that has come shows no prompt.
        let mut console = match vmis.into_iter().any(is_of) {
            true => self.clusters[at].console("web")?,
            false => self.clusters[at].terminal("web")?,
        };
        let uptime = console.run("cat /proc/uptime")?;
        drop(console);
        let moved = !is_of(before);
        let up: f64 = uptime.split(' ').next().unwrap_or_default().parse()?;
        let made = before["metadata"]["creationTimestamp"].as_str().context("a time")?;
        let age = jiff::Timestamp::now().duration_since(made.parse()?).as_secs_f64();
        eprintln!(
            "  {ends:?}, the guest is in {}, up {up} s of {age} s, moved: {moved}",
            NAMES[at]
        );
        let goes_on = self.clusters[at].console("web")?.run("test -e /tmp/told && echo YES")?;
        if goes_on.contains("YES") {
            let mut console = self.clusters[at].console("web")?;
            let now = Oracle::again(&mut console).check()?;
            ensure!(now >= acknowledged, "the oracle began anew");
            return Ok(());
        }
        // Its QEMU was killed: it began anew, on a whole disk.
        let mut console = self.clusters[at].terminal("web")?;
        let verify = format!(
            "oracle verify-image /dev/vda2 offset=0 len=4194304 seed={} acked={acknowledged}",
            self.seed
        );
        let told = console.run(&format!("{verify} && echo WHOLE"))?;
        ensure!(told.contains("WHOLE"), "{told}");
        drop(console);
        self.begin(at)
    }
}

async fn all_of(trials: impl IntoIterator<Item = (Step, Part)>) -> Result<()> {
    let registry = Registry::start()?;
    let image = registry.push("guest", "disk/guest.raw", &guest::image("disk.raw")?)?;
    let mut world = World::new(&image).await?;
    for (number, (step, part)) in trials.into_iter().enumerate() {
        eprintln!("{part:?} is killed at {step:?}");
        let tried = world.try_out(number, step, part).await;
        tried.with_context(|| {
            let [one, other] = [0, 1].map(|at| world.clusters[at].keep_logs());
            let (one, other) = (one.display(), other.display());
            format!("{part:?} was killed at {step:?}; logs are in {one} and {other}")
        })?;
    }
    Ok(())
}

/// Whatever dies whenever, one guest is left, and both sides know where.
#[tokio::test(flavor = "multi_thread")]
async fn whichever_part_of_two_clusters_is_killed_one_guest_is_left_and_both_know_it() -> Result<()>
{
    if let Ok(one) = std::env::var("ONE") {
        return all_of([SOME[one.parse::<usize>()?]]).await;
    }
    if std::env::var_os("GODWIT_SOAK").is_none() {
        return all_of(SOME).await;
    }
    all_of(STEPS.into_iter().flat_map(|step| PARTS.map(|part| (step, part)))).await
}
