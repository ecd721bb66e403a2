//! `godwit migrate` and `godwit watch`: a VM of a cluster is moved, and one sees how far it is.

use crate::cli::{Migrate, Watch};
use crate::view::View;
use crate::vms::{Cluster, plain};
use crate::{preflight, relocating};
use anyhow::{Context, Result, bail, ensure};
use api::conditions::{Is, types};
use api::keys;
use api::migration::{Phase, Spec, VirtualMachineInstanceMigration as Migration};
use api::vm::VirtualMachine;
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use kube::api::{DynamicObject, ListParams, Patch, PatchParams, PostParams};
use kube::core::ApiResource;
use kube::{Api, ResourceExt};
use launcher::migration::status::{Status as Move, Verified};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// How often one looks.
pub const LOOK: Duration = Duration::from_millis(250);
/// Controllers take a change of volumes up within this time, or say why not.
const TAKEN_UP: Duration = Duration::from_secs(60);

/// Moves a VM.
///
/// # Errors
/// When it cannot begin. A move that fails is an exit code.
pub async fn run(arguments: Migrate) -> Result<ExitCode> {
    let cluster = Cluster::open(&arguments.place).await?;
    let vm = name_of(&arguments.vm)?;
    if let Some(to) = &arguments.to {
        return relocating::run(&cluster, vm, to, &arguments).await;
    }
    if arguments.dry_run {
        let (node, class) = (arguments.to_node.as_deref(), arguments.storage_class.as_deref());
        return preflight::run(&cluster, vm, node, class, arguments.output).await;
    }
    let migration = match &arguments.storage_class {
        Some(class) => to_class(&cluster, vm, class, arguments.verify).await?,
        None => to_node(&cluster, vm, arguments.to_node.as_deref(), arguments.verify).await?,
    };
    if arguments.no_wait {
        println!("{migration}");
        return Ok(ExitCode::SUCCESS);
    }
    follow(&cluster, &migration, View::new(arguments.output)).await
}

/// Watches the migration of a VM that is under way, or the one that comes.
///
/// # Errors
/// When the cluster cannot be asked.
pub async fn watch(arguments: Watch) -> Result<ExitCode> {
    let cluster = Cluster::open(&arguments.place).await?;
    let vm = name_of(&arguments.vm)?;
    let mut told = false;
    loop {
        if let Some(name) = under_way(&cluster, vm).await? {
            return follow(&cluster, &name, View::new(arguments.output)).await;
        }
        if !told {
            eprintln!("{vm} does not move; waiting until it does (Ctrl-C ends this)");
            told = true;
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// `vm/web` and `web` are the same.
fn name_of(vm: &str) -> Result<&str> {
    match vm.split_once('/') {
        None => Ok(vm),
        Some(("vm" | "vmi" | "virtualmachine" | "virtualmachineinstance", name)) => Ok(name),
        Some((kind, _)) => bail!("only VMs can be moved, not '{kind}': say vm/NAME"),
    }
}

fn api<K>(cluster: &Cluster) -> Api<K>
where
    K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>,
{
    Api::namespaced(cluster.client.clone(), &cluster.namespace)
}

/// The migration of a VM that is not over.
async fn under_way(cluster: &Cluster, vm: &str) -> Result<Option<String>> {
    let all = api::<Migration>(cluster).list(&ListParams::default()).await.map_err(plain)?;
    let open = |m: &&Migration| m.spec.vmi_name == vm && !m.is_over();
    Ok(all.items.iter().find(open).map(ResourceExt::name_any))
}

async fn to_node(cluster: &Cluster, vm: &str, node: Option<&str>, verify: bool) -> Result<String> {
    let selector = node.map(|node| ("kubernetes.io/hostname".to_owned(), node.to_owned()));
    let spec = Spec {
        vmi_name: vm.to_owned(),
        added_node_selector: BTreeMap::from_iter(selector),
        ..Spec::default()
    };
    let mut migration = Migration::new("", spec);
    migration.metadata.name = None;
    migration.metadata.generate_name = Some(format!("{vm}-"));
    if verify {
        migration.annotations_mut().insert(keys::VERIFY.into(), "true".into());
    }
    let made = api::<Migration>(cluster).create(&PostParams::default(), &migration).await;
    Ok(made.map_err(plain)?.name_any())
}

/// Lets all disks of a VM go to new claims of a class; returns the migration that does it.
async fn to_class(cluster: &Cluster, vm: &str, class: &str, verify: bool) -> Result<String> {
    // N.B. as it is, with what the types here do not have: some of it is written back.
    let kind = ApiResource::erase::<VirtualMachine>(&());
    let vms: Api<DynamicObject> =
        Api::namespaced_with(cluster.client.clone(), &cluster.namespace, &kind);
    let found = vms.get(vm).await.map_err(plain)?;
    if let Some(other) = under_way(cluster, vm).await? {
        bail!("{vm} is moved already by migration {other}: wait for its end, or delete it");
    }
    let patch = onto_class(cluster, &found, class).await?;
    vms.patch(vm, &PatchParams::default(), &Patch::Merge(&patch)).await.map_err(plain)?;
    match taken_up(cluster, vm).await {
        Ok(migration) => {
            if verify {
                let wanted = json!({"metadata": {"annotations": {keys::VERIFY: "true"}}});
                let (migrations, wanted) = (api::<Migration>(cluster), Patch::Merge(wanted));
                let patched = migrations.patch(&migration, &PatchParams::default(), &wanted).await;
                patched.map_err(plain).context("the disks move, but will not be compared")?;
            }
            Ok(migration)
        }
        Err(why) => {
            // Its next start would be on the new disks, which are empty.
            let spec = &found.data["spec"];
            let back = Patch::Merge(json!({"spec": {
                "updateVolumesStrategy": spec["updateVolumesStrategy"],
                "dataVolumeTemplates": spec["dataVolumeTemplates"],
                "template": {"spec": {"volumes": spec["template"]["spec"]["volumes"]}},
            }}));
            vms.patch(vm, &PatchParams::default(), &back).await.map_err(plain).with_context(
                || format!("the old volumes of {vm} are not back in its template: put them there"),
            )?;
            Err(why)
        }
    }
}

/// Waits until a migration brings the disks of a VM to what its template names now.
async fn taken_up(cluster: &Cluster, vm: &str) -> Result<String> {
    let since = Instant::now();
    loop {
        if let Some(name) = under_way(cluster, vm).await? {
            return Ok(name);
        }
        let now = api::<VirtualMachine>(cluster).get(vm).await.map_err(plain)?;
        let conditions = now.status.unwrap_or_default().conditions;
        let restart = conditions.iter().find(|c| c.kind == types::RESTART_REQUIRED);
        if let Some(why) = restart.filter(|c| c.status == Is::True) {
            let why = why.message.clone().unwrap_or_default();
            bail!("the disks of {vm} cannot move while it runs: {why}. They are where they were");
        }
        ensure!(
            since.elapsed() < TAKEN_UP,
            "nobody has begun to move the disks of {vm} within {TAKEN_UP:?}, and they are where they \
             were: see `godwit vm describe {vm}`"
        );
        tokio::time::sleep(LOOK).await;
    }
}

/// The change of a VM that has its disks go to new, blank ones of a class.
async fn onto_class(cluster: &Cluster, vm: &DynamicObject, class: &str) -> Result<Value> {
    let name = vm.name_any();
    let spec = &vm.data["spec"];
    let template = api::support::parse::<api::vmi::Spec>(&spec["template"]["spec"]);
    let (parsed, _) = template.map_err(|why| anyhow::anyhow!("{name}: {why}"))?;
    let old = parsed.claims();
    ensure!(!old.is_empty(), "{name} has no disks on claims that could go to another class");
    let claims = api::<PersistentVolumeClaim>(cluster);
    let taken = claims.list(&ListParams::default()).await.map_err(plain)?;
    let mut taken: BTreeSet<String> = taken.items.iter().map(ResourceExt::name_any).collect();
    let mut templates = spec["dataVolumeTemplates"].as_array().cloned().unwrap_or_default();
    let mut volumes = spec["template"]["spec"]["volumes"].clone();
    for (volume, claim) in &old {
        let found = claims.get(claim).await.map_err(plain)?;
        let has = found.status.and_then(|status| status.capacity?.get("storage").cloned());
        let size = has.with_context(|| format!("claim {claim} has no size yet"))?;
        let to = free_name(claim, class, &taken);
        taken.insert(to.clone());
        templates.retain(|template| template["metadata"]["name"] != **claim);
        templates.push(json!({
            "metadata": {"name": to},
            "spec": {"source": {"blank": {}}, "storage": {
                "storageClassName": class, "resources": {"requests": {"storage": size}},
            }},
        }));
        for of in volumes.as_array_mut().into_iter().flatten().filter(|v| v["name"] == **volume) {
            *of = json!({"name": volume, "dataVolume": {"name": to}});
        }
    }
    Ok(json!({"metadata": {"resourceVersion": vm.metadata.resource_version}, "spec": {
        "updateVolumesStrategy": "Migration", "dataVolumeTemplates": templates,
        "template": {"spec": {"volumes": volumes}},
    }}))
}

/// A name for a disk of a class that nothing has yet: `web-root-fast`, `web-root-fast-2`.
fn free_name(claim: &str, class: &str, taken: &BTreeSet<String>) -> String {
    const LONGEST: usize = 200;
    let stem: String = format!("{claim}-{class}").chars().take(LONGEST).collect();
    let numbered = (2..).map(|number| format!("{stem}-{number}"));
    std::iter::once(stem.clone()).chain(numbered).find(|n| !taken.contains(n)).unwrap_or(stem)
}

/// Shows a migration until it is over.
///
/// # Errors
/// When the cluster cannot be asked. One that fails is an exit code.
pub async fn follow(cluster: &Cluster, name: &str, mut view: View) -> Result<ExitCode> {
    // N.B. with what the types here do not have: its progress is the launcher's.
    let kind = ApiResource::erase::<Migration>(&());
    let migrations: Api<DynamicObject> =
        Api::namespaced_with(cluster.client.clone(), &cluster.namespace, &kind);
    let mut shown = (String::new(), Value::Null);
    loop {
        let found = migrations.get(name).await.map_err(plain)?;
        let status = &found.data["status"];
        let phase: Phase = serde_json::from_value(status["phase"].clone()).unwrap_or_default();
        let progress = &status["progress"];
        if let Ok(of) = serde_json::from_value::<Move>(progress.clone())
            && *progress != shown.1
        {
            view.show(&of);
            shown.1.clone_from(progress);
        } else if progress.is_null() && shown.0 != phase.to_string() {
            eprintln!("{name}: {phase}");
        }
        shown.0 = phase.to_string();
        match phase {
            Phase::Succeeded => {
                let state = &status["migrationState"];
                let node = state["targetNode"].as_str().unwrap_or_default();
                let vm = found.data["spec"]["vmiName"].as_str().unwrap_or_default();
                match state["targetState"]["cluster"].as_str() {
                    Some(cluster) => eprintln!("{vm} runs on node {node} of cluster {cluster}"),
                    None => eprintln!("{vm} runs on node {node}"),
                }
                let asked =
                    found.annotations().get(keys::VERIFY).is_some_and(|asked| asked == "true");
                return Ok(verdict(asked, &progress["verified"]));
            }
            Phase::Failed => {
                let why = status["migrationState"]["failureReason"].as_str();
                let vm = found.data["spec"]["vmiName"].as_str().unwrap_or_default();
                eprintln!("{vm} is where it was: {}", why.unwrap_or("nobody says why"));
                return Ok(ExitCode::FAILURE);
            }
            _ => tokio::time::sleep(LOOK).await,
        }
    }
}

/// Tells what a comparison of the disks has shown, where it was asked for.
fn verdict(asked: bool, verified: &Value) -> ExitCode {
    match serde_json::from_value::<Verified>(verified.clone()) {
        Ok(found) => {
            eprintln!("{found}");
            match found {
                Verified::Verified { .. } => ExitCode::SUCCESS,
                Verified::Differ { .. } | Verified::Unknown { .. } => ExitCode::FAILURE,
            }
        }
        Err(_) if asked => {
            eprintln!(
                "nobody says what the comparison of its disks has shown: its VMI's events may"
            );
            ExitCode::FAILURE
        }
        Err(_) => ExitCode::SUCCESS,
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_comparison_that_was_asked_for_and_is_not_told_of_is_no_success() {
        let is_success = |asked, verified: &Value| verdict(asked, verified) == ExitCode::SUCCESS;
        assert!(is_success(false, &Value::Null));
        assert!(!is_success(true, &Value::Null));
        let whole = Verified::from(launcher::migration::verify::VerifyReport::default());
        assert!(is_success(true, &serde_json::to_value(whole).unwrap()));
    }

    #[test]
    fn a_disk_of_a_class_gets_a_name_that_is_free() {
        let taken = BTreeSet::from(["root-fast".to_owned(), "root-fast-2".to_owned()]);
        assert_eq!(free_name("root", "fast", &taken), "root-fast-3");
        assert_eq!(free_name("root", "slow", &taken), "root-slow");
    }
}
