//! From what a client sent to what is stored: pure.

use crate::kinds::Kind;
use crate::meta;
use crate::resource::Resource;
use crate::status::{Cause, Failure, Subject};
use jiff::Timestamp;
use serde_json::{Map, Value};

/// What is done about fields that the schema does not have, and fields given twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Unknown {
    /// They are dropped.
    Ignore,
    /// They are dropped, and the client is warned.
    #[default]
    Warn,
    /// The request fails.
    Strict,
}

/// Which part of an object a request writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// All but the status, where that is a subresource.
    Main,
    /// The status alone.
    Status,
}

/// Fields of metadata that only the server sets.
const SERVERS: [&str; 6] = [
    "uid",
    "creationTimestamp",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
    "generation",
    "selfLink",
];

/// What is written where, and how it is checked.
#[derive(Debug, Clone, Copy)]
pub struct Target<'a> {
    /// The table's entry.
    pub resource: &'a Resource,
    /// What Kubernetes does in code.
    pub kind: &'static Kind,
    /// Of the request; empty for none.
    pub namespace: &'a str,
    /// Of the request; empty for none.
    pub name: &'a str,
}

impl<'a> Target<'a> {
    /// It as failures name it.
    pub fn subject(&self) -> Subject<'a> {
        Subject { group: &self.resource.group, kind: &self.resource.plural, name: self.name }
    }

    fn invalid(&self, name: &str, causes: &[Cause]) -> Failure {
        let what = Subject { group: &self.resource.group, kind: &self.resource.kind, name };
        Failure::invalid(what, causes)
    }

    /// Checks that a body is for this request, and fills in what the path says.
    ///
    /// # Errors
    /// 400 when they differ.
    pub fn address(&self, object: &mut Value) -> Result<(), Failure> {
        let resource = self.resource;
        self.check_type(object)?;
        if !object["metadata"].is_object() && !object["metadata"].is_null() {
            return Err(Failure::bad_request("metadata is not an object"));
        }
        let named = meta::text(object, "name");
        if !self.name.is_empty() && !named.is_empty() && named != self.name {
            return Err(Failure::bad_request(format!(
                "the name of the object ({named}) does not match the name on the URL ({})",
                self.name
            )));
        }
        let placed = meta::text(object, "namespace");
        if !placed.is_empty() && placed != self.namespace {
            return Err(Failure::bad_request(
                "the namespace of the provided object does not match the namespace sent on the request",
            ));
        }
        if resource.namespaced {
            meta::set(object, "namespace", self.namespace.into());
        } else {
            meta::set(object, "namespace", Value::Null);
        }
        if !self.name.is_empty() {
            meta::set(object, "name", self.name.into());
        }
        Ok(())
    }

    fn check_type(&self, object: &mut Value) -> Result<(), Failure> {
        let (kind, version) = (&self.resource.kind, self.resource.api_version());
        let given = |field: &str| object[field].as_str().unwrap_or_default().to_owned();
        let (its_kind, its_version) = (given("kind"), given("apiVersion"));
        if !its_version.is_empty() && its_version != version {
            // Of what is built in every version is known, and this is none of them.
            if self.resource.crd.is_none() {
                return Err(Failure::bad_request(format!(
                    "{its_kind} in version {its_version:?} cannot be handled as a {kind}: \
                     no kind {its_kind:?} is registered for version {its_version:?} in scheme \
                     \"pkg/api/legacyscheme/scheme.go:30\""
                )));
            }
            return Err(Failure::bad_request(format!(
                "the API version in the data ({its_version}) does not match the expected API version ({version})"
            )));
        }
        if !its_kind.is_empty() && its_kind != **kind {
            return Err(Failure::bad_request(format!(
                "{its_kind} in version {version:?} cannot be handled as a {kind}: \
                 the kind in the data does not match the expected kind"
            )));
        }
        let complete = !its_kind.is_empty() && !its_version.is_empty();
        if !complete && self.resource.crd.is_some() {
            return Err(Failure::bad_request("Object 'Kind' is missing in the request's body"));
        }
        if let Some(root) = object.as_object_mut() {
            root.insert("apiVersion".into(), version.into());
            root.insert("kind".into(), (**kind).into());
        }
        Ok(())
    }

    /// Drops what the schema does not know and fills in defaults. Returns warnings.
    ///
    /// # Errors
    /// 400 when fields are unknown or double and that is forbidden.
    pub fn complete(
        &self,
        object: &mut Value,
        duplicates: &[String],
        unknown: Unknown,
    ) -> Result<Vec<String>, Failure> {
        let dropped = self.resource.schema.prune(object);
        let twice = duplicates.iter().map(|path| format!("duplicate field {path:?}"));
        let strange = dropped.iter().map(|path| format!("unknown field {path:?}"));
        let told: Vec<String> = twice.chain(strange).collect();
        if unknown == Unknown::Strict && !told.is_empty() {
            let (kind, version) = (&self.resource.kind, self.resource.api_version());
            return Err(Failure::bad_request(match self.resource.crd {
                Some(_) => format!("strict decoding error: {}", told.join(", ")),
                None => format!(
                    "{kind} in version {version:?} cannot be handled as a {kind}: \
                     strict decoding error: {}",
                    told.join(", ")
                ),
            }));
        }
        self.resource.schema.fill_in(object);
        (self.kind.default)(object);
        Ok(if unknown == Unknown::Warn { told } else { Vec::new() })
    }

    /// Makes a new object of what was sent.
    ///
    /// # Errors
    /// 422 when it has no name.
    pub fn begin(&self, object: &mut Value, now: Timestamp) -> Result<(), Failure> {
        for field in SERVERS.iter().chain(&["resourceVersion"]) {
            meta::set(object, field, Value::Null);
        }
        if meta::text(object, "name").is_empty() {
            let prefix = meta::text(object, "generateName").to_owned();
            if prefix.is_empty() {
                let cause = Cause {
                    reason: "FieldValueRequired",
                    message: "Required value: name or generateName is required".into(),
                    field: "metadata.name".into(),
                };
                return Err(self.invalid("", &[cause]));
            }
            meta::set(object, "name", crate::names::generate(&prefix).into());
        }
        meta::set(object, "uid", uuid::Uuid::new_v4().to_string().into());
        meta::set(object, "creationTimestamp", meta::moment(now).into());
        if self.kind.generation {
            meta::set(object, "generation", 1.into());
        }
        if self.drops_status() {
            take(object, None, "status");
        }
        (self.kind.prepare_create)(object);
        Ok(())
    }

    /// A custom resource's status is written through its subresource alone; of built-in kinds
    /// [`Kind::prepare_create`] knows.
    fn drops_status(&self) -> bool {
        self.resource.status && self.resource.crd.is_some()
    }

    /// Makes what was sent the successor of what is there.
    ///
    /// # Errors
    /// 409 when it is meant for another object, or for another revision of this one.
    pub fn succeed(&self, new: &mut Value, old: &Value, part: Part) -> Result<(), Failure> {
        self.check_identity(new, old)?;
        for field in SERVERS.iter().chain(&["resourceVersion"]) {
            meta::set(new, field, old["metadata"][*field].clone());
        }
        match part {
            Part::Main => {
                if self.drops_status() {
                    take(new, old.get("status"), "status");
                }
                (self.kind.prepare_update)(new, old);
            }
            Part::Status => {
                if self.resource.crd.is_some() {
                    self.keep_all_but_status(new, old);
                }
                (self.kind.prepare_status)(new, old);
            }
        }
        if self.kind.generation && part == Part::Main && self.wants_more(new, old) {
            let generation = old["metadata"]["generation"].as_i64().unwrap_or(0);
            meta::set(new, "generation", (generation + 1).into());
        }
        Ok(())
    }

    /// Checks that what is applied is meant for what is there.
    ///
    /// # Errors
    /// 409.
    pub fn check_identity_of_patch(&self, applied: &Value, old: &Value) -> Result<(), Failure> {
        let revision = meta::text(applied, "resourceVersion");
        let uid = meta::text(applied, "uid");
        let differs = |own: &str, field: &str| !own.is_empty() && own != meta::text(old, field);
        match differs(revision, "resourceVersion") || differs(uid, "uid") {
            true => Err(Failure::conflict(self.subject(), MODIFIED)),
            false => Ok(()),
        }
    }

    fn check_identity(&self, new: &Value, old: &Value) -> Result<(), Failure> {
        let uid = meta::text(new, "uid");
        if !uid.is_empty() && uid != meta::text(old, "uid") {
            let why = format!(
                "Precondition failed: UID in precondition: {uid}, UID in object meta: {}",
                meta::text(old, "uid")
            );
            return Err(Failure::conflict(self.subject(), &why));
        }
        let revision = meta::text(new, "resourceVersion");
        if revision.is_empty() && !self.kind.unconditional_update {
            let cause = Cause {
                reason: "FieldValueInvalid",
                message: "Invalid value: 0: must be specified for an update".into(),
                field: "metadata.resourceVersion".into(),
            };
            return Err(self.invalid(self.name, &[cause]));
        }
        if !revision.is_empty() && revision != meta::text(old, "resourceVersion") {
            return Err(Failure::conflict(self.subject(), MODIFIED));
        }
        Ok(())
    }

    fn keep_all_but_status(&self, new: &mut Value, old: &Value) {
        let status = new.get("status").cloned();
        let managed = new["metadata"]["managedFields"].clone();
        *new = old.clone();
        take(new, status.as_ref(), "status");
        meta::set(new, "managedFields", managed);
    }

    /// Whether a change is one of what is wanted, not of what is.
    fn wants_more(&self, new: &Value, old: &Value) -> bool {
        let beside = |object: &Value| -> Map<String, Value> {
            let all = object.as_object().cloned().unwrap_or_default();
            let kept = |field: &str| match self.resource.crd {
                Some(_) => field != "metadata" && !(field == "status" && self.resource.status),
                None => field == "spec" || field == "webhooks",
            };
            all.into_iter().filter(|(field, _)| kept(field)).collect()
        };
        beside(new) != beside(old)
    }

    /// Checks an object that is to be stored.
    ///
    /// # Errors
    /// 422 with all that is wrong. 400 for a wrong type in what is built in: Kubernetes cannot
    /// even read that.
    pub fn validate(&self, new: &Value, old: Option<&Value>) -> Result<(), Failure> {
        let mut causes = self.resource.schema.validate(new, old);
        let unreadable = causes.iter().find(|cause| cause.reason == "FieldValueTypeInvalid");
        if let Some(cause) = unreadable.filter(|_| self.resource.crd.is_none()) {
            let (kind, version) = (&self.resource.kind, self.resource.api_version());
            let why = cause.message.splitn(3, ": ").last().unwrap_or_default();
            return Err(Failure::bad_request(format!(
                "{kind} in version {version:?} cannot be handled as a {kind}: {why}"
            )));
        }
        causes.extend(crate::names::validate(self.resource, new, old));
        if causes.is_empty() {
            causes.extend((self.kind.validate)(new));
            if let Some(old) = old {
                causes.extend((self.kind.validate_update)(new, old));
            }
        }
        match causes.is_empty() {
            true => Ok(()),
            false => Err(self.invalid(meta::text(new, "name"), &causes)),
        }
    }
}

/// Why an update of an older revision is refused: clients look for it.
pub const MODIFIED: &str =
    "the object has been modified; please apply your changes to the latest version and try again";

fn take(object: &mut Value, from: Option<&Value>, field: &str) {
    let Some(root) = object.as_object_mut() else { return };
    match from {
        Some(value) => drop(root.insert(field.into(), value.clone())),
        None => drop(root.remove(field)),
    }
}
