//! An object's metadata, read and written in place.

use serde_json::{Map, Value};

/// A string field of metadata; empty when it is absent.
pub fn text<'a>(object: &'a Value, field: &str) -> &'a str {
    object["metadata"][field].as_str().unwrap_or_default()
}

/// A map of metadata: `labels` or `annotations`.
pub fn map<'a>(object: &'a Value, field: &str) -> Option<&'a Map<String, Value>> {
    object["metadata"][field].as_object()
}

/// Its revision; None for what was never stored.
pub fn revision(object: &Value) -> Option<u64> {
    text(object, "resourceVersion").parse().ok()
}

/// It is being deleted.
pub fn is_terminating(object: &Value) -> bool {
    !object["metadata"]["deletionTimestamp"].is_null()
}

/// What is to be done before it may go.
pub fn finalizers(object: &Value) -> Vec<&str> {
    let all = object["metadata"]["finalizers"].as_array();
    all.into_iter().flatten().filter_map(Value::as_str).collect()
}

/// Adds a finalizer, unless it is there.
pub fn add_finalizer(object: &mut Value, name: &str) {
    if finalizers(object).contains(&name) {
        return;
    }
    let Some(meta) = object.get_mut("metadata").and_then(Value::as_object_mut) else { return };
    match meta.get_mut("finalizers").and_then(Value::as_array_mut) {
        Some(all) => all.push(name.into()),
        None => drop(meta.insert("finalizers".into(), Value::from(vec![name]))),
    }
}

/// Removes a finalizer, and the list with the last one.
pub fn remove_finalizer(object: &mut Value, name: &str) {
    let Some(meta) = object.get_mut("metadata").and_then(Value::as_object_mut) else { return };
    let Some(all) = meta.get_mut("finalizers").and_then(Value::as_array_mut) else { return };
    all.retain(|f| f != name);
    if all.is_empty() {
        meta.remove("finalizers");
    }
}

/// Sets a field of metadata, or removes it when the value is null.
pub fn set(object: &mut Value, field: &str, value: Value) {
    let Some(root) = object.as_object_mut() else { return };
    let meta = root.entry("metadata").or_insert_with(|| Value::Object(Map::new()));
    let Some(meta) = meta.as_object_mut() else { return };
    match value {
        Value::Null => drop(meta.remove(field)),
        value => drop(meta.insert(field.into(), value)),
    }
}

/// Takes a field of the whole object from another, or removes it where the other has none.
pub fn take_field(object: &mut Value, from: &Value, field: &str) {
    let Some(root) = object.as_object_mut() else { return };
    match from.get(field) {
        Some(value) => drop(root.insert(field.into(), value.clone())),
        None => drop(root.remove(field)),
    }
}

/// A moment as Kubernetes writes it: RFC 3339 in UTC, whole seconds.
pub fn moment(at: jiff::Timestamp) -> String {
    at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}
