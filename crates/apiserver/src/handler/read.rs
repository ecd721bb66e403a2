//! Get and list: from the cache alone.

use super::respond::{self, Listing};
use super::{Call, Handler};
use crate::body::Answer;
use crate::meta;
use crate::resource::Resource;
use crate::selector::Selection;
use crate::status::Failure;
use crate::store::{Expired, Key, Query};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::StatusCode;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;

/// Objects looked at in one go when a limit and a selector are given.
const CHUNK: usize = 500;
/// A revision that is still to come is waited for so long.
const COMING: Duration = Duration::from_secs(3);

/// Clients look for it.
const TOO_OLD_TOKEN: &str = "The provided continue parameter is too old to display a consistent \
    list result. You can start a new list without the continue parameter.";

/// `resourceVersionMatch`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Match {
    /// Of this revision.
    Exact,
    /// Of this revision or a later one.
    NotOlderThan,
}

impl Handler {
    /// One object.
    ///
    /// # Errors
    /// 404.
    pub async fn get(&self, call: &Call) -> Result<Answer, Failure> {
        self.wait_for(call.options.revision).await?;
        let found = self.store.get(&call.key(&call.name));
        let found = found.ok_or_else(|| Failure::not_found(call.subject(&call.name)))?;
        respond::one(call, StatusCode::OK, &call.resource.served(&found.body))
    }

    /// Objects, in the order of their names.
    ///
    /// # Errors
    /// 410 when the revision is gone, 400 when the options contradict themselves.
    pub async fn list(&self, call: &Call) -> Result<Answer, Failure> {
        let listing = self.find(call).await?;
        respond::many(call, &listing)
    }

    /// The objects that a list asks for.
    ///
    /// # Errors
    /// As [`Handler::list`].
    pub async fn find(&self, call: &Call) -> Result<Listing, Failure> {
        let (at, mut after) = self.beginning(call).await?;
        let resource = &call.resource;
        let key = resource.storage_key();
        let limit = call.options.limit.unwrap_or(usize::MAX);
        let mut listing = Listing::default();
        let mut at = at;
        loop {
            let chunk = match call.selection.is_everything() {
                true => limit - listing.objects.len(),
                false => CHUNK.max(limit.min(CHUNK)),
            };
            let query = Query {
                resource: &key,
                namespace: call.in_namespace(),
                at,
                after: after.clone(),
                limit: chunk,
            };
            let part = self.store.list(&query).map_err(|e| match call.options.next {
                Some(_) => Failure::expired(TOO_OLD_TOKEN),
                None => too_old(&e),
            })?;
            listing.revision = part.revision;
            at = Some(part.revision);
            let mut left = part.remaining;
            let count = part.objects.len();
            for (n, (key, object)) in part.objects.into_iter().enumerate() {
                if listing.objects.len() == limit {
                    left += count - n;
                    break;
                }
                after = Some(key);
                if call.selects(&object.body) {
                    listing.objects.push(resource.served(&object.body));
                }
            }
            if left == 0 {
                return Ok(listing);
            }
            if listing.objects.len() == limit {
                listing.next = after.map(|key| token(part.revision, &key));
                listing.remaining = call.selection.is_everything().then_some(left);
                return Ok(listing);
            }
        }
    }

    /// The revision of a list, None for the present, and the object behind which it begins.
    async fn beginning(&self, call: &Call) -> Result<(Option<u64>, Option<Key>), Failure> {
        let options = &call.options;
        if let Some(text) = &options.next {
            if options.revision.is_some_and(|revision| revision > 0) {
                return Err(Failure::bad_request(
                    "specifying resource version is not allowed when using continue",
                ));
            }
            let (revision, after) = parse_token(text, &call.resource.storage_key())
                .ok_or_else(|| Failure::bad_request("continue key is not valid"))?;
            return Ok((Some(revision), Some(after)));
        }
        match (options.matching, options.revision) {
            (Some(Match::Exact), Some(revision)) => {
                self.wait_for(Some(revision)).await?;
                Ok((Some(revision), None))
            }
            (_, revision) => {
                self.wait_for(revision).await?;
                Ok((None, None))
            }
        }
    }

    /// Waits for a revision that a client has seen elsewhere.
    ///
    /// # Errors
    /// 504 when it does not come.
    pub(super) async fn wait_for(&self, revision: Option<u64>) -> Result<(), Failure> {
        let Some(wanted) = revision else { return Ok(()) };
        let until = tokio::time::Instant::now() + COMING;
        loop {
            let now = self.store.revision();
            if now >= wanted {
                return Ok(());
            }
            if tokio::time::Instant::now() > until {
                let why = format!("Too large resource version: {wanted}, current: {now}");
                let causes = json!({"causes": [{
                    "reason": "ResourceVersionTooLarge", "message": "Too large resource version",
                }], "retryAfterSeconds": 1});
                return Err(Failure { details: causes, ..Failure::timeout(why) });
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Call {
    /// The namespace that is asked for; None: all, or the resource has none.
    pub(super) fn in_namespace(&self) -> Option<&str> {
        let asked = self.resource.namespaced && !self.namespace.is_empty();
        asked.then_some(&*self.namespace)
    }

    /// Whether a stored object is one that is asked for.
    pub(super) fn selects(&self, stored: &Arc<Value>) -> bool {
        let named = self.name.is_empty() || *meta::text(stored, "name") == *self.name;
        named && self.selection.matches(&self.resource, stored)
    }
}

/// By labels and by fields.
impl Selection {
    /// Whether an object, as it is stored, is selected.
    pub fn matches(&self, resource: &Resource, stored: &Arc<Value>) -> bool {
        self.is_everything() || {
            let object = resource.served(stored);
            self.labels.matches(meta::map(&object, "labels")) && self.fields.matches(&object)
        }
    }
}

pub(super) fn too_old(expired: &Expired) -> Failure {
    let Expired { asked, oldest } = expired;
    Failure::expired(format!("too old resource version: {asked} ({oldest})"))
}

/// Where the next part of a list begins.
fn token(revision: u64, after: &Key) -> String {
    let start = format!("{}/{}", after.namespace, after.name);
    URL_SAFE_NO_PAD
        .encode(json!({"v": "meta.k8s.io/v1", "rv": revision, "start": start}).to_string())
}

fn parse_token(text: &str, resource: &str) -> Option<(u64, Key)> {
    let token: Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(text).ok()?).ok()?;
    let (namespace, name) = token["start"].as_str()?.split_once('/')?;
    Some((token["rv"].as_u64()?, Key::new(resource, namespace, name)))
}

impl Resource {
    /// A stored object in the version that is served.
    pub fn served(&self, stored: &Arc<Value>) -> Arc<Value> {
        match self.serves_as_stored(stored) {
            true => stored.clone(),
            false => Arc::new(self.to_served(stored)),
        }
    }
}
