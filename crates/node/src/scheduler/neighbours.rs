//! Which pods a pod wants to be near, and which it does not, by topology.
//!
//! Source: Kubernetes' `InterPodAffinity`.

use super::snapshot::Snapshot;
use apiserver::selector::Labels;
use k8s_openapi::api::core::v1::{Node, Pod, PodAffinityTerm, WeightedPodAffinityTerm};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use serde_json::{Map, Value};
use std::collections::BTreeMap;

fn affinity(pod: &Pod) -> Vec<PodAffinityTerm> {
    let of = || pod.spec.as_ref()?.affinity.as_ref()?.pod_affinity.clone();
    of().and_then(|a| a.required_during_scheduling_ignored_during_execution).unwrap_or_default()
}

fn anti_affinity(pod: &Pod) -> Vec<PodAffinityTerm> {
    let of = || pod.spec.as_ref()?.affinity.as_ref()?.pod_anti_affinity.clone();
    of().and_then(|a| a.required_during_scheduling_ignored_during_execution).unwrap_or_default()
}

/// Preferences for and against neighbours; those against have negative weights.
fn preferences(pod: &Pod) -> Vec<WeightedPodAffinityTerm> {
    let Some(affinity) = pod.spec.as_ref().and_then(|spec| spec.affinity.as_ref()) else {
        return Vec::new();
    };
    let near = affinity.pod_affinity.clone();
    let far = affinity.pod_anti_affinity.clone();
    let near = near.and_then(|a| a.preferred_during_scheduling_ignored_during_execution);
    let far = far.and_then(|a| a.preferred_during_scheduling_ignored_during_execution);
    let against = far.into_iter().flatten().map(|mut term| {
        term.weight = -term.weight;
        term
    });
    near.into_iter().flatten().chain(against).collect()
}

fn chosen(selector: Option<&LabelSelector>, labels: Option<&BTreeMap<String, String>>) -> bool {
    // No selector chooses nothing, an empty one everything.
    let Some(selector) = selector else { return false };
    let Ok(value) = serde_json::to_value(selector) else { return false };
    let labels: Map<String, Value> = labels
        .into_iter()
        .flatten()
        .map(|(key, value)| (key.clone(), Value::from(value.clone())))
        .collect();
    match Labels::from_object(&value) {
        Ok(Some(parsed)) => parsed.matches(Some(&labels)),
        Ok(None) => true,
        Err(_) => false,
    }
}

/// Whether a term that `owner` has is about `other`.
fn is_about(term: &PodAffinityTerm, owner: &Pod, other: &Pod, snapshot: &Snapshot) -> bool {
    let theirs = other.metadata.namespace.as_deref().unwrap_or_default();
    let named = term.namespaces.as_deref().unwrap_or_default();
    let own = named.is_empty() && term.namespace_selector.is_none();
    let in_namespace = (own && owner.metadata.namespace.as_deref() == Some(theirs))
        || named.iter().any(|name| name == theirs)
        || snapshot
            .namespace(theirs)
            .is_some_and(|n| chosen(term.namespace_selector.as_ref(), n.metadata.labels.as_ref()));
    in_namespace && chosen(term.label_selector.as_ref(), other.metadata.labels.as_ref())
}

fn topology<'a>(node: &'a Node, term: &PodAffinityTerm) -> Option<&'a String> {
    node.metadata.labels.as_ref()?.get(&term.topology_key)
}

/// Whether a node and that of another pod are in one place, as a term sees it.
fn together(term: &PodAffinityTerm, node: &Node, other: &Pod, snapshot: &Snapshot) -> bool {
    let Some(theirs) = snapshot.node_of(other) else { return false };
    let place = topology(node, term);
    place.is_some() && place == topology(theirs, term)
}

/// Why a pod cannot be on a node for the sake of other pods.
pub fn refuses(pod: &Pod, node: &Node, snapshot: &Snapshot) -> Option<&'static str> {
    let running = || snapshot.pods.iter().map(AsRef::as_ref);
    for term in affinity(pod) {
        let here = running().any(|other| {
            is_about(&term, pod, other, snapshot) && together(&term, node, other, snapshot)
        });
        // The first of a group that wants to be together may start it.
        let first = || {
            topology(node, &term).is_some()
                && is_about(&term, pod, pod, snapshot)
                && !running().any(|other| is_about(&term, pod, other, snapshot))
        };
        if !here && !first() {
            return Some("node(s) didn't match pod affinity rules");
        }
    }
    for term in anti_affinity(pod) {
        let clash = |other: &Pod| {
            is_about(&term, pod, other, snapshot) && together(&term, node, other, snapshot)
        };
        if running().any(clash) {
            return Some("node(s) didn't match pod anti-affinity rules");
        }
    }
    let minds = |other: &Pod| {
        anti_affinity(other).iter().any(|term| {
            is_about(term, other, pod, snapshot) && together(term, node, other, snapshot)
        })
    };
    running().any(minds).then_some("node(s) didn't satisfy existing pods anti-affinity rules")
}

/// The weights of the preferences for neighbours that a node meets.
pub fn preference(pod: &Pod, node: &Node, snapshot: &Snapshot) -> i64 {
    let mut sum = 0;
    for weighted in preferences(pod) {
        let term = &weighted.pod_affinity_term;
        let met = snapshot.pods.iter().filter(|other| {
            is_about(term, pod, other, snapshot) && together(term, node, other, snapshot)
        });
        sum += i64::from(weighted.weight) * i64::try_from(met.count()).unwrap_or(i64::MAX);
    }
    sum
}
