//! A guest under QEMU with both serial ports and QMP in hand. Ends with its owner.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use oracle::protocol::Report;

/// Far beyond anything seen under TCG on a busy machine; only a hang reaches it.
const DEADLINE: Duration = Duration::from_secs(120);

/// How the guest finds its kernel.
pub enum Boot {
    /// QEMU is given it.
    Direct,
    /// From its disk, by the BIOS.
    Disk,
}

/// A running guest.
pub struct Vm {
    qemu: Child,
    shell: Port,
    oracle: Port,
    qmp: BufReader<UnixStream>,
}

/// A serial port: what the guest says comes as chunks, whenever it says it.
struct Port {
    guest: UnixStream,
    chunks: Receiver<Vec<u8>>,
    text: String,
    lines: VecDeque<String>,
}

/// Where `guest/build` puts its results.
pub fn built(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/guest").join(name);
    assert!(path.exists(), "{} is missing: run `make guest` first", path.display());
    path
}

impl Vm {
    /// Boots with `disk` and `memory` (as `-m` has it); sockets go to `dir`.
    pub fn boot(dir: &Path, disk: &Path, memory: &str, boot: Boot, more: &[&str]) -> Vm {
        let mut command = Command::new("qemu-system-x86_64");
        command.args("-machine pc,accel=tcg -nodefaults -display none".split(' '));
        command.args(["-m", memory]).args(more);
        if let Boot::Direct = boot {
            let cmdline = std::fs::read_to_string(built("cmdline")).unwrap();
            command.arg("-kernel").arg(built("vmlinuz"));
            command.arg("-initrd").arg(built("initramfs.img"));
            command.args(["-append", cmdline.trim()]);
        }
        command
            .args(["-drive", &format!("file={},format=raw,if=virtio,cache=none", disk.display())]);
        for port in ["shell", "oracle"] {
            let socket = dir.join(port);
            let chardev = format!("socket,id={port},path={},server=on,wait=off", socket.display());
            command.args(["-chardev", &chardev, "-serial", &format!("chardev:{port}")]);
        }
        command.args(["-qmp", &format!("unix:{},server=on,wait=off", dir.join("qmp").display())]);
        let qemu = command.stdin(Stdio::null()).spawn().expect("qemu-system-x86_64 starts");
        let shell = Port::open(&dir.join("shell"));
        let oracle = Port::open(&dir.join("oracle"));
        let qmp = connect(&dir.join("qmp"));
        qmp.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut vm = Vm { qemu, shell, oracle, qmp: BufReader::new(qmp) };
        vm.qmp("qmp_capabilities", "{}");
        vm
    }

    /// Executes a command, whose arguments are JSON; gives the answer's line.
    pub fn qmp(&mut self, command: &str, arguments: &str) -> String {
        writeln!(self.qmp.get_mut(), r#"{{"execute":"{command}","arguments":{arguments}}}"#)
            .unwrap();
        loop {
            let mut line = String::new();
            self.qmp.by_ref().take(1 << 20).read_line(&mut line).expect("QMP answers");
            assert!(!line.is_empty(), "{command}: QEMU has ended");
            assert!(!line.starts_with(r#"{"error""#), "{command}: {line}");
            if line.starts_with(r#"{"return""#) {
                return line;
            }
        }
    }

    /// Asks `query-migrate` until it says `completed`.
    pub fn wait_until_moved(&mut self) {
        let end = Instant::now() + DEADLINE;
        loop {
            let answer = self.qmp("query-migrate", "{}");
            if answer.contains(r#""status": "completed""#) {
                return;
            }
            assert!(!answer.contains("failed") && Instant::now() < end, "{answer}");
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits for the shell's prompt and for the oracle.
    pub fn wait_until_up(&mut self) {
        self.shell.wait_for("guest# ");
        self.until("the oracle's READY", |report| *report == Report::Ready);
    }

    /// Runs a command in the guest's shell and gives what it printed.
    pub fn shell(&mut self, command: &str) -> String {
        // The echo of the command itself must not look like the answer's end.
        writeln!(self.shell.guest, "{command}; echo EN''D").unwrap();
        self.shell.wait_for("\r\nguest# ").replace('\r', "")
    }

    /// Says a line to the oracle and waits for what is not an event of a job.
    pub fn ask(&mut self, command: &str) -> Report {
        writeln!(self.oracle.guest, "{command}").unwrap();
        self.until(command, |report| {
            !matches!(
                report,
                Report::Tick { .. }
                    | Report::Written { .. }
                    | Report::LostWrite { .. }
                    | Report::LostPage { .. }
            )
        })
    }

    /// The first report from now on that satisfies `wanted`.
    pub fn until(&mut self, what: &str, wanted: impl Fn(&Report) -> bool) -> Report {
        loop {
            let line = self.oracle.line(what);
            // What the port said while the oracle did not yet run is no report.
            let Ok(report) = line.parse::<Report>() else { continue };
            if wanted(&report) {
                return report;
            }
        }
    }

    /// Presses the power button and waits until QEMU ends.
    pub fn power_off(mut self) -> ExitStatus {
        self.qmp("system_powerdown", "{}");
        let end = Instant::now() + DEADLINE;
        loop {
            if let Some(status) = self.qemu.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < end, "the power button did not end the guest");
            thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

impl Port {
    fn open(socket: &Path) -> Port {
        let guest = connect(socket);
        let mut from_guest = guest.try_clone().unwrap();
        let (sender, chunks) = channel();
        // Ends when QEMU does, or when nobody listens any more.
        thread::spawn(move || {
            let mut chunk = [0; 4096];
            while let Ok(length @ 1..) = from_guest.read(&mut chunk) {
                if sender.send(chunk[..length].to_vec()).is_err() {
                    return;
                }
            }
        });
        Port { guest, chunks, text: String::new(), lines: VecDeque::new() }
    }

    /// What the guest says up to and including `end`.
    fn wait_for(&mut self, end: &str) -> String {
        loop {
            if let Some(at) = self.text.find(end) {
                return self.text.drain(..at + end.len()).collect();
            }
            self.more(end);
        }
    }

    fn line(&mut self, what: &str) -> String {
        loop {
            if let Some(line) = self.lines.pop_front() {
                return line;
            }
            self.more(what);
            while let Some(at) = self.text.find('\n') {
                let line: String = self.text.drain(..=at).collect();
                self.lines.push_back(line.trim().to_owned());
            }
        }
    }

    fn more(&mut self, what: &str) {
        let chunk = self.chunks.recv_timeout(DEADLINE).unwrap_or_else(|error| {
            panic!("{error}: the guest did not say `{what}`; it said {:?}", self.text)
        });
        self.text += &String::from_utf8_lossy(&chunk);
    }
}

/// QEMU makes its sockets a moment after it started.
fn connect(socket: &Path) -> UnixStream {
    let end = Instant::now() + DEADLINE;
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return stream,
            Err(error) => assert!(Instant::now() < end, "{}: {error}", socket.display()),
        }
        thread::sleep(Duration::from_millis(20));
    }
}
