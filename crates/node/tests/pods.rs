//! Laws of what an agent does for a pod, over containers that end as they like.

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Pod;
use node::agent::command::Place;
use node::agent::machine::{Contained, Plan, Seen, State, Stop, plan};
use node::agent::record::Exit;
use node::agent::status::status;
use proptest::prelude::*;
use serde_json::json;
use std::collections::BTreeMap;

const GRACE: i64 = 5;

/// What a container does once it runs.
#[derive(Debug, Clone, Copy)]
struct Habit {
    /// It ends by itself after so many seconds, with this code.
    ends: Option<(i64, i32)>,
    /// It ends when it is asked to.
    obeys: bool,
}

#[derive(Debug, Clone)]
struct Case {
    policy: &'static str,
    init: Vec<(bool, Habit)>,
    main: Vec<Habit>,
    deleted_at: Option<i64>,
}

fn habits() -> impl Strategy<Value = Habit> {
    let ends = prop::option::of((0i64..20, 0i32..2));
    (ends, any::<bool>()).prop_map(|(ends, obeys)| Habit { ends, obeys })
}

fn cases() -> impl Strategy<Value = Case> {
    (
        prop::sample::select(vec!["Always", "OnFailure", "Never"]),
        prop::collection::vec((any::<bool>(), habits()), 0..3),
        prop::collection::vec(habits(), 1..3),
        // The clock has moved when it is first looked at.
        prop::option::of(1i64..60),
    )
        .prop_map(|(policy, init, main, deleted_at)| Case { policy, init, main, deleted_at })
}

/// Containers that do as their habits say, and a clock.
struct Machine {
    case: Case,
    pod: Pod,
    began: Timestamp,
    seen: Seen,
}

impl Machine {
    fn new(case: Case) -> Self {
        let init: Vec<_> = case
            .init
            .iter()
            .enumerate()
            .map(|(i, (sidecar, _))| {
                json!({"name": format!("i{i}"), "restartPolicy": sidecar.then_some("Always")})
            })
            .collect();
        let main: Vec<_> =
            (0..case.main.len()).map(|i| json!({"name": format!("c{i}"), "image": "x"})).collect();
        let pod = json!({
            "metadata": {"name": "p", "namespace": "n", "uid": "u"},
            "spec": {
                "initContainers": init, "containers": main, "restartPolicy": case.policy,
                "terminationGracePeriodSeconds": GRACE,
            },
        });
        let began: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        let seen = Seen { now: began, since: began, containers: BTreeMap::new() };
        Self { case, pod: serde_json::from_value(pod).unwrap(), began, seen }
    }

    fn habit(&self, name: &str) -> Habit {
        let i: usize = name[1..].parse().unwrap();
        if name.starts_with('i') { self.case.init[i].1 } else { self.case.main[i] }
    }

    fn end(&mut self, name: &str, code: i32, reason: &str) {
        let at = self.seen.now;
        let container = self.seen.containers.get_mut(name).unwrap();
        let State::Running(since) = container.state else { return };
        let (reason, message) = (reason.to_owned(), String::new());
        container.state = State::Ended(since, Exit { code, signal: None, reason, message, at });
        container.asked = None;
    }

    /// A second passes.
    fn tick(&mut self) {
        self.seen.now += SignedDuration::from_secs(1);
        let names: Vec<String> = self.seen.containers.keys().cloned().collect();
        for name in names {
            let State::Running(since) = self.seen.containers[&name].state else { continue };
            let age = self.seen.now.duration_since(since).as_secs();
            if let Some((after, code)) = self.habit(&name).ends.filter(|(after, _)| age >= *after) {
                let _ = after;
                self.end(&name, code, "Completed");
            }
        }
        let now = self.seen.now.duration_since(self.began).as_secs();
        if self.case.deleted_at == Some(now) {
            let at = self.seen.now + SignedDuration::from_secs(GRACE);
            self.pod.metadata.deletion_timestamp = serde_json::from_value(json!(at)).unwrap();
        }
    }

    fn act(&mut self, plan: &Plan) -> Result<(), TestCaseError> {
        let deleted = self.pod.metadata.deletion_timestamp.is_some();
        for name in &plan.start {
            prop_assert!(!deleted, "{name} is started though its pod is deleted");
            let init_done = (0..self.case.init.len()).all(|i| {
                let found = self.seen.containers.get(&format!("i{i}"));
                found.is_some_and(|f| f.runs() || f.exit().is_some_and(|e| e.code == 0))
            });
            prop_assert!(init_done || name.starts_with('i'), "{name} is started too early");
            let container = self.seen.containers.entry(name.clone()).or_default();
            prop_assert!(!container.runs(), "{name} is started twice");
            let again = container.state != State::New;
            let pause = container.pause();
            if let Some(exit) = container.exit() {
                let waited = self.seen.now.duration_since(exit.at).as_secs();
                prop_assert!(waited >= i64::try_from(pause).unwrap(), "{name}: no pause");
            }
            *container = Contained {
                state: State::Running(self.seen.now),
                attempt: container.attempt + u32::from(again),
                backoff: pause,
                started: true,
                ready: true,
                ..Contained::default()
            };
        }
        for (name, stop) in &plan.stop {
            prop_assert!(self.seen.containers[name].runs(), "{name} does not run");
            match stop {
                Stop::Kill => self.end(name, 137, "Error"),
                Stop::Ask if self.habit(name).obeys => self.end(name, 0, "Completed"),
                Stop::Ask => {
                    let now = self.seen.now;
                    self.seen.containers.get_mut(name).unwrap().asked = Some(now);
                }
            }
        }
        Ok(())
    }

    /// Plans and acts until there is nothing to do now; tells the status.
    fn settle(&mut self) -> Result<Plan, TestCaseError> {
        for _ in 0..20 {
            let next = plan(&self.pod, &self.seen);
            self.act(&next)?;
            let place = Place::default();
            let told = status(&self.pod, &self.seen, &place);
            let before = self.pod.status.as_ref().and_then(|status| status.phase.clone());
            if let Some(before) = before.filter(|b| b == "Succeeded" || b == "Failed") {
                prop_assert_eq!(Some(before), told.phase.clone(), "an end was taken back");
            }
            self.pod.status = Some(told);
            if next.start.is_empty() && next.stop.is_empty() {
                return Ok(next);
            }
        }
        Err(TestCaseError::fail("it does not come to rest"))
    }
}

proptest! {
    #[test]
    fn containers_are_started_in_order_once_at_a_time_and_all_ends_in_its_time(case in cases()) {
        let mut machine = Machine::new(case.clone());
        let mut over = None;
        for second in 0..200i64 {
            let plan = machine.settle()?;
            let runs = machine.seen.containers.values().any(Contained::runs);
            if plan.over {
                prop_assert!(!runs, "it is said to be over, and something runs");
                over.get_or_insert(second);
            }
            // What is deleted is over when its grace is.
            if let Some(deleted) = case.deleted_at && second > deleted + 2 * GRACE {
                prop_assert!(plan.over, "{:?}", machine.seen);
            }
            machine.tick();
        }
        let phase = machine.pod.status.as_ref().unwrap().phase.clone().unwrap();
        let all_end = case.main.iter().all(|habit| habit.ends.is_some());
        if case.policy == "Never" && case.deleted_at.is_none() && all_end {
            let init = case.init.iter().all(|(sidecar, habit)| {
                *sidecar || habit.ends.is_some()
            });
            if init {
                prop_assert!(over.is_some(), "{phase}");
                let well = case.main.iter().all(|habit| habit.ends.unwrap().1 == 0)
                    && case.init.iter().all(|(s, habit)| *s || habit.ends.unwrap().1 == 0);
                prop_assert_eq!(phase, if well { "Succeeded" } else { "Failed" });
            }
        } else if case.deleted_at.is_none() && case.policy == "Always" {
            prop_assert!(over.is_none(), "what is always restarted is never over: {phase}");
        }
    }
}
