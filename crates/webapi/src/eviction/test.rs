use super::*;
use api::conditions::{Condition, types};
use api::migration::State;
use proptest::prelude::*;
use proptest::strategy::Strategy as _;

const POD: &str = "virt-launcher-web-a";
const OTHER: &str = "virt-launcher-web-b";

fn pod(is_target: bool) -> Pod {
    let mut labels = json!({keys::APP: keys::LAUNCHER});
    if is_target {
        labels[keys::MIGRATION] = "m".into();
    }
    serde_json::from_value(json!({
        "metadata": {"name": POD, "namespace": "default", "labels": labels},
        "spec": {"nodeName": "n1", "containers": []}, "status": {"phase": "Running"},
    }))
    .unwrap()
}

/// What an owner record can say: who owns the guest, whether that ended, and of a move.
fn records() -> impl proptest::strategy::Strategy<Value = owner::Status> {
    let pods = prop::sample::select(vec![None, Some(POD), Some(OTHER)]);
    let states = prop::sample::select(vec!["idle", "armed", "committed", "returned"]);
    (pods, states, prop::sample::select(vec!["m", "another"]), any::<bool>(), any::<bool>())
        .prop_map(|(pod, state, attempt, ended, heir_ended)| {
            let end = |of: &str| owner::Ended { instance: of.into(), ..owner::Ended::default() };
            owner::Status {
                owner: pod.map(|_| "i1".into()).unwrap_or_default(),
                pod: pod.map(str::to_owned),
                state: state.into(),
                of: (state != "idle").then(|| owner::MoveStatus {
                    attempt: attempt.into(),
                    heir: "i2".into(),
                    peer: "n2".into(),
                }),
                ended: ended.then(|| end("i1")),
                heir_ended: heir_ended.then(|| end("i2")),
                ..owner::Status::default()
            }
        })
}

prop_compose! {
    fn facts(strategy: Option<&'static str>)(
        record in records(),
        arrives in any::<bool>(),
        phase in prop::sample::select(vec![Phase::Scheduled, Phase::Running, Phase::Unknown]),
        migratable in prop::sample::select(vec![None, Some(true), Some(false)]),
        node in prop::sample::select(vec![None, Some("n1"), Some("n2")]),
        source in prop::sample::select(vec![None, Some(POD), Some(OTHER)]),
        completed in any::<bool>(),
    ) -> Facts {
        let spec = api::vmi::RawSpec(json!({"evictionStrategy": strategy, "domain": {}}));
        let mut vmi = VirtualMachineInstance::new("web", spec);
        let can = |holds| Condition::new(types::LIVE_MIGRATABLE, holds, "Reason", "why");
        vmi.status = Some(api::vmi::Status {
            phase,
            node_name: node.map(str::to_owned),
            conditions: migratable.map(can).into_iter().collect(),
            migration_state: source.map(|source| State {
                source_pod: Some(source.into()),
                completed: Some(completed),
                ..State::default()
            }),
            ..api::vmi::Status::default()
        });
        Facts { cluster: Arc::default(), vmi, record, arrives }
    }
}

/// Whether a guest runs in the pod, is to begin in it, or can come to it.
fn is_needed(pod: &Pod, facts: &Facts) -> bool {
    let record = &facts.record;
    let target = pod.labels().contains_key(keys::MIGRATION);
    let comes = target
        && record.of.as_ref().is_some_and(|of| of.attempt == "m")
        && ["armed", "committed"].contains(&&*record.state);
    match record.is_over() {
        true => !target || facts.arrives,
        false => record.pod.as_deref() == Some(POD) || comes || target && facts.arrives,
    }
}

proptest! {
    #[test]
    fn no_eviction_ends_a_guest_or_its_move_where_it_is_to_leave_by_moving(
        facts in facts(Some("LiveMigrate")), target in any::<bool>(),
    ) {
        let pod = pod(target);
        let verdict = judge(&pod, &facts);
        if is_needed(&pod, &facts) {
            prop_assert_ne!(&verdict, &Verdict::Go);
        }
        let status = facts.vmi.status.clone().unwrap();
        let runs_here = status.phase == Phase::Running && status.node_name.as_deref() == Some("n1")
            && facts.record.pod.as_deref() == Some(POD) && !facts.record.is_over();
        let can = status.live_migratable().is_some_and(|c| c.status == Is::True);
        if runs_here && can {
            prop_assert_eq!(verdict, Verdict::Leave("n1".into()));
        } else if runs_here {
            prop_assert!(matches!(verdict, Verdict::Stay(_)));
        }
    }

    #[test]
    fn a_guest_that_may_end_does_so_only_where_it_cannot_move(
        facts in facts(Some("LiveMigrateIfPossible")), target in any::<bool>(),
    ) {
        let pod = pod(target);
        let can = facts.vmi.status.as_ref().and_then(|status| status.live_migratable());
        let can = can.is_some_and(|c| c.status == Is::True);
        if judge(&pod, &facts) == Verdict::Go {
            prop_assert!(!can || !is_needed(&pod, &facts));
        }
    }

    #[test]
    fn without_a_strategy_every_pod_may_go(facts in facts(None), target in any::<bool>()) {
        prop_assert_eq!(judge(&pod(target), &facts), Verdict::Go);
    }
}
