//! The model's state: two hosts or clusters, their ledgers and handlers, and the launchers
//! of one VM. What the launchers and handlers decide is not here: that is the
//! crate's own functions.

use crate::clusters::Parts;
use handover::handler::Qemu;
use handover::record::{InstanceId, Record, State as RecordState, Swap, VmId};
use handover::source::{Answer, Source};
use handover::start::Start;
use handover::target::{Parties, Target};
use std::sync::Arc;

/// Where a launcher lives, and whose disk it uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Host {
    A,
    B,
}

impl Host {
    pub const ALL: [Self; 2] = [Self::A, Self::B];

    pub fn name(self) -> &'static str {
        match self {
            Self::A => "a",
            Self::B => "b",
        }
    }

    pub fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    /// Whether an instance is one of its launchers.
    pub fn has(self, instance: &InstanceId) -> bool {
        instance.0.starts_with(self.name())
    }
}

/// Between what the VM moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Layout {
    /// Each has a ledger, which launchers of both ask.
    TwoHosts,
    /// Of one cluster, whose ledger is host A's.
    OneLedger,
    /// Each is a cluster with an API server, which keeps its ledger, and a synchronizer.
    TwoClusters,
}

/// A launcher's QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Guest {
    /// QEMU has no guest: it waits for one, or was not started yet.
    None,
    /// The memory is on its way, complete: it only needs to be loaded.
    Arriving,
    /// The guest stands, complete.
    Loaded,
    /// It runs.
    Running,
    /// It stands at pre-switchover.
    Held,
    /// It stands, and its memory is being sent or was.
    Sent,
    /// QEMU has ended.
    Ended,
}

/// What the launchers say to each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Message {
    Prepared,
    Loaded,
    Commit,
    Running,
    Failed,
    Aborted,
    GaveBack,
}

/// A question on its way to a ledger, or its answer on the way back.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Ask {
    pub host: Host,
    /// Set when it comes from another host.
    pub as_peer: Option<Host>,
    pub swap: Swap,
    pub answer: Option<Answer>,
}

/// What a launcher is at.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Role {
    /// Its VM runs and nothing moves.
    Owner,
    Starting(Start),
    Source(Source),
    /// Waits for its own ledger to expect the VM.
    Preparing(Parties),
    Target(Target),
    /// The process is gone.
    Dead,
}

/// One life of a launcher.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Launcher {
    pub host: Host,
    pub instance: InstanceId,
    pub role: Role,
    pub guest: Guest,
    /// Whether the guest's memory is the newest.
    pub fresh: bool,
    /// QEMU ended and its launcher has not been told yet.
    pub end_untold: bool,
    /// The other end of its control stream.
    pub peer: Option<InstanceId>,
    pub inbox: Vec<Message>,
    /// The control stream is lost and this side has not been told yet.
    pub loss_untold: bool,
    /// What is sent does not arrive.
    pub cut: bool,
    /// The clusters do not trust each other, and it has not been told to end its move yet.
    pub revoked_untold: bool,
    pub asks: Vec<Arc<Ask>>,
}

/// What nobody may ever do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Harm {
    /// A guest ran on memory or on a disk that was not the newest.
    RanStale,
    /// A complete guest was ended that might still have been the one to run.
    EndedClaimant,
    /// A guest was called back, without its memory, from an heir that might still have run it.
    CalledBackFromLiving,
}

/// What may still go wrong, and what may still be tried.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Budget {
    pub faults: u8,
    pub cancels: u8,
    pub retries: u8,
    pub starts: u8,
    /// Two clusters do not trust each other for a time, or for ever.
    pub revocations: u8,
}

/// The whole.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct World {
    /// Host B's is unused when there is one ledger.
    pub ledgers: [Option<Arc<Record>>; 2],
    /// Whether a host's copy of the disk is complete and the newest.
    pub disks: [bool; 2],
    pub launchers: Vec<Arc<Launcher>>,
    /// Questions nobody waits for any more, which may still be carried out.
    pub late: Vec<Arc<Ask>>,
    /// Of two clusters.
    pub parts: Arc<Parts>,
    pub born: u8,
    pub budget: Budget,
    pub harm: Option<Harm>,
}

pub fn vm() -> VmId {
    "vm".into()
}

impl Launcher {
    pub fn new(host: Host, instance: InstanceId, role: Role) -> Self {
        Self {
            host,
            instance,
            role,
            guest: Guest::None,
            fresh: false,
            end_untold: false,
            peer: None,
            inbox: vec![],
            loss_untold: false,
            cut: false,
            revoked_untold: false,
            asks: vec![],
        }
    }

    pub fn alive(&self) -> bool {
        self.role != Role::Dead
    }

    /// Whether its half of a move still has something to decide.
    pub fn undecided(&self) -> bool {
        match &self.role {
            Role::Owner | Role::Dead => false,
            Role::Preparing(_) => true,
            Role::Starting(start) => !matches!(
                start.state,
                handover::start::State::Started { .. } | handover::start::State::Refused { .. }
            ),
            Role::Source(source) => source.waiting().is_some(),
            Role::Target(target) => target.waiting().is_some(),
        }
    }

    /// Queues a question; the same question is not asked twice at once.
    pub fn ask(&mut self, host: Host, as_peer: Option<Host>, swap: Swap) {
        let ask = Arc::new(Ask { host, as_peer, swap, answer: None });
        if !self.asks.contains(&ask) {
            self.asks.push(ask);
            self.asks.sort_by(|a, b| a.swap.cmp(&b.swap));
        }
    }
}

impl World {
    pub fn find(&self, instance: &InstanceId) -> Option<usize> {
        self.launchers.iter().position(|l| l.instance == *instance)
    }

    pub fn launcher(&mut self, at: usize) -> &mut Launcher {
        Arc::make_mut(&mut self.launchers[at])
    }

    pub fn add(&mut self, host: Host, role: impl FnOnce(InstanceId) -> Role) -> usize {
        let instance = InstanceId(format!("{}{}", host.name(), self.born));
        self.born += 1;
        self.launchers.push(Arc::new(Launcher::new(host, instance.clone(), role(instance))));
        self.launchers.len() - 1
    }

    /// Whether an instance has no QEMU any more, nor will have one.
    pub fn has_ended(&self, instance: &InstanceId) -> bool {
        // One that is forgotten here was, because it ended.
        self.find(instance).is_none_or(|at| {
            let launcher = &self.launchers[at];
            launcher.guest == Guest::Ended || (launcher.guest == Guest::None && !launcher.alive())
        })
    }

    /// What a handler knows that has seen the QEMUs of the hosts which it knows.
    pub fn qemu_of(&self, instance: &InstanceId, known: impl Fn(Host) -> bool) -> Qemu {
        if !Host::ALL.iter().any(|host| known(*host) && host.has(instance)) {
            return Qemu::Unknown;
        }
        if self.has_ended(instance) { Qemu::Ended } else { Qemu::Alive }
    }

    /// A guest begins to run: whatever is elsewhere grows old.
    pub fn run(&mut self, at: usize, cold: bool) {
        let host = self.launchers[at].host;
        let stale = !self.disks[host as usize] || !(cold || self.launchers[at].fresh);
        if stale {
            self.harm = Some(Harm::RanStale);
        }
        for other in 0..self.launchers.len() {
            if other != at && self.launchers[other].fresh {
                self.launcher(other).fresh = false;
            }
        }
        self.disks = Host::ALL.map(|h| h == host && self.disks[h as usize]);
        let launcher = self.launcher(at);
        launcher.guest = Guest::Running;
        launcher.fresh = true;
    }

    /// The launcher's process ends, by a crash or because its work is done.
    pub fn bury(&mut self, at: usize) {
        self.hang_up(at);
        let launcher = self.launcher(at);
        launcher.role = Role::Dead;
        launcher.inbox.clear();
        launcher.loss_untold = false;
        launcher.end_untold = false;
        launcher.revoked_untold = false;
        launcher.peer = None;
        let asks = std::mem::take(&mut launcher.asks);
        self.late.extend(asks.into_iter().filter(|ask| ask.answer.is_none()));
    }

    /// This end of the control stream closes.
    pub fn hang_up(&mut self, at: usize) {
        let Some(peer) = self.launchers[at].peer.clone().and_then(|p| self.find(&p)) else {
            return;
        };
        if self.launchers[peer].peer.as_ref() != Some(&self.launchers[at].instance) {
            return;
        }
        if self.launchers[peer].undecided() && !self.launchers[peer].cut {
            let peer = self.launcher(peer);
            peer.loss_untold = true;
            peer.cut = true;
        }
    }

    pub fn send(&mut self, at: usize, message: Message) {
        if self.launchers[at].cut {
            return;
        }
        let Some(peer) = self.launchers[at].peer.clone().and_then(|p| self.find(&p)) else {
            return;
        };
        let takes = matches!(self.launchers[peer].role, Role::Source(_) | Role::Target(_));
        if takes && self.launchers[peer].peer.as_ref() == Some(&self.launchers[at].instance) {
            self.launcher(peer).inbox.push(message);
        }
    }

    /// Forgets what can no longer matter, so that equal futures are equal states.
    pub fn tidy(&mut self, ledger: impl Fn(Host) -> usize) {
        self.launchers.retain(|l| l.alive() || !matches!(l.guest, Guest::Ended | Guest::None));
        for at in 0..self.launchers.len() {
            let l = &self.launchers[at];
            let hears = !l.inbox.is_empty() || l.loss_untold || l.revoked_untold;
            if l.undecided() || (l.asks.is_empty() && !hears) {
                continue;
            }
            let l = self.launcher(at);
            l.loss_untold = false;
            l.revoked_untold = false;
            l.inbox.clear();
            let asks = std::mem::take(&mut l.asks);
            self.late.extend(asks.into_iter().filter(|ask| ask.answer.is_none()));
        }
        let ledgers = &self.ledgers;
        self.late.retain(|ask| {
            let now = ledgers[ledger(ask.host)].as_ref().map_or(0, |r| r.epoch);
            last_epoch(&ask.swap) >= now
        });
        self.late.sort_by(|a, b| a.swap.cmp(&b.swap));
        self.late.dedup();
    }

    pub fn running(&self) -> usize {
        self.launchers.iter().filter(|l| l.guest == Guest::Running).count()
    }

    /// Whether the ledger lets this launcher's guest run.
    pub fn may_run(&self, launcher: &Launcher, ledger: usize) -> bool {
        self.ledgers[ledger].as_ref().is_some_and(|record| {
            record.owner == launcher.instance
                && matches!(record.state, RecordState::Idle | RecordState::Armed(_))
        })
    }
}

/// The last epoch of a record that the swap can still change.
fn last_epoch(swap: &Swap) -> u64 {
    match swap {
        Swap::Start { seen, .. } => seen.unwrap_or(0),
        Swap::Arm { epoch, .. }
        | Swap::Commit { epoch, .. }
        | Swap::Abort { epoch, .. }
        | Swap::Expect { epoch, .. }
        | Swap::Adopt { epoch, .. } => *epoch,
        Swap::Relinquish { epoch, .. } | Swap::HandBack { epoch, .. } => epoch + 1,
    }
}
