//! Create, update and patch: read, prepare, admit, write; again when another was faster.

use super::prepare::{MODIFIED, Part, Target};
use super::{Call, Handler};
use crate::apply::{self, Writer};
use crate::decode::{self, Decoded};
use crate::patch::Patch;
use crate::resource::Resource;
use crate::status::Failure;
use crate::store::{Change, Expect, Key, Object, To, WriteError};
use crate::{deletion, kinds, meta};
use jiff::Timestamp;
use serde_json::Value;
use std::sync::Arc;

/// Tries of a write that others always outrun.
const TRIES: usize = 16;

/// What a write made.
#[derive(Debug)]
pub struct Written {
    /// As it is stored now, or would be.
    pub object: Arc<Value>,
    /// It did not exist.
    pub created: bool,
    /// For the client.
    pub warnings: Vec<String>,
}

/// Where the new object of an update comes from.
enum Source {
    /// The client sent all of it.
    Body(Decoded),
    /// A change of what is there.
    Patch(Patch),
}

/// A try of a write.
enum Try {
    Done(Written),
    /// Another was faster.
    Again,
}

impl Handler {
    /// Creates the object that was sent.
    ///
    /// # Errors
    /// Why there is no new object.
    pub async fn create(&self, call: &Call) -> Result<Written, Failure> {
        let decoded = decode::object(call.media.as_deref(), &call.body)?;
        let mut written = Err(self.outrun(call));
        for _ in 0..TRIES {
            match self.try_create(call, decoded.clone()).await? {
                Try::Done(done) => {
                    written = Ok(done);
                    break;
                }
                Try::Again => {}
            }
        }
        written
    }

    async fn try_create(&self, call: &Call, decoded: Decoded) -> Result<Try, Failure> {
        let Decoded { value: mut object, duplicates } = decoded;
        let now = Timestamp::now();
        let target = call.target();
        target.address(&mut object)?;
        if !meta::text(&object, "resourceVersion").is_empty() {
            return Err(Failure::bad_request(
                "resourceVersion should not be set on objects to be created",
            ));
        }
        let warnings = target.complete(&mut object, &duplicates, call.options.unknown)?;
        target.begin(&mut object, now)?;
        self.admit_new(call, &mut object)?;
        self.extend_new(call, &mut object, None).await?;
        let object = apply::updated(None, object, &call.resource.schema, &call.writer(now));
        self.put_new(call, object, warnings).await
    }

    /// Writes an object that is complete but for the last checks.
    async fn put_new(
        &self,
        call: &Call,
        mut object: Value,
        mut warnings: Vec<String>,
    ) -> Result<Try, Failure> {
        let target = call.target();
        target.validate(&object, None)?;
        warnings.extend((target.kind.warnings)(&object));
        warnings.extend(self.extend_judgement(call, Some(&object), None).await?);
        let key = call.key(meta::text(&object, "name"));
        if self.store.get(&key).is_some() {
            return Err(Failure::exists(call.subject(&key.name)));
        }
        let mut changes = self.admit_change(call, &mut object, None)?;
        let object = call.resource.to_stored(object);
        if call.options.dry_run {
            return Ok(Try::Done(Written { object: object.into(), created: true, warnings }));
        }
        changes
            .insert(0, Change { key: key.clone(), expect: Expect::Absent, to: To::Body(object) });
        match self.store.write(changes).await {
            Ok(objects) => Ok(Try::Done(written(objects, true, warnings))),
            Err(WriteError::Conflict { key: other, .. }) if other == key => {
                Err(Failure::exists(call.subject(&key.name)))
            }
            Err(WriteError::Conflict { .. }) => Ok(Try::Again),
            Err(error) => Err(refused(&error)),
        }
    }

    /// Replaces an object, or its status.
    ///
    /// # Errors
    /// Why it stays as it is.
    pub async fn update(&self, call: &Call) -> Result<Written, Failure> {
        let decoded = decode::object(call.media.as_deref(), &call.body)?;
        self.change(call, &Source::Body(decoded)).await
    }

    /// Changes an object, or its status.
    ///
    /// # Errors
    /// Why it stays as it is.
    pub async fn patch(&self, call: &Call) -> Result<Written, Failure> {
        let media = call.media.as_deref().unwrap_or_default();
        let patch = Patch::parse(media, &call.body)?;
        if matches!(patch, Patch::Strategic(_)) && call.resource.crd.is_some() {
            return Err(Failure::unsupported_media(
                "the body of the request was in an unknown format - accepted media types include: \
                 application/json-patch+json, application/merge-patch+json, application/apply-patch+yaml",
            ));
        }
        if matches!(patch, Patch::Apply(_)) && call.options.manager.is_none() {
            return Err(Failure::bad_request(
                "PatchOptions.meta.k8s.io \"\" is invalid: fieldManager: Required value: \
                 is required for apply patch",
            ));
        }
        self.change(call, &Source::Patch(patch)).await
    }

    async fn change(&self, call: &Call, source: &Source) -> Result<Written, Failure> {
        for _ in 0..TRIES {
            if let Try::Done(written) = self.try_change(call, source).await? {
                return Ok(written);
            }
        }
        Err(self.outrun(call))
    }

    async fn try_change(&self, call: &Call, source: &Source) -> Result<Try, Failure> {
        let key = call.key(&call.name);
        let Some(found) = self.store.get(&key) else { return self.make(call, source).await };
        let old = call.resource.to_served(&found.body);
        let now = Timestamp::now();
        let (new, warnings) = self.next(call, source, &old, now)?;
        self.put_changed(call, key, &found, &old, new, warnings).await
    }

    /// There is nothing to change: some writes create it then.
    async fn make(&self, call: &Call, source: &Source) -> Result<Try, Failure> {
        let target = call.target();
        let now = Timestamp::now();
        let creates = call.subresource.is_empty();
        let (mut object, duplicates) = match source {
            Source::Patch(Patch::Apply(applied)) if creates => (applied.clone(), Vec::new()),
            Source::Body(decoded) if creates && target.kind.create_on_update => {
                (decoded.value.clone(), decoded.duplicates.clone())
            }
            _ => return Err(Failure::not_found(call.subject(&call.name))),
        };
        target.address(&mut object)?;
        if !meta::text(&object, "uid").is_empty()
            || !meta::text(&object, "resourceVersion").is_empty()
        {
            return Err(Failure::conflict(target.subject(), MODIFIED));
        }
        let warnings = target.complete(&mut object, &duplicates, call.options.unknown)?;
        target.begin(&mut object, now)?;
        self.admit_new(call, &mut object)?;
        self.extend_new(call, &mut object, None).await?;
        let (schema, writer) = (&call.resource.schema, call.writer(now));
        let object = match source {
            Source::Patch(Patch::Apply(applied)) => {
                let mut applied = applied.clone();
                target.address(&mut applied)?;
                apply::created(object, &applied, schema, &writer)
            }
            _ => apply::updated(None, object, schema, &writer),
        };
        self.put_new(call, object, warnings).await
    }

    /// What the object is to become, with its managers.
    fn next(
        &self,
        call: &Call,
        source: &Source,
        old: &Value,
        now: Timestamp,
    ) -> Result<(Value, Vec<String>), Failure> {
        let target = call.target();
        let (schema, writer) = (&call.resource.schema, call.writer(now));
        let none = Vec::new();
        let (mut new, duplicates, applies) = match source {
            Source::Body(decoded) => (decoded.value.clone(), &decoded.duplicates, false),
            Source::Patch(Patch::Apply(applied)) => {
                let mut applied = applied.clone();
                target.address(&mut applied)?;
                target.check_identity_of_patch(&applied, old)?;
                let merged = apply::apply(old, &applied, schema, &writer, call.options.force)?;
                (merged, &none, true)
            }
            Source::Patch(patch) => (patch.apply_to(old, schema)?, &none, false),
        };
        target.address(&mut new)?;
        let warnings = target.complete(&mut new, duplicates, call.options.unknown)?;
        target.succeed(&mut new, old, call.part())?;
        if !applies {
            new = apply::updated(Some(old), new, schema, &writer);
        }
        Ok((new, warnings))
    }

    /// Writes what an object has become, if it is another.
    async fn put_changed(
        &self,
        call: &Call,
        key: Key,
        found: &Object,
        old: &Value,
        mut new: Value,
        mut warnings: Vec<String>,
    ) -> Result<Try, Failure> {
        let target = call.target();
        self.extend_new(call, &mut new, Some(old)).await?;
        let mut changes = self.admit_change(call, &mut new, Some(old))?;
        if same(&new, old) {
            let object = found.body.clone();
            return Ok(Try::Done(Written { object, created: false, warnings }));
        }
        target.validate(&new, Some(old))?;
        warnings.extend((target.kind.warnings)(&new));
        warnings.extend(self.extend_judgement(call, Some(&new), Some(old)).await?);
        let over = deletion::is_over(&new, call.grace());
        let new = call.resource.to_stored(new);
        if call.options.dry_run {
            return Ok(Try::Done(Written { object: new.into(), created: false, warnings }));
        }
        let to = if over { To::Nothing(new) } else { To::Body(new) };
        changes.insert(0, Change { key, expect: Expect::At(found.revision), to });
        match self.store.write(changes).await {
            Ok(objects) => Ok(Try::Done(written(objects, false, warnings))),
            Err(WriteError::Conflict { .. }) => Ok(Try::Again),
            Err(error) => Err(refused(&error)),
        }
    }

    fn outrun(&self, call: &Call) -> Failure {
        Failure::conflict(call.subject(&call.name), MODIFIED)
    }
}

/// There is an object for each change.
fn written(objects: Vec<Object>, created: bool, warnings: Vec<String>) -> Written {
    let object = objects.into_iter().next().map(|o| o.body).unwrap_or_default();
    Written { object, created, warnings }
}

impl Call {
    /// What the request writes.
    pub fn target(&self) -> Target<'_> {
        Target {
            resource: &self.resource,
            kind: kind_of(&self.resource),
            namespace: &self.namespace,
            name: &self.name,
        }
    }

    fn part(&self) -> Part {
        match &*self.subresource {
            "status" => Part::Status,
            _ => Part::Main,
        }
    }

    fn writer(&self, now: Timestamp) -> Writer {
        Writer {
            manager: self.options.manager.clone().unwrap_or_else(|| self.default_manager()),
            subresource: self.subresource.to_string(),
            has_status: self.resource.status,
            api_version: self.resource.api_version(),
            now: meta::moment(now),
        }
    }

    /// The program's name, from its user agent: up to its version.
    fn default_manager(&self) -> String {
        let name = self.user_agent.split('/').next().unwrap_or_default();
        let printable = name.chars().filter(|c| !c.is_control()).take(128).collect::<String>();
        if printable.is_empty() { "unknown".into() } else { printable }
    }
}

/// What Kubernetes does in code for a resource.
pub fn kind_of(resource: &Resource) -> &'static kinds::Kind {
    match resource.crd {
        Some(_) => kinds::custom(),
        None => kinds::kind(&resource.key()),
    }
}

/// Equal but for when managers last changed it.
fn same(new: &Value, old: &Value) -> bool {
    let but_managers = |object: &Value| {
        let mut object = object.clone();
        meta::set(&mut object, "managedFields", Value::Null);
        object
    };
    new == old
        || (but_managers(new) == but_managers(old)
            && apply::same_managers(
                &new["metadata"]["managedFields"],
                &old["metadata"]["managedFields"],
            ))
}

pub(super) fn refused(error: &WriteError) -> Failure {
    tracing::error!(error = %chain(error), "a write failed");
    Failure::internal(chain(error))
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}
