//! What QMP consists of, and the check of arguments against it.
//!
//! `schema.json` is what QEMU 7.2.22 answers to `query-qmp-schema`, reduced to
//! what the commands and events of the crate `qmp` reach. Of the drivers of
//! block nodes, the types of objects and the actions of transactions only those
//! are left that the stub knows.

use super::error::Error;
use serde_json::{Map, Value};
use std::collections::HashMap;

/// The schema, to be asked.
pub struct Schema {
    entries: Vec<Value>,
    by_name: HashMap<String, usize>,
}

impl Schema {
    /// The schema that is part of this program.
    pub fn load() -> Self {
        let entries: Vec<Value> =
            serde_json::from_str(include_str!("schema.json")).expect("schema.json is JSON");
        let name = |entry: &Value| entry["name"].as_str().unwrap_or_default().to_owned();
        let by_name = entries.iter().enumerate().map(|(i, e)| (name(e), i)).collect();
        Self { entries, by_name }
    }

    /// The answer to `query-qmp-schema`.
    pub fn entries(&self) -> Value {
        Value::Array(self.entries.clone())
    }

    /// Checks the arguments of a command.
    ///
    /// # Errors
    /// As QEMU: the command does not exist, or the first argument that it would not take.
    pub fn check(&self, command: &str, arguments: &Map<String, Value>) -> Result<(), Error> {
        let entry = self.get(command).filter(|entry| entry["meta-type"] == "command");
        let unknown = || Error::command(format!("The command {command} has not been found"));
        let arg_type = entry.ok_or_else(unknown)?["arg-type"].as_str().unwrap_or_default();
        // N.B. QEMU does not check these by its schema: they are open.
        if matches!(command, "device_add") {
            return Ok(());
        }
        self.object(self.get(arg_type), arguments, "")
    }

    fn get(&self, name: &str) -> Option<&Value> {
        self.by_name.get(name).map(|i| &self.entries[*i])
    }

    /// `at` is the object's own path with a dot at its end, or empty.
    fn object(
        &self,
        entry: Option<&Value>,
        given: &Map<String, Value>,
        at: &str,
    ) -> Result<(), Error> {
        let members = entry.map(|entry| self.members(entry, given)).unwrap_or_default();
        for member in &members {
            let name = text(member, "name");
            match given.get(name) {
                Some(value) => self.value(text(member, "type"), value, name, at)?,
                None if member.get("default").is_some() => {}
                None => return Err(Error::generic(format!("Parameter '{at}{name}' is missing"))),
            }
        }
        let known = |name: &str| members.iter().any(|member| text(member, "name") == name);
        match given.keys().find(|name| !known(name)) {
            Some(name) => Err(Error::generic(format!("Parameter '{at}{name}' is unexpected"))),
            None => Ok(()),
        }
    }

    /// An object's members, with those of the variant that its tag chooses.
    fn members(&self, entry: &Value, given: &Map<String, Value>) -> Vec<&Value> {
        let own = |entry: &Value| entry["members"].as_array().map_or(0, Vec::len);
        let variant = entry["tag"].as_str().and_then(|tag| {
            let case = given.get(tag)?;
            let variants = entry["variants"].as_array()?;
            let variant = variants.iter().find(|variant| variant["case"] == *case)?;
            self.get(text(variant, "type"))
        });
        let entry = self.get(text(entry, "name"));
        let both = entry.into_iter().chain(variant).filter(|entry| own(entry) > 0);
        both.flat_map(|entry| entry["members"].as_array().into_iter().flatten()).collect()
    }

    fn value(&self, kind: &str, value: &Value, name: &str, at: &str) -> Result<(), Error> {
        let Some(entry) = self.get(kind) else { return Ok(()) };
        let expected = |what: &str| {
            let text = format!("Invalid parameter type for '{at}{name}', expected: {what}");
            Err(Error::generic(text))
        };
        match text(entry, "meta-type") {
            "object" => match value {
                Value::Object(given) => self.object(Some(entry), given, &format!("{at}{name}.")),
                _ => expected("object"),
            },
            "array" => match value {
                Value::Array(items) => items.iter().enumerate().try_for_each(|(i, item)| {
                    let path = format!("{at}{name}[{i}]");
                    self.element(text(entry, "element-type"), item, &path)
                }),
                _ => expected("array"),
            },
            "enum" => match value.as_str() {
                Some(word) if has_value(entry, word) => Ok(()),
                // N.B. QEMU names only the last step of the path here.
                Some(word) => Err(Error::generic(format!(
                    "Parameter '{name}' does not accept value '{word}'"
                ))),
                None => expected("string"),
            },
            "alternate" => self.alternate(entry, value, name, at),
            _ => match text(entry, "json-type") {
                "string" if !value.is_string() => expected("string"),
                "boolean" if !value.is_boolean() => expected("boolean"),
                "number" if !value.is_number() => expected("number"),
                "int" if !(value.is_u64() || value.is_i64()) => {
                    Err(Error::generic(format!("Parameter '{at}{name}' expects uint64")))
                }
                _ => Ok(()),
            },
        }
    }

    /// An array's element has no name of its own: QEMU calls it null.
    fn element(&self, kind: &str, value: &Value, path: &str) -> Result<(), Error> {
        match (self.get(kind), value) {
            (Some(entry), Value::Object(given)) if entry["meta-type"] == "object" => {
                self.object(Some(entry), given, &format!("{path}."))
            }
            _ => self.value(kind, value, "null", ""),
        }
    }

    fn alternate(&self, entry: &Value, value: &Value, name: &str, at: &str) -> Result<(), Error> {
        let kinds = entry["members"].as_array().into_iter().flatten();
        let fits = |kind: &&str| match self.get(kind) {
            Some(kind) if kind["meta-type"] == "object" => value.is_object(),
            Some(kind) if kind["json-type"] == "null" => value.is_null(),
            Some(kind) if kind["json-type"] == "int" => value.is_number(),
            Some(kind) if kind["json-type"] == "boolean" => value.is_boolean(),
            _ => value.is_string(),
        };
        match kinds.map(|kind| text(kind, "type")).find(fits) {
            Some(kind) => self.value(kind, value, name, at),
            None => Err(Error::generic(format!(
                "Invalid parameter type for '{at}{name}', expected: one of its alternatives"
            ))),
        }
    }
}

fn text<'a>(entry: &'a Value, key: &str) -> &'a str {
    entry[key].as_str().unwrap_or_default()
}

fn has_value(entry: &Value, word: &str) -> bool {
    let members = entry["members"].as_array().into_iter().flatten();
    members.map(|member| &member["name"]).any(|name| name == word)
}

#[cfg(test)]
mod test {
    use super::*;
    use serde_json::json;

    fn refusal(command: &str, arguments: Value) -> String {
        let Value::Object(arguments) = arguments else { panic!("no object: {arguments}") };
        Schema::load().check(command, &arguments).unwrap_err().to_string()
    }

    #[test]
    fn arguments_are_refused_in_the_words_of_qemu() {
        let add =
            |data: Value| json!({"actions": [{"type": "block-dirty-bitmap-add", "data": data}]});
        let server = |data: Value| json!({"addr": {"type": "unix", "data": data}});
        for (command, arguments, words) in [
            ("nope", json!({}), "The command nope has not been found"),
            ("stop", json!({"x": 1}), "Parameter 'x' is unexpected"),
            ("migrate", json!({}), "Parameter 'uri' is missing"),
            ("migrate", json!({"uri": 1}), "Invalid parameter type for 'uri', expected: string"),
            (
                "migrate-continue",
                json!({"state": "x"}),
                "Parameter 'state' does not accept value 'x'",
            ),
            ("nbd-server-start", server(json!({})), "Parameter 'addr.data.path' is missing"),
            ("transaction", add(json!({})), "Parameter 'actions[0].data.node' is missing"),
        ] {
            assert_eq!(refusal(command, arguments), words);
        }
    }
}
