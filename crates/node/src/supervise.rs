//! The parent of a container's process: it keeps its log, passes signals on, leaves nothing of it
//! behind, and writes down how it ended. It goes on when the agent that started it does not.

use crate::agent::record::{Exit, Files, Process, Run, Started};
use crate::logs::{Stream, Writer};
use jiff::Timestamp;
use rustix::process::{Pid, Signal, WaitOptions};
use std::io::{self, Read};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::{Child, Command};
use tokio::signal::unix::{Signal as Signals, SignalKind, signal};
use tokio::task::JoinSet;

/// The hidden command of a program that contains this: `PROGRAM pod-process FOLDER ATTEMPT`.
pub const COMMAND: &str = "pod-process";
/// The signal that asks for an end without grace.
pub const KILL: Signal = Signal::USR1;
/// The rest of a log is read for as long as this after the end: others may hold the pipe.
const REST: Duration = Duration::from_secs(1);
/// Of a termination message, as Kubernetes keeps it.
const MESSAGE: u64 = 4096;
const PIECE: usize = 16 << 10;

/// Runs a container until it ends.
///
/// # Errors
/// When nothing can be run or written down.
pub fn supervise(folder: &Path, attempt: u32) -> io::Result<()> {
    let files = Files { folder: folder.to_owned(), attempt };
    let run = files.run().ok_or_else(|| {
        let text = format!("{} has no run {attempt} to supervise", folder.display());
        io::Error::new(io::ErrorKind::InvalidInput, text)
    })?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        // Whoever learns who runs it may send these at once.
        let asked = (signal(SignalKind::terminate())?, signal(SignalKind::user_defined1())?);
        let exit = match begin(&files, &run)? {
            Ok(child) => attend(&files, &run, child, asked).await?,
            Err(error) => Exit {
                code: 128,
                signal: None,
                reason: "StartError".into(),
                message: format!("cannot run {}: {error}", run.program.display()),
                at: Timestamp::now(),
            },
        };
        files.write_exit(&exit)
    })
}

/// Takes the run, and starts its process: the inner error is the container's own.
fn begin(files: &Files, run: &Run) -> io::Result<io::Result<Child>> {
    // What a container leaves behind becomes ours, so that it can be ended.
    rustix::process::set_child_subreaper(rustix::process::getpid().into())?;
    files.claim(&Started { by: Process::own(), at: Timestamp::now() })?;
    let spawned = Command::new(&run.program)
        .args(&run.arguments)
        .env_clear()
        .envs(run.environment.iter().map(|(name, value)| (name, value)))
        .current_dir(&run.directory)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        // Without somebody to look after it, it does not run.
        .kill_on_drop(true)
        .spawn();
    let Ok(child) = spawned else { return Ok(spawned) };
    if let Some(process) = child.id().and_then(|id| Process::of(i32::try_from(id).ok()?)) {
        files.write_child(process)?;
    }
    Ok(Ok(child))
}

async fn attend(
    files: &Files,
    run: &Run,
    mut child: Child,
    (mut term, mut kill): (Signals, Signals),
) -> io::Result<Exit> {
    let log = Arc::new(Mutex::new(Writer::create(files.log())?));
    let mut readers = JoinSet::new();
    if let Some(out) = child.stdout.take() {
        readers.spawn(copy(out, Stream::Out, Arc::clone(&log)));
    }
    if let Some(err) = child.stderr.take() {
        readers.spawn(copy(err, Stream::Err, Arc::clone(&log)));
    }
    let pid = child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?));
    let status = loop {
        let (signal, group) = tokio::select! {
            status = child.wait() => break status?,
            _ = term.recv() => (Signal::TERM, false),
            _ = kill.recv() => (Signal::KILL, true),
        };
        // It may have ended just now.
        if let Some(pid) = pid {
            let _ = match group {
                true => rustix::process::kill_process_group(pid, signal),
                false => rustix::process::kill_process(pid, signal),
            };
        }
    };
    end_all();
    let all_read = async { while readers.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(REST, all_read).await;
    Ok(exit(run, status, &files.log()))
}

async fn copy(mut from: impl AsyncRead + Unpin, stream: Stream, log: Arc<Mutex<Writer>>) {
    let mut piece = vec![0; PIECE];
    while let Ok(n @ 1..) = from.read(&mut piece).await {
        // A full disk costs lines, and is no reason to hold the container up.
        if let Ok(mut log) = log.lock() {
            let _ = log.write(stream, &piece[..n], Timestamp::now());
        }
    }
    if let Ok(mut log) = log.lock() {
        let _ = log.finish(stream, Timestamp::now());
    }
}

/// Ends all that the container left behind.
fn end_all() {
    let own = std::process::id().to_string();
    let is_child = |pid: i32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let rest = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
        rest.split(' ').nth(1) == Some(&*own)
    };
    // What cannot be ended even so is stuck in the kernel.
    for _ in 0..1000 {
        let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        let left: Vec<Pid> = pids.filter(|pid| is_child(*pid)).filter_map(Pid::from_raw).collect();
        for pid in &left {
            let _ = rustix::process::kill_process(*pid, Signal::KILL);
        }
        // What they leave behind in turn becomes ours.
        while let Ok(Some(_)) = rustix::process::wait(WaitOptions::NOHANG) {}
        if left.is_empty() {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn exit(run: &Run, status: ExitStatus, log: &Path) -> Exit {
    let signal = status.signal();
    let code = status.code().unwrap_or_else(|| 128 + signal.unwrap_or(0));
    let (file, from_log) = &run.message;
    let mut message = tail(file, MESSAGE);
    if message.is_empty() && *from_log && code != 0 {
        message = tail(log, MESSAGE / 2);
    }
    let reason = if code == 0 { "Completed" } else { "Error" }.into();
    Exit { code, signal, reason, message, at: Timestamp::now() }
}

/// The end of a file, or nothing.
fn tail(path: &Path, most: u64) -> String {
    let read = || {
        let mut file = std::fs::File::open(path)?;
        let size = file.metadata()?.len();
        io::Seek::seek(&mut file, io::SeekFrom::Start(size.saturating_sub(most)))?;
        let mut bytes = Vec::new();
        file.take(most).read_to_end(&mut bytes)?;
        io::Result::Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    read().unwrap_or_default()
}
