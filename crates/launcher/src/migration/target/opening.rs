//! Before anything moves: what comes is checked, disks and QEMU are made ready.

use super::ending::{release, remove_created};
use super::{Input, PrepareRequest, Received, Shell};
use crate::migration::bitmaps::{Bitmaps, since_name};
use crate::migration::control::{self, Control, Heard, Sent};
use crate::migration::disks::nodes;
use crate::migration::hall::Gate;
use crate::migration::history::History;
use crate::migration::links::Links;
use crate::migration::marks::Mark;
use crate::migration::memory::{self, Pumps};
use crate::migration::offer::{Holds, MAX_DISK_STREAMS, MAX_MULTIFD, Offer, Prepared};
use crate::migration::status::Outcome;
use crate::qemu::{Facts, Mode, Process, Qemu};
use crate::spec::Bus;
use crate::status::Phase;
use crate::vm::Handle;
use channel::preface::Stream;
use channel::resumable::{self, Role};
use handover::Failure;
use handover::record::InstanceId;
use handover::source::Answer;
use handover::target::{Event, Parties, Target};
use handover::wire::v1::{FromSource, FromTarget};
use handover::wire::{Hello, Welcome};
use mover::disk::Disk;
use mover::receiver::{Access, Receiver};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::sync::mpsc;

/// A connection that breaks is most often followed by QEMU's end.
const END: Duration = Duration::from_secs(2);

/// Receives a guest, from the first connection to the end.
pub(super) async fn receive(
    launcher: Handle,
    request: PrepareRequest,
    heir: InstanceId,
    gate: Arc<Gate>,
    control: mpsc::Receiver<UnixStream>,
) {
    let patience = Duration::from_secs_f64(request.policy.reconnect_seconds);
    let links = Links::Accept(control);
    let Control { sent, mut heard, .. } = Control::start(links, request.policy.reconnect_seconds);
    let answer = Duration::from_secs_f64(request.policy.answer_seconds) + patience;
    let (inputs, received) = mpsc::channel(64);
    let mut disks = Vec::new();
    let opening = async {
        let offer = shake(&sent, &mut heard).await?;
        open(&launcher, &request, &heir, &gate, &sent, &inputs, offer, &mut disks).await
    };
    let opened = tokio::select! {
        opened = tokio::time::timeout(answer, opening) => {
            opened.unwrap_or_else(|_| Err(format!("the source did not come within {answer:?}")))
        }
        () = gate.cancel.notified() => Err("it was cancelled".into()),
    };
    match opened {
        Ok(shell) => {
            tokio::spawn(listen(heard, inputs));
            shell.run(received).await;
        }
        Err(why) => {
            tracing::warn!(%why, "the guest cannot be received");
            sent.send(&FromTarget::Failed(Failure::Other(why.clone()))).await;
            sent.close(Duration::from_secs(2)).await;
            gate.close();
            remove_created(&launcher, &disks);
            release(&disks);
            give_up(&launcher, why).await;
        }
    }
}

async fn give_up(launcher: &Handle, why: String) {
    let mut vm = launcher.vm.lock().await;
    vm.moving = None;
    launcher.show(|status| {
        status.phase = Phase::Empty;
        if let Some(migration) = &mut status.migration {
            migration.waiting = None;
            migration.outcome = Some(Outcome::Failed { reason: why, resumable: true });
        }
    });
}

async fn shake(sent: &Sent, heard: &mut Heard) -> Result<Offer, String> {
    let hello: Hello = heard.next().await?.ok_or("the source closed the control stream")?;
    match hello.negotiate() {
        Ok(version) => sent.send(&Welcome::Version(version)).await,
        Err(error) => {
            sent.send(&Welcome::Unwelcome(error.to_string())).await;
            return Err(error.to_string());
        }
    }
    match heard.next().await?.ok_or("the source closed the control stream")? {
        FromSource::Offer(body) => {
            serde_json::from_value(body).map_err(|e| format!("the source's offer is wrong: {e}"))
        }
        other => Err(format!("the source began with {other:?} instead of an offer")),
    }
}

#[expect(clippy::too_many_arguments, reason = "it puts all of a target together, once")]
async fn open(
    launcher: &Handle,
    request: &PrepareRequest,
    heir: &InstanceId,
    gate: &Arc<Gate>,
    sent: &Sent,
    inputs: &mpsc::Sender<Input>,
    offer: Offer,
    disks: &mut Vec<Received>,
) -> Result<Shell, String> {
    let mut request = request.clone();
    if request.known_as.is_some() {
        request.spec.be_as(&offer.spec);
    }
    let request = &request;
    check(request, &offer)?;
    let holds = open_disks(launcher, request, heir, &offer, disks)?;
    let qemu = start_qemu(launcher, request, &offer, disks).await?;
    launcher.owner.watch(heir, qemu.process.pid()).await;
    let nodes = nodes(disks.iter().map(|d| (d.name.as_str(), d.shown, &d.disk)));
    let bitmaps = Bitmaps::new(qemu.qmp.clone(), &launcher.folder, nodes);
    let ready = async {
        let setup = memory::Setup {
            multifd: offer.multifd,
            zstd: offer.zstd,
            downtime: Duration::from_millis(300),
            ..Default::default()
        };
        memory::set_up(&qemu, setup).await.map_err(text)?;
        memory::listen(&qemu).await.map_err(text)?;
        bitmaps.start(&since_name(offer.epoch)).await.map_err(text)
    };
    if let Err(why) = ready.await {
        qemu.process.kill().await;
        return Err(why);
    }
    let all = disks.iter().map(|d| d.disk.clone()).collect();
    let fault = launcher.config.fault;
    let receiver = Receiver::start(all, offer.disk_streams, Access::Write, fault.disk);
    let receiver = Arc::new(receiver);
    let disk_tokens = (0..offer.disk_streams).map(|n| gate.admit_disk(n, &receiver)).collect();
    let reconnect = request.policy.reconnect_seconds;
    let config = || control::config(Role::Accepting, reconnect, None);
    let (memory_tokens, ways): (Vec<_>, Vec<_>) = (0..=u16::from(offer.multifd))
        .map(|n| gate.admit(Stream::Memory(n)))
        .map(|(token, admitted)| (token, (Links::Accept(admitted), config())))
        .unzip();
    let mut pumps = Pumps::default();
    pumps.incoming(&launcher.folder, ways, fault.stale_page);
    let pumps = tokio::spawn(watch_pumps(pumps, qemu.clone(), inputs.clone()));
    watch_qemu(&qemu, inputs.clone());
    let parties = Parties {
        epoch: offer.epoch,
        heir: heir.clone(),
        source: offer.source.clone(),
        attempt: request.migration.as_str().into(),
        peer: request.from.id.to_string().as_str().into(),
    };
    let expected = launcher.owner.swap(parties.expect()).await;
    if !matches!(expected, Answer::Done(_)) {
        qemu.process.kill().await;
        return Err(match expected {
            Answer::Refused(Some(record)) => {
                format!("the target's ledger does not expect the VM: {record}")
            }
            _ => "the target's ledger did not answer; is its gateway running?".to_owned(),
        });
    }
    mark_incomplete(launcher, heir, &offer, disks.iter())?;
    let prepared = Prepared { disks: holds, disk_tokens, memory_tokens };
    let body = serde_json::to_value(&prepared).map_err(text)?;
    sent.send(&FromTarget::Prepared(body)).await;
    let (swaps, asked) = mpsc::channel(8);
    tokio::spawn(swap_in_turn(launcher.clone(), asked, inputs.clone()));
    Ok(Shell {
        launcher: launcher.clone(),
        request: request.clone(),
        core: Target::new(parties),
        gate: gate.clone(),
        control: sent.clone(),
        inputs: inputs.clone(),
        qemu,
        paused: offer.paused,
        disks: std::mem::take(disks),
        receiver: Some(receiver),
        pumps: Some(pumps),
        history: History::arrived(offer.epoch),
        swaps,
    })
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// Checks what the source offers against what this host was told to receive.
fn check(request: &PrepareRequest, offer: &Offer) -> Result<(), String> {
    let mut expected = request.spec.clone();
    if let Some(known_as) = &request.known_as {
        expected.name.clone_from(known_as);
    }
    let mut faults = expected.differences(&offer.spec);
    // N.B. its machine type goes on our QEMU's command line.
    if let Err(invalid) = offer.spec.validate() {
        faults.extend(invalid.faults);
    }
    match request.spec.firmware_size() {
        Ok(size) if size == offer.firmware => {}
        Ok(_) => {
            faults.push("the UEFI firmware here is of another size; use the same build".into())
        }
        Err(error) => faults.push(format!("the UEFI firmware here cannot be used: {error}")),
    }
    if offer.sizes.len() != request.spec.disks.len() {
        faults.push("the source sent no size for every disk".into());
    }
    if offer.sizes.iter().any(|size| *size == 0 || size % mover::disk::SECTOR != 0) {
        faults.push("a disk's size is no multiple of 512".into());
    }
    if !(1..=MAX_DISK_STREAMS).contains(&offer.disk_streams) || offer.multifd > MAX_MULTIFD {
        faults.push("the source wants too many streams".into());
    }
    if faults.is_empty() {
        Ok(())
    } else {
        Err(format!("the guest that comes is not the one expected: {}", faults.join("; ")))
    }
}

/// Opens all disks and judges what they hold; writes none of them. What was opened is in `disks`,
/// also after a failure.
fn open_disks(
    launcher: &Handle,
    request: &PrepareRequest,
    heir: &InstanceId,
    offer: &Offer,
    disks: &mut Vec<Received>,
) -> Result<Vec<Holds>, String> {
    let mut holds = Vec::new();
    for (spec, size) in request.spec.disks.iter().zip(&offer.sizes) {
        let copied = !spec.shared && !spec.read_only;
        let opened = match copied {
            true => Disk::target(&spec.path, *size),
            false => Disk::source(&spec.path).map(|disk| (disk, false)),
        };
        let (disk, created) = opened.map_err(|e| crate::chain(&e))?;
        let shown = (disk.size() > *size).then_some(*size);
        let name = spec.name.clone();
        let disk = Arc::new(disk);
        disks.push(Received { name, disk: disk.clone(), copied, created, shown });
        // What we made was never a disk that may be started.
        mark_incomplete(launcher, heir, offer, disks.last().filter(|d| d.created))?;
        if spec.shared && !disk.is_direct() {
            return Err(format!(
                "shared disk {} cannot be used past the page cache; use a filesystem with O_DIRECT",
                spec.path.display()
            ));
        }
        if spec.bus == Bus::Flash && disk.size() != *size {
            return Err(format!(
                "{} has {} bytes, the flash that comes has {size}; name another path",
                spec.path.display(),
                disk.size()
            ));
        }
        let is_hole = copied && disk.is_hole().map_err(|e| crate::chain(&e))?;
        let mark = launcher.marks.get(&disk).map_err(|e| crate::chain(&e))?;
        let mark =
            mark.or_else(|| request.left.get(&spec.name).filter(|m| m.is_of(&disk)).cloned());
        holds.push(match &mark {
            _ if !copied => Holds::Shared,
            _ if is_hole => Holds::Zeros,
            Some(Mark::Incomplete { copy, vm, .. }) if *vm == request.spec.name => {
                Holds::Copy(copy.clone())
            }
            Some(Mark::Superseded { vm, epoch, left_as, .. })
                if *vm == request.spec.name && disk.identity().is_ok_and(|now| now == *left_as) =>
            {
                Holds::Left(*epoch)
            }
            _ => Holds::Anything,
        });
    }
    Ok(holds)
}

/// Marks disks as half a copy. N.B. before their first byte is overwritten: what they
/// were, they are no more.
fn mark_incomplete<'a>(
    launcher: &Handle,
    heir: &InstanceId,
    offer: &Offer,
    disks: impl IntoIterator<Item = &'a Received>,
) -> Result<(), String> {
    for received in disks.into_iter().filter(|d| d.copied) {
        let mark = Mark::Incomplete {
            vm: launcher.config.vm.clone(),
            copy: offer.copy.clone(),
            heir: heir.0.clone(),
            disk: received.disk.identity().map_err(|e| crate::chain(&e))?,
        };
        launcher.marks.set(&received.disk, &mark).map_err(|e| crate::chain(&e))?;
    }
    Ok(())
}

async fn start_qemu(
    launcher: &Handle,
    request: &PrepareRequest,
    offer: &Offer,
    disks: &[Received],
) -> Result<Qemu, String> {
    let mut spec = request.spec.clone();
    for (disk, received) in spec.disks.iter_mut().zip(disks) {
        disk.size = received.shown;
    }
    // What the guest really is, where the request has only an alias.
    spec.machine.clone_from(&offer.spec.machine);
    let facts: Vec<Facts> = disks
        .iter()
        .map(|d| Facts { medium: d.disk.medium(), direct: d.disk.is_direct() })
        .collect();
    let config = launcher.qemu_config();
    Qemu::start(&config, &spec, &facts, Mode::Incoming).await.map_err(|e| crate::chain(&e))
}

fn watch_qemu(qemu: &Qemu, inputs: mpsc::Sender<Input>) {
    let qemu = qemu.clone();
    tokio::spawn(async move {
        let event = match memory::loaded(&qemu).await {
            Ok(()) => Event::MemoryLoaded,
            Err(why) => Event::Failed(Failure::Other(why_not_loaded(&qemu, why).await)),
        };
        // A half that is gone does not care, here and below.
        let _ = inputs.send(Input::Core(event)).await;
        // N.B. after the reason, which would not be heard any more.
        qemu.process.ended().await;
        tracing::info!(words = %qemu.process.last_words(), "the target's QEMU ended");
        let _ = inputs.send(Input::Core(Event::QemuEnded)).await;
    });
}

/// QEMU ends when it cannot load a guest; why is in its last words, not in its connection's end.
async fn why_not_loaded(qemu: &Qemu, why: String) -> String {
    match tokio::time::timeout(END, qemu.process.ended()).await {
        Ok(_) => format!("QEMU could not load the guest: {}", last_lines(&qemu.process)),
        Err(_) => why,
    }
}

/// What QEMU said last, on one line.
fn last_lines(process: &Process) -> String {
    let words = process.last_words();
    words.lines().collect::<Vec<_>>().join("; ")
}

async fn watch_pumps(mut pumps: Pumps, qemu: Qemu, inputs: mpsc::Sender<Input>) {
    let error = pumps.failed().await;
    let why = format!("a memory stream broke: {error}");
    let failure = Failure::Other(match error {
        resumable::Error::Local(_) => why_not_loaded(&qemu, why).await,
        _ => why,
    });
    let _ = inputs.send(Input::Core(Event::Failed(failure))).await;
}

async fn swap_in_turn(
    launcher: Handle,
    mut asked: mpsc::Receiver<handover::record::Swap>,
    inputs: mpsc::Sender<Input>,
) {
    while let Some(swap) = asked.recv().await {
        let answer = launcher.owner.swap(swap).await;
        if answer == Answer::Unknown {
            tokio::time::sleep(super::SETTLE).await;
        }
        if inputs.send(Input::Core(Event::Swapped(answer))).await.is_err() {
            return;
        }
    }
}

/// Turns the source's messages into inputs until it is lost.
async fn listen(mut heard: Heard, inputs: mpsc::Sender<Input>) {
    loop {
        let input = match heard.next::<FromSource>().await {
            Ok(Some(FromSource::Commit)) => Input::Core(Event::PeerCommitted),
            Ok(Some(FromSource::Aborted(failure))) => Input::Core(Event::PeerAborted(failure)),
            Ok(Some(FromSource::History(body))) => match serde_json::from_value(body) {
                Ok(history) => Input::History(history),
                Err(error) => {
                    tracing::warn!(%error, "what changed before cannot be understood");
                    continue;
                }
            },
            Ok(Some(FromSource::Offer(_) | FromSource::MemoryStarts(_))) => continue,
            Ok(None) => Input::Core(Event::PeerLost),
            Err(why) => {
                tracing::warn!(%why, "the control stream is lost");
                Input::Core(Event::PeerLost)
            }
        };
        let lost = matches!(input, Input::Core(Event::PeerLost));
        if inputs.send(input).await.is_err() || lost {
            return;
        }
    }
}
