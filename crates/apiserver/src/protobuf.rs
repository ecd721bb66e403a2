//! Bodies of requests in Kubernetes' protobuf encoding, which kubectl sends for built-in kinds.
//! Answers are JSON, which every client takes.
//!
//! Source: k8s.io/apimachinery's `runtime/serializer/protobuf`: `k8s\0`, then a
//! `runtime.Unknown` whose `raw` is the object. The fields are in `schemas/protobuf.json`, made by
//! `scripts/protobuf`.

use crate::status::Failure;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::sync::LazyLock;

/// The media type.
pub const MEDIA: &str = "application/vnd.kubernetes.protobuf";
const MAGIC: &[u8] = b"k8s\0";
const DEPTH: usize = 32;

type Fields = BTreeMap<u64, (String, String)>;

static KNOWN: LazyLock<BTreeMap<String, Fields>> = LazyLock::new(|| {
    // A test reads it.
    serde_json::from_slice(include_bytes!("../schemas/protobuf.json")).unwrap_or_default()
});

/// Reads an object.
///
/// # Errors
/// 400 when it is none, 415 when its kind is not known.
pub fn decode(body: &[u8]) -> Result<Value, Failure> {
    let wrong = || Failure::bad_request("the body of the request is not valid protobuf");
    let unknown = body.strip_prefix(MAGIC).ok_or_else(wrong)?;
    let (mut version, mut kind, mut raw) = (String::new(), String::new(), &[][..]);
    for field in (Reader { rest: unknown }).fields().ok_or_else(wrong)? {
        match field {
            (1, Wire::Bytes(meta)) => {
                for part in (Reader { rest: meta }).fields().ok_or_else(wrong)? {
                    match part {
                        (1, Wire::Bytes(text)) => version = utf8(text),
                        (2, Wire::Bytes(text)) => kind = utf8(text),
                        _ => {}
                    }
                }
            }
            (2, Wire::Bytes(object)) => raw = object,
            _ => {}
        }
    }
    let name = definition(&version, &kind);
    let fields = KNOWN.get(&name).ok_or_else(|| {
        Failure::unsupported_media(format!(
            "{kind} of {version} is not known in protobuf; send JSON"
        ))
    })?;
    let mut object = message(fields, raw, DEPTH).ok_or_else(wrong)?;
    object.insert("apiVersion".into(), version.into());
    object.insert("kind".into(), kind.into());
    Ok(Value::Object(object))
}

/// The definition of a kind, in lower case.
fn definition(version: &str, kind: &str) -> String {
    let kind = kind.to_lowercase();
    if kind == "deleteoptions" {
        return "io.k8s.apimachinery.pkg.apis.meta.v1.deleteoptions".into();
    }
    let (group, version) = version.split_once('/').unwrap_or(("core", version));
    // `rbac.authorization.k8s.io` is the package `rbac`.
    let package = group.split('.').next().unwrap_or_default();
    format!("io.k8s.api.{package}.{version}.{kind}")
}

fn utf8(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

enum Wire<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn varint(&mut self) -> Option<u64> {
        let mut value = 0_u64;
        for shift in (0..64).step_by(7) {
            let (byte, rest) = self.rest.split_first()?;
            self.rest = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    fn take(&mut self, count: u64) -> Option<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(usize::try_from(count).ok()?)?;
        self.rest = rest;
        Some(taken)
    }

    fn fields(mut self) -> Option<Vec<(u64, Wire<'a>)>> {
        let mut all = Vec::new();
        while !self.rest.is_empty() {
            let key = self.varint()?;
            let value = match key & 7 {
                0 => Wire::Number(self.varint()?),
                1 => Wire::Number(u64::from_le_bytes(self.take(8)?.try_into().ok()?)),
                2 => {
                    let count = self.varint()?;
                    Wire::Bytes(self.take(count)?)
                }
                5 => Wire::Number(u64::from(u32::from_le_bytes(self.take(4)?.try_into().ok()?))),
                _ => return None,
            };
            all.push((key >> 3, value));
        }
        Some(all)
    }
}

fn message(fields: &Fields, bytes: &[u8], depth: usize) -> Option<Map<String, Value>> {
    let depth = depth.checked_sub(1)?;
    let mut object = Map::new();
    for (number, wire) in (Reader { rest: bytes }).fields()? {
        let Some((name, kind)) = fields.get(&number) else { continue };
        if let Some(of) = kind.strip_prefix("{}") {
            let Wire::Bytes(entry) = wire else { return None };
            let (key, value) = map_entry(of, entry, depth)?;
            if let Some(map) = slot(&mut object, name, json!({})).as_object_mut() {
                map.insert(key, value);
            }
        } else if let Some(of) = kind.strip_prefix('*') {
            let value = single(of, wire, depth)?;
            if let Some(list) = slot(&mut object, name, json!([])).as_array_mut() {
                list.push(value);
            }
        } else {
            let value = single(kind, wire, depth)?;
            match value {
                Value::Object(inner) if name.is_empty() => object.extend(inner),
                value if is_absent(name, &value) => {}
                value => drop(object.insert(name.clone(), value)),
            }
        }
    }
    Some(object)
}

fn slot<'a>(object: &'a mut Map<String, Value>, name: &str, empty: Value) -> &'a mut Value {
    object.entry(name).or_insert(empty)
}

/// Go writes what is zero too; in JSON it would be left out.
fn is_absent(name: &str, value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Number(n) => n.as_i64() == Some(0) && matches!(name, "generation" | "nodePort"),
        _ => false,
    }
}

fn map_entry(of: &str, bytes: &[u8], depth: usize) -> Option<(String, Value)> {
    let mut key = String::new();
    // What is empty is not written.
    let mut value = if of == "s" || of == "y" { "".into() } else { Value::Null };
    for (number, wire) in (Reader { rest: bytes }).fields()? {
        match (number, wire) {
            (1, Wire::Bytes(text)) => key = utf8(text),
            (2, wire) => value = single(of, wire, depth)?,
            _ => {}
        }
    }
    Some((key, value))
}

fn single(kind: &str, wire: Wire<'_>, depth: usize) -> Option<Value> {
    match (kind, wire) {
        ("s", Wire::Bytes(text)) => Some(utf8(text).into()),
        ("y", Wire::Bytes(bytes)) => Some(STANDARD.encode(bytes).into()),
        ("b", Wire::Number(n)) => Some((n != 0).into()),
        // Negative numbers are the two's complement of 64 bits.
        ("i", Wire::Number(n)) => Some(n.cast_signed().into()),
        ("d", Wire::Number(n)) => Some(f64::from_bits(n).into()),
        (kind, Wire::Bytes(bytes)) => of_definition(kind.strip_prefix("m:")?, bytes, depth),
        _ => None,
    }
}

fn of_definition(name: &str, bytes: &[u8], depth: usize) -> Option<Value> {
    let short = name.rsplit('.').next().unwrap_or_default();
    let none = Fields::new();
    let object = message(KNOWN.get(name).unwrap_or(&none), bytes, depth)?;
    let number = |field: &str| object.get(field).and_then(Value::as_i64).unwrap_or(0);
    let text =
        |field: &str| object.get(field).and_then(Value::as_str).unwrap_or_default().to_owned();
    Some(match short {
        "time" | "microtime" => {
            let nanos = i32::try_from(number("nanos")).unwrap_or(0);
            // Go's zero time is long before anything.
            match Timestamp::new(number("seconds"), nanos) {
                Ok(at) if object.contains_key("seconds") && number("seconds") > -62_135_596_800 => {
                    let format = if short == "time" {
                        "%Y-%m-%dT%H:%M:%SZ"
                    } else {
                        "%Y-%m-%dT%H:%M:%S%.6fZ"
                    };
                    at.strftime(format).to_string().into()
                }
                _ => Value::Null,
            }
        }
        "quantity" => text("string").into(),
        "intorstring" if number("type") == 0 => number("intVal").into(),
        "intorstring" => text("strVal").into(),
        "rawextension" | "fieldsv1" => {
            let raw = STANDARD.decode(text("raw")).unwrap_or_default();
            serde_json::from_slice(&raw).unwrap_or_default()
        }
        // A list in a message of its own.
        "extravalue" | "verbs" => object.get("items").cloned().unwrap_or(json!([])),
        _ => Value::Object(object),
    })
}
