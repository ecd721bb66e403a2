//! `block-dirty-bitmap-*` and `transaction`.

use super::{Graph, Node};
use crate::stub::bitmap::Bitmap;
use crate::stub::error::Error;
use serde_json::{Map, Value};

/// QEMU's longest name of a bitmap, in bytes.
const LONGEST_NAME: usize = 1023;
/// Bytes per bit when none is asked for: raw nodes have no clusters.
const GRANULARITY: u64 = 65536;

type Arguments = Map<String, Value>;

/// What of an action is left for the end of its transaction.
type Removal = (String, String);

impl Graph {
    /// Does one action now. `action` is the command's name.
    ///
    /// # Errors
    /// As QEMU; then nothing has changed.
    pub fn bitmap_command(&mut self, action: &str, arguments: &Arguments) -> Result<(), Error> {
        let removal = self.prepare(action, arguments)?;
        self.commit(removal);
        Ok(())
    }

    /// Does all actions or none. N.B. the caller holds the graph: no write comes between.
    ///
    /// # Errors
    /// Of the first action that fails.
    pub fn transaction(&mut self, actions: &[Value]) -> Result<(), Error> {
        let before: Vec<_> = self.nodes.iter().map(|node| node.bitmaps.clone()).collect();
        let mut removals = Vec::new();
        for action in actions {
            let data = action["data"].as_object().cloned().unwrap_or_default();
            match self.prepare(action["type"].as_str().unwrap_or_default(), &data) {
                Ok(removal) => removals.extend(removal),
                Err(error) => {
                    for (node, bitmaps) in self.nodes.iter_mut().zip(before) {
                        node.bitmaps = bitmaps;
                    }
                    return Err(error);
                }
            }
        }
        removals.into_iter().for_each(|removal| self.commit(Some(removal)));
        Ok(())
    }

    fn commit(&mut self, removal: Option<Removal>) {
        if let Some((node, name)) = removal
            && let Ok(node) = self.find_mut(&node)
        {
            node.bitmaps.retain(|bitmap| bitmap.name != name);
        }
    }

    /// N.B. a removed bitmap goes only when its transaction ends: its name is taken until then.
    fn prepare(&mut self, action: &str, arguments: &Arguments) -> Result<Option<Removal>, Error> {
        let text = |key: &str| arguments.get(key).and_then(Value::as_str).unwrap_or_default();
        let (node, name) = (text("node"), text("name"));
        match action {
            "block-dirty-bitmap-add" => add(self.find_mut(node)?, name, arguments)?,
            "block-dirty-bitmap-remove" => {
                idle(self.find_mut(node)?, name)?;
                return Ok(Some((node.to_owned(), name.to_owned())));
            }
            "block-dirty-bitmap-clear" => idle(self.find_mut(node)?, name)?.clear(),
            "block-dirty-bitmap-enable" => idle(self.find_mut(node)?, name)?.recording = true,
            "block-dirty-bitmap-disable" => idle(self.find_mut(node)?, name)?.recording = false,
            "block-dirty-bitmap-merge" => self.merge(node, text("target"), arguments)?,
            "abort" => return Err(Error::generic("Transaction aborted using Abort action")),
            other => return Err(Error::generic(format!("The stub does not do '{other}'"))),
        }
        Ok(None)
    }

    fn merge(&mut self, node: &str, target: &str, arguments: &Arguments) -> Result<(), Error> {
        let mut merged = idle(self.find_mut(node)?, target)?.clone();
        for source in arguments.get("bitmaps").and_then(Value::as_array).into_iter().flatten() {
            let (from, name) = match source {
                Value::String(name) => (node, name.as_str()),
                other => (
                    other["node"].as_str().unwrap_or_default(),
                    other["name"].as_str().unwrap_or_default(),
                ),
            };
            merged.merge(idle(self.find_mut(from)?, name)?);
        }
        *idle(self.find_mut(node)?, target)? = merged;
        Ok(())
    }
}

fn add(node: &mut Node, name: &str, arguments: &Arguments) -> Result<(), Error> {
    let flag = |key: &str| arguments.get(key).and_then(Value::as_bool).unwrap_or(false);
    if name.is_empty() {
        return Err(Error::generic("Bitmap name cannot be empty"));
    }
    let granularity = match arguments.get("granularity") {
        None => GRANULARITY,
        Some(value) => {
            let small = value.as_u64().filter(|value| *value <= u32::MAX.into());
            small.ok_or_else(|| Error::generic("Parameter 'granularity' expects uint32_t"))?
        }
    };
    if granularity < 512 || !granularity.is_power_of_two() {
        return Err(Error::generic("Granularity must be power of 2 and at least 512"));
    }
    if flag("persistent") {
        let text =
            format!("Can't store persistent bitmaps to {}: Operation not supported", node.name);
        return Err(Error::generic(text));
    }
    if node.bitmaps.iter().any(|bitmap| bitmap.name == name) {
        return Err(Error::generic(format!("Bitmap already exists: {name}")));
    }
    if name.len() > LONGEST_NAME {
        return Err(Error::generic(format!("Bitmap name too long: {name}")));
    }
    node.bitmaps.insert(0, Bitmap::new(name, node.size, granularity, !flag("disabled")));
    Ok(())
}

/// A bitmap that no export shows.
fn idle<'a>(node: &'a mut Node, name: &str) -> Result<&'a mut Bitmap, Error> {
    match node.bitmaps.iter_mut().find(|bitmap| bitmap.name == name) {
        None => Err(Error::generic(format!("Dirty bitmap '{name}' not found"))),
        Some(bitmap) if bitmap.is_busy() => Err(Error::generic(format!(
            "Bitmap '{name}' is currently in use by another operation and cannot be used"
        ))),
        Some(bitmap) => Ok(bitmap),
    }
}
