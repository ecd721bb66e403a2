//! A person at a guest's console: `godwit console`, typed into and read.

use anyhow::{Context, Result, bail};
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// A guest answers within this time, on a busy machine too.
const SOON: Duration = Duration::from_secs(60);
/// A guest that boots is not silent for so long.
const QUIET: Duration = Duration::from_secs(15);
/// The prompt of the test guest's shell.
const PROMPT: &str = "guest# ";

/// A console; it is left with the test.
pub struct Terminal {
    process: Child,
    input: ChildStdin,
    output: Receiver<Vec<u8>>,
    /// All that was shown and not asked for yet.
    shown: String,
}

impl Terminal {
    /// Connects to a VM's console in the cluster of a kubeconfig.
    ///
    /// # Errors
    /// When it cannot be run.
    pub fn open(program: &str, kubeconfig: &Path, vm: &str) -> Result<Self> {
        let mut process = Command::new(program)
            .args(["console", vm, "--kubeconfig"])
            .arg(kubeconfig)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()?;
        let input = process.stdin.take().context("an input")?;
        let mut stdout = process.stdout.take().context("an output")?;
        let (send, output) = channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(read @ 1..) = stdout.read(&mut buffer) {
                if send.send(buffer[..read].to_vec()).is_err() {
                    return;
                }
            }
        });
        Ok(Self { process, input, output, shown: String::new() })
    }

    /// Waits until a text is shown; returns what came before it.
    ///
    /// # Errors
    /// What was shown instead.
    pub fn until(&mut self, text: &str) -> Result<String> {
        let until = Instant::now() + SOON;
        loop {
            if let Some(at) = self.shown.find(text) {
                let before = self.shown[..at].to_owned();
                self.shown.drain(..at + text.len());
                return Ok(before);
            }
            let left = until.saturating_duration_since(Instant::now());
            match self.output.recv_timeout(left) {
                Ok(bytes) => self.shown.push_str(&String::from_utf8_lossy(&bytes)),
                Err(RecvTimeoutError::Timeout) => {
                    bail!("{text:?} is not shown; shown is {:?}", self.shown)
                }
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("the console ended before {text:?} was shown: {:?}", self.shown)
                }
            }
        }
    }

    /// Waits for the shell's prompt, which a console shows to who comes late as well.
    ///
    /// N.B. nothing is typed as long as something is shown: a boot loader would take it for a wish to be asked.
    ///
    /// # Errors
    /// What was shown instead.
    pub fn wait_for_shell(&mut self) -> Result<()> {
        let began = Instant::now();
        while !self.shown.contains(PROMPT) && began.elapsed() < SOON {
            match self.output.recv_timeout(QUIET) {
                Ok(bytes) => self.shown.push_str(&String::from_utf8_lossy(&bytes)),
                // It has come by a move, and had shown its prompt before.
                Err(RecvTimeoutError::Timeout) => write!(self.input, "\r")?,
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        self.until(PROMPT).map(|_| ())
    }

    /// Runs a command in the guest's shell; returns what it printed.
    ///
    /// # Errors
    /// When the shell does not answer.
    pub fn run(&mut self, command: &str) -> Result<String> {
        // The echo of what is typed does not have the words that are waited for, and no earlier
        // command has them: a console shows those again.
        let mark = uuid::Uuid::new_v4().simple().to_string();
        write!(self.input, "echo be''gin-{mark}; {command}; echo e''nd-{mark}\r")?;
        self.until(&format!("begin-{mark}\r\n"))?;
        let printed = self.until(&format!("end-{mark}\r\n"))?;
        Ok(printed.replace("\r\n", "\n"))
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
