//! The smaller kinds.

use super::{
    Kind, PLAIN, WITH_STATUS, default, each, forbidden, immutable, invalid, list, part, quantities,
    required, text, unsupported,
};
use crate::meta;
use crate::status::Cause;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

pub(super) static OTHER: Kind = PLAIN;
pub(super) static STATUS_ONLY: Kind = Kind {
    prepare_create: super::clear_status,
    prepare_update: super::keep_status,
    prepare_status: super::keep_spec,
    ..PLAIN
};

pub(super) static NODE: Kind = Kind {
    // A node tells its state with its first word.
    prepare_create: |_| {},
    ..WITH_STATUS
};

pub(super) static NAMESPACE: Kind = Kind {
    default: |namespace| {
        let name = meta::text(namespace, "name").to_owned();
        if !name.is_empty() {
            part(part(namespace, "metadata"), "labels")["kubernetes.io/metadata.name"] =
                name.into();
        }
    },
    prepare_create: |namespace| {
        namespace["status"] = json!({"phase": "Active"});
        let spec = part(namespace, "spec");
        let has = list(spec, "finalizers").iter().any(|f| f == "kubernetes");
        if !has {
            match spec.get_mut("finalizers").and_then(Value::as_array_mut) {
                Some(all) => all.push("kubernetes".into()),
                None => spec["finalizers"] = json!(["kubernetes"]),
            }
        }
    },
    prepare_update: |new, old| {
        meta::take_field(new, old, "spec");
        meta::take_field(new, old, "status");
    },
    ..WITH_STATUS
};

/// Bytes of a ConfigMap or a Secret.
const SIZE: usize = 1 << 20;

fn keys(at: &str, map: &Value) -> Vec<Cause> {
    let wrong = |key: &str| {
        let fits = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        key.len() > 253
            || key.is_empty()
            || !key.chars().all(fits)
            || key == "."
            || key.starts_with("..")
    };
    let all = map.as_object().into_iter().flatten().map(|(key, _)| key);
    all.filter(|key| wrong(key))
        .map(|key| {
            invalid(
                format!("{at}[{key}]"),
                &json!(key),
                "a valid config key must consist of alphanumeric characters, '-', '_' or '.' (e.g. \
                 'key.name',  or 'KEY_NAME',  or 'key-name', regex used for validation is '[-._a-zA-Z0-9]+')",
            )
        })
        .collect()
}

fn size(object: &Value, encoded: &[&str], plain: &[&str]) -> usize {
    let of = |field: &&str, encoded: bool| -> usize {
        let all = object[*field].as_object().into_iter().flatten();
        all.map(|(key, value)| {
            let length = value.as_str().map_or(0, str::len);
            key.len() + if encoded { length / 4 * 3 } else { length }
        })
        .sum()
    };
    encoded.iter().map(|f| of(f, true)).sum::<usize>()
        + plain.iter().map(|f| of(f, false)).sum::<usize>()
}

fn too_long() -> Cause {
    Cause {
        reason: "FieldValueTooLong",
        message: format!("Too long: may not be more than {SIZE} bytes"),
        field: String::new(),
    }
}

/// Where it is immutable, it stays so, and its data with it.
fn sealed(new: &Value, old: &Value) -> Vec<Cause> {
    if old["immutable"] != true {
        return Vec::new();
    }
    let mut causes = Vec::new();
    for field in ["immutable", "data", "binaryData"] {
        if new[field] != old[field] {
            causes.push(forbidden(field, "field is immutable when `immutable` is set"));
        }
    }
    causes
}

pub(super) static CONFIG_MAP: Kind = Kind {
    validate: |map| {
        let mut causes = keys("data", &map["data"]);
        causes.extend(keys("binaryData", &map["binaryData"]));
        for (key, _) in map["data"].as_object().into_iter().flatten() {
            if map["binaryData"].get(key).is_some() {
                causes.push(invalid(
                    format!("data[{key}]"),
                    &json!(key),
                    "duplicate of key present in binaryData",
                ));
            }
        }
        if size(map, &["binaryData"], &["data"]) > SIZE {
            causes.push(too_long());
        }
        causes
    },
    validate_update: sealed,
    create_on_update: false,
    ..PLAIN
};

pub(super) static SECRET: Kind = Kind {
    default: |secret| {
        default(secret, "type", "Opaque");
        let plain = secret.as_object_mut().and_then(|s| s.remove("stringData"));
        for (key, value) in plain.as_ref().and_then(Value::as_object).into_iter().flatten() {
            let encoded = STANDARD.encode(value.as_str().unwrap_or_default());
            part(secret, "data")[key] = encoded.into();
        }
    },
    validate: |secret| {
        let mut causes = keys("data", &secret["data"]);
        if size(secret, &["data"], &[]) > SIZE {
            causes.push(too_long());
        }
        let needed: &[&str] = match text(secret, "type") {
            "kubernetes.io/tls" => &["tls.crt", "tls.key"],
            "kubernetes.io/dockerconfigjson" => &[".dockerconfigjson"],
            "kubernetes.io/dockercfg" => &[".dockercfg"],
            "kubernetes.io/ssh-auth" => &["ssh-privatekey"],
            _ => &[],
        };
        for key in needed.iter().filter(|key| secret["data"].get(**key).is_none()) {
            causes.push(required(format!("data[{key}]"), ""));
        }
        causes
    },
    validate_update: |new, old| {
        let mut causes = sealed(new, old);
        causes.extend(immutable("type", &new["type"], &old["type"]));
        causes
    },
    ..PLAIN
};

pub(super) static REVISION: Kind = Kind {
    validate_update: |new, old| immutable("data", &new["data"], &old["data"]).into_iter().collect(),
    ..PLAIN
};

pub(super) static SERVICE: Kind = Kind {
    default: |service| {
        let spec = part(service, "spec");
        default(spec, "type", "ClusterIP");
        default(spec, "sessionAffinity", "None");
        default(spec, "internalTrafficPolicy", "Cluster");
        for port in each(spec, "ports") {
            default(port, "protocol", "TCP");
            let number = port["port"].clone();
            default(port, "targetPort", number);
        }
    },
    prepare_create: |service| service["status"] = json!({"loadBalancer": {}}),
    validate: |service| {
        let spec = &service["spec"];
        let mut causes = Vec::new();
        let kinds = ["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"];
        if !kinds.contains(&text(spec, "type")) {
            causes.push(unsupported("spec.type", &spec["type"], &kinds));
        }
        let headless = text(spec, "clusterIP") == "None" || text(spec, "type") == "ExternalName";
        if list(spec, "ports").is_empty() && !headless {
            causes.push(required("spec.ports", ""));
        }
        for (n, port) in list(spec, "ports").iter().enumerate() {
            if !port["port"].as_i64().is_some_and(|p| (1..=65535).contains(&p)) {
                causes.push(invalid(
                    format!("spec.ports[{n}].port"),
                    &port["port"],
                    "must be between 1 and 65535, inclusive",
                ));
            }
            if list(spec, "ports").len() > 1 && text(port, "name").is_empty() {
                causes.push(required(format!("spec.ports[{n}].name"), ""));
            }
        }
        causes
    },
    create_on_update: true,
    ..WITH_STATUS
};

pub(super) static ENDPOINTS: Kind = Kind {
    default: |endpoints| {
        for subset in each(endpoints, "subsets") {
            for port in each(subset, "ports") {
                default(port, "protocol", "TCP");
            }
        }
    },
    create_on_update: true,
    ..PLAIN
};

pub(super) static LEASE: Kind = Kind {
    validate: |lease| {
        let spec = &lease["spec"];
        let mut causes = Vec::new();
        if spec["leaseDurationSeconds"].as_i64().is_some_and(|s| s <= 0) {
            causes.push(invalid(
                "spec.leaseDurationSeconds",
                &spec["leaseDurationSeconds"],
                "must be greater than 0",
            ));
        }
        if spec["leaseTransitions"].as_i64().is_some_and(|n| n < 0) {
            causes.push(invalid(
                "spec.leaseTransitions",
                &spec["leaseTransitions"],
                "must be greater than or equal to 0",
            ));
        }
        causes
    },
    create_on_update: true,
    ..PLAIN
};

pub(super) static QUOTA: Kind = Kind {
    validate: |quota| {
        let mut causes = quantities("spec.hard", &quota["spec"]["hard"]);
        let scopes = [
            "BestEffort",
            "NotBestEffort",
            "Terminating",
            "NotTerminating",
            "PriorityClass",
            "CrossNamespacePodAffinity",
        ];
        for (n, scope) in list(&quota["spec"], "scopes").iter().enumerate() {
            if !scope.as_str().is_some_and(|s| scopes.contains(&s)) {
                causes.push(invalid(format!("spec.scopes[{n}]"), scope, "unsupported scope"));
            }
        }
        causes
    },
    validate_update: |new, old| {
        immutable("spec.scopes", &new["spec"]["scopes"], &old["spec"]["scopes"])
            .into_iter()
            .collect()
    },
    ..WITH_STATUS
};

pub(super) static BUDGET: Kind = Kind {
    generation: true,
    unconditional_update: false,
    validate: |budget| {
        let spec = &budget["spec"];
        let mut causes = Vec::new();
        if !spec["minAvailable"].is_null() && !spec["maxUnavailable"].is_null() {
            causes.push(invalid(
                "spec",
                &json!("object"),
                "minAvailable and maxUnavailable cannot be both set",
            ));
        }
        for field in ["minAvailable", "maxUnavailable"] {
            let value = &spec[field];
            let percent =
                value.as_str().map(|t| t.strip_suffix('%').and_then(|n| n.parse::<u32>().ok()));
            if value.as_i64().is_some_and(|n| n < 0) {
                causes.push(invalid(
                    format!("spec.{field}"),
                    value,
                    "must be greater than or equal to 0",
                ));
            } else if percent == Some(None) || percent.flatten().is_some_and(|n| n > 100) {
                causes.push(invalid(format!("spec.{field}"), value, "must be a valid percent"));
            }
        }
        if let Err(why) = crate::selector::Labels::from_object(&spec["selector"]) {
            causes.push(invalid("spec.selector", &json!("object"), &why));
        }
        causes
    },
    ..WITH_STATUS
};

pub(super) static PRIORITY_CLASS: Kind = Kind {
    default: |class| default(class, "preemptionPolicy", "PreemptLowerPriority"),
    validate: |class| {
        let mut causes = Vec::new();
        let name = meta::text(class, "name");
        let known = matches!(name, "system-node-critical" | "system-cluster-critical");
        if name.starts_with("system-") && !known {
            causes.push(forbidden(
                "metadata.name",
                "priority class names with 'system-' prefix are reserved for system use only",
            ));
        }
        if class["value"].as_i64().is_some_and(|v| v > 1_000_000_000) && !known {
            causes.push(forbidden(
                "value",
                "maximum allowed value of a user defined priority is 1000000000",
            ));
        }
        causes
    },
    validate_update: |new, old| {
        let mut causes = Vec::new();
        if new["value"] != old["value"] {
            causes.push(forbidden("value", "may not be changed in an update."));
        }
        causes
    },
    ..PLAIN
};

pub(super) static ROLE: Kind = Kind {
    default: |role| default(role, "rules", json!([])),
    validate: |role| {
        let mut causes = Vec::new();
        let namespaced = !meta::text(role, "namespace").is_empty();
        for (n, rule) in list(role, "rules").iter().enumerate() {
            let at = |field: &str| format!("rules[{n}].{field}");
            if list(rule, "verbs").is_empty() {
                causes.push(required(at("verbs"), "verbs must contain at least one value"));
            }
            if !list(rule, "nonResourceURLs").is_empty() {
                if namespaced {
                    causes.push(invalid(
                        at("nonResourceURLs"),
                        &rule["nonResourceURLs"],
                        "namespaced rules cannot apply to non-resource URLs",
                    ));
                }
                if !list(rule, "resources").is_empty() || !list(rule, "apiGroups").is_empty() {
                    causes.push(invalid(
                        at("nonResourceURLs"),
                        &rule["nonResourceURLs"],
                        "rules cannot apply to both regular resources and non-resource URLs",
                    ));
                }
                continue;
            }
            if list(rule, "apiGroups").is_empty() {
                causes.push(required(
                    at("apiGroups"),
                    "resource rules must supply at least one api group",
                ));
            }
            if list(rule, "resources").is_empty() {
                causes.push(required(
                    at("resources"),
                    "resource rules must supply at least one resource",
                ));
            }
        }
        causes
    },
    create_on_update: true,
    ..PLAIN
};

const RBAC: &str = "rbac.authorization.k8s.io";

pub(super) static BINDING: Kind = Kind {
    default: |binding| {
        let reference = part(binding, "roleRef");
        if text(reference, "apiGroup").is_empty() {
            reference["apiGroup"] = RBAC.into();
        }
        for subject in each(binding, "subjects") {
            if matches!(text(subject, "kind"), "User" | "Group") {
                default(subject, "apiGroup", RBAC);
            }
        }
    },
    validate: |binding| {
        let reference = &binding["roleRef"];
        let mut causes = Vec::new();
        if text(reference, "apiGroup") != RBAC {
            causes.push(unsupported("roleRef.apiGroup", &reference["apiGroup"], &[RBAC]));
        }
        let kinds: &[&str] = match meta::text(binding, "namespace") {
            "" => &["ClusterRole"],
            _ => &["Role", "ClusterRole"],
        };
        if !kinds.contains(&text(reference, "kind")) {
            causes.push(unsupported("roleRef.kind", &reference["kind"], kinds));
        }
        if text(reference, "name").is_empty() {
            causes.push(required("roleRef.name", ""));
        }
        for (n, subject) in list(binding, "subjects").iter().enumerate() {
            let at = |field: &str| format!("subjects[{n}].{field}");
            let kinds = ["ServiceAccount", "User", "Group"];
            if !kinds.contains(&text(subject, "kind")) {
                causes.push(unsupported(at("kind"), &subject["kind"], &kinds));
            }
            if text(subject, "name").is_empty() {
                causes.push(required(at("name"), ""));
            }
            let account = text(subject, "kind") == "ServiceAccount";
            if account
                && text(subject, "namespace").is_empty()
                && meta::text(binding, "namespace").is_empty()
            {
                causes.push(required(at("namespace"), ""));
            }
        }
        causes
    },
    validate_update: |new, old| match new["roleRef"] == old["roleRef"] {
        true => Vec::new(),
        false => vec![invalid("roleRef", &new["roleRef"], "cannot change roleRef")],
    },
    create_on_update: true,
    ..PLAIN
};

pub(super) static WEBHOOKS: Kind = Kind {
    generation: true,
    unconditional_update: false,
    default: |config| {
        for hook in each(config, "webhooks") {
            default(hook, "failurePolicy", "Fail");
            default(hook, "matchPolicy", "Equivalent");
            default(hook, "timeoutSeconds", 10);
            default(hook, "namespaceSelector", json!({}));
            default(hook, "objectSelector", json!({}));
        }
    },
    ..PLAIN
};
