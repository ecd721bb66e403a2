//! Pods, their bindings, evictions and budgets.

use super::{
    Kind, WITH_STATUS, default, duplicate, each, forbidden, invalid, list, part, quantities,
    required, text, unsupported,
};
use crate::quantity::Quantity;
use crate::selector::Labels;
use crate::status::{Cause, Failure, Subject};
use crate::store::Object;
use crate::{meta, names};
use jiff::Timestamp;
use serde_json::{Value, json};

pub(super) static POD: Kind = Kind {
    generation: true,
    default: fill_in,
    prepare_create: begin,
    validate,
    validate_update,
    ..WITH_STATUS
};

const CONTAINERS: [&str; 3] = ["initContainers", "containers", "ephemeralContainers"];

fn fill_in(pod: &mut Value) {
    if !pod["spec"].is_object() {
        return;
    }
    let spec = &mut pod["spec"];
    default(spec, "restartPolicy", "Always");
    default(spec, "dnsPolicy", "ClusterFirst");
    default(spec, "terminationGracePeriodSeconds", 30);
    default(spec, "securityContext", json!({}));
    default(spec, "schedulerName", "default-scheduler");
    default(spec, "enableServiceLinks", true);
    for kind in CONTAINERS {
        for container in each(spec, kind).filter(|c| c.is_object()) {
            fill_in_container(container);
        }
    }
    for volume in each(spec, "volumes").filter(|v| v.is_object()) {
        fill_in_volume(volume);
    }
}

fn fill_in_container(container: &mut Value) {
    default(container, "terminationMessagePath", "/dev/termination-log");
    default(container, "terminationMessagePolicy", "File");
    default(container, "resources", json!({}));
    let pull = match tag(text(container, "image")) {
        None | Some("latest") => "Always",
        Some(_) => "IfNotPresent",
    };
    default(container, "imagePullPolicy", pull);
    for port in each(container, "ports") {
        default(port, "protocol", "TCP");
    }
    for probe in ["livenessProbe", "readinessProbe", "startupProbe"] {
        let Some(probe) = container.get_mut(probe).filter(|p| p.is_object()) else { continue };
        for (field, value) in [
            ("timeoutSeconds", 1),
            ("periodSeconds", 10),
            ("successThreshold", 1),
            ("failureThreshold", 3),
        ] {
            default(probe, field, value);
        }
        if let Some(get) = probe.get_mut("httpGet") {
            default(get, "path", "/");
            default(get, "scheme", "HTTP");
        }
    }
    for variable in each(container, "env") {
        if let Some(field) = variable.pointer_mut("/valueFrom/fieldRef") {
            default(field, "apiVersion", "v1");
        }
    }
    // What may be used is asked for.
    let limits = container["resources"]["limits"].clone();
    for (name, value) in limits.as_object().into_iter().flatten() {
        default(part(&mut container["resources"], "requests"), name, value.clone());
    }
}

/// The tag of an image; None for none, and a digest counts as one.
fn tag(image: &str) -> Option<&str> {
    if let Some((_, digest)) = image.split_once('@') {
        return Some(digest);
    }
    let last = image.rsplit('/').next().unwrap_or(image);
    last.split_once(':').map(|(_, tag)| tag)
}

fn fill_in_volume(volume: &mut Value) {
    for source in ["secret", "configMap", "downwardAPI", "projected"] {
        if let Some(source) = volume.get_mut(source).filter(|s| s.is_object()) {
            default(source, "defaultMode", 420);
        }
    }
    if let Some(path) = volume.get_mut("hostPath") {
        default(path, "type", "");
    }
    if let Some(projected) = volume.get_mut("projected") {
        for source in each(projected, "sources") {
            if let Some(token) = source.get_mut("serviceAccountToken") {
                default(token, "expirationSeconds", 3600);
            }
            if let Some(api) = source.get_mut("downwardAPI") {
                for item in each(api, "items") {
                    if let Some(field) = item.get_mut("fieldRef") {
                        default(field, "apiVersion", "v1");
                    }
                }
            }
        }
    }
    if let Some(api) = volume.get_mut("downwardAPI") {
        for item in each(api, "items") {
            if let Some(field) = item.get_mut("fieldRef") {
                default(field, "apiVersion", "v1");
            }
        }
    }
    if volume.as_object().is_some_and(|v| v.len() == 1) {
        default(volume, "emptyDir", json!({}));
    }
}

fn begin(pod: &mut Value) {
    pod["status"] = json!({"phase": "Pending", "qosClass": quality(pod)});
}

/// The quality of service class: by whether all, some or no containers say what they need.
pub fn quality(pod: &Value) -> &'static str {
    let (mut any, mut all) = (false, true);
    let containers =
        list(&pod["spec"], "initContainers").iter().chain(list(&pod["spec"], "containers"));
    for container in containers {
        let resources = &container["resources"];
        for name in ["cpu", "memory"] {
            let of =
                |kind: &str| Quantity::of(&resources[kind][name]).filter(|q| *q > Quantity::ZERO);
            let (request, limit) = (of("requests"), of("limits"));
            any |= request.is_some() || limit.is_some();
            all &= limit.is_some() && (request.is_none() || request == limit);
        }
    }
    match (any, all) {
        (false, _) => "BestEffort",
        (true, true) => "Guaranteed",
        (true, false) => "Burstable",
    }
}

fn validate(pod: &Value) -> Vec<Cause> {
    let spec = &pod["spec"];
    let mut causes = Vec::new();
    let volumes = validate_volumes(spec, &mut causes);
    if list(spec, "containers").is_empty() {
        causes.push(required("spec.containers", ""));
    }
    let mut seen = Vec::new();
    for kind in CONTAINERS {
        for (n, container) in list(spec, kind).iter().enumerate() {
            let at = format!("spec.{kind}[{n}]");
            validate_container(&at, container, &volumes, &mut causes);
            let name = text(container, "name");
            if seen.contains(&name) {
                causes.push(duplicate(format!("{at}.name"), &container["name"]));
            }
            seen.push(name);
        }
    }
    let policies = ["Always", "OnFailure", "Never"];
    if !policies.contains(&text(spec, "restartPolicy")) {
        causes.push(unsupported("spec.restartPolicy", &spec["restartPolicy"], &policies));
    }
    if spec["activeDeadlineSeconds"].as_i64().is_some_and(|s| s < 1) {
        causes.push(invalid(
            "spec.activeDeadlineSeconds",
            &spec["activeDeadlineSeconds"],
            "must be between 1 and 2147483647, inclusive",
        ));
    }
    for (field, check) in [
        ("hostname", names::label as fn(&str) -> _),
        ("subdomain", names::label),
        ("nodeName", names::subdomain),
    ] {
        if let Some(why) = spec[field].as_str().filter(|t| !t.is_empty()).and_then(check) {
            causes.push(invalid(format!("spec.{field}"), &spec[field], &why));
        }
    }
    causes
}

/// Returns the volumes' names.
fn validate_volumes<'a>(spec: &'a Value, causes: &mut Vec<Cause>) -> Vec<&'a str> {
    let mut seen = Vec::new();
    for (n, volume) in list(spec, "volumes").iter().enumerate() {
        let at = format!("spec.volumes[{n}]");
        let name = text(volume, "name");
        match name {
            "" => causes.push(required(format!("{at}.name"), "")),
            name => {
                if let Some(why) = names::label(name) {
                    causes.push(invalid(format!("{at}.name"), &volume["name"], &why));
                }
            }
        }
        if seen.contains(&name) {
            causes.push(duplicate(format!("{at}.name"), &volume["name"]));
        }
        seen.push(name);
        let sources = volume.as_object().map_or(0, |v| v.len().saturating_sub(1));
        if sources == 0 {
            causes.push(required(at, "must specify a volume type"));
        } else if sources > 1 {
            causes.push(forbidden(at, "may not specify more than 1 volume type"));
        }
    }
    seen
}

fn validate_container(at: &str, container: &Value, volumes: &[&str], causes: &mut Vec<Cause>) {
    match text(container, "name") {
        "" => causes.push(required(format!("{at}.name"), "")),
        name => {
            if let Some(why) = names::label(name) {
                causes.push(invalid(format!("{at}.name"), &container["name"], &why));
            }
        }
    }
    if text(container, "image").is_empty() {
        causes.push(required(format!("{at}.image"), ""));
    }
    let policies = ["Always", "IfNotPresent", "Never"];
    if !policies.contains(&text(container, "imagePullPolicy")) {
        causes.push(unsupported(
            format!("{at}.imagePullPolicy"),
            &container["imagePullPolicy"],
            &policies,
        ));
    }
    let mut ports = Vec::new();
    for (n, port) in list(container, "ports").iter().enumerate() {
        let number = port["containerPort"].as_i64().unwrap_or(0);
        if !(1..=65535).contains(&number) {
            causes.push(invalid(
                format!("{at}.ports[{n}].containerPort"),
                &port["containerPort"],
                "must be between 1 and 65535, inclusive",
            ));
        }
        let name = text(port, "name");
        if !name.is_empty() && ports.contains(&name) {
            causes.push(duplicate(format!("{at}.ports[{n}].name"), &port["name"]));
        }
        ports.push(name);
    }
    for (n, variable) in list(container, "env").iter().enumerate() {
        if text(variable, "name").is_empty() {
            causes.push(required(format!("{at}.env[{n}].name"), ""));
        }
        if !text(variable, "value").is_empty() && !variable["valueFrom"].is_null() {
            causes.push(invalid(
                format!("{at}.env[{n}].valueFrom"),
                &json!(""),
                "may not be specified when `value` is not empty",
            ));
        }
    }
    for field in ["volumeMounts", "volumeDevices"] {
        for (n, mount) in list(container, field).iter().enumerate() {
            if !volumes.contains(&text(mount, "name")) {
                causes.push(Cause {
                    reason: "FieldValueNotFound",
                    message: format!("Not found: {}", mount["name"]),
                    field: format!("{at}.{field}[{n}].name"),
                });
            }
        }
    }
    let resources = &container["resources"];
    for kind in ["requests", "limits"] {
        causes.extend(quantities(&format!("{at}.resources.{kind}"), &resources[kind]));
    }
    for (name, request) in resources["requests"].as_object().into_iter().flatten() {
        let limit = &resources["limits"][name];
        let (Some(more), Some(most)) = (Quantity::of(request), Quantity::of(limit)) else {
            continue;
        };
        if more > most {
            causes.push(invalid(
                format!("{at}.resources.requests"),
                request,
                &format!("must be less than or equal to {name} limit of {most}"),
            ));
        }
    }
}

/// What of a pod may change: the rest must be as it was.
fn validate_update(new: &Value, old: &Value) -> Vec<Cause> {
    let mut like_old = new["spec"].clone();
    let spec = &old["spec"];
    for kind in ["initContainers", "containers"] {
        for (own, before) in each(&mut like_old, kind).zip(list(spec, kind)) {
            own["image"] = before["image"].clone();
        }
    }
    let deadline = |s: &Value| s["activeDeadlineSeconds"].as_i64();
    let shorter = match (deadline(&new["spec"]), deadline(spec)) {
        (Some(new), Some(old)) => new <= old,
        (Some(_), None) => true,
        (None, before) => before.is_none(),
    };
    if shorter {
        meta::take_field(&mut like_old, spec, "activeDeadlineSeconds");
    }
    let tolerations = list(&new["spec"], "tolerations");
    if list(spec, "tolerations").iter().all(|t| tolerations.contains(t)) {
        meta::take_field(&mut like_old, spec, "tolerations");
    }
    let gates = list(spec, "schedulingGates");
    if list(&new["spec"], "schedulingGates").iter().all(|g| gates.contains(g)) {
        meta::take_field(&mut like_old, spec, "schedulingGates");
    }
    let seconds = |s: &Value| s["terminationGracePeriodSeconds"].as_i64();
    if seconds(spec).is_some_and(|s| s < 0) && seconds(&new["spec"]) == Some(1) {
        meta::take_field(&mut like_old, spec, "terminationGracePeriodSeconds");
    }
    // Of a binding, which is a write of its own.
    if text(spec, "nodeName").is_empty() {
        meta::take_field(&mut like_old, spec, "nodeName");
    }
    match like_old == *spec {
        true => Vec::new(),
        false => vec![forbidden(
            "spec",
            "pod updates may not change fields other than \
             `spec.containers[*].image`,`spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,\
             `spec.tolerations` (only additions to existing tolerations),\
             `spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)",
        )],
    }
}

/// A pod that is put on a node.
///
/// # Errors
/// 409 when it is on one, 400 when the binding names none.
pub fn bind(pod: &Value, binding: &Value, now: Timestamp) -> Result<Value, Failure> {
    let name = meta::text(pod, "name");
    let what = Subject { group: "", kind: "pods", name };
    let node = text(&binding["target"], "name");
    if node.is_empty() {
        return Err(Failure::bad_request("target.name: Required value"));
    }
    let uid = meta::text(binding, "uid");
    if !uid.is_empty() && uid != meta::text(pod, "uid") {
        return Err(Failure::conflict(what, "the pod was deleted and made anew"));
    }
    if meta::is_terminating(pod) {
        return Err(Failure::conflict(
            what,
            &format!("pod {name} is being deleted, cannot be assigned to a host"),
        ));
    }
    let on = text(&pod["spec"], "nodeName");
    if !on.is_empty() {
        return Err(Failure::conflict(
            what,
            &format!("pod {name} is already assigned to node {on:?}"),
        ));
    }
    let mut next = pod.clone();
    next["spec"]["nodeName"] = node.into();
    for (key, value) in meta::map(binding, "annotations").into_iter().flatten() {
        part(part(&mut next, "metadata"), "annotations")[key] = value.clone();
    }
    let condition = json!({
        "type": "PodScheduled", "status": "True", "lastProbeTime": null,
        "lastTransitionTime": meta::moment(now),
    });
    let status = part(&mut next, "status");
    match status["conditions"].as_array_mut() {
        Some(all) => {
            all.retain(|c| c["type"] != "PodScheduled");
            all.push(condition);
        }
        None => status["conditions"] = json!([condition]),
    }
    Ok(next)
}

/// Whether a pod's budgets allow it to go; the budget that this is booked on, as it is then.
///
/// # Errors
/// 429 when one does not, 500 when there are several.
pub fn evict(pod: &Value, budgets: &[Object]) -> Result<Option<(Object, Value)>, Failure> {
    let phase = text(&pod["status"], "phase");
    if meta::is_terminating(pod) || matches!(phase, "Succeeded" | "Failed" | "Pending") {
        return Ok(None);
    }
    let labels = meta::map(pod, "labels");
    let covers = |budget: &&Object| {
        let selector = Labels::from_object(&budget.body["spec"]["selector"]);
        selector.ok().flatten().is_some_and(|s| s.matches(labels))
    };
    let mut own = budgets.iter().filter(covers);
    let Some(budget) = own.next() else { return Ok(None) };
    if own.next().is_some() {
        return Err(Failure::internal(
            "This pod has more than one PodDisruptionBudget, which the eviction subresource does not support.",
        ));
    }
    let status = &budget.body["status"];
    let name = meta::text(&budget.body, "name");
    let number = |field: &str| status[field].as_i64().unwrap_or(0);
    let seen =
        number("observedGeneration") >= budget.body["metadata"]["generation"].as_i64().unwrap_or(0);
    if number("disruptionsAllowed") <= 0 || !seen {
        let told = match seen {
            true => format!(
                "The disruption budget {name} needs {} healthy pods and has {} currently",
                number("desiredHealthy"),
                number("currentHealthy")
            ),
            false => {
                format!("The disruption budget {name} is still being processed by the server.")
            }
        };
        let mut failure = Failure::too_many_requests(
            "Cannot evict pod as it would violate the pod's disruption budget.",
        );
        failure.details = json!({"causes": [{"reason": "DisruptionBudget", "message": told}]});
        return Err(failure);
    }
    let mut next = (*budget.body).clone();
    next["status"]["disruptionsAllowed"] = (number("disruptionsAllowed") - 1).into();
    part(&mut next["status"], "disruptedPods")[meta::text(pod, "name")] =
        meta::moment(Timestamp::now()).into();
    Ok(Some((budget.clone(), next)))
}

/// The status of a budget that covers these pods.
pub fn budget_status(budget: &Value, pods: &[&Value]) -> Value {
    let spec = &budget["spec"];
    let alive: Vec<_> = pods.iter().filter(|p| !meta::is_terminating(p)).collect();
    let is_ready = |pod: &Value| {
        list(&pod["status"], "conditions")
            .iter()
            .any(|c| c["type"] == "Ready" && c["status"] == "True")
    };
    let expected = alive.len() as i64;
    let healthy = alive.iter().filter(|pod| is_ready(pod)).count() as i64;
    let share = |value: &Value, up: bool| match value.as_str().and_then(|t| t.strip_suffix('%')) {
        Some(percent) => {
            let part = percent.parse::<i64>().unwrap_or(0) * expected;
            if up { (part + 99).div_euclid(100) } else { part / 100 }
        }
        None => value.as_i64().unwrap_or(0),
    };
    let desired = match (&spec["minAvailable"], &spec["maxUnavailable"]) {
        (Value::Null, Value::Null) => (expected - 1).max(0),
        (Value::Null, most) => (expected - share(most, true)).max(0),
        (least, _) => share(least, true),
    };
    let allowed = if expected > 0 { (healthy - desired).max(0) } else { 0 };
    json!({
        "observedGeneration": budget["metadata"]["generation"],
        "expectedPods": expected, "desiredHealthy": desired, "currentHealthy": healthy,
        "disruptionsAllowed": allowed,
    })
}
