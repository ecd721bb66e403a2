//! What of an object Godwit acts on, and what not.

use serde::de::DeserializeOwned;
use serde_json::Value;
use std::fmt;

/// What cannot be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Misfit {
    /// Where: `domain.cpu.cores`. Empty for all of it.
    pub path: String,
    /// What is wrong with it.
    pub why: String,
}

impl Misfit {
    /// Its field, of what is at a field.
    pub fn field(&self, field: &str) -> String {
        match &*self.path {
            "" => field.to_owned(),
            path => format!("{field}.{path}"),
        }
    }
}

impl fmt::Display for Misfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &*self.path {
            "" => f.write_str(&self.why),
            path => write!(f, "{path}: {}", self.why),
        }
    }
}

/// Reads what Godwit knows of a value, and the paths of what it does not: `domain.cpu.numa`,
/// `volumes[2].sysprep`.
///
/// # Errors
/// What is of a wrong type.
pub fn parse<T: DeserializeOwned>(value: &Value) -> Result<(T, Vec<String>), Misfit> {
    let mut unknown = Vec::new();
    let mut note = |path: serde_ignored::Path<'_>| unknown.push(readable(&path.to_string()));
    let reader = serde_ignored::Deserializer::new(value, &mut note);
    let parsed = serde_path_to_error::deserialize(reader).map_err(|error| Misfit {
        path: Some(error.path().to_string()).filter(|path| path != ".").unwrap_or_default(),
        why: error.into_inner().to_string(),
    })?;
    // What says nothing changes nothing.
    unknown.retain(|path| at(value, path).is_none_or(|value| !is_void(value)));
    Ok((parsed, unknown))
}

/// `volumes.2.?.name` as `volumes[2].name`.
fn readable(path: &str) -> String {
    let mut text = String::new();
    for part in path.split('.').filter(|part| *part != "?") {
        match part.parse::<usize>() {
            Ok(index) => text.push_str(&format!("[{index}]")),
            Err(_) if text.is_empty() => text.push_str(part),
            Err(_) => text.push_str(&format!(".{part}")),
        }
    }
    text
}

/// What is at a path as `parse` tells it.
pub fn at<'a>(value: &'a Value, path: &str) -> Option<&'a Value> {
    path.split(['.', '[']).filter(|part| !part.is_empty()).try_fold(value, |value, part| match part
        .strip_suffix(']')
        .map(str::parse::<usize>)
    {
        Some(Ok(index)) => value.get(index),
        _ => value.get(part),
    })
}

fn is_void(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(items) => items.is_empty(),
        _ => false,
    }
}
