//! Bodies of requests as JSON values: from JSON or YAML, bounded, with the fields that are given
//! twice.

use crate::protobuf;
use crate::status::Failure;
use serde::de::{Deserialize, DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};
use std::cell::RefCell;

/// A value may be nested so deeply; serde_json's own bound is 128.
const DEPTH: usize = 120;

/// A body as it was read.
#[derive(Debug, Clone, PartialEq)]
pub struct Decoded {
    /// The last of fields that were given twice.
    pub value: Value,
    /// Paths of those fields, such as `spec.nodeName`.
    pub duplicates: Vec<String>,
}

/// Reads an object from a body of this media type; none is JSON.
///
/// # Errors
/// 415 for another media type, 400 for what is no object.
pub fn object(media: Option<&str>, body: &[u8]) -> Result<Decoded, Failure> {
    let media = media.unwrap_or("application/json");
    let decoded = match media.split(';').next().unwrap_or_default().trim() {
        "application/json" | "*/*" | "" => json(body)?,
        "application/yaml" => yaml(body)?,
        protobuf::MEDIA => Decoded { value: protobuf::decode(body)?, duplicates: Vec::new() },
        other => {
            return Err(Failure::unsupported_media(format!(
                "the body of the request was in an unknown format - accepted media types include: \
                 application/json, application/yaml; it was {other}"
            )));
        }
    };
    match &decoded.value {
        Value::Object(_) => Ok(decoded),
        _ => Err(Failure::bad_request("the body of the request is not an object")),
    }
}

/// Reads JSON.
///
/// # Errors
/// 400 with the place where it is wrong.
pub fn json(body: &[u8]) -> Result<Decoded, Failure> {
    let fail = |e: serde_json::Error| {
        Failure::bad_request(format!("the body of the request is not valid JSON: {e}"))
    };
    let mut reader = serde_json::Deserializer::from_slice(body);
    let decoded = decode(&mut reader).map_err(fail)?;
    reader.end().map_err(fail)?;
    Ok(decoded)
}

/// Reads one YAML document.
///
/// # Errors
/// 400 with the place where it is wrong.
pub fn yaml(body: &[u8]) -> Result<Decoded, Failure> {
    let text = std::str::from_utf8(body)
        .map_err(|e| Failure::bad_request(format!("the body of the request is not UTF-8: {e}")))?;
    let value = serde_saphyr::from_str::<Value>(text).map_err(|e| {
        Failure::bad_request(format!("the body of the request is not valid YAML: {e}"))
    })?;
    Ok(Decoded { value, duplicates: Vec::new() })
}

fn decode<'de, D: Deserializer<'de>>(reader: D) -> Result<Decoded, D::Error> {
    let seen = RefCell::new(Seen::default());
    let value = Part { seen: &seen, depth: 0 }.deserialize(reader)?;
    Ok(Decoded { value, duplicates: seen.into_inner().duplicates })
}

/// Where the reader is, and what it found.
#[derive(Default)]
struct Seen {
    path: Vec<String>,
    duplicates: Vec<String>,
}

impl Seen {
    fn note(&mut self, field: &str) {
        /// More would only make the warning longer.
        const MOST: usize = 100;
        if self.duplicates.len() < MOST {
            let path = self.path.concat();
            let path = format!("{path}.{field}");
            self.duplicates.push(path.trim_start_matches('.').to_owned());
        }
    }
}

#[derive(Clone, Copy)]
struct Part<'a> {
    seen: &'a RefCell<Seen>,
    depth: usize,
}

impl Part<'_> {
    fn deeper<E: Error>(self) -> Result<Self, E> {
        match self.depth {
            DEPTH => Err(E::custom("it is nested too deeply")),
            depth => Ok(Self { depth: depth + 1, ..self }),
        }
    }
}

impl<'de> DeserializeSeed<'de> for Part<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, reader: D) -> Result<Value, D::Error> {
        reader.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Part<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_some<D: Deserializer<'de>>(self, reader: D) -> Result<Value, D::Error> {
        Value::deserialize(reader)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut reader: A) -> Result<Value, A::Error> {
        let element = self.deeper()?;
        let mut all = Vec::new();
        loop {
            self.seen.borrow_mut().path.push(format!("[{}]", all.len()));
            let next = reader.next_element_seed(element)?;
            self.seen.borrow_mut().path.pop();
            match next {
                Some(value) => all.push(value),
                None => return Ok(Value::Array(all)),
            }
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut reader: A) -> Result<Value, A::Error> {
        let field = self.deeper()?;
        let mut all = Map::new();
        while let Some(name) = reader.next_key::<String>()? {
            self.seen.borrow_mut().path.push(format!(".{name}"));
            let value = reader.next_value_seed(field)?;
            self.seen.borrow_mut().path.pop();
            if all.contains_key(&name) {
                self.seen.borrow_mut().note(&name);
            }
            all.insert(name, value);
        }
        Ok(Value::Object(all))
    }
}
