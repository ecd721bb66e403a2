//! The columns and cells of the built-in kinds, as `kubectl get` shows them.
//!
//! Source: Kubernetes' `pkg/printers/internalversion/printers.go`.

use crate::meta;
use jiff::Timestamp;
use serde_json::{Value, json};

/// Name, type, priority: above zero only with `-o wide`.
type Head = (&'static str, &'static str, i32);

const AGE: Head = ("Age", "string", 0);

fn heads(key: &str) -> &'static [Head] {
    match key {
        "pods" => &[
            ("Ready", "string", 0),
            ("Status", "string", 0),
            ("Restarts", "string", 0),
            AGE,
            ("IP", "string", 1),
            ("Node", "string", 1),
            ("Nominated Node", "string", 1),
            ("Readiness Gates", "string", 1),
        ],
        "nodes" => &[
            ("Status", "string", 0),
            ("Roles", "string", 0),
            AGE,
            ("Version", "string", 0),
            ("Internal-IP", "string", 1),
            ("External-IP", "string", 1),
            ("OS-Image", "string", 1),
            ("Kernel-Version", "string", 1),
            ("Container-Runtime", "string", 1),
        ],
        "namespaces" => &[("Status", "string", 0), AGE],
        "configmaps" => &[("Data", "string", 0), AGE],
        "secrets" => &[("Type", "string", 0), ("Data", "string", 0), AGE],
        "serviceaccounts" => &[("Secrets", "string", 0), AGE],
        "services" => &[
            ("Type", "string", 0),
            ("Cluster-IP", "string", 0),
            ("External-IP", "string", 0),
            ("Port(s)", "string", 0),
            AGE,
            ("Selector", "string", 1),
        ],
        "endpoints" => &[("Endpoints", "string", 0), AGE],
        "endpointslices.discovery.k8s.io" => {
            &[("AddressType", "string", 0), ("Ports", "string", 0), ("Endpoints", "string", 0), AGE]
        }
        "persistentvolumeclaims" => &[
            ("Status", "string", 0),
            ("Volume", "string", 0),
            ("Capacity", "string", 0),
            ("Access Modes", "string", 0),
            ("StorageClass", "string", 0),
            ("VolumeAttributesClass", "string", 0),
            AGE,
            ("VolumeMode", "string", 1),
        ],
        "persistentvolumes" => &[
            ("Capacity", "string", 0),
            ("Access Modes", "string", 0),
            ("Reclaim Policy", "string", 0),
            ("Status", "string", 0),
            ("Claim", "string", 0),
            ("StorageClass", "string", 0),
            ("VolumeAttributesClass", "string", 0),
            ("Reason", "string", 0),
            AGE,
            ("VolumeMode", "string", 1),
        ],
        "storageclasses.storage.k8s.io" => &[
            ("Provisioner", "string", 0),
            ("ReclaimPolicy", "string", 0),
            ("VolumeBindingMode", "string", 0),
            ("AllowVolumeExpansion", "string", 0),
            AGE,
        ],
        "events" => &[
            ("Last Seen", "string", 0),
            ("Type", "string", 0),
            ("Reason", "string", 0),
            ("Object", "string", 0),
            ("Subobject", "string", 1),
            ("Source", "string", 1),
            ("Message", "string", 0),
            ("First Seen", "string", 1),
            ("Count", "string", 1),
            ("Name", "string", 1),
        ],
        "resourcequotas" => &[("Request", "string", 0), ("Limit", "string", 0), AGE],
        "leases.coordination.k8s.io" => &[("Holder", "string", 0), AGE],
        "poddisruptionbudgets.policy" => &[
            ("Min Available", "string", 0),
            ("Max Unavailable", "string", 0),
            ("Allowed Disruptions", "integer", 0),
            AGE,
        ],
        "priorityclasses.scheduling.k8s.io" => &[
            ("Value", "integer", 0),
            ("Global-Default", "boolean", 0),
            AGE,
            ("PreemptionPolicy", "string", 0),
        ],
        "roles.rbac.authorization.k8s.io"
        | "clusterroles.rbac.authorization.k8s.io"
        | "customresourcedefinitions.apiextensions.k8s.io" => &[("Created At", "date", 0)],
        "rolebindings.rbac.authorization.k8s.io"
        | "clusterrolebindings.rbac.authorization.k8s.io" => &[
            ("Role", "string", 0),
            AGE,
            ("Users", "string", 1),
            ("Groups", "string", 1),
            ("ServiceAccounts", "string", 1),
        ],
        "apiservices.apiregistration.k8s.io" => {
            &[("Service", "string", 0), ("Available", "string", 0), AGE]
        }
        _ => &[AGE],
    }
}

/// The columns of a kind behind its name.
pub fn columns(key: &str) -> Vec<Value> {
    let column = |(name, kind, priority): &Head| json!({"name": name, "type": kind, "format": "", "description": name, "priority": priority});
    heads(key).iter().map(column).collect()
}

fn text<'a>(value: &'a Value, field: &str) -> &'a str {
    value[field].as_str().unwrap_or_default()
}

fn list<'a>(value: &'a Value, field: &str) -> &'a [Value] {
    value[field].as_array().map(Vec::as_slice).unwrap_or_default()
}

fn or(value: &str, absent: &str) -> Value {
    if value.is_empty() { absent.into() } else { value.into() }
}

fn count(value: &Value) -> usize {
    value.as_object().map_or(0, serde_json::Map::len)
}

/// The cells of an object behind its name.
pub fn of(key: &str, object: &Value, now: Timestamp) -> Vec<Value> {
    let created = meta::text(object, "creationTimestamp");
    let age = || Value::from(self::age(created, now));
    let (spec, status) = (&object["spec"], &object["status"]);
    match key {
        "pods" => pod(object, now),
        "nodes" => node(object, now),
        "namespaces" => vec![text(status, "phase").into(), age()],
        "configmaps" => {
            vec![(count(&object["data"]) + count(&object["binaryData"])).to_string().into(), age()]
        }
        "secrets" => {
            vec![text(object, "type").into(), count(&object["data"]).to_string().into(), age()]
        }
        "serviceaccounts" => vec![list(object, "secrets").len().to_string().into(), age()],
        "services" => service(spec, age()),
        "endpoints" => vec![addresses(object).into(), age()],
        "endpointslices.discovery.k8s.io" => {
            let ports =
                list(object, "ports").iter().map(|p| p["port"].to_string()).collect::<Vec<_>>();
            let ends = list(object, "endpoints").iter().flat_map(|e| list(e, "addresses"));
            let ends: Vec<_> = ends.filter_map(Value::as_str).collect();
            vec![
                text(object, "addressType").into(),
                or(&ports.join(","), "<unset>"),
                or(&ends.join(","), "<unset>"),
                age(),
            ]
        }
        "persistentvolumeclaims" => {
            let bound = !text(spec, "volumeName").is_empty();
            let phase =
                if meta::is_terminating(object) { "Terminating" } else { text(status, "phase") };
            vec![
                phase.into(),
                text(spec, "volumeName").into(),
                if bound { text(&status["capacity"], "storage").into() } else { "".into() },
                if bound { modes(status).into() } else { "".into() },
                text(spec, "storageClassName").into(),
                or(text(spec, "volumeAttributesClassName"), "<unset>"),
                age(),
                or(text(spec, "volumeMode"), "<unset>"),
            ]
        }
        "persistentvolumes" => {
            let claim = &spec["claimRef"];
            let claim = match claim.is_object() {
                true => format!("{}/{}", text(claim, "namespace"), text(claim, "name")),
                false => String::new(),
            };
            let phase =
                if meta::is_terminating(object) { "Terminating" } else { text(status, "phase") };
            vec![
                text(&spec["capacity"], "storage").into(),
                modes(spec).into(),
                text(spec, "persistentVolumeReclaimPolicy").into(),
                phase.into(),
                claim.into(),
                text(spec, "storageClassName").into(),
                or(text(spec, "volumeAttributesClassName"), "<unset>"),
                text(status, "reason").into(),
                age(),
                or(text(spec, "volumeMode"), "<unset>"),
            ]
        }
        "storageclasses.storage.k8s.io" => vec![
            text(object, "provisioner").into(),
            text(object, "reclaimPolicy").into(),
            text(object, "volumeBindingMode").into(),
            (object["allowVolumeExpansion"] == true).to_string().into(),
            age(),
        ],
        "events" => event(object, now),
        "resourcequotas" => {
            let of = |limits: bool| {
                let all = spec["hard"].as_object().into_iter().flatten();
                let all = all.filter(|(name, _)| name.starts_with("limits.") == limits);
                let shown = all.map(|(name, hard)| {
                    let used = text(&status["used"], name);
                    format!(
                        "{name}: {}/{}",
                        if used.is_empty() { "0" } else { used },
                        super::plain(hard)
                    )
                });
                shown.collect::<Vec<_>>().join(", ")
            };
            vec![of(false).into(), of(true).into(), age()]
        }
        "leases.coordination.k8s.io" => vec![text(spec, "holderIdentity").into(), age()],
        "poddisruptionbudgets.policy" => {
            let given = |field: &str| match &spec[field] {
                Value::Null => Value::from("N/A"),
                value => super::plain(value).into(),
            };
            let allowed = status["disruptionsAllowed"].as_i64().unwrap_or(0);
            vec![given("minAvailable"), given("maxUnavailable"), allowed.into(), age()]
        }
        "priorityclasses.scheduling.k8s.io" => vec![
            object["value"].clone(),
            (object["globalDefault"] == true).into(),
            age(),
            text(object, "preemptionPolicy").into(),
        ],
        "roles.rbac.authorization.k8s.io"
        | "clusterroles.rbac.authorization.k8s.io"
        | "customresourcedefinitions.apiextensions.k8s.io" => vec![created.into()],
        "rolebindings.rbac.authorization.k8s.io"
        | "clusterrolebindings.rbac.authorization.k8s.io" => {
            let role = &object["roleRef"];
            let subjects = |kind: &str| {
                let all = list(object, "subjects").iter().filter(|s| s["kind"] == kind);
                let named = all.map(|s| match text(s, "namespace") {
                    "" => text(s, "name").to_owned(),
                    namespace => format!("{namespace}/{}", text(s, "name")),
                });
                Value::from(named.collect::<Vec<_>>().join(", "))
            };
            let role = format!("{}/{}", text(role, "kind"), text(role, "name"));
            vec![
                role.into(),
                age(),
                subjects("User"),
                subjects("Group"),
                subjects("ServiceAccount"),
            ]
        }
        "apiservices.apiregistration.k8s.io" => vec!["Local".into(), "True".into(), age()],
        _ => vec![age()],
    }
}

fn modes(of: &Value) -> String {
    let short = |mode: &Value| match mode.as_str() {
        Some("ReadWriteOnce") => "RWO",
        Some("ReadOnlyMany") => "ROX",
        Some("ReadWriteMany") => "RWX",
        Some("ReadWriteOncePod") => "RWOP",
        _ => "",
    };
    list(of, "accessModes").iter().map(short).collect::<Vec<_>>().join(",")
}

fn service(spec: &Value, age: Value) -> Vec<Value> {
    let port = |p: &Value| {
        let node = p["nodePort"].as_i64().map(|n| format!(":{n}")).unwrap_or_default();
        format!("{}{node}/{}", p["port"], text(p, "protocol"))
    };
    let ports: Vec<_> = list(spec, "ports").iter().map(port).collect();
    let selector = spec["selector"].as_object().into_iter().flatten();
    let selector: Vec<_> = selector.map(|(k, v)| format!("{k}={}", super::plain(v))).collect();
    vec![
        text(spec, "type").into(),
        or(text(spec, "clusterIP"), "<none>"),
        or(text(spec, "externalName"), "<none>"),
        or(&ports.join(","), "<none>"),
        age,
        or(&selector.join(","), "<none>"),
    ]
}

fn addresses(endpoints: &Value) -> String {
    const SHOWN: usize = 3;
    let mut all = Vec::new();
    for subset in list(endpoints, "subsets") {
        for address in list(subset, "addresses") {
            for port in list(subset, "ports") {
                all.push(format!("{}:{}", text(address, "ip"), port["port"]));
            }
        }
    }
    match all.len() {
        0 => "<none>".into(),
        n if n > SHOWN => format!("{} + {} more...", all[..SHOWN].join(","), n - SHOWN),
        _ => all.join(","),
    }
}

fn event(event: &Value, now: Timestamp) -> Vec<Value> {
    let at = |fields: [&str; 3]| {
        let found = fields.iter().map(|f| text(event, f)).find(|t| !t.is_empty());
        let found = found.unwrap_or(meta::text(event, "creationTimestamp"));
        Value::from(age(found, now))
    };
    let object = &event["involvedObject"];
    let target = format!("{}/{}", text(object, "kind").to_lowercase(), text(object, "name"));
    let source = [text(&event["source"], "component"), text(&event["source"], "host")];
    let source: Vec<_> = source.into_iter().filter(|s| !s.is_empty()).collect();
    let source = if source.is_empty() {
        text(event, "reportingComponent").to_owned()
    } else {
        source.join(", ")
    };
    vec![
        at(["lastTimestamp", "eventTime", "firstTimestamp"]),
        text(event, "type").into(),
        text(event, "reason").into(),
        target.into(),
        text(object, "fieldPath").into(),
        source.into(),
        text(event, "message").trim().into(),
        at(["firstTimestamp", "eventTime", "lastTimestamp"]),
        event["count"].as_i64().unwrap_or(1).to_string().into(),
        meta::text(event, "name").into(),
    ]
}

fn node(node: &Value, now: Timestamp) -> Vec<Value> {
    let status = &node["status"];
    let ready = list(status, "conditions").iter().find(|c| c["type"] == "Ready");
    let mut state = match ready.map(|c| text(c, "status")) {
        Some("True") => "Ready",
        Some(_) => "NotReady",
        None => "Unknown",
    }
    .to_owned();
    if node["spec"]["unschedulable"] == true {
        state.push_str(",SchedulingDisabled");
    }
    let labels = meta::map(node, "labels").into_iter().flatten();
    let roles = labels.filter_map(|(key, _)| key.strip_prefix("node-role.kubernetes.io/"));
    let roles: Vec<_> = roles.filter(|r| !r.is_empty()).collect();
    let address = |kind: &str| {
        let found = list(status, "addresses").iter().find(|a| a["type"] == kind);
        or(found.map(|a| text(a, "address")).unwrap_or_default(), "<none>")
    };
    let info = &status["nodeInfo"];
    vec![
        state.into(),
        or(&roles.join(","), "<none>"),
        age(meta::text(node, "creationTimestamp"), now).into(),
        text(info, "kubeletVersion").into(),
        address("InternalIP"),
        address("ExternalIP"),
        or(text(info, "osImage"), "<unknown>"),
        or(text(info, "kernelVersion"), "<unknown>"),
        or(text(info, "containerRuntimeVersion"), "<unknown>"),
    ]
}

fn pod(pod: &Value, now: Timestamp) -> Vec<Value> {
    let (spec, status) = (&pod["spec"], &pod["status"]);
    let containers = list(status, "containerStatuses");
    let ready = containers
        .iter()
        .filter(|c| c["ready"] == true && c["state"]["running"].is_object())
        .count();
    let restarts =
        || containers.iter().map(|c| c["restartCount"].as_i64().unwrap_or(0)).sum::<i64>();
    let last = containers
        .iter()
        .filter_map(|c| c["lastState"]["terminated"]["finishedAt"].as_str())
        .max()
        .filter(|_| restarts() > 0);
    let told = match last {
        Some(at) => format!("{} ({} ago)", restarts(), age(at, now)),
        None => restarts().to_string(),
    };
    vec![
        format!("{ready}/{}", list(spec, "containers").len()).into(),
        pod_state(pod).into(),
        told.into(),
        age(meta::text(pod, "creationTimestamp"), now).into(),
        or(text(status, "podIP"), "<none>"),
        or(text(spec, "nodeName"), "<none>"),
        or(text(status, "nominatedNodeName"), "<none>"),
        "<none>".into(),
    ]
}

fn pod_state(pod: &Value) -> String {
    let (spec, status) = (&pod["spec"], &pod["status"]);
    let mut state = text(status, "phase").to_owned();
    if !text(status, "reason").is_empty() {
        state = text(status, "reason").to_owned();
    }
    let gated = list(status, "conditions")
        .iter()
        .any(|c| c["type"] == "PodScheduled" && c["reason"] == "SchedulingGated");
    if gated {
        state = "SchedulingGated".into();
    }
    let ended = |c: &Value| {
        let end = &c["state"]["terminated"];
        match (text(end, "reason"), end["signal"].as_i64().unwrap_or(0)) {
            ("", 0) => format!("ExitCode:{}", end["exitCode"]),
            ("", signal) => format!("Signal:{signal}"),
            (reason, _) => reason.to_owned(),
        }
    };
    let inits = list(spec, "initContainers").len();
    let mut initializing = false;
    for (n, c) in list(status, "initContainerStatuses").iter().enumerate() {
        let end = &c["state"]["terminated"];
        if end.is_object() && end["exitCode"] == 0 {
            continue;
        }
        let sidecar =
            list(spec, "initContainers").get(n).is_some_and(|c| c["restartPolicy"] == "Always");
        if sidecar && c["started"] == true {
            continue;
        }
        initializing = true;
        let waiting = text(&c["state"]["waiting"], "reason");
        state = if end.is_object() {
            format!("Init:{}", ended(c))
        } else if !waiting.is_empty() && waiting != "PodInitializing" {
            format!("Init:{waiting}")
        } else {
            format!("Init:{n}/{inits}")
        };
        break;
    }
    if !initializing {
        let mut running = false;
        for c in list(status, "containerStatuses").iter().rev() {
            let waiting = text(&c["state"]["waiting"], "reason");
            if !waiting.is_empty() {
                state = waiting.to_owned();
            } else if c["state"]["terminated"].is_object() {
                state = ended(c);
            } else if c["ready"] == true && c["state"]["running"].is_object() {
                running = true;
            }
        }
        if state == "Completed" && running {
            let ready = list(status, "conditions")
                .iter()
                .any(|c| c["type"] == "Ready" && c["status"] == "True");
            state = if ready { "Running".into() } else { "NotReady".into() };
        }
    }
    match meta::is_terminating(pod) {
        true if text(status, "reason") == "NodeLost" => "Unknown".into(),
        true if !matches!(text(status, "phase"), "Failed" | "Succeeded") => "Terminating".into(),
        _ => state,
    }
}

/// How long ago a moment was, as people read it.
///
/// Source: k8s.io/apimachinery's `duration.HumanDuration`.
pub fn age(moment: &str, now: Timestamp) -> String {
    let Ok(at) = moment.parse::<Timestamp>() else { return "<unknown>".into() };
    let seconds = now.as_second() - at.as_second();
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    let both = |n: i64, unit: &str, rest: i64, small: &str| match rest {
        0 => format!("{n}{unit}"),
        rest => format!("{n}{unit}{rest}{small}"),
    };
    match seconds {
        s if s < -1 => "<invalid>".into(),
        s if s < 0 => "0s".into(),
        s if s < 120 => format!("{s}s"),
        s if minutes < 10 => both(minutes, "m", s % 60, "s"),
        _ if minutes < 180 => format!("{minutes}m"),
        _ if hours < 8 => both(hours, "h", minutes % 60, "m"),
        _ if hours < 48 => format!("{hours}h"),
        _ if days < 8 => both(days, "d", hours % 24, "h"),
        _ if days < 730 => format!("{days}d"),
        _ if days < 2920 => both(days / 365, "y", days % 365, "d"),
        _ => format!("{}y", days / 365),
    }
}
