//! Godwit's roles as tools of KubeVirt look for them: ready pods under KubeVirt's names. They are
//! records of what runs elsewhere, as static pods are of a kubelet's own: no node runs them.

use apiserver::local::Local;
use apiserver::status::Failure;
use http::Method;
use serde_json::{Value, json};

/// A role, and whether each node has one.
const ROLES: [(&str, bool); 4] = [
    ("virt-api", false),
    ("virt-controller", false),
    ("virt-handler", true),
    ("virt-operator", false),
];
/// What a node's agent knows a record by.
pub const MIRROR: &str = "kubernetes.io/config.mirror";

/// Publishes them; the roles that are not a node's on the first one.
///
/// # Errors
/// The API's.
pub async fn publish(api: &Local, nodes: &[String]) -> Result<(), Failure> {
    for (role, of_each) in ROLES {
        let on = if of_each { nodes } else { &nodes[..nodes.len().min(1)] };
        for node in on {
            let name = if of_each { format!("{role}-{node}") } else { role.to_owned() };
            pod(api, role, &name, node).await?;
        }
    }
    Ok(())
}

async fn pod(api: &Local, role: &str, name: &str, node: &str) -> Result<(), Failure> {
    let path = format!("/api/v1/namespaces/{}/pods", api::NAMESPACE);
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": name,
            "labels": {"kubevirt.io": role, "app.kubernetes.io/managed-by": "godwit"},
            "annotations": {MIRROR: "godwit"},
        },
        "spec": {
            "nodeName": node, "automountServiceAccountToken": false,
            "containers": [{"name": role, "image": controllers::IMAGE}],
        },
    });
    api.ensure(&path, &pod).await?;
    let now = api::conditions::moment(jiff::Timestamp::now());
    let condition = |kind: &str| json!({"type": kind, "status": "True", "lastTransitionTime": now});
    let conditions =
        ["Initialized", "Ready", "ContainersReady", "PodScheduled"].map(condition).to_vec();
    let status = json!({"status": {
        "phase": "Running", "startTime": now,
        "conditions": conditions,
        "containerStatuses": [{
            "name": role, "image": controllers::IMAGE, "imageID": controllers::IMAGE,
            "ready": true, "started": true, "restartCount": 0,
            "state": {"running": {"startedAt": now}},
        }],
    }});
    let path = format!("{path}/{name}/status");
    let media = "application/merge-patch+json";
    let _: Value = api.send(Method::PATCH, &path, media, Some(&status)).await?;
    Ok(())
}
