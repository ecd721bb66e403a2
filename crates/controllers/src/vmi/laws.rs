//! What holds of every plan for a VMI.

use super::plan::{Action, Snapshot, plan};
use api::keys;
use api::kubevirt::KubeVirt;
use api::owner::OwnerRecord;
use api::vmi::{Phase, VirtualMachineInstance};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, Pod};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::sync::Arc;

const PHASES: [Phase; 9] = [
    Phase::Unset,
    Phase::Pending,
    Phase::WaitingForSync,
    Phase::Scheduling,
    Phase::Scheduled,
    Phase::Running,
    Phase::Succeeded,
    Phase::Failed,
    Phase::Unknown,
];

/// How an owner record is.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Owner {
    None,
    Never,
    Lives,
    Ended,
    /// It came by a move, and has ended before anybody saw it run.
    Came,
    /// It has ended, and a move may still bring the guest to its heir.
    Comes,
}

impl Owner {
    const ALL: [Self; 6] =
        [Self::None, Self::Never, Self::Lives, Self::Ended, Self::Came, Self::Comes];

    /// Whether somebody may run the guest.
    fn may_run(self) -> bool {
        matches!(self, Self::Lives | Self::Comes)
    }
}

#[derive(Debug, Clone)]
struct Case {
    phase: Phase,
    deleted: bool,
    owner: Owner,
    /// The phase of the launcher's pod.
    pod: Option<&'static str>,
    out_of_service: bool,
    settings: bool,
    /// A disk of it is being cloned.
    cloned: bool,
}

fn cases() -> impl Strategy<Value = Case> {
    let owner = prop::sample::select(Owner::ALL.to_vec());
    let pod = prop::sample::select(vec![None, Some("Pending"), Some("Running"), Some("Failed")]);
    let phase = prop::sample::select(PHASES.to_vec());
    (phase, any::<bool>(), owner, pod, any::<[bool; 3]>()).prop_map(
        |(phase, deleted, owner, pod, [out_of_service, settings, cloned])| Case {
            phase,
            deleted,
            owner,
            pod,
            out_of_service,
            settings,
            cloned,
        },
    )
}

fn made<T: serde::de::DeserializeOwned>(value: Value) -> Arc<T> {
    Arc::new(serde_json::from_value(value).expect("a whole object"))
}

fn snapshot(case: &Case) -> Snapshot {
    let mut metadata = json!({
        "name": "web", "namespace": "default", "uid": "1", "resourceVersion": "1",
        "finalizers": [keys::VMI_FINALIZER],
    });
    if case.deleted {
        metadata["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
    }
    let spec = json!({"domain": {"memory": {"guest": "64Mi"}}});
    let vmi: Arc<VirtualMachineInstance> = made(json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance", "metadata": metadata,
        "spec": spec, "status": {"phase": case.phase},
    }));
    let status = match case.owner {
        Owner::None | Owner::Never => Value::Null,
        Owner::Lives => json!({"epoch": 1, "owner": "a", "state": "idle", "node": "n"}),
        Owner::Ended => json!({
            "epoch": 1, "owner": "a", "state": "idle", "node": "n", "ended": {"instance": "a"},
        }),
        Owner::Came => json!({
            "epoch": 2, "owner": "a", "state": "idle", "node": "n", "ended": {"instance": "a"}, "told": "a",
        }),
        Owner::Comes => json!({
            "epoch": 1, "owner": "a", "state": "armed", "node": "n", "ended": {"instance": "a"},
            "move": {"attempt": "m", "heir": "b", "peer": "spiffe://local"},
        }),
    };
    let owner = (case.owner != Owner::None).then(|| {
        made::<OwnerRecord>(json!({
            "apiVersion": "godwit.dev/v1alpha1", "kind": "OwnerRecord",
            "metadata": {"name": "web", "namespace": "default"}, "spec": {"vm": "default.web"},
            "status": status,
        }))
    });
    let pods = case.pod.map(|phase| {
        made::<Pod>(json!({
            "metadata": {
                "name": "p", "namespace": "default", "uid": "2",
                "labels": if case.owner == Owner::Comes { json!({keys::MIGRATION: "m"}) } else { json!({}) },
            },
            "spec": {"nodeName": "n", "containers": []},
            "status": {"phase": phase, "conditions": [{
                "type": "Ready", "status": if phase == "Running" { "True" } else { "False" },
            }]},
        }))
    });
    let taints = match case.out_of_service {
        true => json!([{"key": keys::OUT_OF_SERVICE, "effect": "NoExecute"}]),
        false => json!([]),
    };
    let node = |name| made::<Node>(json!({"metadata": {"name": name}, "spec": {"taints": taints}}));
    let settings = case.settings.then(|| {
        made::<KubeVirt>(json!({"metadata": {"name": "k", "namespace": "kubevirt"}, "spec": {}}))
    });
    Snapshot {
        spec: vmi.parse(),
        vmi,
        readers: case.cloned.then(|| "default/copy".into()).into_iter().collect(),
        claims: Vec::new(),
        pods: pods.into_iter().collect(),
        owner,
        heir_node: (case.owner == Owner::Comes).then(|| node("m")),
        node: Some(node("n")),
        cluster: settings,
        now: Timestamp::UNIX_EPOCH,
    }
}

proptest! {
    #[test]
    fn no_pod_is_made_while_a_guest_may_run_or_its_disk_is_read(case in cases()) {
        let plan = plan(&snapshot(&case));
        let makes = plan.actions.iter().any(|action| matches!(action, Action::CreatePod(_)));
        let may = !case.owner.may_run() && case.pod.is_none() && !case.cloned;
        prop_assert!(!makes || may);
    }

    #[test]
    fn a_vmi_goes_only_when_nobody_runs_its_guest_for_certain(case in cases()) {
        let plan = plan(&snapshot(&case));
        let goes = plan.actions.iter().any(|action| {
            matches!(action, Action::Patch(patch) if patch["metadata"]["finalizers"] == json!([]))
        });
        prop_assert!(!goes || (case.deleted && !case.owner.may_run() && case.pod.is_none()));
    }

    #[test]
    fn an_owner_counts_as_ended_by_a_persons_word_only(case in cases()) {
        let plan = plan(&snapshot(&case));
        let fenced: Vec<_> = plan.actions.iter().filter_map(|action| match action {
            Action::Fence { field, node, .. } => Some((*field, &**node)),
            _ => None,
        }).collect();
        // N.B. each once: what is written down is not written again.
        let expected = match (case.out_of_service, case.owner) {
            (true, Owner::Lives) => vec![("ended", "n")],
            (true, Owner::Comes) => vec![("heirEnded", "m")],
            _ => vec![],
        };
        prop_assert_eq!(fenced, expected);
    }

    #[test]
    fn a_guest_that_runs_keeps_its_pod_until_it_has_ended(case in cases()) {
        let plan = plan(&snapshot(&case));
        let deletes = plan.actions.iter().any(|action| matches!(action, Action::DeletePod(_)));
        let with_guest = matches!(case.phase, Phase::Scheduled | Phase::Running | Phase::Unknown);
        prop_assert!(!deletes || !with_guest);
        // Also where the VMI is said to have ended.
        prop_assert!(!deletes || case.owner != Owner::Comes);
    }

    #[test]
    fn a_guest_that_came_and_ended_is_not_waited_for_and_any_other_is(case in cases()) {
        let case = Case { phase: Phase::WaitingForSync, deleted: false, ..case };
        let plan = plan(&snapshot(&case));
        let fails = plan.actions.iter().any(|action| {
            matches!(action, Action::PatchStatus(status) if status["phase"] == "Failed")
        });
        let lives = case.pod.is_some_and(|pod| pod != "Failed");
        prop_assert_eq!(fails, case.owner == Owner::Came && !lives);
    }
}
