//! Questions about who somebody is and what somebody may do: pure.

use super::rbac::{Decision, Rules};
use super::{Attributes, User};
use crate::status::Failure;
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// The attributes that a `spec` of an access review asks about.
///
/// # Errors
/// 400 when it asks about nothing, or about two things.
fn attributes(spec: &Value) -> Result<Attributes, Failure> {
    let (resource, path) = (&spec["resourceAttributes"], &spec["nonResourceAttributes"]);
    let text = |of: &Value, field: &str| of[field].as_str().unwrap_or_default().to_owned();
    match (resource.is_object(), path.is_object()) {
        (true, false) => Ok(Attributes {
            verb: text(resource, "verb"),
            group: text(resource, "group"),
            version: text(resource, "version"),
            resource: text(resource, "resource"),
            subresource: text(resource, "subresource"),
            namespace: text(resource, "namespace"),
            name: text(resource, "name"),
            path: String::new(),
        }),
        (false, true) => Ok(Attributes {
            verb: text(path, "verb"),
            path: text(path, "path"),
            ..Attributes::default()
        }),
        (true, true) => Err(Failure::bad_request(
            "spec.nonResourceAttributes: Invalid value: cannot be specified in combination with resourceAttributes",
        )),
        (false, false) => Err(Failure::bad_request(
            "spec.resourceAttributes: Invalid value: exactly one of nonResourceAttributes or resourceAttributes must be specified",
        )),
    }
}

/// Who an access review is about.
fn subject(spec: &Value) -> Result<User, Failure> {
    let list = |value: &Value| -> Vec<String> {
        let all = value.as_array().into_iter().flatten();
        all.filter_map(Value::as_str).map(str::to_owned).collect()
    };
    let extra = spec["extra"].as_object().into_iter().flatten();
    let user = User {
        name: spec["user"].as_str().unwrap_or_default().to_owned(),
        uid: spec["uid"].as_str().unwrap_or_default().to_owned(),
        groups: list(&spec["groups"]),
        extra: extra.map(|(key, value)| (key.clone(), list(value))).collect::<BTreeMap<_, _>>(),
    };
    match user.name.is_empty() && user.groups.is_empty() {
        true => Err(Failure::bad_request(
            "spec.user: Invalid value: \"\": at least one of user or group must be specified",
        )),
        false => Ok(user),
    }
}

/// Decides whether somebody may do something.
pub type Judge<'a> = &'a dyn Fn(&User, &Attributes) -> Decision;

/// A review of access, of whoever asks where the kind is about oneself.
///
/// # Errors
/// 400 when it asks about nothing.
pub fn access(question: &Value, asker: &User, judge: Judge<'_>) -> Result<Value, Failure> {
    let spec = &question["spec"];
    let own = question["kind"] == "SelfSubjectAccessReview";
    let user = if own { asker.clone() } else { subject(spec)? };
    let what = attributes(spec)?;
    if question["kind"] == "LocalSubjectAccessReview"
        && question["metadata"]["namespace"] != spec["resourceAttributes"]["namespace"]
    {
        return Err(Failure::bad_request(
            "spec.resourceAttributes.namespace: Invalid value: must match metadata.namespace",
        ));
    }
    let decision = judge(&user, &what);
    let mut status = json!({"allowed": decision.allowed});
    if !decision.reason.is_empty() {
        status["reason"] = decision.reason.into();
    }
    let mut answer = question.clone();
    answer["status"] = status;
    Ok(answer)
}

/// All that whoever asks may do in a namespace.
pub fn rules(question: &Value, asker: &User, rules: &Rules) -> Value {
    let namespace = question["spec"]["namespace"].as_str().unwrap_or_default();
    let (mut resources, mut paths) = (Vec::new(), Vec::new());
    if asker.is_in(super::MASTERS) {
        resources.push(json!({"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}));
        paths.push(json!({"verbs": ["*"], "nonResourceURLs": ["*"]}));
    }
    for rule in rules.rules_of(asker, namespace) {
        if !rule.resources.is_empty() {
            let mut entry =
                json!({"verbs": rule.verbs, "apiGroups": rule.groups, "resources": rule.resources});
            if !rule.names.is_empty() {
                entry["resourceNames"] = json!(rule.names);
            }
            resources.push(entry);
        }
        if !rule.paths.is_empty() {
            paths.push(json!({"verbs": rule.verbs, "nonResourceURLs": rule.paths}));
        }
    }
    let mut answer = question.clone();
    answer["status"] =
        json!({"resourceRules": resources, "nonResourceRules": paths, "incomplete": false});
    answer
}

/// Who asks.
pub fn who(question: &Value, asker: &User) -> Value {
    let mut answer = question.clone();
    answer["status"] = json!({"userInfo": asker.to_json()});
    answer
}

/// Whose a token is.
pub fn token(question: &Value, found: Option<&User>, audiences: &[&str]) -> Value {
    let mut answer = question.clone();
    answer["status"] = match found {
        Some(user) => {
            json!({"authenticated": true, "user": user.to_json(), "audiences": audiences})
        }
        None => json!({"error": "the token is not valid"}),
    };
    answer
}
