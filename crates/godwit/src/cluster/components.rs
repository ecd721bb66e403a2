//! Godwit's roles as tools of KubeVirt look for them: pods under KubeVirt's names, ready as long as
//! the role does its work. They are records of what runs elsewhere, as static pods are of a
//! kubelet's own: no node runs them.
//!
//! The controllers tell in the settings' status what these pods say. When it is the controllers that
//! do not work, it is told from here.

use super::children::Places;
use super::guests::Handlers;
use super::vms::SETTINGS;
use api::kubevirt::{KubeVirt, Status};
use apiserver::local::Local;
use apiserver::status::Failure;
use controllers::components::{LABEL, judge};
use http::Method;
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Pod;
use node::agent::MIRROR;
use reconcile::lease::{Seen, is_held};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};
use tokio::net::TcpStream;

/// How often each role is looked at.
const LOOK: Duration = Duration::from_secs(2);
/// The API may need a moment at first.
const AGAIN: Duration = Duration::from_millis(100);
const CONTROLLER: &str = "virt-controller";
const HANDLER: &str = "virt-handler";
const SYNCHRONIZER: &str = controllers::synchronizer::NAME;
/// A synchronizer that listens answers within this time.
const ANSWERS: Duration = Duration::from_secs(1);

const PODS: &str = "/api/v1/namespaces/kubevirt/pods";
/// How a record is deleted: no node has it to end.
static NOW: LazyLock<Value> = LazyLock::new(|| json!({"gracePeriodSeconds": 0}));

/// The roles of a cluster.
pub struct Components {
    /// The API, as itself.
    pub api: Local,
    /// The nodes, each of which has a handler.
    pub nodes: Vec<String>,
    /// The way to them.
    pub handlers: Arc<Handlers>,
    /// Where those are that run as processes of their own; None: they do not.
    pub processes: Option<Places>,
}

/// A role's pod: which role, its name, its node.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Record {
    role: &'static str,
    name: String,
    node: String,
}

/// The pods that there are; those of no node's are on the first one.
fn records(nodes: &[String], synchronizes: bool) -> Vec<Record> {
    let of = |role, name: String, node: &String| Record { role, name, node: node.clone() };
    let first = nodes.first().into_iter().flat_map(|node| {
        let all = ["virt-api", CONTROLLER, "virt-operator"].into_iter();
        let all = all.chain(synchronizes.then_some(SYNCHRONIZER));
        all.map(move |role| of(role, role.to_owned(), node))
    });
    let each = nodes.iter().map(|node| of(HANDLER, format!("{HANDLER}-{node}"), node));
    first.chain(each).collect()
}

impl Components {
    /// Shows them. Never ends by itself.
    pub async fn run(self) {
        let (mut shown, mut lease) = (BTreeMap::new(), None);
        loop {
            let pause = match self.round(&mut shown, &mut lease).await {
                Ok(()) => LOOK,
                Err(failure) => {
                    tracing::debug!("the roles cannot be shown as pods: {failure}");
                    AGAIN
                }
            };
            tokio::time::sleep(pause).await;
        }
    }

    async fn round(
        &self,
        shown: &mut BTreeMap<Record, bool>,
        lease: &mut Option<Seen>,
    ) -> Result<(), Failure> {
        let path = "/apis/coordination.k8s.io/v1/namespaces/kubevirt/leases/virt-controller";
        let found = self.read::<Lease>(path).await?;
        *lease = Seen::again(lease.take(), found, Instant::now());
        let controller = is_held(lease.as_ref(), Instant::now()) && self.lives("controller");
        let settings = self.settings().await?;
        let settings = settings.into_iter().min_by_key(|one| one.metadata.name.clone());
        let synchronizes = settings.as_ref().is_some_and(|s| s.spec.synchronizer().is_some());
        let wanted = records(&self.nodes, synchronizes);
        let gone: Vec<Record> = shown.keys().filter(|r| !wanted.contains(r)).cloned().collect();
        for record in gone {
            self.api.delete(&format!("{PODS}/{}", record.name), &NOW).await?;
            shown.remove(&record);
        }
        for record in wanted {
            let is_ready = match record.role {
                CONTROLLER => controller,
                HANDLER => {
                    self.lives(&format!("handler-{}", record.node))
                        && self.handlers.answers(&record.node).await
                }
                SYNCHRONIZER => {
                    let status = settings.as_ref().and_then(|settings| settings.status.as_ref());
                    let address = status.and_then(|s| s.synchronization_addresses.first());
                    self.lives("synchronizer") && answers(address).await
                }
                // They are what shows this.
                _ => true,
            };
            if shown.get(&record) != Some(&is_ready) {
                self.show(&record, is_ready).await?;
                shown.insert(record, is_ready);
            }
        }
        if controller { Ok(()) } else { self.tell().await }
    }

    /// Whether a role's process lives, if it is to have one.
    fn lives(&self, name: &str) -> bool {
        let running = |places: &Places| places.running().iter().any(|(own, _)| own == name);
        self.processes.as_ref().is_none_or(running)
    }

    /// Reads an object; None: there is none.
    async fn read<T: DeserializeOwned>(&self, path: &str) -> Result<Option<T>, Failure> {
        match self.api.send(Method::GET, path, "application/json", None).await {
            Err(failure) if failure.code == 404 => Ok(None),
            Err(failure) => Err(failure),
            Ok(found) => serde_json::from_value(found)
                .map(Some)
                .map_err(|error| Failure::internal(format!("{path}: {error}"))),
        }
    }

    async fn show(&self, record: &Record, is_ready: bool) -> Result<(), Failure> {
        let Record { role, name, node } = record;
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "name": name,
                "labels": {LABEL: role, "app.kubernetes.io/managed-by": "godwit"},
                "annotations": {MIRROR: "godwit"},
            },
            "spec": {
                "nodeName": node, "automountServiceAccountToken": false,
                "containers": [{"name": role, "image": controllers::IMAGE}],
            },
        });
        self.api.ensure(PODS, &pod).await?;
        let path = format!("{PODS}/{name}/status");
        self.api.merge(&path, &json!({"status": status(role, is_ready, Timestamp::now())})).await?;
        Ok(())
    }

    async fn items<T: DeserializeOwned>(&self, path: &str) -> Result<Vec<T>, Failure> {
        let found = self.api.send(Method::GET, path, "application/json", None).await?;
        serde_json::from_value(found["items"].clone())
            .map_err(|error| Failure::internal(error.to_string()))
    }

    async fn settings(&self) -> Result<Vec<KubeVirt>, Failure> {
        self.items(SETTINGS).await
    }

    /// Tells in the settings' status what the pods say.
    async fn tell(&self) -> Result<(), Failure> {
        let pods: Vec<Pod> = self.items(PODS).await?;
        let pods: Vec<Arc<Pod>> = pods.into_iter().map(Arc::new).collect();
        for one in self.settings().await? {
            let old = one.status.unwrap_or_default();
            let Status { phase, conditions, .. } = judge(&old, &pods, Timestamp::now());
            if (&phase, &conditions) == (&old.phase, &old.conditions) {
                continue;
            }
            let name = one.metadata.name.unwrap_or_default();
            let patch = json!({
                "metadata": {"resourceVersion": one.metadata.resource_version},
                "status": {"phase": phase, "conditions": conditions},
            });
            self.api.merge(&format!("{SETTINGS}/{name}/status"), &patch).await?;
        }
        Ok(())
    }
}

/// Whether somebody listens at an address.
async fn answers(address: Option<&String>) -> bool {
    let Some(address) = address else { return false };
    let connected = tokio::time::timeout(ANSWERS, TcpStream::connect(address)).await;
    matches!(connected, Ok(Ok(_)))
}

/// A pod's status by whether its role does its work.
fn status(role: &str, is_ready: bool, now: Timestamp) -> Value {
    let now = api::conditions::moment(now);
    let condition = |(kind, holds): (&str, bool)| {
        let status = if holds { "True" } else { "False" };
        json!({"type": kind, "status": status, "lastTransitionTime": now})
    };
    let conditions = [
        ("Initialized", true),
        ("Ready", is_ready),
        ("ContainersReady", is_ready),
        ("PodScheduled", true),
    ];
    json!({
        "phase": "Running", "startTime": now,
        "conditions": conditions.map(condition).to_vec(),
        "containerStatuses": [{
            "name": role, "image": controllers::IMAGE, "imageID": controllers::IMAGE,
            "ready": is_ready, "started": true, "restartCount": 0,
            "state": {"running": {"startedAt": now}},
        }],
    })
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn every_node_has_a_handler_and_the_cluster_has_one_of_each_other_role() {
        let nodes = ["one", "two"].map(String::from);
        let names = |nodes: &[String]| {
            records(nodes, true).into_iter().map(|record| record.name).collect::<Vec<_>>()
        };
        let all = names(&nodes);
        let expected = [
            "virt-api",
            "virt-controller",
            "virt-operator",
            "virt-synchronization-controller",
            "virt-handler-one",
            "virt-handler-two",
        ];
        assert_eq!(all, expected);
        assert!(names(&[]).is_empty());
        assert_eq!(records(&nodes, false).len(), all.len() - 1);
    }
}
