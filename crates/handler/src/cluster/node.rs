//! What a handler tells of its node: that VMs can run there, on which processors and machines, and
//! where the handler is reached.

use super::Shared;
use api::conditions::moment;
use api::keys;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Node;
use kube::Api;
use kube::api::{Patch, PatchParams};
use reconcile::events::why;
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::process::Stdio;
use std::time::Duration;
use tokio::process::Command;
use tokio::sync::watch;

/// Annotation of a node: where its handler takes the API role's requests.
pub const HANDLER: &str = "godwit.dev/handler";
/// Annotation of a node: where its gateway is.
/// The heartbeat, as KubeVirt's.
const BEAT: Duration = Duration::from_secs(60);
/// A node that cannot be written is tried again after this.
const AGAIN: Duration = Duration::from_secs(1);
/// QEMU says what it knows within this time.
const PATIENCE: Duration = Duration::from_secs(10);
/// QEMU, as the launcher finds it.
const QEMU: &str = "qemu-system-x86_64";

/// Keeps the node's labels and heartbeat. Never ends by itself. `handler`: where the API role reaches
/// it; `gateway`: where other handlers do, if they can.
pub async fn run(
    shared: Shared,
    handler: SocketAddr,
    mut gateway: watch::Receiver<Option<SocketAddr>>,
) {
    // N.B. first that it is there, since guests wait for it; what QEMU knows takes a moment.
    let now = |gateway: &mut watch::Receiver<_>| (handler, *gateway.borrow_and_update());
    tell(&shared, now(&mut gateway), &json!({})).await;
    let labels = labels().await;
    loop {
        tell(&shared, now(&mut gateway), &labels).await;
        // Whoever tells of the gateway lives as long as this.
        let _ = tokio::time::timeout(BEAT, gateway.changed()).await;
    }
}

async fn tell(
    shared: &Shared,
    (handler, gateway): (SocketAddr, Option<SocketAddr>),
    labels: &Value,
) {
    let nodes: Api<Node> = Api::all(shared.client.clone());
    loop {
        let mut labels = labels.clone();
        labels[keys::SCHEDULABLE] = "true".into();
        let patch = json!({"metadata": {
            "labels": labels,
            "annotations": {
                keys::HEARTBEAT: moment(Timestamp::now()),
                HANDLER: handler.to_string(),
                api::keys::GATEWAY: gateway.map(|gateway| gateway.to_string()),
            },
        }});
        let name = &shared.config.node;
        match nodes.patch(name, &PatchParams::default(), &Patch::Merge(&patch)).await {
            Ok(_) => return,
            Err(error) => {
                tracing::warn!(node = name, "its labels cannot be written: {}", why(&error))
            }
        }
        tokio::time::sleep(AGAIN).await;
    }
}

/// What QEMU and the processor say, as KubeVirt's node labels.
async fn labels() -> Value {
    let mut labels = json!({});
    for model in models(&output(&["-cpu", "help"]).await) {
        labels[format!("cpu-model.node.kubevirt.io/{model}")] = "true".into();
        labels[format!("cpu-model-migration.node.kubevirt.io/{model}")] = "true".into();
    }
    for machine in machines(&output(&["-machine", "help"]).await) {
        labels[format!("{}{machine}", keys::MACHINE)] = "true".into();
    }
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = |name: &str| {
        let line = cpuinfo.lines().find(|line| line.starts_with(name))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    if let Some(vendor) = line("vendor_id") {
        labels[format!("cpu-vendor.node.kubevirt.io/{vendor}")] = "true".into();
    }
    for feature in line("flags").unwrap_or_default().split(' ').filter(|f| !f.is_empty()) {
        labels[format!("cpu-feature.node.kubevirt.io/{feature}")] = "true".into();
    }
    labels
}

async fn output(arguments: &[&str]) -> String {
    let run = Command::new(QEMU)
        .args(arguments)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .output();
    match tokio::time::timeout(PATIENCE, run).await {
        Ok(Ok(output)) => String::from_utf8_lossy(&output.stdout).into_owned(),
        Ok(Err(error)) => {
            tracing::warn!(%error, "{QEMU} cannot be run: VMs of this node will not start");
            String::new()
        }
        Err(_) => String::new(),
    }
}

/// The models of `qemu -cpu help`: `x86 Westmere-v1   Westmere …`.
fn models(help: &str) -> Vec<&str> {
    let named = help.lines().filter_map(|line| line.strip_prefix("x86 "));
    named.filter_map(|rest| rest.split_whitespace().next()).filter(|name| is_label(name)).collect()
}

/// The types of `qemu -machine help`: `pc-q35-7.2   Standard PC …`.
fn machines(help: &str) -> Vec<&str> {
    let names = help.lines().skip(1).filter_map(|line| line.split_whitespace().next());
    names.filter(|name| (name.starts_with("pc") || *name == "q35") && is_label(name)).collect()
}

fn is_label(name: &str) -> bool {
    name.len() <= 63 && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
}
