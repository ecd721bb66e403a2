//! A node as an object: what it is, that it lives.

use super::Config;
use crate::storage::claims::POOL;
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Node;
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client};
use reconcile::events::why;
use serde_json::{Value, json};
use std::time::Duration;

/// Where nodes' leases are.
pub const LEASES: &str = "kube-node-lease";
/// A lease is renewed this often ...
const BEAT: Duration = Duration::from_secs(10);
/// ... and says that the node lives for this many seconds.
const LASTS: i32 = 40;
/// The status is told anew after this many beats.
const TOLD_EVERY: u32 = 30;
/// How many pods a node runs, as the kubelet has it.
const PODS: u32 = 110;

/// The machine's memory in KiB.
fn memory() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    line.and_then(|rest| rest.trim().strip_suffix(" kB")?.parse().ok()).unwrap_or(0)
}

fn first_line(path: &str) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().next().unwrap_or_default().to_owned()
}

/// The node as it is made.
fn object(config: &Config) -> Value {
    let mut labels = json!({
        "kubernetes.io/hostname": config.name,
        "kubernetes.io/os": "linux",
        "kubernetes.io/arch": apiserver::ARCHITECTURE,
        "beta.kubernetes.io/os": "linux",
        "beta.kubernetes.io/arch": apiserver::ARCHITECTURE,
    });
    for (key, value) in &config.labels {
        labels[key] = json!(value);
    }
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {
            "name": config.name, "labels": labels,
            "annotations": {POOL: config.pool.to_string()},
        },
        "spec": {"taints": config.taints, "providerID": format!("godwit://{}", config.name)},
    })
}

/// What the node has and how it is.
fn status(config: &Config, before: Option<&Node>) -> Value {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let mut capacity = json!({
        "cpu": cpus.to_string(), "memory": format!("{}Ki", memory()), "pods": PODS.to_string(),
    });
    for (name, amount) in &config.extended {
        capacity[name] = json!(amount);
    }
    let now = Timestamp::now().to_string();
    let told = before.and_then(|node| node.status.as_ref()?.conditions.clone()).unwrap_or_default();
    let condition = |name: &str, status: &str, reason: &str, message: &str| {
        let same = told.iter().find(|c| c.type_ == name && c.status == status);
        let since = same.and_then(|c| c.last_transition_time.as_ref());
        json!({
            "type": name, "status": status, "reason": reason, "message": message,
            "lastHeartbeatTime": now,
            "lastTransitionTime": since.map_or(now.clone(), |time| time.0.to_string()),
        })
    };
    let images: Vec<Value> =
        config.images.0.keys().map(|name| json!({"names": [name], "sizeBytes": 0})).collect();
    json!({"status": {
        "capacity": capacity, "allocatable": capacity, "images": images,
        "conditions": [
            condition("MemoryPressure", "False", "KubeletHasSufficientMemory", "kubelet has sufficient memory available"),
            condition("DiskPressure", "False", "KubeletHasNoDiskPressure", "kubelet has no disk pressure"),
            condition("PIDPressure", "False", "KubeletHasSufficientPID", "kubelet has sufficient PID available"),
            condition("Ready", "True", "KubeletReady", "kubelet is posting ready status"),
        ],
        "addresses": [
            {"type": "InternalIP", "address": config.address},
            {"type": "Hostname", "address": config.name},
        ],
        "nodeInfo": {
            "machineID": first_line("/etc/machine-id"), "systemUUID": "",
            "bootID": first_line("/proc/sys/kernel/random/boot_id"),
            "kernelVersion": first_line("/proc/sys/kernel/osrelease"),
            "osImage": "Linux", "operatingSystem": "linux",
            "architecture": apiserver::ARCHITECTURE,
            "containerRuntimeVersion": format!("godwit://{}", apiserver::VERSION),
            "kubeletVersion": format!("v{}-godwit", apiserver::VERSION), "kubeProxyVersion": "",
        },
    }})
}

/// Makes the node, or finds it, and says how it is. What a person changed of it stays.
///
/// # Errors
/// When the API refuses.
pub async fn register(client: &Client, config: &Config) -> kube::Result<Node> {
    let api: Api<Node> = Api::all(client.clone());
    let found = api.get_opt(&config.name).await?;
    if found.is_none() {
        let node = serde_json::from_value(object(config)).map_err(kube::Error::SerdeError)?;
        api.create(&PostParams::default(), &node).await?;
    }
    let status = Patch::Strategic(status(config, found.as_ref()));
    api.patch_status(&config.name, &PatchParams::default(), &status).await
}

/// Renews the lease, and the status now and then, until it is dropped.
pub async fn beat(client: Client, config: &Config) {
    let mut beats = 0;
    loop {
        if let Err(error) = renew(&client, &config.name).await {
            tracing::warn!(node = config.name, "the lease is not renewed: {}", why(&error));
        }
        if beats % TOLD_EVERY == TOLD_EVERY - 1
            && let Err(error) = register(&client, config).await
        {
            tracing::warn!(node = config.name, "the node's status is not told: {}", why(&error));
        }
        beats += 1;
        tokio::time::sleep(BEAT).await;
    }
}

async fn renew(client: &Client, name: &str) -> kube::Result<()> {
    let api: Api<Lease> = Api::namespaced(client.clone(), LEASES);
    let now = format!("{:.6}", Timestamp::now());
    let spec = json!({"holderIdentity": name, "leaseDurationSeconds": LASTS, "renewTime": now});
    let patch = Patch::Merge(json!({"spec": spec}));
    match api.patch(name, &PatchParams::default(), &patch).await {
        Err(kube::Error::Api(status)) if status.code == 404 => {
            let lease = json!({
                "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
                "metadata": {"name": name, "namespace": LEASES}, "spec": spec,
            });
            let lease = serde_json::from_value(lease).map_err(kube::Error::SerdeError)?;
            api.create(&PostParams::default(), &lease).await.map(|_| ())
        }
        other => other.map(|_| ()),
    }
}
