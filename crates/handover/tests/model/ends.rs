//! Where runs end, and what must hold there.

use crate::Handover;
use crate::world::{Ask, Guest, Host, Launcher, Layout, World};
use handover::record::State as RecordState;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

impl Handover {
    /// Whether nothing goes on by itself any more.
    fn is_quiet(&self, world: &World) -> bool {
        let mut steps = vec![];
        self.steps(world, &mut steps);
        steps.is_empty()
    }

    /// Whether a start on this host would succeed now.
    fn would_start(&self, world: &World, host: Host) -> bool {
        // N.B. without one it is another VM of that name, as far as this host knows.
        let Some(record) = &world.ledgers[self.rules.ledger(host)] else { return false };
        if self.rules.layout == Layout::TwoClusters {
            // A pod is made only when it is written down that nobody runs the guest, and that it is here.
            let here = matches!(record.state, RecordState::Idle | RecordState::Armed(_));
            if !here || world.parts.is_mute(host) || !world.parts.has_ended(host, &record.owner) {
                return false;
            }
        }
        let mut world = world.clone();
        self.rules.begin_start(&mut world, host);
        let at = world.launchers.len() - 1;
        // A start asks three times at most.
        for _ in 0..4 {
            let Some(ask) = world.launchers[at].asks.first().cloned() else { break };
            if self.rules.tells_nothing(&world, &ask) {
                break;
            }
            let answer = self.rules.carry_out(&mut world, &ask);
            world.launcher(at).asks.clear();
            self.rules.answered(&mut world, at, &ask, answer);
        }
        world.launchers[at].guest == Guest::Running
    }

    fn runnable(&self, world: &World, host: Host) -> bool {
        let runs = world.launchers.iter().any(|l| l.host == host && l.guest == Guest::Running);
        runs || self.would_start(world, host)
    }

    fn owners(&self, world: &World) -> usize {
        let hosts = match self.rules.one_ledger() {
            // One record, one owner: see `choices`.
            true if world.running() == 0 => &Host::ALL[..1],
            _ => &Host::ALL[..],
        };
        hosts.iter().filter(|host| self.runnable(world, **host)).count()
    }

    /// Where all parts are there and nothing goes on by itself, nobody is in doubt, and there is exactly one
    /// runnable owner.
    pub fn ends_well(&self, world: &World) -> bool {
        if !world.parts.are_whole() || !self.is_quiet(world) {
            return true;
        }
        let decided = world.launchers.iter().all(|launcher| !launcher.undecided());
        decided && !self.is_astray(world) && self.owners(world) == 1
    }

    /// Where parts are missing, perhaps for ever, nobody is in doubt who could ask; and if nobody is, there
    /// is a runnable owner, unless its own record cannot be asked.
    pub fn doubts_rightly(&self, world: &World) -> bool {
        if world.parts.are_whole() || !self.is_quiet(world) {
            return true;
        }
        let undecided: Vec<_> = world.launchers.iter().filter(|l| l.undecided()).collect();
        let doubt = !undecided.is_empty() || self.is_astray(world);
        if doubt && world.parts.is_revoked() {
            self.rules.seen.in_doubt.store(true, Relaxed);
        }
        let mute = Host::ALL.iter().any(|host| world.parts.is_mute(*host));
        let owners = self.owners(world);
        undecided.iter().all(|launcher| self.may_doubt(world, launcher))
            && (owners == 1 || owners == 0 && (doubt || mute))
    }

    fn is_astray(&self, world: &World) -> bool {
        Host::ALL.iter().any(|host| world.is_astray(*host).is_some())
    }

    /// In doubt is only who cannot ask: the other end's record or, while it is down, its own. Or who waits
    /// for somebody that is.
    fn may_doubt(&self, world: &World, launcher: &Launcher) -> bool {
        let waits = |ask: &Arc<Ask>| {
            let blocked = world.parts.stop(ask);
            let other = || world.launchers.iter().any(|l| l.host == ask.host && l.undecided());
            blocked || ask.as_peer.is_some() && other()
        };
        let cannot_ask = |l: &Launcher| !l.asks.is_empty() && l.asks.iter().all(waits);
        let peer = launcher.peer.as_ref().and_then(|peer| world.find(peer));
        let peer = peer.filter(|_| launcher.asks.is_empty() && !launcher.cut);
        cannot_ask(launcher) || peer.is_some_and(|peer| cannot_ask(&world.launchers[peer]))
    }

    /// Whoever runs has its ledger's leave.
    pub fn owner_runs(&self, world: &World) -> bool {
        let mut running = world.launchers.iter().filter(|l| l.guest == Guest::Running);
        running.all(|l| world.may_run(l, self.rules.ledger(l.host)))
    }
}
