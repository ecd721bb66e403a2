//! How the model's world goes on: the shell that carries out what the crate's
//! functions decide, and the faults.

use crate::twist::Twist;
use crate::world::{Ask, Budget, Guest, Harm, Host, Launcher, Layout, Message, Role, World, vm};
use handover::Failure;
use handover::handler::Qemu;
use handover::record::{HostId, Move, Record, Refused, State as RecordState, Swap, Verdict};
use handover::source::{self, Answer, Source};
use handover::start::{self, Start, Starter};
use handover::target::{self, Target};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

/// The failure of every step: the model does not tell reasons apart.
fn failure() -> Failure {
    Failure::PeerLost
}

/// Who keeps which ledger, and what is deliberately wrong.
#[derive(Debug, Clone)]
pub struct Rules {
    pub layout: Layout,
    pub twist: Twist,
    pub seen: Arc<Seen>,
}

/// What happened in some run.
#[derive(Debug, Default)]
pub struct Seen {
    moved: AtomicBool,
    aborted: AtomicBool,
    promoted: AtomicBool,
    handed_back: AtomicBool,
    recalled: AtomicBool,
    /// By a synchronizer.
    pub called_back: AtomicBool,
    pub arrived: AtomicBool,
    /// Nothing went on any more, as long as trust was revoked.
    pub in_doubt: AtomicBool,
    pub linked_anew: AtomicBool,
}

impl Seen {
    /// Whether all has happened that can.
    pub fn all(&self, layout: Layout, budget: &Budget) -> bool {
        let all = |these: &[&AtomicBool]| these.iter().all(|seen| seen.load(Relaxed));
        // A start finds a guest astray only after both launchers have died.
        let astray = budget.faults < 2 || all(&[&self.recalled]);
        let clusters = layout != Layout::TwoClusters || all(&[&self.called_back, &self.arrived]);
        let revoked = budget.revocations == 0 || all(&[&self.in_doubt, &self.linked_anew]);
        let always = all(&[&self.moved, &self.aborted, &self.promoted, &self.handed_back]);
        always && astray && clusters && revoked
    }

    fn note(&self, ask: &Ask, before: Option<&Record>, after: &Record) {
        let changed = before != Some(after);
        let seen = match (&ask.swap, ask.as_peer) {
            (Swap::Adopt { .. }, _) => &self.moved,
            (Swap::Abort { .. }, Some(_)) if matches!(after.state, RecordState::Committed(_)) => {
                &self.promoted
            }
            (Swap::Abort { .. }, _) => &self.aborted,
            (Swap::HandBack { .. }, _) => &self.handed_back,
            (Swap::Relinquish { has_guest: false, .. }, _) => &self.recalled,
            _ => return,
        };
        if changed {
            seen.store(true, Relaxed);
        }
    }
}

impl Rules {
    pub fn one_ledger(&self) -> bool {
        self.layout == Layout::OneLedger
    }

    pub fn ledger(&self, host: Host) -> usize {
        if self.one_ledger() { 0 } else { host as usize }
    }

    /// Hosts of one ledger are one host.
    pub fn id(&self, host: Host) -> HostId {
        if self.one_ledger() { "a".into() } else { host.name().into() }
    }

    fn known_to(&self, keeper: Host) -> impl Fn(Host) -> bool + use<> {
        let one = self.one_ledger();
        move |host| one || host == keeper
    }

    /// What the handler of a ledger makes of a swap; not yet written.
    pub fn judge(&self, world: &World, ask: &Ask) -> Result<Record, Refused> {
        let current = world.ledgers[self.ledger(ask.host)].as_deref();
        if self.is_too_late(world, ask) {
            return Err(Refused { current: current.cloned(), why: "it has come".into() });
        }
        let known = self.known_to(ask.host);
        let qemu_of = |instance: &_| match ask.as_peer {
            // Synchronizers see no processes: who is not written down as ended may live.
            Some(_) if self.layout == Layout::TwoClusters => {
                if world.parts.has_ended(ask.host, instance) { Qemu::Ended } else { Qemu::Alive }
            }
            _ => world.qemu_of(instance, &known),
        };
        match ask.as_peer {
            None => self.twist.local(&vm(), current, qemu_of, &ask.swap),
            Some(host) => self.twist.peer(&vm(), current, &self.id(host), qemu_of, &ask.swap),
        }
    }

    /// Writes it.
    pub fn carry_out(&self, world: &mut World, ask: &Ask) -> Answer {
        let judged = self.judge(world, ask);
        if self.layout == Layout::TwoClusters {
            self.before_answer(world, ask, judged.is_ok());
        }
        match judged {
            Ok(record) => {
                self.seen.note(ask, world.ledgers[self.ledger(ask.host)].as_deref(), &record);
                world.ledgers[self.ledger(ask.host)] = Some(record.clone().into());
                Answer::Done(record)
            }
            Err(refused) => Answer::Refused(refused.current),
        }
    }

    /// Whether an answer would tell the asker nothing, so that it asks again.
    pub fn tells_nothing(&self, world: &World, ask: &Ask) -> bool {
        ask.as_peer.is_some()
            && matches!(self.judge(world, ask), Err(Refused { current: None, .. }))
    }

    /// Tells a launcher what its ledger said.
    pub fn answered(&self, world: &mut World, at: usize, ask: &Ask, answer: Answer) {
        let own = ask.as_peer.is_none();
        let answer = self.twist.heard(ask, world.parts.is_revoked(), answer);
        match &world.launchers[at].role {
            Role::Source(_) if own => self.source(world, at, source::Event::Swapped(answer)),
            Role::Source(_) => self.source(world, at, source::Event::Relinquished(answer)),
            Role::Target(_) if own => self.target(world, at, target::Event::Swapped(answer)),
            Role::Target(_) => self.target(world, at, target::Event::Owner(answer)),
            Role::Starting(_) if own => self.start(world, at, start::Event::Swapped(answer)),
            Role::Starting(_) => self.start(world, at, start::Event::Recalled(answer)),
            Role::Preparing(_) => self.expected(world, at, &answer),
            Role::Owner | Role::Dead => {}
        }
    }

    fn expected(&self, world: &mut World, at: usize, answer: &Answer) {
        let Role::Preparing(parties) = world.launchers[at].role.clone() else { return };
        let host = world.launchers[at].host;
        match answer {
            Answer::Done(_) => {
                world.launcher(at).role = Role::Target(Target::new(parties));
                world.send(at, Message::Prepared);
            }
            Answer::Unknown => world.launcher(at).ask(host, None, parties.expect()),
            Answer::Refused(_) => world.bury(at),
        }
    }

    /// A message arrives.
    pub fn deliver(&self, world: &mut World, at: usize, message: Message) {
        use {Message as M, source::Event as S, target::Event as T};
        match &world.launchers[at].role {
            Role::Source(_) => {
                let event = match message {
                    M::Prepared => S::PeerPrepared,
                    M::Loaded => S::PeerLoaded,
                    M::Running => S::PeerRunning,
                    M::Failed => S::Failed(failure()),
                    M::GaveBack => S::PeerGaveBack(failure()),
                    M::Commit | M::Aborted => return,
                };
                self.source(world, at, event);
            }
            Role::Target(_) => {
                let event = match message {
                    M::Commit => T::PeerCommitted,
                    M::Aborted => T::PeerAborted(failure()),
                    _ => return,
                };
                self.target(world, at, event);
            }
            _ => {}
        }
    }

    /// The control stream is given up.
    pub fn lose(&self, world: &mut World, at: usize) {
        let launcher = world.launcher(at);
        launcher.loss_untold = false;
        if launcher.cut {
            launcher.inbox.clear();
        }
        match launcher.role {
            Role::Source(_) => self.source(world, at, source::Event::PeerLost),
            Role::Target(_) => self.target(world, at, target::Event::PeerLost),
            Role::Preparing(_) => world.bury(at),
            _ => {}
        }
    }

    /// A half of the move fails, is cancelled, or has waited too long.
    pub fn fail(&self, world: &mut World, at: usize) {
        match world.launchers[at].role {
            Role::Source(_) => self.source(world, at, source::Event::Failed(failure())),
            Role::Target(_) => self.target(world, at, target::Event::Failed(failure())),
            _ => {}
        }
    }

    /// The launcher hears that its QEMU has ended.
    pub fn tell_end(&self, world: &mut World, at: usize) {
        world.launcher(at).end_untold = false;
        match world.launchers[at].role {
            Role::Source(_) => self.source(world, at, source::Event::QemuEnded),
            Role::Target(_) => self.target(world, at, target::Event::QemuEnded),
            Role::Preparing(_) | Role::Owner => world.bury(at),
            _ => {}
        }
    }

    /// Starts the VM on a host.
    pub fn begin_start(&self, world: &mut World, host: Host) {
        let record = world.ledgers[self.ledger(host)].clone();
        let mut actions = vec![];
        let at = world.add(host, |instance| {
            let starter = Starter { instance, host: self.id(host), forced: false };
            let (start, first) = Start::begin(starter, record.as_deref());
            actions = first;
            Role::Starting(start)
        });
        self.act_start(world, at, actions);
    }

    fn start(&self, world: &mut World, at: usize, event: start::Event) {
        let role = std::mem::replace(&mut world.launcher(at).role, Role::Dead);
        let Role::Starting(start) = role else {
            world.launcher(at).role = role;
            return;
        };
        let (start, actions) = start.step(event);
        world.launcher(at).role = Role::Starting(start);
        self.act_start(world, at, actions);
    }

    fn act_start(&self, world: &mut World, at: usize, actions: Vec<start::Action>) {
        let host = world.launchers[at].host;
        for action in actions {
            match action {
                start::Action::Swap(swap) => world.launcher(at).ask(host, None, swap),
                start::Action::AskPeer(_, swap) => {
                    world.launcher(at).ask(host.other(), Some(host), swap);
                }
            }
        }
        let Role::Starting(start) = &world.launchers[at].role else { return };
        match start.state {
            start::State::Started { .. } => {
                world.launcher(at).role = Role::Owner;
                world.run(at, true);
            }
            start::State::Refused { .. } => world.bury(at),
            _ => {}
        }
    }

    /// Whether another move may begin of an owner's VM: between hosts once more to the other one,
    /// between clusters also back, when all parts are there and the last heir has ended.
    pub fn may_move(&self, world: &World, owner: &Launcher) -> bool {
        let record = world.ledgers[self.ledger(owner.host)].as_ref();
        let owns = |r: &Arc<Record>| r.owner == owner.instance && r.state == RecordState::Idle;
        let can = match self.layout {
            Layout::TwoClusters => {
                let last = world.launchers.iter().any(|l| l.host != owner.host && l.alive());
                world.parts.are_whole() && !last
            }
            _ => owner.host == Host::A,
        };
        can && owner.guest == Guest::Running && record.is_some_and(owns)
    }

    /// Begins to move the VM of a launcher that runs it to the other host.
    pub fn begin_move(&self, world: &mut World, at: usize, epoch: u64) {
        let from = world.launchers[at].clone();
        let to = from.host.other();
        let attempt = handover::record::AttemptId(format!("m{}", world.born));
        let heir_at = world.add(to, |heir| {
            Role::Preparing(target::Parties {
                epoch,
                heir,
                source: from.instance.clone(),
                attempt: attempt.clone(),
                peer: self.id(from.host),
            })
        });
        let heir = world.launchers[heir_at].instance.clone();
        let Role::Preparing(parties) = world.launchers[heir_at].role.clone() else { return };
        let target = world.launcher(heir_at);
        target.ask(to, None, parties.expect());
        target.peer = Some(from.instance.clone());
        let source = world.launcher(at);
        source.peer = Some(heir.clone());
        source.cut = false;
        source.inbox.clear();
        source.role = Role::Source(Source::new(source::Parties {
            epoch,
            owner: from.instance.clone(),
            host: self.id(from.host),
            to: Move { attempt, heir, peer: self.id(to) },
        }));
    }

    /// Steps a source and carries out its actions.
    pub fn source(&self, world: &mut World, at: usize, event: source::Event) {
        let role = std::mem::replace(&mut world.launcher(at).role, Role::Dead);
        let Role::Source(source) = role else {
            world.launcher(at).role = role;
            return;
        };
        let (mut source, actions) = self.twist.source(source, event);
        let to = source.parties.to.clone();
        forget_reason(&mut source.state);
        world.launcher(at).role = Role::Source(source);
        let host = world.launchers[at].host;
        for action in actions {
            use source::Action as A;
            match action {
                A::StartSeeding | A::StartMemory | A::SendLastDelta | A::MarkSuperseded => {}
                A::FinishMemory => {
                    if world.launchers[at].guest == Guest::Held {
                        world.launcher(at).guest = Guest::Sent;
                        self.send_memory(world, at);
                    }
                }
                A::CancelMemory => {
                    if world.launchers[at].guest == Guest::Held {
                        world.run(at, false);
                    }
                }
                A::Swap(swap) => world.launcher(at).ask(host, None, swap),
                A::AskPeer(swap) => {
                    world.launcher(at).ask(host.other(), Some(host), swap);
                }
                A::SendCommit => world.send(at, Message::Commit),
                A::SendAborted(_) => world.send(at, Message::Aborted),
                // Takes a while: see `progress`.
                A::ResumeGuest => {}
                A::EndQemu => self.end_source(world, at, &to),
            }
        }
        let Role::Source(source) = &world.launchers[at].role else { return };
        match source.state {
            source::State::Released => {
                self.released(world, at, &to.attempt);
                world.bury(at);
            }
            source::State::Ended { .. } if world.launchers[at].guest == Guest::Ended => {
                world.bury(at);
            }
            source::State::Ended { .. } => {
                world.hang_up(at);
                let launcher = world.launcher(at);
                launcher.role = Role::Owner;
                launcher.peer = None;
                launcher.inbox.clear();
            }
            _ => {}
        }
    }

    fn send_memory(&self, world: &mut World, at: usize) {
        let Some(peer) = world.launchers[at].peer.clone().and_then(|p| world.find(&p)) else {
            return;
        };
        let fresh = world.launchers[at].fresh;
        let takes = matches!(&world.launchers[peer].role, Role::Target(_));
        if takes && world.launchers[peer].guest == Guest::None && !world.launchers[at].cut {
            let target = world.launcher(peer);
            target.guest = Guest::Arriving;
            target.fresh = fresh;
        }
    }

    /// R5: who ends a complete guest must have a ledger's word for it.
    fn end_source(&self, world: &mut World, at: usize, to: &Move) {
        let launcher = &world.launchers[at];
        let own = world.ledgers[self.ledger(launcher.host)].as_ref();
        let claim = own.is_some_and(|record| {
            record.owner == launcher.instance
                && match &record.state {
                    RecordState::Committed(committed) => {
                        let heirs = world.ledgers[self.ledger(launcher.host.other())].as_ref();
                        *committed != *to || heirs.is_none_or(|r| r.epoch <= record.epoch)
                    }
                    RecordState::Idle | RecordState::Armed(_) => true,
                    // Given back by an heir of whose adoption this source was told.
                    RecordState::Expected(_) | RecordState::Returned(_) => false,
                }
        });
        if claim && launcher.guest != Guest::Ended {
            world.harm = Some(Harm::EndedClaimant);
        }
        world.launcher(at).guest = Guest::Ended;
    }

    /// Steps a target and carries out its actions.
    pub fn target(&self, world: &mut World, at: usize, event: target::Event) {
        let role = std::mem::replace(&mut world.launcher(at).role, Role::Dead);
        let Role::Target(target) = role else {
            world.launcher(at).role = role;
            return;
        };
        let (mut target, actions) = self.twist.target(target, event);
        let parties = target.parties.clone();
        let withdrawing = matches!(target.state, target::State::Withdrawing { .. });
        forget_target_reason(&mut target.state);
        world.launcher(at).role = Role::Target(target);
        let host = world.launchers[at].host;
        let other = host.other();
        for action in actions {
            use target::Action as A;
            match action {
                A::SendLoaded => world.send(at, Message::Loaded),
                A::SendRunning => world.send(at, Message::Running),
                A::SendFailed(_) => world.send(at, Message::Failed),
                A::SendGaveBack(_) => world.send(at, Message::GaveBack),
                A::AskOwner(swap) => world.launcher(at).ask(other, Some(host), swap),
                A::Swap(swap) => world.launcher(at).ask(host, None, swap),
                // Takes a while: see `progress`.
                A::Activate | A::Announce => {}
                A::EndQemu => self.end_target(world, at, &parties, withdrawing),
            }
        }
        let Role::Target(target) = &world.launchers[at].role else { return };
        match target.state {
            target::State::Running => {
                let ended = world.launchers[at].guest == Guest::Ended;
                world.hang_up(at);
                let launcher = world.launcher(at);
                launcher.role = Role::Owner;
                launcher.peer = None;
                if ended {
                    world.bury(at);
                }
            }
            target::State::GaveBack { .. } | target::State::Discarded { .. } => {
                // QEMU does not outlive its launcher's work.
                world.launcher(at).guest = Guest::Ended;
                world.bury(at);
            }
            _ => {}
        }
    }

    fn end_target(
        &self,
        world: &mut World,
        at: usize,
        parties: &target::Parties,
        withdrawing: bool,
    ) {
        let launcher = &world.launchers[at];
        let of = Move {
            attempt: parties.attempt.clone(),
            heir: parties.heir.clone(),
            peer: parties.peer.clone(),
        };
        let decides = world.ledgers[self.ledger(launcher.host.other())].as_ref();
        let open = decides.is_some_and(|record| {
            matches!(
                record.verdict(parties.epoch, &parties.source, &of),
                Verdict::Open | Verdict::Committed
            )
        });
        let own = world.ledgers[self.ledger(launcher.host)].as_ref();
        let expected = self.one_ledger()
            || own
                .is_some_and(|r| r.state == RecordState::Expected(of) && r.epoch == parties.epoch);
        if launcher.guest == Guest::Loaded && open && expected && !withdrawing {
            world.harm = Some(Harm::EndedClaimant);
        }
        let launcher = world.launcher(at);
        launcher.end_untold = launcher.guest != Guest::Ended;
        launcher.guest = Guest::Ended;
    }

    /// Whether QEMU and the mover have something to do for a launcher.
    pub fn can_progress(&self, world: &World, at: usize) -> bool {
        use {source::State as S, target::State as T};
        let launcher = &world.launchers[at];
        match (&launcher.role, launcher.guest) {
            (Role::Source(source), guest) => match (&source.state, guest) {
                (S::Seeding | S::Converging, Guest::Running) => true,
                (S::Paused, Guest::Held) => self.reaches(world, at),
                (S::Resuming { .. }, guest) => guest != Guest::Ended,
                _ => false,
            },
            (Role::Target(target), guest) => matches!(
                (&target.state, guest),
                (T::Receiving, Guest::Arriving) | (T::Activating, Guest::Loaded)
            ),
            _ => false,
        }
    }

    /// They do it.
    pub fn progress(&self, world: &mut World, at: usize) {
        use {source::Event as S, target::Event as T};
        let (host, guest) = (world.launchers[at].host, world.launchers[at].guest);
        let phase = match &world.launchers[at].role {
            Role::Source(source) => source.phase(),
            Role::Target(target) => target.phase(),
            _ => return,
        };
        match phase {
            "Seeding" => self.source(world, at, S::DeltaFits),
            "Converging" => {
                world.launcher(at).guest = Guest::Held;
                self.source(world, at, S::GuestPaused);
            }
            "Paused" => {
                world.disks = Host::ALL.map(|h| world.disks[h as usize] || h != host);
                self.source(world, at, S::LastDeltaSafe);
            }
            "Resuming" => {
                if guest != Guest::Running {
                    world.run(at, false);
                }
                self.source(world, at, S::GuestResumed);
            }
            "Receiving" => {
                world.launcher(at).guest = Guest::Loaded;
                self.target(world, at, T::MemoryLoaded);
            }
            "Activating" => {
                world.run(at, false);
                self.target(world, at, T::GuestRunning);
            }
            _ => {}
        }
    }

    /// Whether a source's data reaches its target.
    fn reaches(&self, world: &World, at: usize) -> bool {
        let launcher = &world.launchers[at];
        let target = launcher.peer.as_ref().and_then(|p| world.find(p));
        !launcher.cut
            && target.is_some_and(|at| matches!(world.launchers[at].role, Role::Target(_)))
    }
}

fn forget_reason(state: &mut source::State) {
    use source::State as S;
    match state {
        S::Aborting { failure: f, .. }
        | S::HandingBack { failure: f }
        | S::Resuming { failure: f }
        | S::Ended { failure: f } => *f = failure(),
        _ => {}
    }
}

fn forget_target_reason(state: &mut target::State) {
    use target::State as S;
    match state {
        S::Withdrawing { failure: f }
        | S::GivingBack { failure: f, .. }
        | S::GaveBack { failure: f }
        | S::Discarded { failure: f } => *f = failure(),
        _ => {}
    }
}
