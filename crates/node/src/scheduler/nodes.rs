//! Which nodes a pod wants, and which want it: selectors, affinity, taints.

use k8s_openapi::api::core::v1::{
    Node, NodeSelector, NodeSelectorRequirement, NodeSelectorTerm, Pod, PodSpec, Taint, Toleration,
};

/// A taint's effect that keeps pods from starting on a node.
pub const NO_SCHEDULE: &str = "NoSchedule";
/// A taint's effect that also drives off those that run there.
pub const NO_EXECUTE: &str = "NoExecute";
const PREFER_NO_SCHEDULE: &str = "PreferNoSchedule";

/// What a cordoned node is tainted with.
const UNSCHEDULABLE: &str = "node.kubernetes.io/unschedulable";

/// A node's name.
pub fn name(node: &Node) -> &str {
    node.metadata.name.as_deref().unwrap_or_default()
}

fn label<'a>(node: &'a Node, key: &str) -> Option<&'a str> {
    node.metadata.labels.as_ref()?.get(key).map(String::as_str)
}

/// A node's taints.
pub fn taints(node: &Node) -> impl Iterator<Item = &Taint> {
    node.spec.iter().flat_map(|spec| spec.taints.iter().flatten())
}

/// Whether a selector picks a node: any of its terms does.
pub fn selects(selector: &NodeSelector, node: &Node) -> bool {
    selector.node_selector_terms.iter().any(|term| fits(term, node))
}

/// Whether a term picks a node: all that it says holds. A term that says nothing picks none.
fn fits(term: &NodeSelectorTerm, node: &Node) -> bool {
    let labels = term.match_expressions.as_deref().unwrap_or_default();
    let fields = term.match_fields.as_deref().unwrap_or_default();
    if labels.is_empty() && fields.is_empty() {
        return false;
    }
    let by_label = |r: &NodeSelectorRequirement| holds(r, label(node, &r.key));
    let by_field =
        |r: &NodeSelectorRequirement| r.key == "metadata.name" && holds(r, Some(name(node)));
    labels.iter().all(by_label) && fields.iter().all(by_field)
}

fn holds(requirement: &NodeSelectorRequirement, value: Option<&str>) -> bool {
    let values = requirement.values.as_deref().unwrap_or_default();
    let among = || value.is_some_and(|value| values.iter().any(|v| v == value));
    let number = |text: &str| text.parse::<i64>().ok();
    let pair = || Some((number(value?)?, number(values.first()?)?));
    match &*requirement.operator {
        "In" => among(),
        "NotIn" => !among(),
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        "Gt" => pair().is_some_and(|(have, than)| have > than),
        "Lt" => pair().is_some_and(|(have, than)| have < than),
        _ => false,
    }
}

/// Whether a pod's `nodeSelector` and required node affinity pick a node.
pub fn wanted_by(spec: &PodSpec, node: &Node) -> bool {
    let mut selector = spec.node_selector.iter().flatten();
    let affinity = spec.affinity.as_ref().and_then(|a| a.node_affinity.as_ref());
    let required =
        affinity.and_then(|a| a.required_during_scheduling_ignored_during_execution.as_ref());
    selector.all(|(key, value)| label(node, key) == Some(value.as_str()))
        && required.is_none_or(|required| selects(required, node))
}

/// The sum of the weights of the preferences that a node meets.
pub fn preference(spec: &PodSpec, node: &Node) -> i64 {
    let affinity = spec.affinity.as_ref().and_then(|a| a.node_affinity.as_ref());
    let preferred = affinity
        .and_then(|a| a.preferred_during_scheduling_ignored_during_execution.as_deref())
        .unwrap_or_default();
    preferred.iter().filter(|p| fits(&p.preference, node)).map(|p| i64::from(p.weight)).sum()
}

/// Whether a toleration bears a taint.
pub fn tolerates(toleration: &Toleration, taint: &Taint) -> bool {
    let text = |field: &Option<String>| field.clone().unwrap_or_default();
    let (key, effect) = (text(&toleration.key), text(&toleration.effect));
    let any_effect = effect.is_empty() || effect == taint.effect;
    let any_key = key.is_empty() || key == taint.key;
    any_effect
        && any_key
        && match toleration.operator.as_deref().unwrap_or("Equal") {
            "Exists" => true,
            "Equal" | "" => !key.is_empty() && text(&toleration.value) == text(&taint.value),
            _ => false,
        }
}

fn tolerated(spec: &PodSpec, taint: &Taint) -> bool {
    spec.tolerations.iter().flatten().any(|toleration| tolerates(toleration, taint))
}

/// The first taint that keeps a pod off a node.
pub fn untolerated<'a>(spec: &PodSpec, node: &'a Node) -> Option<&'a Taint> {
    let keeps_off = |taint: &&Taint| taint.effect == NO_SCHEDULE || taint.effect == NO_EXECUTE;
    taints(node).filter(keeps_off).find(|taint| !tolerated(spec, taint))
}

/// How many taints would rather not have the pod.
pub fn reluctance(spec: &PodSpec, node: &Node) -> i64 {
    let reluctant = |taint: &&Taint| taint.effect == PREFER_NO_SCHEDULE && !tolerated(spec, taint);
    i64::try_from(taints(node).filter(reluctant).count()).unwrap_or(i64::MAX)
}

/// Whether a node is cordoned for a pod.
pub fn is_closed(spec: &PodSpec, node: &Node) -> bool {
    let cordoned = node.spec.as_ref().and_then(|spec| spec.unschedulable).unwrap_or(false);
    let taint = Taint { key: UNSCHEDULABLE.into(), effect: NO_SCHEDULE.into(), ..Taint::default() };
    cordoned && !tolerated(spec, &taint)
}

/// The ports of the node that a pod takes, as protocol, address and number.
fn host_ports(pod: &Pod) -> impl Iterator<Item = (&str, &str, i32)> {
    let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
    containers.flat_map(|c| c.ports.iter().flatten()).filter_map(|port| {
        let protocol = port.protocol.as_deref().unwrap_or("TCP");
        let address = port.host_ip.as_deref().unwrap_or("0.0.0.0");
        port.host_port.filter(|p| *p != 0).map(|number| (protocol, address, number))
    })
}

/// Whether two pods want the same port of a node.
pub fn ports_clash(one: &Pod, other: &Pod) -> bool {
    let clash = |a: (&str, &str, i32), b: (&str, &str, i32)| {
        let everywhere = a.1 == "0.0.0.0" || b.1 == "0.0.0.0";
        a.0 == b.0 && a.2 == b.2 && (everywhere || a.1 == b.1)
    };
    host_ports(one).any(|a| host_ports(other).any(|b| clash(a, b)))
}
