//! From `JSONSchemaProps` to [`Schema`], with the rules of structural schemas.

use super::{Additional, Checks, Kind, List, Schema, Strategy};
use crate::status::Cause;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::sync::Arc;

/// A schema may be nested so deeply.
const DEPTH: usize = 64;
/// Parts of one schema, at most.
const SIZE: usize = 50_000;

impl Schema {
    /// Reads the schema of a CRD's version.
    ///
    /// # Errors
    /// All that is wrong with it; fields are relative to it.
    pub fn parse(schema: &Value) -> Result<Self, Vec<Cause>> {
        let mut parser =
            Parser { definitions: None, known: BTreeMap::new(), parts: 0, causes: vec![] };
        if !schema.is_object() {
            parser.wrong("", "FieldValueRequired", "Required value: schemas are required");
            return Err(parser.causes);
        }
        let mut parsed = parser.schema(schema, "", DEPTH, Place::Structure);
        if parsed.kind != Some(Kind::Object) {
            parser.wrong("type", "FieldValueInvalid", "Invalid value: must be object at the root");
        }
        super::rules::check(&parsed, "", &mut parser.causes);
        match parser.causes.is_empty() {
            true => {
                parsed.compiled = super::Rules::compile(&parsed);
                Ok(parsed)
            }
            false => Err(parser.causes),
        }
    }

    /// Reads a definition that others refer to: those of the built-in kinds.
    pub(super) fn of_definition(
        definitions: &Map<String, Value>,
        name: &str,
        known: &mut BTreeMap<String, Arc<Schema>>,
    ) -> Option<Arc<Self>> {
        let mut parser = Parser {
            definitions: Some(definitions),
            known: std::mem::take(known),
            parts: 0,
            causes: vec![],
        };
        let found = parser.definition(name, DEPTH);
        *known = parser.known;
        found
    }
}

/// Where a schema stands: what gives a structure, or what only bounds values of one.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Structure,
    Bounds,
}

struct Parser<'a> {
    definitions: Option<&'a Map<String, Value>>,
    known: BTreeMap<String, Arc<Schema>>,
    parts: usize,
    causes: Vec<Cause>,
}

impl Parser<'_> {
    fn wrong(&mut self, at: &str, reason: &'static str, message: &str) {
        const MOST: usize = 100;
        if self.causes.len() < MOST {
            self.causes.push(Cause { reason, message: message.into(), field: at.into() });
        }
    }

    fn invalid(&mut self, at: &str, why: &str) {
        self.wrong(at, "FieldValueInvalid", &format!("Invalid value: {why}"));
    }

    fn forbidden(&mut self, at: &str, why: &str) {
        self.wrong(at, "FieldValueForbidden", &format!("Forbidden: {why}"));
    }

    fn definition(&mut self, name: &str, depth: usize) -> Option<Arc<Schema>> {
        if let Some(known) = self.known.get(name) {
            return Some(known.clone());
        }
        let definition = self.definitions?.get(name)?;
        // What refers to itself is not looked into a second time.
        let open = Schema { preserve_unknown: true, ..Schema::default() };
        self.known.insert(name.into(), Arc::new(open));
        let schema = Arc::new(self.schema(definition, "", depth, Place::Structure));
        self.known.insert(name.into(), schema.clone());
        Some(schema)
    }

    fn part(&mut self, value: &Value, at: &str, depth: usize, place: Place) -> Arc<Schema> {
        if let Some(reference) = value["$ref"].as_str() {
            let name = reference.rsplit('/').next().unwrap_or_default();
            if let Some(found) = self.definition(name, depth) {
                return found;
            }
            self.forbidden(&field(at, "$ref"), "$ref is not supported");
        }
        Arc::new(self.schema(value, at, depth, place))
    }

    fn schema(&mut self, value: &Value, at: &str, depth: usize, place: Place) -> Schema {
        self.parts += 1;
        let Some(map) = value.as_object() else {
            self.invalid(at, "a schema is an object");
            return Schema::default();
        };
        if depth == 0 || self.parts > SIZE {
            self.invalid(at, "the schema is too deep or too large");
            return Schema::default();
        }
        let flag = |name: &str| map.get(name) == Some(&Value::Bool(true));
        let mut schema = Schema {
            kind: self.kind(map, at),
            nullable: flag("nullable"),
            int_or_string: flag("x-kubernetes-int-or-string"),
            preserve_unknown: flag("x-kubernetes-preserve-unknown-fields"),
            embedded: flag("x-kubernetes-embedded-resource"),
            default: map.get("default").cloned(),
            list: self.list(map, at),
            atomic: map.get("x-kubernetes-map-type").is_some_and(|t| t == "atomic"),
            strategy: strategy(map),
            rules: map
                .get("x-kubernetes-validations")
                .and_then(Value::as_array)
                .cloned()
                .unwrap_or_default(),
            description: map.get("description").and_then(Value::as_str).map(Into::into),
            ..Schema::default()
        };
        for (name, part) in map.get("properties").and_then(Value::as_object).into_iter().flatten() {
            let at = field(&field(at, "properties"), name);
            let part = self.part(part, &at, depth - 1, place);
            schema.properties.insert(name.as_str().into(), part);
        }
        schema.additional = match map.get("additionalProperties") {
            None | Some(Value::Bool(false)) => Additional::None,
            Some(Value::Bool(true)) => Additional::Any,
            Some(of) => {
                Additional::Of(self.part(of, &field(at, "additionalProperties"), depth - 1, place))
            }
        };
        schema.items = match map.get("items") {
            None | Some(Value::Null) => None,
            Some(Value::Array(_)) => {
                self.forbidden(
                    &field(at, "items"),
                    "items must be a schema object and not an array",
                );
                None
            }
            Some(of) => Some(self.part(of, &field(at, "items"), depth - 1, place)),
        };
        schema.checks = self.checks(map, at, depth);
        if self.definitions.is_none() {
            self.structural(map, &schema, at, place);
        }
        schema
    }

    fn kind(&mut self, map: &Map<String, Value>, at: &str) -> Option<Kind> {
        match map.get("type")?.as_str()? {
            "object" => Some(Kind::Object),
            "array" => Some(Kind::Array),
            "string" => Some(Kind::String),
            "integer" => Some(Kind::Integer),
            "number" => Some(Kind::Number),
            "boolean" => Some(Kind::Boolean),
            "" => None,
            other => {
                self.wrong(
                    &field(at, "type"),
                    "FieldValueNotSupported",
                    &format!(
                        "Unsupported value: {other:?}: supported values: \"array\", \"boolean\", \
                         \"integer\", \"number\", \"object\", \"string\""
                    ),
                );
                None
            }
        }
    }

    fn list(&mut self, map: &Map<String, Value>, at: &str) -> List {
        let keys = map.get("x-kubernetes-list-map-keys").and_then(Value::as_array);
        let keys: Vec<Box<str>> =
            keys.into_iter().flatten().filter_map(Value::as_str).map(Into::into).collect();
        match map.get("x-kubernetes-list-type").and_then(Value::as_str) {
            None | Some("atomic") => List::Atomic,
            Some("set") => List::Set,
            Some("map") => {
                if keys.is_empty() && self.definitions.is_none() {
                    self.wrong(
                        &field(at, "x-kubernetes-list-map-keys"),
                        "FieldValueRequired",
                        "Required value: must not be empty if x-kubernetes-list-type is map",
                    );
                }
                List::Map(keys)
            }
            Some(other) => {
                self.wrong(
                    &field(at, "x-kubernetes-list-type"),
                    "FieldValueNotSupported",
                    &format!(
                        "Unsupported value: {other:?}: supported values: \"atomic\", \"map\", \"set\""
                    ),
                );
                List::Atomic
            }
        }
    }

    fn checks(&mut self, map: &Map<String, Value>, at: &str, depth: usize) -> Checks {
        let count = |name: &str| map.get(name).and_then(Value::as_u64);
        let number = |name: &str| map.get(name).and_then(Value::as_f64);
        let flag = |name: &str| map.get(name) == Some(&Value::Bool(true));
        let required = map.get("required").and_then(Value::as_array);
        let several = |name: &str, parser: &mut Self| -> Vec<Arc<Schema>> {
            let all =
                map.get(name).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
            let parts = all.iter().enumerate();
            parts
                .map(|(n, part)| {
                    parser.part(
                        part,
                        &format!("{}[{n}]", field(at, name)),
                        depth - 1,
                        Place::Bounds,
                    )
                })
                .collect()
        };
        if let Some(pattern) = map.get("pattern").and_then(Value::as_str)
            && super::validate::regex(pattern).is_none()
        {
            self.invalid(
                &field(at, "pattern"),
                &format!("{pattern:?}: must be a valid regular expression"),
            );
        }
        Checks {
            required: required
                .into_iter()
                .flatten()
                .filter_map(Value::as_str)
                .map(Into::into)
                .collect(),
            one_of_values: map.get("enum").and_then(Value::as_array).cloned(),
            format: map.get("format").and_then(Value::as_str).map(Into::into),
            pattern: map.get("pattern").and_then(Value::as_str).map(Into::into),
            minimum: number("minimum").map(|m| (m, flag("exclusiveMinimum"))),
            maximum: number("maximum").map(|m| (m, flag("exclusiveMaximum"))),
            multiple_of: number("multipleOf"),
            length: (count("minLength"), count("maxLength")),
            items: (count("minItems"), count("maxItems")),
            properties: (count("minProperties"), count("maxProperties")),
            unique: flag("uniqueItems"),
            all_of: several("allOf", self),
            any_of: several("anyOf", self),
            one_of: several("oneOf", self),
            not: map
                .get("not")
                .filter(|not| !not.is_null())
                .map(|not| self.part(not, &field(at, "not"), depth - 1, Place::Bounds)),
        }
    }

    /// The rules of apiextensions' `ValidateStructural`.
    fn structural(&mut self, map: &Map<String, Value>, schema: &Schema, at: &str, place: Place) {
        for unsupported in [
            "$ref",
            "definitions",
            "dependencies",
            "patternProperties",
            "additionalItems",
            "id",
            "$schema",
        ] {
            if map.contains_key(unsupported) {
                self.forbidden(&field(at, unsupported), &format!("{unsupported} is not supported"));
            }
        }
        if schema.checks.unique {
            self.forbidden(
                &field(at, "uniqueItems"),
                "uniqueItems cannot be set to true since the runtime complexity becomes quadratic",
            );
        }
        if place == Place::Bounds {
            return self.bounds_only(map, schema, at);
        }
        if schema.kind.is_none() && !schema.int_or_string && !schema.preserve_unknown {
            let what = if at.is_empty() {
                "must not be empty at the root"
            } else {
                "must not be empty for specified object fields"
            };
            self.wrong(
                &field(at, "type"),
                "FieldValueRequired",
                &format!("Required value: {what}"),
            );
        }
        if schema.kind == Some(Kind::Array) && schema.items.is_none() {
            self.wrong(
                &field(at, "items"),
                "FieldValueRequired",
                "Required value: must be specified",
            );
        }
        if !schema.properties.is_empty() && !matches!(schema.additional, Additional::None) {
            self.forbidden(
                &field(at, "additionalProperties"),
                "additionalProperties and properties are mutual exclusive",
            );
        }
        if schema.embedded && schema.kind != Some(Kind::Object) {
            self.invalid(
                &field(at, "type"),
                "must be object if x-kubernetes-embedded-resource is true",
            );
        }
        if schema.embedded && !schema.preserve_unknown && schema.properties.is_empty() {
            self.wrong(&field(at, "properties"), "FieldValueRequired", "Required value: must not be empty if x-kubernetes-embedded-resource is true without x-kubernetes-preserve-unknown-fields");
        }
        if schema.list != List::Atomic && schema.kind != Some(Kind::Array) {
            self.invalid(
                &field(at, "type"),
                "must be array if x-kubernetes-list-type is specified",
            );
        }
        if let List::Map(keys) = &schema.list {
            self.list_keys(schema, keys, at);
        }
        if let Some(default) = &schema.default {
            self.check_default(schema, default, at);
        }
    }

    fn list_keys(&mut self, schema: &Schema, keys: &[Box<str>], at: &str) {
        let Some(items) = schema.items.clone() else { return };
        for (n, key) in keys.iter().enumerate() {
            let at_key = format!("{}[{n}]", field(at, "x-kubernetes-list-map-keys"));
            match items.properties.get(key) {
                None => self.invalid(
                    &at_key,
                    &format!("{key:?}: entries must all be names of item properties"),
                ),
                Some(part) if part.default.is_none() && !items.checks.required.contains(key) => {
                    self.wrong(
                        &field(&field(&field(at, "items"), "properties"), &format!("{key}.default")),
                        "FieldValueRequired",
                        "Required value: this property is in x-kubernetes-list-map-keys, so it must have a default or be a required property",
                    );
                }
                Some(_) => {}
            }
        }
    }

    fn check_default(&mut self, schema: &Schema, default: &Value, at: &str) {
        let at = field(at, "default");
        let mut pruned = default.clone();
        if !super::walk::prune_part(schema, &mut pruned).is_empty() {
            self.invalid(&at, "must not have unknown fields");
        }
        let without = Schema { default: None, ..schema.clone() };
        for cause in without.validate_part(default) {
            self.wrong(&format!("{at}{}", cause.field), cause.reason, &cause.message);
        }
    }

    /// What only bounds values says nothing of their structure.
    fn bounds_only(&mut self, map: &Map<String, Value>, schema: &Schema, at: &str) {
        for forbidden in [
            "additionalProperties",
            "description",
            "default",
            "nullable",
            "title",
            "x-kubernetes-preserve-unknown-fields",
            "x-kubernetes-embedded-resource",
        ] {
            if map.get(forbidden).is_some_and(|v| *v != Value::Bool(false)) {
                self.forbidden(&field(at, forbidden), "must be undefined to be structural");
            }
        }
        if schema.kind.is_some() && !int_or_string_part(map) {
            self.forbidden(&field(at, "type"), "must be empty to be structural");
        }
    }
}

/// `anyOf: [{type: integer}, {type: string}]` is the one place where types may stand.
fn int_or_string_part(map: &Map<String, Value>) -> bool {
    matches!(map.get("type").and_then(Value::as_str), Some("integer" | "string")) && map.len() == 1
}

fn strategy(map: &Map<String, Value>) -> Strategy {
    let text = |name: &str| map.get(name).and_then(Value::as_str);
    let strategies = text("x-kubernetes-patch-strategy").unwrap_or_default();
    let has = |name: &str| strategies.split(',').any(|s| s == name);
    Strategy {
        merge: has("merge")
            .then(|| text("x-kubernetes-patch-merge-key").unwrap_or_default().into()),
        retain_keys: has("retainKeys"),
    }
}

fn field(at: &str, name: &str) -> String {
    if at.is_empty() { name.to_owned() } else { format!("{at}.{name}") }
}
