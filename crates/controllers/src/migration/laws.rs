//! What holds of every plan for a migration.

mod halves;

use super::plan::{Action, Snapshot, plan};
use api::keys;
use api::migration::{Options, Phase};
use jiff::Timestamp;
use proptest::prelude::*;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;

const UID: &str = "0c5f9a3e-0000-0000-0000-000000000000";
const TARGET: &str = "virt-launcher-web-target";

/// What the owner record says.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Owner {
    Source,
    Armed,
    Committed,
    /// Armed or committed, and both sides are known to have ended.
    BothEnded,
    Target,
}

#[derive(Debug, Clone)]
struct Case {
    phase: Phase,
    deleted: bool,
    vmi: Option<&'static str>,
    owner: Owner,
    /// The phase of the target's pod.
    pod: Option<&'static str>,
    ready: bool,
    /// What the VMI's migrationState has of this migration.
    state: Option<Value>,
    /// Another migration is open.
    other: bool,
    turn: bool,
    /// Seconds in this phase.
    age: i64,
    /// Seconds since the source's handler was heard of.
    silence: i64,
}

fn cases() -> impl Strategy<Value = Case> {
    let owners =
        [Owner::Source, Owner::Armed, Owner::Committed, Owner::BothEnded, Owner::Target].to_vec();
    let states = vec![
        None,
        Some(json!({})),
        Some(json!({"targetNodeAddress": "10.0.0.2"})),
        Some(json!({"targetNodeAddress": "10.0.0.2", "startTimestamp": "2026-01-01T00:00:00Z"})),
        Some(json!({
            "startTimestamp": "2026-01-01T00:00:00Z",
            "targetNodeDomainReadyTimestamp": "2026-01-01T00:00:01Z",
        })),
        Some(json!({"completed": true})),
        Some(json!({"completed": true, "failed": true, "failureReason": "a reason"})),
    ];
    let vmis = vec![None, Some("Running"), Some("Running"), Some("Failed")];
    let pods = vec![None, Some("Pending"), Some("Running"), Some("Running"), Some("Failed")];
    let first = (
        prop::sample::select(Phase::ALL.to_vec()),
        any::<bool>(),
        prop::sample::select(vmis),
        prop::sample::select(owners),
        prop::sample::select(pods),
    );
    let second = (
        any::<bool>(),
        prop::sample::select(states),
        any::<bool>(),
        any::<bool>(),
        prop::sample::select(vec![0, 5, 400, 2000]),
        prop::sample::select(vec![0, 0, 0, 200, 400]),
    );
    (first, second).prop_map(|((phase, deleted, vmi, owner, pod), rest)| {
        let (ready, state, other, turn, age, silence) = rest;
        Case { phase, deleted, vmi, owner, pod, ready, state, other, turn, age, silence }
    })
}

fn made<T: serde::de::DeserializeOwned>(value: Value) -> Arc<T> {
    Arc::new(serde_json::from_value(value).expect("a whole object"))
}

fn now() -> Timestamp {
    "2026-01-01T01:00:00Z".parse().expect("a time")
}

fn migration_of(case: &Case) -> Value {
    let since = now() - jiff::SignedDuration::from_secs(case.age);
    let mut metadata = json!({
        "name": "move", "namespace": "default", "uid": UID, "resourceVersion": "1",
        "finalizers": [keys::MIGRATION_FINALIZER],
    });
    if case.deleted {
        metadata["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
    }
    json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstanceMigration",
        "metadata": metadata, "spec": {"vmiName": "web"},
        "status": {"phase": case.phase, "phaseTransitionTimestamps": [
            {"phase": case.phase, "phaseTransitionTimestamp": since.to_string()},
        ]},
    })
}

fn owner_of(owner: Owner) -> Value {
    let of = json!({"attempt": UID, "heir": "heir", "peer": "spiffe://local"});
    let status = match owner {
        Owner::Source => json!({"state": "idle", "pod": "source", "owner": "a"}),
        Owner::Armed => json!({"state": "armed", "pod": "source", "owner": "a", "move": of}),
        Owner::Committed => {
            json!({"state": "committed", "pod": "source", "owner": "a", "move": of})
        }
        Owner::BothEnded => json!({
            "state": "committed", "pod": "source", "owner": "a", "move": of,
            "ended": {"instance": "a"}, "heirEnded": {"instance": "heir"},
        }),
        Owner::Target => json!({"state": "idle", "pod": TARGET, "owner": "heir"}),
    };
    json!({
        "apiVersion": "godwit.dev/v1alpha1", "kind": "OwnerRecord",
        "metadata": {"name": "web", "namespace": "default"},
        "spec": {"vm": "default.web"}, "status": status,
    })
}

fn vmi_of(case: &Case, phase: &str) -> Value {
    let state = match (&case.state, case.other) {
        (Some(state), _) => {
            let mut state = state.clone();
            state["migrationUid"] = UID.into();
            state
        }
        (None, true) => json!({"migrationUid": "another"}),
        (None, false) => Value::Null,
    };
    json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance",
        "metadata": {
            "name": "web", "namespace": "default", "uid": "1", "resourceVersion": "1",
            "labels": if case.other { json!({keys::TARGET_NODE: "m"}) } else { json!({}) },
        },
        "spec": {"domain": {"memory": {"guest": "64Mi"}}},
        "status": {"phase": phase, "nodeName": "n", "activePods": {"p": "n"}, "migrationState": state},
    })
}

fn pod_of(case: &Case, phase: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": TARGET, "namespace": "default", "uid": "2",
            "labels": {keys::MIGRATION: UID},
        },
        "spec": {"nodeName": "m", "containers": []},
        "status": {"phase": phase, "conditions": [
            {"type": "Ready", "status": if case.ready { "True" } else { "False" }},
        ]},
    })
}

fn snapshot(case: &Case) -> Snapshot {
    Snapshot {
        migration: made(migration_of(case)),
        vmi: case.vmi.map(|phase| made(vmi_of(case, phase))),
        claims: Vec::new(),
        left: Vec::new(),
        unmade: None,
        pods: case.pod.map(|phase| made(pod_of(case, phase))).into_iter().collect(),
        owner: Some(made(owner_of(case.owner))),
        backoff: None,
        turn: if case.turn { Ok(()) } else { Err("others are before it".into()) },
        options: (None, Options::defaults()),
        processor: BTreeMap::new(),
        emulated: true,
        faults: None,
        heard: Some(now() - jiff::SignedDuration::from_secs(case.silence)),
        later: 0,
        addresses: Vec::new(),
        now: now(),
    }
}

fn next(actions: &[Action], before: Phase) -> Phase {
    let written = actions.iter().find_map(|action| match action {
        Action::PatchStatus(status) => serde_json::from_value(status["phase"].clone()).ok(),
        _ => None,
    });
    written.unwrap_or(before)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn a_pod_that_may_own_the_guest_is_never_deleted_nor_what_holds_the_migration(case in cases()) {
        let plan = plan(&snapshot(&case));
        let may_own = matches!(case.owner, Owner::Armed | Owner::Committed | Owner::Target);
        let deletes = plan.actions.iter().any(|a| matches!(a, Action::DeletePod(_)));
        let releases = plan.actions.iter().any(|a| matches!(a, Action::Patch(_) | Action::Delete));
        prop_assert!(!(deletes && may_own), "{:?}", plan.actions);
        prop_assert!(!deletes || case.phase == Phase::Failed);
        prop_assert!(!releases || case.phase.is_final());
        let undecided = case.phase == Phase::Failed && case.pod.is_some() && may_own;
        prop_assert!(!(releases && undecided), "{:?}", plan.actions);
    }

    #[test]
    fn phases_only_go_forward_and_an_end_is_an_end(case in cases()) {
        let plan = plan(&snapshot(&case));
        let after = next(&plan.actions, case.phase);
        prop_assert!(after >= case.phase);
        prop_assert!(!case.phase.is_final() || after == case.phase);
        // A migration that has succeeded has a guest at its target.
        let succeeded = after == Phase::Succeeded && case.phase != after;
        let said = case.state == Some(json!({"completed": true}));
        prop_assert!(!succeeded || said);
    }

    #[test]
    fn handlers_are_told_once_of_a_pod_that_is_ready_and_of_one_migration_at_a_time(case in cases()) {
        let plan = plan(&snapshot(&case));
        let told = plan.actions.iter().any(|action| {
            matches!(action, Action::PatchVmi(patch) if patch["migrationState"]["migrationUid"] == UID)
        });
        if told {
            prop_assert!(case.ready && case.pod == Some("Running") && case.vmi == Some("Running"));
            prop_assert!(case.state.is_none() && !case.other && !case.deleted);
            prop_assert_eq!(next(&plan.actions, case.phase), Phase::PreparingTarget);
        }
    }

    #[test]
    fn none_begins_before_its_turn_and_one_that_waits_is_looked_at_again(case in cases()) {
        let plan = plan(&snapshot(&case));
        let creates = plan.actions.iter().any(|a| matches!(a, Action::CreatePod(_)));
        prop_assert!(!creates || case.turn && !case.deleted && case.phase <= Phase::Pending);
        let waits = next(&plan.actions, case.phase) == case.phase
            && matches!(case.phase, Phase::Pending | Phase::Scheduling | Phase::Scheduled);
        prop_assert!(!waits || plan.again.is_some(), "{:?}", plan.actions);
        // And says for what.
        let told = plan.actions.iter().any(|action| {
            matches!(action, Action::PatchStatus(status)
                if status["conditions"][0]["message"] == "others are before it")
        });
        let has_had_it = case.pod.is_some();
        let stands = waits && case.phase == Phase::Pending && !case.turn && !has_had_it;
        prop_assert!(!stands || told);
        prop_assert!(!has_had_it || !told, "it waits for its own pod");
    }

    #[test]
    fn none_waits_for_ever_for_a_source_that_is_silent(case in cases()) {
        let plan = plan(&snapshot(&case));
        let after = next(&plan.actions, case.phase);
        let moves = after.is_handed_off() && case.vmi == Some("Running");
        let arrived = case.state.as_ref().is_some_and(|state| {
            !state["targetNodeDomainReadyTimestamp"].is_null()
        });
        let seen = case.state.is_some();
        prop_assert!(!(moves && seen && !arrived && case.phase == after) || case.silence < 300);
        // What it comes to newly is looked at at once.
        prop_assert!(!moves || case.phase != after || plan.again.is_some() || arrived);
    }

    #[test]
    fn where_a_guest_goes_is_said_by_the_migration_alone_that_moves_it(case in cases()) {
        let snapshot = snapshot(&case);
        let labels = plan(&snapshot).actions.iter().any(|a| matches!(a, Action::Label(_)));
        // N.B. two that take turns in saying it would never end.
        prop_assert!(!labels || case.state.is_some());
    }

    #[test]
    fn what_fails_says_why(case in cases()) {
        let plan = plan(&snapshot(&case));
        let failed = next(&plan.actions, case.phase) == Phase::Failed && case.phase != Phase::Failed;
        let said = plan.actions.iter().any(|action| {
            matches!(action, Action::Say { warning: true, reason: "FailedMigration", .. })
        });
        prop_assert_eq!(failed, said);
        let written = plan.actions.iter().find_map(|action| match action {
            Action::PatchStatus(status) => Some(&status["migrationState"]["failureReason"]),
            _ => None,
        });
        prop_assert!(!failed || written.is_some_and(Value::is_string), "{written:?}");
    }
}
