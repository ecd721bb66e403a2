//! What holds of every plan for a VM.

use super::plan::{Action, Snapshot, plan};
use api::instancetype::wanted;
use api::keys;
use api::kubevirt::KubeVirt;
use api::vm::{Printable, RunStrategy, Status, VirtualMachine};
use api::vmi::{Phase, VirtualMachineInstance};
use jiff::{SignedDuration, Timestamp};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::sync::Arc;

const STRATEGIES: [RunStrategy; 6] = [
    RunStrategy::Always,
    RunStrategy::Halted,
    RunStrategy::Manual,
    RunStrategy::RerunOnFailure,
    RunStrategy::Once,
    RunStrategy::WaitAsReceiver,
];

#[derive(Debug, Clone)]
struct Case {
    strategy: RunStrategy,
    vmi: Option<(Phase, bool)>,
    start: bool,
    stop: bool,
    failures: u32,
    deleted: bool,
    /// The owner of its guest lives.
    owned: bool,
}

fn cases() -> impl Strategy<Value = Case> {
    let phases =
        vec![Phase::Pending, Phase::Scheduling, Phase::Running, Phase::Succeeded, Phase::Failed];
    let vmi = prop::option::of((prop::sample::select(phases), any::<bool>()));
    let strategy = prop::sample::select(STRATEGIES.to_vec());
    let flags = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>());
    (strategy, vmi, 0..4_u32, flags).prop_map(
        |(strategy, vmi, failures, (start, stop, deleted, owned))| Case {
            strategy,
            vmi,
            start,
            stop,
            failures,
            deleted,
            owned,
        },
    )
}

fn made<T: serde::de::DeserializeOwned>(value: Value) -> Arc<T> {
    Arc::new(serde_json::from_value(value).expect("a whole object"))
}

fn snapshot(case: &Case) -> Snapshot {
    let mut requests = Vec::new();
    if case.stop {
        requests.push(json!({"action": "Stop", "uid": "1"}));
    }
    if case.start {
        requests.push(json!({"action": "Start"}));
    }
    let mut metadata = json!({
        "name": "web", "namespace": "default", "uid": "0", "resourceVersion": "1",
        "finalizers": [keys::VM_FINALIZER],
    });
    if case.deleted {
        metadata["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
    }
    let mut status = json!({"stateChangeRequests": requests});
    if case.failures > 0 {
        let later = Timestamp::UNIX_EPOCH + SignedDuration::from_secs(60);
        status["startFailure"] = json!({
            "consecutiveFailCount": case.failures, "lastFailedVMIUID": "1",
            "retryAfterTimestamp": later.to_string(),
        });
    }
    let vm: Arc<VirtualMachine> = made(json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "metadata": metadata,
        "spec": {
            "runStrategy": case.strategy,
            "template": {"spec": {"domain": {"memory": {"guest": "64Mi"}}}},
        },
        "status": status,
    }));
    let vmi = case.vmi.map(|(phase, leaves)| {
        let mut metadata = json!({"name": "web", "namespace": "default", "uid": "1"});
        if leaves {
            metadata["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
        }
        made::<VirtualMachineInstance>(json!({
            "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance",
            "metadata": metadata, "spec": vm.spec.template.spec, "status": {"phase": phase},
        }))
    });
    let cluster =
        made::<KubeVirt>(json!({"metadata": {"name": "k", "namespace": "kubevirt"}, "spec": {}}));
    Snapshot {
        claims: Vec::new(),
        taken: Vec::new(),
        moves: Vec::new(),
        vm,
        vmi,
        owner: case.owned.then(|| {
            made(json!({
                "apiVersion": "godwit.dev/v1alpha1", "kind": "OwnerRecord",
                "metadata": {"name": "web", "namespace": "default"}, "spec": {"vm": "default.web"},
                "status": {"epoch": 1, "owner": "a", "state": "idle"},
            }))
        }),
        volumes: Vec::new(),
        cluster: Some(cluster),
        now: Timestamp::UNIX_EPOCH,
    }
}

fn starts(actions: &[Action]) -> bool {
    actions.iter().any(|action| matches!(action, Action::Start(_)))
}

fn stops(actions: &[Action]) -> bool {
    actions.iter().any(|action| matches!(action, Action::Stop { .. }))
}

proptest! {
    #[test]
    fn a_vmi_is_made_only_where_there_is_none_and_somebody_wants_it(case in cases()) {
        let actions = plan(&snapshot(&case)).actions;
        let wanted = match case.strategy {
            RunStrategy::Halted => false,
            RunStrategy::Manual => case.start,
            // After failures nobody but a person hurries.
            _ => case.start || case.failures == 0,
        };
        prop_assert_eq!(starts(&actions), case.vmi.is_none() && wanted && !case.deleted);
    }

    #[test]
    fn a_vm_whose_guest_has_left_starts_nothing_but_to_have_it_back(case in cases(), arrived: bool) {
        let mut snapshot = snapshot(&case);
        snapshot.owner = Some(made(json!({
            "apiVersion": "godwit.dev/v1alpha1", "kind": "OwnerRecord",
            "metadata": {"name": "web", "namespace": "default"}, "spec": {"vm": "default.web"},
            "status": {
                "epoch": 1, "owner": "a", "state": "committed", "ended": {"instance": "a"},
                "arrived": if arrived { "m" } else { "an earlier one" },
                "move": {"attempt": "m", "heir": "b", "peer": "spiffe://west/default/web"},
            },
        })));
        let actions = plan(&snapshot).actions;
        let waits = case.strategy == RunStrategy::WaitAsReceiver;
        prop_assert!(waits || !starts(&actions));
        let halts = actions.iter().any(|action| {
            matches!(action, Action::Patch(patch) if patch["spec"]["runStrategy"] == "Halted")
        });
        // It may yet be called back, and then begins anew as its strategy has it.
        prop_assert_eq!(halts, arrived && !case.deleted && !waits && case.strategy != RunStrategy::Halted);
    }

    #[test]
    fn a_vm_goes_with_its_disks_only_when_nobody_runs_its_guest_for_certain(case in cases()) {
        let actions = plan(&snapshot(&case)).actions;
        let goes = actions.iter().any(|action| {
            matches!(action, Action::Patch(patch) if patch["metadata"]["finalizers"] == json!([]))
        });
        prop_assert_eq!(goes, case.deleted && case.vmi.is_none() && !case.owned);
    }

    #[test]
    fn a_guest_that_runs_is_stopped_by_a_wish_alone(case in cases()) {
        let actions = plan(&snapshot(&case)).actions;
        if let Some((Phase::Pending | Phase::Scheduling | Phase::Running, leaves)) = case.vmi {
            let wished = case.deleted || case.stop || case.strategy == RunStrategy::Halted;
            prop_assert_eq!(stops(&actions), wished && !leaves);
        }
    }

    #[test]
    fn what_is_written_is_what_is_read_the_next_time(case in cases()) {
        let mut snapshot = snapshot(&case);
        let first = plan(&snapshot);
        let Some(Action::PatchStatus(status)) =
            first.actions.iter().rfind(|action| matches!(action, Action::PatchStatus(_)))
        else {
            return Ok(());
        };
        let mut vm = (*snapshot.vm).clone();
        vm.status = Some(serde_json::from_value::<Status>(status.clone()).expect("a status"));
        snapshot.vm = Arc::new(vm);
        let again = plan(&snapshot).actions;
        prop_assert!(!again.iter().any(|action| matches!(action, Action::PatchStatus(_))), "{:?}", again);
    }

    #[test]
    fn a_vm_without_a_vmi_is_not_shown_as_running(case in cases()) {
        let plan = plan(&snapshot(&case));
        for action in &plan.actions {
            if let (Action::PatchStatus(status), None) = (action, case.vmi) {
                let status: Status = serde_json::from_value(status.clone()).expect("a status");
                prop_assert!(!status.ready && status.printable_status != Printable::Running);
            }
        }
    }
}

/// A VM that takes an instancetype of the cluster, with what is found of it.
fn taker(case: &Case, held: Option<Value>, live: Option<Value>) -> Snapshot {
    let mut snapshot = snapshot(case);
    let mut vm = (*snapshot.vm).clone();
    vm.spec.template.spec = json!({"domain": {}});
    vm.spec.instancetype = Some(serde_json::from_value(json!({"name": "u1"})).expect("a matcher"));
    let all = wanted(&vm.spec, vm.status.as_ref());
    snapshot.taken = all.into_iter().map(|one| one.found(held.clone(), live.clone())).collect();
    snapshot.vm = Arc::new(vm);
    snapshot
}

fn written(actions: &[Action]) -> Status {
    let status = actions.iter().rev().find_map(|action| match action {
        Action::PatchStatus(status) => Some(status.clone()),
        _ => None,
    });
    serde_json::from_value(status.expect("it is written")).expect("a status")
}

#[test]
fn a_vm_starts_from_what_is_pinned_and_says_what_it_waits_for() {
    let case = Case {
        strategy: RunStrategy::Always,
        vmi: None,
        start: false,
        stop: false,
        failures: 0,
        deleted: false,
        owned: false,
    };
    let object = json!({
        "apiVersion": "instancetype.kubevirt.io/v1beta1", "kind": "VirtualMachineClusterInstancetype",
        "metadata": {"name": "u1", "uid": "7", "generation": 3},
        "spec": {"cpu": {"guest": 4}, "memory": {"guest": "128Mi"}},
    });
    // It is not there.
    let first = plan(&taker(&case, None, None)).actions;
    assert!(!starts(&first), "{first:?}");
    let told = first.iter().any(|action| {
        matches!(action, Action::Say { reason: "FailedFindInstancetype", message, .. } if message.contains("u1"))
    });
    let status = written(&first);
    assert_eq!(status.printable_status, Printable::Stopped);
    let failure = status.conditions.iter().find(|c| c.kind == "Failure").expect("a condition");
    assert!(told && failure.reason.as_deref() == Some("FailedFindInstancetype"), "{first:?}");
    // It is, and is held before it is used.
    let second = plan(&taker(&case, None, Some(object.clone()))).actions;
    let [Action::Pin(revision), Action::PatchStatus(_)] = &second[..] else {
        panic!("{second:?}");
    };
    assert_eq!(revision["metadata"]["name"], "web-u1-v1beta1-7-3");
    assert_eq!(revision["metadata"]["ownerReferences"][0]["uid"], "0");
    assert_eq!(revision["data"]["spec"], object["spec"]);
    let pinned = written(&second).instancetype_ref.and_then(|held| held.controller_revision_ref);
    assert_eq!(pinned.map(|held| held.name).as_deref(), Some("web-u1-v1beta1-7-3"));
    // What was held counts, whatever has become of it.
    let mut later = object.clone();
    later["spec"]["cpu"]["guest"] = 8.into();
    let third = plan(&taker(&case, Some(object), Some(later))).actions;
    let vmi = third.iter().find_map(|action| match action {
        Action::Start(vmi) => Some(vmi),
        _ => None,
    });
    let domain = &vmi.expect("it starts")["spec"]["domain"];
    assert_eq!(domain["cpu"], json!({"sockets": 4, "cores": 1, "threads": 1}));
    assert_eq!(domain["memory"]["guest"], "128Mi");
    assert!(written(&third).conditions.iter().all(|c| c.kind != "Failure"));
}
