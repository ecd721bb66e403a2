//! A third host on the segment of a guest's network speaks with it while it goes to another cluster.

use crate::PROGRAM;
use anyhow::{Context, Result, ensure};
use e2e::cluster::{Cluster, link};
use e2e::guest;
use e2e::registry::Registry;
use e2e::vms::{SETTINGS, VMS, import, is_running, vm};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

const UP: [&str; 4] = ["--nodes", "1", "--storage", "2Gi"];
const GUEST: &str = "10.77.0.2";
/// A line is sent this often.
const OFTEN: Duration = Duration::from_millis(10);
/// Lines that come back after the move: the guest is heard there.
const AFTER: usize = 100;
const SOON: Duration = Duration::from_secs(60);

/// One segment of two bridges, one for the nodes of each cluster, and a third host on it. It goes when it
/// is dropped.
struct Segment {
    /// Of all names of it: they must be nobody else's.
    number: u32,
}

impl Segment {
    fn new() -> Result<Self> {
        let segment = Self { number: std::process::id() % 100_000 };
        let [east, west, here, there, host, inner] =
            ["ge", "gw", "ga", "gb", "gh", "gi"].map(|name| segment.name(name));
        for bridge in [&east, &west] {
            ip(&["link", "add", bridge, "type", "bridge", "forward_delay", "0"])?;
            ip(&["link", "set", bridge, "up"])?;
        }
        let space = segment.name("gs");
        ip(&["link", "add", &here, "type", "veth", "peer", "name", &there])?;
        ip(&["netns", "add", &space])?;
        ip(&["link", "add", &host, "type", "veth", "peer", "name", &inner, "netns", &space])?;
        for (end, bridge) in [(&here, &east), (&there, &west), (&host, &east)] {
            ip(&["link", "set", end, "master", bridge, "up"])?;
        }
        ip(&["-n", &space, "addr", "add", "10.77.0.1/24", "dev", &inner])?;
        ip(&["-n", &space, "link", "set", &inner, "up"])?;
        Ok(segment)
    }

    fn name(&self, what: &str) -> String {
        format!("{what}{}", self.number)
    }

    /// A command on the third host.
    fn on_host(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name("gs")]).args(arguments);
        command
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        // Each veth goes with its peer.
        let _ = ip(&["netns", "del", &self.name("gs")]);
        for link in ["ga", "ge", "gw"] {
            let _ = ip(&["link", "del", &self.name(link)]);
        }
    }
}

fn ip(arguments: &[&str]) -> Result<()> {
    let done = Command::new("ip").args(arguments).output().context("cannot run ip")?;
    ensure!(done.status.success(), "ip {arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
    Ok(())
}

/// A TCP connection to the guest, which sends back what it gets.
struct Talk {
    process: Child,
    heard: Receiver<(usize, Instant)>,
    sent: usize,
}

impl Talk {
    fn begin(segment: &Segment) -> Result<Self> {
        let mut process = segment
            .on_host(&["busybox", "nc", GUEST, "7"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let output = BufReader::new(process.stdout.take().context("an output")?);
        let (hear, heard) = channel();
        std::thread::spawn(move || {
            for line in output.lines() {
                let Some(number) = line.ok().and_then(|line| line.parse().ok()) else { return };
                if hear.send((number, Instant::now())).is_err() {
                    return;
                }
            }
        });
        Ok(Self { process, heard, sent: 0 })
    }

    fn say(&mut self) -> Result<()> {
        self.sent += 1;
        let to = self.process.stdin.as_mut().context("an input")?;
        writeln!(to, "{}", self.sent).context("the connection ended")
    }

    /// Speaks on until so many more lines have come back.
    fn go_on(&mut self, times: &mut Vec<Instant>, lines: usize) -> Result<()> {
        let (began, wanted) = (Instant::now(), times.len() + lines);
        while times.len() < wanted {
            self.say()?;
            std::thread::sleep(OFTEN);
            self.listen(times)?;
            ensure!(began.elapsed() < SOON, "only {} lines came back", times.len());
        }
        Ok(())
    }

    /// Takes what has come back: each line once, and in order.
    fn listen(&self, times: &mut Vec<Instant>) -> Result<()> {
        for (number, at) in self.heard.try_iter() {
            ensure!(number == times.len() + 1, "line {number} came after {}", times.len());
            times.push(at);
        }
        Ok(())
    }
}

impl Drop for Talk {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Packets that were sent, and answered.
fn counted(ping: &str) -> Result<(u32, u32)> {
    let line =
        ping.lines().find(|line| line.contains("packets transmitted")).context("no count")?;
    let mut numbers = line.split(' ').filter_map(|word| word.parse().ok());
    Ok((numbers.next().context("none sent")?, numbers.next().context("none answered")?))
}

/// Its address stays, and those who speak with it notice a pause.
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_outlives_a_move_to_another_cluster_on_the_same_segment() -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        eprintln!("bridges and taps need root: this is not tried");
        return Ok(());
    }
    let segment = Segment::new()?;
    let registry = Registry::start()?;
    let image = registry.push("guest", "disk/guest.raw", &guest::image("disk.raw")?)?;
    let east = Cluster::named("east", PROGRAM, &UP, &[]).await?;
    let west = Cluster::named("west", PROGRAM, &UP, &[]).await?;
    for cluster in [&east, &west] {
        let is_found = |s: &Value| s["status"]["synchronizationAddresses"][0].is_string();
        cluster.until(SETTINGS, is_found).await?;
    }
    link(&east, &west)?;
    let storage =
        json!({"storageClassName": "local", "resources": {"requests": {"storage": "100Mi"}}});
    let root = vec![json!({"name": "root", "dataVolume": {"name": "web-root"}})];
    let mut web = vm("web", "Always", root, vec![import("web-root", &image, storage)]);
    let spec = &mut web["spec"]["template"]["spec"];
    spec["domain"]["devices"]["interfaces"] = json!([{"name": "lan", "bridge": {}}]);
    spec["networks"] = json!([{"name": "lan", "multus": {"networkName": segment.name("ge")}}]);
    east.create(VMS, web).await?;
    let path = format!("{VMS}/web");
    east.until(&path, is_running).await?;
    let mut console = east.terminal("web")?;
    console.run(&format!("ip addr add {GUEST}/24 dev eth0; ip link set eth0 up"))?;
    console.run("(nc -ll -p 7 -e cat &)")?;
    drop(console);

    let mut talk = Talk::begin(&segment)?;
    let mut times = Vec::new();
    talk.go_on(&mut times, AFTER)?;
    let ping = segment
        .on_host(&["busybox", "ping", "-i", "0.02", GUEST])
        .stdout(Stdio::piped())
        .spawn()?;
    let map = format!("{}={}", segment.name("ge"), segment.name("gw"));
    let moving = std::thread::scope(|scope| {
        let moved = scope
            .spawn(|| east.does(&["migrate", "vm/web", "--to", "west", "--network-map", &map]));
        while !moved.is_finished() {
            talk.go_on(&mut times, 1)?;
        }
        let moved = moved.join().map_err(|_| anyhow::anyhow!("it panicked"))?;
        moved.map(|_| ())
    });
    moving?;
    west.until(&path, is_running).await?;
    talk.go_on(&mut times, AFTER)?;
    let asked = i32::try_from(ping.id())?;
    rustix::process::kill_process(
        rustix::process::Pid::from_raw(asked).context("a process")?,
        rustix::process::Signal::INT,
    )?;
    let told = String::from_utf8_lossy(&ping.wait_with_output()?.stdout).into_owned();
    let (sent, answered) = counted(&told)?;
    let gaps = times.windows(2).map(|pair| pair[1] - pair[0]);
    let longest = gaps.max().unwrap_or_default();
    println!(
        "  {} lines over one TCP connection, none lost; the longest silence was {} ms; of {sent} pings {} had \
         no answer",
        times.len(),
        longest.as_millis(),
        sent - answered,
    );
    ensure!(answered > 0, "{told}");
    ensure!(east.qemus()?.is_empty() && west.qemus()?.len() == 1);
    Ok(())
}
