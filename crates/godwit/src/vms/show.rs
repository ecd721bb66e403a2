//! Lists and stories of VMs.

use super::{Cluster, plain};
use crate::view::Output;
use anyhow::Result;
use api::conditions::Condition;
use api::owner::OwnerRecord;
use api::vm::VirtualMachine;
use api::vmi::VirtualMachineInstance;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Event;
use kube::api::ListParams;
use kube::{Api, ResourceExt};
use std::collections::HashMap;

/// Events that are told of, at most.
const EVENTS: usize = 20;

/// Lists VMs.
///
/// # Errors
/// The API's.
pub async fn list(cluster: &Cluster, all_namespaces: bool, output: Output) -> Result<()> {
    let (vms, vmis): (Api<VirtualMachine>, Api<VirtualMachineInstance>) = match all_namespaces {
        true => (Api::all(cluster.client.clone()), Api::all(cluster.client.clone())),
        false => (
            Api::namespaced(cluster.client.clone(), &cluster.namespace),
            Api::namespaced(cluster.client.clone(), &cluster.namespace),
        ),
    };
    let vms = vms.list(&ListParams::default()).await.map_err(plain)?.items;
    if output == Output::Json {
        println!("{}", serde_json::to_string_pretty(&vms)?);
        return Ok(());
    }
    let vmis = vmis.list(&ListParams::default()).await.map_err(plain)?.items;
    let key = |namespace: Option<String>, name: String| (namespace.unwrap_or_default(), name);
    let vmis: HashMap<_, _> =
        vmis.into_iter().map(|vmi| (key(vmi.namespace(), vmi.name_any()), vmi)).collect();
    let namespace = |text: &str| if all_namespaces { format!("{text:16} ") } else { String::new() };
    println!(
        "{}{:24} {:22} {:16} {:16} AGE",
        namespace("NAMESPACE"),
        "NAME",
        "STATUS",
        "NODE",
        "IP"
    );
    for vm in vms {
        let vmi = vmis.get(&key(vm.namespace(), vm.name_any()));
        let status = vm.status.clone().unwrap_or_default();
        let found = vmi.and_then(|vmi| vmi.status.clone()).unwrap_or_default();
        let ip = found.interfaces.first().and_then(|i| i.ip_address.clone());
        println!(
            "{}{:24} {:22} {:16} {:16} {}",
            namespace(&vm.namespace().unwrap_or_default()),
            vm.name_any(),
            format!("{:?}", status.printable_status),
            found.node_name.unwrap_or_else(|| "-".into()),
            ip.unwrap_or_else(|| "-".into()),
            age(vm.creation_timestamp().map(|at| at.0)),
        );
    }
    Ok(())
}

/// How long ago, in its largest unit.
fn age(since: Option<Timestamp>) -> String {
    let Some(since) = since else { return "-".into() };
    let seconds = Timestamp::now().duration_since(since).as_secs().max(0);
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7200 => format!("{}m", seconds / 60),
        7200..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// Tells a VM's story.
///
/// # Errors
/// The API's.
pub async fn describe(cluster: &Cluster, name: &str) -> Result<()> {
    let vm = cluster.vms().get(name).await.map_err(plain)?;
    let status = vm.status.clone().unwrap_or_default();
    println!("{}/{name} is {:?}", cluster.namespace, status.printable_status);
    println!("run strategy: {:?}", vm.spec.strategy());
    let vmis: Api<VirtualMachineInstance> =
        Api::namespaced(cluster.client.clone(), &cluster.namespace);
    let vmi = vmis.get_opt(name).await.map_err(plain)?;
    if let Some(vmi) = &vmi {
        instance(vmi);
    }
    let owners: Api<OwnerRecord> = Api::namespaced(cluster.client.clone(), &cluster.namespace);
    if let Some(record) = owners.get_opt(name).await.map_err(plain)?.and_then(|o| o.status) {
        let ended = if record.is_over() { ", which has ended" } else { "" };
        println!(
            "owner: epoch {}, {}, pod {} on {}{ended}",
            record.epoch,
            record.state,
            record.pod.as_deref().unwrap_or("-"),
            record.node.as_deref().unwrap_or("-")
        );
    }
    conditions("conditions", &status.conditions);
    let events: Api<Event> = Api::namespaced(cluster.client.clone(), &cluster.namespace);
    let about = ListParams::default().fields(&format!("involvedObject.name={name}"));
    let mut events = events.list(&about).await.map_err(plain)?.items;
    events.sort_by_key(|event| event.last_timestamp.clone().map(|at| at.0));
    if !events.is_empty() {
        println!("events:");
    }
    for event in events.iter().rev().take(EVENTS).rev() {
        println!(
            "  {:>5} {:8} {:24} {}",
            age(event.last_timestamp.clone().map(|at| at.0)),
            event.type_.as_deref().unwrap_or_default(),
            event.reason.as_deref().unwrap_or_default(),
            event.message.as_deref().unwrap_or_default()
        );
    }
    Ok(())
}

fn instance(vmi: &VirtualMachineInstance) {
    let status = vmi.status.clone().unwrap_or_default();
    println!("phase: {}", status.phase.name());
    println!("node: {}", status.node_name.as_deref().unwrap_or("-"));
    if let Some(machine) = &status.machine {
        println!("machine: {}", machine.kind);
    }
    for interface in &status.interfaces {
        println!(
            "interface {}: {} {}",
            interface.name,
            interface.mac.as_deref().unwrap_or("-"),
            interface.ip_address.as_deref().unwrap_or("-")
        );
    }
    for volume in &status.volume_status {
        let claim = volume.persistent_volume_claim_info.as_ref().map(|c| &*c.claim_name);
        println!("volume {}: {} {}", volume.name, volume.target, claim.unwrap_or_default());
    }
    conditions("instance's conditions", &status.conditions);
}

fn conditions(title: &str, conditions: &[Condition]) {
    if !conditions.is_empty() {
        println!("{title}:");
    }
    for condition in conditions {
        println!(
            "  {}={} {} {}",
            condition.kind,
            condition.status,
            condition.reason.as_deref().unwrap_or_default(),
            condition.message.as_deref().unwrap_or_default()
        );
    }
}
