//! A launcher as it shows itself.

use crate::migration::marks::Mark;
use crate::migration::status::Status as Migration;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What a launcher's VM does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// No guest is here; one may be received.
    Empty,
    /// QEMU is being started.
    Starting,
    /// A guest is on its way here.
    Receiving,
    /// The guest runs.
    Running,
    /// The guest stands still because somebody asked for it.
    Paused,
    /// The guest was asked to shut down.
    ShuttingDown,
    /// The guest has ended.
    Stopped,
    /// The guest lives elsewhere.
    Left,
}

impl std::fmt::Display for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Phase::Empty => "empty",
            Phase::Starting => "starting",
            Phase::Receiving => "receiving",
            Phase::Running => "running",
            Phase::Paused => "paused",
            Phase::ShuttingDown => "shutting down",
            Phase::Stopped => "stopped",
            Phase::Left => "left",
        })
    }
}

/// A launcher at one moment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Grows with every change: ask for what is newer than it.
    pub generation: u64,
    /// The VM.
    pub vm: String,
    /// What it does.
    pub phase: Phase,
    /// Why, where that needs saying.
    pub reason: Option<String>,
    /// Of a guest that has stopped: QEMU ended otherwise than by the guest's or a person's will.
    #[serde(default)]
    pub broke: bool,
    /// The instance that may own the VM.
    pub instance: Option<String>,
    /// Its epoch.
    pub epoch: Option<u64>,
    /// QEMU's process id.
    pub qemu_pid: Option<u32>,
    /// The last move, if there was one.
    pub migration: Option<Migration>,
    /// Of a guest that has left: the marks of the disks that it left, by their names.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub left: BTreeMap<String, Mark>,
}

impl Status {
    /// A launcher with nothing in it.
    pub fn empty(vm: &str) -> Self {
        Self {
            generation: 0,
            vm: vm.to_owned(),
            phase: Phase::Empty,
            reason: None,
            broke: false,
            instance: None,
            epoch: None,
            qemu_pid: None,
            migration: None,
            left: BTreeMap::new(),
        }
    }
}

/// What a person or a program asks of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// Run it.
    Start,
    /// Let it end itself.
    ShutDown,
    /// End it.
    Kill,
    /// Begin it anew.
    Reset,
    /// Let it stand still.
    Pause,
    /// Let it go on.
    Resume,
    /// Receive it.
    Prepare,
    /// Move it away.
    Send,
}

/// What becomes of a wish.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is carried out.
    Accept,
    /// It is so already.
    Already,
    /// It cannot be, and why.
    Deny(&'static str),
}

/// Judges a wish by what the VM does. Pure. `moving`: a move is under way.
pub fn judge(phase: Phase, moving: bool, wish: Wish) -> Verdict {
    use Verdict::{Accept, Already, Deny};
    use {Phase as P, Wish as W};
    if moving && !matches!(wish, W::Kill | W::ShutDown) {
        return match (phase, wish) {
            (_, W::Send | W::Prepare) => Deny("a move is under way; cancel it first"),
            (P::Running, W::Start | W::Resume) => Already,
            _ => Deny("a move is under way; wait for its end or cancel it"),
        };
    }
    match (wish, phase) {
        (W::Start, P::Empty | P::Stopped | P::Left) => Accept,
        (W::Start, P::Starting | P::Running) => Already,
        (W::Start, P::Paused) => Deny("the VM is paused; resume it"),
        (W::Start, P::ShuttingDown) => {
            Deny("the VM is shutting down; start it when it has stopped")
        }
        (W::Start, P::Receiving) => Deny("the VM is on its way here"),
        (W::ShutDown | W::Kill, P::Empty | P::Stopped | P::Left) => Already,
        (W::ShutDown, P::ShuttingDown) => Already,
        (W::ShutDown, P::Receiving) => Deny("the VM is on its way here; cancel the move"),
        (W::ShutDown | W::Kill, _) => Accept,
        (W::Pause, P::Running) => Accept,
        (W::Pause, P::Paused) => Already,
        (W::Resume, P::Paused) => Accept,
        (W::Resume, P::Running) => Already,
        (W::Prepare, P::Empty | P::Stopped | P::Left) => Accept,
        (W::Prepare, P::Receiving) => Deny("a move to here is under way; cancel it first"),
        (W::Prepare, _) => Deny("the VM runs here already"),
        (W::Send, P::Running | P::Paused) => Accept,
        (W::Reset, P::Running | P::Paused) => Accept,
        (W::Pause | W::Resume | W::Send | W::Reset, _) => Deny("the VM does not run here"),
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    const PHASES: [Phase; 8] = [
        Phase::Empty,
        Phase::Starting,
        Phase::Receiving,
        Phase::Running,
        Phase::Paused,
        Phase::ShuttingDown,
        Phase::Stopped,
        Phase::Left,
    ];

    proptest! {
        #[test]
        fn while_a_move_runs_nothing_but_its_end_is_accepted(phase in 0usize..8, wish in 0usize..8) {
            let wish = [Wish::Start, Wish::ShutDown, Wish::Kill, Wish::Pause, Wish::Resume, Wish::Prepare, Wish::Send, Wish::Reset][wish];
            let verdict = judge(PHASES[phase], true, wish);
            if verdict == Verdict::Accept {
                prop_assert!(matches!(wish, Wish::Kill | Wish::ShutDown));
            }
        }

        #[test]
        fn a_guest_is_started_or_received_only_where_there_is_none(phase in 0usize..8) {
            for wish in [Wish::Start, Wish::Prepare] {
                let here = matches!(PHASES[phase], Phase::Starting | Phase::Receiving | Phase::Running | Phase::Paused | Phase::ShuttingDown);
                prop_assert_eq!(judge(PHASES[phase], false, wish) == Verdict::Accept, !here);
            }
        }
    }
}
