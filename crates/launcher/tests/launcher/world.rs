//! A host in a folder of its own, with a gateway and an owner ledger, and launchers on it.
//!
//! A launcher is this test binary, run again with `child -- run …`; so is QEMU's shim
//! (`child -- --parent …`). The test harness takes all that follows `--` for names of tests.

use channel::gateway::{Answer, Config, Gateway, Limits, Service};
use channel::identity::{Ca, Role, SpiffeId, Trust};
use handover::handler::Qemu;
use handover::ledger::{Request, Response};
use handover::record::{InstanceId, Record, VmId};
use launcher::client::Client;
use launcher::migration::Fault;
use launcher::migration::ticket::{Here, Peer};
use launcher::spec::VmSpec;
use launcher::status::{Phase, Status};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tempfile::TempDir;
use tokio::net::UnixStream;

/// Enough for anything on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// The VM of every test.
pub const VM: &str = "web";

/// This binary as something else.
fn again() -> Vec<OsString> {
    let exe = std::env::current_exe().unwrap();
    let arguments = ["child", "--exact", "--nocapture", "--test-threads=1", "--"];
    std::iter::once(exe.into()).chain(arguments.map(OsString::from)).collect()
}

/// See the module.
pub fn child() {
    let mut arguments = std::env::args_os().skip_while(|argument| argument != "--").skip(1);
    let text = |argument: Option<OsString>| argument.unwrap().into_string().unwrap();
    match arguments.next() {
        None => {}
        Some(first) if first == "--parent" => {
            let parent = text(arguments.next()).parse().unwrap();
            let program: Vec<_> = arguments.skip(1).collect();
            panic!("{}", launcher::qemu::shim(parent, &program));
        }
        Some(_) => {
            let host = arguments.next().unwrap().into();
            let spec =
                arguments.next().map(|spec| serde_json::from_str(&text(Some(spec))).unwrap());
            run(host, spec);
        }
    }
}

fn run(host: PathBuf, spec: Option<VmSpec>) {
    let config = launcher::vm::Config {
        root: None,
        grace: std::time::Duration::from_secs(10),
        host,
        vm: VM.to_owned(),
        shim: again(),
        failpoints: false,
        fault: Fault::default(),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    if let Err(error) = runtime.block_on(launcher::run(config, spec, false)) {
        panic!("{}", launcher::chain(&error));
    }
}

/// A handler: the owner records, in memory, and the QEMUs that are watched.
#[derive(Default)]
struct Handler {
    records: Mutex<HashMap<VmId, Record>>,
    watched: Mutex<HashMap<InstanceId, (u32, u64)>>,
}

impl Handler {
    fn answer(&self, request: Request) -> Response {
        let mut records = self.records.lock().unwrap();
        match request {
            Request::Read { vm } => Response::Record { record: records.get(&vm).cloned() },
            Request::Swap { vm, change } => {
                let qemu_of = |instance: &InstanceId| self.qemu_of(instance);
                match handover::handler::local(&vm, records.get(&vm), qemu_of, &change) {
                    Ok(record) => {
                        records.insert(vm, record.clone());
                        Response::Done { record }
                    }
                    Err(refused) => Response::Refused { refused },
                }
            }
            Request::Watch { instance, process } => {
                let watched = (process.pid, process.start_time);
                self.watched.lock().unwrap().insert(instance, watched);
                Response::Watching
            }
        }
    }

    fn qemu_of(&self, instance: &InstanceId) -> Qemu {
        match self.watched.lock().unwrap().get(instance) {
            None => Qemu::Unknown,
            Some((pid, start)) if launcher::qemu::start_time(*pid) == Some(*start) => Qemu::Alive,
            Some(_) => Qemu::Ended,
        }
    }
}

impl Service for Handler {
    fn peer<'a>(&'a self, _: &'a SpiffeId, _: Value) -> Answer<'a> {
        Box::pin(async { Value::Null })
    }

    fn local(&self, request: Value) -> Answer<'_> {
        Box::pin(async move {
            let request = serde_json::from_value(request).unwrap();
            serde_json::to_value(self.answer(request)).unwrap()
        })
    }
}

/// A host.
pub struct Host {
    dir: TempDir,
    gateway: Option<Gateway>,
}

impl Host {
    pub fn start() -> Self {
        let dir = TempDir::new().unwrap();
        let ca = Ca::create("here").unwrap();
        let id = SpiffeId::new("here", Role::Handler, "node").unwrap();
        let mut trust = Trust::new();
        trust.add_linked("here", ca.certificate_pem()).unwrap();
        let gateway = Gateway::start(Config {
            listen: "127.0.0.1:0".parse().unwrap(),
            host_dir: dir.path().into(),
            identity: ca.issue(&id, Duration::from_secs(3600)).unwrap(),
            trust,
            service: Arc::new(Handler::default()),
            limits: Limits::default(),
        });
        let gateway = gateway.unwrap();
        let here = Here { peer: Peer { address: gateway.local_addr().to_string(), id } };
        std::fs::write(dir.path().join("gateway.json"), serde_json::to_vec(&here).unwrap())
            .unwrap();
        Self { gateway: Some(gateway), dir }
    }

    pub async fn stop_gateway(&mut self) {
        self.gateway.take().unwrap().shutdown().await;
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The folder of the one VM.
    pub fn folder(&self) -> PathBuf {
        self.path().join("vms").join(VM)
    }

    /// A disk of so many bytes, all zeros.
    pub fn disk(&self, name: &str, size: u64) -> PathBuf {
        let path = self.path().join(name);
        std::fs::File::create(&path).unwrap().set_len(size).unwrap();
        path
    }

    /// A launcher without a VM.
    pub async fn launcher(&self) -> Launcher {
        self.launcher_with(None).await
    }

    /// A launcher whose API answers.
    pub async fn launcher_with(&self, spec: Option<&VmSpec>) -> Launcher {
        let mut launcher = self.spawn(spec);
        let client = launcher.client.clone();
        let answer = async {
            while client.status().await.is_err() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::select! {
            answered = tokio::time::timeout(PATIENCE, answer) => answered.unwrap(),
            ended = launcher.child.wait() => panic!("{ended:?}: {}", launcher.words()),
        }
        launcher
    }

    /// A launcher that may fail.
    pub fn spawn(&self, spec: Option<&VmSpec>) -> Launcher {
        let [exe, arguments @ ..] = &again()[..] else { unreachable!() };
        let log = tempfile::NamedTempFile::new_in(self.path()).unwrap();
        let child = tokio::process::Command::new(exe)
            .args(arguments)
            .arg("run")
            .arg(self.path())
            .args(spec.map(|spec| serde_json::to_string(spec).unwrap()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log.reopen().unwrap())
            .kill_on_drop(true)
            .spawn();
        let client = Client::new(self.path(), VM);
        Launcher { child: child.unwrap(), client, log, folder: self.folder() }
    }
}

/// A launcher process; killed when dropped, and its QEMU with it.
pub struct Launcher {
    pub client: Client,
    child: tokio::process::Child,
    log: tempfile::NamedTempFile,
    folder: PathBuf,
}

impl Launcher {
    pub fn pid(&self) -> u32 {
        self.child.id().unwrap()
    }

    /// Waits for its end.
    pub async fn ended(&mut self) -> ExitStatus {
        tokio::time::timeout(PATIENCE, self.child.wait()).await.unwrap().unwrap()
    }

    /// What it said on stderr.
    pub fn words(&self) -> String {
        std::fs::read_to_string(self.log.path()).unwrap()
    }

    /// Waits until the status is as wanted.
    pub async fn until(&self, what: &str, wanted: impl Fn(&Status) -> bool) -> Status {
        let wait = async {
            let mut status = self.client.status().await.unwrap();
            while !wanted(&status) {
                let newer = self.client.status_after(status.generation, PATIENCE).await;
                status = newer.unwrap();
            }
            status
        };
        tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("never {what}"))
    }

    pub async fn until_phase(&self, phase: Phase) -> Status {
        self.until(&phase.to_string(), |status| status.phase == phase).await
    }

    /// A client of a serial port.
    pub async fn serial(&self, name: &str) -> UnixStream {
        channel::socket::connect_beneath(&self.folder, &format!("{name}.sock")).await.unwrap()
    }
}

/// A small VM, with more fields if wanted. Without disks it is all firmware, which says so on the
/// console and ignores the power button.
pub fn spec(more: Value) -> VmSpec {
    let mut spec = json!({"name": VM, "memoryMiB": 32, "accelerator": "tcg"});
    spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    serde_json::from_value(spec).unwrap()
}

pub fn firmware() -> VmSpec {
    spec(json!({}))
}

/// Sends a signal to one process.
pub fn signal(pid: u32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

/// Waits until a process that began at `start` is no more.
pub async fn until_gone(pid: u32, start: Option<u64>) {
    let gone = async {
        while start.is_some() && launcher::qemu::start_time(pid) == start {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, gone).await.unwrap_or_else(|_| panic!("{pid} still runs"));
}

/// Whether a signal ended a process.
pub fn was_killed(status: ExitStatus) -> bool {
    status.signal().is_some()
}
