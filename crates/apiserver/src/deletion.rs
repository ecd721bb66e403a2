//! What a delete does to an object: pure.
//!
//! Source: `BeforeDelete` and `deletionFinalizersForGarbageCollection` of k8s.io/apiserver's
//! registry, and the pods' `CheckGracefulDelete`.

use crate::meta;
use crate::status::{Failure, Subject};
use jiff::{SignedDuration, Timestamp};
use serde_json::Value;

const ORPHAN: &str = "orphan";
const FOREGROUND: &str = "foregroundDeletion";

/// What the client asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Options {
    /// Seconds between the order to end and the end.
    pub grace: Option<i64>,
    /// What becomes of dependents; None: what the object's finalizers say.
    pub propagation: Option<Propagation>,
    /// The object must have this uid.
    pub uid: Option<String>,
    /// The object must be at this revision.
    pub revision: Option<String>,
    /// Only tells what would be.
    pub dry_run: bool,
}

/// `propagationPolicy`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Propagation {
    /// Dependents stay, without this owner.
    Orphan,
    /// Dependents go later.
    Background,
    /// Dependents go first.
    Foreground,
}

/// What becomes of the object.
#[derive(Debug, Clone, PartialEq)]
pub enum Fate {
    /// It is removed.
    Gone,
    /// It changes to this and goes later.
    Marked(Value),
    /// It is going already.
    Going,
}

/// Whether an object of this kind can be given time to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Grace {
    /// It has nothing to end.
    None,
    /// It is a pod.
    Pod,
    /// It is a namespace: what is in it goes first.
    Namespace,
}

/// Decides what a delete does.
///
/// # Errors
/// A precondition does not hold, or the options contradict themselves.
pub fn delete(
    object: &Value,
    options: &Options,
    grace: Grace,
    what: Subject<'_>,
    now: Timestamp,
) -> Result<Fate, Failure> {
    check(object, options, what)?;
    let mut next = object.clone();
    set_finalizers(&mut next, options.propagation);
    let held = !meta::finalizers(&next).is_empty();
    match grace {
        Grace::None => Ok(end(object, next, held, now)),
        Grace::Namespace => {
            let filled = object["spec"]["finalizers"].as_array().is_some_and(|f| !f.is_empty());
            if filled && !meta::is_terminating(object) {
                set_phase(&mut next, "Terminating");
            }
            Ok(end(object, next, held || filled, now))
        }
        Grace::Pod => Ok(end_pod(object, next, options.grace, held, now)),
    }
}

/// Whether an object that was marked and then changed is to be removed now.
pub fn is_over(object: &Value, grace: Grace) -> bool {
    let free = meta::is_terminating(object) && meta::finalizers(object).is_empty();
    free && match grace {
        Grace::None => true,
        Grace::Pod => object["metadata"]["deletionGracePeriodSeconds"].as_i64().unwrap_or(0) == 0,
        Grace::Namespace => {
            object["spec"]["finalizers"].as_array().is_none_or(|finalizers| finalizers.is_empty())
        }
    }
}

fn check(object: &Value, options: &Options, what: Subject<'_>) -> Result<(), Failure> {
    let differs = |name, wanted: &Option<String>, field| {
        let found = meta::text(object, field);
        wanted.as_deref().filter(|wanted| *wanted != found).map(|wanted| {
            let why = format!(
                "Precondition failed: {name} in precondition: {wanted}, {name} in object meta: {found}"
            );
            Failure::conflict(what, &why)
        })
    };
    let wrong = differs("UID", &options.uid, "uid")
        .or_else(|| differs("ResourceVersion", &options.revision, "resourceVersion"));
    match wrong {
        Some(failure) => Err(failure),
        None if options.grace.is_some_and(|grace| grace < 0) => {
            Err(Failure::bad_request("gracePeriodSeconds: must be greater than or equal to 0"))
        }
        None => Ok(()),
    }
}

fn set_finalizers(object: &mut Value, propagation: Option<Propagation>) {
    let Some(propagation) = propagation else { return };
    for (name, wanted) in [
        (ORPHAN, propagation == Propagation::Orphan),
        (FOREGROUND, propagation == Propagation::Foreground),
    ] {
        match wanted {
            true => meta::add_finalizer(object, name),
            false => meta::remove_finalizer(object, name),
        }
    }
}

fn end(object: &Value, mut next: Value, held: bool, now: Timestamp) -> Fate {
    if !held {
        return Fate::Gone;
    }
    if !meta::is_terminating(object) {
        mark(&mut next, now, 0);
    }
    if next == *object { Fate::Going } else { Fate::Marked(next) }
}

fn end_pod(
    object: &Value,
    mut next: Value,
    asked: Option<i64>,
    held: bool,
    now: Timestamp,
) -> Fate {
    let given = |field: &str| object["metadata"][field].as_i64();
    if meta::is_terminating(object) {
        let current = given("deletionGracePeriodSeconds").unwrap_or(0);
        let shorter = asked.filter(|asked| *asked < current);
        return match shorter {
            Some(0) if !held => Fate::Gone,
            Some(seconds) => {
                shorten(&mut next, current, seconds);
                Fate::Marked(next)
            }
            None if current == 0 && !held => Fate::Gone,
            None if next != *object => Fate::Marked(next),
            None => Fate::Going,
        };
    }
    let seconds = match asked.or_else(|| object["spec"]["terminationGracePeriodSeconds"].as_i64()) {
        _ if ended_or_never_began(object) => 0,
        Some(seconds) => seconds.max(0),
        None => 30,
    };
    if seconds == 0 && !held {
        return Fate::Gone;
    }
    mark(&mut next, now, seconds);
    Fate::Marked(next)
}

fn ended_or_never_began(pod: &Value) -> bool {
    let placed = pod["spec"]["nodeName"].as_str().is_some_and(|node| !node.is_empty());
    let ended = matches!(pod["status"]["phase"].as_str(), Some("Failed" | "Succeeded"));
    !placed || ended
}

fn mark(object: &mut Value, now: Timestamp, seconds: i64) {
    let at = now.saturating_add(SignedDuration::from_secs(seconds)).unwrap_or(now);
    meta::set(object, "deletionTimestamp", meta::moment(at).into());
    meta::set(object, "deletionGracePeriodSeconds", seconds.into());
    if let Some(generation) = object["metadata"]["generation"].as_i64().filter(|g| *g > 0) {
        meta::set(object, "generation", (generation + 1).into());
    }
}

fn shorten(object: &mut Value, from: i64, to: i64) {
    let Ok(at) = meta::text(object, "deletionTimestamp").parse::<Timestamp>() else { return };
    let at = at.saturating_sub(SignedDuration::from_secs(from - to)).unwrap_or(at);
    meta::set(object, "deletionTimestamp", meta::moment(at).into());
    meta::set(object, "deletionGracePeriodSeconds", to.into());
}

fn set_phase(object: &mut Value, phase: &str) {
    let Some(root) = object.as_object_mut() else { return };
    let status = root.entry("status").or_insert_with(|| serde_json::json!({}));
    if let Some(status) = status.as_object_mut() {
        status.insert("phase".into(), phase.into());
    }
}
