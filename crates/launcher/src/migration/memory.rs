//! The guest's memory on its way: QEMU's own migration, through resumable streams.
//!
//! Source: QEMU connects to the launcher's `memory.sock`, its main channel
//! first. Target: the launcher connects to QEMU's `incoming.sock`, stream 0
//! first, because QEMU 7.2 takes the first connection for the main channel.

use super::links::Links;
use super::policy::Policy;
use crate::qemu::Qemu;
use crate::vm::QMP_DEADLINE;
use channel::resumable::{self, Error, LinkError, Links as _};
use mover::codec::Compression;
use qmp::commands::{
    AnnounceSelf, BlockExportAdd, Cont, ExportType, Migrate, MigrateCancel, MigrateContinue,
    MigrateIncoming, MigrateSetCapabilities, MigrateSetParameters, MigrationCapability,
    MigrationCapabilityStatus, MigrationInfo, MigrationParameters, MigrationStatus,
    MultifdCompression, NbdAddress, NbdServerStart, NbdServerStop, QueryMigrate, QueryStatus,
    RunState,
};
use std::path::Path;
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

/// Source's socket for QEMU, in the launcher's folder.
pub const OUTGOING: &str = "memory.sock";
/// QEMU's socket at the target, in the launcher's folder.
pub const INCOMING: &str = "incoming.sock";
/// QEMU's status is asked this often where its events do not tell.
const POLL: Duration = Duration::from_millis(20);
/// Between two tries to bring back a guest that stands still.
const RETRY: Duration = Duration::from_millis(5);
/// QEMU's own limit on its bandwidth is out of the way where there is none.
const NO_LIMIT: u64 = 64 << 30;

/// QEMU's socket for exports, in its folder.
const EXPORTS: &str = "nbd.sock";

/// What both sides set before a migration.
#[derive(Debug, Clone, Copy, Default)]
pub struct Setup {
    /// Additional channels; 0 is none.
    pub multifd: u8,
    /// Whether memory is compressed, which only additional channels do.
    pub zstd: bool,
    /// Whether a guest that cannot be caught is slowed down.
    pub converge: bool,
    /// The pause to aim at.
    pub downtime: Duration,
    /// Bytes per second that are let through.
    pub bandwidth: Option<u64>,
}

/// Prepares QEMU for a migration.
///
/// # Errors
/// QEMU's refusal.
pub async fn set_up(qemu: &Qemu, setup: Setup) -> Result<(), qmp::Error> {
    let Setup { multifd, zstd, converge, downtime, bandwidth } = setup;
    let on = |capability, state| MigrationCapabilityStatus { capability, state };
    let capabilities = vec![
        on(MigrationCapability::PauseBeforeSwitchover, true),
        on(MigrationCapability::LateBlockActivate, true),
        on(MigrationCapability::Events, true),
        on(MigrationCapability::Multifd, multifd > 0),
        on(MigrationCapability::AutoConverge, converge),
    ];
    qemu.qmp.execute(MigrateSetCapabilities { capabilities }, QMP_DEADLINE).await?;
    let parameters = MigrationParameters {
        // QEMU reckons with what it thinks the link carries: it is told what we let through.
        max_bandwidth: Some(bandwidth.unwrap_or(NO_LIMIT)),
        downtime_limit: Some(millis(downtime)),
        multifd_channels: (multifd > 0).then_some(multifd),
        multifd_compression: (multifd > 0).then_some(match zstd {
            true => MultifdCompression::Zstd,
            false => MultifdCompression::None,
        }),
        // QEMU would announce the guest when its state is loaded, before it runs.
        announce_rounds: Some(0),
        ..MigrationParameters::default()
    };
    qemu.qmp.execute(MigrateSetParameters(parameters), QMP_DEADLINE).await?;
    Ok(())
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX).max(1)
}

/// Puts back what [`set_up`] changed.
///
/// # Errors
/// QEMU's refusal.
pub async fn reset(qemu: &Qemu) -> Result<(), qmp::Error> {
    let off = |capability| MigrationCapabilityStatus { capability, state: false };
    let capabilities = vec![
        off(MigrationCapability::PauseBeforeSwitchover),
        off(MigrationCapability::LateBlockActivate),
        off(MigrationCapability::Events),
        off(MigrationCapability::Multifd),
        off(MigrationCapability::AutoConverge),
    ];
    qemu.qmp.execute(MigrateSetCapabilities { capabilities }, QMP_DEADLINE).await?;
    Ok(())
}

/// The streams between one QEMU and the other launcher.
#[derive(Debug, Default)]
pub struct Pumps {
    tasks: JoinSet<Result<(), Error>>,
}

impl Pumps {
    /// Takes QEMU's connections as they come and carries each over the next of `ways`.
    /// QEMU never sees one break: see `shield`.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub fn outgoing(
        &mut self,
        folder: &Path,
        ways: Vec<(Links, resumable::Config)>,
    ) -> Result<(), channel::socket::Error> {
        let listener = channel::socket::bind_beneath(folder, OUTGOING)?;
        self.tasks.spawn(async move {
            let mut streams = JoinSet::new();
            for (links, config) in ways {
                tokio::select! {
                    accepted = listener.accept() => {
                        let (qemu, _) = accepted.map_err(local)?;
                        let (qemu, carried) = shield(qemu).map_err(local)?;
                        streams.spawn(async move {
                            let ended = resumable::run(qemu, links, config).await;
                            drop(carried);
                            ended
                        });
                    }
                    Some(ended) = streams.join_next(), if !streams.is_empty() => {
                        ended.map_err(local)??;
                        return Err(local("QEMU closed a memory stream"));
                    }
                }
            }
            drain(streams).await
        });
        Ok(())
    }

    /// Carries each of `ways` to QEMU's incoming socket, the first of them first.
    pub fn incoming(
        &mut self,
        folder: &Path,
        ways: Vec<(Links, resumable::Config)>,
        stale_page: Option<u64>,
    ) {
        let folder = folder.to_owned();
        let (main, connected) = watch::channel(false);
        self.tasks.spawn(async move {
            let mut streams = JoinSet::new();
            for (n, (mut links, config)) in ways.into_iter().enumerate() {
                let (folder, main) = (folder.clone(), main.clone());
                let mut connected = connected.clone();
                streams.spawn(async move {
                    // QEMU hears of a stream when the source opens it, not before.
                    let first = links.next().await.map_err(|e| Error::Refused(e.to_string()))?;
                    if n > 0 {
                        // The main channel stands, or all is over.
                        let _ = connected.wait_for(|main| *main).await;
                    }
                    let qemu = channel::socket::connect_beneath(&folder, INCOMING).await;
                    let qemu = qemu.map_err(local)?;
                    main.send_replace(true);
                    let qemu = spoiled(qemu, stale_page).map_err(local)?;
                    resumable::run(qemu, Resumed { first: Some(first), links }, config).await
                });
            }
            drain(streams).await
        });
    }

    /// Waits for the first stream that fails; for ever when none does.
    pub async fn failed(&mut self) -> Error {
        while let Some(ended) = self.tasks.join_next().await {
            match ended {
                Ok(Ok(())) => {}
                Ok(Err(error)) => return error,
                Err(error) => return local(error),
            }
        }
        std::future::pending().await
    }

    /// Ends all streams.
    pub fn end(&mut self) {
        self.tasks.abort_all();
    }
}

/// Takes what QEMU sends once nobody carries it any more, and throws it away until QEMU closes the
/// connection. Returns the connection, and what to keep for as long as it is carried.
///
/// N.B. QEMU must not see a stream break. Before 8.2 that can stop it for good, with the guest in
/// it, when it happens while the rest is sent over `multifd`; later ones can stick in
/// `finish-migrate`. So it believes that all goes well until [`bring_back`] cancels, or resumes
/// what it takes for completed.
fn shield(qemu: UnixStream) -> std::io::Result<(UnixStream, oneshot::Sender<()>)> {
    let qemu = qemu.into_std()?;
    let mut spare = UnixStream::from_std(qemu.try_clone()?)?;
    let (carried, uncarried) = oneshot::channel::<()>();
    tokio::spawn(async move {
        // Its sender is dropped, however the stream ends.
        let _ = uncarried.await;
        // QEMU's end of the connection comes with its end of the migration, or its own.
        let _ = tokio::io::copy(&mut spare, &mut tokio::io::sink()).await;
    });
    Ok((UnixStream::from_std(qemu)?, carried))
}

async fn drain(mut streams: JoinSet<Result<resumable::Summary, Error>>) -> Result<(), Error> {
    while let Some(ended) = streams.join_next().await {
        ended.map_err(local)??;
    }
    Ok(())
}

fn local(error: impl std::fmt::Display) -> Error {
    Error::Local(error.to_string())
}

/// Links of which the first has come already.
struct Resumed {
    first: Option<UnixStream>,
    links: Links,
}

impl resumable::Links for Resumed {
    type Link = UnixStream;

    async fn next(&mut self) -> Result<UnixStream, LinkError> {
        match self.first.take() {
            Some(first) => Ok(first),
            None => self.links.next().await,
        }
    }
}

/// QEMU's connection, behind a fault if one is put in.
fn spoiled(qemu: UnixStream, stale_page: Option<u64>) -> std::io::Result<UnixStream> {
    let Some(number) = stale_page else { return Ok(qemu) };
    let (near, far) = UnixStream::pair()?;
    tokio::spawn(async move {
        let (mut from_source, mut to_source) = far.into_split();
        let (mut from_qemu, mut to_qemu) = qemu.into_split();
        let there = super::fault::stale_page(&mut from_source, &mut to_qemu, number);
        let back = tokio::io::copy(&mut from_qemu, &mut to_source);
        // A broken stream shows at its other end.
        let _ = tokio::join!(there, back);
    });
    Ok(near)
}

/// Has the target's QEMU listen for the memory.
///
/// # Errors
/// QEMU's refusal.
pub async fn listen(qemu: &Qemu) -> Result<(), qmp::Error> {
    let uri = format!("unix:{INCOMING}");
    qemu.qmp.execute(MigrateIncoming { uri }, QMP_DEADLINE).await?;
    Ok(())
}

/// QEMU's view of the migration.
///
/// # Errors
/// QEMU's refusal.
pub async fn look(qemu: &Qemu) -> Result<MigrationInfo, qmp::Error> {
    qemu.qmp.execute(QueryMigrate, QMP_DEADLINE).await
}

/// Waits for QEMU's next word, and not longer than it takes to ask it.
async fn stir(events: &mut qmp::event::Events) {
    // Events that were missed are a reason to ask; those of a closed connection are not.
    let _ = timeout(POLL, async {
        if let Err(qmp::event::Error::Closed(_)) = events.next().await {
            std::future::pending::<()>().await;
        }
    })
    .await;
}

/// Waits until the target's QEMU says that everything is loaded.
///
/// # Errors
/// Why it will not be.
pub async fn loaded(qemu: &Qemu) -> Result<(), String> {
    let mut events = qemu.qmp.events();
    loop {
        let info = look(qemu).await.map_err(|e| e.to_string())?;
        match info.status {
            Some(MigrationStatus::Completed) => return Ok(()),
            Some(MigrationStatus::Failed) => {
                return Err(info.error_desc.unwrap_or("QEMU could not load the guest".into()));
            }
            _ => stir(&mut events).await,
        }
    }
}

/// Lets QEMU send the rest, out of its pre-switchover pause.
///
/// # Errors
/// QEMU's refusal.
pub async fn finish(qemu: &Qemu) -> Result<(), qmp::Error> {
    let state = MigrationStatus::PreSwitchover;
    qemu.qmp.execute(MigrateContinue { state }, QMP_DEADLINE).await?;
    Ok(())
}

/// Sends the memory until QEMU has stopped the guest for the switchover. Of the pause
/// that the policy aims at, `overhead` is needed for all else than memory.
///
/// # Errors
/// Why QEMU will not get there.
pub async fn send(qemu: &Qemu, policy: &Policy, overhead: Duration) -> Result<(), String> {
    let stall = Duration::from_secs_f64(policy.stall_seconds);
    let mut downtime = Duration::from_millis(policy.rounds.downtime_ms);
    let longest = Duration::from_millis(policy.rounds.max_downtime_ms);
    let converge = policy.rounds.throttle;
    // At least half: over a long link a guest that works would never be caught.
    let limit = |downtime: Duration| downtime.saturating_sub(overhead).max(downtime / 2);
    let setup = Setup {
        multifd: policy.multifd,
        zstd: policy.compression == Compression::Zstd,
        converge,
        downtime: limit(downtime),
        bandwidth: policy.bandwidth,
    };
    set_up(qemu, setup).await.map_err(|e| e.to_string())?;
    let mut events = qemu.qmp.events();
    let uri = format!("unix:{OUTGOING}");
    qemu.qmp.execute(Migrate { uri }, QMP_DEADLINE).await.map_err(|e| e.to_string())?;
    let (mut sent, mut since) = (0, Instant::now());
    let mut patience = PASSES;
    loop {
        let info = look(qemu).await.map_err(|e| e.to_string())?;
        match info.status {
            Some(MigrationStatus::PreSwitchover) => return Ok(()),
            Some(MigrationStatus::Failed) => {
                return Err(info.error_desc.unwrap_or("QEMU could not send the memory".into()));
            }
            Some(MigrationStatus::Cancelled) => return Err("the memory was cancelled".into()),
            _ => {}
        }
        let passes = info.ram.as_ref().map_or(0, |ram| ram.dirty_sync_count);
        if passes > patience && downtime < longest {
            // The guest does not let itself be caught within the pause aimed at.
            downtime = (downtime * 2).min(longest);
            patience = passes + PASSES;
            lengthen(qemu, limit(downtime)).await.map_err(|e| e.to_string())?;
        }
        let now = info.ram.map_or(0, |ram| ram.transferred);
        if now != sent {
            (sent, since) = (now, Instant::now());
        } else if since.elapsed() > stall {
            return Err(format!("no memory was sent for {stall:?}: the link or the target hangs"));
        }
        stir(&mut events).await;
    }
}

/// Passes over the memory after which a longer pause is allowed.
const PASSES: u64 = 4;

async fn lengthen(qemu: &Qemu, downtime: Duration) -> Result<(), qmp::Error> {
    tracing::info!(?downtime, "the pause may be longer");
    let parameters =
        MigrationParameters { downtime_limit: Some(millis(downtime)), ..Default::default() };
    qemu.qmp.execute(MigrateSetParameters(parameters), QMP_DEADLINE).await?;
    Ok(())
}

/// Tells the network where the guest is.
pub async fn announce(qemu: &Qemu) {
    let announce =
        AnnounceSelf { initial: 50, max: 550, rounds: 5, step: 100, ..AnnounceSelf::default() };
    if let Err(error) = qemu.qmp.execute(announce, QMP_DEADLINE).await {
        tracing::warn!(%error, "the guest could not be announced to the network");
    }
}

/// Ends the migration at the source and sees to it that the guest runs again, or that one which was
/// `paused` when it set out can, whatever state QEMU is in. Idempotent.
///
/// # Errors
/// What QEMU says when it cannot be brought back within `deadline`.
pub async fn bring_back(qemu: &Qemu, deadline: Duration, paused: bool) -> Result<(), String> {
    let until = Instant::now() + deadline;
    let mut cancelled = false;
    loop {
        let info = look(qemu).await.map_err(|e| e.to_string())?;
        let state = qemu.qmp.execute(QueryStatus, QMP_DEADLINE).await.map_err(|e| e.to_string())?;
        let under_way = !matches!(
            info.status,
            None | Some(
                MigrationStatus::None
                    | MigrationStatus::Completed
                    | MigrationStatus::Failed
                    | MigrationStatus::Cancelled
            )
        );
        if !under_way && state.running {
            return Ok(());
        }
        if !under_way && paused && state.status != RunState::FinishMigrate {
            // One that was sent whole has let go of its disks.
            return match info.status {
                Some(MigrationStatus::Completed) => activate(qemu).await,
                _ => Ok(()),
            };
        }
        if under_way && !cancelled {
            // A refusal means that there is nothing left to cancel: the next look tells.
            let _ = qemu.qmp.execute(MigrateCancel, QMP_DEADLINE).await;
            cancelled = true;
        }
        if !under_way {
            if info.status == Some(MigrationStatus::Failed)
                && state.status == RunState::FinishMigrate
            {
                // A multifd source whose target died in pre-switchover: only this lets it go.
                let release = MigrateContinue { state: MigrationStatus::Failed };
                let _ = qemu.qmp.execute(release, QMP_DEADLINE).await;
            }
            // Refused while QEMU is still letting go: then the next turn tries again.
            if !paused
                && let Err(error) = qemu.qmp.execute(Cont, QMP_DEADLINE).await
                && Instant::now() > until
            {
                return Err(error.to_string());
            }
        }
        if Instant::now() > until {
            return Err(format!("QEMU stays in {:?} after {deadline:?}", state.status));
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Takes the disks of a guest that stands still, and keeps standing: what is exported has to be fit for
/// use, and stays so when the export has ended. `cont` does the same for one that is to run.
///
/// # Errors
/// What QEMU says: another may hold a disk's lock.
pub async fn activate(qemu: &Qemu) -> Result<(), String> {
    let addr = NbdAddress::Unix { path: EXPORTS.to_owned() };
    let server = NbdServerStart { addr, max_connections: Some(1) };
    qemu.qmp.execute(server, QMP_DEADLINE).await.map_err(|e| e.to_string())?;
    let mut taken = Ok(());
    for disk in &qemu.spec.disks {
        let export = BlockExportAdd {
            r#type: ExportType::Nbd,
            id: format!("{}-activation", disk.name),
            node_name: disk.name.clone(),
            name: Some(disk.name.clone()),
            writable: Some(false),
            ..BlockExportAdd::default()
        };
        if let Err(error) = qemu.qmp.execute(export, QMP_DEADLINE).await {
            taken = Err(format!("disk {}: {error}", disk.name));
            break;
        }
    }
    qemu.qmp.execute(NbdServerStop, QMP_DEADLINE).await.map_err(|e| e.to_string())?;
    taken
}
