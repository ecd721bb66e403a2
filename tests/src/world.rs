//! Hosts on one machine: each a folder with a loopback address, a gateway and
//! launchers of its own. Everything ends with the world.

use anyhow::{Context, Result, bail};
use channel::relay::DelayRelay;
use launcher::client::Client;
use launcher::status::{Phase, Status};
use std::ffi::OsString;
use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Whatever a process needs to become ready takes less, on a busy machine too.
pub const READY: Duration = Duration::from_secs(60);

/// A world of hosts.
#[derive(Debug)]
pub struct World {
    folder: Option<tempfile::TempDir>,
    program: PathBuf,
    env: Env,
    /// Its hosts' addresses are above this one: no other world's are. The port of a gateway that
    /// was killed is free for its next start only where nobody else listens.
    network: Ipv4Addr,
    runtime: tokio::runtime::Runtime,
}

/// What every launcher finds in its environment, beside what this process has.
type Env = Vec<(&'static str, OsString)>;

/// A host in a world. Its processes end when it is dropped.
#[derive(Debug)]
pub struct Host {
    /// Its folder.
    pub dir: PathBuf,
    program: PathBuf,
    env: Env,
    /// Where its gateway listens.
    listen: String,
    /// Where others dial it: its gateway, or a link that leads there.
    address: String,
    link: Option<DelayRelay>,
    gateway: Option<Process>,
}

/// A process that is ended when dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    log: PathBuf,
}

impl World {
    /// An empty world for the `godwit` at `program`.
    ///
    /// # Errors
    /// When there is no room for it.
    pub fn new(program: &Path) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("godwit-").tempdir()?;
        // A thread of its own: links carry on while a test waits for something else.
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        let runtime = runtime.worker_threads(1).enable_all().build()?;
        let network = network();
        let (folder, program) = (Some(folder), program.into());
        Ok(Self { folder, program, env: Vec::new(), network, runtime })
    }

    /// Hosts made from now on give this to their launchers' environment.
    pub fn set_env(&mut self, name: &'static str, value: impl Into<OsString>) {
        self.env.push((name, value.into()));
    }

    /// The world's folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.as_ref().map_or_else(PathBuf::new, |f| f.path().join(name))
    }

    fn address(&self, number: u8) -> IpAddr {
        let [a, b, c, d] = self.network.octets();
        IpAddr::from([a, b, c, d + number % 8])
    }

    /// A host with its gateway running. Each of a world has a number of its own, below 8.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn host(&self, name: &str, number: u8) -> Result<Host> {
        self.host_of("ca", name, number)
    }

    /// A host that another CA of the world vouches for.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn host_of(&self, ca: &str, name: &str, number: u8) -> Result<Host> {
        let dir = self.path(name);
        let ca = self.path(ca);
        let made = Command::new(&self.program)
            .arg("host")
            .arg(&dir)
            .arg("--ca")
            .arg(&ca)
            .args(["--name", name])
            .stdout(Stdio::null())
            .status()?;
        if !made.success() {
            bail!("host {name} could not be made");
        }
        let mut host = Host {
            dir,
            program: self.program.clone(),
            env: self.env.clone(),
            listen: format!("{}:0", self.address(number)),
            address: String::new(),
            link: None,
            gateway: None,
        };
        host.start_gateway()?;
        Ok(host)
    }

    /// A host that others reach over a link that can be cut, each way delayed.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn far_host(&self, name: &str, number: u8, delay: Duration) -> Result<Host> {
        let mut host = self.host(name, number)?;
        let (near, far) = (SocketAddr::new(self.address(number), 0), host.listen.parse()?);
        let link = self.run(DelayRelay::start(near, far, delay, None))?;
        host.kill_gateway();
        host.address = link.local_addr().to_string();
        host.link = Some(link);
        host.start_gateway()?;
        Ok(host)
    }

    /// Runs a future.
    pub fn run<F: Future>(&self, future: F) -> F::Output {
        self.runtime.block_on(future)
    }

    /// A `godwit` command that is not a role.
    pub fn godwit(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(arguments).stdin(Stdio::null());
        command
    }

    /// `godwit move VM --from A --to B` with more arguments.
    pub fn move_command(&self, vm: &str, from: &Host, to: &Host, more: &[&str]) -> Command {
        let mut command = self.godwit(&["move", vm]);
        command.arg("--from").arg(&from.dir).arg("--to").arg(&to.dir).args(more);
        command
    }

    /// Moves a VM; returns how that ended and what was said.
    ///
    /// # Errors
    /// When the command cannot be run or hangs.
    pub fn move_vm(&self, vm: &str, from: &Host, to: &Host, more: &[&str]) -> Result<Ended> {
        finish(&mut self.move_command(vm, from, to, more), Duration::from_secs(240))
    }

    /// `godwit verify`; returns how that ended and what was said.
    ///
    /// # Errors
    /// When the command cannot be run or hangs.
    pub fn verify(&self, vm: &str, from: &Host, to: &Host) -> Result<Ended> {
        let mut command = self.godwit(&["verify", vm]);
        command.arg("--from").arg(&from.dir).arg("--to").arg(&to.dir);
        finish(&mut command, Duration::from_secs(240))
    }

    /// A launcher's status.
    ///
    /// # Errors
    /// When it cannot be asked.
    pub fn status(&self, host: &Host, vm: &str) -> Result<Status> {
        Ok(self.run(host.client(vm).status())?)
    }

    /// Waits until a launcher's status is as it should be.
    ///
    /// # Errors
    /// When it is not in time.
    pub fn wait_status(
        &self,
        host: &Host,
        vm: &str,
        what: &str,
        holds: impl Fn(&Status) -> bool,
    ) -> Result<Status> {
        let until = Instant::now() + READY;
        loop {
            let last = self.status(host, vm);
            match last {
                Ok(status) if holds(&status) => return Ok(status),
                last if Instant::now() > until => {
                    bail!("{} is not {what} within {READY:?}: {last:?}", host.dir.display())
                }
                _ => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    /// Waits until a VM runs on a host.
    ///
    /// # Errors
    /// When it does not in time.
    pub fn wait_running(&self, host: &Host, vm: &str) -> Result<Status> {
        self.wait_status(host, vm, "running", |s| {
            s.phase == Phase::Running && s.migration.as_ref().is_none_or(|m| m.outcome.is_some())
        })
    }

    /// Bytes that a host's gateway has sent and received for moves, at its socket.
    ///
    /// # Errors
    /// When it cannot be asked.
    pub fn bytes(&self, host: &Host) -> Result<(u64, u64)> {
        let client = channel::client::GatewayClient::new(&host.dir);
        let counters = self.run(client.counters())?;
        Ok((counters.total.sent, counters.total.received))
    }
}

impl World {
    /// Keeps the folder when the world ends; returns it.
    pub fn keep(&mut self) -> PathBuf {
        if let Some(folder) = &mut self.folder {
            folder.disable_cleanup(true);
        }
        self.path("")
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // What a failed test left is the best witness of what happened.
        if std::thread::panicking()
            && let Some(folder) = self.folder.take()
        {
            eprintln!("logs are kept in {}", folder.keep().display());
        }
    }
}

/// How a command ended.
#[derive(Debug)]
pub struct Ended {
    /// Its exit status.
    pub status: ExitStatus,
    /// What it said on stdout.
    pub out: String,
    /// What it said on stderr.
    pub err: String,
}

/// Runs a command to its end, or ends it at the deadline.
///
/// # Errors
/// When it cannot be run or hangs.
pub fn finish(command: &mut Command, deadline: Duration) -> Result<Ended> {
    let mut out = tempfile::tempfile()?;
    let mut err = tempfile::tempfile()?;
    let mut child = command.stdout(out.try_clone()?).stderr(err.try_clone()?).spawn()?;
    let until = Instant::now() + deadline;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if Instant::now() > until {
            child.kill()?;
            child.wait()?;
            bail!("{command:?} hangs; it said: {}", text(&mut err)?);
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    Ok(Ended { status, out: text(&mut out)?, err: text(&mut err)? })
}

fn text(file: &mut File) -> Result<String> {
    use std::io::{Read, Seek};
    let mut text = String::new();
    file.rewind()?;
    file.read_to_string(&mut text)?;
    Ok(text)
}

/// Addresses of this machine that nobody else is likely to have: 8 of some 115,000.
fn network() -> Ipv4Addr {
    let [a, b, c, ..] = *uuid::Uuid::new_v4().as_bytes();
    Ipv4Addr::new(127, 1 + a % 14, b, c & 0xf8)
}

impl Host {
    /// Starts the gateway, on the address it had before if it had one.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start_gateway(&mut self) -> Result<()> {
        let said = self.dir.join("gateway.json");
        // An earlier gateway's word is not this one's.
        let _ = std::fs::remove_file(&said);
        let mut command = Command::new(&self.program);
        command.arg("gateway").arg("--host").arg(&self.dir).args(["--listen", &self.listen]);
        if self.link.is_some() {
            command.args(["--advertise", &self.address]);
        }
        let mut gateway = Process::start(&mut command, &self.dir.join("gateway.log"))?;
        gateway.wait_for(&said)?;
        let here: serde_json::Value = serde_json::from_slice(&std::fs::read(&said)?)?;
        let address = here["address"].as_str().context("the gateway has no address")?;
        if self.link.is_none() {
            self.listen = address.to_owned();
        }
        self.address = address.to_owned();
        self.gateway = Some(gateway);
        Ok(())
    }

    /// Kills the gateway as a crash would.
    pub fn kill_gateway(&mut self) {
        self.gateway = None;
    }

    /// Its gateway's process id, if that runs.
    pub fn gateway_pid(&self) -> Option<u32> {
        self.gateway.as_ref().map(Process::pid)
    }

    /// The link to a far host.
    pub fn link(&self) -> Option<&DelayRelay> {
        self.link.as_ref()
    }

    /// Where others dial it.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Starts a launcher that runs a VM.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn launch(&self, vm: &str, spec: &str, more: &[&str]) -> Result<Process> {
        let path = self.dir.join(format!("{vm}.json"));
        std::fs::write(&path, spec)?;
        let path = path.display().to_string();
        self.launcher(vm, &[&["--spec", path.as_str()], more].concat())
    }

    /// Starts a launcher that waits for a VM.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn receive(&self, vm: &str, more: &[&str]) -> Result<Process> {
        self.launcher(vm, &[&["--vm", vm], more].concat())
    }

    fn launcher(&self, vm: &str, arguments: &[&str]) -> Result<Process> {
        let socket = self.folder(vm).join("launcher.sock");
        // The socket of a launcher that was killed is not this one's.
        let _ = std::fs::remove_file(&socket);
        let mut command = Command::new(&self.program);
        command.arg("launcher").arg("--host").arg(&self.dir).args(arguments);
        command.envs(self.env.iter().map(|(name, value)| (name, value)));
        let mut launcher = Process::start(&mut command, &self.dir.join(format!("{vm}.log")))?;
        launcher.wait_for(&socket)?;
        Ok(launcher)
    }

    /// A VM's folder.
    pub fn folder(&self, vm: &str) -> PathBuf {
        self.dir.join("vms").join(vm)
    }

    /// Speaks to a VM's launcher.
    pub fn client(&self, vm: &str) -> Client {
        Client::new(&self.dir, vm)
    }
}

impl Process {
    fn start(command: &mut Command, log: &Path) -> Result<Self> {
        let file = File::options().create(true).append(true).open(log)?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("cannot run {command:?}"))?;
        Ok(Self { child, log: log.into() })
    }

    fn wait_for(&mut self, path: &Path) -> Result<()> {
        let until = Instant::now() + READY;
        while !path.exists() {
            if let Some(status) = self.child.try_wait()? {
                bail!("it ended ({status}): {}", self.log());
            }
            if Instant::now() > until {
                bail!("{} did not appear: {}", path.display(), self.log());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Kills it as a crash would.
    pub fn kill(mut self) {
        self.end();
    }

    /// Whether it has ended by itself.
    ///
    /// # Errors
    /// When the system cannot say.
    pub fn has_ended(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }

    fn end(&mut self) {
        // It may have ended already: that is the aim.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn wait(mut self) -> Result<ExitStatus> {
        let until = Instant::now() + READY;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if Instant::now() > until {
                bail!("process {} does not end", self.pid());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end();
    }
}
