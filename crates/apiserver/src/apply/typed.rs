//! Values by their schemas: which fields they have, in which they differ, how one is merged into
//! another, and what is taken out of one.
//!
//! Source: kubernetes-sigs/structured-merge-diff's `typed`.

use super::set::{Set, field};
use crate::schema::{Additional, List, Schema};
use serde_json::{Map, Value};
use std::sync::LazyLock;

/// What is not known: objects are shared by field, lists are not.
static UNKNOWN: LazyLock<Schema> = LazyLock::new(Schema::default);

/// What the parts of a value are to those who share it.
enum Parts<'a> {
    /// It has one owner.
    None,
    /// Fields.
    Map(&'a Map<String, Value>),
    /// Elements with names.
    List(Vec<(String, &'a Value)>),
}

fn child<'a>(schema: &'a Schema, name: &str) -> &'a Schema {
    match (schema.properties.get(name), &schema.additional) {
        (Some(part), _) => part,
        (None, Additional::Of(part)) => part,
        _ => &UNKNOWN,
    }
}

/// Whether a field is one of a map's, not of a struct's: then it is a member by itself.
fn is_of_map(schema: &Schema, name: &str) -> bool {
    !schema.properties.contains_key(name)
}

fn items(schema: &Schema) -> &Schema {
    schema.items.as_deref().unwrap_or(&UNKNOWN)
}

/// The name of an element of a list; None if it has none.
fn name_of(schema: &Schema, item: &Value) -> Option<String> {
    match &schema.list {
        List::Atomic => None,
        List::Set => Some(format!("v:{item}")),
        List::Map(keys) => {
            let mut id = Map::new();
            for key in keys {
                let default = || items(schema).properties.get(key)?.default.as_ref();
                if let Some(value) = item.get(&**key).or_else(default) {
                    id.insert(key.to_string(), value.clone());
                }
            }
            Some(format!("k:{}", Value::Object(sorted(id))))
        }
    }
}

fn sorted(map: Map<String, Value>) -> Map<String, Value> {
    let mut entries: Vec<_> = map.into_iter().collect();
    entries.sort_by(|(one, _), (other, _)| one.cmp(other));
    entries.into_iter().collect()
}

fn parts<'a>(schema: &Schema, value: &'a Value) -> Parts<'a> {
    match value {
        Value::Object(map) if !schema.atomic => Parts::Map(map),
        Value::Array(all) if schema.list != List::Atomic => {
            let named = all.iter().map(|item| Some((name_of(schema, item)?, item)));
            named.collect::<Option<_>>().map_or(Parts::None, Parts::List)
        }
        _ => Parts::None,
    }
}

/// The fields that a value has.
pub fn fields(schema: &Schema, value: &Value) -> Set {
    let mut set = Set::default();
    match parts(schema, value) {
        Parts::None => set.member = true,
        Parts::Map(map) => {
            set.member = map.is_empty();
            for (name, part) in map {
                let mut below = fields(child(schema, name), part);
                below.member |= is_of_map(schema, name);
                set.children.insert(field(name), below);
            }
        }
        Parts::List(all) => {
            set.member = all.is_empty();
            for (name, item) in all {
                let mut below = fields(items(schema), item);
                below.member = true;
                set.children.insert(name, below);
            }
        }
    }
    set
}

/// How one value differs from another.
#[derive(Debug, Default)]
pub struct Difference {
    /// What is new or another.
    pub changed: Set,
    /// What is gone.
    pub removed: Set,
}

/// How `new` differs from `old`.
pub fn compare(schema: &Schema, old: &Value, new: &Value) -> Difference {
    let mut difference = Difference::default();
    if old == new {
        return difference;
    }
    match (parts(schema, old), parts(schema, new)) {
        (Parts::Map(old), Parts::Map(new)) => {
            for (name, part) in new {
                let schema = child(schema, name);
                let below = match old.get(name) {
                    Some(old) => compare(schema, old, part),
                    None => Difference { changed: added(schema, part), ..Difference::default() },
                };
                difference.put(field(name), below);
            }
            for (name, part) in old.iter().filter(|(name, _)| !new.contains_key(*name)) {
                let mut removed = fields(child(schema, name), part);
                removed.member = true;
                difference.put(field(name), Difference { removed, ..Difference::default() });
            }
        }
        (Parts::List(old), Parts::List(new)) => {
            for (name, item) in &new {
                let below = match old.iter().find(|(other, _)| other == name) {
                    Some((_, old)) => compare(items(schema), old, item),
                    None => {
                        let mut changed = added(items(schema), item);
                        changed.member = true;
                        Difference { changed, ..Difference::default() }
                    }
                };
                difference.put(name.clone(), below);
            }
            for (name, item) in old.iter().filter(|(name, _)| !new.iter().any(|(n, _)| n == name)) {
                let mut removed = fields(items(schema), item);
                removed.member = true;
                difference.put(name.clone(), Difference { removed, ..Difference::default() });
            }
        }
        _ => difference.changed = added(schema, new),
    }
    difference
}

impl Difference {
    fn put(&mut self, name: String, below: Self) {
        if !below.changed.is_empty() {
            self.changed.children.insert(name.clone(), below.changed);
        }
        if !below.removed.is_empty() {
            self.removed.children.insert(name, below.removed);
        }
    }
}

/// The fields of a value that was not there: maps and lists are members themselves.
fn added(schema: &Schema, value: &Value) -> Set {
    let mut set = fields(schema, value);
    set.member |= schema.properties.is_empty();
    set
}

/// A value with what is applied to it.
pub fn merge(schema: &Schema, live: &Value, applied: &Value) -> Value {
    match (parts(schema, live), parts(schema, applied)) {
        (Parts::Map(live), Parts::Map(applied)) => {
            let mut merged = live.clone();
            for (name, part) in applied {
                let next = match live.get(name) {
                    Some(live) => merge(child(schema, name), live, part),
                    None => part.clone(),
                };
                merged.insert(name.clone(), next);
            }
            Value::Object(merged)
        }
        (Parts::List(live), Parts::List(applied)) => {
            let find = |name: &str| applied.iter().find(|(other, _)| other == name);
            let mut merged: Vec<Value> = Vec::new();
            for (name, item) in &live {
                merged.push(match find(name) {
                    Some((_, part)) => merge(items(schema), item, part),
                    None => (*item).clone(),
                });
            }
            let new = applied.iter().filter(|(name, _)| !live.iter().any(|(n, _)| n == name));
            merged.extend(new.map(|(_, item)| (*item).clone()));
            Value::Array(merged)
        }
        _ => applied.clone(),
    }
}

/// A value without the fields of one set, unless another set has them or something below them.
pub fn without(schema: &Schema, value: &Value, gone: &Set, kept: &Set) -> Option<Value> {
    let none = Set::default();
    let below = |name: &str, schema: &Schema, part: &Value| -> Option<Value> {
        let Some(gone) = gone.children.get(name) else { return Some(part.clone()) };
        let kept = kept.children.get(name);
        match kept {
            None if gone.member => None,
            kept => without(schema, part, gone, kept.unwrap_or(&none)),
        }
    };
    let was_filled = |count: usize| count > 0 && !kept.member;
    match parts(schema, value) {
        Parts::None => Some(value.clone()),
        Parts::Map(map) => {
            let left: Map<_, _> = map
                .iter()
                .filter_map(|(name, part)| {
                    Some((name.clone(), below(&field(name), child(schema, name), part)?))
                })
                .collect();
            (!left.is_empty() || !was_filled(map.len())).then_some(Value::Object(left))
        }
        Parts::List(all) => {
            let count = all.len();
            let left: Vec<_> = all
                .into_iter()
                .filter_map(|(name, item)| below(&name, items(schema), item))
                .collect();
            (!left.is_empty() || !was_filled(count)).then_some(Value::Array(left))
        }
    }
}
