//! The decision: a node for a pod, or why there is none.

use super::claims::Wants;
use super::resources::Resources;
use super::snapshot::Snapshot;
use super::{neighbours, nodes};
use k8s_openapi::api::core::v1::{Node, Pod};
use std::cmp::Reverse;
use std::collections::BTreeMap;

/// What to do with a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// It goes to this node.
    Bind(String),
    /// It will go to this node, once these claims have volumes there.
    Provision {
        /// The node.
        node: String,
        /// Names in the pod's namespace.
        claims: Vec<String>,
    },
    /// It goes nowhere now; the text says why, as kube-scheduler does.
    Unschedulable(String),
}

/// Decides where a pod goes.
pub fn decide(pod: &Pod, snapshot: &Snapshot) -> Decision {
    if snapshot.nodes.is_empty() {
        return Decision::Unschedulable("no nodes available to schedule pods".into());
    }
    let total = snapshot.nodes.len();
    let wants = match Wants::of(pod, snapshot) {
        Ok(wants) => wants,
        Err(why) => {
            return Decision::Unschedulable(format!("0/{total} nodes are available: {why}."));
        }
    };
    let wanted = Resources::of_pod(pod);
    let mut refusals: BTreeMap<String, usize> = BTreeMap::new();
    let mut fitting = Vec::new();
    for node in &snapshot.nodes {
        let why = refuse(pod, &wanted, &wants, node, snapshot);
        if why.is_empty() {
            fitting.push(node.as_ref());
        }
        for reason in why {
            *refusals.entry(reason).or_default() += 1;
        }
    }
    let Some(best) = best(pod, &fitting, snapshot) else {
        let mut reasons: Vec<String> =
            refusals.iter().map(|(reason, count)| format!("{count} {reason}")).collect();
        reasons.sort();
        let text = format!("0/{total} nodes are available: {}.", reasons.join(", "));
        return Decision::Unschedulable(text);
    };
    let node = nodes::name(best).to_owned();
    match wants.waiting() {
        [] => Decision::Bind(node),
        waiting => {
            let name = |claim: &&_| claim_name(claim);
            Decision::Provision { node, claims: waiting.iter().map(name).collect() }
        }
    }
}

fn claim_name(claim: &k8s_openapi::api::core::v1::PersistentVolumeClaim) -> String {
    claim.metadata.name.clone().unwrap_or_default()
}

/// Why a node will not do: the reasons of the first rule that it breaks, in kube-scheduler's order.
fn refuse(
    pod: &Pod,
    wanted: &Resources,
    wants: &Wants<'_>,
    node: &Node,
    snapshot: &Snapshot,
) -> Vec<String> {
    let Some(spec) = &pod.spec else { return vec!["the pod has no spec".into()] };
    if nodes::is_closed(spec, node) {
        return vec!["node(s) were unschedulable".into()];
    }
    if let Some(taint) = nodes::untolerated(spec, node) {
        let value = taint.value.as_deref().unwrap_or_default();
        return vec![format!("node(s) had untolerated taint {{{}: {value}}}", taint.key)];
    }
    if !nodes::wanted_by(spec, node) {
        return vec!["node(s) didn't match Pod's node affinity/selector".into()];
    }
    let name = nodes::name(node);
    if snapshot.pods_on(name).any(|other| nodes::ports_clash(pod, other)) {
        return vec!["node(s) didn't have free ports for the requested pod ports".into()];
    }
    let lacks = Resources::of_node(node).lacks(&snapshot.used(name), wanted);
    if !lacks.is_empty() {
        return lacks;
    }
    let why = wants.refuse(node, snapshot).or_else(|| neighbours::refuses(pod, node, snapshot));
    why.map(str::to_owned).into_iter().collect()
}

/// The best of the nodes that will do: preferences first, then the one with most left.
fn best<'a>(pod: &Pod, fitting: &[&'a Node], snapshot: &Snapshot) -> Option<&'a Node> {
    let spec = pod.spec.as_ref()?;
    let rank = |node: &&&Node| {
        let liked = nodes::preference(spec, node) + neighbours::preference(pod, node, snapshot);
        let name = nodes::name(node);
        let mut taken = Resources::guess(pod);
        for other in snapshot.pods_on(name) {
            taken.add(&Resources::guess(other));
        }
        let left = left(&Resources::of_node(node), &taken);
        (-nodes::reluctance(spec, node), liked, left, Reverse(name.to_owned()))
    };
    fitting.iter().max_by_key(rank).copied()
}

/// How much of a node's processor and memory is left, the mean of both in thousandths.
///
/// Source: kube-scheduler's `LeastAllocated`.
fn left(have: &Resources, taken: &Resources) -> i64 {
    let share = |name: &str| {
        let all = i128::from(have.get(name));
        let taken = i128::from(taken.get(name));
        if all == 0 { 0 } else { ((all - taken) * 1000 / all).clamp(0, 1000) }
    };
    i64::try_from((share("cpu") + share("memory")) / 2).unwrap_or(0)
}
