//! What a VM that goes to another cluster is there. Pure.

use super::checks::PROTOCOL;
use super::types::{Naming, naming};
use api::conditions::{Is, types};
use api::instancetype::Taken;
use api::keys;
use api::migration::VirtualMachineInstanceMigration as Migration;
use api::relocation::Spec as Wanted;
use api::vm::VirtualMachine;
use api::vmi::{Phase, VirtualMachineInstance};
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use kube::ResourceExt;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};

/// Label of what is made for a move: its uid.
pub const MOVE: &str = "godwit.dev/move";
/// Annotations that say nothing elsewhere.
const LOCAL: [&str; 1] = ["kubectl.kubernetes.io/last-applied-configuration"];

/// A VM, as another cluster is to make it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Offer {
    /// The VM's namespace where it is.
    pub from_namespace: String,
    /// The VM's name where it is.
    pub from_name: String,
    /// The VM's namespace there.
    pub namespace: String,
    /// The VM's name there.
    pub name: String,
    /// The VM, which waits for its guest.
    pub vm: Value,
    /// What it names: Secrets and ConfigMaps, its instancetype and its preference.
    pub brings: Vec<Value>,
    /// What holds the latter two as the guest has them.
    #[serde(default)]
    pub revisions: Vec<Value>,
    /// What its node must have.
    pub selectors: BTreeMap<String, String>,
    /// What the sender speaks.
    #[serde(default)]
    pub protocol: u32,
    /// What is worth knowing of it here.
    #[serde(skip)]
    pub warnings: Vec<String>,
}

/// A VM and what there is of it.
pub struct Facts<'a> {
    /// The move's uid.
    pub id: &'a str,
    /// What is wanted.
    pub wanted: &'a Wanted,
    /// The VM.
    pub vm: &'a VirtualMachine,
    /// Its VMI.
    pub vmi: &'a VirtualMachineInstance,
    /// The claims of its namespace.
    pub claims: &'a [PersistentVolumeClaim],
    /// What the VM takes from its instancetype and its preference.
    pub taken: &'a [Taken],
    /// The VMI's migrations.
    pub migrations: &'a [Migration],
}

/// A kind of object that a VM names, and one of its name.
pub type Named = (&'static str, String);

/// The VM as it is to be there; or all that stands in the way here.
pub fn offer(facts: &Facts<'_>) -> Result<Offer, Vec<String>> {
    let Facts { id, wanted, vm, vmi, .. } = facts;
    let mut faults = state(facts);
    let from_namespace = vm.namespace().unwrap_or_default();
    let namespace = wanted.namespace.clone().unwrap_or_else(|| from_namespace.clone());
    let name = wanted.name.clone().unwrap_or_else(|| vm.name_any());
    // N.B. the VMI's: the guest is the machine that it is, whatever the template says by now.
    let mut spec = vmi.spec.0.clone();
    let templates = disks(facts, &mut spec, &mut faults);
    rename_networks(&mut spec, &wanted.network_map);
    if !faults.is_empty() {
        return Err(faults);
    }
    let strategy = json!(vm.spec.strategy());
    let mut annotations = vm.annotations().clone();
    annotations.retain(|name, _| !LOCAL.contains(&name.as_str()));
    annotations
        .insert(keys::RESTORE_STRATEGY.into(), strategy.as_str().unwrap_or("Always").to_owned());
    let mut labels = vm.labels().clone();
    labels.insert(MOVE.into(), (*id).to_owned());
    let template = vm.spec.template.metadata.clone().unwrap_or_default();
    let mut warnings = Vec::new();
    let named = naming(vm, &spec, facts.taken, &namespace);
    let named = named.unwrap_or_else(|why| {
        warnings.push(format!(
            "what its instancetype and its preference say is in the template of the VM there, which names \
             neither: {why}"
        ));
        Naming { template: spec, ..Naming::default() }
    });
    let mut object = json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine",
        "metadata": {
            "name": name, "namespace": namespace, "labels": labels, "annotations": annotations,
        },
        "spec": {
            "runStrategy": "WaitAsReceiver", "dataVolumeTemplates": templates,
            "template": {
                "metadata": {"labels": template.labels, "annotations": template.annotations},
                "spec": named.template,
            },
        },
    });
    for (field, matcher) in named.matchers {
        object["spec"][field] = json!(matcher);
    }
    let from_name = vm.name_any();
    Ok(Offer {
        from_namespace,
        from_name,
        namespace,
        name,
        vm: object,
        revisions: named.revisions,
        warnings,
        protocol: PROTOCOL,
        ..Offer::default()
    })
}

/// Calls networks what they are called there.
fn rename_networks(spec: &mut Value, names: &BTreeMap<String, String>) {
    for network in spec["networks"].as_array_mut().into_iter().flatten() {
        let name = network["multus"]["networkName"].as_str().and_then(|name| names.get(name));
        if let Some(name) = name {
            network["multus"]["networkName"] = name.as_str().into();
        }
    }
}

/// What of the VM's state keeps it from moving.
fn state(facts: &Facts<'_>) -> Vec<String> {
    let Facts { vmi, migrations, .. } = facts;
    let name = vmi.name_any();
    let mut faults = Vec::new();
    let status = vmi.status.clone().unwrap_or_default();
    if status.phase != Phase::Running || vmi.metadata.deletion_timestamp.is_some() {
        faults.push(format!("{name} does not run"));
    }
    if let Some(other) = migrations.iter().find(|migration| !migration.is_over()) {
        faults.push(format!("{name} is moved already, by migration {}", other.name_any()));
    }
    // Disks always go along to another cluster.
    let stays = status.conditions.iter().filter(|condition| {
        condition.kind == types::LIVE_MIGRATABLE
            && condition.status == Is::False
            && condition.reason.as_deref() != Some("DisksNotLiveMigratable")
    });
    faults.extend(stays.map(|condition| condition.message.clone().unwrap_or_default()));
    faults
}

/// Gives the guest blank disks as large as its own, and returns them.
fn disks(facts: &Facts<'_>, spec: &mut Value, faults: &mut Vec<String>) -> Vec<Value> {
    let mut templates = Vec::new();
    let sizes = facts.vmi.status.as_ref().map(|status| &*status.volume_status).unwrap_or_default();
    let volumes = spec["volumes"].as_array_mut().into_iter().flatten();
    for volume in volumes {
        let named = volume["dataVolume"]["name"].as_str();
        let named = named.or(volume["persistentVolumeClaim"]["claimName"].as_str());
        let Some(name) = named.map(str::to_owned) else {
            if volume.get("hostDisk").is_some() {
                faults.push(format!("volume {} is a file of its node", volume["name"]));
            }
            continue;
        };
        let Some(claim) = facts.claims.iter().find(|claim| claim.name_any() == name) else {
            faults.push(format!("claim {name} of volume {} is not there", volume["name"]));
            continue;
        };
        let wanted = claim.spec.clone().unwrap_or_default();
        let capacity =
            claim.status.as_ref().and_then(|status| status.capacity.as_ref()?.get("storage"));
        let class = facts.wanted.storage_class.clone().or(wanted.storage_class_name);
        // N.B. what a file system takes of a claim is not the disk's: the way back would not fit.
        let disk = sizes.iter().find(|status| json!(status.name) == volume["name"]);
        let disk = disk.and_then(|status| status.size).filter(|_| !block(&wanted.volume_mode));
        let (form, size) = match disk {
            Some(bytes) => ("storage", json!(bytes.to_string())),
            None => ("pvc", json!(capacity)),
        };
        templates.push(json!({
            "metadata": {"name": name, "labels": {MOVE: facts.id}},
            "spec": {
                "source": {"blank": {}},
                form: {
                    "accessModes": wanted.access_modes, "volumeMode": wanted.volume_mode,
                    "storageClassName": class, "resources": {"requests": {"storage": size}},
                },
            },
        }));
        let own = volume["name"].clone();
        *volume = json!({"name": own, "dataVolume": {"name": name}});
    }
    templates
}

/// The claim that a DataVolume of an offer asks for.
pub fn claim(template: &Value) -> &Value {
    let spec = &template["spec"];
    spec.get("storage").unwrap_or(&spec["pvc"])
}

fn block(mode: &Option<String>) -> bool {
    mode.as_deref() == Some("Block")
}

/// The Secrets and ConfigMaps that a VMI's spec names, wherever it does.
pub fn named(spec: &Value) -> BTreeSet<Named> {
    let mut found = BTreeSet::new();
    let text = |value: &Value| value.as_str().map(str::to_owned);
    for volume in spec["volumes"].as_array().into_iter().flatten() {
        let secrets = [
            &volume["secret"]["secretName"],
            &volume["sysprep"]["secret"]["name"],
            &volume["containerDisk"]["imagePullSecret"],
        ];
        found.extend(secrets.into_iter().filter_map(text).map(|name| ("Secret", name)));
        for cloud in ["cloudInitNoCloud", "cloudInitConfigDrive"] {
            for field in ["secretRef", "networkDataSecretRef"] {
                found.extend(text(&volume[cloud][field]["name"]).map(|name| ("Secret", name)));
            }
        }
        let maps = [&volume["configMap"]["name"], &volume["sysprep"]["configMap"]["name"]];
        found.extend(maps.into_iter().filter_map(text).map(|name| ("ConfigMap", name)));
    }
    for access in spec["accessCredentials"].as_array().into_iter().flatten() {
        for kind in ["sshPublicKey", "userPassword"] {
            let name = text(&access[kind]["source"]["secret"]["secretName"]);
            found.extend(name.map(|name| ("Secret", name)));
        }
    }
    found
}

/// A Secret or ConfigMap as another cluster is to have it.
pub fn brought(object: &Value, kind: &str, namespace: &str, id: &str) -> Value {
    let mut made = json!({
        "apiVersion": "v1", "kind": kind,
        "metadata": {
            "name": object["metadata"]["name"], "namespace": namespace, "labels": {MOVE: id},
        },
    });
    for field in ["type", "data", "binaryData", "immutable"] {
        if let Some(value) = object.get(field).filter(|value| !value.is_null()) {
            made[field] = value.clone();
        }
    }
    made
}

#[cfg(test)]
mod test {
    use super::*;

    fn made<T: serde::de::DeserializeOwned>(value: Value) -> T {
        serde_json::from_value(value).expect("a whole object")
    }

    #[test]
    fn what_goes_along_is_the_machine_as_it_is_on_blank_disks_and_all_that_it_names() {
        let vm: VirtualMachine = made(json!({
            "metadata": {"name": "web", "namespace": "a", "labels": {"own": "yes"}},
            "spec": {"running": true, "template": {"spec": {}}},
        }));
        let spec = json!({
            "domain": {"devices": {"interfaces": [{"name": "n", "macAddress": "02:00:00:00:00:01"}]}},
            "volumes": [
                {"name": "root", "dataVolume": {"name": "disk"}},
                {"name": "seed", "cloudInitNoCloud": {"secretRef": {"name": "seed"}}},
                {"name": "files", "configMap": {"name": "files"}},
            ],
            "networks": [
                {"name": "n", "multus": {"networkName": "br0"}},
                {"name": "m", "multus": {"networkName": "br1"}},
            ],
        });
        let vmi: VirtualMachineInstance = made(json!({
            "metadata": {"name": "web", "namespace": "a"}, "spec": spec, "status": {"phase": "Running"},
        }));
        let claim: PersistentVolumeClaim = made(json!({
            "metadata": {"name": "disk", "namespace": "a"},
            "spec": {"accessModes": ["ReadWriteOnce"], "storageClassName": "local"},
            "status": {"capacity": {"storage": "1Gi"}},
        }));
        let wanted = Wanted {
            namespace: Some("b".into()),
            network_map: [("br0".to_owned(), "lan".to_owned())].into(),
            ..Wanted::default()
        };
        let mut facts = Facts {
            id: "1",
            wanted: &wanted,
            vm: &vm,
            vmi: &vmi,
            claims: &[claim],
            taken: &[],
            migrations: &[],
        };
        let offer = offer(&facts).expect("it can go");
        let there = &offer.vm;
        assert_eq!(there["metadata"]["namespace"], "b");
        assert_eq!(there["metadata"]["annotations"][keys::RESTORE_STRATEGY], "Always");
        assert_eq!(there["spec"]["runStrategy"], "WaitAsReceiver");
        let disk = &there["spec"]["dataVolumeTemplates"][0];
        assert_eq!(super::claim(disk)["resources"]["requests"]["storage"], "1Gi");
        let mac = &there["spec"]["template"]["spec"]["domain"]["devices"]["interfaces"][0];
        assert_eq!(mac["macAddress"], "02:00:00:00:00:01");
        let networks = &there["spec"]["template"]["spec"]["networks"];
        assert_eq!(networks[0]["multus"]["networkName"], "lan");
        assert_eq!(networks[1]["multus"]["networkName"], "br1");
        let all = [("ConfigMap", "files".to_owned()), ("Secret", "seed".to_owned())];
        assert_eq!(named(&spec), BTreeSet::from(all));
        // A disk that is known is as large there, whatever its claim has besides.
        let mut sized = vmi.clone();
        sized.status = Some(made(json!({
            "phase": "Running", "volumeStatus": [{"name": "root", "size": 629_145_600}],
        })));
        facts.vmi = &sized;
        let there = super::offer(&facts).expect("it can go").vm;
        let disk = &there["spec"]["dataVolumeTemplates"][0];
        assert!(disk["spec"]["pvc"].is_null(), "{disk}");
        assert_eq!(super::claim(disk)["resources"]["requests"]["storage"], "629145600");
        // Each obstacle is told, all at once.
        let still: VirtualMachineInstance = made(json!({
            "metadata": {"name": "web", "namespace": "a"}, "spec": spec, "status": {"phase": "Failed"},
        }));
        facts.vmi = &still;
        facts.claims = &[];
        let faults = super::offer(&facts).expect_err("it does not run, and has no disk");
        assert_eq!(faults.len(), 2, "{faults:?}");
    }
}
