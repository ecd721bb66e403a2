//! A real QEMU without a guest, and a fake server that says what a test wants.

#![allow(dead_code, reason = "each test file uses its part")]

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::UnixStream,
};

/// Only ever passes when something hangs.
pub const LONG: Duration = Duration::from_secs(60);

/// The QEMU to test with: `GODWIT_QEMU`, or the one in the path.
pub fn qemu_binary() -> String {
    std::env::var("GODWIT_QEMU").unwrap_or_else(|_| "qemu-system-x86_64".into())
}

/// A stopped QEMU without devices; ends with its value.
pub struct Qemu {
    child: Child,
    pub socket: PathBuf,
    _folder: tempfile::TempDir,
}

impl Qemu {
    pub fn start(arguments: &[&str]) -> Self {
        Self::start_below(Path::new(""), arguments)
    }

    /// With its socket in `below`, a folder inside the test's own.
    pub fn start_below(below: &Path, arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let home = folder.path().join(below);
        std::fs::create_dir_all(&home).unwrap();
        let child = Command::new(qemu_binary())
            .args(["-nodefaults", "-display", "none", "-S"])
            .args(["-qmp", "unix:qmp.sock,server=on,wait=off"])
            .args(arguments)
            // A path relative to its folder is always short enough for QEMU itself.
            .current_dir(&home)
            .stdin(Stdio::null())
            .spawn()
            .expect("QEMU can be started; set GODWIT_QEMU if it is not in the path");
        Self { child, socket: home.join("qmp.sock"), _folder: folder }
    }

    pub async fn client(&self) -> qmp::Client {
        qmp::Client::connect(&self.socket, LONG).await.unwrap()
    }

    /// Stops QEMU's process (`STOP`) or lets it go on (`CONT`).
    pub fn signal(&self, signal: &str) {
        let kill = format!("kill -{signal} {}", self.child.id());
        assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The server's end of a connection.
pub struct Fake {
    stream: BufReader<UnixStream>,
}

impl Fake {
    /// A negotiated client and its fake server.
    pub async fn connect(options: qmp::Options) -> (qmp::Client, Self) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut fake = Self { stream: BufReader::new(theirs) };
        let (client, ()) = tokio::join!(qmp::Client::over(ours, "fake", options, LONG), async {
            fake.say(r#"{"QMP": {"version": {"qemu": {"micro": 0, "minor": 0, "major": 99}, "package": ""}, "capabilities": ["oob", "telepathy"]}}"#).await;
            assert!(fake.hear().await.contains("qmp_capabilities"));
            fake.say(r#"{"return": {}, "id": 1}"#).await;
        });
        (client.unwrap(), fake)
    }

    pub async fn say(&mut self, line: &str) {
        self.say_bytes(format!("{line}\r\n").as_bytes()).await;
    }

    pub async fn say_bytes(&mut self, bytes: &[u8]) {
        // The client may have closed already: some tests want that.
        let _ = self.stream.get_mut().write_all(bytes).await;
    }

    pub async fn hear(&mut self) -> String {
        let mut line = String::new();
        self.stream.read_line(&mut line).await.unwrap();
        line
    }

    pub fn hang_up(self) {}
}
