//! Pods: their account and its token, their priority, and how long they outlast their node.

use super::super::{Call, Handler};
use crate::meta;
use crate::status::Failure;
use serde_json::{Value, json};

/// Where Kubernetes puts the token of a pod's account.
const TOKEN_PATH: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// A little more than an hour: the kubelet renews it in time.
const TOKEN_SECONDS: u32 = 3607;

/// Fills in what a pod does not say.
///
/// # Errors
/// 403 when its account or its priority class does not exist.
pub(super) fn fill_in(handler: &Handler, call: &Call, pod: &mut Value) -> Result<(), Failure> {
    if !pod["spec"].is_object() {
        return Ok(());
    }
    account(handler, call, pod)?;
    priority(handler, call, pod)?;
    tolerations(pod);
    Ok(())
}

fn account(handler: &Handler, call: &Call, pod: &mut Value) -> Result<(), Failure> {
    let spec = &mut pod["spec"];
    let named = spec["serviceAccountName"].as_str().or(spec["serviceAccount"].as_str());
    let name = named.filter(|n| !n.is_empty()).unwrap_or("default").to_owned();
    spec["serviceAccountName"] = name.as_str().into();
    spec["serviceAccount"] = name.as_str().into();
    let account = handler.look_up("serviceaccounts", &call.namespace, &name);
    let account = account.ok_or_else(|| {
        let namespace = &call.namespace;
        let why = format!(
            "error looking up service account {namespace}/{name}: serviceaccount {name:?} not found"
        );
        Failure::forbidden(call.subject(meta::text(pod, "name")), &why)
    })?;
    let wanted = |object: &Value| object["automountServiceAccountToken"].as_bool();
    let mounts = wanted(&pod["spec"]).or(wanted(&account.body)).unwrap_or(true);
    if mounts {
        mount_token(&mut pod["spec"]);
    }
    Ok(())
}

/// Adds the volume with the token to all containers that have nothing there.
fn mount_token(spec: &mut Value) {
    let volumes = spec["volumes"].as_array();
    let given = volumes.into_iter().flatten().filter_map(|v| v["name"].as_str());
    let given = given.map(str::to_owned).find(|name| name.starts_with("kube-api-access-"));
    let name = given.clone().unwrap_or_else(|| crate::names::generate("kube-api-access-"));
    let mount = json!({"name": name, "readOnly": true, "mountPath": TOKEN_PATH});
    let mut mounted = false;
    for list in ["initContainers", "containers"] {
        for container in spec.get_mut(list).and_then(Value::as_array_mut).into_iter().flatten() {
            let has = container["volumeMounts"].as_array();
            let has = has.is_some_and(|all| all.iter().any(|m| m["mountPath"] == TOKEN_PATH));
            if !has && push(container, "volumeMounts", mount.clone()) {
                mounted = true;
            }
        }
    }
    if mounted && given.is_none() {
        push(spec, "volumes", token_volume(&name));
    }
}

fn token_volume(name: &str) -> Value {
    let namespace = json!({"apiVersion": "v1", "fieldPath": "metadata.namespace"});
    json!({"name": name, "projected": {"defaultMode": 420, "sources": [
        {"serviceAccountToken": {"expirationSeconds": TOKEN_SECONDS, "path": "token"}},
        {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
        {"downwardAPI": {"items": [{"path": "namespace", "fieldRef": namespace}]}},
    ]}})
}

fn push(object: &mut Value, field: &str, element: Value) -> bool {
    let Some(map) = object.as_object_mut() else { return false };
    let list = map.entry(field).or_insert_with(|| json!([]));
    match list {
        Value::Null => *list = json!([element]),
        Value::Array(all) => all.push(element),
        // Validation will say so.
        _ => return false,
    }
    true
}

fn priority(handler: &Handler, call: &Call, pod: &mut Value) -> Result<(), Failure> {
    const CLASSES: &str = "priorityclasses.scheduling.k8s.io";
    let named = pod["spec"]["priorityClassName"].as_str().filter(|n| !n.is_empty());
    let class = match named {
        Some(name) => Some(handler.look_up(CLASSES, "", name).ok_or_else(|| {
            let why = format!("no PriorityClass with name {name} was found");
            Failure::forbidden(call.subject(meta::text(pod, "name")), &why)
        })?),
        None => {
            let defaults = handler.all(CLASSES).into_iter();
            let defaults = defaults.filter(|class| class.body["globalDefault"] == true);
            defaults.min_by_key(|class| class.body["value"].as_i64())
        }
    };
    let spec = &mut pod["spec"];
    match class {
        Some(class) => {
            spec["priorityClassName"] = meta::text(&class.body, "name").into();
            spec["priority"] = class.body["value"].clone();
            let policy = class.body["preemptionPolicy"].as_str().unwrap_or("PreemptLowerPriority");
            spec["preemptionPolicy"] = policy.into();
        }
        None => {
            spec["priority"] = 0.into();
            spec["preemptionPolicy"] = "PreemptLowerPriority".into();
        }
    }
    Ok(())
}

/// A pod leaves a node that is lost after five minutes, if it does not say otherwise.
fn tolerations(pod: &mut Value) {
    const SECONDS: u32 = 300;
    for key in ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"] {
        let tolerated = |t: &Value| {
            let fits =
                |field: &str, all: &str| t[field].is_null() || t[field] == "" || t[field] == all;
            fits("key", key) && fits("effect", "NoExecute")
        };
        let list = pod["spec"]["tolerations"].as_array();
        if list.is_some_and(|all| all.iter().any(tolerated)) {
            continue;
        }
        let toleration = json!({
            "key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": SECONDS,
        });
        push(&mut pod["spec"], "tolerations", toleration);
    }
}
