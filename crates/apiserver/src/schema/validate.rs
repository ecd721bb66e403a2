//! Whether a value is what its schema says.
//!
//! Source of the messages: kube-openapi's validation and apiextensions' `ConvertToErrorList`.

use super::walk::kind_name;
use super::{Additional, Checks, Kind, List, Schema};
use crate::status::Cause;
use regex::Regex;
use serde_json::Value;
use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap};

/// Causes that are told, at most.
const TOLD: usize = 100;
/// Bytes of a compiled pattern, at most.
const PATTERN: usize = 1 << 20;

impl Schema {
    /// All that is wrong with an object, by itself and as a successor.
    pub fn validate(&self, new: &Value, old: Option<&Value>) -> Vec<Cause> {
        let mut causes = Vec::new();
        walk(self, new, old, "", &mut causes);
        if causes.is_empty()
            && let Some(rules) = &self.compiled
        {
            causes.extend(rules.validate(new, old));
        }
        causes
    }

    /// All that is wrong with a part of an object.
    pub(super) fn validate_part(&self, value: &Value) -> Vec<Cause> {
        let mut causes = Vec::new();
        walk(self, value, None, "", &mut causes);
        causes
    }

    fn accepts(&self, value: &Value) -> bool {
        self.validate_part(value).is_empty()
    }
}

/// A pattern, compiled once in each thread; None if it is none.
pub(super) fn regex(pattern: &str) -> Option<Regex> {
    thread_local! {
        static KNOWN: RefCell<HashMap<Box<str>, Option<Regex>>> = RefCell::default();
    }
    KNOWN.with_borrow_mut(|known| {
        if let Some(found) = known.get(pattern) {
            return found.clone();
        }
        let compiled = regex::RegexBuilder::new(pattern).size_limit(PATTERN).build().ok();
        if known.len() > 1000 {
            known.clear();
        }
        known.insert(pattern.into(), compiled.clone());
        compiled
    })
}

struct Told<'a> {
    at: &'a str,
    causes: &'a mut Vec<Cause>,
}

impl Told<'_> {
    fn add(&mut self, reason: &'static str, message: String) {
        if self.causes.len() < TOLD {
            self.causes.push(Cause { reason, message, field: self.at.to_owned() });
        }
    }

    fn invalid(&mut self, value: &Value, why: &str) {
        self.add("FieldValueInvalid", format!("Invalid value: {value}: {why}"));
    }

    /// As kube-openapi says it.
    fn broken(&mut self, value: &Value, must: &str) {
        let why = format!("{} in body {must}", if self.at.is_empty() { "\"\"" } else { self.at });
        self.invalid(value, &why);
    }
}

fn walk(schema: &Schema, value: &Value, old: Option<&Value>, at: &str, causes: &mut Vec<Cause>) {
    // What was wrong before and has not changed is let be.
    if old == Some(value) {
        return;
    }
    let mut told = Told { at, causes };
    if value.is_null() && schema.nullable {
        return;
    }
    if !fits(schema, value) {
        let wanted = schema.kind.map_or("integer or string", Kind::name);
        let at = if at.is_empty() { "\"\"" } else { at };
        let why = format!("{at} in body must be of type {wanted}: {:?}", kind_name(value));
        return told
            .add("FieldValueTypeInvalid", format!("Invalid value: {:?}: {why}", kind_name(value)));
    }
    check(&schema.checks, value, &mut told);
    match value {
        Value::Object(map) => {
            let step =
                |name: &str| if at.is_empty() { name.to_owned() } else { format!("{at}.{name}") };
            for name in &schema.checks.required {
                if map.get(&**name).is_none_or(|v| v.is_null() && !nullable(schema, name)) {
                    let at = step(name);
                    Told { at: &at, causes }.add("FieldValueRequired", "Required value".into());
                }
            }
            for (name, part) in map {
                let known = match (schema.properties.get(name.as_str()), &schema.additional) {
                    (Some(known), _) => known,
                    (None, Additional::Of(of)) => of,
                    _ => continue,
                };
                walk(known, part, old.and_then(|o| o.get(name)), &step(name), causes);
            }
        }
        Value::Array(all) => {
            duplicates(schema, all, at, causes);
            let Some(items) = &schema.items else { return };
            for (n, item) in all.iter().enumerate() {
                let before = old.and_then(|old| counterpart(schema, old, item));
                walk(items, item, before, &format!("{at}[{n}]"), causes);
            }
        }
        _ => {}
    }
}

fn nullable(schema: &Schema, name: &str) -> bool {
    schema.properties.get(name).is_some_and(|part| part.nullable)
}

fn fits(schema: &Schema, value: &Value) -> bool {
    match schema.kind {
        _ if schema.int_or_string => {
            value.is_string()
                || Kind::Integer.fits(value)
                || schema.kind.is_some_and(|k| k.fits(value))
        }
        Some(kind) => kind.fits(value),
        None => true,
    }
}

/// The element of an older list that an element is the successor of.
fn counterpart<'a>(schema: &Schema, old: &'a Value, item: &Value) -> Option<&'a Value> {
    let old = old.as_array()?;
    match &schema.list {
        List::Map(keys) => old.iter().find(|o| keys.iter().all(|key| o[&**key] == item[&**key])),
        List::Set | List::Atomic => old.iter().find(|o| *o == item),
    }
}

fn duplicates(schema: &Schema, all: &[Value], at: &str, causes: &mut Vec<Cause>) {
    let mut seen = BTreeSet::new();
    for (n, item) in all.iter().enumerate() {
        let key = match &schema.list {
            List::Atomic => return,
            List::Set => item.to_string(),
            List::Map(keys) => {
                let parts = keys.iter().filter_map(|key| Some((&**key, item.get(&**key)?)));
                let parts: std::collections::BTreeMap<_, _> = parts.collect();
                serde_json::to_string(&parts).unwrap_or_default()
            }
        };
        if !seen.insert(key.clone()) {
            let at = format!("{at}[{n}]");
            Told { at: &at, causes }.add("FieldValueDuplicate", format!("Duplicate value: {key}"));
        }
    }
}

fn check(checks: &Checks, value: &Value, told: &mut Told<'_>) {
    if let Some(allowed) = &checks.one_of_values
        && !allowed.contains(value)
    {
        let all: Vec<_> = allowed.iter().map(Value::to_string).collect();
        told.add(
            "FieldValueNotSupported",
            format!("Unsupported value: {value}: supported values: {}", all.join(", ")),
        );
    }
    match value {
        Value::String(text) => check_text(checks, text, value, told),
        Value::Number(number) => {
            if let Some(number) = number.as_f64() {
                check_number(checks, number, value, told);
            }
        }
        Value::Array(all) => {
            let count = all.len() as u64;
            if let Some(most) = checks.items.1.filter(|most| count > *most) {
                told.add(
                    "FieldValueTooMany",
                    format!("Too many: {count}: must have at most {most} items"),
                );
            }
            if let Some(least) = checks.items.0.filter(|least| count < *least) {
                told.broken(value, &format!("should have at least {least} items"));
            }
        }
        Value::Object(map) => {
            let count = map.len() as u64;
            if let Some(most) = checks.properties.1.filter(|most| count > *most) {
                told.add(
                    "FieldValueTooMany",
                    format!("Too many: {count}: must have at most {most} items"),
                );
            }
            if let Some(least) = checks.properties.0.filter(|least| count < *least) {
                told.broken(value, &format!("should have at least {least} properties"));
            }
        }
        Value::Null | Value::Bool(_) => {}
    }
    combined(checks, value, told);
}

fn check_text(checks: &Checks, text: &str, value: &Value, told: &mut Told<'_>) {
    let length = || text.chars().count() as u64;
    if let Some(most) = checks.length.1.filter(|most| length() > *most) {
        told.add("FieldValueTooLong", format!("Too long: may not be more than {most} bytes"));
    }
    if let Some(least) = checks.length.0.filter(|least| length() < *least) {
        told.broken(value, &format!("should be at least {least} chars long"));
    }
    if let Some(pattern) = &checks.pattern
        && !regex(pattern).is_some_and(|regex| regex.is_match(text))
    {
        told.broken(value, &format!("should match '{pattern}'"));
    }
    if let Some(format) = &checks.format
        && !of_format(format, text)
    {
        told.broken(value, &format!("must be of type {format}: {value}"));
    }
}

fn check_number(checks: &Checks, number: f64, value: &Value, told: &mut Told<'_>) {
    if let Some((least, exclusive)) = checks.minimum {
        if exclusive && number <= least {
            told.broken(value, &format!("should be greater than {least}"));
        } else if number < least {
            told.broken(value, &format!("should be greater than or equal to {least}"));
        }
    }
    if let Some((most, exclusive)) = checks.maximum {
        if exclusive && number >= most {
            told.broken(value, &format!("should be less than {most}"));
        } else if number > most {
            told.broken(value, &format!("should be less than or equal to {most}"));
        }
    }
    if let Some(factor) = checks.multiple_of.filter(|f| *f != 0.0)
        && (number / factor).fract() != 0.0
    {
        told.broken(value, &format!("should be a multiple of {factor}"));
    }
    let bounds = match checks.format.as_deref() {
        Some("int32") => f64::from(i32::MIN)..=f64::from(i32::MAX),
        Some("int64") => -9_223_372_036_854_775_808.0..=9_223_372_036_854_775_807.0,
        _ => return,
    };
    if !bounds.contains(&number) {
        let format = checks.format.as_deref().unwrap_or_default();
        told.broken(value, &format!("must be of type integer in the range of {format}"));
    }
}

fn combined(checks: &Checks, value: &Value, told: &mut Told<'_>) {
    for part in &checks.all_of {
        walk(part, value, None, told.at, told.causes);
    }
    if !checks.any_of.is_empty() && !checks.any_of.iter().any(|part| part.accepts(value)) {
        told.broken(&shown(value), "must validate at least one schema (anyOf)");
    }
    if !checks.one_of.is_empty() {
        let fitting = checks.one_of.iter().filter(|part| part.accepts(value)).count();
        if fitting != 1 {
            told.broken(&shown(value), "must validate one and only one schema (oneOf)");
        }
    }
    if checks.not.as_ref().is_some_and(|not| not.accepts(value)) {
        told.broken(&shown(value), "must not validate the schema (not)");
    }
}

/// Large values are not shown.
fn shown(value: &Value) -> Value {
    match value {
        Value::Object(_) => Value::from("object"),
        Value::Array(_) => Value::from("array"),
        other => other.clone(),
    }
}

/// Whether a text is of a format; of one that is not known, it is.
fn of_format(format: &str, text: &str) -> bool {
    use base64::Engine;
    match format {
        "date-time" => text.parse::<jiff::Timestamp>().is_ok(),
        "date" => text.parse::<jiff::civil::Date>().is_ok(),
        "byte" => base64::engine::general_purpose::STANDARD.decode(text).is_ok(),
        "ipv4" => text.parse::<std::net::Ipv4Addr>().is_ok(),
        "ipv6" => text.parse::<std::net::Ipv6Addr>().is_ok(),
        "uuid" | "uuid3" | "uuid4" | "uuid5" => uuid::Uuid::parse_str(text).is_ok(),
        "cidr" => text.split_once('/').is_some_and(|(address, bits)| {
            let most = if address.contains(':') { 128 } else { 32 };
            address.parse::<std::net::IpAddr>().is_ok()
                && bits.parse::<u8>().is_ok_and(|bits| bits <= most)
        }),
        "duration" => regex(r"^[-+]?(\d+(\.\d*)?(ns|us|µs|ms|s|m|h))+$|^0$")
            .is_some_and(|pattern| pattern.is_match(text)),
        _ => true,
    }
}
