//! Embedded clusters: `godwit up`, `down`, `status` and `kubeconfig`.

mod certificates;
mod children;
mod components;
mod folder;
mod guests;
mod kubeconfig;
mod kvm;
mod nodes;
mod vms;

pub use guests::Handlers;

use crate::cli;
use crate::view::Output;
use anyhow::{Context, Result, bail};
use apiserver::embedded::{Config, Server};
use children::Places;
use folder::{Folder, Running};
use kubeconfig::Access;
use node::agent::Ending;
use node::agent::record::Process;
use node::logs::serve::PodLogs;
use nodes::Nodes;
use rustix::process::Signal;
use serde_json::json;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};
use tokio::signal::unix::{Signal as Signals, SignalKind, signal};

/// A cluster is ready, or has ended, within this time.
const PATIENCE: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(20);

/// Runs a cluster until SIGTERM or SIGINT; or starts one that runs by itself.
///
/// # Errors
/// When it cannot be started.
pub async fn up(arguments: cli::Up) -> Result<ExitCode> {
    let folder = Folder::of(arguments.dir.as_deref(), &arguments.name)?;
    if arguments.detach {
        return detach(&folder, &arguments);
    }
    let began = Instant::now();
    let lock = folder.lock()?;
    let server = start(&folder, arguments.port).await?;
    let nodes = Nodes::start(&server, folder.path(), &arguments).await?;
    let access = access(&arguments.name, &server)?;
    kubeconfig::write(&folder.kubeconfig(), &access.config())?;
    let process = Process::own().context("cannot read /proc, which tells this process's start")?;
    let running = Running { name: arguments.name.clone(), address: server.address, process };
    // Whoever finds it published may end it at once.
    let asked = Asked::listen()?;
    folder.publish(&running)?;
    let after = began.elapsed().as_secs_f64();
    say(&mut std::io::stderr(), &format!("cluster {} is ready after {after:.1} s", running.name));
    let export = format!("export KUBECONFIG={}", folder.kubeconfig().display());
    say(&mut std::io::stdout(), &export);
    let how = asked.wait().await;
    say(&mut std::io::stderr(), &format!("cluster {} ends", running.name));
    nodes.end(how).await;
    server.stop().await;
    drop(lock);
    Ok(ExitCode::SUCCESS)
}

/// Says something. A cluster that cannot, because its log's disk is full, runs all the same.
fn say(to: &mut dyn Write, text: &str) {
    let _ = writeln!(to, "{text}");
}

/// The signals that end a cluster.
struct Asked {
    terminate: Signals,
    interrupt: Signals,
    keep: Signals,
}

impl Asked {
    fn listen() -> Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            keep: signal(SignalKind::user_defined1())?,
        })
    }

    /// Waits for one of them.
    async fn wait(mut self) -> Ending {
        tokio::select! {
            _ = self.terminate.recv() => Ending::WithPods,
            _ = self.interrupt.recv() => Ending::WithPods,
            _ = self.keep.recv() => Ending::WithoutPods,
        }
    }
}

async fn start(folder: &Folder, port: Option<u16>) -> Result<Server> {
    // The port that it had before, so that kubeconfigs stay true.
    let before = folder.last().map(|last| last.address.port());
    let listen = |port| SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port);
    let logs = PodLogs { disks: nodes::disks(folder.path()) };
    let config = Config {
        folder: folder.path().to_owned(),
        listen: listen(port.or(before).unwrap_or(0)),
        logs: Some(Box::new(logs)),
    };
    Ok(Server::start(config).await?)
}

fn access<'a>(name: &'a str, server: &Server) -> Result<Access<'a>> {
    Ok(Access::new(name, "admin", server, &server.administrator()?))
}

/// Starts this program once more, on its own, and waits until it is ready.
fn detach(folder: &Folder, arguments: &cli::Up) -> Result<ExitCode> {
    // One that runs is told of here, not in a log.
    drop(folder.lock()?);
    let log = folder.open_log()?;
    let mut command = Command::new(std::env::current_exe().context("cannot find this program")?);
    command.arg("up").arg("--name").arg(&arguments.name);
    if let Some(dir) = &arguments.dir {
        command.arg("--dir").arg(std::path::absolute(dir)?);
    }
    if let Some(port) = arguments.port {
        command.arg("--port").arg(port.to_string());
    }
    command.arg("--nodes").arg(arguments.nodes.to_string());
    if let Some(size) = &arguments.storage {
        command.arg("--storage").arg(size);
    }
    for image in &arguments.image {
        command.arg("--image").arg(image);
    }
    if let Some(accelerator) = arguments.accelerator {
        let kvm = accelerator == cli::Accelerator::Kvm;
        command.args(["--accelerator", if kvm { "kvm" } else { "tcg" }]);
    }
    for network in &arguments.migration_network {
        command.arg("--migration-network").arg(network.to_string());
    }
    if arguments.separate {
        command.arg("--separate");
    }
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    // A terminal's Ctrl-C is not for it.
    let mut child = command.process_group(0).spawn().context("cannot run this program again")?;
    let until = Instant::now() + PATIENCE;
    loop {
        if folder
            .running()
            .is_some_and(|running| u32::try_from(running.process.pid) == Ok(child.id()))
        {
            break;
        }
        if let Some(exit) = child.try_wait()? {
            bail!("the cluster ended with {exit}; it said:\n{}", folder.last_words());
        }
        if Instant::now() > until {
            bail!("the cluster is not ready after {PATIENCE:?}; see {}", folder.log().display());
        }
        std::thread::sleep(POLL);
    }
    eprintln!("cluster {} is ready", arguments.name);
    println!("export KUBECONFIG={}", folder.kubeconfig().display());
    Ok(ExitCode::SUCCESS)
}

/// Ends a cluster.
///
/// # Errors
/// When it does not end.
pub async fn down(arguments: &cli::Down) -> Result<ExitCode> {
    let folder = Folder::of(arguments.dir.as_deref(), &arguments.name)?;
    match folder.running() {
        None => eprintln!("cluster {} does not run", arguments.name),
        Some(running) => {
            end(&folder, &running, arguments.keep_pods).await?;
            eprintln!("cluster {} has ended", arguments.name);
        }
    }
    // It may have been killed, or have given up on what does not end, and that goes on.
    if folder.path().is_dir() && !arguments.keep_pods {
        let _lock = folder.lock()?;
        Places::of(folder.path()).end_left_over().await?;
        let left = nodes::end_left_over(folder.path()).await?;
        if left > 0 {
            eprintln!("{left} containers that it had left running have been ended");
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Asks a cluster's process to end, and waits until it has.
async fn end(folder: &Folder, running: &Running, keep_pods: bool) -> Result<()> {
    running.process.signal(if keep_pods { Signal::USR1 } else { Signal::TERM });
    let until = Instant::now() + PATIENCE;
    while folder.running().is_some() {
        if Instant::now() > until {
            bail!(
                "process {} has not ended after {PATIENCE:?}; see {}",
                running.process.pid,
                folder.log().display()
            );
        }
        tokio::time::sleep(POLL).await;
    }
    Ok(())
}

/// The kubeconfig of this user's one embedded cluster.
///
/// # Errors
/// When there is none, or more than one.
pub fn own_kubeconfig() -> Result<PathBuf> {
    let clusters = folder::all(None)?;
    let mut all: Vec<PathBuf> = clusters.iter().map(Folder::kubeconfig).collect();
    all.retain(|path| path.exists());
    match (all.pop(), all.is_empty()) {
        (Some(one), true) => Ok(one),
        (None, _) => bail!("there is no cluster: run `godwit up`, or name a --kubeconfig"),
        (Some(_), false) => bail!("there are several clusters: name one with --kubeconfig"),
    }
}

/// The kubeconfig of an embedded cluster. None: there is none of that name.
pub fn kubeconfig_of(dir: Option<&std::path::Path>, name: &str) -> Option<PathBuf> {
    let path = Folder::of(dir, name).ok()?.kubeconfig();
    path.exists().then_some(path)
}

/// Lists the clusters of this machine's user.
///
/// # Errors
/// When their folder cannot be read.
pub fn list(dir: Option<&std::path::Path>, output: Output) -> Result<ExitCode> {
    let clusters = folder::all(dir)?;
    let row = |folder: &Folder| {
        let running = folder.running();
        let last = running.clone().or_else(|| folder.last());
        let roles = Places::of(folder.path()).running();
        let role = |(name, process): (String, Process)| json!({"name": name, "pid": process.pid});
        json!({
            "name": folder.name(),
            "state": if running.is_some() { "running" } else { "stopped" },
            "server": last.map(|l| format!("https://{}", l.address)),
            "pid": running.map(|r| r.process.pid),
            "roles": roles.into_iter().map(role).collect::<Vec<_>>(),
            "kubeconfig": folder.kubeconfig(),
        })
    };
    let rows: Vec<_> = clusters.iter().map(row).collect();
    match output {
        Output::Json => println!("{}", serde_json::to_string_pretty(&rows)?),
        Output::Text => {
            println!("{:16} {:8} {:28} KUBECONFIG", "NAME", "STATE", "SERVER");
            for row in rows {
                let text = |field: &str| row[field].as_str().unwrap_or("-").to_owned();
                println!(
                    "{:16} {:8} {:28} {}",
                    text("name"),
                    text("state"),
                    text("server"),
                    text("kubeconfig")
                );
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints a cluster's kubeconfig, or merges it into another.
///
/// # Errors
/// When there is none, or the other is none.
pub fn kubeconfig(arguments: &cli::Kubeconfig) -> Result<ExitCode> {
    let folder = Folder::of(arguments.dir.as_deref(), &arguments.name)?;
    let own = folder.kubeconfig();
    let text = std::fs::read_to_string(&own).with_context(|| {
        format!("there is no {}; run `godwit up --name {}` first", own.display(), arguments.name)
    })?;
    if !arguments.merge {
        print!("{text}");
        return Ok(ExitCode::SUCCESS);
    }
    let config =
        serde_saphyr::from_str(&text).with_context(|| format!("{} is damaged", own.display()))?;
    let target = arguments.into.clone().map_or_else(default_kubeconfig, Ok)?;
    kubeconfig::merge(&target, &config)?;
    eprintln!("context godwit-{} is in {}", arguments.name, target.display());
    Ok(ExitCode::SUCCESS)
}

/// Where kubectl looks.
fn default_kubeconfig() -> Result<PathBuf> {
    if let Some(list) = std::env::var_os("KUBECONFIG")
        && let Some(first) = std::env::split_paths(&list).next()
    {
        return Ok(first);
    }
    let home = std::env::var_os("HOME").context("HOME is not set; say --into FILE")?;
    Ok(PathBuf::from(home).join(".kube/config"))
}
