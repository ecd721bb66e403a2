//! Delete, of one object and of many.

use super::prepare::MODIFIED;
use super::write::refused;
use super::{Call, Handler, respond};
use crate::body::Answer;
use crate::deletion::{self, Fate, Options, Propagation};
use crate::status::Failure;
use crate::store::{Change, Expect, Key, Object, To, WriteError};
use crate::{decode, meta};
use http::StatusCode;
use jiff::Timestamp;
use serde_json::{Value, json};
use std::sync::Arc;

/// Tries of a delete that others always outrun.
const TRIES: usize = 16;

impl Handler {
    /// Deletes an object, or marks it as to be deleted.
    ///
    /// # Errors
    /// 404; 409 when a precondition does not hold.
    pub async fn delete(&self, call: &Call) -> Result<Answer, Failure> {
        let options = options(call)?;
        let key = call.key(&call.name);
        let (object, gone) = self.delete_one(call, &key, &options).await?;
        if gone {
            let details = json!({
                "name": meta::text(&object, "name"), "group": *call.resource.group,
                "kind": *call.resource.plural, "uid": meta::text(&object, "uid"),
            });
            let mut status = json!({
                "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success",
                "details": details,
            });
            if let Some(details) = status["details"].as_object_mut() {
                details.retain(|_, v| v != "");
            }
            // Pods and custom resources with a grace period are returned as they were.
            return match call.grace() {
                deletion::Grace::Pod => respond::one(call, StatusCode::OK, &object),
                _ => Ok(crate::body::json(StatusCode::OK, &status)),
            };
        }
        respond::one(call, StatusCode::OK, &object)
    }

    /// Deletes all that is selected. What others delete meanwhile is no failure.
    ///
    /// # Errors
    /// The first object that cannot be deleted.
    pub async fn delete_all(&self, call: &Call) -> Result<Answer, Failure> {
        let options = options(call)?;
        let listing = self.find(call).await?;
        for object in &listing.objects {
            let key = Key::new(
                &call.resource.storage_key(),
                meta::text(object, "namespace"),
                meta::text(object, "name"),
            );
            let options =
                Options { uid: Some(meta::text(object, "uid").into()), ..options.clone() };
            match self.delete_one(call, &key, &options).await {
                Ok(_) => {}
                Err(failure) if failure.code == 404 || failure.code == 409 => {}
                Err(failure) => return Err(failure),
            }
        }
        respond::many(call, &listing)
    }

    /// Returns the object as it is, or was last, and whether it is gone.
    async fn delete_one(
        &self,
        call: &Call,
        key: &Key,
        options: &Options,
    ) -> Result<(Arc<Value>, bool), Failure> {
        for _ in 0..TRIES {
            let found = self.store.get(key);
            let found = found.ok_or_else(|| Failure::not_found(call.subject(&key.name)))?;
            self.admit_delete(call, &found.body)?;
            self.extend_judgement(call, None, Some(&found.body)).await?;
            let subject = call.subject(&key.name);
            let fate =
                deletion::delete(&found.body, options, call.grace(), subject, Timestamp::now())?;
            let (next, gone) = match fate {
                Fate::Going => return Ok((call.resource.served(&found.body), false)),
                Fate::Marked(next) => (next, false),
                Fate::Gone => ((*found.body).clone(), true),
            };
            if options.dry_run {
                return Ok((Arc::new(next), gone));
            }
            let to = if gone { To::Nothing(next) } else { To::Body(next) };
            let change = Change { key: key.clone(), expect: Expect::At(found.revision), to };
            match self.store.write(vec![change]).await {
                Ok(objects) => return Ok((self.deleted(call, objects), gone)),
                Err(WriteError::Conflict { .. }) => {}
                Err(error) => return Err(refused(&error)),
            }
        }
        Err(Failure::conflict(call.subject(&key.name), MODIFIED))
    }

    fn deleted(&self, call: &Call, objects: Vec<Object>) -> Arc<Value> {
        // There is one for each change.
        let object = objects.into_iter().next().map(|o| o.body).unwrap_or_default();
        call.resource.served(&object)
    }
}

/// Of the query, unless the body says more.
fn options(call: &Call) -> Result<Options, Failure> {
    let mut options = call.options.deletion.clone();
    options.dry_run |= call.options.dry_run;
    if call.body.is_empty() {
        return Ok(options);
    }
    let body = decode::object(call.media.as_deref(), &call.body)?.value;
    let kind = body["kind"].as_str().unwrap_or("DeleteOptions");
    if kind != "DeleteOptions" {
        return Err(Failure::bad_request(format!(
            "the body of a delete is DeleteOptions, not {kind}"
        )));
    }
    if let Some(grace) = body.get("gracePeriodSeconds").filter(|g| !g.is_null()) {
        let why = || Failure::bad_request("gracePeriodSeconds is not a whole number");
        options.grace = Some(grace.as_i64().ok_or_else(why)?);
    }
    if let Some(policy) = body["propagationPolicy"].as_str() {
        options.propagation = Some(propagation(policy)?);
    } else if let Some(orphan) = body["orphanDependents"].as_bool() {
        options.propagation =
            Some(if orphan { Propagation::Orphan } else { Propagation::Background });
    }
    let wanted = |field: &str| body["preconditions"][field].as_str().map(str::to_owned);
    options.uid = wanted("uid").or(options.uid);
    options.revision = wanted("resourceVersion").or(options.revision);
    options.dry_run |= super::is_dry_run(body["dryRun"].as_array().into_iter().flatten())?;
    Ok(options)
}

/// A `propagationPolicy`.
///
/// # Errors
/// 422 for one that there is not.
pub(super) fn propagation(policy: &str) -> Result<Propagation, Failure> {
    match policy {
        "Orphan" => Ok(Propagation::Orphan),
        "Background" => Ok(Propagation::Background),
        "Foreground" => Ok(Propagation::Foreground),
        other => Err(Failure::bad_request(format!(
            "DeleteOptions.meta.k8s.io \"\" is invalid: propagationPolicy: Unsupported value: \
             {other:?}: supported values: \"Foreground\", \"Background\", \"Orphan\", \"nil\""
        ))),
    }
}
