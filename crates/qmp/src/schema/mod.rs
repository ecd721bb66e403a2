//! What the QEMU at hand can do, as it says itself in `query-qmp-schema`.
//!
//! [`Schema`] answers "does this QEMU know that command, that argument, that event?", which is
//! better than any comparison of versions. [`check_all`] holds every command and event of this
//! crate against it:
//!
//! - arguments: each member that we can send exists and takes the kind of value that we send, and
//!   no mandatory member is missing;
//! - replies and events: what QEMU sends at the very least parses, so nothing that we rely on is
//!   optional or gone; and each member that we read exists.

use std::collections::HashMap;

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

mod check;
mod table;

pub use check::{Checker, Problem};
pub use table::check_all;

/// One entry of `query-qmp-schema`: a command, an event, or a type by its number.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct SchemaInfo {
    /// Its name.
    pub name: String,
    /// What it is; decides which of the other members are given.
    pub meta_type: MetaType,
    /// Builtin: its type in JSON.
    #[serde(default)]
    pub json_type: Option<String>,
    /// Array: the type of its elements.
    #[serde(default)]
    pub element_type: Option<String>,
    /// Command, event: the type of its arguments.
    #[serde(default)]
    pub arg_type: Option<String>,
    /// Command: the type of its reply.
    #[serde(default)]
    pub ret_type: Option<String>,
    /// Object, enum, alternate: its members.
    #[serde(default)]
    pub members: Vec<Member>,
    /// Enum of a QEMU before 6.2: its values.
    #[serde(default)]
    pub values: Vec<String>,
    /// Object: the member whose value chooses the variant.
    #[serde(default)]
    pub tag: Option<String>,
    /// Object: the members that come with each value of `tag`.
    #[serde(default)]
    pub variants: Vec<Variant>,
}

open_enum! {
    /// What a [`SchemaInfo`] is.
    MetaType {
        Builtin = "builtin",
        Enum = "enum",
        Array = "array",
        Object = "object",
        Alternate = "alternate",
        Command = "command",
        Event = "event",
    }
}

/// A member of an object (name and type), an enum (name) or an alternate (type).
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Member {
    /// Its name.
    #[serde(default)]
    pub name: String,
    /// Its type.
    #[serde(default, rename = "type")]
    pub type_name: String,
    /// Whether it may be left out.
    #[serde(default, rename = "default", deserialize_with = "is_given", skip_serializing)]
    pub optional: bool,
}

/// The members that come with one value of an object's tag.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Variant {
    /// The value.
    pub case: String,
    /// The type that has the members.
    #[serde(rename = "type")]
    pub type_name: String,
}

// The member's presence says it; its value is always null so far.
fn is_given<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    Value::deserialize(deserializer).map(|_| true)
}

/// The reply to `query-qmp-schema`, to be asked.
#[derive(Debug, Clone)]
pub struct Schema {
    entries: HashMap<String, SchemaInfo>,
}

impl From<Vec<SchemaInfo>> for Schema {
    fn from(entries: Vec<SchemaInfo>) -> Self {
        Self { entries: entries.into_iter().map(|entry| (entry.name.clone(), entry)).collect() }
    }
}

impl Schema {
    /// Whether this QEMU knows the command.
    pub fn has_command(&self, name: &str) -> bool {
        self.find(name, MetaType::Command).is_some()
    }

    /// Whether this QEMU sends the event.
    pub fn has_event(&self, name: &str) -> bool {
        self.find(name, MetaType::Event).is_some()
    }

    /// Whether the command takes the argument, in whatever variant.
    pub fn has_argument(&self, command: &str, argument: &str) -> bool {
        let arguments = self.find(command, MetaType::Command).and_then(|c| c.arg_type.as_deref());
        let Some(object) = arguments.and_then(|name| self.entries.get(name)) else {
            return false;
        };
        let variants = object.variants.iter().filter_map(|v| self.entries.get(&v.type_name));
        std::iter::once(object)
            .chain(variants)
            .any(|object| object.members.iter().any(|member| member.name == argument))
    }

    fn find(&self, name: &str, meta_type: MetaType) -> Option<&SchemaInfo> {
        self.entries.get(name).filter(|entry| entry.meta_type == meta_type)
    }

    fn get(&self, name: &str) -> Option<&SchemaInfo> {
        self.entries.get(name)
    }
}

impl SchemaInfo {
    fn enum_values(&self) -> impl Iterator<Item = &str> {
        let members = self.members.iter().map(|member| member.name.as_str());
        members.chain(self.values.iter().map(String::as_str))
    }
}
