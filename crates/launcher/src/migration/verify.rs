//! Compares the disks that a VM left with the disks that it runs on now, while
//! it runs.
//!
//! ```text
//! left launcher                       running launcher
//!                     <-- ticket ---  verify_begin
//! verify_send ---- hashes ----------> compares, writes nothing
//!   differing blocks -------------->  verify_judge: what the guest wrote since is no fault
//! ```
//!
//! The bitmap is looked at *after* the comparison: bits are set when a write
//! completes, so a block that was read half-written is dirty by then.

use super::bitmaps::{Bitmaps, since_name};
use super::disks::nodes;
use super::hall::Gate;
use super::links::{Dialing, DiskDialer};
use super::marks::Mark;
use super::ticket::Here;
use super::ticket::Peer;
use super::{Error, Moving};
use crate::vm::{self, Handle};
use channel::preface::{Stream, VmName};
use channel::tokens::Token;
use mover::bucket::SharedBucket;
use mover::codec::Compression;
use mover::disk::Disk;
use mover::extent::{Extent, ExtentSet};
use mover::receiver::{Access, Receiver};
use mover::sender::{Mode, Options, Sender};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Streams of a comparison.
const STREAMS: u16 = 2;
/// How long the link may stay away.
const PATIENCE: Duration = Duration::from_secs(30);
/// The longest comparison: 100 TiB at 1 GiB/s.
const LONGEST: Duration = Duration::from_secs(100_000);

/// Asks the launcher where the VM runs to compare.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BeginRequest {
    /// A name for the comparison.
    pub migration: String,
    /// The host whose disks were left.
    pub from: Peer,
}

/// Leave to compare.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VerifyTicket {
    migration: String,
    vm: String,
    peer: Peer,
    /// The disks that can be compared, in the streams' order.
    disks: Vec<String>,
    tokens: Vec<Token>,
}

impl VerifyTicket {
    /// The same, for who finds the running launcher's gateway at another address than it says.
    #[must_use]
    pub fn at(mut self, address: String) -> Self {
        self.peer.address = address;
        self
    }
}

/// Asks the launcher that was left to send its hashes.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SendRequest {
    /// From the running launcher.
    pub ticket: VerifyTicket,
    /// Where the disks that were left lie; None: where this launcher left them.
    #[serde(default)]
    pub paths: BTreeMap<String, PathBuf>,
}

/// Asks the launcher where the VM runs to judge what differs.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JudgeRequest {
    /// All of it, or a part.
    pub differing: Vec<Differing>,
    /// There is more to come: the comparison goes on.
    #[serde(default)]
    pub more: bool,
}

/// What differs on one disk.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Differing {
    /// The disk.
    pub disk: String,
    /// The epoch at whose end it was left.
    pub epoch: u64,
    /// Bytes compared.
    pub compared: u64,
    /// The blocks.
    pub extents: ExtentSet,
}

/// What a comparison found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyReport {
    /// Bytes compared.
    pub compared: u64,
    /// Bytes that differ because the guest has written them since.
    pub changed: u64,
    /// Where the disks differ though the guest has not written there.
    pub wrong: Vec<Wrong>,
}

impl VerifyReport {
    /// Adds what another part of the disks has shown.
    pub fn add(&mut self, other: Self) {
        self.compared += other.compared;
        self.changed += other.changed;
        self.wrong.extend(other.wrong);
    }
}

/// A part of a disk that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wrong {
    /// The disk.
    pub disk: String,
    /// Where.
    pub extent: Extent,
}

/// Makes the running VM's disks ready to be compared.
///
/// # Errors
/// When the VM does not run here, or a move is under way.
pub async fn verify_begin(
    launcher: &Handle,
    request: BeginRequest,
) -> Result<VerifyTicket, vm::Error> {
    let mut vm = launcher.vm.lock().await;
    let Some(guest) = vm.guest.clone() else {
        return Err(Error::Verify("the VM does not run here".into()).into());
    };
    if vm.moving.as_ref().is_some_and(Moving::is_move) {
        return Err(Error::Verify("a move is under way; wait for its end".into()).into());
    }
    let mut names = Vec::new();
    let mut opened = Vec::new();
    for disk in guest.qemu.spec.disks.iter().filter(|d| !d.shared && !d.read_only) {
        opened.push(Arc::new(Disk::source(&disk.path)?));
        names.push(disk.name.clone());
    }
    let peer = Here::of(&launcher.config.host)?.peer;
    let receiver = Receiver::start(opened, STREAMS, Access::Compare, Default::default());
    let receiver = Arc::new(receiver);
    let gate = Gate::new(&request.migration, request.from.id);
    let tokens = (0..STREAMS).map(|n| gate.admit_disk(n, &receiver)).collect();
    vm.moving = Some(Moving::Compared(gate));
    Ok(VerifyTicket {
        migration: request.migration,
        vm: launcher.config.vm.clone(),
        peer,
        disks: names,
        tokens,
    })
}

/// Sends the hashes of the disks that were left; returns what differs.
///
/// # Errors
/// When a disk was not left by this VM, or the comparison breaks.
pub async fn verify_send(
    launcher: &Handle,
    request: SendRequest,
) -> Result<Vec<Differing>, vm::Error> {
    let fail = |why: String| vm::Error::from(Error::Verify(why));
    let left = launcher.vm.lock().await.left.clone();
    let ticket = request.ticket;
    let mut disks = Vec::new();
    let mut epochs = Vec::new();
    for name in &ticket.disks {
        let known = left.as_ref().and_then(|spec| spec.disks.iter().find(|d| d.name == *name));
        let path = request.paths.get(name).or(known.map(|d| &d.path));
        let path = path.ok_or_else(|| {
            fail(format!("where is disk {name} that was left? Say --disk {name}=PATH"))
        })?;
        let disk = Disk::source(path)?;
        match launcher.marks.get(&disk)? {
            Some(Mark::Superseded { vm, epoch, left_as, .. })
                if vm == launcher.config.vm && left_as == disk.identity()? =>
            {
                epochs.push(epoch);
            }
            Some(Mark::Superseded { .. }) => {
                return Err(fail(format!("{} was written since it was left", path.display())));
            }
            _ => return Err(fail(format!("{} was not left by this VM", path.display()))),
        }
        disks.push(Arc::new(disk));
    }
    let vm: VmName = ticket.vm.parse().map_err(|why: &str| fail(why.to_owned()))?;
    let (_running, over) = tokio::sync::watch::channel(false);
    let dialing = Dialing {
        gateway: launcher.gateway.clone(),
        peer: ticket.peer.clone(),
        vm,
        migration: ticket.migration.clone(),
        patience: PATIENCE,
        over,
    };
    let tokens = ticket.tokens.iter().cloned().enumerate();
    let dialers = tokens.map(|(n, token)| dialing.stream(Stream::Disk(n as u16), token)).collect();
    let connect = DiskDialer { dialers, runtime: tokio::runtime::Handle::current() };
    let options = Options {
        streams: STREAMS,
        bucket: Arc::new(SharedBucket::new(None)),
        compression: Compression::Off,
    };
    let sizes: Vec<u64> = disks.iter().map(|disk| disk.size()).collect();
    let sender = Sender::start(disks, Arc::new(connect), options);
    for (i, size) in sizes.iter().enumerate() {
        let pushed = sender.push(i as u16, Mode::Verify, &ExtentSet::whole(*size));
        pushed.map_err(|e| fail(e.to_string()))?;
    }
    let waited = tokio::task::spawn_blocking(move || {
        let done = sender.wait(LONGEST);
        let differing = sender.differing();
        sender.finish();
        done.map(|()| differing)
    });
    let differing = waited.await.map_err(|e| fail(e.to_string()))?;
    let differing = differing.map_err(|e| fail(e.to_string()))?;
    let each = ticket.disks.into_iter().zip(epochs).zip(sizes).zip(differing);
    Ok(each
        .map(|(((disk, epoch), compared), extents)| Differing { disk, epoch, compared, extents })
        .collect())
}

/// Judges what differs: what the guest has written since is no fault. Ends the comparison, unless there is more.
///
/// # Errors
/// When nothing is compared, or the bitmaps do not reach back to where the disks were left.
pub async fn verify_judge(
    launcher: &Handle,
    request: JudgeRequest,
) -> Result<VerifyReport, vm::Error> {
    let fail = |why: String| vm::Error::from(Error::Verify(why));
    let guest = {
        let mut vm = launcher.vm.lock().await;
        // N.B. what a guest writes is told to nobody who did not come to compare.
        match (&vm.moving, request.more) {
            (Some(Moving::Compared(_)), true) => {}
            (Some(Moving::Compared(gate)), false) => {
                gate.close();
                vm.moving = None;
            }
            _ => return Err(fail("nothing is compared; a move that began has ended it".into())),
        }
        vm.guest.clone().ok_or_else(|| fail("the VM does not run here".into()))?
    };
    let own = guest.history.own.ok_or_else(|| {
        fail("the VM was started here: nobody knows what it has written since it left".into())
    })?;
    let mut opened = Vec::new();
    for disk in &guest.qemu.spec.disks {
        opened.push((disk.name.as_str(), disk.size, Arc::new(Disk::source(&disk.path)?)));
    }
    let all = nodes(opened.iter().map(|(name, shown, disk)| (*name, *shown, disk)));
    let bitmaps = Bitmaps::new(guest.qemu.qmp.clone(), &launcher.folder, all);
    let recorded = bitmaps.look(&since_name(own)).await.map_err(|e| fail(e.to_string()))?;
    let mut report = VerifyReport::default();
    for found in request.differing {
        let at = opened.iter().position(|(name, ..)| *name == found.disk);
        let recorded = at.and_then(|i| recorded.get(i)).cloned().unwrap_or_default();
        let since = guest.history.since(found.epoch, &found.disk, &recorded).ok_or_else(|| {
            fail(format!("nobody knows what changed on {} since epoch {}", found.disk, found.epoch))
        })?;
        report.compared += found.compared;
        for extent in found.extents.iter() {
            blocks(extent, &since, &found.disk, &mut report);
        }
    }
    Ok(report)
}

/// A block that differs is explained by any write within it.
fn blocks(extent: Extent, since: &ExtentSet, disk: &str, report: &mut VerifyReport) {
    let mut at = extent.offset;
    while at < extent.end() {
        let len = mover::wire::COMPARE_BLOCK.min(extent.end() - at);
        let block = Extent::new(at, len);
        if since.within(block).is_empty() {
            report.wrong.push(Wrong { disk: disk.to_owned(), extent: block });
        } else {
            report.changed += len;
        }
        at += len;
    }
}
