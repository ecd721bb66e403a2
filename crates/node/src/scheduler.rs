//! The scheduler: puts pods on nodes, or says why it cannot.
//!
//! Each round takes a [`snapshot::Snapshot`], decides for every waiting pod with [`plan::decide`],
//! and acts. Pods of higher priority come first; none is driven off for another.

pub mod claims;
pub mod neighbours;
pub mod nodes;
pub mod plan;
pub mod resources;
pub mod snapshot;

use k8s_openapi::api::core::v1::{
    Binding, Namespace, Node, ObjectReference, PersistentVolume, PersistentVolumeClaim, Pod,
};
use k8s_openapi::api::storage::v1::StorageClass;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Status};
use kube::api::{Patch, PatchParams, PostParams};
use kube::runtime::reflector::Store;
use kube::runtime::watcher;
use kube::{Api, Client};
use plan::Decision;
use reconcile::events::{Kind, Recorder, why};
use reconcile::kept::{Keeper, reference};
use reconcile::ready;
use serde_json::json;
use snapshot::{Snapshot, has_ended, node_name};
use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

/// The scheduler's name in pods that want it.
const NAME: &str = "default-scheduler";
/// What failed is tried again after this, though nothing has changed.
const AGAIN: Duration = Duration::from_secs(10);
/// Changes that come together are looked at together.
const GATHER: Duration = Duration::from_millis(2);

struct Scheduler {
    client: Client,
    events: Recorder,
    pods: Store<Pod>,
    nodes: Store<Node>,
    namespaces: Store<Namespace>,
    claims: Store<PersistentVolumeClaim>,
    volumes: Store<PersistentVolume>,
    classes: Store<StorageClass>,
    /// Pods that were bound, by uid, until the watch shows it.
    assumed: HashMap<String, String>,
}

/// Runs until it is dropped.
pub async fn run(client: Client) {
    let mut keeper = Keeper::default();
    let all = watcher::Config::default;
    let mut scheduler = Scheduler {
        pods: keeper.keep(Api::all(client.clone()), all()),
        nodes: keeper.keep(Api::all(client.clone()), all()),
        namespaces: keeper.keep(Api::all(client.clone()), all()),
        claims: keeper.keep(Api::all(client.clone()), all()),
        volumes: keeper.keep(Api::all(client.clone()), all()),
        classes: keeper.keep(Api::all(client.clone()), all()),
        events: Recorder::new(client.clone(), NAME, None),
        assumed: HashMap::new(),
        client,
    };
    let s = &scheduler;
    ready!(s.pods, s.nodes, s.namespaces, s.claims, s.volumes, s.classes);
    loop {
        scheduler.round().await;
        // What failed for want of the API is tried again in any case.
        let _ = tokio::time::timeout(AGAIN, keeper.bell.notified()).await;
        tokio::time::sleep(GATHER).await;
    }
}

fn uid(pod: &Pod) -> &str {
    pod.metadata.uid.as_deref().unwrap_or_default()
}

/// A pod as if it were on a node already.
fn placed(pod: &Pod, node: &str) -> Arc<Pod> {
    let mut pod = pod.clone();
    pod.spec.get_or_insert_default().node_name = Some(node.to_owned());
    Arc::new(pod)
}

/// Whether it is for us to find a node for a pod.
fn waits(pod: &Pod) -> bool {
    let Some(spec) = &pod.spec else { return false };
    let ours = spec.scheduler_name.as_deref().is_none_or(|name| name == NAME);
    let gated = spec.scheduling_gates.as_ref().is_some_and(|gates| !gates.is_empty());
    let goes = pod.metadata.deletion_timestamp.is_some() || has_ended(pod);
    ours && !gated && !goes && node_name(pod).is_none()
}

impl Scheduler {
    async fn round(&mut self) {
        let pods = self.pods.state();
        let known: HashMap<&str, &Arc<Pod>> = pods.iter().map(|pod| (uid(pod), pod)).collect();
        self.assumed.retain(|uid, _| known.get(&**uid).is_some_and(|pod| node_name(pod).is_none()));
        let mut snapshot = self.snapshot(&pods);
        let mut waiting: Vec<&Arc<Pod>> =
            pods.iter().filter(|pod| waits(pod) && !self.assumed.contains_key(uid(pod))).collect();
        waiting.sort_by_key(|pod| {
            let priority = pod.spec.as_ref().and_then(|spec| spec.priority).unwrap_or(0);
            let created = pod.metadata.creation_timestamp.as_ref().map(|time| time.0);
            (Reverse(priority), created, pod.metadata.name.clone())
        });
        for pod in waiting {
            let decision = plan::decide(pod, &snapshot);
            if let Decision::Bind(node) | Decision::Provision { node, .. } = &decision {
                snapshot.pods.push(placed(pod, node));
            }
            let name = pod.metadata.name.as_deref().unwrap_or_default();
            if let Err(error) = self.act(pod, decision).await {
                tracing::warn!(pod = name, "scheduling is tried again: {}", why(&error));
            }
        }
    }

    fn snapshot(&self, pods: &[Arc<Pod>]) -> Snapshot {
        let running = pods.iter().filter(|pod| !has_ended(pod)).filter_map(|pod| {
            match self.assumed.get(uid(pod)) {
                Some(node) => Some(placed(pod, node)),
                None => node_name(pod).map(|_| Arc::clone(pod)),
            }
        });
        Snapshot {
            pods: running.collect(),
            nodes: self.nodes.state(),
            namespaces: self.namespaces.state(),
            claims: self.claims.state(),
            volumes: self.volumes.state(),
            classes: self.classes.state(),
        }
    }

    async fn act(&mut self, pod: &Pod, decision: Decision) -> kube::Result<()> {
        match decision {
            Decision::Bind(node) => self.bind(pod, &node).await,
            Decision::Provision { node, claims } => self.select(pod, &node, &claims).await,
            Decision::Unschedulable(why) => self.explain(pod, &why).await,
        }
    }

    async fn bind(&mut self, pod: &Pod, node: &str) -> kube::Result<()> {
        let name = pod.metadata.name.as_deref().unwrap_or_default();
        let binding = Binding {
            metadata: ObjectMeta {
                name: pod.metadata.name.clone(),
                namespace: pod.metadata.namespace.clone(),
                uid: pod.metadata.uid.clone(),
                ..ObjectMeta::default()
            },
            target: ObjectReference {
                kind: Some("Node".into()),
                name: Some(node.to_owned()),
                ..ObjectReference::default()
            },
        };
        let pods = self.pods_of(pod);
        let _: Status =
            pods.create_subresource("binding", name, &PostParams::default(), &binding).await?;
        self.assumed.insert(uid(pod).to_owned(), node.to_owned());
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        let text = format!("Successfully assigned {namespace}/{name} to {node}");
        self.events.say(&reference(pod), Kind::Normal, "Scheduled", &text).await;
        Ok(())
    }

    fn pods_of(&self, pod: &Pod) -> Api<Pod> {
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        Api::namespaced(self.client.clone(), namespace)
    }

    /// Tells claims for which node their volumes are to be made.
    async fn select(&self, pod: &Pod, node: &str, claims: &[String]) -> kube::Result<()> {
        use crate::storage::claims::{Claim, SELECTED_NODE};
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        let api: Api<PersistentVolumeClaim> = Api::namespaced(self.client.clone(), namespace);
        let wanted = |claim: &&Arc<PersistentVolumeClaim>| {
            claim.metadata.namespace.as_deref() == Some(namespace)
                && claim.metadata.name.as_ref().is_some_and(|name| claims.contains(name))
                && claim.selected_node() != Some(node)
        };
        for claim in self.claims.state().iter().filter(wanted) {
            let name = claim.metadata.name.as_deref().unwrap_or_default();
            let patch = json!({"metadata": {
                "resourceVersion": claim.metadata.resource_version,
                "annotations": {SELECTED_NODE: node},
            }});
            api.patch(name, &PatchParams::default(), &Patch::Merge(patch)).await?;
        }
        Ok(())
    }

    async fn explain(&self, pod: &Pod, why: &str) -> kube::Result<()> {
        let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
        let mut said = conditions.filter(|condition| condition.type_ == "PodScheduled");
        if said.any(|condition| condition.message.as_deref() == Some(why)) {
            return Ok(());
        }
        let patch = json!({"status": {"conditions": [{
            "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": why,
            "lastTransitionTime": jiff::Timestamp::now().to_string(), "lastProbeTime": null,
        }]}});
        let name = pod.metadata.name.as_deref().unwrap_or_default();
        let patch = Patch::Strategic(patch);
        self.pods_of(pod).patch_status(name, &PatchParams::default(), &patch).await?;
        self.events.say(&reference(pod), Kind::Warning, "FailedScheduling", why).await;
        Ok(())
    }
}
