//! The source's half of a move: carries out what the handover's core decides.

mod data;
mod ending;
mod opening;
mod show;

pub(crate) use show::FIXED;

use super::control::Sent;
use super::disks::{Carried, Disks};
use super::links::Dialing;
use super::offer::Prepared;
use super::policy::Policy;
use super::progress::Meter;
use super::status::{Half, Outcome, Status};
use super::ticket::{Here, Ticket};
use super::{Error, Moving, memory};
use crate::peers;
use crate::status::{Phase, Wish};
use crate::vm::{self, Guest, Handle};
use channel::resumable::Monitor;
use handover::record::{InstanceId, Move};
use handover::source::{Action, Answer, Event, Parties, Source, State};
use handover::wire::v1::FromSource;
use handover::{Deadline, Failure};
use mover::bucket::SharedBucket;
use mover::sender::Sender;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};

/// Asks a source to move its guest.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SendRequest {
    /// From the target's launcher.
    pub ticket: Ticket,
    /// How.
    #[serde(default)]
    pub policy: Policy,
}

/// The way to a source's half from outside.
#[derive(Debug, Clone)]
pub struct Remote {
    inputs: mpsc::Sender<Input>,
    /// Why a cancel would not be heard any more.
    uncancellable: watch::Receiver<Option<&'static str>>,
}

/// What the half's own tasks tell it.
enum Input {
    Core(Event),
    Opened {
        sent: Sent,
        monitor: Monitor,
    },
    Prepared(Box<Prepared>),
    /// QEMU stands at pre-switchover; whether the delta fits is to be judged.
    Standing,
    Throttle(u64),
    /// The guest is to stand still until it is through.
    Disrupt,
}

/// Begins to move the guest away.
///
/// # Errors
/// When there is none, a move is under way, or the request is wrong.
pub async fn send(launcher: &Handle, request: SendRequest) -> Result<(), vm::Error> {
    request.policy.validate().map_err(Error::Request)?;
    let mut vm = launcher.vm.lock().await;
    launcher.judge(&vm, Wish::Send)?;
    let Some(guest) = &mut vm.guest else {
        return Err(Error::Request("no guest is here".into()).into());
    };
    // An attempt that was aborted has raised the epoch.
    match launcher.owner.read().await? {
        Some(record) if record.owner == guest.instance => guest.epoch = record.epoch,
        Some(record) => return Err(Error::Request(format!("{record}")).into()),
        None => return Err(Error::Request("the host's ledger does not know the VM".into()).into()),
    }
    let guest = guest.clone();
    let named = request.ticket.known_as.as_ref().unwrap_or(&request.ticket.vm);
    if *named != launcher.config.vm {
        let why = format!("the ticket is for VM {named}");
        return Err(Error::Request(why).into());
    }
    let faults = unmovable(&guest);
    if !faults.is_empty() {
        return Err(Error::Request(faults.join("; ")).into());
    }
    peers::remember(&launcher.config.host, &request.ticket.peer).map_err(|error| {
        Error::Request(format!("where the target is cannot be written down: {error}"))
    })?;
    let Policy { bandwidth, compression, rounds, .. } = &request.policy;
    let mover::rounds::Policy { downtime_ms, max_downtime_ms, throttle, .. } = rounds;
    tracing::info!(
        bandwidth,
        ?compression,
        downtime_ms,
        max_downtime_ms,
        throttle,
        "the guest is to go"
    );
    let (inputs, received) = mpsc::channel(64);
    let (uncancellable, seen) = watch::channel(None);
    vm.moving = Some(Moving::Away(Remote { inputs: inputs.clone(), uncancellable: seen }));
    let carried = vm.carried.take();
    let half = Shell::new(launcher.clone(), guest, request, inputs, uncancellable)?;
    tokio::spawn(half.run(received, carried));
    Ok(())
}

/// Everything that keeps a guest from being moved.
fn unmovable(guest: &Guest) -> Vec<String> {
    let spec = &guest.qemu.spec;
    let mut faults = Vec::new();
    if spec.cpu.as_deref() == Some("max") {
        faults.push("CPU model max differs from host to host; name a model".to_owned());
    }
    faults
}

/// Ends the move that is under way, if it can still be ended. Idempotent.
///
/// # Errors
/// When it is too late, with the reason.
pub async fn cancel(launcher: &Handle) -> Result<(), vm::Error> {
    let moving = launcher.vm.lock().await.moving.clone();
    match moving {
        None | Some(Moving::Compared(_)) => Ok(()),
        Some(Moving::Here(gate)) => {
            gate.cancel.notify_one();
            Ok(())
        }
        Some(Moving::Away(remote)) => {
            if let Some(why) = *remote.uncancellable.borrow() {
                return Err(Error::Request(why.to_owned()).into());
            }
            // A half that is gone has nothing left to cancel.
            let _ = remote.inputs.send(Input::Core(Event::Cancel)).await;
            Ok(())
        }
    }
}

/// Has a guest that is on its way stand still until it is through, or the move is over. Idempotent.
///
/// # Errors
/// When none is on its way.
pub async fn disrupt(launcher: &Handle) -> Result<(), vm::Error> {
    let moving = launcher.vm.lock().await.moving.clone();
    match moving {
        Some(Moving::Away(remote)) => {
            // A half that is gone has nothing left to stop.
            let _ = remote.inputs.send(Input::Disrupt).await;
            Ok(())
        }
        _ => Err(Error::Request("no guest is on its way from here".to_owned()).into()),
    }
}

/// Orders for the task that drives the disks.
enum Order {
    /// The guest stands still: send the last delta.
    Last,
}

struct Shell {
    launcher: Handle,
    guest: Guest,
    request: SendRequest,
    core: Source,
    inputs: mpsc::Sender<Input>,
    uncancellable: watch::Sender<Option<&'static str>>,
    /// Turns true when the move is over.
    over: watch::Sender<bool>,
    bucket: Arc<SharedBucket>,
    copy: String,
    control: Option<Sent>,
    monitor: Option<Monitor>,
    prepared: Option<Prepared>,
    dialing: Option<Dialing>,
    sender: Option<Arc<Sender>>,
    disks: Option<tokio::task::JoinHandle<Disks>>,
    orders: Option<mpsc::Sender<Order>>,
    memory: Option<tokio::task::JoinHandle<()>>,
    pumps: Option<tokio::task::JoinHandle<()>>,
    memory_monitors: Vec<Monitor>,
    carried: Option<Carried>,
    throttled: bool,
    /// The guest stands still because it could not be caught.
    disrupted: bool,
    /// Somebody had the guest stand still before it set out.
    was_paused: bool,
    memory_retries: u32,
    swaps: mpsc::Sender<handover::record::Swap>,
    meter: Meter,
    begun: Instant,
    paused: Option<Instant>,
    resumed: Option<Duration>,
    /// The last look at what the bitmaps recorded.
    recorded: (Duration, u64),
    /// Bytes per second that the guest dirties.
    dirtied: f64,
}

impl Shell {
    fn new(
        launcher: Handle,
        guest: Guest,
        request: SendRequest,
        inputs: mpsc::Sender<Input>,
        uncancellable: watch::Sender<Option<&'static str>>,
    ) -> Result<Self, Error> {
        let ticket = &request.ticket;
        let here = Here::of(&launcher.config.host)?;
        let parties = Parties {
            epoch: guest.epoch,
            owner: guest.instance.clone(),
            host: here.peer.id.to_string().as_str().into(),
            to: Move {
                attempt: ticket.migration.as_str().into(),
                heir: InstanceId(ticket.heir.clone()),
                peer: ticket.peer.id.to_string().as_str().into(),
            },
        };
        let (swaps, asked) = mpsc::channel(8);
        tokio::spawn(swap_in_turn(launcher.clone(), asked, inputs.clone()));
        let was_paused = launcher.status().borrow().phase == Phase::Paused;
        Ok(Self {
            bucket: Arc::new(SharedBucket::new(request.policy.bandwidth)),
            memory_retries: request.policy.memory_retries,
            core: Source::new(parties),
            over: watch::channel(false).0,
            launcher,
            guest,
            request,
            inputs,
            uncancellable,
            copy: String::new(),
            control: None,
            monitor: None,
            prepared: None,
            dialing: None,
            sender: None,
            disks: None,
            orders: None,
            memory: None,
            pumps: None,
            memory_monitors: Vec::new(),
            carried: None,
            throttled: false,
            disrupted: false,
            was_paused,
            swaps,
            meter: Meter::default(),
            begun: Instant::now(),
            paused: None,
            resumed: None,
            recorded: (Duration::ZERO, 0),
            dirtied: 0.0,
        })
    }

    async fn run(mut self, mut received: mpsc::Receiver<Input>, carried: Option<Carried>) {
        self.copy = carried.as_ref().map_or_else(new_copy, |c| c.copy.clone());
        self.carried = carried;
        self.launcher.show(|s| {
            let status = Status::begin(&self.request.ticket.migration, Half::Source, "Preparing");
            s.migration = Some(status);
        });
        self.watch_qemu();
        match self.open() {
            Ok(()) => {}
            Err(why) => self.tell(Event::Failed(Failure::Other(why))),
        }
        let mut ticker = tokio::time::interval(Duration::from_millis(200));
        let mut since = tokio::time::Instant::now();
        while self.core.waiting().is_some() {
            let deadline = self.deadline().map(|d| since + d);
            let input = tokio::select! {
                input = received.recv() => input,
                _ = ticker.tick() => {
                    self.show_progress().await;
                    continue;
                }
                () = sleep_until(deadline) => Some(self.expired(&mut since)),
            };
            let Some(input) = input else { break };
            let before = self.core.phase();
            self.take(input).await;
            if self.core.phase() != before {
                since = tokio::time::Instant::now();
            }
        }
        self.close().await;
    }

    fn watch_qemu(&self) {
        let (process, inputs) = (self.guest.qemu.process.clone(), self.inputs.clone());
        tokio::spawn(async move {
            process.ended().await;
            // A half that is gone does not care.
            let _ = inputs.send(Input::Core(Event::QemuEnded)).await;
        });
    }

    /// The deadline of the present state, unless only its doubt is shown.
    fn deadline(&self) -> Option<Duration> {
        let waiting = self.core.waiting()?;
        match waiting.deadline {
            // Progress is watched where the data flows.
            Deadline::Data => None,
            kind => Some(self.request.policy.deadline(kind)),
        }
    }

    fn expired(&mut self, since: &mut tokio::time::Instant) -> Input {
        *since = tokio::time::Instant::now();
        let (reason, kind) =
            self.core.waiting().map_or(("", Deadline::Answer), |w| (w.reason, w.deadline));
        if matches!(kind, Deadline::Ledger | Deadline::Decision) && self.core.state != State::Arming
        {
            self.show_doubt(reason);
            return Input::Core(Event::Failed(Failure::Other(format!("in doubt: {reason}"))));
        }
        let waited = self.request.policy.deadline(kind);
        let why = format!("waited {waited:?} for {reason}");
        Input::Core(Event::Failed(Failure::Other(why)))
    }

    fn show_doubt(&self, reason: &str) {
        let reason = format!(
            "waiting for {reason}; the guest stands still here until an owner record can be asked"
        );
        self.launcher.show(|s| {
            if let Some(status) = &mut s.migration {
                status.outcome = Some(Outcome::InDoubt { reason });
            }
        });
    }

    async fn take(&mut self, input: Input) {
        match input {
            Input::Core(event) => self.step(event).await,
            Input::Opened { sent, monitor } => {
                self.control = Some(sent);
                self.monitor = Some(monitor);
            }
            Input::Prepared(prepared) => {
                self.prepared = Some(*prepared);
                self.step(Event::PeerPrepared).await;
            }
            Input::Standing => self.judge_delta().await,
            Input::Throttle(limit) => self.throttle(Some(limit)).await,
            Input::Disrupt => self.disrupt().await,
        }
    }

    async fn step(&mut self, event: Event) {
        if event == Event::PeerRunning {
            self.resumed = self.paused.map(|at| at.elapsed());
        }
        let before = self.core.phase();
        let (core, actions) = self.core.clone().step(event);
        self.core = core;
        if self.core.phase() != before {
            self.uncancellable.send_replace(self.core.can_cancel().err());
            self.show_phase();
            tracing::info!(from = before, to = self.core.phase(), "source");
            self.launcher.pass(&format!("source:{}", self.core.phase())).await;
        }
        for action in actions {
            self.act(action).await;
        }
    }

    async fn act(&mut self, action: Action) {
        match action {
            Action::StartSeeding => self.start_disks().await,
            Action::StartMemory => self.start_memory(),
            Action::SendLastDelta => {
                if let Some(orders) = &self.orders {
                    // A driver that is gone has said why.
                    let _ = orders.send(Order::Last).await;
                }
            }
            Action::FinishMemory => {
                if let Err(error) = memory::finish(&self.guest.qemu).await {
                    self.tell(Event::Failed(Failure::Other(error.to_string())));
                }
            }
            Action::CancelMemory | Action::ResumeGuest => self.bring_back(&action).await,
            Action::Swap(swap) => {
                // The task lives as long as this half.
                let _ = self.swaps.send(swap).await;
            }
            Action::AskPeer(swap) => self.ask_peer(swap),
            Action::SendCommit => self.say(&FromSource::Commit).await,
            Action::SendAborted(failure) => self.say(&FromSource::Aborted(failure)).await,
            Action::EndQemu => self.end_qemu().await,
            Action::MarkSuperseded => self.mark_superseded(),
        }
    }

    /// Round-trip time to the target's launcher; zero while unknown.
    fn rtt(&self) -> Duration {
        self.monitor.as_ref().and_then(Monitor::rtt).unwrap_or_default()
    }

    fn tell(&self, event: Event) {
        let inputs = self.inputs.clone();
        tokio::spawn(async move {
            let _ = inputs.send(Input::Core(event)).await;
        });
    }

    async fn say(&self, message: &FromSource) {
        if let Some(control) = &self.control {
            control.send(message).await;
        }
    }

    fn ask_peer(&self, swap: handover::record::Swap) {
        let (owner, peer) = (self.launcher.owner.clone(), self.request.ticket.peer.clone());
        let inputs = self.inputs.clone();
        tokio::spawn(async move {
            let answer = owner.swap_at(&peer, swap).await;
            if !matches!(answer, Answer::Done(_)) {
                tokio::time::sleep(SETTLE).await;
            }
            let _ = inputs.send(Input::Core(Event::Relinquished(answer))).await;
        });
    }
}

/// A ledger that did not answer is asked again after this.
const SETTLE: Duration = Duration::from_millis(300);

/// Asks the own ledger, one swap after another, in the order they were decided.
async fn swap_in_turn(
    launcher: Handle,
    mut asked: mpsc::Receiver<handover::record::Swap>,
    inputs: mpsc::Sender<Input>,
) {
    while let Some(swap) = asked.recv().await {
        let answer = launcher.owner.swap(swap).await;
        if answer == Answer::Unknown {
            tokio::time::sleep(SETTLE).await;
        }
        if inputs.send(Input::Core(Event::Swapped(answer))).await.is_err() {
            return;
        }
    }
}

async fn sleep_until(deadline: Option<tokio::time::Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

fn new_copy() -> String {
    uuid::Uuid::new_v4().to_string()
}
