//! Names, labels, and the rest of what every object's metadata must be.
//!
//! Source: k8s.io/apimachinery's `validation` packages, whose messages these are.

use crate::meta;
use crate::resource::Resource;
use crate::status::Cause;
use serde_json::Value;

const SUBDOMAIN: &str = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric \
    characters, '-' or '.', and must start and end with an alphanumeric character (e.g. \
    'example.com', regex used for validation is \
    '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')";
const LABEL: &str = "a lowercase RFC 1123 label must consist of lower case alphanumeric characters \
    or '-', and must start and end with an alphanumeric character (e.g. 'my-name',  or '123-abc', \
    regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?')";
const SERVICE: &str = "a DNS-1035 label must consist of lower case alphanumeric characters or '-', \
    start with an alphabetic character, and end with an alphanumeric character (e.g. 'my-name',  or \
    'abc-123', regex used for validation is '[a-z]([-a-z0-9]*[a-z0-9])?')";
const NAME_PART: &str = "name part must consist of alphanumeric characters, '-', '_' or '.', and \
    must start and end with an alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', \
    regex used for validation is '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')";
const VALUE: &str = "a valid label must be an empty string or consist of alphanumeric characters, \
    '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyValue',  or \
    'my_value',  or '12345', regex used for validation is \
    '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')";
/// Bytes of all annotations of an object.
const ANNOTATIONS: usize = 256 << 10;

fn is_lower(c: char) -> bool {
    c.is_ascii_lowercase() || c.is_ascii_digit()
}

/// Begins and ends with `edge`, and consists of it and `inner`.
fn consists(text: &str, edge: impl Fn(char) -> bool, inner: &str) -> bool {
    text.starts_with(&edge)
        && text.ends_with(&edge)
        && text.chars().all(|c| edge(c) || inner.contains(c))
}

fn too_long(text: &str, most: usize) -> Option<String> {
    (text.len() > most).then(|| format!("must be no more than {most} characters"))
}

/// What is wrong with a DNS-1123 label.
pub fn label(text: &str) -> Option<String> {
    too_long(text, 63).or_else(|| (!consists(text, is_lower, "-")).then(|| LABEL.to_owned()))
}

/// What is wrong with a DNS-1123 subdomain.
pub fn subdomain(text: &str) -> Option<String> {
    let wrong = || text.split('.').any(|part| !consists(part, is_lower, "-"));
    too_long(text, 253).or_else(|| wrong().then(|| SUBDOMAIN.to_owned()))
}

/// What is wrong with a DNS-1035 label.
pub fn service(text: &str) -> Option<String> {
    let begins = text.starts_with(|c: char| c.is_ascii_lowercase());
    let wrong = || !begins || !consists(text, is_lower, "-");
    too_long(text, 63).or_else(|| wrong().then(|| SERVICE.to_owned()))
}

/// What is wrong with a name that only has to fit into a path.
pub fn path_segment(text: &str) -> Option<String> {
    match text {
        "." | ".." => Some(format!("may not be '{text}'")),
        _ => {
            ["/", "%"].iter().find(|c| text.contains(**c)).map(|c| format!("may not contain '{c}'"))
        }
    }
}

/// What is wrong with a qualified name, such as a label's: `name` or `prefix/name`.
pub fn qualified(text: &str) -> Option<String> {
    let (prefix, name) = match text.split_once('/') {
        None => (None, text),
        Some((prefix, name)) => (Some(prefix), name),
    };
    match prefix {
        Some("") => return Some("prefix part must be non-empty".into()),
        Some(prefix) => {
            if let Some(why) = subdomain(prefix) {
                return Some(format!("prefix part {why}"));
            }
        }
        None => {}
    }
    if name.is_empty() {
        return Some("name part must be non-empty".into());
    }
    let alphanumeric = |c: char| c.is_ascii_alphanumeric();
    too_long(name, 63)
        .map(|why| format!("name part {why}"))
        .or_else(|| (!consists(name, alphanumeric, "-_.")).then(|| NAME_PART.to_owned()))
}

/// What is wrong with a label's value.
pub fn label_value(text: &str) -> Option<String> {
    let alphanumeric = |c: char| c.is_ascii_alphanumeric();
    let wrong = || !text.is_empty() && !consists(text, alphanumeric, "-_.");
    too_long(text, 63).or_else(|| wrong().then(|| VALUE.to_owned()))
}

/// A name that begins with a prefix and is most likely new.
pub fn generate(prefix: &str) -> String {
    const LETTERS: &[u8; 27] = b"bcdfghjklmnpqrstvwxz2456789";
    const LENGTH: usize = 5;
    let mut name: String = prefix.chars().take(63 - LENGTH).collect();
    let random = uuid::Uuid::new_v4();
    for byte in random.as_bytes().iter().take(LENGTH) {
        name.push(char::from(LETTERS[usize::from(*byte) % LETTERS.len()]));
    }
    name
}

/// What a name of a resource must be.
fn of_resource(resource: &Resource, name: &str) -> Option<String> {
    match (&*resource.group, &*resource.plural) {
        ("", "namespaces") => label(name),
        ("", "services") => service(name),
        ("rbac.authorization.k8s.io", _) => path_segment(name),
        _ => subdomain(name),
    }
}

/// All that is wrong with an object's metadata, by itself and as a successor.
pub fn validate(resource: &Resource, new: &Value, old: Option<&Value>) -> Vec<Cause> {
    let mut causes = Vec::new();
    let mut wrong = |field: &str, value: &str, why: String| {
        causes.push(Cause {
            reason: "FieldValueInvalid",
            message: format!("Invalid value: {value:?}: {why}"),
            field: format!("metadata.{field}"),
        });
    };
    let name = meta::text(new, "name");
    if old.is_none()
        && let Some(why) = of_resource(resource, name)
    {
        wrong("name", name, why);
    }
    let strings = |field: &str| {
        let all = meta::map(new, field).into_iter().flatten();
        all.map(|(key, value)| (key.clone(), value.as_str().unwrap_or_default().to_owned()))
    };
    for (key, value) in strings("labels") {
        if let Some(why) = qualified(&key) {
            wrong("labels", &key, why);
        }
        if let Some(why) = label_value(&value) {
            wrong("labels", &value, why);
        }
    }
    let mut size = 0;
    for (key, value) in strings("annotations") {
        size += key.len() + value.len();
        if let Some(why) = qualified(&key.to_lowercase()) {
            wrong("annotations", &key, why);
        }
    }
    if size > ANNOTATIONS {
        causes.push(Cause {
            reason: "FieldValueTooLong",
            message: format!("Too long: may not be more than {ANNOTATIONS} bytes"),
            field: "metadata.annotations".into(),
        });
    }
    causes.extend(owners(new));
    causes.extend(new_finalizers(new, old));
    causes
}

fn owners(object: &Value) -> Vec<Cause> {
    let mut causes = Vec::new();
    let mut controllers = 0;
    let owners = object["metadata"]["ownerReferences"].as_array();
    for (n, owner) in owners.into_iter().flatten().enumerate() {
        for field in ["apiVersion", "kind", "name", "uid"] {
            if owner[field].as_str().is_none_or(str::is_empty) {
                causes.push(Cause {
                    reason: "FieldValueInvalid",
                    message: "Invalid value: \"\": must not be empty".into(),
                    field: format!("metadata.ownerReferences[{n}].{field}"),
                });
            }
        }
        controllers += usize::from(owner["controller"] == true);
    }
    if controllers > 1 {
        causes.push(Cause {
            reason: "FieldValueInvalid",
            message: "Invalid value: only one reference can have Controller set to true".into(),
            field: "metadata.ownerReferences".into(),
        });
    }
    causes
}

/// What is being deleted gets no finalizers.
fn new_finalizers(new: &Value, old: Option<&Value>) -> Option<Cause> {
    for name in meta::finalizers(new) {
        if let Some(why) = qualified(name) {
            return Some(Cause {
                reason: "FieldValueInvalid",
                message: format!("Invalid value: {name:?}: {why}"),
                field: "metadata.finalizers".into(),
            });
        }
    }
    let old = old.filter(|old| meta::is_terminating(old))?;
    let had = meta::finalizers(old);
    let added: Vec<_> = meta::finalizers(new).into_iter().filter(|f| !had.contains(f)).collect();
    (!added.is_empty()).then(|| Cause {
        reason: "FieldValueForbidden",
        message: format!(
            "Forbidden: no new finalizers can be added if the object is being deleted, found new finalizers {added:?}"
        ),
        field: "metadata.finalizers".into(),
    })
}
