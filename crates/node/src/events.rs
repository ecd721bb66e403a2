//! Events: what happened to an object, for people.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::{ObjectMeta, Patch, PatchParams, PostParams};
use kube::{Api, Client};
use serde_json::json;
use uuid::Uuid;

/// How an event is meant.
#[derive(Debug, Clone, Copy)]
pub enum Kind {
    /// As it should be.
    Normal,
    /// Something is wrong.
    Warning,
}

/// Says what happens, as one component.
#[derive(Clone)]
pub struct Recorder {
    client: Client,
    source: EventSource,
}

impl Recorder {
    /// For a component, on a node where it is on one.
    pub fn new(client: Client, component: &str, host: Option<&str>) -> Self {
        let source = EventSource { component: Some(component.into()), host: host.map(Into::into) };
        Self { client, source }
    }

    /// Says something about an object. The same said again is counted. An event that cannot be
    /// written is only logged: nothing depends on it.
    pub async fn say(&self, about: &ObjectReference, kind: Kind, reason: &str, message: &str) {
        if let Err(error) = self.write(about, kind, reason, message).await {
            tracing::warn!("the event {reason} ({message}) cannot be written: {error}");
        }
    }

    async fn write(
        &self,
        about: &ObjectReference,
        kind: Kind,
        reason: &str,
        message: &str,
    ) -> kube::Result<()> {
        let namespace = about.namespace.as_deref().unwrap_or("default");
        let api: Api<Event> = Api::namespaced(self.client.clone(), namespace);
        let object = about.name.as_deref().unwrap_or_default();
        let what = format!("{:?} {reason} {message} {:?}", about.uid, self.source.component);
        let id = Uuid::new_v5(&Uuid::NAMESPACE_OID, what.as_bytes()).simple().to_string();
        let name = format!("{object}.{}", &id[..16]);
        let now = Time(Timestamp::now());
        if let Some(before) = api.get_opt(&name).await? {
            let count = before.count.unwrap_or(1).saturating_add(1);
            let patch = Patch::Merge(json!({"count": count, "lastTimestamp": now}));
            return api.patch(&name, &PatchParams::default(), &patch).await.map(|_| ());
        }
        let event = Event {
            metadata: ObjectMeta {
                name: Some(name),
                namespace: Some(namespace.into()),
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
