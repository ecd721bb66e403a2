//! The target's half of a move: carries out what the handover's core decides.

mod ending;
mod opening;

use super::control::Sent;
use super::hall::Gate;
use super::history::History;
use super::marks::Mark;
use super::policy::Policy;
use super::status::{Half, Outcome, Status};
use super::ticket::{Here, Ticket};
use super::{Error, Moving, memory};
use crate::qemu::Qemu;
use crate::spec::VmSpec;
use crate::status::{Phase, Wish};
use crate::vm::{self, Handle, QMP_DEADLINE};
use channel::preface::Stream;
use handover::record::InstanceId;
use handover::source::Answer;
use handover::target::{Action, Event, Target};
use handover::wire::v1::FromTarget;
use handover::{Deadline, Failure};
use mover::disk::Disk;
use mover::receiver::Receiver;
use qmp::commands::Cont;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// Asks a launcher to be the target of a move.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PrepareRequest {
    /// The attempt.
    pub migration: String,
    /// The host that the guest comes from, and its address.
    pub from: super::ticket::Peer,
    /// The guest as it is to be here, with this host's paths.
    pub spec: VmSpec,
    /// What the VM is called where it comes from, if otherwise: then it is the machine that it is there,
    /// whatever the spec says of its hardware addresses and ids.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub known_as: Option<String>,
    /// Marks of disks that the VM has left, by the disks' names, where they are kept elsewhere than
    /// in the host's folder.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub left: BTreeMap<String, Mark>,
    /// How long to wait, and for what.
    #[serde(default)]
    pub policy: Policy,
}

/// Makes this launcher the target of a move.
///
/// # Errors
/// When a guest is here, or the request is wrong.
pub async fn prepare(launcher: &Handle, request: PrepareRequest) -> Result<Ticket, vm::Error> {
    request.spec.validate()?;
    request.policy.validate().map_err(Error::Request)?;
    let mut vm = launcher.vm.lock().await;
    launcher.judge(&vm, Wish::Prepare)?;
    if request.spec.name != launcher.config.vm {
        let why = format!("the spec is of VM {}", request.spec.name);
        return Err(Error::Request(why).into());
    }
    let here = Here::of(&launcher.config.host)?;
    launcher.open_consoles(&mut vm, &request.spec)?;
    let heir = InstanceId(uuid::Uuid::new_v4().to_string());
    let gate = Gate::new(&request.migration, request.from.id.clone());
    let (token, control) = gate.admit(Stream::Control);
    let ticket = Ticket {
        migration: request.migration.clone(),
        vm: request.spec.name.clone(),
        known_as: request.known_as.clone(),
        peer: here.peer,
        heir: heir.0.clone(),
        token,
    };
    vm.moving = Some(Moving::Here(gate.clone()));
    launcher.show(|status| {
        status.phase = Phase::Receiving;
        status.reason = None;
        status.migration = Some(Status::begin(&request.migration, Half::Target, "Receiving"));
    });
    tokio::spawn(opening::receive(launcher.clone(), request, heir, gate, control));
    Ok(ticket)
}

/// What the half's own tasks tell it.
pub(super) enum Input {
    Core(Event),
    History(History),
}

/// A disk that is being received.
#[derive(Debug)]
pub(super) struct Received {
    pub(super) name: String,
    pub(super) disk: Arc<Disk>,
    /// It is written by this move: neither shared nor read-only.
    pub(super) copied: bool,
    /// We created the file: nothing was there before.
    pub(super) created: bool,
    /// Size that the guest sees while it moves, where the disk is larger.
    pub(super) shown: Option<u64>,
}

pub(super) struct Shell {
    pub(super) launcher: Handle,
    pub(super) request: PrepareRequest,
    pub(super) core: Target,
    pub(super) gate: Arc<Gate>,
    pub(super) control: Sent,
    pub(super) inputs: mpsc::Sender<Input>,
    pub(super) qemu: Qemu,
    /// The guest stands still, and is to go on standing.
    pub(super) paused: bool,
    pub(super) disks: Vec<Received>,
    pub(super) receiver: Option<Arc<Receiver>>,
    pub(super) pumps: Option<tokio::task::JoinHandle<()>>,
    pub(super) history: History,
    pub(super) swaps: mpsc::Sender<handover::record::Swap>,
}

impl Shell {
    async fn run(mut self, mut received: mpsc::Receiver<Input>) {
        let mut ticker = tokio::time::interval(Duration::from_millis(500));
        let mut since = tokio::time::Instant::now();
        self.show_phase();
        while let Some(waiting) = self.core.waiting() {
            let deadline = match waiting.deadline {
                // The source watches the data's progress; its silence is a lost control stream.
                Deadline::Data => None,
                kind => Some(since + self.request.policy.deadline(kind)),
            };
            let input = tokio::select! {
                input = received.recv() => input,
                () = self.gate.cancel.notified() => {
                    Some(Input::Core(Event::Failed(Failure::Cancelled)))
                }
                _ = ticker.tick() => {
                    self.show_progress();
                    continue;
                }
                () = async {
                    match deadline {
                        Some(deadline) => tokio::time::sleep_until(deadline).await,
                        None => std::future::pending().await,
                    }
                } => {
                    since = tokio::time::Instant::now();
                    self.expired(waiting)
                }
            };
            let Some(input) = input else { break };
            let before = self.core.phase();
            match input {
                Input::Core(event) => self.step(event).await,
                Input::History(history) => self.history.inherit(history),
            }
            if self.core.phase() != before {
                since = tokio::time::Instant::now();
            }
        }
        self.close(received).await;
    }

    fn expired(&mut self, waiting: handover::Waiting) -> Option<Input> {
        if matches!(waiting.deadline, Deadline::Ledger | Deadline::Decision) {
            let reason = format!(
                "waiting for {}; the guest stands still here until an owner record can be asked",
                waiting.reason
            );
            self.show_doubt(reason);
        }
        let why = format!("waited too long for {}", waiting.reason);
        Some(Input::Core(Event::Failed(Failure::Other(why))))
    }

    async fn step(&mut self, event: Event) {
        let before = self.core.phase();
        let (core, actions) = self.core.clone().step(event);
        self.core = core;
        if self.core.phase() != before {
            self.show_phase();
            tracing::info!(from = before, to = self.core.phase(), "target");
            self.launcher.pass(&format!("target:{}", self.core.phase())).await;
        }
        for action in actions {
            self.act(action).await;
        }
    }

    async fn act(&mut self, action: Action) {
        match action {
            Action::SendLoaded => self.control.send(&FromTarget::Loaded).await,
            Action::SendRunning => self.control.send(&FromTarget::Running).await,
            Action::SendFailed(failure) => self.control.send(&FromTarget::Failed(failure)).await,
            Action::SendGaveBack(failure) => {
                self.control.send(&FromTarget::GaveBack(failure)).await;
            }
            Action::AskOwner(swap) => self.ask_owner(swap),
            Action::Swap(swap) => {
                // The task lives as long as this half.
                let _ = self.swaps.send(swap).await;
            }
            Action::Activate => self.activate().await,
            Action::Announce if self.paused => {}
            Action::Announce => memory::announce(&self.qemu).await,
            Action::EndQemu => {
                self.qemu.process.kill().await;
            }
        }
    }

    fn ask_owner(&self, swap: handover::record::Swap) {
        let (owner, peer) = (self.launcher.owner.clone(), self.request.from.clone());
        let inputs = self.inputs.clone();
        tokio::spawn(async move {
            let answer = owner.swap_at(&peer, swap).await;
            if !matches!(answer, Answer::Done(_)) {
                tokio::time::sleep(SETTLE).await;
            }
            let _ = inputs.send(Input::Core(Event::Owner(answer))).await;
        });
    }

    async fn activate(&mut self) {
        let event = match self.run_guest().await {
            Ok(()) => Event::GuestRunning,
            Err(Refusal::NeverRan(why)) => Event::ActivateFailed(why),
            Err(Refusal::Unknown(why)) => {
                tracing::error!(%why, "whether QEMU runs the guest cannot be learnt: ending it");
                // N.B. only a QEMU that has surely ended is told of as ended.
                self.qemu.process.kill().await;
                Event::QemuEnded
            }
        };
        // N.B. through the queue: `step` must end before the next begins.
        let inputs = self.inputs.clone();
        tokio::spawn(async move {
            let _ = inputs.send(Input::Core(event)).await;
        });
    }

    async fn run_guest(&self) -> Result<(), Refusal> {
        for received in self.disks.iter().filter(|d| d.copied) {
            let released = received.disk.release();
            released.map_err(|e| Refusal::NeverRan(crate::chain(&e)))?;
        }
        self.launcher.pass("target:Released").await;
        if self.paused {
            // Not one instruction is run.
            return memory::activate(&self.qemu).await.map_err(Refusal::NeverRan);
        }
        let first = match self.qemu.qmp.execute(Cont, QMP_DEADLINE).await {
            Ok(_) => return Ok(()),
            Err(error) if error.is_outcome_unknown() => error,
            Err(error) => {
                return Err(Refusal::NeverRan(format!("QEMU did not run the guest: {error}")));
            }
        };
        tracing::warn!(error = %first, "QEMU is told once more to run the guest");
        // A guest that runs already is no error. Any other answer is no proof that it never ran.
        let again = self.qemu.qmp.execute(Cont, QMP_DEADLINE).await;
        again.map(|_| ()).map_err(|e| Refusal::Unknown(e.to_string()))
    }

    fn show_phase(&self) {
        let (phase, waiting) = (self.core.phase(), self.core.waiting());
        self.launcher.show(|status| {
            if let Some(migration) = &mut status.migration {
                migration.enter(phase, waiting, &self.request.policy);
            }
        });
    }

    fn show_doubt(&self, reason: String) {
        self.launcher.show(|status| {
            if let Some(migration) = &mut status.migration {
                migration.outcome = Some(Outcome::InDoubt { reason });
            }
        });
    }

    fn show_progress(&self) {
        let received = self.receiver.as_ref().map_or(0, |r| r.received());
        self.launcher.show(|status| {
            if let Some(migration) = &mut status.migration {
                migration.progress.bytes_total = received;
            }
        });
    }
}

/// Why QEMU does not run the guest.
enum Refusal {
    /// It has not run one instruction.
    NeverRan(String),
    /// It may have.
    Unknown(String),
}

/// A ledger that did not answer is asked again after this.
const SETTLE: Duration = Duration::from_millis(300);
