//! What of an object Godwit acts on, and what not.

use serde::de::DeserializeOwned;
use serde_json::Value;

/// Reads what Godwit knows of a value, and the paths of what it does not: `domain.cpu.numa`,
/// `volumes[2].sysprep`.
///
/// # Errors
/// What is of a wrong type.
pub fn parse<T: DeserializeOwned>(value: &Value) -> Result<(T, Vec<String>), String> {
    let mut unknown = Vec::new();
    let mut note = |path: serde_ignored::Path<'_>| unknown.push(readable(&path.to_string()));
    let parsed = serde_ignored::deserialize(value, &mut note).map_err(|error| error.to_string())?;
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

/// What is at a path of [`readable`]'s kind.
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
