//! One QEMU: its command line, its process, its QMP connection.

mod command;
mod process;

pub use command::{Facts, Mode, QMP, bitmap_node, raw_node, serial_socket, throttle_group};
pub use process::{Error, Exit, Process, shim, start_time};

use crate::spec::VmSpec;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The oldest QEMU that this was tried on.
const OLDEST: (u32, u32) = (7, 2);
/// QEMU opens its socket within milliseconds; a busy machine takes longer.
const START_DEADLINE: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(5);

/// How QEMU is run.
#[derive(Debug, Clone)]
pub struct Config {
    /// The program.
    pub program: PathBuf,
    /// A command that ends in [`shim`].
    pub shim: Vec<OsString>,
    /// The launcher's folder.
    pub folder: PathBuf,
}

impl Config {
    /// QEMU as the environment names it (`GODWIT_QEMU`), else by its usual name.
    pub fn from_environment(shim: Vec<OsString>, folder: &Path) -> Self {
        let program = std::env::var_os("GODWIT_QEMU").unwrap_or("qemu-system-x86_64".into());
        Self { program: program.into(), shim, folder: folder.into() }
    }
}

/// A QEMU that answers.
#[derive(Debug, Clone)]
pub struct Qemu {
    /// Its monitor.
    pub qmp: qmp::Client,
    /// Its process.
    pub process: Process,
    /// What it runs.
    pub spec: VmSpec,
}

impl Qemu {
    /// Starts QEMU for a spec; the guest does not run yet.
    ///
    /// # Errors
    /// [`Error`], with QEMU's last words.
    pub async fn start(
        config: &Config,
        spec: &VmSpec,
        facts: &[Facts],
        mode: Mode,
    ) -> Result<Self, Error> {
        let socket = config.folder.join(QMP);
        // The socket of an earlier QEMU would be taken for this one's.
        let _ = std::fs::remove_file(&socket);
        let arguments = command::arguments(spec, facts, mode);
        let process = Process::start(&config.shim, &config.program, &arguments, &config.folder)?;
        match connect(&socket, &process).await {
            Ok(qmp) => Ok(Self { qmp, process, spec: spec.clone() }),
            Err(error) => {
                process.kill().await;
                Err(error)
            }
        }
    }
}

async fn connect(socket: &Path, process: &Process) -> Result<qmp::Client, Error> {
    let until = tokio::time::Instant::now() + START_DEADLINE;
    loop {
        if let Some(exit) = process.exit() {
            return Err(Error::Ended { exit, words: process.last_words() });
        }
        let failed = match qmp::Client::connect(socket, qmp::Options::default()).await {
            Ok(client) => return check_version(client, process),
            Err(error) => error,
        };
        if tokio::time::Instant::now() > until {
            return Err(Error::Mute { why: failed.to_string(), words: process.last_words() });
        }
        tokio::time::sleep(POLL).await;
    }
}

fn check_version(client: qmp::Client, process: &Process) -> Result<qmp::Client, Error> {
    let version = &client.version().qemu;
    if (version.major, version.minor) >= OLDEST {
        return Ok(client);
    }
    let why = format!(
        "it is version {}.{}; Godwit needs {}.{} or later",
        version.major, version.minor, OLDEST.0, OLDEST.1
    );
    Err(Error::Mute { why, words: process.last_words() })
}
