//! Answers in the form that the client takes: objects, lists, tables, metadata alone; JSON or
//! YAML.

use super::Call;
use crate::body::{self, Answer};
use crate::request::{Media, Shape};
use crate::status::Failure;
use crate::table;
use bytes::Bytes;
use http::StatusCode;
use jiff::Timestamp;
use serde_json::{Map, Value, json};
use std::io::Write;
use std::sync::Arc;

/// What a list found.
#[derive(Debug, Default)]
pub struct Listing {
    /// As of which all of it is.
    pub revision: u64,
    /// In the served version.
    pub objects: Vec<Arc<Value>>,
    /// Where the rest begins.
    pub next: Option<String>,
    /// How many more there are, if that is known.
    pub remaining: Option<usize>,
}

impl Listing {
    fn meta(&self) -> Value {
        let mut meta = Map::new();
        meta.insert("resourceVersion".into(), self.revision.to_string().into());
        if let Some(next) = &self.next {
            meta.insert("continue".into(), next.as_str().into());
        }
        if let Some(remaining) = self.remaining {
            meta.insert("remainingItemCount".into(), remaining.into());
        }
        Value::Object(meta)
    }
}

/// A change as a watcher is told of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// It is one of what is watched now.
    Added,
    /// It still is.
    Modified,
    /// It is no more.
    Deleted,
}

impl Change {
    fn name(self) -> &'static str {
        match self {
            Self::Added => "ADDED",
            Self::Modified => "MODIFIED",
            Self::Deleted => "DELETED",
        }
    }
}

/// One object.
///
/// # Errors
/// 500 when it cannot be written.
pub fn one(call: &Call, code: StatusCode, object: &Arc<Value>) -> Result<Answer, Failure> {
    match call.accept.shape {
        Shape::Object => write(call, code, object),
        Shape::Table => {
            let mut table = table(call, std::slice::from_ref(object), true);
            table["metadata"] =
                json!({"resourceVersion": crate::meta::text(object, "resourceVersion")});
            write(call, code, &table)
        }
        Shape::Metadata => write(call, code, &table::metadata_only(object)),
    }
}

/// A list.
///
/// # Errors
/// 500 when it cannot be written.
pub fn many(call: &Call, listing: &Listing) -> Result<Answer, Failure> {
    match call.accept.shape {
        Shape::Table => {
            let mut table = table(call, &listing.objects, true);
            table["metadata"] = listing.meta();
            write(call, StatusCode::OK, &table)
        }
        Shape::Metadata => {
            let items: Vec<_> = listing.objects.iter().map(|o| table::metadata_only(o)).collect();
            let list = json!({
                "kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1",
                "metadata": listing.meta(), "items": items,
            });
            write(call, StatusCode::OK, &list)
        }
        Shape::Object if call.accept.media == Media::Yaml => {
            let items: Vec<&Value> = listing.objects.iter().map(|o| &**o).collect();
            let list = json!({
                "kind": *call.resource.list_kind, "apiVersion": call.resource.api_version(),
                "metadata": listing.meta(), "items": items,
            });
            write(call, StatusCode::OK, &list)
        }
        Shape::Object => objects(call, listing).map_err(|e| unwritable(&e)),
    }
}

/// Objects are written one by one, without a copy of them all.
fn objects(call: &Call, listing: &Listing) -> std::io::Result<Answer> {
    let resource = &call.resource;
    let mut text = Vec::new();
    write!(
        text,
        "{{\"kind\":{},\"apiVersion\":{},\"metadata\":{},\"items\":[",
        Value::from(&*resource.list_kind),
        Value::from(resource.api_version()),
        listing.meta(),
    )?;
    for (n, object) in listing.objects.iter().enumerate() {
        if n > 0 {
            text.push(b',');
        }
        serde_json::to_writer(&mut text, &**object)?;
    }
    text.extend_from_slice(b"]}\n");
    Ok(body::answer(StatusCode::OK, "application/json", text))
}

/// Any value, in the media type that the client takes.
///
/// # Errors
/// 500 when it cannot be written.
pub fn write(call: &Call, code: StatusCode, value: &Value) -> Result<Answer, Failure> {
    match call.accept.media {
        Media::Json => Ok(body::json(code, value)),
        Media::Yaml => {
            let text = serde_saphyr::to_string(value).map_err(|e| unwritable(&e))?;
            Ok(body::answer(code, "application/yaml", text))
        }
    }
}

fn unwritable(why: &dyn std::fmt::Display) -> Failure {
    Failure::internal(format!("the answer cannot be written: {why}"))
}

fn table(call: &Call, objects: &[Arc<Value>], headed: bool) -> Value {
    table::table(&call.resource, objects, call.accept.include, headed, Timestamp::now())
}

/// One change, as a line. Only the first table of a watch has its columns.
pub fn event(call: &Call, change: Change, object: &Arc<Value>, first: bool) -> Bytes {
    match call.accept.shape {
        Shape::Object => event_line(change.name(), object),
        Shape::Table => {
            let mut table = table(call, std::slice::from_ref(object), first);
            table["metadata"] =
                json!({"resourceVersion": crate::meta::text(object, "resourceVersion")});
            event_line(change.name(), &table)
        }
        Shape::Metadata => event_line(change.name(), &table::metadata_only(object)),
    }
}

/// Up to here the watcher has been told all.
pub fn bookmark(call: &Call, revision: u64, initial: bool) -> Bytes {
    let resource = &call.resource;
    let mut meta = json!({"resourceVersion": revision.to_string(), "creationTimestamp": null});
    if initial {
        meta["annotations"] = json!({"k8s.io/initial-events-end": "true"});
    }
    let object = match call.accept.shape {
        Shape::Object => {
            json!({"kind": *resource.kind, "apiVersion": resource.api_version(), "metadata": meta})
        }
        Shape::Metadata => {
            json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": meta})
        }
        Shape::Table => {
            json!({"kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": meta,
                   "columnDefinitions": [], "rows": []})
        }
    };
    event_line("BOOKMARK", &object)
}

/// A change as a line of JSON.
pub fn event_line(kind: &str, object: &Value) -> Bytes {
    format!("{{\"type\":{kind:?},\"object\":{object}}}\n").into()
}
