//! What tells an API server that is not ours of the API role: webhooks and API services. Pure.

use crate::admission::KINDS;
use crate::eviction;
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

/// Where what is to be written is judged.
const VALIDATE: &str = "/validate";

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
        path: VALIDATE,
        operations: &["CREATE", "UPDATE", "DELETE"],
    },
];

/// The objects, each with its path. `authority` (PEM) vouches for the role's server.
pub fn objects(authority: &str) -> Vec<(String, Value)> {
    let bundle = STANDARD.encode(authority);
    let hooks = HOOKS.iter().map(|hook| webhook(hook, &bundle));
    hooks.chain(VERSIONS.map(|version| service(version, &bundle))).collect()
}

/// The names by which the API server asks for the role.
pub fn names() -> Vec<String> {
    vec![format!("{SERVICE}.{NAMESPACE}.svc"), format!("{SERVICE}.{NAMESPACE}.svc.cluster.local")]
}

/// What the role needs to register itself: a resource's group, its plural and its object's name.
pub fn registered() -> impl Iterator<Item = (&'static str, String, String)> {
    let hooks = HOOKS
        .iter()
        .map(|hook| ("admissionregistration.k8s.io", hook.plural(), hook.name.to_owned()));
    let services = VERSIONS.map(|version| {
        ("apiregistration.k8s.io", "apiservices".to_owned(), format!("{version}.{SUBRESOURCES}"))
    });
    hooks.chain(services)
}

impl Hook {
    fn plural(&self) -> String {
        format!("{}s", self.kind.to_lowercase())
    }
}

fn webhook(hook: &Hook, bundle: &str) -> (String, Value) {
    let rule = |(group, resource, _): (&str, &str, &str)| {
        json!({
            "apiGroups": [group], "apiVersions": ["*"], "operations": hook.operations,
            "resources": [resource, format!("{resource}/status")], "scope": "*",
        })
    };
    let asked = |name: &str, rules: Value, effects: &str| {
        json!({
            "name": format!("{name}.godwit.dev"), "clientConfig": {
                "caBundle": bundle,
                "service": {
                    "namespace": NAMESPACE, "name": SERVICE, "port": PORT, "path": hook.path,
                },
            },
            "rules": rules, "failurePolicy": "Fail", "matchPolicy": "Equivalent",
            "sideEffects": effects, "timeoutSeconds": PATIENCE, "admissionReviewVersions": ["v1"],
        })
    };
    let mut hooks = vec![asked(hook.name, json!(KINDS.map(rule)), "None")];
    if hook.path == VALIDATE {
        let (group, resource, subresource) = eviction::JUDGED;
        let rules = json!([{
            "apiGroups": [group], "apiVersions": ["v1"], "operations": ["CREATE"],
            "resources": [format!("{resource}/{subresource}")], "scope": "Namespaced",
        }]);
        // What is denied is marked.
        let mut evictions = asked("virt-launcher-eviction", rules, "NoneOnDryRun");
        // Others' pods are no business of ours: nobody waits for us to let them go.
        evictions["matchConditions"] = json!([{
            "name": "launchers", "expression": "request.name.startsWith('virt-launcher-')",
        }]);
        hooks.push(evictions);
    }
    let object = json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": hook.kind,
        "metadata": metadata(hook.name), "webhooks": hooks,
    });
    let plural = hook.plural();
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
