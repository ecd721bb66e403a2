//! `godwit move` and `godwit verify`: asks both launchers, and watches.

use crate::cli;
use crate::host::client;
use crate::view::{Output, View};
use anyhow::{Context, Result, bail};
use launcher::client::Client;
use launcher::migration::policy::Policy;
use launcher::migration::status::{Half, Outcome, Status};
use launcher::migration::ticket::{Here, Peer};
use launcher::migration::verify;
use launcher::migration::{PrepareRequest, SendRequest};
use launcher::spec::VmSpec;
use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

/// Status is asked for again after this, news or not.
const NEWS: Duration = Duration::from_secs(10);
/// The target settles this long after the source has let go.
const SETTLED: Duration = Duration::from_secs(30);

/// Moves a VM and shows it.
///
/// # Errors
/// When it cannot begin. A move that fails is an exit code.
pub async fn run(arguments: cli::Move) -> Result<ExitCode> {
    let way = &arguments.way;
    let (source, target) = (client(&way.from, &way.vm)?, client(&way.to, &way.vm)?);
    if arguments.resume {
        demand_resumable(&source).await?;
    }
    let spec = source.spec().await.context("the source cannot be asked")?;
    let spec = spec.with_context(|| format!("VM {} does not run at the source", way.vm))?;
    let policy = policy(&arguments);
    let migration = uuid::Uuid::new_v4().to_string();
    let request = PrepareRequest {
        migration: migration.clone(),
        from: peer_of(&way.from)?,
        known_as: None,
        spec: at_target(spec, way)?,
        left: BTreeMap::new(),
        policy: policy.clone(),
    };
    let ticket = target.prepare(&request).await.context("the target cannot be prepared")?;
    if let Err(error) = source.send(&SendRequest { ticket, policy }).await {
        // The target waits for nobody: tell it.
        let _ = target.cancel().await;
        return Err(error).context("the source cannot move the VM");
    }
    let outcome = watch(&source, &migration, way.output).await?;
    match &outcome {
        Outcome::Succeeded => settle(&target, &migration).await?,
        // N.B. nothing was copied: the two may never have met, and the target would wait on.
        Outcome::Failed { resumable: false, .. } if matches!(source.spec().await, Ok(Some(_))) => {
            let _ = target.cancel().await;
        }
        _ => {}
    }
    Ok(match outcome {
        Outcome::Succeeded => ExitCode::SUCCESS,
        Outcome::Cancelled => ExitCode::from(130),
        Outcome::Failed { .. } | Outcome::InDoubt { .. } => ExitCode::FAILURE,
    })
}

async fn demand_resumable(source: &Client) -> Result<()> {
    let last = source.status().await?.migration;
    match last.and_then(|migration| migration.outcome) {
        Some(Outcome::Failed { resumable: true, .. }) => Ok(()),
        _ => bail!("there is no failed move to go on with; leave --resume out to begin one"),
    }
}

fn policy(arguments: &cli::Move) -> Policy {
    let usual = Policy::default();
    let rounds = mover::rounds::Policy {
        downtime_ms: arguments.downtime,
        max_downtime_ms: arguments.max_downtime.max(arguments.downtime),
        throttle: !arguments.no_throttle,
        ..mover::rounds::Policy::default()
    };
    Policy {
        bandwidth: arguments.bandwidth,
        compression: arguments.compression.into(),
        rounds,
        disk_streams: arguments.streams,
        multifd: arguments.multifd.unwrap_or(usual.multifd),
        reconnect_seconds: arguments.reconnect,
        answer_seconds: arguments.patience,
        pause_seconds: arguments.patience,
        commit_seconds: arguments.patience,
        ..usual
    }
}

fn peer_of(host: &Path) -> Result<Peer> {
    let path = host.join("gateway.json");
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("cannot read {}; does its gateway run?", path.display()))?;
    let here: Here = serde_json::from_str(&text)?;
    Ok(here.peer)
}

/// The guest as it is to be at the target: its disks lie elsewhere.
fn at_target(mut spec: VmSpec, way: &cli::Way) -> Result<VmSpec> {
    let folder = std::path::absolute(&way.to)?.join("vms").join(&way.vm);
    for (name, _) in &way.disks {
        if !spec.disks.iter().any(|disk| disk.name == *name) {
            bail!("the VM has no disk '{name}'");
        }
    }
    for disk in spec.disks.iter_mut().filter(|d| !d.shared && !d.read_only) {
        let given = way.disks.iter().find(|(name, _)| *name == disk.name);
        disk.path = match given {
            Some((_, path)) => path.clone(),
            None => folder.join(format!("{}.raw", disk.name)),
        };
        disk.size = None;
    }
    Ok(spec)
}

/// Shows the move until it is over. Ctrl-C cancels it.
async fn watch(source: &Client, migration: &str, output: Output) -> Result<Outcome> {
    let mut view = View::new(output);
    let mut generation = 0;
    let mut interrupted = false;
    loop {
        let news = tokio::select! {
            news = source.status_after(generation, NEWS) => news,
            _ = tokio::signal::ctrl_c(), if !interrupted => {
                interrupted = true;
                eprintln!("cancelling ...");
                if let Err(error) = source.cancel().await {
                    eprintln!("{error}");
                }
                continue;
            }
        };
        let status =
            news.context("the source's launcher was lost; ask `godwit status` on both hosts")?;
        generation = status.generation;
        let Some(current) = status.migration.filter(|m| is(m, migration, Half::Source)) else {
            continue;
        };
        view.show(&current);
        match current.outcome {
            Some(Outcome::InDoubt { .. }) | None => {}
            Some(outcome) => return Ok(outcome),
        }
    }
}

fn is(status: &Status, migration: &str, half: Half) -> bool {
    status.migration == migration && status.half == half
}

/// Waits until the target has put everything in its place.
async fn settle(target: &Client, migration: &str) -> Result<()> {
    let mut generation = 0;
    let settled = tokio::time::timeout(SETTLED, async {
        loop {
            let status = target.status_after(generation, NEWS).await?;
            generation = status.generation;
            let ours = status.migration.filter(|m| is(m, migration, Half::Target));
            match ours.and_then(|m| m.outcome) {
                Some(Outcome::Succeeded) => return Ok(()),
                Some(Outcome::Failed { reason, .. }) => bail!(reason),
                _ => {}
            }
        }
    });
    settled.await.context("the target did not settle; ask `godwit status` there")?
}

/// Compares the disks that a VM left with those that it runs on.
///
/// # Errors
/// When they cannot be compared. Disks that differ are an exit code.
pub async fn verify(arguments: cli::Verify) -> Result<ExitCode> {
    let way = &arguments.way;
    let (left, running) = (client(&way.from, &way.vm)?, client(&way.to, &way.vm)?);
    let begin = verify::BeginRequest {
        migration: uuid::Uuid::new_v4().to_string(),
        from: peer_of(&way.from)?,
    };
    let ticket = running.verify_begin(&begin).await?;
    let request = verify::SendRequest { ticket, paths: way.disks.iter().cloned().collect() };
    let sent = left.verify_send(&request).await;
    // N.B. also after a failure: it ends the comparison there.
    let differing = sent.as_deref().unwrap_or_default().to_vec();
    let judged = running.verify_judge(&verify::JudgeRequest { differing, more: false }).await;
    sent?;
    let report = judged?;
    match way.output {
        Output::Json => println!("{}", serde_json::to_string(&report)?),
        Output::Text => {
            use crate::view::bytes;
            println!(
                "{} compared, {} changed by the guest since",
                bytes(report.compared),
                bytes(report.changed)
            );
            for wrong in &report.wrong {
                let extent = wrong.extent;
                println!("disk {}: {} bytes at {} differ", wrong.disk, extent.len, extent.offset);
            }
            println!("{}", if report.wrong.is_empty() { "disks verified" } else { "DISKS DIFFER" });
        }
    }
    Ok(if report.wrong.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
