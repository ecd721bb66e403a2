//! The yardstick: two libvirt hosts on this machine, and `virsh migrate --live
//! --p2p --copy-storage-all` of a guest with a local disk from one to the other.
//!
//! ```text
//!  virsh ──── libvirt-sock of the source
//!                 │
//!  ┌ source ──────┴─────────┐  libvirt-sock of the target  ┌ target ────────────────┐
//!  │ libvirtd ──────────────┼───── p2p ────────────────────┼──────────▶ libvirtd    │
//!  │ QEMU ──────────────────┼───── tcp://127.0.0.3 ────────┼──────────▶ QEMU, NBD   │
//!  └ own mounts, name, pids ┘      memory, disk            └ own mounts, name, pids ┘
//! ```
//!
//! Each host is a folder and three namespaces: mounts (a libvirt of its own in
//! `/run`, `/var/lib` and so on, where paths are the same on both hosts but files
//! are not), the host name (libvirt refuses to migrate to the same name or host
//! UUID) and processes (all end with the host). The network is this machine's
//! loopback, as it is for Godwit.
//!
//! Everything that shapes a migration is as libvirt has it by default. So memory
//! and disk travel as plain text (Godwit encrypts). The guest's disk is opened with
//! `cache=none`, as KubeVirt and Godwit do.
//!
//! Needs root and [`PACKAGES`]. `libvirt-daemon-system` is not needed: the daemons
//! are started here, with their own settings.

use super::{DISK_MIB, MEMORY_MIB, Run, SOON, full_disk, load, whole};
use crate::guest;
use crate::witness::Witness;
use anyhow::{Context, Result, bail, ensure};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// What to install, with `--no-install-recommends`, beside QEMU.
pub const PACKAGES: &str = "libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients";

/// The target's address for memory and disk.
const TARGET_ADDRESS: &str = "127.0.0.3";
const NAME: &str = "guest";

// Paths as a host sees them.
const IMAGES: &str = "/var/lib/libvirt/images";
const DISK: &str = "/var/lib/libvirt/images/guest.raw";
const SERIAL: &str = "/run/libvirt/oracle.sock";
const LIBVIRT: &str = "/run/libvirt/libvirt-sock";
/// What a host has for itself, in its folder under the same path.
const OWN: [&str; 5] = ["/run", "/var/lib", "/var/log", "/var/cache", "/etc/libvirt"];

/// To start a daemon, which asks each QEMU what it can do, and for short commands.
const SHORT: Duration = Duration::from_secs(60);
/// For a whole migration.
const LONG: Duration = Duration::from_secs(900);
const POLL: Duration = Duration::from_millis(5);

/// What the guest is made of; paths are of this machine.
#[derive(Debug, Clone)]
pub struct Guest {
    kernel: PathBuf,
    initrd: PathBuf,
    cmdline: String,
    memory_mib: u64,
    cpus: u32,
}

impl Guest {
    /// The test guest, with its oracle.
    fn test() -> Result<Self> {
        let cmdline = fs::read_to_string(guest::image("cmdline")?)?;
        Ok(Self {
            kernel: guest::image("vmlinuz")?,
            initrd: guest::image("initramfs.img")?,
            cmdline: cmdline.trim().to_owned(),
            memory_mib: MEMORY_MIB,
            cpus: 1,
        })
    }
}

/// Moves the test guest with a full disk.
///
/// # Errors
/// When libvirt does not, or something is lost.
pub fn run() -> Result<Run> {
    let guest = Guest::test()?;
    let folder = tempfile::Builder::new().prefix("lv-").tempdir()?;
    let pair = Pair::start(folder.path())?;
    full_disk(&pair.source_disk(), DISK_MIB)?;
    pair.boot(&guest)?;
    let witness = Witness::new();
    let mut line = witness.listen(&pair.source_serial())?;
    load(&witness, &mut line)?;
    let begun = Instant::now();
    let (took, mut line) = pair.migrate(|serial| witness.listen(serial))?;
    witness.wait_alive(SOON)?;
    whole(&mut line)?;
    Ok(Run::since(begun, took, &witness))
}

/// Two libvirt hosts. Dropping it ends both and all that runs there.
#[derive(Debug)]
pub struct Pair {
    source: Host,
    target: Host,
}

impl Pair {
    /// Starts both hosts in `dir`, which holds the disks too and must not lie in
    /// one of the folders that a host has for itself, such as `/run`.
    ///
    /// # Errors
    /// When something is not installed, this is not root, or a daemon fails.
    pub fn start(dir: &Path) -> Result<Self> {
        ensure!(
            rustix::process::geteuid().is_root(),
            "two libvirt hosts on one machine need namespaces: run this as root"
        );
        for program in ["libvirtd", "virsh", "unshare", "qemu-system-x86_64"] {
            require(program)?;
        }
        let dir = dir.canonicalize().with_context(|| format!("no folder {}", dir.display()))?;
        let mut source = Host::start(&dir.join("a"), "godwit-a", 1)?;
        let mut target = Host::start(&dir.join("b"), "godwit-b", 2)?;
        source.wait_ready()?;
        target.wait_ready()?;
        Ok(Self { source, target })
    }

    /// Where the guest's raw disk must be put before [`Pair::boot`].
    pub fn source_disk(&self) -> PathBuf {
        self.source.at(DISK)
    }

    /// The copy, once the guest has moved.
    pub fn target_disk(&self) -> PathBuf {
        self.target.at(DISK)
    }

    /// The socket of the oracle's line while the guest is on the source. (That on
    /// the target is given to [`Pair::migrate`]'s `listen`.)
    pub fn source_serial(&self) -> PathBuf {
        self.source.at(SERIAL)
    }

    /// Boots the guest on the source, from the disk as it lies there. A guest of an
    /// earlier run is ended, wherever it is.
    ///
    /// # Errors
    /// When libvirt cannot start it.
    pub fn boot(&self, guest: &Guest) -> Result<()> {
        let disk = self.source_disk();
        ensure!(disk.is_file(), "put the guest's disk at {} first", disk.display());
        self.source.end_guest()?;
        self.target.end_guest()?;
        let xml = self.source.folder.join("guest.xml");
        fs::write(&xml, domain(guest))?;
        let command = ["create".as_ref(), xml.as_os_str()];
        self.source.virsh(command)?.finish(SHORT).context("the guest did not start")?;
        Ok(())
    }

    /// Moves the guest to the target, which gets a blank disk of the same size (as
    /// libvirt needs it). `listen` is given the target's socket of the oracle's
    /// line and called until it succeeds, while the migration runs.
    ///
    /// Returns how long `virsh migrate` took, and what `listen` returned.
    ///
    /// # Errors
    /// When the migration fails or takes longer than 15 minutes, or when it ended
    /// before `listen` succeeded.
    pub fn migrate<T>(&self, mut listen: impl FnMut(&Path) -> Result<T>) -> Result<(Duration, T)> {
        let size = fs::metadata(self.source_disk())?.len();
        fs::File::create(self.target_disk())?.set_len(size)?;
        let serial = self.target.at(SERIAL);

        let began = Instant::now();
        let mut virsh = self.source.virsh([
            "migrate",
            NAME,
            &self.target.uri(),
            "--live",
            "--p2p",
            "--copy-storage-all",
            "--migrateuri",
            &format!("tcp://{TARGET_ADDRESS}"),
            // Both QEMU and its NBD server would listen to the world otherwise.
            "--listen-address",
            TARGET_ADDRESS,
        ])?;
        let mut line = listen(&serial);
        while line.is_err() && virsh.runs()? && began.elapsed() < SHORT {
            std::thread::sleep(POLL);
            line = listen(&serial);
        }
        virsh.finish(LONG.saturating_sub(began.elapsed()))?;
        let took = began.elapsed();
        Ok((took, line.context("nobody heard the guest on the target")?))
    }
}

/// One libvirtd with what it needs around it.
#[derive(Debug)]
struct Host {
    folder: PathBuf,
    /// `unshare`, which waits for PID 1 of the namespaces. They end when its
    /// standard input is closed, be it by our death.
    init: Child,
}

impl Host {
    fn start(folder: &Path, name: &str, number: u8) -> Result<Self> {
        suits(folder)?;
        for place in OWN {
            fs::create_dir_all(below(folder, place))?;
        }
        fs::create_dir_all(below(folder, IMAGES))?;
        settle(folder, number)?;
        let init = Command::new("unshare")
            .args(["--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"])
            .args(["sh", "-c", include_str!("libvirt/host.sh"), "host.sh"])
            .arg(folder)
            .arg(name)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(fs::File::create(folder.join("init.log"))?)
            .spawn()
            .context("cannot run `unshare`")?;
        Ok(Self { folder: folder.to_owned(), init })
    }

    /// Where a path inside this host is for everyone else.
    fn at(&self, inside: &str) -> PathBuf {
        below(&self.folder, inside)
    }

    fn uri(&self) -> String {
        format!("qemu+unix:///system?socket={}", self.at(LIBVIRT).display())
    }

    fn virsh<A: AsRef<std::ffi::OsStr>>(
        &self,
        command: impl IntoIterator<Item = A>,
    ) -> Result<Running> {
        Running::spawn(Command::new("virsh").args(["--connect", &self.uri()]).args(command))
    }

    /// Waits until the daemon serves, which it does once it knows its QEMU.
    fn wait_ready(&mut self) -> Result<()> {
        let until = Instant::now() + SHORT;
        while let Err(error) = self.virsh(["version"])?.finish(SHORT) {
            if Instant::now() > until || self.init.try_wait()?.is_some() {
                return Err(error.context(self.last_words()));
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }

    fn end_guest(&self) -> Result<()> {
        let running = self.virsh(["list", "--name"])?.finish(SHORT)?;
        if running.lines().any(|name| name == NAME) {
            self.virsh(["destroy", NAME])?.finish(SHORT)?;
        }
        Ok(())
    }

    fn last_words(&self) -> String {
        let mut words = format!("the libvirt host in {} does not serve", self.folder.display());
        for log in ["init.log", "libvirtd.log"] {
            let text = fs::read_to_string(self.folder.join(log)).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            for line in &lines[lines.len().saturating_sub(10)..] {
                words.push_str(&format!("\n{log}: {line}"));
            }
        }
        words
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        drop(self.init.stdin.take());
        // The end of `unshare` means that nothing is left of the namespaces.
        let until = Instant::now() + Duration::from_secs(10);
        while matches!(self.init.try_wait(), Ok(None)) {
            if Instant::now() > until {
                let _ = self.init.kill();
                let _ = self.init.wait();
                return;
            }
            std::thread::sleep(POLL);
        }
    }
}

/// Checks that a host can live in `folder`.
fn suits(folder: &Path) -> Result<()> {
    let shown = folder.display();
    if let Some(place) = OWN.iter().find(|place| folder.starts_with(place)) {
        bail!(
            "{shown} cannot hold a libvirt host, which has its own {place}: choose another folder"
        );
    }
    let socket = below(folder, LIBVIRT);
    ensure!(
        socket.as_os_str().len() < 108,
        "{shown} is too long for the sockets below it: choose a folder with a shorter path"
    );
    Ok(())
}

/// Writes the files that libvirt and its host find in `/etc`.
fn settle(folder: &Path, number: u8) -> Result<()> {
    let libvirt = below(folder, "/etc/libvirt");
    fs::write(libvirt.join("qemu.conf"), include_str!("libvirt/qemu.conf"))?;
    let daemon = format!(
        "host_uuid = \"6f1d4c5e-9a0b-4d7e-8c3f-00000000000{number}\"\n\
         auth_unix_rw = \"none\"\n\
         unix_sock_rw_perms = \"0700\"\n"
    );
    fs::write(libvirt.join("libvirtd.conf"), daemon)?;
    // Debian's libvirt does not start where its default user is unknown, even if
    // another one is configured; the package that would add it replaces systemd.
    for (file, line) in [
        ("/etc/passwd", "libvirt-qemu:x:65534:65534::/nonexistent:/usr/sbin/nologin\n"),
        ("/etc/group", "libvirt-qemu:x:65534:\n"),
    ] {
        fs::write(below(folder, file), fs::read_to_string(file)? + line)?;
    }
    Ok(())
}

fn domain(guest: &Guest) -> String {
    let Guest { kernel, initrd, cmdline, memory_mib, cpus } = guest;
    format!(
        include_str!("libvirt/domain.xml"),
        name = NAME,
        memory_mib = memory_mib,
        cpus = cpus,
        kernel = escape(&kernel.to_string_lossy()),
        initrd = escape(&initrd.to_string_lossy()),
        cmdline = escape(cmdline.trim()),
        disk = DISK,
        serial = SERIAL,
    )
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

/// A path of a host, seen from outside.
fn below(folder: &Path, inside: &str) -> PathBuf {
    folder.join(inside.trim_start_matches('/'))
}

fn require(program: &str) -> Result<()> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).any(|folder| folder.join(program).is_file());
    ensure!(
        found,
        "{program} is not in PATH: apt-get install --no-install-recommends {PACKAGES} \
         qemu-system-x86 util-linux"
    );
    Ok(())
}

/// A command that is killed when it is no longer waited for.
struct Running {
    child: Child,
    what: String,
}

impl Running {
    fn spawn(command: &mut Command) -> Result<Self> {
        let what = format!("{command:?}");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn().with_context(|| format!("cannot run {what}"))?;
        Ok(Self { child, what })
    }

    fn runs(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// Waits for its end and returns what it printed, which must be little.
    fn finish(mut self, deadline: Duration) -> Result<String> {
        let until = Instant::now() + deadline;
        while self.runs()? {
            if Instant::now() > until {
                bail!("{} did not end within {deadline:?}", self.what);
            }
            std::thread::sleep(POLL);
        }
        let status = self.child.wait()?;
        let said = printed(self.child.stdout.take())?;
        if !status.success() {
            let why = printed(self.child.stderr.take())?;
            bail!("{} ended with {status}: {}", self.what, why.trim());
        }
        Ok(said)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn printed(pipe: Option<impl Read>) -> Result<String> {
    let mut bytes = Vec::new();
    if let Some(pipe) = pipe {
        pipe.take(64 << 10).read_to_end(&mut bytes)?;
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
