//! One side of a move: a QEMU as the product starts it, in a folder of its own.

use launcher::console::Console;
use launcher::migration::memory::{self, INCOMING, OUTGOING};
use launcher::migration::policy::Policy;
use launcher::qemu::{Config, Facts, Mode, Qemu};
use launcher::spec::VmSpec;
use mover::disk::Disk;
use qmp::commands::{Cont, MigrationStatus, QueryStatus};
use serde_json::{Value, json};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Only ever passes when something hangs.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(5);
/// What has not happened after so many looks is taken not to happen: too few can hide a change of
/// QEMU's, but never fail a test.
const LOOKS: u32 = 40;

/// The shim: this test binary, run again.
fn again() -> Vec<OsString> {
    let exe = std::env::current_exe().unwrap();
    let arguments = ["child", "--exact", "--nocapture", "--test-threads=1", "--"];
    std::iter::once(exe.into()).chain(arguments.map(OsString::from)).collect()
}

/// Becomes QEMU if it was run as its shim.
pub fn child() {
    let mut arguments = std::env::args_os().skip_while(|argument| argument != "--").skip(1);
    if arguments.next().is_some_and(|first| first == "--parent") {
        let parent = arguments.next().unwrap().into_string().unwrap().parse().unwrap();
        let program: Vec<_> = arguments.skip(1).collect();
        panic!("{}", launcher::qemu::shim(parent, &program));
    }
}

/// A small VM: all firmware, which idles because it finds nothing to boot.
pub fn firmware(more: Value) -> VmSpec {
    let mut spec = json!({"name": "web", "memoryMiB": 32, "accelerator": "tcg"});
    spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    serde_json::from_value(spec).unwrap()
}

/// A VM with a real Linux in it (`make guest`).
pub fn linux() -> VmSpec {
    let file = |name: &str| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/guest").join(name);
        path.canonicalize()
            .unwrap_or_else(|_| panic!("there is no {}; run `make guest`", path.display()))
    };
    let cmdline = std::fs::read_to_string(file("cmdline")).unwrap();
    firmware(json!({
        "memoryMiB": 64,
        "boot": {
            "kernel": file("vmlinuz"), "initrd": file("initramfs.img"), "cmdline": cmdline.trim(),
        },
        // The oracle has one to speak on, and is left alone.
        "serials": ["console", "oracle"],
    }))
}

/// The same VM with one disk.
pub fn with_disk(mut spec: VmSpec, path: &Path, shared: bool) -> VmSpec {
    let disk = json!({"name": "root", "path": path, "shared": shared});
    spec.disks = vec![serde_json::from_value(disk).unwrap()];
    spec
}

/// A disk file of 1 MiB.
pub fn disk_in(folder: &TempDir, name: &str) -> PathBuf {
    let path = folder.path().join(name);
    std::fs::File::create_new(&path).unwrap().set_len(1 << 20).unwrap();
    path
}

/// Ends with its value.
pub struct Side {
    pub qemu: Qemu,
    folder: TempDir,
    _consoles: Vec<Console>,
}

impl Side {
    async fn start(spec: &VmSpec, mode: Mode) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let open = |name: &String| Console::open(folder.path(), name).unwrap();
        let consoles = spec.serials.iter().map(open).collect();
        let facts = spec.disks.iter().map(|disk| {
            let opened = Disk::source(&disk.path).unwrap();
            Facts { medium: opened.medium(), direct: opened.is_direct() }
        });
        let facts: Vec<_> = facts.collect();
        let config = Config::from_environment(again(), folder.path());
        let qemu = Qemu::start(&config, spec, &facts, mode).await.unwrap();
        Self { qemu, folder, _consoles: consoles }
    }

    /// Runs the guest.
    pub async fn source(spec: &VmSpec) -> Self {
        let side = Self::start(spec, Mode::Boot).await;
        side.run().await;
        side
    }

    /// Waits for the guest, as the product's targets do.
    pub async fn target(spec: &VmSpec, multifd: u8) -> Self {
        let side = Self::start(spec, Mode::Incoming).await;
        let setup =
            memory::Setup { multifd, downtime: Duration::from_millis(300), ..Default::default() };
        memory::set_up(&side.qemu, setup).await.unwrap();
        memory::listen(&side.qemu).await.unwrap();
        side
    }

    /// Waits for the guest with none of QEMU's settings changed.
    pub async fn plain_target(spec: &VmSpec) -> Self {
        let side = Self::start(spec, Mode::Incoming).await;
        memory::listen(&side.qemu).await.unwrap();
        side
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Major and minor.
    pub fn version(&self) -> (u32, u32) {
        let version = self.qemu.qmp.version().qemu;
        (version.major, version.minor)
    }

    pub async fn execute<C: qmp::Command>(&self, command: C) -> Result<C::Return, qmp::Error> {
        self.qemu.qmp.execute(command, PATIENCE).await
    }

    pub async fn run(&self) {
        self.execute(Cont).await.unwrap();
        assert!(self.runs().await);
    }

    pub async fn runs(&self) -> bool {
        self.execute(QueryStatus).await.unwrap().running
    }

    pub async fn status(&self) -> Option<MigrationStatus> {
        memory::look(&self.qemu).await.unwrap().status
    }

    /// Waits for a status of the migration.
    pub async fn reaches(&self, status: MigrationStatus) {
        let wait = async {
            while self.status().await.as_ref() != Some(&status) {
                tokio::time::sleep(PAUSE).await;
            }
        };
        within(wait).await;
    }

    /// Sees that a status does not change by itself.
    pub async fn stays(&self, status: Option<MigrationStatus>) {
        for _ in 0..LOOKS {
            assert_eq!(self.status().await, status);
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Lets QEMU's main stream, and those that follow, go straight to the target's QEMU.
    pub fn connect_to(&self, target: &Self) {
        let ours = self.path().join(OUTGOING);
        // It leads to an earlier target, or is not there yet.
        let _ = std::fs::remove_file(&ours);
        std::os::unix::fs::symlink(target.path().join(INCOMING), ours).unwrap();
    }

    /// Sends the memory until the guest stands before the switchover.
    pub async fn send(&self, multifd: u8) {
        self.try_send(multifd).await.unwrap();
        assert!(!self.runs().await);
    }

    pub async fn try_send(&self, multifd: u8) -> Result<(), String> {
        let stall_seconds = PATIENCE.as_secs_f64();
        let policy = Policy { multifd, stall_seconds, ..Policy::default() };
        memory::send(&self.qemu, &policy, Duration::ZERO).await
    }

    /// Connects to a target and sends the memory.
    pub async fn send_to(&self, target: &Self, multifd: u8) {
        self.connect_to(target);
        self.send(multifd).await;
    }

    /// Goes on until the target has all.
    pub async fn load(&self, target: &Self) {
        memory::finish(&self.qemu).await.unwrap();
        target.loaded().await.unwrap();
        assert!(!target.runs().await);
    }

    pub async fn loaded(&self) -> Result<(), String> {
        within(memory::loaded(&self.qemu)).await
    }

    /// Waits until QEMU has ended by itself with an error; returns what it said last.
    pub async fn fails(&self) -> String {
        let exit = within(self.qemu.process.ended()).await;
        assert!(!exit.is_clean() && !exit.is_asked(), "{exit}");
        self.qemu.process.last_words()
    }

    /// Waits until QEMU has said something on stderr.
    pub async fn says(&self, text: &str) {
        within(async {
            while !self.qemu.process.last_words().to_lowercase().contains(text) {
                tokio::time::sleep(PAUSE).await;
            }
        })
        .await;
    }

    pub async fn bring_back(&self) {
        memory::bring_back(&self.qemu, PATIENCE, false).await.unwrap();
        assert!(self.runs().await);
    }

    pub async fn kill(&self) {
        self.qemu.process.kill().await;
    }

    /// Whether the guest, a Linux, does what it is told on its console.
    pub async fn obeys(&self) {
        let mut console =
            channel::socket::connect_beneath(self.path(), "console.sock").await.unwrap();
        // N.B. what is typed is echoed: only the guest can do the sum.
        console.write_all(b"\necho $((6 * 7))=42\n").await.unwrap();
        hear(&mut console, "42=42").await;
    }

    /// Waits until a Linux has booted.
    pub async fn booted(&self) {
        let mut console =
            channel::socket::connect_beneath(self.path(), "console.sock").await.unwrap();
        hear(&mut console, "guest# ").await;
    }
}

/// What is awaited, which has to come.
pub async fn within<T>(awaited: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, awaited).await.expect("it comes in time")
}

async fn hear(console: &mut tokio::net::UnixStream, text: &str) {
    let mut heard = Vec::new();
    let hear = async {
        while !String::from_utf8_lossy(&heard).contains(text) {
            assert_ne!(console.read_buf(&mut heard).await.unwrap(), 0, "the port was closed");
        }
    };
    let done = tokio::time::timeout(PATIENCE, hear).await;
    assert!(done.is_ok(), "'{text}' was never said, only: {}", String::from_utf8_lossy(&heard));
}
