//! What tells an API server that is not ours of the API role: webhooks and API services. Pure.

use crate::admission::KINDS;
use crate::subresources::VERSIONS;
use api::{NAMESPACE, SUBRESOURCES};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

/// The role's Service, as KubeVirt's.
pub const SERVICE: &str = "virt-api";
/// The Service's port.
pub const PORT: u16 = 443;
/// Seconds that a write waits for an answer.
const PATIENCE: u8 = 10;

/// How the API server reaches the role.
#[derive(Debug, Clone)]
pub enum At {
    /// By its Service.
    Service,
    /// By an address of its own, `https://…`. Only webhooks can be reached so.
    Url(String),
}

/// A webhook: what is in its objects besides what all have.
struct Hook {
    kind: &'static str,
    name: &'static str,
    path: &'static str,
    operations: &'static [&'static str],
}

const HOOKS: [Hook; 2] = [
    Hook {
        kind: "MutatingWebhookConfiguration",
        name: "virt-api-mutator",
        path: "/mutate",
        // Only what is new is filled in.
        operations: &["CREATE"],
    },
    Hook {
        kind: "ValidatingWebhookConfiguration",
        name: "virt-api-validator",
        path: "/validate",
        operations: &["CREATE", "UPDATE", "DELETE"],
    },
];

/// The objects, each with its path. `authority` (PEM) vouches for the role's server.
pub fn objects(authority: &str, at: &At) -> Vec<(String, Value)> {
    let bundle = STANDARD.encode(authority);
    let mut all: Vec<_> = HOOKS.iter().map(|hook| webhook(hook, at, &bundle)).collect();
    if matches!(at, At::Service) {
        all.extend(VERSIONS.map(|version| service(version, &bundle)));
    }
    all
}

fn webhook(hook: &Hook, at: &At, bundle: &str) -> (String, Value) {
    let mut client = json!({"caBundle": bundle});
    match at {
        At::Service => {
            client["service"] = json!({
                "namespace": NAMESPACE, "name": SERVICE, "port": PORT, "path": hook.path,
            });
        }
        At::Url(url) => {
            client["url"] = format!("{}{}", url.trim_end_matches('/'), hook.path).into();
        }
    }
    let rule = |(group, resource, _): (&str, &str, &str)| {
        json!({
            "apiGroups": [group], "apiVersions": ["*"], "operations": hook.operations,
            "resources": [resource, format!("{resource}/status")], "scope": "*",
        })
    };
    let object = json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": hook.kind,
        "metadata": metadata(hook.name),
        "webhooks": [{
            "name": format!("{}.godwit.dev", hook.name), "clientConfig": client,
            "rules": KINDS.map(rule), "failurePolicy": "Fail", "matchPolicy": "Equivalent",
            "sideEffects": "None", "timeoutSeconds": PATIENCE, "admissionReviewVersions": ["v1"],
        }],
    });
    let plural = format!("{}s", hook.kind.to_lowercase());
    (format!("/apis/admissionregistration.k8s.io/v1/{plural}/{}", hook.name), object)
}

fn service(version: &str, bundle: &str) -> (String, Value) {
    let name = format!("{version}.{SUBRESOURCES}");
    let object = json!({
        "apiVersion": "apiregistration.k8s.io/v1", "kind": "APIService",
        "metadata": metadata(&name),
        "spec": {
            "group": SUBRESOURCES, "version": version, "caBundle": bundle,
            "service": {"namespace": NAMESPACE, "name": SERVICE, "port": PORT},
            // As KubeVirt's.
            "groupPriorityMinimum": 1000, "versionPriority": 15,
        },
    });
    (format!("/apis/apiregistration.k8s.io/v1/apiservices/{name}"), object)
}

fn metadata(name: &str) -> Value {
    json!({
        "name": name,
        "labels": {"app.kubernetes.io/managed-by": "godwit", "kubevirt.io": SERVICE},
    })
}
