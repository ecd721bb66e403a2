//! The watch over nodes: who does not renew its lease is unreachable, and loses its pods in time.
//!
//! Source: Kubernetes' node lifecycle and taint eviction controllers.

use crate::agent::register::LEASES;
use crate::scheduler::nodes::{self, NO_EXECUTE, NO_SCHEDULE, taints, tolerates};
use crate::scheduler::snapshot::{has_ended, node_name};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Node, Pod, Taint};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, Time};
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use kube::runtime::watcher;
use kube::{Api, Client};
use reconcile::events::{Kind, Recorder, why};
use reconcile::kept::{Keeper, reference};
use reconcile::ready;
use serde_json::json;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A node whose lease has not been renewed for this long is unreachable.
const GRACE: Duration = Duration::from_secs(40);
/// All nodes are looked at this often.
const ROUND: Duration = Duration::from_secs(5);
const GATHER: Duration = Duration::from_millis(20);

const UNREACHABLE: &str = "node.kubernetes.io/unreachable";
const UNSCHEDULABLE: &str = "node.kubernetes.io/unschedulable";

/// The taints that a node is to have, of those that are ours to set; others are kept.
pub fn wanted_taints(node: &Node, reachable: bool, now: Timestamp) -> Vec<Taint> {
    let ours = |taint: &&Taint| taint.key == UNREACHABLE || taint.key == UNSCHEDULABLE;
    let mut all: Vec<Taint> = taints(node).filter(|taint| !ours(taint)).cloned().collect();
    let mut want = |key: &str, effect: &str| {
        let found = taints(node).find(|taint| taint.key == key && taint.effect == effect);
        all.push(found.cloned().unwrap_or_else(|| Taint {
            key: key.into(),
            effect: effect.into(),
            time_added: Some(Time(now)),
            value: None,
        }));
    };
    if node.spec.as_ref().and_then(|spec| spec.unschedulable) == Some(true) {
        want(UNSCHEDULABLE, NO_SCHEDULE);
    }
    if !reachable {
        want(UNREACHABLE, NO_SCHEDULE);
        want(UNREACHABLE, NO_EXECUTE);
    }
    all
}

/// When a pod is to leave a node with these taints: None for never.
pub fn leaves<'a>(pod: &Pod, taints: impl Iterator<Item = &'a Taint>) -> Option<Timestamp> {
    let tolerations = || pod.spec.iter().flat_map(|spec| spec.tolerations.iter().flatten());
    let by = |taint: &Taint| {
        let added = taint.time_added.as_ref().map_or(Timestamp::UNIX_EPOCH, |time| time.0);
        let bearing: Vec<_> = tolerations().filter(|t| tolerates(t, taint)).collect();
        if bearing.is_empty() {
            return Some(added);
        }
        // The shortest of those that have an end.
        let shortest = bearing.iter().filter_map(|t| t.toleration_seconds).min()?;
        Some(added + SignedDuration::from_secs(shortest.clamp(0, 1 << 32)))
    };
    taints.filter(|taint| taint.effect == NO_EXECUTE).filter_map(by).min()
}

/// What is known of leases: when each was seen to be renewed, by our own clock.
#[derive(Default)]
struct Renewals(HashMap<String, (Option<MicroTime>, Instant)>);

impl Renewals {
    fn note(&mut self, leases: &[Arc<Lease>], all: &[Arc<Node>]) {
        let now = Instant::now();
        self.0.retain(|name, _| all.iter().any(|node| nodes::name(node) == name));
        for node in all {
            let name = nodes::name(node);
            let lease = leases.iter().find(|l| l.metadata.name.as_deref() == Some(name));
            let renewed = lease.and_then(|lease| lease.spec.as_ref()?.renew_time.clone());
            match self.0.get_mut(name) {
                Some((last, seen)) if *last != renewed => (*last, *seen) = (renewed, now),
                Some(_) => {}
                None => drop(self.0.insert(name.to_owned(), (renewed, now))),
            }
        }
    }

    fn reachable(&self, name: &str) -> bool {
        self.0.get(name).is_none_or(|(_, seen)| seen.elapsed() < GRACE)
    }
}

struct Watch {
    client: Client,
    events: Recorder,
    renewals: Renewals,
}

/// Runs until it is dropped.
pub async fn run(client: Client) {
    let mut keeper = Keeper::default();
    let all = watcher::Config::default;
    let nodes = keeper.keep(Api::<Node>::all(client.clone()), all());
    let pods = keeper.keep(Api::<Pod>::all(client.clone()), all());
    let leases = keeper.keep(Api::<Lease>::namespaced(client.clone(), LEASES), all());
    ready!(nodes, pods, leases);
    let events = Recorder::new(client.clone(), "node-controller", None);
    let mut watch = Watch { client, events, renewals: Renewals::default() };
    loop {
        watch.renewals.note(&leases.state(), &nodes.state());
        for node in nodes.state() {
            if let Err(error) = watch.node(&node).await {
                tracing::warn!("a node is looked at again: {}", why(&error));
            }
        }
        let mut next = ROUND;
        for pod in pods.state() {
            match watch.pod(&pod, &nodes.state()).await {
                Ok(Some(wait)) => next = next.min(wait),
                Ok(None) => {}
                Err(error) => tracing::warn!("a pod is looked at again: {}", why(&error)),
            }
        }
        let _ = tokio::time::timeout(next, keeper.bell.notified()).await;
        tokio::time::sleep(GATHER).await;
    }
}

impl Watch {
    async fn node(&self, node: &Node) -> kube::Result<()> {
        let name = nodes::name(node);
        let reachable = self.renewals.reachable(name);
        let api: Api<Node> = Api::all(self.client.clone());
        let wanted = wanted_taints(node, reachable, Timestamp::now());
        if taints(node).ne(wanted.iter()) {
            let patch = json!({
                "metadata": {"resourceVersion": node.metadata.resource_version},
                "spec": {"taints": wanted},
            });
            api.patch(name, &PatchParams::default(), &Patch::Merge(patch)).await?;
        }
        let conditions = node.status.iter().flat_map(|s| s.conditions.iter().flatten());
        let ready = conditions.into_iter().find(|c| c.type_ == "Ready");
        if reachable || ready.is_none_or(|ready| ready.status == "Unknown") {
            return Ok(());
        }
        let patch = json!({"status": {"conditions": [{
            "type": "Ready", "status": "Unknown", "reason": "NodeStatusUnknown",
            "message": "Kubelet stopped posting node status.",
            "lastTransitionTime": Timestamp::now().to_string(),
        }]}});
        api.patch_status(name, &PatchParams::default(), &Patch::Strategic(patch)).await?;
        let text = format!("Node {name} status is now: NodeNotReady");
        self.events.say(&reference(node), Kind::Normal, "NodeNotReady", &text).await;
        Ok(())
    }

    /// Drives a pod off its node, when it is time: else how long that is.
    async fn pod(&self, pod: &Pod, all: &[Arc<Node>]) -> kube::Result<Option<Duration>> {
        let Some(on) = node_name(pod) else { return Ok(None) };
        let Some(node) = all.iter().find(|node| nodes::name(node) == on) else {
            return self.orphan(pod, on).await.map(|()| None);
        };
        if pod.metadata.deletion_timestamp.is_some() || has_ended(pod) {
            return Ok(None);
        }
        let Some(at) = leaves(pod, taints(node)) else { return Ok(None) };
        if let Ok(left) = Duration::try_from(at.duration_since(Timestamp::now()))
            && !left.is_zero()
        {
            return Ok(Some(left));
        }
        let (namespace, name) = names(pod);
        let text = format!("Marking for deletion Pod {namespace}/{name}");
        self.events.say(&reference(pod), Kind::Normal, "TaintManagerEviction", &text).await;
        self.delete(pod, None).await.map(|()| None)
    }

    /// Removes the pod of a node that does not exist any more: nobody else can tell its end.
    async fn orphan(&self, pod: &Pod, on: &str) -> kube::Result<()> {
        let api: Api<Node> = Api::all(self.client.clone());
        if api.get_opt(on).await?.is_some() {
            return Ok(());
        }
        self.delete(pod, Some(0)).await
    }

    async fn delete(&self, pod: &Pod, grace: Option<u32>) -> kube::Result<()> {
        let (namespace, name) = names(pod);
        let api: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        let options = DeleteParams {
            grace_period_seconds: grace,
            preconditions: Some(Preconditions {
                uid: pod.metadata.uid.clone(),
                resource_version: None,
            }),
            ..DeleteParams::default()
        };
        match api.delete(name, &options).await {
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(()),
            other => other.map(|_| ()),
        }
    }
}

fn names(pod: &Pod) -> (&str, &str) {
    (
        pod.metadata.namespace.as_deref().unwrap_or_default(),
        pod.metadata.name.as_deref().unwrap_or_default(),
    )
}
