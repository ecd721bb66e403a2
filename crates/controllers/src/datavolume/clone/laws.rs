//! What holds of every plan for a clone.

use super::{Origin, lender_name};
use crate::datavolume::claim::Terms;
use crate::datavolume::plan::{Action, Snapshot, plan};
use crate::datavolume::pod::BORROWS;
use api::datavolume::DataVolume;
use api::import::Lent;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::sync::Arc;

/// How a pod is seen.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Seen {
    None,
    Waits,
    Runs,
    Done,
    Lost,
    Leaves,
}

#[derive(Debug, Clone)]
struct Case {
    bound: bool,
    used: bool,
    unfinished: bool,
    lender: Seen,
    told: bool,
    importer: Seen,
    /// The importer was told of this lender.
    same: bool,
}

fn cases() -> impl Strategy<Value = Case> {
    use Seen::{Done, Leaves, Lost, None, Runs, Waits};
    let seen = || prop::sample::select(vec![None, Waits, Runs, Done, Lost, Leaves]);
    (any::<[bool; 5]>(), seen(), seen()).prop_map(
        |([bound, used, unfinished, told, same], lender, importer)| Case {
            bound,
            used,
            unfinished,
            lender,
            told: told && lender == Runs,
            importer,
            same,
        },
    )
}

fn of<K: serde::de::DeserializeOwned>(object: Value) -> Arc<K> {
    Arc::new(serde_json::from_value(object).unwrap())
}

fn pod(seen: Seen, mut pod: Value) -> Option<Arc<Pod>> {
    let running = json!([{
        "name": "c", "image": "i", "imageID": "i", "ready": true, "restartCount": 0,
        "state": {"running": {}},
    }]);
    pod["status"] = match seen {
        Seen::None => return None,
        Seen::Waits => json!({"phase": "Pending"}),
        Seen::Runs | Seen::Leaves => json!({"phase": "Running", "containerStatuses": running}),
        Seen::Done => json!({"phase": "Succeeded"}),
        Seen::Lost => json!({"phase": "Failed", "reason": "Evicted"}),
    };
    if seen == Seen::Leaves {
        pod["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
    }
    Some(of(pod))
}

fn snapshot(case: &Case) -> Snapshot {
    let source = json!({"pvc": {"namespace": "images", "name": "golden"}});
    let size = json!({"requests": {"storage": "1Gi"}});
    let volume: Arc<DataVolume> = of(json!({
        "metadata": {"name": "d", "namespace": "n", "uid": "u"},
        "spec": {"source": source, "pvc": {"accessModes": ["ReadWriteOnce"], "resources": size}},
    }));
    let claim: Arc<PersistentVolumeClaim> = of(json!({
        "metadata": {
            "name": "d", "namespace": "n", "uid": "c",
            "ownerReferences": [{"apiVersion": "v", "kind": "k", "name": "d", "uid": "u"}],
        },
        "spec": {"volumeName": "v", "resources": size}, "status": {"phase": "Bound"},
    }));
    let golden = of(json!({
        "metadata": {"name": "golden", "namespace": "images", "uid": "g"},
        "spec": {}, "status": {"phase": if case.bound { "Bound" } else { "Pending" }},
    }));
    let used = json!([{"name": "source", "persistentVolumeClaim": {"claimName": "golden"}}]);
    let lender = json!({
        "metadata": {"name": lender_name(&volume), "namespace": "images", "uid": "l"},
        "spec": {"containers": [], "volumes": used},
    });
    let borrows = if case.same { "l" } else { "an older one" };
    let importer = json!({
        "metadata": {
            "name": "importer-d", "namespace": "n", "uid": "i",
            "annotations": {"godwit.dev/fills": "c", BORROWS: borrows},
        },
        "spec": {"containers": []},
    });
    let lent = Lent { lent: "https://[::1]:1".into(), certificate: "c".into() };
    Snapshot {
        origin: Some(Origin {
            namespace: "images".into(),
            name: "golden".into(),
            claim: Some(golden),
            unfinished: case.unfinished,
            users: case.used.then(|| "guest".to_owned()).into_iter().collect(),
            lender: pod(case.lender, lender),
            lent: case.told.then_some(lent),
        }),
        pods: pod(case.importer, importer).into_iter().collect(),
        claim: Some(claim),
        terms: Arc::new(Terms::default()),
        progress: None,
        offer: None,
        now: "2026-01-01T00:00:00Z".parse::<Timestamp>().unwrap(),
        volume,
    }
}

proptest! {
    #[test]
    fn only_what_is_lent_is_read_and_nothing_is_lent_that_a_guest_may_write(case in cases()) {
        let all = plan(&snapshot(&case)).actions;
        let free = case.bound && !case.used && !case.unfinished;
        let reads = all.iter().any(|action| matches!(action, Action::CreatePod(_)));
        prop_assert_eq!(reads, case.importer == Seen::None && free && case.told);
        let lends = all.iter().any(|action| matches!(action, Action::CreateLender(_)));
        prop_assert_eq!(lends, case.importer == Seen::None && free && case.lender == Seen::None);
        let deleted = |uid: &str| {
            all.iter().any(|action| matches!(action, Action::DeletePod { uid: it, .. } if it == uid))
        };
        // Who waits for nothing but the importer's turn gives way to a guest.
        let there = !matches!(case.lender, Seen::None | Seen::Leaves);
        prop_assert!(deleted("l") || !(there && case.used && case.importer == Seen::None));
        let lends = case.same && matches!(case.lender, Seen::Waits | Seen::Runs);
        let works = matches!(case.importer, Seen::Waits | Seen::Runs);
        prop_assert!(!works || deleted("i") != lends, "an importer is cut off, or would be");
        // What is complete is read no more.
        prop_assert!(case.importer != Seen::Done || (deleted("i") && (deleted("l") || !there)));
    }
}
