//! Objects as tables (`meta.k8s.io/v1` Table), which is how kubectl shows them, and as metadata
//! alone.

mod cells;
mod path;

use crate::meta;
use crate::request::Include;
use crate::resource::{Column, Resource};
use jiff::Timestamp;
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// A table of objects. Only a headed one has its columns.
pub fn table(
    resource: &Resource,
    objects: &[Arc<Value>],
    include: Include,
    headed: bool,
    now: Timestamp,
) -> Value {
    let rows: Vec<_> = objects.iter().map(|object| row(resource, object, include, now)).collect();
    let columns = if headed { columns(resource) } else { Vec::new() };
    json!({
        "kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": {},
        "columnDefinitions": columns, "rows": rows,
    })
}

fn row(resource: &Resource, object: &Arc<Value>, include: Include, now: Timestamp) -> Value {
    let mut cells = vec![Value::from(meta::text(object, "name"))];
    match resource.crd {
        Some(_) => cells.extend(resource.columns.iter().map(|c| custom_cell(object, c, now))),
        None => cells.extend(cells::of(&resource.key(), object, now)),
    }
    let mut row = json!({"cells": cells});
    match include {
        Include::None => {}
        Include::Metadata => row["object"] = metadata_only(object),
        Include::Object => row["object"] = (**object).clone(),
    }
    row
}

fn columns(resource: &Resource) -> Vec<Value> {
    let name = json!({
        "name": "Name", "type": "string", "format": "name", "priority": 0,
        "description": "Name must be unique within a namespace.",
    });
    let own: Vec<Value> = match resource.crd {
        Some(_) => resource.columns.iter().map(custom_column).collect(),
        None => cells::columns(&resource.key()),
    };
    std::iter::once(name).chain(own).collect()
}

fn custom_column(column: &Column) -> Value {
    let Column { name, kind, format, description, priority, .. } = column;
    let description = match &**description {
        "" => format!("Custom resource definition column (in JSONPath format): {}", column.path),
        description => description.to_owned(),
    };
    json!({
        "name": **name, "type": **kind, "format": **format, "description": description,
        "priority": priority,
    })
}

fn custom_cell(object: &Value, column: &Column, now: Timestamp) -> Value {
    let found = path::find(object, &column.path);
    let value = match &found[..] {
        [] => return Value::Null,
        [one] => (*one).clone(),
        several => Value::from(several.iter().map(|v| plain(v)).collect::<Vec<_>>().join(",")),
    };
    match (&*column.kind, &value) {
        ("date", Value::String(text)) => cells::age(text, now).into(),
        ("integer", Value::Number(_))
        | ("number", Value::Number(_))
        | ("boolean", Value::Bool(_)) => value,
        ("integer" | "number" | "boolean", _) => Value::Null,
        _ => plain(&value).into(),
    }
}

fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

/// An object's metadata alone.
pub fn metadata_only(object: &Value) -> Value {
    let mut only = Map::new();
    only.insert("kind".into(), "PartialObjectMetadata".into());
    only.insert("apiVersion".into(), "meta.k8s.io/v1".into());
    only.insert("metadata".into(), object["metadata"].clone());
    Value::Object(only)
}
