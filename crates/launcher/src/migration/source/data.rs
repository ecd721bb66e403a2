//! Disks and memory on their way.

use super::show::FIXED;
use super::{Input, Order, Shell};
use crate::migration::bitmaps::Bitmaps;
use crate::migration::control;
use crate::migration::disks::{self, Disks, nodes};
use crate::migration::links::{DiskDialer, Links};
use crate::migration::memory::{self, Pumps};
use crate::migration::offer::Holds;
use crate::migration::progress::Outlook;
use crate::qemu::{Qemu, throttle_group};
use crate::vm::QMP_DEADLINE;
use channel::preface::Stream;
use channel::resumable::{self, Role};
use handover::Failure;
use handover::source::{Action, Event, State};
use mover::disk::Disk;
use mover::rounds::Next;
use mover::sender::{Options, Sender};
use qmp::commands::{QomSet, Stop};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// A target whose end of a memory stream failed says why within this time, if at all.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// Between rounds over a guest that hardly writes.
const ROUND_PAUSE: Duration = Duration::from_millis(50);

impl Shell {
    pub(super) async fn start_disks(&mut self) {
        if let Err(why) = self.try_start_disks().await {
            self.tell(Event::Failed(Failure::Other(why)));
        }
    }

    async fn try_start_disks(&mut self) -> Result<(), String> {
        let prepared = self.prepared.clone().ok_or("the target is not prepared")?;
        let dialing = self.dialing.clone().ok_or("the control stream is not open")?;
        let spec = &self.guest.qemu.spec;
        let mut opened = Vec::new();
        for disk in &spec.disks {
            opened.push(Arc::new(Disk::source(&disk.path).map_err(|e| e.to_string())?));
        }
        let tokens = prepared.disk_tokens.iter().cloned().enumerate();
        let dialers = tokens.map(|(n, token)| dialing.stream(Stream::Disk(n as u16), token));
        let connect =
            DiskDialer { dialers: dialers.collect(), runtime: tokio::runtime::Handle::current() };
        let options = Options {
            streams: self.request.policy.disk_streams,
            bucket: self.bucket.clone(),
            compression: self.request.policy.compression,
        };
        let is_copied =
            |(number, _): &(usize, _)| prepared.disks.get(*number) != Some(&Holds::Shared);
        let copied = spec.disks.iter().zip(&opened).enumerate().filter(is_copied);
        let parts = copied.clone().map(|(_, (disk, opened))| (&*disk.name, disk.size, opened));
        let nodes = nodes(parts);
        let copied: Vec<(u16, String)> =
            copied.map(|(number, (disk, _))| (number as u16, disk.name.clone())).collect();
        let sender = Arc::new(Sender::start(opened, Arc::new(connect), options));
        self.sender = Some(sender.clone());
        let (resumed, outstanding) = match self.carried.take() {
            Some(carried) if carried.bitmaps.are_of(&nodes) => {
                (Some(carried.bitmaps), Some(carried.outstanding))
            }
            // That attempt copied other disks.
            Some(carried) => {
                carried.bitmaps.end().await.map_err(|error| error.to_string())?;
                (None, None)
            }
            None => (None, None),
        };
        let is_resumed = resumed.is_some();
        let bitmaps = resumed.unwrap_or_else(|| {
            Bitmaps::new(self.guest.qemu.qmp.clone(), &self.launcher.folder, nodes)
        });
        let history = self.guest.history.clone();
        let disks = Disks::begin(copied, bitmaps, is_resumed, sender, &history).await;
        let disks = disks.map_err(|(error, _)| error.to_string())?;
        let (orders, ordered) = mpsc::channel(1);
        self.orders = Some(orders);
        let driver = Driver {
            holds: prepared.disks,
            copy: self.copy.clone(),
            outstanding,
            history,
            policy: self.request.policy.clone(),
            inputs: self.inputs.clone(),
            launcher: self.launcher.clone(),
        };
        self.disks = Some(tokio::spawn(driver.drive(disks, ordered)));
        Ok(())
    }

    pub(super) fn start_memory(&mut self) {
        if self.pumps.is_none()
            && let Err(why) = self.start_pumps()
        {
            return self.tell(Event::Failed(Failure::Other(why)));
        }
        let (qemu, inputs) = (self.guest.qemu.clone(), self.inputs.clone());
        let policy = self.request.policy.clone();
        let overhead = Outlook { rtt: self.rtt(), fixed: FIXED, ..Outlook::default() }.overhead();
        self.memory = Some(tokio::spawn(async move {
            let input = match memory::send(&qemu, &policy, overhead).await {
                Ok(()) => Input::Standing,
                Err(why) => Input::Core(Event::Failed(Failure::Other(why))),
            };
            // A half that is gone does not care.
            let _ = inputs.send(input).await;
        }));
    }

    fn start_pumps(&mut self) -> Result<(), String> {
        let prepared = self.prepared.as_ref().ok_or("the target is not prepared")?;
        let dialing = self.dialing.as_ref().ok_or("the control stream is not open")?;
        let mut ways = Vec::new();
        let limit = self.request.policy.bandwidth;
        let buffer = memory_buffer(self.rtt(), limit, prepared.memory_tokens.len());
        self.memory_monitors.clear();
        for (n, token) in prepared.memory_tokens.iter().cloned().enumerate() {
            let reconnect = self.request.policy.reconnect_seconds;
            let mut config = control::config(Role::Dialing, reconnect, Some(self.bucket.clone()));
            config.buffer = buffer;
            self.memory_monitors.push(config.monitor.clone());
            ways.push((Links::Dial(dialing.stream(Stream::Memory(n as u16), token)), config));
        }
        let mut pumps = Pumps::default();
        pumps.outgoing(&self.launcher.folder, ways).map_err(|e| e.to_string())?;
        let inputs = self.inputs.clone();
        self.pumps = Some(tokio::spawn(async move {
            let why = pumps.failed().await;
            if matches!(why, resumable::Error::Peer(_)) {
                // The target knows why, and is about to say it.
                tokio::time::sleep(LAST_WORDS).await;
            }
            let failure = Failure::Other(format!("a memory stream broke: {why}"));
            let _ = inputs.send(Input::Core(Event::Failed(failure))).await;
        }));
        Ok(())
    }

    /// QEMU has stopped the guest. If what it wrote meanwhile does not fit the
    /// pause, it runs again and the memory is sent once more.
    pub(super) async fn judge_delta(&mut self) {
        if self.core.state != State::Converging {
            return;
        }
        self.paused.get_or_insert_with(Instant::now);
        let delta = self.delta().await;
        let pause = Duration::from_millis(self.request.policy.rounds.max_downtime_ms);
        let room = (self.disk_rate() * pause.as_secs_f64()) as u64;
        let fits = delta.is_none_or(|delta| delta <= room.max(SMALL));
        if fits {
            return self.step(Event::GuestPaused).await;
        }
        tracing::info!(?delta, room, "the last delta does not fit the pause");
        if self.memory_retries == 0 {
            let mib = delta.unwrap_or(0) >> 20;
            let why = format!(
                "the guest wrote {mib} MiB to its disks while its memory was sent, which does not \
                 fit a pause of {pause:?}; allow a longer pause, more bandwidth or throttling"
            );
            return self.step(Event::Failed(Failure::Other(why))).await;
        }
        self.memory_retries -= 1;
        self.bring_back(&Action::CancelMemory).await;
        if self.request.policy.rounds.throttle {
            self.throttle(Some((room / 2).max(256 << 10))).await;
        }
        self.start_memory();
    }

    /// Stops the guest, that it may be caught.
    pub(super) async fn disrupt(&mut self) {
        let runs = matches!(self.core.state, State::Seeding | State::Arming | State::Converging);
        if !runs || self.disrupted || self.was_paused {
            return;
        }
        match self.guest.qemu.qmp.execute(Stop, QMP_DEADLINE).await {
            Ok(_) => {
                tracing::info!("the guest stands still until it is through");
                self.disrupted = true;
                self.paused.get_or_insert_with(Instant::now);
            }
            Err(error) => tracing::warn!(%error, "the guest cannot be stopped, and goes on"),
        }
    }

    async fn delta(&self) -> Option<u64> {
        let left = self.sender.as_ref().map_or(0, |s| s.left());
        disks::recorded(&self.guest.qemu).await.ok().map(|bytes| bytes + left)
    }

    pub(super) async fn bring_back(&mut self, action: &Action) {
        if let Some(memory) = self.memory.take() {
            memory.abort();
        }
        // A cancelled migration closes its streams: the next one has new ones.
        if let Some(pumps) = self.pumps.take() {
            pumps.abort();
        }
        let deadline = Duration::from_secs_f64(self.request.policy.answer_seconds);
        match memory::bring_back(&self.guest.qemu, deadline, self.was_paused).await {
            Ok(()) => {
                self.disrupted = false;
                self.resumed = self.paused.take().map(|at| at.elapsed());
                if *action == Action::ResumeGuest {
                    if !self.was_paused {
                        memory::announce(&self.guest.qemu).await;
                    }
                    self.tell(Event::GuestResumed);
                }
            }
            Err(why) => {
                tracing::error!(%why, "the guest cannot be resumed");
                self.launcher.show_phase(crate::status::Phase::Paused, Some(why));
                if *action == Action::ResumeGuest {
                    self.tell(Event::GuestResumed);
                }
            }
        }
    }

    /// Slows the guest's disk writes down, or lifts that.
    pub(super) async fn throttle(&mut self, limit: Option<u64>) {
        if limit.is_none() && !self.throttled {
            return;
        }
        self.throttled = limit.is_some();
        self.launcher.show(|s| {
            if let Some(m) = &mut s.migration {
                m.progress.throttle = limit;
            }
        });
        if let Err(error) = set_throttle(&self.guest.qemu, limit.unwrap_or(0)).await {
            tracing::warn!(%error, "the guest's disk writes cannot be throttled");
        }
    }

    pub(super) fn disk_rate(&self) -> f64 {
        let counters = self.sender.as_ref().map(|s| s.counters()).unwrap_or_default();
        rate_of(&counters, self.request.policy.disk_streams)
    }
}

/// Bytes that each memory stream holds: what a link of 1 GB/s has under way, and no more, and all of
/// them together what `limit` lets through in a short while. QEMU takes the filling of a buffer for
/// the link's speed, stops the guest too early, and the guest waits until the buffer is empty.
fn memory_buffer(rtt: Duration, limit: Option<u64>, streams: usize) -> u64 {
    /// Of a second.
    const WHILE: u64 = 20;
    /// A stream moves in pieces of this size.
    const LEAST: u64 = 64 << 10;
    let link = ((rtt.as_secs_f64() * 1e9) as u64).clamp(1 << 20, 64 << 20);
    let share = |limit: u64| (limit / WHILE / streams.max(1) as u64).max(LEAST);
    limit.map_or(link, |limit| link.min(share(limit)))
}

/// A delta of this size fits any pause: it is dominated by round trips.
const SMALL: u64 = 1 << 20;

/// Bytes per second that became safe while the streams were busy.
fn rate_of(counters: &mover::counters::Counters, streams: u16) -> f64 {
    let busy = counters.read_ns + counters.cpu_ns + counters.wire_ns + counters.window_ns;
    let seconds = busy as f64 / 1e9 / f64::from(streams.max(1));
    if counters.safe < 1 << 20 || seconds <= 0.0 {
        return 0.0;
    }
    counters.safe as f64 / seconds
}

async fn set_throttle(qemu: &Qemu, limit: u64) -> Result<(), qmp::Error> {
    for disk in &qemu.spec.disks {
        let set = QomSet {
            path: format!("/objects/{}", throttle_group(&disk.name)),
            property: "limits".into(),
            value: serde_json::json!({"bps-write": limit}),
        };
        qemu.qmp.execute(set, QMP_DEADLINE).await?;
    }
    Ok(())
}

/// Drives the disks beside everything else.
struct Driver {
    holds: Vec<Holds>,
    copy: String,
    outstanding: Option<Vec<mover::work::Outstanding>>,
    history: crate::migration::history::History,
    policy: crate::migration::policy::Policy,
    inputs: mpsc::Sender<Input>,
    launcher: crate::vm::Handle,
}

impl Driver {
    /// Seeds, rounds, last round. Returns the disks however it ends: what they
    /// have not brought over is carried to the next attempt.
    async fn drive(mut self, mut disks: Disks, mut orders: mpsc::Receiver<Order>) -> Disks {
        if let Err(error) = self.try_drive(&mut disks, &mut orders).await {
            let failure = Failure::Other(crate::chain(&error));
            // A half that is gone does not care.
            let _ = self.inputs.send(Input::Core(Event::Failed(failure))).await;
        }
        disks
    }

    async fn try_drive(
        &mut self,
        disks: &mut Disks,
        orders: &mut mpsc::Receiver<Order>,
    ) -> Result<(), disks::Error> {
        let stall = Duration::from_secs_f64(self.policy.stall_seconds);
        let outstanding = self.outstanding.take();
        let (holds, copy) = (self.holds.clone(), self.copy.clone());
        disks.seed(&holds, &copy, outstanding.as_deref(), &self.history, stall).await?;
        self.launcher.pass("source:Seeded").await;
        let mut fits = false;
        loop {
            let pause = if fits { ROUND_PAUSE } else { Duration::ZERO };
            tokio::select! {
                biased;
                Some(Order::Last) = orders.recv() => {
                    disks.last(stall).await?;
                    self.tell(Event::LastDeltaSafe).await;
                    return Ok(());
                }
                () = tokio::time::sleep(pause) => {}
            }
            let rate = rate_of(&disks.counters(), self.policy.disk_streams);
            let round = disks.round(&self.policy.rounds, rate, stall).await;
            if self.policy.disrupt && matches!(round, Err(disks::Error::Outrun { .. })) {
                let _ = self.inputs.send(Input::Disrupt).await;
                continue;
            }
            match round? {
                Next::Fits if !fits => {
                    fits = true;
                    self.tell(Event::DeltaFits).await;
                }
                Next::Throttle(limit) => {
                    let _ = self.inputs.send(Input::Throttle(limit)).await;
                }
                Next::Fits | Next::Round | Next::Outrun => {}
            }
        }
    }

    async fn tell(&self, event: Event) {
        // A half that is gone does not care.
        let _ = self.inputs.send(Input::Core(event)).await;
    }
}
