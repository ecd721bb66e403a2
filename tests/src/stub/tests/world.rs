//! A folder with disks and the QEMUs in it, real or stub.

use oracle::protocol::Report;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// Only ever passes when something hangs.
pub const LONG: Duration = Duration::from_secs(60);

/// What is started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Real,
    Stub,
}

/// The variable that makes this test program a stub: its arguments, as JSON.
const AS_STUB: &str = "STUB_QEMU_TEST_ARGUMENTS";

/// This test program, started again: a stub when the variable is set, else nothing.
#[test]
fn the_stub_as_a_process() {
    if let Ok(arguments) = std::env::var(AS_STUB) {
        let arguments = serde_json::from_str(&arguments).unwrap();
        let code = crate::stub::main(arguments);
        std::process::exit(i32::from(code != ExitCode::SUCCESS));
    }
}

/// A test's folder; all in it ends with it.
pub struct World {
    kind: Kind,
    folder: tempfile::TempDir,
    environment: Vec<(String, String)>,
}

impl World {
    pub fn new(kind: Kind) -> Self {
        Self { kind, folder: tempfile::tempdir().unwrap(), environment: Vec::new() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Sets a variable of what is started from now on.
    pub fn set(&mut self, name: &str, value: &str) {
        self.environment.push((name.to_owned(), value.to_owned()));
    }

    /// Makes an empty disk.
    pub fn disk(&self, name: &str, mib: u64) {
        std::fs::File::create(self.path(name)).unwrap().set_len(mib << 20).unwrap();
    }

    /// Starts a QEMU over a disk, as the launcher does: stopped, its sockets in the folder.
    pub fn start(&self, name: &str, disk: &str, extra: &[&str]) -> Qemu {
        let mut qemu = self.spawn(name, disk, extra);
        qemu.dial();
        qemu
    }

    /// As [`World::start`], for one that may end at once.
    pub fn spawn(&self, name: &str, disk: &str, extra: &[&str]) -> Qemu {
        let node = |value: Value| value.to_string();
        let group = node(json!({"qom-type": "throttle-group", "id": "disk0-tg"}));
        let file = node(json!({"driver": "file", "node-name": "disk0-file", "filename": disk}));
        let raw = node(json!({"driver": "raw", "node-name": "disk0-raw", "file": "disk0-file"}));
        let top = node(json!({
            "driver": "throttle", "node-name": "disk0", "file": "disk0-raw",
            "throttle-group": "disk0-tg",
        }));
        let qmp = format!("socket,id=qmp,path={name}.qmp,server=on,wait=off");
        let line = format!("socket,id=line,path={name}.line,server=on,wait=off");
        let mut arguments: Vec<&str> = vec![
            "-nodefaults",
            "-display",
            "none",
            "-S",
            "-machine",
            "pc",
            "-accel",
            "tcg",
            "-m",
            "64M",
            "-chardev",
            &qmp,
            "-mon",
            "chardev=qmp,mode=control",
            "-chardev",
            &line,
            "-device",
            "isa-serial,chardev=line,id=serial-1,index=1",
            "-object",
            &group,
            "-blockdev",
            &file,
            "-blockdev",
            &raw,
            "-blockdev",
            &top,
            "-device",
            "virtio-blk-pci,drive=disk0,id=disk0-disk",
        ];
        arguments.extend(extra);
        let program = match self.kind {
            Kind::Real => "qemu-system-x86_64".into(),
            Kind::Stub => std::env::current_exe().unwrap(),
        };
        let mut command = Command::new(program);
        match self.kind {
            Kind::Real => command.args(&arguments),
            Kind::Stub => command
                .args(["stub::tests::world::the_stub_as_a_process", "--exact", "--nocapture"])
                .env(AS_STUB, json!(arguments).to_string()),
        };
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        let child = command
            .current_dir(self.folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("QEMU 7.2 is installed");
        Qemu { child, base: self.path(name), qmp: None, events: Vec::new() }
    }
}

/// A QEMU and its monitor.
pub struct Qemu {
    child: Child,
    base: PathBuf,
    qmp: Option<BufReader<UnixStream>>,
    /// Events that nobody took yet, without those about passes.
    events: Vec<String>,
}

impl Drop for Qemu {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Qemu {
    fn dial(&mut self) {
        let mut reader = BufReader::new(patiently(&self.base.with_extension("qmp")));
        let mut greeting = String::new();
        reader.read_line(&mut greeting).unwrap();
        assert!(greeting.contains("\"QMP\""), "{greeting}");
        self.qmp = Some(reader);
        self.ok("qmp_capabilities", json!({}));
    }

    /// Its answer to a command: `return` or `error`.
    pub fn call(&mut self, command: &str, arguments: Value) -> Value {
        let message = json!({"execute": command, "arguments": arguments});
        let stream = self.qmp.as_mut().expect("its monitor is connected").get_mut();
        stream.write_all(format!("{message}\n").as_bytes()).unwrap();
        loop {
            match self.hear() {
                Some(answer) => return answer,
                None => continue,
            }
        }
    }

    /// One message: an answer, or an event that is kept.
    fn hear(&mut self) -> Option<Value> {
        let reader = self.qmp.as_mut().expect("its monitor is connected");
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        let message: Value = serde_json::from_str(&line).expect("the monitor speaks JSON");
        match message["event"].as_str() {
            None => Some(message),
            Some("MIGRATION_PASS") => None,
            Some(event) => {
                let data = message.get("data").unwrap_or(&Value::Null);
                self.events.push(format!("{event} {data}"));
                None
            }
        }
    }

    /// The result of a command that must succeed.
    pub fn ok(&mut self, command: &str, arguments: Value) -> Value {
        let answer = self.call(command, arguments);
        answer.get("return").cloned().unwrap_or_else(|| panic!("{command}: {answer}"))
    }

    /// The text of the refusal of a command.
    pub fn refusal(&mut self, command: &str, arguments: Value) -> String {
        let answer = self.call(command, arguments);
        answer["error"]["desc"].as_str().unwrap_or_else(|| panic!("{command}: {answer}")).to_owned()
    }

    /// Waits for an event; gives all that came until then.
    pub fn until(&mut self, event: &str) -> Vec<String> {
        let begin = Instant::now();
        while !self.events.iter().any(|e| e.contains(event)) {
            assert!(begin.elapsed() < LONG, "no {event}; {:?}", self.events);
            // Events come between the answers.
            self.ok("query-status", json!({}));
            std::thread::sleep(Duration::from_millis(2));
        }
        std::mem::take(&mut self.events)
    }

    /// Waits until its migration has a status.
    pub fn reach(&mut self, status: &str) -> Value {
        let begin = Instant::now();
        loop {
            let now = self.ok("query-migrate", json!({}));
            if now["status"] == status {
                return now;
            }
            assert!(begin.elapsed() < LONG, "not {status} but {now}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits until its machine has a state.
    pub fn reach_state(&mut self, state: &str) {
        let begin = Instant::now();
        while self.ok("query-status", json!({}))["status"] != state {
            assert!(begin.elapsed() < LONG, "not {state}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Asks it to end. Its answer may get lost.
    pub fn quit(&mut self) {
        let mut reader = self.qmp.take().expect("its monitor is connected");
        reader.get_mut().write_all(b"{\"execute\": \"quit\"}").unwrap();
        let _ = std::io::copy(&mut reader, &mut std::io::sink());
    }

    /// Turns capabilities on.
    pub fn enable(&mut self, names: &[&str]) {
        let on = |name: &&str| json!({"capability": name, "state": true});
        let all: Vec<Value> = names.iter().map(on).collect();
        self.ok("migrate-set-capabilities", json!({"capabilities": all}));
    }

    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Waits for its end; its code and its last words.
    pub fn ended(&mut self) -> (Option<i32>, String) {
        let status = self.child.wait().unwrap();
        let words = std::io::read_to_string(self.child.stderr.take().unwrap()).unwrap();
        (status.code(), words)
    }

    /// The guest's second serial line.
    pub fn line(&self) -> Line {
        let stream = patiently(&self.base.with_extension("line"));
        stream.set_read_timeout(Some(LONG)).unwrap();
        Line { reader: BufReader::new(stream), written: 0, ticks: 0 }
    }
}

fn patiently(socket: &Path) -> UnixStream {
    let begin = Instant::now();
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return stream,
            Err(error) => assert!(begin.elapsed() < LONG, "{}: {error}", socket.display()),
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The host's end of the oracle's line.
pub struct Line {
    reader: BufReader<UnixStream>,
    /// The highest acknowledged write.
    pub written: u64,
    /// The newest tick.
    pub ticks: u64,
}

impl Line {
    pub fn tell(&mut self, command: &str) {
        self.reader.get_mut().write_all(format!("{command}\n").as_bytes()).unwrap();
    }

    /// Gives a command; its answer.
    pub fn ask(&mut self, command: &str) -> Report {
        self.tell(command);
        loop {
            match self.next() {
                Report::Written { .. } | Report::Tick { .. } | Report::Ready => {}
                answer => return answer,
            }
        }
    }

    fn next(&mut self) -> Report {
        let mut line = String::new();
        self.reader.read_line(&mut line).expect("the guest speaks");
        let report = line.parse().unwrap_or_else(|error| panic!("{error}"));
        match report {
            Report::Written { n, .. } => self.written = n,
            Report::Tick { n, .. } => self.ticks = n,
            _ => {}
        }
        report
    }

    /// Waits for so many writes that are done after this call.
    pub fn fresh(&mut self, writes: u64) {
        // What was said before the answer is old.
        assert_eq!(self.ask("ping"), Report::Pong);
        self.more(writes);
    }

    /// Waits for so many more acknowledged writes.
    pub fn more(&mut self, writes: u64) {
        let enough = self.written + writes;
        while self.written < enough {
            self.next();
        }
    }
}
