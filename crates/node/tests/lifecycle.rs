//! Who is unreachable is tainted, and pods leave when their tolerations end.

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Node, Pod};
use node::lifecycle::{leaves, wanted_taints};
use node::scheduler::nodes::taints;
use serde_json::json;

fn keys(node: &Node) -> Vec<String> {
    taints(node).map(|taint| format!("{}:{}", taint.key, taint.effect)).collect()
}

#[test]
fn taints_come_and_go_with_their_reasons_and_others_stay() {
    let now = Timestamp::UNIX_EPOCH;
    let mut node: Node = serde_json::from_value(json!({"spec": {
        "taints": [{"key": "mine", "effect": "NoSchedule"}],
    }}))
    .unwrap();
    let tick = |node: &mut Node, reachable: bool, cordoned: bool, at: Timestamp| {
        let spec = node.spec.as_mut().unwrap();
        spec.unschedulable = Some(cordoned);
        let wanted = wanted_taints(node, reachable, at);
        node.spec.as_mut().unwrap().taints = Some(wanted);
    };
    tick(&mut node, false, true, now);
    assert_eq!(
        keys(&node),
        [
            "mine:NoSchedule",
            "node.kubernetes.io/unschedulable:NoSchedule",
            "node.kubernetes.io/unreachable:NoSchedule",
            "node.kubernetes.io/unreachable:NoExecute",
        ]
    );
    // Since when is kept: pods' time runs from then.
    let before = node.clone();
    tick(&mut node, false, true, now + SignedDuration::from_secs(60));
    assert_eq!(node, before);
    tick(&mut node, true, false, now);
    assert_eq!(keys(&node), ["mine:NoSchedule"]);
}

#[test]
fn a_pod_leaves_when_its_shortest_toleration_ends_or_at_once_without_one() {
    let added: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
    let node: Node = serde_json::from_value(json!({"spec": {"taints": [
        {"key": "node.kubernetes.io/unreachable", "effect": "NoExecute", "timeAdded": added},
        {"key": "other", "effect": "NoSchedule", "timeAdded": added},
    ]}}))
    .unwrap();
    let leaves_with = |tolerations: serde_json::Value| {
        let spec = json!({"containers": [], "tolerations": tolerations});
        let pod: Pod = serde_json::from_value(json!({"spec": spec})).unwrap();
        leaves(&pod, taints(&node)).map(|at| at.duration_since(added).as_secs())
    };
    let unreachable = |seconds: Option<i64>| {
        json!({
            "key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute",
            "tolerationSeconds": seconds,
        })
    };
    assert_eq!(leaves_with(json!([])), Some(0));
    assert_eq!(leaves_with(json!([unreachable(Some(300)), unreachable(Some(30))])), Some(30));
    assert_eq!(leaves_with(json!([unreachable(None)])), None);
    assert_eq!(leaves_with(json!([{"operator": "Exists"}])), None);
}
