//! Nodes from their options: `-blockdev` and `blockdev-reopen`.

use super::{Driver, Graph, Image, Node};
use crate::stub::error::Error;
use serde_json::{Map, Value};

impl Graph {
    /// Adds the node that these options describe.
    ///
    /// # Errors
    /// As QEMU.
    pub fn add(&mut self, options: &Map<String, Value>) -> Result<(), Error> {
        let Some(name) = options.get("node-name").and_then(Value::as_str) else {
            let text = "'node-name' must be specified for the root node";
            return Err(Error::generic(text));
        };
        if self.index(name).is_some() {
            return Err(Error::generic(format!("Duplicate nodes with node-name='{name}'")));
        }
        let read_only = flag(options, "read-only");
        let (driver, size) = match word(options, "driver") {
            "file" | "host_device" => file(options, read_only)?,
            "raw" => {
                let (below, size) = (self.child(options)?, number(options, "size")?);
                let shown = raw_size(size, self.find(&below)?.size)?;
                (Driver::Raw { file: below, size }, shown)
            }
            "throttle" => {
                let below = self.child(options)?;
                let group = word(options, "throttle-group").to_owned();
                if self.group(&group).is_none() {
                    self.add_group(&group, None)?;
                }
                let size = self.find(&below)?.size;
                (Driver::Throttle { file: below, group }, size)
            }
            other => return Err(Error::generic(format!("Unknown driver '{other}'"))),
        };
        let (name, bitmaps) = (name.to_owned(), Vec::new());
        self.nodes.push(Node { name, driver, size, read_only, bitmaps });
        Ok(())
    }

    /// The node below: by name, or described on the spot.
    fn child(&mut self, options: &Map<String, Value>) -> Result<String, Error> {
        match options.get("file") {
            Some(Value::String(name)) => self.find(name).map(|node| node.name.clone()),
            Some(Value::Object(inline)) => {
                let mut inline = inline.clone();
                let name = format!("#block{:03}", self.nodes.len());
                let name = inline.entry("node-name").or_insert(name.into()).clone();
                self.add(&inline)?;
                Ok(name.as_str().unwrap_or_default().to_owned())
            }
            _ => Err(Error::generic("Parameter 'file' is missing")),
        }
    }
}

fn file(options: &Map<String, Value>, read_only: bool) -> Result<(Driver, u64), Error> {
    let Some(path) = options.get("filename").and_then(Value::as_str) else {
        return Err(Error::generic("Parameter 'filename' is missing"));
    };
    let cache = options.get("cache").and_then(Value::as_object);
    let direct = cache.is_some_and(|cache| flag(cache, "direct"));
    let locking = word(options, "locking") != "off";
    let image = Image::open(path, direct, read_only, locking)?;
    let wanted = word(options, "driver") == "host_device";
    if image.device != wanted {
        let text = match wanted {
            true => format!(
                "'host_device' driver requires '{path}' to be either a character or block device"
            ),
            false => format!("'file' driver requires '{path}' to be a regular file"),
        };
        return Err(Error::generic(text));
    }
    let fail = |error| Error::generic(format!("Could not refresh total sector count: {error}"));
    let len = image.len().map_err(fail)?;
    Ok((Driver::File(image), len.next_multiple_of(512)))
}

/// What a raw node shows over `below` bytes.
fn raw_size(size: Option<u64>, below: u64) -> Result<u64, Error> {
    match size {
        None => Ok(below),
        Some(size) if size <= below => Ok(size),
        Some(size) => Err(Error::generic(format!(
            "The sum of offset (0) and size ({size}) has to be smaller or equal to the  \
             actual size of the containing file ({below})"
        ))),
    }
}

/// What a node becomes by new options: its index, driver and size.
///
/// # Errors
/// As QEMU. Only raw nodes are given new options; others only the ones they have.
pub fn reopened(
    graph: &Graph,
    options: &Map<String, Value>,
) -> Result<(usize, Driver, u64), Error> {
    let Some(name) = options.get("node-name").and_then(Value::as_str) else {
        return Err(Error::generic("node-name not specified"));
    };
    let unknown = || Error::generic(format!("Failed to find node with node-name='{name}'"));
    let index = graph.index(name).ok_or_else(unknown)?;
    match &graph.nodes[index].driver {
        Driver::Raw { file, .. } if word(options, "driver") == "raw" => {
            let given = word(options, "file");
            let below = graph.find_node(given)?;
            if given != file {
                return Err(Error::generic("The stub does not change a node's child"));
            }
            let size = number(options, "size")?;
            let shown = raw_size(size, below.size)?;
            Ok((index, Driver::Raw { file: file.clone(), size }, shown))
        }
        Driver::Throttle { .. } if !options.contains_key("throttle-group") => {
            let text = "Option 'throttle-group' cannot be reset to its default value";
            Err(Error::generic(text))
        }
        Driver::Throttle { file, group } if word(options, "throttle-group") == group => {
            let driver = Driver::Throttle { file: file.clone(), group: group.clone() };
            Ok((index, driver, graph.nodes[index].size))
        }
        _ => Err(Error::generic("Cannot change the option 'driver'")),
    }
}

fn word<'a>(options: &'a Map<String, Value>, key: &str) -> &'a str {
    options.get(key).and_then(Value::as_str).unwrap_or_default()
}

/// JSON says true, the command line's other syntax `on`.
fn flag(options: &Map<String, Value>, key: &str) -> bool {
    match options.get(key) {
        Some(Value::String(word)) => word == "on",
        other => other.and_then(Value::as_bool).unwrap_or(false),
    }
}

fn number(options: &Map<String, Value>, key: &str) -> Result<Option<u64>, Error> {
    let value = match options.get(key) {
        None => return Ok(None),
        Some(Value::String(digits)) => digits.parse().ok(),
        Some(value) => value.as_u64(),
    };
    let bad = || Error::generic(format!("Parameter '{key}' expects a size"));
    value.map(Some).ok_or_else(bad)
}
