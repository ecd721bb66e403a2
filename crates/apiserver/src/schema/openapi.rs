//! From [`Schema`] back to an OpenAPI v3 schema.

use super::{Additional, List, Schema};
use serde_json::{Map, Value, json};
use std::sync::Arc;

impl Schema {
    /// All parts of it.
    pub(super) fn parts(&self) -> impl Iterator<Item = &Arc<Schema>> {
        let additional = match &self.additional {
            Additional::Of(of) => Some(of),
            Additional::None | Additional::Any => None,
        };
        self.properties.values().chain(additional).chain(&self.items)
    }

    /// It as OpenAPI v3 has it, with Kubernetes' extensions.
    pub fn to_openapi(&self) -> Value {
        let mut map = Map::new();
        let mut put = |name: &str, value: Value| {
            map.insert(name.into(), value);
        };
        if let Some(kind) = self.kind {
            put("type", kind.name().into());
        }
        if let Some(description) = &self.description {
            put("description", (**description).into());
        }
        if let Some(default) = &self.default {
            put("default", default.clone());
        }
        let flags = [
            ("nullable", self.nullable),
            ("x-kubernetes-int-or-string", self.int_or_string),
            ("x-kubernetes-preserve-unknown-fields", self.preserve_unknown),
            ("x-kubernetes-embedded-resource", self.embedded),
            ("uniqueItems", self.checks.unique),
        ];
        for (name, _) in flags.into_iter().filter(|(_, set)| *set) {
            put(name, true.into());
        }
        if !self.properties.is_empty() {
            let parts = self.properties.iter();
            put(
                "properties",
                parts.map(|(name, part)| (name.to_string(), part.to_openapi())).collect(),
            );
        }
        match &self.additional {
            Additional::None => {}
            Additional::Any => put("additionalProperties", true.into()),
            Additional::Of(of) => put("additionalProperties", of.to_openapi()),
        }
        if let Some(items) = &self.items {
            put("items", items.to_openapi());
        }
        match &self.list {
            List::Atomic => {}
            List::Set => put("x-kubernetes-list-type", "set".into()),
            List::Map(keys) => {
                put("x-kubernetes-list-type", "map".into());
                put("x-kubernetes-list-map-keys", keys.iter().map(|k| Value::from(&**k)).collect());
            }
        }
        if self.atomic {
            put("x-kubernetes-map-type", "atomic".into());
        }
        if let Some(key) = &self.strategy.merge {
            put("x-kubernetes-patch-strategy", "merge".into());
            if !key.is_empty() {
                put("x-kubernetes-patch-merge-key", (**key).into());
            }
        }
        if !self.rules.is_empty() {
            put("x-kubernetes-validations", self.rules.clone().into());
        }
        self.put_checks(&mut map);
        Value::Object(map)
    }

    fn put_checks(&self, map: &mut Map<String, Value>) {
        let checks = &self.checks;
        let mut put = |name: &str, value: Option<Value>| {
            if let Some(value) = value {
                map.insert(name.into(), value);
            }
        };
        let required = checks.required.iter().map(|r| Value::from(&**r)).collect::<Vec<_>>();
        put("required", (!required.is_empty()).then(|| required.into()));
        put("enum", checks.one_of_values.clone().map(Value::from));
        put("format", checks.format.as_deref().map(Value::from));
        put("pattern", checks.pattern.as_deref().map(Value::from));
        for (name, exclusive, bound) in [
            ("minimum", "exclusiveMinimum", checks.minimum),
            ("maximum", "exclusiveMaximum", checks.maximum),
        ] {
            put(name, bound.map(|(bound, _)| number(bound)));
            put(exclusive, bound.filter(|(_, exclusive)| *exclusive).map(|_| true.into()));
        }
        put("multipleOf", checks.multiple_of.map(number));
        for (least, most, (low, high)) in [
            ("minLength", "maxLength", checks.length),
            ("minItems", "maxItems", checks.items),
            ("minProperties", "maxProperties", checks.properties),
        ] {
            put(least, low.map(Value::from));
            put(most, high.map(Value::from));
        }
        for (name, parts) in
            [("allOf", &checks.all_of), ("anyOf", &checks.any_of), ("oneOf", &checks.one_of)]
        {
            let parts = || parts.iter().map(|part| part.to_openapi()).collect::<Value>();
            put(name, (!parts().as_array().is_none_or(Vec::is_empty)).then(parts));
        }
        put("not", checks.not.as_ref().map(|not| not.to_openapi()));
    }
}

/// Whole numbers without a point.
fn number(value: f64) -> Value {
    match value.fract() == 0.0 && value.abs() < 9e15 {
        true => json!(value as i64),
        false => json!(value),
    }
}
