//! A VM that takes an instancetype and a preference.

use anyhow::{Result, ensure};
use e2e::cluster::Cluster;
use e2e::vms::{VMIS, VMS, holds, is_running, says};
use serde_json::{Value, json};

/// The instancetypes of the namespace `default`.
const SIZES: &str =
    "/apis/instancetype.kubevirt.io/v1beta1/namespaces/default/virtualmachineinstancetypes";
/// The preferences of the cluster.
const PREFERENCES: &str = "/apis/instancetype.kubevirt.io/v1beta1/virtualmachineclusterpreferences";

/// What holds them as they were.
const REVISIONS: &str = "/apis/apps/v1/namespaces/default/controllerrevisions";

fn size(memory: &str) -> Value {
    json!({"apiVersion": "instancetype.kubevirt.io/v1beta1", "kind": "VirtualMachineInstancetype",
        "metadata": {"name": "small"}, "spec": {"cpu": {"guest": 2}, "memory": {"guest": memory}}})
}

fn preference() -> Value {
    json!({"apiVersion": "instancetype.kubevirt.io/v1beta1", "kind": "VirtualMachineClusterPreference",
        "metadata": {"name": "plain"},
        "spec": {"cpu": {"preferredCPUTopology": "cores"}, "devices": {"preferredRng": {}}}})
}

/// Makes a VM that takes an instancetype and a preference: it runs once both are there, and has what they
/// said then.
pub async fn takes(cluster: &Cluster, mut vm: Value) -> Result<()> {
    let web = format!("{VMS}/web");
    let spec = &mut vm["spec"];
    spec["instancetype"] = json!({"name": "small", "kind": "VirtualMachineInstancetype"});
    spec["preference"] = json!({"name": "plain"});
    spec["template"]["spec"]["domain"]["memory"] = json!({});
    cluster.create(VMS, vm).await?;
    cluster.until(&web, |vm| says(vm, "Failure", "FailedFindInstancetype")).await?;
    cluster.create(SIZES, size("128Mi")).await?;
    cluster.until(&web, |vm| says(vm, "Failure", "FailedFindPreference")).await?;
    cluster.create(PREFERENCES, preference()).await?;
    let vm = cluster.until(&web, is_running).await?;
    let held = &vm["status"]["instancetypeRef"]["controllerRevisionRef"]["name"];
    ensure!(held.as_str().is_some_and(|name| name.starts_with("web-small-")), "{vm}");
    has_what_it_had(cluster).await?;
    let larger = json!({"spec": {"memory": {"guest": "192Mi"}}});
    cluster.send("PATCH", &format!("{SIZES}/small"), Some(larger)).await?;
    Ok(())
}

/// What the other cluster lacks or has otherwise is told, and never overwritten.
pub async fn differs(here: &Cluster, there: &Cluster) -> Result<()> {
    let dry = ["migrate", "vm/web", "--to", "west", "--dry-run"];
    there.create(SIZES, size("64Mi")).await?;
    let told = here.refuses(&dry)?;
    ensure!(told.contains("VirtualMachineInstancetype default/small"), "{told}");
    ensure!(told.contains("no VirtualMachineClusterPreference plain"), "{told}");
    let kept = there.send("GET", &format!("{SIZES}/small"), None).await?;
    ensure!(kept["spec"]["memory"]["guest"] == "64Mi", "{kept}");
    there.send("DELETE", &format!("{SIZES}/small"), None).await?;
    there.create(PREFERENCES, preference()).await?;
    Ok(())
}

/// The instancetype has come along as it is by now.
pub async fn came_along(cluster: &Cluster) -> Result<()> {
    let small = cluster.send("GET", &format!("{SIZES}/small"), None).await?;
    ensure!(small["spec"]["memory"]["guest"] == "192Mi", "{small}");
    has_what_it_had(cluster).await
}

/// The guest has what its instancetype said when its VM was first seen, and its VM names that.
async fn has_what_it_had(cluster: &Cluster) -> Result<()> {
    let vmi = cluster.send("GET", &format!("{VMIS}/web"), None).await?;
    let domain = &vmi["spec"]["domain"];
    let (cpu, memory) = (&domain["cpu"], &domain["memory"]["guest"]);
    ensure!(cpu["cores"] == 2 && cpu["sockets"] == 1 && memory == "128Mi", "{domain}");
    ensure!(domain["devices"]["rng"].is_object(), "{domain}");
    let vm = cluster.send("GET", &format!("{VMS}/web"), None).await?;
    ensure!(vm["spec"]["instancetype"]["name"] == "small", "{vm}");
    ensure!(vm["spec"]["template"]["spec"]["domain"]["memory"].get("guest").is_none(), "{vm}");
    ensure!(!holds(&vm, "RestartRequired"), "{vm}");
    let held = vm["status"]["instancetypeRef"]["controllerRevisionRef"]["name"].as_str();
    let held = format!("{REVISIONS}/{}", held.unwrap_or_default());
    let held = cluster.send("GET", &held, None).await?;
    ensure!(held["metadata"]["ownerReferences"][0]["name"] == "web", "{held}");
    Ok(())
}
