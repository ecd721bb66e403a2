//! A launcher's life: from taking its folder to leaving nothing behind.

use crate::spec::{VmSpec, is_name};
use crate::vm::{Config, Handle, Launcher};
use crate::{api, folder, migration, vm};
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// What a QEMU that hangs adds to the guest's grace.
const HANGS: Duration = Duration::from_secs(15);
/// A killed process is gone at once, unless its disk hangs.
const KILL: Duration = Duration::from_secs(5);
/// What waits for news of this launcher hears its last words within this time.
const FAREWELL: Duration = Duration::from_millis(50);

/// Why a launcher ended otherwise than by a signal.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No VM can have this name.
    #[error("'{0}' is no VM name: use 1 to 63 of a-z, 0-9, '-' and '.'")]
    Name(String),
    /// The spec is another VM's.
    #[error("the spec is that of VM {spec}, this launcher's is {vm}; give each its own")]
    OtherVm {
        /// The launcher's VM.
        vm: String,
        /// The spec's VM.
        spec: String,
    },
    /// The folder cannot be had.
    #[error(transparent)]
    Folder(#[from] folder::Error),
    /// A socket cannot be made.
    #[error("the launcher's sockets cannot be made")]
    Socket(#[from] channel::socket::Error),
    /// Signals cannot be received.
    #[error("the launcher cannot receive signals")]
    Signals(#[source] std::io::Error),
    /// The VM cannot be started.
    #[error("the VM cannot be started")]
    Start(#[source] vm::Error),
}

/// Runs a launcher until SIGTERM or SIGINT, and its VM at once if there is a spec. At the end the
/// guest may shut down; a second signal ends it at once. No process and no socket is left behind.
///
/// N.B. QEMU dies with the *thread* that started it: the runtime should be of one thread, or its
/// threads live as long as the process.
///
/// # Errors
/// [`Error`]; then nothing runs.
pub async fn run(config: Config, spec: Option<VmSpec>, forced: bool) -> Result<(), Error> {
    if !is_name(&config.vm) {
        return Err(Error::Name(config.vm));
    }
    if let Some(spec) = spec.as_ref().filter(|spec| spec.name != config.vm) {
        return Err(Error::OtherVm { vm: config.vm, spec: spec.name.clone() });
    }
    let held = folder::take(&config.host.join("vms").join(&config.vm))?;
    let launcher = Launcher::new(config);
    let ended = live(&launcher, spec, forced).await;
    held.sweep()?;
    ended
}

async fn live(launcher: &Handle, spec: Option<VmSpec>, forced: bool) -> Result<(), Error> {
    let mut ends = Ends::new().map_err(Error::Signals)?;
    let streams = migration::serve(launcher)?;
    let api = api::serve(launcher)?;
    let ended = tokio::select! {
        started = start(launcher, spec, forced) => match started {
            Ok(()) => {
                ends.wait().await;
                Ok(())
            }
            failed => failed,
        },
        // N.B. a start that is dropped takes its QEMU along.
        () = ends.wait() => Ok(()),
    };
    tracing::info!("the launcher ends");
    let grace = launcher.config.grace;
    tokio::select! {
        _ = tokio::time::timeout(grace + HANGS, launcher.close(grace)) => {}
        () = ends.wait() => {}
    }
    // Whatever is still here: a guest that was told twice, or a QEMU that hangs.
    if !matches!(tokio::time::timeout(KILL, launcher.kill()).await, Ok(Ok(()))) {
        tracing::warn!("QEMU could not be ended in order; it ends with this process");
    }
    tokio::time::sleep(FAREWELL).await;
    api.abort();
    streams.abort();
    ended
}

async fn start(launcher: &Handle, spec: Option<VmSpec>, forced: bool) -> Result<(), Error> {
    match spec {
        Some(spec) => {
            let begin = vm::Begin { forced, paused: false };
            launcher.start(spec, begin).await.map_err(Error::Start)
        }
        None => Ok(()),
    }
}

/// The signals that end a launcher.
struct Ends {
    terminate: Signal,
    interrupt: Signal,
}

impl Ends {
    fn new() -> std::io::Result<Self> {
        let terminate = signal(SignalKind::terminate())?;
        Ok(Self { terminate, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn wait(&mut self) {
        tokio::select! { _ = self.terminate.recv() => {}, _ = self.interrupt.recv() => {} }
    }
}
