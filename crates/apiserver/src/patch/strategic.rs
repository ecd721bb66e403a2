//! Strategic merge patch: lists are merged by keys that the schema names.
//!
//! Source: k8s.io/apimachinery's `strategicpatch`.

use super::misfit;
use crate::schema::{Additional, Kind, Schema};
use crate::status::Failure;
use serde_json::{Map, Value};

const DIRECTIVE: &str = "$patch";
const RETAIN: &str = "$retainKeys";
const DELETE: &str = "$deleteFromPrimitiveList/";
const ORDER: &str = "$setElementOrder/";

/// What an object becomes.
///
/// # Errors
/// 422 when the patch does not fit.
pub fn merge(object: &Value, patch: &Value, schema: &Schema) -> Result<Value, Failure> {
    let (Some(object), Some(patch)) = (object.as_object(), patch.as_object()) else {
        return Ok(patch.clone());
    };
    Ok(Value::Object(merge_map(object, patch, schema)?))
}

fn part<'a>(schema: &'a Schema, name: &str) -> Option<&'a Schema> {
    match (schema.properties.get(name), &schema.additional) {
        (Some(part), _) => Some(part),
        (None, Additional::Of(part)) => Some(part),
        _ => None,
    }
}

fn merge_map(
    object: &Map<String, Value>,
    patch: &Map<String, Value>,
    schema: &Schema,
) -> Result<Map<String, Value>, Failure> {
    match patch.get(DIRECTIVE).map(|d| d.as_str()) {
        None | Some(Some("merge")) => {}
        Some(Some("replace")) => return Ok(stripped(patch)),
        Some(Some("delete")) => return Ok(Map::new()),
        Some(other) => return Err(misfit(&format!("Unrecognized patch directive: {other:?}"))),
    }
    let mut next = object.clone();
    if let Some(kept) = patch.get(RETAIN) {
        let kept = kept.as_array().ok_or_else(|| misfit("$retainKeys is not a list"))?;
        next.retain(|name, _| kept.iter().any(|k| k == name));
    }
    for (name, value) in patch {
        if name == DIRECTIVE || name == RETAIN || name.starts_with(ORDER) {
            continue;
        }
        if let Some(list) = name.strip_prefix(DELETE) {
            remove_scalars(&mut next, list, value);
            continue;
        }
        let known = part(schema, name);
        let merged = match (next.get(name), value) {
            (_, Value::Null) => {
                next.remove(name);
                continue;
            }
            (Some(Value::Object(old)), Value::Object(new)) => {
                Value::Object(merge_map(old, new, known.unwrap_or(&Schema::default()))?)
            }
            (old, Value::Array(new)) => {
                let old = old.and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
                Value::Array(merge_list(old, new, known)?)
            }
            (_, Value::Object(new)) => {
                Value::Object(merge_map(&Map::new(), new, known.unwrap_or(&Schema::default()))?)
            }
            (_, value) => value.clone(),
        };
        next.insert(name.clone(), merged);
    }
    for (name, order) in patch {
        if let (Some(list), Some(order)) = (name.strip_prefix(ORDER), order.as_array())
            && let Some(Value::Array(all)) = next.get_mut(list)
        {
            let key =
                part(schema, list).and_then(|s| s.strategy.merge.as_deref()).unwrap_or_default();
            sort_as(all, order, key);
        }
    }
    Ok(next)
}

/// Without the directives, which are no data.
fn stripped(patch: &Map<String, Value>) -> Map<String, Value> {
    let data = patch.iter().filter(|(name, _)| !name.starts_with('$'));
    data.map(|(name, value)| (name.clone(), value.clone())).collect()
}

fn merge_list(
    old: &[Value],
    new: &[Value],
    schema: Option<&Schema>,
) -> Result<Vec<Value>, Failure> {
    let replaces = new
        .iter()
        .any(|item| item[DIRECTIVE] == "replace" && item.as_object().is_some_and(|m| m.len() == 1));
    let real = || new.iter().filter(|item| item.get(DIRECTIVE).is_none_or(|d| d == "merge"));
    let Some(key) = schema.and_then(|s| s.strategy.merge.as_deref()) else {
        return Ok(real().cloned().collect());
    };
    if replaces {
        return Ok(real().cloned().collect());
    }
    let items = schema.and_then(|s| s.items.as_deref());
    let scalars = items.is_some_and(|i| i.kind != Some(Kind::Object)) || key.is_empty();
    if scalars {
        let mut next = old.to_vec();
        for item in new {
            if !next.contains(item) {
                next.push(item.clone());
            }
        }
        return Ok(next);
    }
    let open = Schema::default();
    let items = items.unwrap_or(&open);
    let mut next = old.to_vec();
    for item in new {
        let Some(map) = item.as_object() else {
            return Err(misfit("a list of objects is patched with something else"));
        };
        let Some(id) = map.get(key) else {
            return Err(misfit(&format!("map: {item} does not contain declared merge key: {key}")));
        };
        let at = next.iter().position(|old| old.get(key) == Some(id));
        match (map.get(DIRECTIVE).and_then(Value::as_str), at) {
            (Some("delete"), _) => next.retain(|old| old.get(key) != Some(id)),
            (Some("replace"), Some(at)) => next[at] = Value::Object(stripped(map)),
            (_, Some(at)) => {
                let old = next[at].as_object().cloned().unwrap_or_default();
                next[at] = Value::Object(merge_map(&old, map, items)?);
            }
            (_, None) => next.push(Value::Object(merge_map(&Map::new(), map, items)?)),
        }
    }
    Ok(next)
}

fn remove_scalars(object: &mut Map<String, Value>, list: &str, gone: &Value) {
    let gone = gone.as_array().map(Vec::as_slice).unwrap_or_default();
    if let Some(Value::Array(all)) = object.get_mut(list) {
        all.retain(|item| !gone.contains(item));
    }
}

/// Puts what is named into its order; what is not stays where it is among the rest.
fn sort_as(all: &mut [Value], order: &[Value], key: &str) {
    let place = |item: &Value| {
        order.iter().position(|o| match key {
            "" => o == item,
            key => o.get(key) == item.get(key),
        })
    };
    let mut named: Vec<Value> = all.iter().filter(|i| place(i).is_some()).cloned().collect();
    named.sort_by_key(|item| place(item));
    let mut named = named.into_iter();
    for item in all.iter_mut() {
        if place(item).is_some()
            && let Some(next) = named.next()
        {
            *item = next;
        }
    }
}
