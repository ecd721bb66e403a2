//! One QEMU: its command line, its process, its QMP connection.

mod command;
mod log;
mod process;

pub use command::{Facts, Mode, QMP, bitmap_node, raw_node, serial_socket, throttle_group};
pub use process::{Error, Exit, Process, pid_namespace, shim, start_time};

use crate::folder;
use crate::spec::VmSpec;
use qmp::commands::{MachineInfo, QueryMachines};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The oldest QEMU that this was tried on.
const OLDEST: (u32, u32) = (7, 2);
/// QEMU answers within milliseconds; a busy machine takes longer.
const START_DEADLINE: Duration = Duration::from_secs(30);
/// A connection that breaks is most often followed by QEMU's end.
const END_DEADLINE: Duration = Duration::from_secs(2);

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
    /// What it runs, with the machine type by its full name.
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
        // The socket of an earlier QEMU would be taken for this one's.
        folder::remove(&config.folder, QMP)?;
        let arguments = command::arguments(spec, facts, mode);
        let process = Process::start(config, &arguments)?;
        let started = async {
            let qmp = connect(&config.folder.join(QMP), &process).await?;
            Ok::<_, Error>((spec_in(&qmp, spec).await?, qmp))
        };
        match started.await {
            Ok((spec, qmp)) => Ok(Self { qmp, process, spec }),
            Err(error) => {
                process.kill().await;
                Err(unknown_machine(error, &process, spec))
            }
        }
    }
}

/// The spec with the machine type that QEMU took an alias for: what the guest is from now on, and
/// what any QEMU has to know to which it moves. The same alias means another machine there.
async fn spec_in(qmp: &qmp::Client, spec: &VmSpec) -> Result<VmSpec, Error> {
    let mut spec = spec.clone();
    if spec.has_machine_alias() {
        let known = qmp.execute(QueryMachines, START_DEADLINE).await.map_err(Error::Machines)?;
        let is_meant = |known: &MachineInfo| known.alias.as_ref() == Some(&spec.machine);
        if let Some(meant) = known.into_iter().find(is_meant) {
            spec.machine = meant.name;
        }
    }
    Ok(spec)
}

/// Says in our words what QEMU says in its own, which name neither the machine type nor a remedy.
fn unknown_machine(error: Error, process: &Process, spec: &VmSpec) -> Error {
    match error {
        Error::Ended { words, .. } if words.contains("unsupported machine type") => {
            let program = process.program().display().to_string();
            Error::Machine { program, machine: spec.machine.clone() }
        }
        other => other,
    }
}

/// N.B. only a connection that was negotiated proves a start: QEMU listens
/// before it has opened its disks, and ends if it cannot.
async fn connect(socket: &Path, process: &Process) -> Result<qmp::Client, Error> {
    let connected = tokio::select! {
        connected = qmp::Client::connect(socket, START_DEADLINE) => connected,
        exit = process.ended() => return Err(ended(process, exit)),
    };
    match connected {
        Ok(client) => check_version(client, process),
        Err(source) => match tokio::time::timeout(END_DEADLINE, process.ended()).await {
            Ok(exit) => Err(ended(process, exit)),
            Err(_) => Err(Error::Mute { words: process.last_words(), source }),
        },
    }
}

fn ended(process: &Process, exit: Exit) -> Error {
    Error::Ended { exit, words: process.last_words() }
}

fn check_version(client: qmp::Client, process: &Process) -> Result<qmp::Client, Error> {
    let version = client.version().qemu;
    if (version.major, version.minor) >= OLDEST {
        return Ok(client);
    }
    Err(Error::Old {
        program: process.program().display().to_string(),
        version: client.version().to_string(),
        oldest: format!("{}.{}", OLDEST.0, OLDEST.1),
    })
}
