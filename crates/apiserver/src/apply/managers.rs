//! Who manages which fields: `metadata.managedFields`.

use super::Writer;
use super::set::Set;
use serde_json::{Value, json};

/// Managers that only update, at most; the oldest are merged.
const UPDATERS: usize = 10;
const ANCIENT: &str = "ancient-changes";

/// One entry.
#[derive(Debug, Clone, PartialEq)]
pub struct Manager {
    /// Such as `kubectl`.
    pub name: String,
    /// By apply, else by update.
    pub applies: bool,
    /// In which version it saw the object.
    pub api_version: String,
    /// Through which subresource; empty for none.
    pub subresource: String,
    /// When it last changed something.
    pub time: Option<String>,
    /// What it manages.
    pub fields: Set,
}

impl Manager {
    /// Whether it is who writes now.
    pub fn is(&self, writer: &Writer, applies: bool) -> bool {
        self.name == writer.manager
            && self.applies == applies
            && self.subresource == writer.subresource
            // One that applies is the same in every version.
            && (applies || self.api_version == writer.api_version)
    }

    fn operation(&self) -> &'static str {
        if self.applies { "Apply" } else { "Update" }
    }

    fn to_json(&self) -> Value {
        let mut entry = json!({
            "manager": self.name, "operation": self.operation(), "apiVersion": self.api_version,
            "fieldsType": "FieldsV1", "fieldsV1": self.fields.to_json(),
        });
        if let Some(time) = &self.time {
            entry["time"] = time.as_str().into();
        }
        if !self.subresource.is_empty() {
            entry["subresource"] = self.subresource.as_str().into();
        }
        entry
    }
}

/// The managers of an object.
pub fn read(object: &Value) -> Vec<Manager> {
    let entries = object["metadata"]["managedFields"].as_array();
    let entries = entries.into_iter().flatten().filter(|e| e["fieldsV1"].is_object());
    let text = |entry: &Value, field: &str| entry[field].as_str().unwrap_or_default().to_owned();
    let mut managers: Vec<Manager> = Vec::new();
    for entry in entries {
        let manager = Manager {
            name: text(entry, "manager"),
            applies: entry["operation"] == "Apply",
            api_version: text(entry, "apiVersion"),
            subresource: text(entry, "subresource"),
            time: entry["time"].as_str().map(str::to_owned),
            fields: Set::from_json(&entry["fieldsV1"]),
        };
        let same = |other: &&mut Manager| {
            other.name == manager.name
                && other.applies == manager.applies
                && other.api_version == manager.api_version
                && other.subresource == manager.subresource
        };
        match managers.iter_mut().find(same) {
            Some(other) => other.fields.add(&manager.fields),
            None => managers.push(manager),
        }
    }
    managers
}

/// Writes the managers that manage something, in Kubernetes' order.
pub fn write(object: &mut Value, mut managers: Vec<Manager>) {
    managers.retain(|manager| !manager.fields.is_empty());
    cap(&mut managers);
    let order = |m: &Manager| {
        (
            m.operation(),
            m.time.clone(),
            m.name.clone(),
            m.api_version.clone(),
            m.subresource.clone(),
        )
    };
    managers.sort_by_key(order);
    let entries: Vec<_> = managers.iter().map(Manager::to_json).collect();
    let entries = if entries.is_empty() { Value::Null } else { entries.into() };
    crate::meta::set(object, "managedFields", entries);
}

/// Merges the oldest updaters of each version where there are too many.
fn cap(managers: &mut Vec<Manager>) {
    loop {
        let updaters = || managers.iter().enumerate().filter(|(_, m)| !m.applies);
        if updaters().count() <= UPDATERS {
            return;
        }
        let oldest = updaters()
            .filter(|(_, m)| m.name != ANCIENT)
            .min_by_key(|(_, m)| m.time.clone())
            .map(|(n, _)| n);
        let Some(oldest) = oldest else { return };
        let mut old = managers.remove(oldest);
        let ancient = managers.iter_mut().find(|m| {
            m.name == ANCIENT
                && m.api_version == old.api_version
                && m.subresource == old.subresource
        });
        match ancient {
            Some(ancient) => {
                ancient.fields.add(&old.fields);
                ancient.time = ancient.time.clone().max(old.time);
            }
            None => {
                old.name = ANCIENT.into();
                managers.push(old);
            }
        }
    }
}
