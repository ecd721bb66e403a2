//! A stub of QEMU 7.2: started in its place, it speaks QMP and NBD over real
//! sockets and real files, and has a guest of its own that finds its own lost
//! writes and lost memory. Hundreds of moves run in seconds.
//!
//! It refuses what QEMU refuses, in QEMU's words: a launcher that gets along
//! with the stub gets along with QEMU. `tests` holds one conversation with both.
//!
//! ```text
//!           cli --> machine <-- qmp, commands      schema: what QMP consists of
//!                      |
//!       +--------+-----+------+----------+
//!     block    export     migration    guest       the oracle's blocks, counters
//!   nodes over   nbd     source, target  |         and commands on one vCPU thread
//!  real files,                        chardev      serial lines
//!    bitmaps
//! ```
//!
//! Environment:
//! - `STUB_QEMU_RUN_LOCK=FILE`: every instance holds a lock on FILE while its
//!   guest runs; one that cannot have it writes a line to `FILE.violation`.
//! - `STUB_QEMU_MULTIFD_STUCK=1`: with multifd a target that dies in
//!   pre-switchover always leaves the source stuck at `failed` (QEMU does so in
//!   about one run of 15).
//! - `STUB_QEMU_MEMORY_MIB=N`: the most memory that a guest really has; `-m` asks
//!   for less or is cut to it. Default 8.
//!
//! Where it is not QEMU:
//! - Its memory moves in a format of its own, over `unix:` only: a stub moves to
//!   a stub. Other capabilities than `events`, `multifd`, `return-path`,
//!   `pause-before-switchover` and `late-block-activate` are kept and do nothing.
//! - A reader's and a shared disk's image locks are `flock`s, which a real QEMU does
//!   not see. A writer takes a `flock` too.
//! - Nodes are `file`, `host_device`, `raw` (with `size`, without `offset`) and
//!   `throttle`; only raw nodes are reopened with new options. Exports are read
//!   only, over NBD on Unix sockets. Nothing is plugged or unplugged, no jobs.
//! - Unknown options of the command line are skipped; there are no NICs.
//! - `human-monitor-command` knows `qemu-io -d DEVICE "write OFFSET LENGTH"`.

mod bitmap;
mod block;
mod chardev;
mod cli;
mod commands;
mod error;
mod export;
mod guest;
mod machine;
mod migration;
mod nbd;
mod qmp;
mod schema;
mod throttle;

#[cfg(test)]
mod tests;

use block::Graph;
use chardev::{Backend, Chardev};
use cli::{Config, Part};
use machine::{Parts, Qemu};
use schema::Schema;
use std::os::unix::net::UnixListener;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};

/// The most memory that a guest really has, in MiB, unless the environment says otherwise.
const MEMORY: u64 = 8;

/// Locks. N.B. a thread that panics ends the process: no lock is ever poisoned.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs the stub with these arguments until it ends.
pub fn main(arguments: Vec<String>) -> ExitCode {
    // As an assertion of QEMU's: one thread's fault is everybody's end.
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        std::process::abort();
    }));
    let fail = |error: String| {
        eprintln!("stub-qemu: {error}");
        ExitCode::FAILURE
    };
    let config = match cli::parse(arguments) {
        Ok(config) => config,
        Err(error) => return fail(error),
    };
    if config.version {
        println!("QEMU emulator version 7.2.22 (stub)");
        return ExitCode::SUCCESS;
    }
    match start(config) {
        Ok((qemu, ends)) => live(&qemu, &ends),
        Err(error) => fail(error),
    }
}

/// Every chardev that something refers to must exist.
fn check_chardevs(config: &Config) -> Result<(), String> {
    let missing = |id: &&String| !config.chardevs.contains_key(*id);
    if let Some(id) = config.monitors.iter().find(missing) {
        return Err(format!("-mon chardev={id},mode=control: chardev \"{id}\" not found"));
    }
    match config.serials.iter().flatten().find(missing) {
        Some(id) => Err(format!("Property 'isa-serial.chardev' can't find value '{id}'")),
        None => Ok(()),
    }
}

/// Builds the machine and lets it go.
fn start(config: Config) -> Result<(Arc<Qemu>, mpsc::Receiver<()>), String> {
    check_chardevs(&config)?;
    let graph = Arc::new(Mutex::new(graph(&config)?));
    let most = std::env::var("STUB_QEMU_MEMORY_MIB").ok().and_then(|mib| mib.parse().ok());
    let memory = (config.memory >> 10).clamp(1, most.unwrap_or(MEMORY));
    let (shut_down, ends) = mpsc::channel();
    let parts = guest::Parts { memory, graph: graph.clone(), shut_down };
    let guest = guest::Handle::start(parts);
    let mut devices = Vec::new();
    let mut monitors = Vec::new();
    let mut sockets = Vec::new();
    for (id, backend) in &config.chardevs {
        let fail = |error| format!("-chardev {id}: {error}");
        if let Backend::Listen(path) = backend {
            sockets.push(path.clone());
        }
        match backend {
            Backend::Listen(path) if config.monitors.contains(id) => {
                monitors.push(chardev::listen(path).map_err(fail)?);
            }
            backend => {
                devices.push((id.clone(), serial(&config, id, backend, &guest).map_err(fail)?))
            }
        }
    }
    if let Some(path) = &config.pidfile {
        let pid = format!("{}\n", std::process::id());
        std::fs::write(path, pid).map_err(|error| format!("cannot create PID file: {error}"))?;
    }
    let port = |index: usize| {
        let id = config.serials.get(index)?.as_ref()?;
        devices.iter().find(|(other, _)| other == id).map(|(_, device)| device.clone())
    };
    let (console, line) = (port(0).unwrap_or_default(), port(1).unwrap_or_default());
    let described = |(id, backend): (&String, &Backend)| (id.clone(), commands::describe(backend));
    let qemu = Arc::new(Qemu::new(Parts {
        graph,
        guest,
        asked_memory: config.memory,
        memory,
        cpus: config.cpus,
        no_shutdown: config.no_shutdown,
        chardevs: config.chardevs.iter().map(described).collect(),
        sockets,
        autostart: !config.stopped,
        incoming: config.incoming.is_some(),
    }));
    qemu.connect_serials(console, line);
    begin(&qemu, &config, monitors)?;
    Ok((qemu, ends))
}

/// The second port's peer is heard by the guest.
fn serial(
    config: &Config,
    id: &String,
    backend: &Backend,
    guest: &guest::Handle,
) -> Result<Chardev, error::Error> {
    let is_line = config.serials.get(1).is_some_and(|port| port.as_ref() == Some(id));
    let guest = guest.clone();
    let sink = move |bytes: &[u8]| {
        if is_line {
            let bytes = bytes.to_vec();
            guest.post(move |guest| guest.hear(&bytes));
        }
    };
    Chardev::open(backend, Box::new(sink))
}

fn graph(config: &Config) -> Result<Graph, String> {
    let (mut graph, schema) = (Graph::default(), Schema::load());
    for part in &config.parts {
        match part {
            Part::Group { id, limits, source } => {
                graph.add_group(id, limits.as_ref()).map_err(|e| format!("{source}: {e}"))?;
            }
            Part::Node { options, source } => {
                let json = source.contains('{');
                // N.B. the other syntax has text for numbers and flags.
                let checked = if json { schema.check("blockdev-add", options) } else { Ok(()) };
                let added = checked.and_then(|()| graph.add(options));
                added.map_err(|e| format!("{source}: {e}"))?;
            }
        }
    }
    for disk in &config.disks {
        let fail = |e| format!("{}: {e}", disk.source);
        graph.attach(&disk.id, &disk.node, disk.share).map_err(fail)?;
    }
    if config.incoming.is_none()
        && let Err(error) = graph.activate()
    {
        let source = config.disks.iter().map(|disk| disk.source.as_str()).next();
        let image = config.disks.iter().filter_map(|disk| graph.image(&disk.node)).next();
        let path = image.map_or("", |image| &image.path);
        return Err(format!(
            "{}: {error}\nIs another process using the image [{path}]?",
            source.unwrap_or_default()
        ));
    }
    Ok(graph)
}

fn begin(qemu: &Arc<Qemu>, config: &Config, monitors: Vec<UnixListener>) -> Result<(), String> {
    {
        let machine = &mut *qemu.lock();
        match config.incoming.as_deref() {
            None if config.stopped => {}
            None => qemu.start(machine),
            Some("defer") => {}
            Some(uri) => migration::target::begin(qemu, machine, uri)
                .map_err(|error| format!("-incoming {uri}: {error}"))?,
        }
    }
    for monitor in monitors {
        qmp::serve(qemu.clone(), monitor);
    }
    Ok(())
}

/// Waits for the guest's own end, or a signal that asks for it.
fn live(qemu: &Arc<Qemu>, ends: &mpsc::Receiver<()>) -> ExitCode {
    let signalled = qemu.clone();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build();
        let runtime = runtime.expect("a runtime without timers and threads");
        runtime.block_on(async {
            use tokio::signal::unix::{SignalKind, signal};
            let mut terminate = signal(SignalKind::terminate()).expect("a handler");
            terminate.recv().await;
        });
        let _machine = signalled.lock();
        eprintln!("stub-qemu: terminating on signal 15");
        signalled.quit("host-signal")
    });
    while ends.recv().is_ok() {
        qemu.guest_shut_down();
    }
    ExitCode::FAILURE
}
