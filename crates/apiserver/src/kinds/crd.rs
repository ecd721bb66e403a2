//! CustomResourceDefinitions.

use super::{Kind, WITH_STATUS, default, each, invalid, list, part, required, text};
use crate::status::Cause;
use crate::{catalog, meta, names};
use jiff::Timestamp;
use serde_json::{Value, json};

pub(super) static CRD: Kind = Kind {
    generation: true,
    unconditional_update: false,
    default: fill_in,
    validate,
    validate_update,
    ..WITH_STATUS
};

fn fill_in(crd: &mut Value) {
    if !crd["spec"].is_object() {
        return;
    }
    let spec = &mut crd["spec"];
    default(part(spec, "conversion"), "strategy", "None");
    let kind = text(&spec["names"], "kind").to_owned();
    let named = part(spec, "names");
    if text(named, "singular").is_empty() && !kind.is_empty() {
        named["singular"] = kind.to_lowercase().into();
    }
    if text(named, "listKind").is_empty() && !kind.is_empty() {
        named["listKind"] = format!("{kind}List").into();
    }
    for version in each(spec, "versions") {
        for column in each(version, "additionalPrinterColumns") {
            default(column, "type", "string");
        }
    }
}

fn validate(crd: &Value) -> Vec<Cause> {
    let spec = &crd["spec"];
    let named = &spec["names"];
    let mut causes = Vec::new();
    let wanted = format!("{}.{}", text(named, "plural"), text(spec, "group"));
    if meta::text(crd, "name") != wanted {
        causes.push(invalid(
            "metadata.name",
            &json!(meta::text(crd, "name")),
            "must be spec.names.plural+\".\"+spec.group",
        ));
    }
    if let Some(why) = names::subdomain(text(spec, "group")) {
        causes.push(invalid("spec.group", &spec["group"], &why));
    } else if !text(spec, "group").contains('.') {
        causes.push(invalid(
            "spec.group",
            &spec["group"],
            "should be a domain with at least one dot",
        ));
    }
    for field in ["plural", "singular", "kind", "listKind"] {
        let name = text(named, field);
        if name.is_empty() {
            causes.push(required(format!("spec.names.{field}"), ""));
        } else if let Some(why) = names::service(&name.to_lowercase()) {
            causes.push(invalid(format!("spec.names.{field}"), &named[field], &why));
        }
    }
    if !["Namespaced", "Cluster"].contains(&text(spec, "scope")) {
        causes.push(super::unsupported("spec.scope", &spec["scope"], &["Cluster", "Namespaced"]));
    }
    if spec["preserveUnknownFields"] == true {
        causes.push(invalid("spec.preserveUnknownFields", &json!(true), "must be false"));
    }
    if text(&spec["conversion"], "strategy") == "Webhook" {
        causes.push(invalid(
            "spec.conversion.strategy",
            &json!("Webhook"),
            "this server converts between versions by name alone (None)",
        ));
    }
    validate_versions(spec, &mut causes);
    causes
}

fn validate_versions(spec: &Value, causes: &mut Vec<Cause>) {
    let versions = list(spec, "versions");
    if versions.is_empty() {
        causes.push(required("spec.versions", ""));
    }
    let mut seen = Vec::new();
    for (n, version) in versions.iter().enumerate() {
        let at = format!("spec.versions[{n}]");
        let name = text(version, "name");
        if let Some(why) = names::service(name) {
            causes.push(invalid(format!("{at}.name"), &version["name"], &why));
        }
        if seen.contains(&name) {
            causes.push(invalid(
                "spec.versions",
                &version["name"],
                "must contain unique version names",
            ));
        }
        seen.push(name);
        if version["schema"]["openAPIV3Schema"].is_null() {
            causes.push(required(format!("{at}.schema.openAPIV3Schema"), "schemas are required"));
        }
        for (m, column) in list(version, "additionalPrinterColumns").iter().enumerate() {
            if text(column, "jsonPath").is_empty() {
                causes.push(required(format!("{at}.additionalPrinterColumns[{m}].JSONPath"), ""));
            }
        }
    }
    let stored = versions.iter().filter(|v| v["storage"] == true).count();
    if stored != 1 && !versions.is_empty() {
        causes.push(invalid(
            "spec.versions",
            &json!("array"),
            "must have exactly one version marked as storage version",
        ));
    }
    if causes.is_empty()
        && let Err(wrong) = catalog::of_crd(&json!({"spec": spec}))
    {
        causes.extend(wrong);
    }
}

fn validate_update(new: &Value, old: &Value) -> Vec<Cause> {
    let mut causes = Vec::new();
    for field in ["group", "scope"] {
        if catalog::is_established(old) || field == "group" {
            let at = format!("spec.{field}");
            causes.extend(super::immutable(&at, &new["spec"][field], &old["spec"][field]));
        }
    }
    for field in ["plural", "kind"] {
        if catalog::is_established(old) {
            let (new, old) = (&new["spec"]["names"][field], &old["spec"]["names"][field]);
            causes.extend(super::immutable(&format!("spec.names.{field}"), new, old));
        }
    }
    for version in list(&new["status"], "storedVersions") {
        let known = list(&new["spec"], "versions").iter().any(|v| v["name"] == *version);
        if !known {
            causes.push(invalid(
                format!("status.storedVersions[{}]", text(&json!({"v": version}), "v")),
                version,
                "must appear in spec.versions",
            ));
        }
    }
    causes
}

/// Names of a CRD that others of its group, or built-in resources, have; for people.
pub fn names_taken(crd: &Value, others: &[Value]) -> Vec<String> {
    let spec = &crd["spec"];
    let own = &spec["names"];
    let mut taken = Vec::new();
    let others = others.iter().filter(|other| {
        other["spec"]["group"] == spec["group"]
            && meta::text(other, "name") != meta::text(crd, "name")
    });
    for other in others {
        let theirs = &other["status"]["acceptedNames"];
        let resources = |names: &Value| {
            let mut all =
                vec![text(names, "plural").to_owned(), text(names, "singular").to_owned()];
            all.extend(
                list(names, "shortNames").iter().filter_map(|s| s.as_str().map(str::to_owned)),
            );
            all
        };
        let their_resources = resources(theirs);
        for name in resources(own).into_iter().filter(|n| !n.is_empty()) {
            if their_resources.contains(&name) {
                taken.push(format!("{name:?} is already in use"));
            }
        }
        let kinds = [text(theirs, "kind"), text(theirs, "listKind")];
        for field in ["kind", "listKind"] {
            if kinds.contains(&text(own, field)) {
                taken.push(format!("{:?} is already in use", text(own, field)));
            }
        }
    }
    taken
}

/// Sets the names and conditions of a CRD's status: at once, so that what it defines is served when
/// the write is acknowledged.
pub fn conditions(crd: &mut Value, taken: &[String], now: Timestamp) {
    let named = crd["spec"]["names"].clone();
    let storage = list(&crd["spec"], "versions").iter().find(|v| v["storage"] == true);
    let storage = storage.map(|v| v["name"].clone());
    let status = part(crd, "status");
    let accepted = taken.is_empty();
    if accepted || status["acceptedNames"].is_null() {
        status["acceptedNames"] = match accepted {
            true => named,
            false => json!({"plural": "", "kind": ""}),
        };
    }
    let versions = list(status, "storedVersions").to_vec();
    if let Some(storage) = storage.filter(|s| !versions.contains(s)) {
        let mut versions = versions;
        versions.push(storage);
        status["storedVersions"] = versions.into();
    }
    let (state, reason, message) = match accepted {
        true => ("True", "NoConflicts", "no conflicts found".to_owned()),
        false => ("False", "NamesConflict", taken.join(", ")),
    };
    set_condition(status, "NamesAccepted", state, reason, &message, now);
    let established = list(status, "conditions")
        .iter()
        .any(|c| c["type"] == "Established" && c["status"] == "True");
    if accepted {
        set_condition(
            status,
            "Established",
            "True",
            "InitialNamesAccepted",
            "the initial names have been accepted",
            now,
        );
    } else if !established {
        set_condition(
            status,
            "Established",
            "False",
            "NotAccepted",
            "not all names are accepted",
            now,
        );
    }
}

fn set_condition(
    status: &mut Value,
    kind: &str,
    state: &str,
    reason: &str,
    message: &str,
    now: Timestamp,
) {
    let mut all = list(status, "conditions").to_vec();
    let before = all.iter().position(|c| c["type"] == kind);
    let since = before.map(|at| &all[at]).filter(|c| c["status"] == state);
    let since = since.map(|c| c["lastTransitionTime"].clone());
    let condition = json!({
        "type": kind, "status": state, "reason": reason, "message": message,
        "lastTransitionTime": since.unwrap_or_else(|| meta::moment(now).into()),
    });
    match before {
        Some(at) => all[at] = condition,
        None => all.push(condition),
    }
    status["conditions"] = all.into();
}
