//! Two clusters: between a launcher and an owner record are API servers and
//! synchronizers, each of which may be down, and a trust that may be revoked.
//!
//! ```text
//! launcher of A -- handler -- API server of A: A's record
//!                     |
//!               synchronizer of A == while linked == synchronizer of B -- API server of B: B's record
//!                     |
//!                  recall: A's record says that the guest has left, and its owner has ended
//! ```
//!
//! What is answered over a way that breaks is not heard: `Unknown`, whether or
//! not it was written. A synchronizer keeps no state. A handler is no part of its
//! own here: it fails its launchers as its API server and its synchronizer do.

use crate::step::Rules;
use crate::twist::Twist;
use crate::world::{Ask, Budget, Harm, Host, Layout, Role, World};
use handover::handler;
use handover::record::{AttemptId, InstanceId, Move, Record, State as RecordState, Swap};
use handover::source::{self, Answer};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

/// What may be down for a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    Api(Host),
    Synchronizer(Host),
    /// The clusters' trust in each other: revoked, and given again.
    Link,
}

impl Part {
    const ALL: [Self; 5] = [
        Self::Api(Host::A),
        Self::Api(Host::B),
        Self::Synchronizer(Host::A),
        Self::Synchronizer(Host::B),
        Self::Link,
    ];
}

/// What is down, and what the records say besides who owns the VM.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Parts {
    apis: [bool; 2],
    synchronizers: [bool; 2],
    revoked: bool,
    /// Owners and heirs that a handler has seen to end, as far as that is written down.
    ended: [Vec<InstanceId>; 2],
    /// The attempt by which a guest is known to have come to the other cluster.
    arrived: [Option<AttemptId>; 2],
    /// The attempt of which a source has said that its guest has come, before it went.
    released: [Option<AttemptId>; 2],
    /// The heir of which the other cluster was told that it has adopted the guest.
    told: [Option<InstanceId>; 2],
    /// What the other record has told a synchronizer that called a guest back.
    recalls: [Option<Answer>; 2],
}

/// What can happen besides, between clusters.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Step {
    // The protocol.
    /// A question cannot be asked: the asker hears that nobody knows.
    Unheard(usize, usize),
    /// The control plane cancels a half of a move with a cluster that is not believed any more.
    Cancel(usize),
    /// A handler writes down who has ended.
    WriteEnds(Host),
    /// A synchronizer asks for a guest that may not have come.
    Recall(Host),
    /// And acts on what it was told.
    Recalled(Host),
    // Choices.
    Back(Part),
    /// A handler writes down what a source has said.
    WriteArrival(Host),
    // Faults.
    Down(Part),
    RecallComesLate(Host),
    HandBackComesLate(Host),
}

impl Parts {
    fn down(&mut self, part: Part) -> &mut bool {
        match part {
            Part::Api(host) => &mut self.apis[host as usize],
            Part::Synchronizer(host) => &mut self.synchronizers[host as usize],
            Part::Link => &mut self.revoked,
        }
    }

    fn is_down(&self, part: Part) -> bool {
        match part {
            Part::Api(host) => self.apis[host as usize],
            Part::Synchronizer(host) => self.synchronizers[host as usize],
            Part::Link => self.revoked,
        }
    }

    /// Whether a host's own record cannot be asked.
    pub fn is_mute(&self, host: Host) -> bool {
        self.apis[host as usize]
    }

    /// Whether synchronizers cannot ask each other.
    pub fn is_cut(&self) -> bool {
        self.revoked || self.synchronizers.contains(&true)
    }

    pub fn is_revoked(&self) -> bool {
        self.revoked
    }

    /// Whether all parts are there.
    pub fn are_whole(&self) -> bool {
        !self.is_cut() && !self.apis.contains(&true)
    }

    /// Whether its end is written down in a host's record.
    pub fn has_ended(&self, host: Host, instance: &InstanceId) -> bool {
        self.ended[host as usize].contains(instance)
    }

    /// Whether a question, or its answer, cannot get through.
    pub fn stop(&self, ask: &Ask) -> bool {
        self.is_mute(ask.host) || ask.as_peer.is_some() && self.is_cut()
    }
}

impl World {
    fn parts(&mut self) -> &mut Parts {
        Arc::make_mut(&mut self.parts)
    }

    /// The attempt by which the guest of this record has left and is not known to have come.
    pub fn is_astray(&self, host: Host) -> Option<(&Record, &AttemptId)> {
        let record = self.ledgers[host as usize].as_deref()?;
        let RecordState::Committed(to) = &record.state else { return None };
        let arrived = self.parts.arrived[host as usize].as_ref() == Some(&to.attempt);
        let gone = self.parts.has_ended(host, &record.owner) && !arrived;
        gone.then_some((record, &to.attempt))
    }

    /// Whether what is written down as having come has.
    pub fn arrivals_are_true(&self) -> bool {
        Host::ALL.iter().all(|host| {
            let Some(record) = self.ledgers[*host as usize].as_deref() else { return true };
            let RecordState::Committed(to) = &record.state else { return true };
            let other = self.ledgers[host.other() as usize].as_deref();
            self.parts.arrived[*host as usize].as_ref() != Some(&to.attempt)
                || other.is_some_and(|other| other.epoch > record.epoch)
        })
    }

    /// Owners and heirs of this host that have ended, where its record does not say so yet.
    fn unwritten(&self, host: Host) -> Vec<InstanceId> {
        let Some(record) = self.ledgers[host as usize].as_deref() else { return vec![] };
        let heir = match &record.state {
            RecordState::Expected(of) => Some(&of.heir),
            _ => None,
        };
        let named = [Some(&record.owner), heir].into_iter().flatten();
        let news = named.filter(|instance| {
            host.has(instance) && self.has_ended(instance) && !self.parts.has_ended(host, instance)
        });
        news.cloned().collect()
    }

    /// Forgets what no record needs any more.
    pub fn tidy_parts(&mut self) {
        for host in Host::ALL {
            let at = host as usize;
            let astray = self.is_astray(host).is_some();
            let Some(Record { owner, state, .. }) = self.ledgers[at].as_deref() else { continue };
            let of = move_of(state);
            let needs = |instance: &InstanceId| {
                instance == owner || of.is_some_and(|of| of.heir == *instance)
            };
            let parts = &self.parts;
            let arrived = parts.arrived[at].as_ref();
            let past = |attempt: &AttemptId| of.is_none_or(|of| of.attempt != *attempt);
            let over = arrived.is_some_and(past);
            let said = parts.released[at].as_ref();
            let said = said.is_some_and(|attempt| past(attempt) || arrived == Some(attempt));
            let idle = parts.recalls[at].is_some() && !astray;
            // Whether no heir is left that might give the guest back.
            let runs = parts.told[at].as_ref().is_some_and(|heir| {
                let gives_back = |ask: &Arc<Ask>| {
                    matches!(&ask.swap, Swap::Relinquish { adopted: Some(by), .. } if by == heir)
                };
                let role = self.find(heir).map(|at| &self.launchers[at].role);
                !matches!(role, Some(Role::Target(_))) && !self.late.iter().any(gives_back)
            });
            if idle || over || said || runs || !parts.ended[at].iter().all(needs) {
                let parts = Arc::make_mut(&mut self.parts);
                parts.ended[at].retain(needs);
                parts.arrived[at].take_if(|_| over);
                parts.released[at].take_if(|_| said);
                parts.recalls[at].take_if(|_| idle);
                parts.told[at].take_if(|_| runs);
            }
        }
    }
}

impl Rules {
    /// What goes on by itself between clusters.
    pub fn between(&self, world: &World, steps: &mut Vec<Step>) {
        if self.layout != Layout::TwoClusters {
            return;
        }
        for (at, launcher) in world.launchers.iter().enumerate() {
            for (i, ask) in launcher.asks.iter().enumerate() {
                if ask.answer.is_none() && world.parts.stop(ask) && self.matters(world, at, i) {
                    steps.push(Step::Unheard(at, i));
                }
            }
            if launcher.revoked_untold {
                steps.push(Step::Cancel(at));
            }
        }
        for host in Host::ALL {
            if !world.parts.is_mute(host) && !world.unwritten(host).is_empty() {
                steps.push(Step::WriteEnds(host));
            }
            if world.parts.is_down(Part::Synchronizer(host)) {
                continue;
            }
            match &world.parts.recalls[host as usize] {
                Some(_) if world.parts.is_mute(host) => {}
                Some(_) => steps.push(Step::Recalled(host)),
                None if self.would_recall(world, host) => steps.push(Step::Recall(host)),
                None => {}
            }
        }
    }

    /// What may fail between clusters, or come back.
    pub fn may_fail_between(&self, world: &World, steps: &mut Vec<Step>) {
        if self.layout != Layout::TwoClusters {
            return;
        }
        for host in Host::ALL {
            if world.parts.released[host as usize].is_some() && !world.parts.is_mute(host) {
                steps.push(Step::WriteArrival(host));
            }
        }
        let Budget { faults, revocations, .. } = world.budget;
        for part in Part::ALL {
            let left = if part == Part::Link { revocations } else { faults };
            match world.parts.is_down(part) {
                true => steps.push(Step::Back(part)),
                false if left > 0 => steps.push(Step::Down(part)),
                false => {}
            }
        }
        if faults == 0 {
            return;
        }
        for host in Host::ALL {
            match &world.parts.recalls[host as usize] {
                Some(Answer::Done(_)) => steps.push(Step::HandBackComesLate(host)),
                None if world.is_astray(host).is_some() && !world.parts.is_cut() => {
                    steps.push(Step::RecallComesLate(host));
                }
                _ => {}
            }
        }
    }

    /// Whether the asker does anything but ask again when nobody knows the answer.
    fn matters(&self, world: &World, at: usize, i: usize) -> bool {
        let mut next = world.clone();
        self.unheard(&mut next, at, i);
        next != *world
    }

    fn unheard(&self, world: &mut World, at: usize, i: usize) {
        let ask = world.launcher(at).asks.remove(i);
        self.answered(world, at, &ask, Answer::Unknown);
    }

    /// Does a step.
    pub fn step_between(&self, world: &mut World, step: Step) {
        match step {
            Step::Unheard(at, i) => self.unheard(world, at, i),
            Step::Cancel(at) => self.cancel(world, at),
            Step::WriteEnds(host) => {
                let ended = world.unwritten(host);
                let known = &mut world.parts().ended[host as usize];
                known.extend(ended);
                known.sort();
            }
            Step::Recall(host) => {
                let Some(ask) = recall(world, host) else { return };
                let answer = self.told(world, &ask);
                world.parts().recalls[host as usize] = Some(answer);
            }
            Step::Recalled(host) => self.recalled(world, host),
            Step::Back(part) => {
                if part == Part::Link {
                    self.seen.linked_anew.store(true, Relaxed);
                }
                *world.parts().down(part) = false;
            }
            Step::WriteArrival(host) => {
                let parts = world.parts();
                parts.arrived[host as usize] = parts.released[host as usize].take();
            }
            Step::Down(part) => self.down(world, part),
            Step::RecallComesLate(host) => {
                world.budget.faults -= 1;
                world.late.extend(recall(world, host).map(Arc::new));
            }
            Step::HandBackComesLate(host) => {
                world.budget.faults -= 1;
                world.late.extend(hand_back(world, host).map(Arc::new));
                world.parts().recalls[host as usize] = None;
            }
        }
    }

    fn down(&self, world: &mut World, part: Part) {
        match part {
            Part::Link => world.budget.revocations -= 1,
            _ => world.budget.faults -= 1,
        }
        *world.parts().down(part) = true;
        let parts = Arc::clone(&world.parts);
        for at in 0..world.launchers.len() {
            for i in 0..world.launchers[at].asks.len() {
                if parts.stop(&world.launchers[at].asks[i]) {
                    let ask = &mut world.launcher(at).asks[i];
                    Arc::make_mut(ask).answer = Some(Answer::Unknown);
                }
            }
        }
        // N.B. it keeps no state, and asks anew.
        world.parts().recalls = [None, None];
        if part == Part::Link {
            for at in 0..world.launchers.len() {
                let launcher = &world.launchers[at];
                let moves =
                    matches!(launcher.role, Role::Source(_) | Role::Target(_) | Role::Preparing(_));
                if moves && launcher.undecided() {
                    let launcher = world.launcher(at);
                    launcher.loss_untold |= !launcher.cut;
                    launcher.cut = true;
                    launcher.revoked_untold = !matches!(launcher.role, Role::Preparing(_));
                }
            }
        }
    }

    /// The control plane wants a half of a move to end.
    fn cancel(&self, world: &mut World, at: usize) {
        world.launcher(at).revoked_untold = false;
        match &world.launchers[at].role {
            Role::Source(source) if source.can_cancel().is_ok() => {
                self.source(world, at, source::Event::Cancel);
            }
            Role::Target(_) => self.fail(world, at),
            _ => {}
        }
    }

    /// What a synchronizer hears of the other record.
    fn told(&self, world: &mut World, ask: &Ask) -> Answer {
        let answer = match world.parts.stop(ask) {
            true => Answer::Unknown,
            false => self.carry_out(world, ask),
        };
        self.twist.heard(ask, world.parts.is_revoked(), answer)
    }

    /// Whether to ask for a guest would tell something.
    fn would_recall(&self, world: &World, host: Host) -> bool {
        let ask = recall(world, host).filter(|_| self.twist != Twist::NeverRecalls);
        let Some(ask) = ask else { return false };
        let answer = match world.parts.stop(&ask) {
            true => Answer::Unknown,
            false if self.tells_nothing(world, &ask) => return false,
            false => return true,
        };
        self.twist.heard(&ask, world.parts.is_revoked(), answer) != Answer::Unknown
    }

    fn recalled(&self, world: &mut World, host: Host) {
        let Some(answer) = world.parts().recalls[host as usize].take() else { return };
        let Some((record, attempt)) = world.is_astray(host) else { return };
        let (epoch, attempt) = (record.epoch, attempt.clone());
        match answer {
            Answer::Done(_) => {
                if let Some(back) = hand_back(world, host) {
                    self.seen.called_back.store(true, Relaxed);
                    self.carry_out(world, &back);
                }
            }
            Answer::Refused(Some(record)) if record.epoch > epoch => {
                self.seen.arrived.store(true, Relaxed);
                world.parts().arrived[host as usize] = Some(attempt);
            }
            Answer::Refused(_) | Answer::Unknown => {}
        }
    }

    /// What is written before the other cluster is answered; and what may not be granted to it.
    pub fn before_answer(&self, world: &mut World, ask: &Ask, granted: bool) {
        let record = world.ledgers[ask.host as usize].clone();
        if granted && calls_from_living(world, record.as_deref(), ask) {
            world.harm = Some(Harm::CalledBackFromLiving);
        }
        if ask.as_peer.is_some()
            && !granted
            && let Some(heir) = handler::told_of(record.as_deref(), &ask.swap)
        {
            world.parts().told[ask.host as usize] = Some(heir.clone());
        }
    }

    /// A source says, as the last thing, that its guest has come.
    pub fn released(&self, world: &mut World, at: usize, attempt: &AttemptId) {
        if self.layout == Layout::TwoClusters {
            let host = world.launchers[at].host;
            world.parts().released[host as usize] = Some(attempt.clone());
        }
    }

    /// Whether an heir comes too late to give a guest back.
    pub fn is_too_late(&self, world: &World, ask: &Ask) -> bool {
        let told = world.parts.told[ask.host as usize].as_ref();
        self.twist != Twist::GivesBackWhatCame && handler::is_too_late(told, &ask.swap)
    }
}

fn move_of(state: &RecordState) -> Option<&Move> {
    match state {
        RecordState::Idle => None,
        RecordState::Armed(of)
        | RecordState::Committed(of)
        | RecordState::Expected(of)
        | RecordState::Returned(of) => Some(of),
    }
}

/// Whether a guest, without its memory, is called back from an heir that may yet run it with that.
fn calls_from_living(world: &World, record: Option<&Record>, ask: &Ask) -> bool {
    let (Some(record), Swap::Relinquish { has_guest: false, .. }) = (record, &ask.swap) else {
        return false;
    };
    matches!(&record.state, RecordState::Expected(of) if !world.has_ended(&of.heir))
}

/// What a synchronizer asks of the other record, as its own says it.
fn recall(world: &World, host: Host) -> Option<Ask> {
    let (record, attempt) = world.is_astray(host)?;
    let swap = Swap::Relinquish {
        epoch: record.epoch,
        source: record.owner.clone(),
        attempt: attempt.clone(),
        peer: host.name().into(),
        adopted: None,
        has_guest: false,
    };
    Some(Ask { host: host.other(), as_peer: Some(host), swap, answer: None })
}

/// What it writes into its own record, once the other has let the guest go.
fn hand_back(world: &World, host: Host) -> Option<Ask> {
    let (record, attempt) = world.is_astray(host)?;
    let (epoch, owner, attempt) = (record.epoch, record.owner.clone(), attempt.clone());
    Some(Ask { host, as_peer: None, swap: Swap::HandBack { epoch, owner, attempt }, answer: None })
}
