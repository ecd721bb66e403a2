//! Holds the structs of this crate against a schema, by values: what we would send is looked up
//! member by member, and what QEMU may send is made up from the schema and parsed.

use std::{fmt::Display, time::Duration};

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::{MetaType, Schema, SchemaInfo};
use crate::{Command, Event, Typed};

/// Something that this crate takes for granted and the QEMU at hand does not have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{subject}: {what}")]
pub struct Problem {
    /// The command or event.
    pub subject: &'static str,
    /// What is wrong.
    pub what: String,
}

/// Which of its members a made-up value has.
#[derive(Clone, Copy, PartialEq)]
enum Extent {
    Mandatory,
    All,
}

/// Collects [`Problem`]s. For commands outside this crate; its own are in
/// [`check_all`](super::check_all).
pub struct Checker<'a> {
    schema: &'a Schema,
    problems: Vec<Problem>,
}

impl<'a> Checker<'a> {
    /// A checker that found nothing yet.
    pub fn new(schema: &'a Schema) -> Self {
        Self { schema, problems: Vec::new() }
    }

    /// All that was found.
    pub fn into_problems(self) -> Vec<Problem> {
        self.problems
    }

    /// Checks a command by a sample that gives every member; `newer` names the members, of
    /// arguments and reply, that an old supported QEMU may lack.
    pub fn command<C: Command>(&mut self, sample: C, newer: &[&str])
    where
        C::Return: Serialize,
    {
        let subject = C::NAME;
        let Some(command) = self.schema.find(subject, MetaType::Command) else {
            return self.report(subject, "this QEMU does not know it");
        };
        let mut found = Vec::new();
        if let Some(arguments) = &command.arg_type {
            match serde_json::to_value(&sample) {
                Ok(Value::Null) => self.compare(&json!({}), arguments, true, "", &mut found),
                Ok(sample) => self.compare(&sample, arguments, true, "", &mut found),
                Err(error) => found.push((String::new(), error.to_string())),
            }
        }
        if let Some(reply) = &command.ret_type {
            self.check_reply::<C::Return>(reply, &mut found);
        }
        for (member, what) in found {
            if !newer.contains(&member.as_str()) {
                self.report(subject, what);
            }
        }
    }

    /// Checks that a command exists whose arguments depend on more than its name.
    pub fn free_command<C: Command>(&mut self) {
        if !self.schema.has_command(C::NAME) {
            self.report(C::NAME, "this QEMU does not know it");
        }
    }

    /// Checks an event that [`Event::typed`] knows.
    pub fn event(&mut self, name: &'static str) {
        let Some(event) = self.schema.find(name, MetaType::Event) else {
            return self.report(name, "this QEMU does not send it");
        };
        let data = event.arg_type.as_deref();
        for extent in [Extent::Mandatory, Extent::All] {
            let data = data.map(|data| self.make_up(data, extent, &mut Vec::new()));
            let event = Event {
                name: name.into(),
                data: data.unwrap_or_default(),
                timestamp: Duration::ZERO,
            };
            match event.typed() {
                Ok(Typed::Other) => self.report(name, "this crate does not know it"),
                Ok(_) => {}
                Err(error) => self.report(name, error),
            }
        }
    }

    fn report(&mut self, subject: &'static str, what: impl Display) {
        self.problems.push(Problem { subject, what: what.to_string() });
    }

    fn check_reply<R>(&self, reply: &str, found: &mut Found)
    where
        R: serde::de::DeserializeOwned + Serialize,
    {
        let least = self.make_up(reply, Extent::Mandatory, &mut Vec::new());
        if let Err(error) = serde_json::from_value::<R>(least) {
            found.push((String::new(), format!("its least reply does not parse: {error}")));
        }
        let all = self.make_up(reply, Extent::All, &mut Vec::new());
        // What we read of a full reply, written again, has exactly the members that we know.
        match serde_json::from_value::<R>(all).and_then(serde_json::to_value) {
            Ok(known) => self.compare(&known, reply, false, "", found),
            Err(error) => {
                found.push((String::new(), format!("its full reply does not parse: {error}")));
            }
        }
    }

    /// Looks up each member of `value` in a type; `sent` if it also has to have the mandatory ones.
    fn compare(&self, value: &Value, type_name: &str, sent: bool, path: &str, found: &mut Found) {
        let Some(entry) = self.schema.get(type_name) else {
            return found.push((path.into(), format!("the schema lacks type {type_name}")));
        };
        let fits = match (&entry.meta_type, value) {
            (MetaType::Object, Value::Object(object)) => {
                self.compare_object(object, entry, sent, path, found);
                true
            }
            (MetaType::Array, Value::Array(elements)) => {
                let element = entry.element_type.as_deref().unwrap_or_default();
                for value in elements {
                    self.compare(value, element, sent, path, found);
                }
                true
            }
            (MetaType::Alternate, value) => {
                let fitting = entry.members.iter().find(|m| self.is_kind(value, &m.type_name));
                if let Some(member) = fitting {
                    self.compare(value, &member.type_name, sent, path, found);
                }
                fitting.is_some()
            }
            (MetaType::Enum, Value::String(name)) => entry.enum_values().any(|one| one == name),
            _ => self.is_kind(value, type_name),
        };
        if !fits {
            found.push((path.into(), format!("`{path}` cannot be {value}")));
        }
    }

    fn compare_object(
        &self,
        object: &Map<String, Value>,
        entry: &SchemaInfo,
        sent: bool,
        path: &str,
        found: &mut Found,
    ) {
        let members: Vec<_> = self.members_of(object, entry).collect();
        for (name, value) in object {
            let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
            match members.iter().find(|member| member.name == *name) {
                // What is not there was not read.
                Some(_) if value.is_null() && !sent => {}
                Some(member) => self.compare(value, &member.type_name, sent, &path, found),
                None => found.push((path.clone(), format!("there is no member `{path}`"))),
            }
        }
        for member in members.iter().filter(|member| sent && !member.optional) {
            if !object.contains_key(&member.name) {
                found.push((path.into(), format!("`{path}` must have `{}`", member.name)));
            }
        }
    }

    /// The members of an object's type, with those of the variant that its tag chooses.
    fn members_of<'s>(
        &'s self,
        object: &Map<String, Value>,
        entry: &'s SchemaInfo,
    ) -> impl Iterator<Item = &'s super::Member> {
        let tag = entry.tag.as_ref().and_then(|tag| object.get(tag)?.as_str());
        let variant = entry.variants.iter().find(|variant| Some(&*variant.case) == tag);
        let variant = variant.and_then(|variant| self.schema.get(&variant.type_name));
        entry.members.iter().chain(variant.into_iter().flat_map(|variant| &variant.members))
    }

    /// Whether a value is of the kind of JSON that a type has.
    fn is_kind(&self, value: &Value, type_name: &str) -> bool {
        let Some(entry) = self.schema.get(type_name) else {
            return false;
        };
        match (&entry.meta_type, entry.json_type.as_deref()) {
            (MetaType::Object, _) | (_, Some("object")) => value.is_object(),
            (MetaType::Array, _) | (_, Some("array")) => value.is_array(),
            (MetaType::Enum, _) | (_, Some("string")) => value.is_string(),
            (_, Some("int")) => value.is_i64() || value.is_u64(),
            (_, Some("number")) => value.is_number(),
            (_, Some("boolean")) => value.is_boolean(),
            (_, Some("null")) => value.is_null(),
            (_, Some("value")) => true,
            _ => false,
        }
    }

    /// Makes up a value of a type. `within` are the types it lies in, so that it has an end.
    fn make_up(&self, type_name: &str, extent: Extent, within: &mut Vec<String>) -> Value {
        let Some(entry) = self.schema.get(type_name) else {
            return Value::Null;
        };
        within.push(type_name.to_owned());
        let value = match entry.meta_type {
            MetaType::Object => self.make_up_object(entry, extent, within),
            MetaType::Array => match entry.element_type.as_deref() {
                Some(element) if extent == Extent::All && !within.iter().any(|t| t == element) => {
                    json!([self.make_up(element, extent, within)])
                }
                _ => json!([]),
            },
            MetaType::Alternate => match entry.members.first() {
                Some(member) => self.make_up(&member.type_name, extent, within),
                None => Value::Null,
            },
            MetaType::Enum => entry.enum_values().next().into(),
            _ => match entry.json_type.as_deref() {
                Some("string") => json!("text"),
                Some("int" | "number") => json!(1),
                Some("boolean") => json!(true),
                Some("null") => Value::Null,
                _ => json!({}),
            },
        };
        within.pop();
        value
    }

    fn make_up_object(
        &self,
        entry: &SchemaInfo,
        extent: Extent,
        within: &mut Vec<String>,
    ) -> Value {
        let mut object = Map::new();
        // The tag first: it decides which other members there are.
        for member in entry.members.iter().filter(|member| entry.tag.as_ref() == Some(&member.name))
        {
            object.insert(member.name.clone(), self.make_up(&member.type_name, extent, within));
        }
        let members: Vec<_> = self.members_of(&object, entry).collect();
        for member in members {
            let endless = within.contains(&member.type_name);
            if !member.optional || (extent == Extent::All && !endless) {
                let value = self.make_up(&member.type_name, extent, within);
                object.entry(&member.name).or_insert(value);
            }
        }
        Value::Object(object)
    }
}

/// The member that a problem is about, and the problem.
type Found = Vec<(String, String)>;
