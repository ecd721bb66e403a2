//! What is to be done for a pod next: a pure function of what is seen of it.

use super::command::Refusal;
use super::record::Exit;
use crate::scheduler::resources::is_sidecar;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};
use std::collections::BTreeMap;

/// What could not be started is tried again after this.
pub const RETRY: SignedDuration = SignedDuration::from_secs(10);
/// The pause before a restart doubles from this ...
const FIRST_PAUSE: u64 = 10;
/// ... to this, as the kubelet's does.
const LONGEST_PAUSE: u64 = 300;
/// A container that ran for this long begins with the shortest pause again.
const LONG_RUN: SignedDuration = SignedDuration::from_mins(10);

/// How a container is.
#[derive(Debug, Clone, Default, PartialEq)]
pub enum State {
    /// It never ran.
    #[default]
    New,
    /// It runs since this time.
    Running(Timestamp),
    /// It ran from this time, and ended.
    Ended(Timestamp, Exit),
}

/// What is seen of a container.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Contained {
    /// Its newest run's state.
    pub state: State,
    /// The newest run's number.
    pub attempt: u32,
    /// How long was waited before that run, in seconds.
    pub backoff: u64,
    /// How the run before ended.
    pub before: Option<(Timestamp, Exit)>,
    /// Why it could not be started last, since when, and how often so far.
    pub refused: Option<(Refusal, Timestamp, u32)>,
    /// When it was asked to end.
    pub asked: Option<Timestamp>,
    /// Its startup probe, or its start hook, has been passed; or it has none.
    pub started: bool,
    /// Its readiness probe is passed, or it has none.
    pub ready: bool,
    /// Its liveness or startup probe, or its start hook, has failed: why.
    pub sick: Option<String>,
}

impl Contained {
    /// It runs.
    pub fn runs(&self) -> bool {
        matches!(self.state, State::Running(_))
    }

    /// Its exit, when it ended.
    pub fn exit(&self) -> Option<&Exit> {
        match &self.state {
            State::Ended(_, exit) => Some(exit),
            _ => None,
        }
    }

    /// How long to wait before the next run, in seconds: none before the first restart.
    pub fn pause(&self) -> u64 {
        let State::Ended(at, exit) = &self.state else { return 0 };
        let lasted = exit.at.duration_since(*at);
        match (lasted >= LONG_RUN || self.attempt == 0, self.backoff) {
            (true, _) => 0,
            (false, 0) => FIRST_PAUSE,
            (false, before) => before.saturating_mul(2).min(LONGEST_PAUSE),
        }
    }
}

/// What is seen of a pod.
#[derive(Debug, Clone)]
pub struct Seen {
    /// The time.
    pub now: Timestamp,
    /// When the agent first saw it.
    pub since: Timestamp,
    /// Its containers of all kinds, by name.
    pub containers: BTreeMap<String, Contained>,
}

/// How to end a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// Ask it to.
    Ask,
    /// At once.
    Kill,
}

/// What to do.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Plan {
    /// Containers to start.
    pub start: Vec<String>,
    /// Containers to end.
    pub stop: Vec<(String, Stop)>,
    /// Nothing runs, and nothing will: the pod's end can be told.
    pub over: bool,
    /// Look again then, though nothing has happened.
    pub wake: Option<Timestamp>,
}

impl Plan {
    fn wake(&mut self, at: Timestamp) {
        self.wake = Some(self.wake.map_or(at, |before| before.min(at)));
    }
}

fn seconds(n: i64) -> SignedDuration {
    // A time of the far future is as good as none, and does not overflow.
    SignedDuration::from_secs(n.clamp(0, 1 << 32))
}

/// Why a pod is to end though nobody deletes it.
pub fn overdue(pod: &Pod, seen: &Seen) -> Option<Timestamp> {
    let most = pod.spec.as_ref()?.active_deadline_seconds?;
    Some(seen.since + seconds(most))
}

/// Whether a container that ended is run again.
pub fn again(spec: &PodSpec, container: &Container, init: bool, exit: &Exit) -> bool {
    match spec.restart_policy.as_deref().unwrap_or("Always") {
        _ if is_sidecar(container) => true,
        "Never" => false,
        "Always" if !init => true,
        _ => exit.code != 0,
    }
}

/// Decides.
pub fn plan(pod: &Pod, seen: &Seen) -> Plan {
    let mut plan = Plan::default();
    let Some(spec) = &pod.spec else { return plan };
    let deleted = pod.metadata.deletion_timestamp.as_ref().map(|time| time.0);
    let due = overdue(pod, seen);
    let told = crate::scheduler::snapshot::has_ended(pod);
    if deleted.is_some() || told || due.is_some_and(|due| due <= seen.now) {
        wind_down(spec, seen, deleted, &mut plan);
        return plan;
    }
    if let Some(due) = due {
        plan.wake(due);
    }
    let lasts = |container: &&Container| {
        let exit = seen.containers.get(&container.name).and_then(Contained::exit);
        exit.is_none_or(|exit| again(spec, container, false, exit))
    };
    // Sidecars live as long as there is something to be beside.
    if !spec.containers.iter().any(|container| lasts(&container)) {
        wind_down(spec, seen, None, &mut plan);
    } else if advance_init(spec, seen, &mut plan) {
        for container in spec.containers.iter().filter(lasts) {
            keep(spec, container, seen, &mut plan);
        }
    }
    plan
}

/// Runs init containers in their order. True once all have done their work.
fn advance_init(spec: &PodSpec, seen: &Seen, plan: &mut Plan) -> bool {
    for container in spec.init_containers.iter().flatten() {
        let found = seen.containers.get(&container.name);
        if is_sidecar(container) {
            keep(spec, container, seen, plan);
            if !found.is_some_and(|c| c.runs() && c.started) {
                return false;
            }
            continue;
        }
        match found.and_then(Contained::exit) {
            Some(exit) if exit.code == 0 => {}
            Some(exit) if !again(spec, container, true, exit) => {
                wind_down(spec, seen, None, plan);
                return false;
            }
            _ => {
                keep(spec, container, seen, plan);
                return false;
            }
        }
    }
    true
}

/// Starts a container that does not run, when it is time; ends one that is sick.
fn keep(spec: &PodSpec, container: &Container, seen: &Seen, plan: &mut Plan) {
    let new = Contained::default();
    let found = seen.containers.get(&container.name).unwrap_or(&new);
    if found.runs() {
        if found.sick.is_some() {
            let probe = container.liveness_probe.as_ref();
            let grace = probe.and_then(|p| p.termination_grace_period_seconds);
            let grace = grace.or(spec.termination_grace_period_seconds).unwrap_or(30);
            let deadline = found.asked.map(|asked| asked + seconds(grace));
            end(&container.name, found, deadline, seen, plan);
        }
        return;
    }
    let pause = i64::try_from(found.pause()).unwrap_or(i64::MAX);
    let ended = found.exit().map(|exit| exit.at + seconds(pause));
    let refused = found.refused.as_ref().map(|(_, at, _)| *at + RETRY);
    match ended.max(refused) {
        Some(at) if at > seen.now => plan.wake(at),
        _ => plan.start.push(container.name.clone()),
    }
}

/// Ends what runs: the sidecars when nothing else does any more.
fn wind_down(spec: &PodSpec, seen: &Seen, deleted: Option<Timestamp>, plan: &mut Plan) {
    let init = spec.init_containers.iter().flatten();
    let (last, first): (Vec<_>, Vec<_>) = init.chain(&spec.containers).partition(|c| is_sidecar(c));
    let running = |containers: &[&Container]| -> Vec<String> {
        let runs = |c: &&&Container| seen.containers.get(&c.name).is_some_and(Contained::runs);
        containers.iter().filter(runs).map(|c| c.name.clone()).collect()
    };
    let mut left = running(&first);
    if left.is_empty() {
        left = running(&last);
    }
    plan.over = left.is_empty();
    for name in left {
        let Some(found) = seen.containers.get(&name) else { continue };
        let grace = seconds(spec.termination_grace_period_seconds.unwrap_or(30));
        let deadline = deleted.or(found.asked.map(|asked| asked + grace));
        end(&name, found, deadline, seen, plan);
    }
}

fn end(name: &str, found: &Contained, deadline: Option<Timestamp>, seen: &Seen, plan: &mut Plan) {
    let late = deadline.is_some_and(|deadline| deadline <= seen.now);
    match found.asked {
        _ if late => plan.stop.push((name.to_owned(), Stop::Kill)),
        None => plan.stop.push((name.to_owned(), Stop::Ask)),
        Some(_) => {}
    }
    if let Some(deadline) = deadline.filter(|_| !late) {
        plan.wake(deadline);
    }
    if late {
        // Whoever does not hear of it is asked again.
        plan.wake(seen.now + SignedDuration::from_secs(1));
    }
}
