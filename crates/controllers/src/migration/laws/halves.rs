//! What holds of every plan for a side of a migration between two VMIs.

use super::{Action, Case, Owner, Snapshot, cases, made, migration_of, next, plan, snapshot};
use api::migration::{Half, Phase, Side};
use proptest::prelude::*;
use serde_json::{Value, json};

/// What is heard of the other side.
#[derive(Debug, Clone)]
struct Other {
    side: Side,
    half: Option<Half>,
    trouble: bool,
}

fn others() -> impl Strategy<Value = Other> {
    let phases = prop::sample::select(Phase::ALL.to_vec());
    let half = (phases, any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>());
    let half = half.prop_map(|(phase, aborts, failed, started, whole)| Half {
        gateway: whole.then(|| "there:1".into()),
        cluster: "west".into(),
        namespace: "default".into(),
        name: "web".into(),
        migration: "theirs".into(),
        node: Some("there".into()),
        pod: Some("theirs".into()),
        phase,
        aborts,
        failed: failed.then(|| "a reason".into()),
        started: started.then(|| "2026-01-01T00:00:00Z".into()),
        ..Half::default()
    });
    let side = prop::sample::select(vec![Side::Source, Side::Target]);
    let half = prop::option::of(half);
    (side, half, any::<bool>()).prop_map(|(side, half, trouble)| Other { side, half, trouble })
}

fn with(case: &Case, other: &Other) -> Snapshot {
    let mut migration = migration_of(case);
    migration["spec"] = match other.side {
        Side::Source => json!({
            "vmiName": "web", "sendTo": {"migrationID": "1", "connectURL": "west:9185"},
        }),
        Side::Target => json!({"vmiName": "web", "receive": {"migrationID": "1"}}),
    };
    let trouble = other.trouble.then_some("no answer");
    migration["status"]["peer"] = json!({"half": other.half, "trouble": trouble});
    let mut snapshot = snapshot(case);
    snapshot.migration = made(migration);
    if let (Side::Target, Some(vmi)) = (other.side, case.vmi.filter(|phase| *phase == "Running")) {
        let mut waits: Value = super::vmi_of(case, vmi);
        waits["status"]["phase"] = "WaitingForSync".into();
        waits["metadata"]["annotations"] = json!({api::keys::RECEIVES: "true"});
        snapshot.vmi = Some(made(waits));
    }
    snapshot
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn no_side_begins_before_the_other_is_ready_for_it(case in cases(), other in others()) {
        let plan = plan(&with(&case, &other));
        let after = next(&plan.actions, case.phase);
        let is_at = |phase: Phase| other.half.as_ref().is_some_and(|half| half.phase >= phase);
        let creates = plan.actions.iter().any(|a| matches!(a, Action::CreatePod(_)));
        prop_assert!(!creates || other.side == Side::Target, "a source makes no pod");
        // Whatever it has heard before, it left its first wait for that.
        let begins = case.phase < Phase::Pending && after == Phase::Pending;
        match other.side {
            Side::Source => {
                prop_assert!(!begins || is_at(Phase::WaitingForSync));
                let told = plan.actions.iter().any(|action| {
                    matches!(action, Action::PatchVmi(patch)
                        if patch["migrationState"]["targetState"]["cluster"] == "west")
                });
                let whole = other.half.as_ref().is_some_and(|half| half.gateway.is_some());
                prop_assert!(!told || is_at(Phase::PreparingTarget) && whole);
            }
            Side::Target => prop_assert!(!begins || is_at(Phase::Scheduling)),
        }
    }

    #[test]
    fn what_fails_at_one_side_fails_at_the_other(case in cases(), other in others()) {
        let plan = plan(&with(&case, &other));
        let after = next(&plan.actions, case.phase);
        let failed = other.half.as_ref().is_some_and(|half| half.failed.is_some());
        let arrived = case.state == Some(json!({"completed": true}));
        let done = case.phase.is_handed_off() && arrived;
        // A guest that may have come, or has, is looked at by its record.
        let comes = other.side == Side::Target
            && case.pod.is_some()
            && !matches!(case.owner, Owner::Source | Owner::BothEnded);
        let done = done || comes;
        prop_assert!(!failed || case.phase.is_final() || after == Phase::Failed || done);
    }

    #[test]
    fn a_source_that_has_ended_succeeds_once_its_guest_is_known_to_be_there(
        mut case in cases(), other in others(), arrived: bool,
    ) {
        (case.vmi, case.state) = (Some("Failed"), None);
        let mut other = Other { side: Side::Source, ..other };
        let Some(half) = &mut other.half else { return Ok(()) };
        half.failed = None;
        let aborts = half.aborts && !case.phase.is_handed_off();
        let mut snapshot = with(&case, &other);
        snapshot.owner = Some(made(json!({
            "apiVersion": "godwit.dev/v1alpha1", "kind": "OwnerRecord",
            "metadata": {"name": "web", "namespace": "default"}, "spec": {"vm": "default.web"},
            "status": {
                "epoch": 1, "owner": "a", "state": "committed", "ended": {"instance": "a"},
                "arrived": arrived.then_some("theirs"),
                "move": {"attempt": "theirs", "heir": "b", "peer": "spiffe://west/default/web"},
            },
        })));
        let after = next(&plan(&snapshot).actions, case.phase);
        let ends = arrived && !aborts && !case.phase.is_final();
        prop_assert_eq!(ends, after == Phase::Succeeded && case.phase != Phase::Succeeded);
        prop_assert!(aborts || case.phase == Phase::Failed || after != Phase::Failed);
    }

    #[test]
    fn nobody_waits_for_ever_for_a_side_that_does_not_come(case in cases(), other in others()) {
        let mut alone = other;
        alone.half = None;
        let snapshot = with(&case, &alone);
        let plan = plan(&snapshot);
        let after = next(&plan.actions, case.phase);
        let syncs = case.phase
            == match alone.side {
                Side::Source => Phase::Synchronizing,
                Side::Target => Phase::WaitingForSync,
            };
        prop_assert!(!(syncs && case.age >= 2000) || after == Phase::Failed);
        prop_assert!(!(syncs && after == case.phase) || plan.again.is_some());
        // And says why nothing is heard.
        let said = plan.actions.iter().any(|action| {
            matches!(action, Action::PatchStatus(status) if status["conditions"].as_array().is_some_and(|all| {
                all.iter().any(|c| c["type"] == "decentralizedMigrationBlocked" && c["status"] == "True")
            }))
        });
        prop_assert!(!(syncs && alone.trouble && after == case.phase) || said);
    }
}
