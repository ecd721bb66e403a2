//! Server-side apply, and who manages what after any write: pure.
//!
//! Source: kubernetes-sigs/structured-merge-diff's `merge.Updater` and k8s.io/apimachinery's
//! `managedfields`.

mod managers;
mod set;
mod typed;

pub use set::Set;

use crate::meta;
use crate::schema::Schema;
use crate::status::{Cause, Failure};
use managers::Manager;
use serde_json::Value;

/// Who writes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Writer {
    /// Such as `kubectl`.
    pub manager: String,
    /// Through which subresource; empty for none.
    pub subresource: String,
    /// The status is a subresource: who writes the rest does not manage it.
    pub has_status: bool,
    /// In which version.
    pub api_version: String,
    /// RFC 3339.
    pub now: String,
}

/// Of metadata nobody manages these.
const UNMANAGED: [&str; 10] = [
    "name",
    "namespace",
    "creationTimestamp",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
    "selfLink",
    "uid",
    "generation",
    "managedFields",
    "resourceVersion",
];
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// What of an object a writer can manage.
fn managed(object: &Value, writer: &Writer) -> Value {
    let mut object = object.clone();
    if let Some(root) = object.as_object_mut() {
        root.remove("apiVersion");
        root.remove("kind");
        match &*writer.subresource {
            "status" => root.retain(|name, _| name == "status" || name == "metadata"),
            _ if writer.has_status => drop(root.remove("status")),
            _ => {}
        }
    }
    for field in UNMANAGED {
        meta::set(&mut object, field, Value::Null);
    }
    if object["metadata"].as_object().is_some_and(serde_json::Map::is_empty)
        && let Some(root) = object.as_object_mut()
    {
        root.remove("metadata");
    }
    object
}

fn fields(schema: &Schema, object: &Value, writer: &Writer) -> Set {
    let mut set = typed::fields(&whole(schema), &managed(object, writer));
    set.member = false;
    set
}

/// A schema with that of every object's metadata.
fn whole(schema: &Schema) -> Schema {
    let mut schema = schema.clone();
    schema.properties.insert("metadata".into(), crate::schema::metadata());
    schema.atomic = false;
    schema
}

/// An object with what is applied to it, and its managers. Where nothing changes it is as it was.
///
/// # Errors
/// 409 when another manages a field that would change, unless that is forced.
pub fn apply(
    live: &Value,
    applied: &Value,
    schema: &Schema,
    writer: &Writer,
    force: bool,
) -> Result<Value, Failure> {
    match try_apply(live, applied, schema, writer, force) {
        Ok(next) => Ok(next),
        Err(conflicts) => {
            // What kubectl once applied by itself it may apply by the server.
            let allowed = match &*writer.manager {
                "kubectl" => last_applied(live, schema, writer),
                _ => Set::default(),
            };
            let left: Vec<_> = conflicts
                .into_iter()
                .map(|(manager, fields)| (manager, fields.minus(&allowed)))
                .filter(|(_, fields)| !fields.is_empty())
                .collect();
            match left.is_empty() {
                true => try_apply(live, applied, schema, writer, true).map_err(|c| told(&c)),
                false => Err(told(&left)),
            }
        }
    }
}

type Conflicts = Vec<(Manager, Set)>;

fn try_apply(
    live: &Value,
    applied: &Value,
    schema: &Schema,
    writer: &Writer,
    force: bool,
) -> Result<Value, Conflicts> {
    let whole = whole(schema);
    let mut managers = managers::read(live);
    if managers.is_empty() {
        managers.push(before_first(live, schema, writer));
    }
    let at = managers.iter().position(|m| m.is(writer, true));
    let last = at.map(|at| managers.remove(at));
    let applied_fields = fields(schema, applied, writer);

    let merged = typed::merge(&whole, live, &without_nulls(&addressed(applied, live)));
    let mut kept = applied_fields.clone();
    managers.iter().for_each(|other| kept.add(&other.fields));
    let mut next = match &last {
        Some(last) => typed::without(&whole, &merged, &last.fields, &kept).unwrap_or(merged),
        None => merged,
    };
    // Only a whole object is left.
    for field in UNMANAGED {
        meta::set(&mut next, field, live["metadata"][field].clone());
    }

    let difference = typed::compare(&whole, &managed(live, writer), &managed(&next, writer));
    let conflicts: Conflicts = managers
        .iter()
        .map(|other| (other.clone(), other.fields.common(&difference.changed)))
        .filter(|(_, fields)| !fields.is_empty())
        .collect();
    if !conflicts.is_empty() && !force {
        return Err(conflicts);
    }
    take_away(&mut managers, &difference);
    let unchanged = difference.changed.is_empty()
        && difference.removed.is_empty()
        && last.as_ref().is_some_and(|last| {
            last.fields == applied_fields && last.api_version == writer.api_version
        });
    let time = match last {
        Some(last) if unchanged => last.time,
        _ => Some(writer.now.clone()),
    };
    managers.push(Manager {
        name: writer.manager.clone(),
        applies: true,
        api_version: writer.api_version.clone(),
        subresource: writer.subresource.clone(),
        time,
        fields: applied_fields,
    });
    managers::write(&mut next, managers);
    Ok(next)
}

/// Fields that changed or are gone have no other managers.
fn take_away(managers: &mut [Manager], difference: &typed::Difference) {
    for other in managers {
        other.fields = other.fields.minus(&difference.changed).minus_below(&difference.removed);
    }
}

/// What is applied, as of the object that it is applied to.
fn addressed(applied: &Value, live: &Value) -> Value {
    let mut applied = applied.clone();
    for field in ["uid", "resourceVersion", "creationTimestamp", "managedFields"] {
        meta::set(&mut applied, field, Value::Null);
    }
    if let (Some(applied), Some(version)) = (applied.as_object_mut(), live.get("apiVersion")) {
        applied.insert("apiVersion".into(), version.clone());
    }
    applied
}

fn without_nulls(value: &Value) -> Value {
    match value {
        Value::Object(map) => {
            let kept = map.iter().filter(|(_, v)| !v.is_null());
            kept.map(|(k, v)| (k.clone(), without_nulls(v))).collect()
        }
        other => other.clone(),
    }
}

/// All that is there, when nobody has kept a record.
fn before_first(live: &Value, schema: &Schema, writer: &Writer) -> Manager {
    Manager {
        name: "before-first-apply".into(),
        applies: false,
        api_version: writer.api_version.clone(),
        subresource: String::new(),
        time: Some(writer.now.clone()),
        fields: fields(schema, live, writer),
    }
}

fn last_applied(live: &Value, schema: &Schema, writer: &Writer) -> Set {
    let annotation = meta::map(live, "annotations").and_then(|all| all.get(LAST_APPLIED));
    let object =
        annotation.and_then(Value::as_str).and_then(|text| serde_json::from_str(text).ok());
    let Some(object) = object else { return Set::default() };
    let mut allowed = fields(schema, &object, writer);
    let annotation = format!("f:{LAST_APPLIED}");
    let meta = allowed.children.entry("f:metadata".into()).or_default();
    let annotations = meta.children.entry("f:annotations".into()).or_default();
    annotations.children.insert(annotation, Set::leaf());
    allowed
}

fn told(conflicts: &Conflicts) -> Failure {
    let mut causes = Vec::new();
    let mut lines = Vec::new();
    let one = conflicts.iter().map(|(_, fields)| fields.paths().len()).sum::<usize>() == 1;
    for (manager, fields) in conflicts {
        let by = match &*manager.subresource {
            "" => format!("{:?}", manager.name),
            sub => format!("{:?} with subresource {sub:?}", manager.name),
        };
        let by = match manager.applies {
            true => by,
            false => {
                let time = manager.time.as_deref().map(|t| format!(" at {t}")).unwrap_or_default();
                format!("{by} using {}{time}", manager.api_version)
            }
        };
        let paths = fields.paths();
        match &paths[..] {
            [path] if one => lines.push(format!("conflict with {by}: {path}")),
            several => {
                let listed: Vec<_> = several.iter().map(|path| format!("\n- {path}")).collect();
                lines.push(format!("conflicts with {by}:{}", listed.concat()));
            }
        }
        causes.extend(paths.into_iter().map(|path| Cause {
            reason: "FieldManagerConflict",
            message: format!("conflict with {by}"),
            field: path,
        }));
    }
    let message = match causes.len() {
        1 => format!("Apply failed with 1 conflict: {}", lines.join("")),
        n => format!("Apply failed with {n} conflicts: {}", lines.join("\n")),
    };
    Failure::apply_conflict(message, &causes)
}

/// A new object that was made of what is applied.
pub fn created(mut object: Value, applied: &Value, schema: &Schema, writer: &Writer) -> Value {
    let manager = Manager {
        name: writer.manager.clone(),
        applies: true,
        api_version: writer.api_version.clone(),
        subresource: writer.subresource.clone(),
        time: Some(writer.now.clone()),
        fields: fields(schema, &without_nulls(applied), writer),
    };
    managers::write(&mut object, vec![manager]);
    object
}

/// An object with its managers after somebody has written it, other than by apply.
pub fn updated(live: Option<&Value>, mut new: Value, schema: &Schema, writer: &Writer) -> Value {
    let empty = Value::Object(serde_json::Map::new());
    let whole = whole(schema);
    let given = &new["metadata"]["managedFields"];
    // An empty list, or one with an empty entry, clears the record.
    let cleared = given.as_array().is_some_and(|all| {
        all.is_empty()
            || (all.len() == 1 && all[0].as_object().is_some_and(serde_json::Map::is_empty))
    });
    let mut managers = match live {
        Some(_) if cleared => {
            meta::set(&mut new, "managedFields", Value::Null);
            return new;
        }
        Some(_) if given.is_array() => managers::read(&new),
        Some(live) => managers::read(live),
        None => managers::read(&new),
    };
    let old = live.map_or(empty, |live| managed(live, writer));
    let difference = typed::compare(&whole, &old, &managed(&new, writer));
    let mut gained = difference.changed.clone();
    gained.member = false;
    let at = managers.iter().position(|m| m.is(writer, false));
    let mut own = at.map(|at| managers.remove(at));
    take_away(&mut managers, &difference);
    if let Some(own) = &mut own {
        own.fields = own.fields.minus_below(&difference.removed);
    }
    if !gained.is_empty() {
        let own = own.get_or_insert_with(|| Manager {
            name: writer.manager.clone(),
            applies: false,
            api_version: writer.api_version.clone(),
            subresource: writer.subresource.clone(),
            time: None,
            fields: Set::default(),
        });
        own.fields.add(&gained);
        own.time = Some(writer.now.clone());
    }
    managers.extend(own);
    managers::write(&mut new, managers);
    new
}

/// Whether two records differ in nothing but when.
pub fn same_managers(one: &Value, other: &Value) -> bool {
    let timeless = |entries: &Value| {
        let mut entries = entries.clone();
        for entry in entries.as_array_mut().into_iter().flatten() {
            if let Some(entry) = entry.as_object_mut() {
                entry.remove("time");
            }
        }
        let mut all: Vec<_> =
            entries.as_array().into_iter().flatten().map(Value::to_string).collect();
        all.sort();
        all
    };
    timeless(one) == timeless(other)
}
