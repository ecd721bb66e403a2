//! Selectors of labels and fields.
//!
//! Source: k8s.io/apimachinery's `labels.Parse` and `fields.ParseSelector`.

use crate::status::Failure;
use serde_json::{Map, Value};
use std::fmt;

/// Requirements of one selector, at most.
const MOST: usize = 256;

/// Both selectors of a request.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Selection {
    /// `labelSelector`.
    pub labels: Labels,
    /// `fieldSelector`.
    pub fields: Fields,
}

impl Selection {
    /// Nothing is asked of an object.
    pub fn is_everything(&self) -> bool {
        self.labels.0.is_empty() && self.fields.0.is_empty()
    }
}

/// Requirements of labels, all of which must hold.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Labels(pub Vec<Requirement>);

/// One requirement of a label.
#[derive(Debug, Clone, PartialEq)]
pub struct Requirement {
    /// The label.
    pub key: String,
    /// What it must be.
    pub must: Must,
}

/// What a label must be.
#[derive(Debug, Clone, PartialEq)]
pub enum Must {
    /// There, with one of these values.
    In(Vec<String>),
    /// Not there, or with none of these values.
    NotIn(Vec<String>),
    /// There.
    Exist,
    /// Not there.
    NotExist,
    /// There, and a greater number.
    Above(i64),
    /// There, and a smaller number.
    Below(i64),
}

impl Requirement {
    fn holds(&self, labels: Option<&Map<String, Value>>) -> bool {
        let found = labels.and_then(|all| all.get(&self.key)).and_then(Value::as_str);
        let number = || found.and_then(|text| text.parse::<i64>().ok());
        match &self.must {
            Must::In(values) => found.is_some_and(|found| values.iter().any(|v| v == found)),
            Must::NotIn(values) => found.is_none_or(|found| values.iter().all(|v| v != found)),
            Must::Exist => found.is_some(),
            Must::NotExist => found.is_none(),
            Must::Above(least) => number().is_some_and(|n| n > *least),
            Must::Below(most) => number().is_some_and(|n| n < *most),
        }
    }
}

impl Labels {
    /// Whether labels are what is asked for.
    pub fn matches(&self, labels: Option<&Map<String, Value>>) -> bool {
        self.0.iter().all(|requirement| requirement.holds(labels))
    }

    /// Reads `a=b,c!=d,e in (f,g),!h`.
    ///
    /// # Errors
    /// 400 with what is wrong.
    pub fn parse(text: &str) -> Result<Self, Failure> {
        let fail = |why: String| {
            Failure::bad_request(format!("unable to parse requirement: {why} in {text:?}"))
        };
        let mut parser = Tokens { rest: text.trim() };
        let mut all = Vec::new();
        while !parser.rest.is_empty() {
            if all.len() == MOST {
                return Err(fail(format!("more than {MOST} requirements")));
            }
            all.push(parser.requirement().map_err(fail)?);
            parser.skip_spaces();
            match parser.rest.strip_prefix(',') {
                Some(rest) if !rest.trim().is_empty() => parser.rest = rest,
                Some(_) => return Err(fail("found nothing behind the last comma".into())),
                None if parser.rest.is_empty() => {}
                None => return Err(fail(format!("found {:?}, expected: , or end", parser.rest))),
            }
        }
        Ok(Self(all))
    }

    /// Reads a `LabelSelector` object; null selects nothing, an empty one everything.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn from_object(selector: &Value) -> Result<Option<Self>, String> {
        if selector.is_null() {
            return Ok(None);
        }
        let mut all = Vec::new();
        for (key, value) in selector["matchLabels"].as_object().into_iter().flatten() {
            let value = value.as_str().ok_or(format!("the value of label {key} is no string"))?;
            all.push(Requirement { key: key.clone(), must: Must::In(vec![value.to_owned()]) });
        }
        for expression in selector["matchExpressions"].as_array().into_iter().flatten() {
            let key = expression["key"].as_str().ok_or("an expression has no key")?;
            let values = expression["values"].as_array().into_iter().flatten();
            let values: Vec<_> = values.filter_map(Value::as_str).map(str::to_owned).collect();
            let must = match expression["operator"].as_str().unwrap_or_default() {
                "In" => Must::In(values),
                "NotIn" => Must::NotIn(values),
                "Exists" => Must::Exist,
                "DoesNotExist" => Must::NotExist,
                other => return Err(format!("{other:?} is not a valid label selector operator")),
            };
            all.push(Requirement { key: key.to_owned(), must });
        }
        Ok(Some(Self(all)))
    }
}

/// Reads requirements from the front of a text.
struct Tokens<'a> {
    rest: &'a str,
}

impl<'a> Tokens<'a> {
    fn skip_spaces(&mut self) {
        self.rest = self.rest.trim_start();
    }

    fn take(&mut self, prefix: &str) -> bool {
        self.skip_spaces();
        match self.rest.strip_prefix(prefix) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    /// Up to the next delimiter.
    fn word(&mut self) -> &'a str {
        self.skip_spaces();
        let end = |c: char| c.is_whitespace() || ",()=!<>".contains(c);
        let at = self.rest.find(end).unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(at);
        self.rest = rest;
        word
    }

    fn requirement(&mut self) -> Result<Requirement, String> {
        if self.take("!") {
            return Ok(Requirement { key: self.key()?, must: Must::NotExist });
        }
        let key = self.key()?;
        let must = if self.take("==") || self.take("=") {
            Must::In(vec![self.value()?])
        } else if self.take("!=") {
            Must::NotIn(vec![self.value()?])
        } else if self.take(">") {
            Must::Above(self.number()?)
        } else if self.take("<") {
            Must::Below(self.number()?)
        } else {
            match self.word() {
                "" => Must::Exist,
                "in" => Must::In(self.values()?),
                "notin" => Must::NotIn(self.values()?),
                other => {
                    return Err(format!("found {other:?}, expected: in, notin, =, ==, !=, >, <"));
                }
            }
        };
        Ok(Requirement { key, must })
    }

    fn key(&mut self) -> Result<String, String> {
        let key = self.word();
        match crate::names::qualified(key) {
            None => Ok(key.to_owned()),
            Some(why) => Err(format!("{key:?} is not a label's name: {why}")),
        }
    }

    fn value(&mut self) -> Result<String, String> {
        let value = self.word();
        match crate::names::label_value(value) {
            None => Ok(value.to_owned()),
            Some(why) => Err(format!("{value:?} is not a label's value: {why}")),
        }
    }

    fn number(&mut self) -> Result<i64, String> {
        let word = self.word();
        word.parse().map_err(|_| format!("{word:?} is not a whole number"))
    }

    fn values(&mut self) -> Result<Vec<String>, String> {
        if !self.take("(") {
            return Err(format!("found {:?}, expected: '('", self.rest));
        }
        let mut all = Vec::new();
        loop {
            all.push(self.value()?);
            if self.take(")") {
                return Ok(all);
            }
            if !self.take(",") {
                return Err(format!("found {:?}, expected: , or ')'", self.rest));
            }
        }
    }
}

impl fmt::Display for Labels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, Requirement { key, must }) in self.0.iter().enumerate() {
            if n > 0 {
                f.write_str(",")?;
            }
            match must {
                Must::In(values) if values.len() == 1 => write!(f, "{key}={}", values[0])?,
                Must::NotIn(values) if values.len() == 1 => write!(f, "{key}!={}", values[0])?,
                Must::In(values) => write!(f, "{key} in ({})", values.join(","))?,
                Must::NotIn(values) => write!(f, "{key} notin ({})", values.join(","))?,
                Must::Exist => f.write_str(key)?,
                Must::NotExist => write!(f, "!{key}")?,
                Must::Above(n) => write!(f, "{key}>{n}")?,
                Must::Below(n) => write!(f, "{key}<{n}")?,
            }
        }
        Ok(())
    }
}

/// Requirements of fields: path, value, and whether it must be that or must not.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Fields(pub Vec<(String, String, bool)>);

impl Fields {
    /// Reads `metadata.name=a,status.phase!=Running`.
    ///
    /// # Errors
    /// 400 with what is wrong, or a field that objects cannot be selected by.
    pub fn parse(text: &str, selectable: &[Box<str>]) -> Result<Self, Failure> {
        let mut all = Vec::new();
        for part in split(text) {
            if all.len() == MOST {
                return Err(Failure::bad_request("too many field requirements"));
            }
            let (field, value, is) = if let Some((field, value)) = part.split_once("!=") {
                (field, value, false)
            } else if let Some((field, value)) = part.split_once("==") {
                (field, value, true)
            } else if let Some((field, value)) = part.split_once('=') {
                (field, value, true)
            } else {
                return Err(Failure::bad_request(format!(
                    "invalid selector: {text:?}; can't understand {part:?}"
                )));
            };
            let known = matches!(field, "metadata.name" | "metadata.namespace")
                || selectable.iter().any(|known| &**known == field);
            if !known {
                return Err(Failure::bad_request(format!("field label not supported: {field}")));
            }
            all.push((field.to_owned(), unescape(value), is));
        }
        Ok(Self(all))
    }

    /// Whether an object's fields are what is asked for. A field that is not there is empty.
    pub fn matches(&self, object: &Value) -> bool {
        self.0.iter().all(|(path, wanted, is)| (at(object, path) == *wanted) == *is)
    }

    /// The value that a field must have, if one is asked for.
    pub fn wanted(&self, path: &str) -> Option<&str> {
        let found = self.0.iter().find(|(field, _, is)| field == path && *is);
        found.map(|(_, value, _)| &**value)
    }
}

fn at(object: &Value, path: &str) -> String {
    let mut value = object;
    for field in path.split('.') {
        value = &value[field];
    }
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// At commas that are not escaped.
fn split(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut escaped = false;
    for c in text.chars() {
        match c {
            ',' if !escaped => parts.push(String::new()),
            c => {
                if let Some(last) = parts.last_mut() {
                    last.push(c);
                }
            }
        }
        escaped = c == '\\' && !escaped;
    }
    parts.retain(|part| !part.is_empty());
    parts
}

fn unescape(value: &str) -> String {
    let mut out = String::new();
    let mut chars = value.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => out.extend(chars.next()),
            c => out.push(c),
        }
    }
    out
}
