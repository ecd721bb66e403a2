//! Events: what happened to an object, for people.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::{ObjectMeta, Patch, PatchParams, PostParams};
use kube::{Api, Client};
use serde_json::json;
use std::collections::HashMap;
use std::sync::{Arc, Mutex};

/// How an event is meant.
#[derive(Debug, Clone, Copy)]
pub enum Kind {
    /// As it should be.
    Normal,
    /// Something is wrong.
    Warning,
}

/// How many events are remembered to be counted: as client-go's recorder does.
const REMEMBERED: usize = 4096;

/// Says what happens, as one component. It only writes events, and remembers what it wrote.
#[derive(Clone)]
pub struct Recorder {
    client: Client,
    source: EventSource,
    /// Names and counts, by what was said.
    said: Arc<Mutex<HashMap<String, (String, i32)>>>,
}

impl Recorder {
    /// For a component, on a node where it is on one.
    pub fn new(client: Client, component: &str, host: Option<&str>) -> Self {
        let source = EventSource { component: Some(component.into()), host: host.map(Into::into) };
        Self { client, source, said: Arc::default() }
    }

    /// Says something about an object. The same said again is counted. An event that cannot be
    /// written is only logged: nothing depends on it.
    pub async fn say(&self, about: &ObjectReference, kind: Kind, reason: &str, message: &str) {
        let namespace = about.namespace.as_deref().unwrap_or("default");
        let api: Api<Event> = Api::namespaced(self.client.clone(), namespace);
        let key = format!("{:?} {kind:?} {reason} {message}", about.uid);
        let (name, count) = self.count(key, about.name.as_deref().unwrap_or_default());
        let mut written = Ok(());
        let mut is_new = count == 1;
        if !is_new {
            let now = Time(Timestamp::now());
            let patch = Patch::Merge(json!({"count": count, "lastTimestamp": now}));
            match api.patch(&name, &PatchParams::default(), &patch).await {
                // Events do not last.
                Err(kube::Error::Api(status)) if status.code == 404 => is_new = true,
                other => written = other.map(|_| ()),
            }
        }
        if is_new {
            written = self.create(&api, about, kind, reason, message, &name).await;
        }
        if let Err(error) = written {
            tracing::warn!("the event {reason} ({message}) cannot be written: {}", why(&error));
        }
    }

    /// The name of an event, and how often it has been said with this time.
    fn count(&self, key: String, object: &str) -> (String, i32) {
        let mut said = self.said.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if said.len() >= REMEMBERED {
            said.clear();
        }
        let new = || (format!("{object}.{:x}", Timestamp::now().as_nanosecond()), 0);
        let found = said.entry(key).or_insert_with(new);
        found.1 = found.1.saturating_add(1);
        found.clone()
    }

    async fn create(
        &self,
        api: &Api<Event>,
        about: &ObjectReference,
        kind: Kind,
        reason: &str,
        message: &str,
        name: &str,
    ) -> kube::Result<()> {
        let now = Time(Timestamp::now());
        let event = Event {
            metadata: ObjectMeta {
                name: Some(name.into()),
                namespace: api.namespace().map(Into::into),
                ..ObjectMeta::default()
            },
            involved_object: about.clone(),
            reason: Some(reason.into()),
            message: Some(message.into()),
            type_: Some(format!("{kind:?}")),
            source: Some(self.source.clone()),
            reporting_component: self.source.component.clone(),
            reporting_instance: self.source.host.clone(),
            first_timestamp: Some(now.clone()),
            last_timestamp: Some(now),
            count: Some(1),
            ..Event::default()
        };
        api.create(&PostParams::default(), &event).await.map(|_| ())
    }
}

/// What the API said, without all that came with it.
pub fn why(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => status.message.clone(),
        other => rooted(other),
    }
}

/// An error, and what is at the bottom of it: that no connection was made is told far above why.
pub fn rooted(error: &dyn std::error::Error) -> String {
    let root = std::iter::successors(error.source(), |cause| cause.source()).last();
    let (text, root) = (error.to_string(), root.map(ToString::to_string).unwrap_or_default());
    match text.contains(&root) {
        true => text,
        false => format!("{text}: {root}"),
    }
}
