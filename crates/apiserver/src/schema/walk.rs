//! Pruning and defaulting.

use super::{Additional, Kind, Schema};
use serde_json::{Map, Value};

/// Unknown fields that are told of, at most.
const TOLD: usize = 100;

impl Schema {
    /// Removes the fields of a whole object that the schema does not know. Returns their paths.
    pub fn prune(&self, object: &mut Value) -> Vec<String> {
        let mut pruned = Vec::new();
        prune_object(self, object, &mut String::new(), true, &mut pruned);
        pruned
    }

    /// Fills in what is absent and has a default.
    pub fn fill_in(&self, value: &mut Value) {
        match value {
            Value::Object(map) => {
                self.drop_nulls(map);
                for (name, part) in &self.properties {
                    if let (None, Some(default)) = (map.get(&**name), &part.default) {
                        map.insert(name.to_string(), default.clone());
                    }
                }
                for (name, part) in map.iter_mut() {
                    match (self.properties.get(name.as_str()), &self.additional) {
                        (Some(schema), _) => schema.fill_in(part),
                        (None, Additional::Of(schema)) => schema.fill_in(part),
                        _ => {}
                    }
                }
            }
            Value::Array(all) => {
                if let Some(items) = &self.items {
                    all.iter_mut().for_each(|item| items.fill_in(item));
                }
            }
            _ => {}
        }
    }

    /// Null where it is no value counts as absent.
    fn drop_nulls(&self, map: &mut Map<String, Value>) {
        map.retain(|name, value| {
            !value.is_null()
                || match self.properties.get(name.as_str()) {
                    Some(part) => part.nullable || (part.default.is_none() && part.kind.is_none()),
                    None => true,
                }
        });
    }
}

/// Removes the unknown fields of a part of an object. Returns their paths.
pub(super) fn prune_part(schema: &Schema, value: &mut Value) -> Vec<String> {
    let mut pruned = Vec::new();
    prune_value(schema, value, &mut String::new(), &mut pruned);
    pruned
}

fn prune_value(schema: &Schema, value: &mut Value, path: &mut String, pruned: &mut Vec<String>) {
    match value {
        Value::Object(_) => prune_object(schema, value, path, schema.embedded, pruned),
        Value::Array(all) => {
            let Some(items) = &schema.items else { return };
            for (n, item) in all.iter_mut().enumerate() {
                within(path, &format!("[{n}]"), |path| prune_value(items, item, path, pruned));
            }
        }
        _ => {}
    }
}

/// `whole`: it has a type and metadata of its own.
fn prune_object(
    schema: &Schema,
    value: &mut Value,
    path: &mut String,
    whole: bool,
    pruned: &mut Vec<String>,
) {
    let Some(map) = value.as_object_mut() else { return };
    let keeps = schema.preserve_unknown || matches!(schema.additional, Additional::Any);
    map.retain(|name, part| {
        let mut keep = true;
        within(path, &format!(".{name}"), |path| {
            match (schema.properties.get(name.as_str()), &schema.additional) {
                _ if whole && name == "metadata" => {
                    prune_value(&super::metadata(), part, path, pruned)
                }
                _ if whole && (name == "apiVersion" || name == "kind") => {}
                (Some(known), _) => prune_value(known, part, path, pruned),
                (None, Additional::Of(of)) => prune_value(of, part, path, pruned),
                _ if keeps => {}
                _ => {
                    if pruned.len() < TOLD {
                        pruned.push(path.trim_start_matches('.').to_owned());
                    }
                    keep = false;
                }
            }
        });
        keep
    });
}

fn within(path: &mut String, step: &str, act: impl FnOnce(&mut String)) {
    let length = path.len();
    path.push_str(step);
    act(path);
    path.truncate(length);
}

/// A value's type, as messages name it.
pub(super) fn kind_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(n) if n.is_i64() || n.is_u64() => "integer",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

impl Kind {
    /// As schemas name it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Object => "object",
            Self::Array => "array",
            Self::String => "string",
            Self::Integer => "integer",
            Self::Number => "number",
            Self::Boolean => "boolean",
        }
    }

    pub(super) fn fits(self, value: &Value) -> bool {
        match (self, value) {
            (Self::Integer, Value::Number(n)) => {
                n.is_i64() || n.is_u64() || n.as_f64().is_some_and(|f| f.fract() == 0.0)
            }
            (Self::Object, Value::Object(_))
            | (Self::Array, Value::Array(_))
            | (Self::String, Value::String(_))
            | (Self::Number, Value::Number(_))
            | (Self::Boolean, Value::Bool(_)) => true,
            _ => false,
        }
    }
}
