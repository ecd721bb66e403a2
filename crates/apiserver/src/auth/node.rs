//! What a node may do: with itself, and with what its pods need. Nothing else.
//!
//! Source: Kubernetes' node authorizer and its `NodeRestriction` admission plugin.

use super::rbac::Decision;
use super::{Attributes, User};
use crate::meta;
use serde_json::Value;

/// The group of all nodes.
pub const NODES: &str = "system:nodes";

/// The name of a node, of a user that is one.
pub fn name_of(user: &User) -> Option<&str> {
    let name = user.name.strip_prefix("system:node:")?;
    (user.is_in(NODES) && !name.is_empty()).then_some(name)
}

/// Looks up what is needed to judge.
pub trait Pods {
    /// The pods that are on a node.
    fn on(&self, node: &str) -> Vec<Value>;
    /// A claim.
    fn claim(&self, namespace: &str, name: &str) -> Option<Value>;
}

/// Whether a node may do something; None where other rules decide.
pub fn authorize(user: &User, what: &Attributes, pods: &dyn Pods) -> Option<Decision> {
    let node = name_of(user)?;
    let reads = matches!(&*what.verb, "get" | "list" | "watch");
    let own = |name: &str| name == node;
    let allowed = match (&*what.group, &*what.resource) {
        ("", "nodes") => {
            reads || (what.verb == "create" && what.name.is_empty()) || own(&what.name)
        }
        ("coordination.k8s.io", "leases") => {
            what.namespace == "kube-node-lease" && (what.verb == "create" || own(&what.name))
        }
        ("storage.k8s.io", "csinodes") => what.verb == "create" || own(&what.name),
        ("", "pods") => match &*what.verb {
            "get" | "list" | "watch" => true,
            _ => is_own_pod(node, what, pods),
        },
        ("", "secrets" | "configmaps") => reads && !what.name.is_empty() && names(node, what, pods),
        ("", "persistentvolumeclaims") => {
            what.verb == "get" && !what.name.is_empty() && names(node, what, pods)
        }
        ("", "persistentvolumes") => what.verb == "get" && uses_volume(node, &what.name, pods),
        ("", "serviceaccounts") => match &*what.subresource {
            "token" => what.verb == "create" && names(node, what, pods),
            _ => what.verb == "get" && names(node, what, pods),
        },
        ("", "events") => matches!(&*what.verb, "create" | "patch" | "update"),
        ("" | "storage.k8s.io", "services" | "csidrivers" | "storageclasses") => reads,
        ("authentication.k8s.io", "tokenreviews") => what.verb == "create",
        ("authorization.k8s.io", "subjectaccessreviews" | "localsubjectaccessreviews") => {
            what.verb == "create"
        }
        _ => return None,
    };
    let reason = match allowed {
        true => String::new(),
        false => format!("no relationship found between node '{node}' and this object"),
    };
    Some(Decision { allowed, reason })
}

fn is_own_pod(node: &str, what: &Attributes, pods: &dyn Pods) -> bool {
    let fits = |pod: &Value| {
        meta::text(pod, "namespace") == what.namespace && meta::text(pod, "name") == what.name
    };
    let how = match &*what.subresource {
        "status" => matches!(&*what.verb, "update" | "patch"),
        "" => what.verb == "delete",
        "eviction" => what.verb == "create",
        _ => false,
    };
    how && pods.on(node).iter().any(fits)
}

/// Whether a pod of the node names an object.
fn names(node: &str, what: &Attributes, pods: &dyn Pods) -> bool {
    let on_node = pods.on(node);
    let mut in_namespace =
        on_node.iter().filter(|pod| meta::text(pod, "namespace") == what.namespace);
    in_namespace.any(|pod| match &*what.resource {
        "serviceaccounts" => pod["spec"]["serviceAccountName"] == what.name.as_str(),
        "persistentvolumeclaims" => claims(pod).any(|name| name == what.name),
        resource => {
            let (volume, source, env, key) = match resource {
                "secrets" => ("secretName", "secret", "secretRef", "secretKeyRef"),
                _ => ("name", "configMap", "configMapRef", "configMapKeyRef"),
            };
            let mut found = false;
            visit(&pod["spec"], &mut |field, value| {
                let by = match field {
                    f if f == source => value[volume].as_str().or_else(|| value["name"].as_str()),
                    f if f == env || f == key => value["name"].as_str(),
                    "imagePullSecrets" if resource == "secrets" => {
                        let all = value.as_array().into_iter().flatten();
                        found |= all.into_iter().any(|s| s["name"] == what.name.as_str());
                        None
                    }
                    _ => None,
                };
                found |= by == Some(&*what.name);
            });
            found
        }
    })
}

fn claims(pod: &Value) -> impl Iterator<Item = &str> {
    let volumes = pod["spec"]["volumes"].as_array().into_iter().flatten();
    volumes.filter_map(|volume| volume["persistentVolumeClaim"]["claimName"].as_str())
}

fn uses_volume(node: &str, volume: &str, pods: &dyn Pods) -> bool {
    !volume.is_empty()
        && pods.on(node).iter().any(|pod| {
            let namespace = meta::text(pod, "namespace");
            claims(pod).any(|claim| {
                pods.claim(namespace, claim).is_some_and(|c| c["spec"]["volumeName"] == volume)
            })
        })
}

/// Visits every field of a value and of its parts.
fn visit(value: &Value, each: &mut dyn FnMut(&str, &Value)) {
    match value {
        Value::Object(map) => {
            for (field, part) in map {
                each(field, part);
                visit(part, each);
            }
        }
        Value::Array(all) => all.iter().for_each(|part| visit(part, each)),
        _ => {}
    }
}

/// Why a node may not write an object, though it may write some of its kind.
pub fn restrict(node: &str, key: &str, new: Option<&Value>) -> Option<String> {
    let new = new?;
    let name = meta::text(new, "name");
    match key {
        "nodes" | "csinodes.storage.k8s.io" | "leases.coordination.k8s.io" if name != node => {
            Some(format!("node {node:?} is not allowed to modify {key} {name:?}"))
        }
        "pods" if new["spec"]["nodeName"] != node => {
            Some(format!("node {node:?} can only write pods with spec.nodeName set to itself"))
        }
        _ => None,
    }
}
