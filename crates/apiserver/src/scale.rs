//! `autoscaling/v1` Scale of custom resources.

use crate::meta;
use crate::resource::Scale;
use crate::status::Failure;
use serde_json::{Value, json};

/// The Scale of an object.
pub fn of(object: &Value, paths: &Scale) -> Value {
    let at = |path: &str| object.pointer(&pointer(path));
    let mut scale = json!({
        "kind": "Scale", "apiVersion": "autoscaling/v1",
        "metadata": {
            "name": meta::text(object, "name"),
            "namespace": meta::text(object, "namespace"),
            "uid": meta::text(object, "uid"),
            "resourceVersion": meta::text(object, "resourceVersion"),
            "creationTimestamp": meta::text(object, "creationTimestamp"),
        },
        "spec": {"replicas": at(&paths.spec).and_then(Value::as_i64).unwrap_or(0)},
        "status": {"replicas": at(&paths.status).and_then(Value::as_i64).unwrap_or(0)},
    });
    if let Some(selector) = paths.selector.as_deref().and_then(at).and_then(Value::as_str) {
        scale["status"]["selector"] = selector.into();
    }
    scale
}

/// The object with the replicas of a Scale.
///
/// # Errors
/// 400 when that has none, 409 when it is of another revision.
pub fn set(object: &Value, paths: &Scale, scale: &Value) -> Result<Value, Failure> {
    let replicas = scale["spec"]["replicas"].as_i64().filter(|n| *n >= 0);
    let replicas = replicas.ok_or_else(|| {
        Failure::bad_request("spec.replicas: must be a whole number, greater than or equal to 0")
    })?;
    let revision = meta::text(scale, "resourceVersion");
    if !revision.is_empty() && revision != meta::text(object, "resourceVersion") {
        let what = crate::status::Subject {
            group: "autoscaling",
            kind: "scales",
            name: meta::text(object, "name"),
        };
        return Err(Failure::conflict(what, crate::handler::prepare::MODIFIED));
    }
    let mut next = object.clone();
    let mut at = &mut next;
    for field in paths.spec.split('.').filter(|f| !f.is_empty()) {
        let Some(map) = at.as_object_mut() else {
            return Err(Failure::bad_request(format!("{} leads through no object", paths.spec)));
        };
        at = map.entry(field).or_insert_with(|| json!({}));
    }
    *at = replicas.into();
    if next != *object
        && let Some(generation) = object["metadata"]["generation"].as_i64()
    {
        meta::set(&mut next, "generation", (generation + 1).into());
    }
    Ok(next)
}

/// `.spec.replicas` as RFC 6901 has it.
fn pointer(path: &str) -> String {
    path.replace('.', "/")
}
