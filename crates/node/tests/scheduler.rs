//! Laws of the scheduler's decision.

use k8s_openapi::api::core::v1::{Node, PersistentVolume, PersistentVolumeClaim, Pod};
use k8s_openapi::api::storage::v1::StorageClass;
use node::scheduler::nodes;
use node::scheduler::plan::{Decision, decide};
use node::scheduler::resources::Resources;
use node::scheduler::snapshot::Snapshot;
use proptest::prelude::*;
use serde_json::{Value, json};
use std::sync::Arc;

fn of<T: serde::de::DeserializeOwned>(value: Value) -> Arc<T> {
    Arc::new(serde_json::from_value(value).unwrap())
}

fn node(name: &str, cpu: u32, change: impl Fn(&mut Value)) -> Arc<Node> {
    let mut node = json!({
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
        "status": {"allocatable": {"cpu": cpu.to_string(), "memory": "8Gi", "pods": "5"}},
    });
    change(&mut node);
    of(node)
}

fn pod(name: &str, spec: Value) -> Pod {
    let mut pod = json!({
        "metadata": {"name": name, "namespace": "default", "uid": name, "labels": {"app": "x"}},
        "spec": {"containers": [{"name": "c"}]},
    });
    for (key, value) in spec.as_object().unwrap() {
        pod["spec"][key] = value.clone();
    }
    serde_json::from_value(pod).unwrap()
}

fn placed(pod: &Pod, on: &str) -> Arc<Pod> {
    let mut pod = pod.clone();
    pod.spec.as_mut().unwrap().node_name = Some(on.into());
    Arc::new(pod)
}

proptest! {
    #[test]
    fn no_node_ever_gives_more_than_it_has_and_who_fits_is_placed(
        nodes in prop::collection::vec(1u32..5, 1..5),
        pods in prop::collection::vec((0u32..3000, 0u32..4), 0..25),
    ) {
        let nodes = nodes.iter().enumerate();
        let nodes = nodes.map(|(i, cpu)| node(&format!("n{i}"), *cpu, |_| {}));
        let mut snapshot = Snapshot { nodes: nodes.collect(), ..Snapshot::default() };
        for (i, (cpu, memory)) in pods.into_iter().enumerate() {
            let requests = json!({"cpu": format!("{cpu}m"), "memory": format!("{memory}Gi")});
            let containers = json!([{"name": "c", "resources": {"requests": requests}}]);
            let pod = pod(&format!("p{i}"), json!({"containers": containers}));
            let wanted = Resources::of_pod(&pod);
            let fits = |node: &&Arc<Node>| {
                let used = snapshot.used(nodes::name(node));
                Resources::of_node(node).lacks(&used, &wanted).is_empty()
            };
            match decide(&pod, &snapshot) {
                Decision::Bind(on) => {
                    prop_assert!(snapshot.nodes.iter().filter(fits).any(|n| nodes::name(n) == on));
                    snapshot.pods.push(placed(&pod, &on));
                }
                Decision::Unschedulable(_) => {
                    prop_assert!(!snapshot.nodes.iter().any(|node| fits(&node)));
                }
                other @ Decision::Provision { .. } => prop_assert!(false, "{other:?}"),
            }
        }
        for node in &snapshot.nodes {
            let used = snapshot.used(nodes::name(node));
            prop_assert!(Resources::of_node(node).lacks(&Resources::default(), &used).is_empty());
        }
    }
}

/// The text for a pod that goes nowhere.
fn why(pod: &Pod, snapshot: &Snapshot) -> String {
    match decide(pod, snapshot) {
        Decision::Unschedulable(why) => why,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_pod_that_goes_nowhere_says_why_as_kube_scheduler_does() {
    let tainted = |node: &mut Value| {
        node["spec"]["taints"] = json!([{"key": "a", "value": "b", "effect": "NoSchedule"}]);
    };
    let cordoned = |node: &mut Value| node["spec"]["unschedulable"] = true.into();
    let mut snapshot = Snapshot {
        nodes: vec![node("n1", 1, tainted), node("n2", 1, cordoned), node("n3", 1, |_| {})],
        ..Snapshot::default()
    };
    let large =
        json!([{"name": "c", "resources": {"requests": {"cpu": "2", "godwit.dev/x": "1"}}}]);
    assert_eq!(
        why(&pod("p", json!({"containers": large})), &snapshot),
        "0/3 nodes are available: 1 Insufficient cpu, 1 Insufficient godwit.dev/x, \
         1 node(s) had untolerated taint {a: b}, 1 node(s) were unschedulable."
    );
    let elsewhere = json!({"nodeSelector": {"kubernetes.io/hostname": "n4"}});
    let tolerant = json!([{"operator": "Exists"}]);
    let mut picky = pod("p", elsewhere);
    picky.spec.as_mut().unwrap().tolerations = serde_json::from_value(tolerant).unwrap();
    assert_eq!(
        why(&picky, &snapshot),
        "0/3 nodes are available: 3 node(s) didn't match Pod's node affinity/selector."
    );
    let alone = json!({"affinity": {"podAntiAffinity": {
        "requiredDuringSchedulingIgnoredDuringExecution": [{
            "labelSelector": {"matchLabels": {"app": "x"}}, "topologyKey": "kubernetes.io/hostname",
        }],
    }}});
    let first = pod("p", alone);
    assert_eq!(decide(&first, &snapshot), Decision::Bind("n3".into()));
    snapshot.pods.push(placed(&first, "n3"));
    assert!(why(&first, &snapshot).contains("1 node(s) didn't match pod anti-affinity rules"));
    let plain = pod("q", json!({}));
    let minds = "1 node(s) didn't satisfy existing pods anti-affinity rules";
    assert!(why(&plain, &snapshot).contains(minds));
    snapshot.nodes.clear();
    assert_eq!(why(&first, &snapshot), "no nodes available to schedule pods");
}

#[test]
fn a_pod_goes_where_its_claims_volumes_are_or_can_be() {
    let waiting = json!({
        "metadata": {"name": "local"}, "provisioner": "storage.godwit.dev/local",
        "volumeBindingMode": "WaitForFirstConsumer",
    });
    let claim = |name: &str, size: &str| -> Value {
        json!({
            "metadata": {"name": name, "namespace": "default", "uid": name},
            "spec": {
                "storageClassName": "local", "accessModes": ["ReadWriteOnce"],
                "resources": {"requests": {"storage": size}},
            },
        })
    };
    let with_pool = |size: &'static str| {
        move |node: &mut Value| {
            node["metadata"]["annotations"] = json!({"storage.godwit.dev/capacity": size});
        }
    };
    let mut snapshot = Snapshot {
        nodes: vec![node("n1", 4, with_pool("1Gi")), node("n2", 4, with_pool("8Gi"))],
        classes: vec![of::<StorageClass>(waiting)],
        claims: vec![of(claim("c", "2Gi"))],
        ..Snapshot::default()
    };
    let uses = |claim: &str| {
        pod("p", json!({"volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": claim}}]}))
    };
    let told = Decision::Provision { node: "n2".into(), claims: vec!["c".into()] };
    assert_eq!(decide(&uses("c"), &snapshot), told);
    let text = "0/2 nodes are available: persistentvolumeclaim \"none\" not found.";
    assert_eq!(why(&uses("none"), &snapshot), text);
    // Bound, it is where its volume is.
    let mut bound = claim("c", "2Gi");
    bound["spec"]["volumeName"] = "v".into();
    bound["metadata"]["annotations"] = json!({"pv.kubernetes.io/bind-completed": "yes"});
    snapshot.claims = vec![of::<PersistentVolumeClaim>(bound), of(claim("d", "7Gi"))];
    snapshot.volumes = vec![of::<PersistentVolume>(json!({
        "metadata": {"name": "v"},
        "spec": {
            "capacity": {"storage": "2Gi"},
            "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [
                {"key": "kubernetes.io/hostname", "operator": "In", "values": ["n2"]},
            ]}]}},
        },
    }))];
    assert_eq!(decide(&uses("c"), &snapshot), Decision::Bind("n2".into()));
    // And takes of its node's pool.
    let full = "0/2 nodes are available: 2 node(s) did not have enough free storage.";
    assert_eq!(why(&uses("d"), &snapshot), full);
}
