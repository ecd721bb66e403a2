//! Real servers, and a fake one that says what a test wants.

#![allow(dead_code, reason = "each test file uses its part")]

pub mod fake;

use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use nbd::{Client, Options};
use tempfile::TempDir;

/// Only ever passes when something hangs.
pub const LONG: Duration = Duration::from_secs(60);
/// More extents than any of these tests has.
pub const PLENTY: usize = 10_000;

/// A process that ends with its value.
pub struct Process(Child);

impl Process {
    pub fn start(program: &str, arguments: &[&str], folder: &Path) -> Self {
        let child = Command::new(program)
            .args(arguments)
            .current_dir(folder)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("{program} can be started: {error}"));
        Self(child)
    }

    /// Stops it (`STOP`) or lets it go on (`CONT`).
    pub fn signal(&self, signal: &str) {
        run("sh", &["-c", &format!("kill -{signal} {}", self.0.id())], Path::new("/"));
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs a program to its end.
pub fn run(program: &str, arguments: &[&str], folder: &Path) {
    let output = Command::new(program).args(arguments).current_dir(folder).output();
    let output = output.unwrap_or_else(|error| panic!("{program} can be started: {error}"));
    assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
}

/// A `qemu-nbd` and the folder that it runs in.
pub struct QemuNbd {
    pub process: Process,
    pub socket: PathBuf,
    _folder: TempDir,
}

impl QemuNbd {
    pub fn start(folder: TempDir, arguments: &[&str]) -> Self {
        let socket = folder.path().join("nbd.sock");
        let mut all = vec!["--persistent", "--socket", socket.to_str().unwrap()];
        all.extend(arguments);
        let process = Process::start("qemu-nbd", &all, folder.path());
        Self { process, socket, _folder: folder }
    }

    pub async fn client(&self, options: Options) -> Client {
        self.connect(options, LONG).await.unwrap()
    }

    /// Connects once it listens.
    pub async fn connect(
        &self,
        options: Options,
        deadline: Duration,
    ) -> Result<Client, nbd::connect::Error> {
        let listening = async {
            loop {
                match Client::connect(&self.socket, options.clone(), deadline).await {
                    Err(nbd::connect::Error::Socket { .. }) => {
                        tokio::time::sleep(Duration::from_millis(10)).await;
                    }
                    result => return result,
                }
            }
        };
        tokio::time::timeout(LONG, listening).await.expect("qemu-nbd listens")
    }
}

/// A raw image: `(offset, len)` written with bytes that tell where they are, the rest holes.
pub fn raw_image(path: &Path, size: u64, written: &[(u64, u64)]) -> Vec<u8> {
    let file = File::create(path).unwrap();
    file.set_len(size).unwrap();
    let mut content = vec![0; usize::try_from(size).unwrap()];
    for &(offset, len) in written {
        let range = offset as usize..(offset + len) as usize;
        for (index, byte) in content[range.clone()].iter_mut().enumerate() {
            *byte = (offset as usize + index).to_le_bytes()[index % 3] | 1;
        }
        file.write_all_at(&content[range], offset).unwrap();
    }
    content
}
