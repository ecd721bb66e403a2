//! Sets of fields, in the form that `managedFields` has them.
//!
//! Source: kubernetes-sigs/structured-merge-diff's `fieldpath` and its FieldsV1 encoding: `f:` a
//! field, `k:` an element of a list of objects by its keys, `v:` an element of a set, `.` the node
//! itself.

use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// A set of fields: a tree whose nodes are in it or not.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Set {
    /// This node is in the set.
    pub member: bool,
    /// By their encoded names.
    pub children: BTreeMap<String, Set>,
}

/// Depth of a set that clients send.
const DEPTH: usize = 100;

impl Set {
    /// One node.
    pub fn leaf() -> Self {
        Self { member: true, ..Self::default() }
    }

    /// Nothing is in it.
    pub fn is_empty(&self) -> bool {
        !self.member && self.children.values().all(Self::is_empty)
    }

    fn tidy(mut self) -> Self {
        self.children.retain(|_, child| !child.is_empty());
        self
    }

    /// What is in either.
    pub fn union(&self, other: &Self) -> Self {
        let mut both = self.clone();
        both.add(other);
        both
    }

    /// Adds what is in another.
    pub fn add(&mut self, other: &Self) {
        self.member |= other.member;
        for (name, child) in &other.children {
            self.children.entry(name.clone()).or_default().add(child);
        }
    }

    /// What is in this and not in the other.
    pub fn minus(&self, other: &Self) -> Self {
        let children = self.children.iter().map(|(name, child)| {
            let rest = match other.children.get(name) {
                Some(other) => child.minus(other),
                None => child.clone(),
            };
            (name.clone(), rest)
        });
        Self { member: self.member && !other.member, children: children.collect() }.tidy()
    }

    /// What is in this, and neither in the other nor below what is.
    pub fn minus_below(&self, other: &Self) -> Self {
        if other.member {
            return Self::default();
        }
        let children = self.children.iter().map(|(name, child)| {
            let rest = match other.children.get(name) {
                Some(other) => child.minus_below(other),
                None => child.clone(),
            };
            (name.clone(), rest)
        });
        Self { member: self.member, children: children.collect() }.tidy()
    }

    /// What is in both.
    pub fn common(&self, other: &Self) -> Self {
        let children = self.children.iter().filter_map(|(name, child)| {
            Some((name.clone(), child.common(other.children.get(name)?)))
        });
        Self { member: self.member && other.member, children: children.collect() }.tidy()
    }

    /// In the encoding FieldsV1.
    pub fn to_json(&self) -> Value {
        let mut map = Map::new();
        if self.member && !self.children.is_empty() {
            map.insert(".".into(), Value::Object(Map::new()));
        }
        for (name, child) in &self.children {
            map.insert(name.clone(), child.to_json());
        }
        Value::Object(map)
    }

    /// From the encoding FieldsV1; what is not understood is not in it.
    pub fn from_json(value: &Value) -> Self {
        let mut set = Self::parse(value, DEPTH);
        // The root is no field.
        set.member = false;
        set
    }

    fn parse(value: &Value, depth: usize) -> Self {
        let Some(map) = value.as_object() else { return Self::default() };
        let mut set = Self { member: map.is_empty() || map.contains_key("."), ..Self::default() };
        if depth == 0 {
            return set;
        }
        for (name, child) in map.iter().filter(|(name, _)| *name != ".") {
            if matches!(name.as_bytes(), [b'f' | b'k' | b'v' | b'i', b':', ..]) {
                set.children.insert(name.clone(), Self::parse(child, depth - 1));
            }
        }
        set.tidy()
    }

    /// The paths of all that is in it, as people read them.
    pub fn paths(&self) -> Vec<String> {
        let mut all = Vec::new();
        self.collect(&mut String::new(), &mut all);
        all
    }

    fn collect(&self, path: &mut String, all: &mut Vec<String>) {
        if self.member {
            all.push(path.clone());
        }
        for (name, child) in &self.children {
            let length = path.len();
            path.push_str(&shown(name));
            child.collect(path, all);
            path.truncate(length);
        }
    }
}

/// `f:a` is `.a`, `k:{"name":"x"}` is `[name="x"]`, `v:"x"` is `[="x"]`.
fn shown(name: &str) -> String {
    let (kind, rest) = name.split_at(name.len().min(2));
    match kind {
        "f:" => format!(".{rest}"),
        "k:" => {
            let keys: Map<String, Value> = serde_json::from_str(rest).unwrap_or_default();
            let keys: Vec<_> = keys.iter().map(|(key, value)| format!("{key}={value}")).collect();
            format!("[{}]", keys.join(","))
        }
        "v:" => format!("[={rest}]"),
        _ => format!("[{rest}]"),
    }
}

/// The name of a field.
pub fn field(name: &str) -> String {
    format!("f:{name}")
}
