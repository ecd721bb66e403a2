//! The pod of a VMI's launcher. Pure.

use crate::VERSION;
use api::keys;
use api::vmi::{Spec, VirtualMachineInstance};
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use kube::{Resource, ResourceExt};
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// The node's folder of pods' folders, between handler and launcher: `<namespace>_<pod>` in it. It is
/// the handler's.
pub const FOLDERS: &str = "/var/run/godwit/pods";
/// The same in the pod.
const FOLDER: &str = "/run/godwit";

const MIB: i128 = 1 << 20;
/// What a launcher and its QEMU take besides the guest's memory, measured: launcher 15 MiB,
/// QEMU 64 MiB, 8 MiB for each processor, and page tables.
const LAUNCHER: i128 = 15 * MIB;
const QEMU: i128 = 64 * MIB;
const VCPU: i128 = 8 * MIB;
const PAGE_TABLES: i128 = 512;
/// A guest's processor asks for a tenth of one, as KubeVirt has it.
const MILLI_PER_VCPU: u32 = 100;
/// What a launcher needs besides its guest's time to end.
const FAREWELL: u64 = 30;

/// A pod to be.
pub struct Wanted<'a> {
    /// Whose.
    pub vmi: &'a VirtualMachineInstance,
    /// What it wants.
    pub spec: &'a Spec,
    /// The claims that it names.
    pub claims: &'a [(&'a str, &'a PersistentVolumeClaim)],
    /// The end of its name.
    pub suffix: &'a str,
    /// Its guest is emulated, and needs no KVM.
    pub emulated: bool,
    /// It only has claims bound, where the guest could run.
    pub binds: bool,
    /// It is the target of a migration.
    pub target: Option<Target<'a>>,
}

/// What makes a pod the target of a migration.
pub struct Target<'a> {
    /// The migration's uid.
    pub migration: &'a str,
    /// Its name.
    pub name: &'a str,
    /// What its node must have, besides what the VM says.
    pub selector: &'a BTreeMap<String, String>,
    /// It is to be on another node than its source.
    pub apart: bool,
}

/// Bytes of memory that a launcher needs besides its guest's.
pub fn overhead(guest: i128, vcpus: u32) -> i128 {
    LAUNCHER + QEMU + VCPU * i128::from(vcpus) + guest / PAGE_TABLES
}

/// The pod's host name, by which a headless service finds it: as KubeVirt has it, wherever the
/// guest goes.
fn hostname(spec: &Spec, name: &str) -> String {
    let said = spec.hostname.as_deref().filter(|said| !said.is_empty()).unwrap_or(name);
    let label = said.split('.').next().unwrap_or_default();
    let short: String = label.chars().take(63).collect();
    short.trim_end_matches('-').to_owned()
}

impl Wanted<'_> {
    /// It.
    pub fn pod(&self) -> serde_json::Result<Pod> {
        let (vmi, spec) = (self.vmi, self.spec);
        let (namespace, name) = (vmi.namespace().unwrap_or_default(), vmi.name_any());
        let short: String = name.chars().take(40).collect();
        let pod = format!("virt-launcher-{}-{}", short.trim_end_matches('-'), self.suffix);
        let mut labels = vmi.labels().clone();
        labels.insert(keys::APP.into(), keys::LAUNCHER.into());
        labels.insert(keys::CREATED_BY.into(), vmi.uid().unwrap_or_default());
        if self.binds {
            labels.insert(keys::BINDS.into(), "true".into());
        }
        let mut annotations = vmi.annotations().clone();
        annotations.remove(keys::EVICTION_SOURCE);
        annotations.insert(keys::DOMAIN.into(), name.clone());
        annotations.insert(keys::VERSION.into(), VERSION.into());
        annotations.insert(keys::EVICT_ONLY.into(), String::new());
        let mut selector = BTreeMap::new();
        if let Some(target) = &self.target {
            labels.insert(keys::MIGRATION.into(), target.migration.into());
            annotations.insert(keys::MIGRATION_NAME.into(), target.name.into());
            selector.clone_from(target.selector);
        }
        selector.extend(spec.node_selector.clone());
        selector.insert(keys::SCHEDULABLE.into(), "true".into());
        let machine = &spec.domain.machine.kind;
        // All have the short names.
        if machine.contains('-') {
            selector.insert(format!("{}{machine}", keys::MACHINE), "true".into());
        }
        let grace = spec.grace().saturating_add(FAREWELL);
        let host = format!("{FOLDERS}/{namespace}_{pod}");
        let mut volumes = vec![json!({
            "name": "godwit", "hostPath": {"path": host, "type": "DirectoryOrCreate"},
        })];
        let (mut mounts, mut devices) =
            (vec![json!({"name": "godwit", "mountPath": FOLDER})], vec![]);
        for volume in &spec.volumes {
            if let Some(disk) = &volume.host_disk {
                let folder = disk.path.rsplit_once('/').map_or("/", |(folder, _)| folder);
                volumes.push(json!({"name": volume.name, "hostPath": {"path": folder}}));
                let place = format!("/host/{}", volume.name);
                mounts.push(json!({"name": volume.name, "mountPath": place}));
            }
            let Some((claim, object)) =
                volume.claim().and_then(|name| self.claims.iter().find(|(n, _)| *n == name))
            else {
                continue;
            };
            volumes.push(json!({
                "name": volume.name, "persistentVolumeClaim": {"claimName": claim},
            }));
            match is_block(object) {
                true => devices.push(
                    json!({"name": volume.name, "devicePath": format!("/dev/disks/{}", volume.name)}),
                ),
                false => mounts.push(
                    json!({"name": volume.name, "mountPath": format!("/disks/{}", volume.name)}),
                ),
            }
        }
        let id = api::owner::vm_id(&namespace, &name);
        let grace_text = spec.grace().to_string();
        let command = match self.binds {
            true => vec!["godwit", "--version"],
            false => {
                vec!["godwit", "launcher", "--host", FOLDER, "--vm", &id, "--grace", &grace_text]
            }
        };
        serde_json::from_value(json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "name": pod, "namespace": namespace, "labels": labels, "annotations": annotations,
                "ownerReferences": [vmi.controller_owner_ref(&())],
            },
            "spec": {
                "restartPolicy": "Never",
                "terminationGracePeriodSeconds": i64::try_from(grace).unwrap_or(i64::MAX),
                "automountServiceAccountToken": false,
                "enableServiceLinks": false,
                "nodeSelector": selector, "affinity": self.affinity(),
                "tolerations": spec.tolerations,
                "priorityClassName": spec.priority_class_name,
                "schedulerName": spec.scheduler_name,
                "hostname": hostname(spec, &name), "subdomain": spec.subdomain,
                "volumes": volumes,
                "containers": [{
                    "name": "compute", "command": command,
                    "resources": self.resources(),
                    "volumeMounts": mounts, "volumeDevices": devices,
                }],
            },
        }))
    }

    /// What the VM says; and a target keeps away from its source, where it has to.
    fn affinity(&self) -> Value {
        let mut affinity = json!(self.spec.affinity);
        if self.target.as_ref().is_none_or(|target| !target.apart) {
            return affinity;
        }
        let apart = json!({
            "labelSelector": {"matchLabels": {keys::CREATED_BY: self.vmi.uid()}},
            "topologyKey": "kubernetes.io/hostname",
        });
        let terms =
            &mut affinity["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"];
        match terms.as_array_mut() {
            Some(terms) => terms.push(apart),
            None => *terms = json!([apart]),
        }
        affinity
    }

    fn resources(&self) -> Value {
        let size = |q: &k8s_openapi::apimachinery::pkg::api::resource::Quantity| {
            api::quantity::bytes(&q.0)
        };
        let vcpus = self.spec.domain.cpu.topology().vcpus().unwrap_or(1);
        let guest = self.spec.memory().and_then(size).unwrap_or_default();
        let more = overhead(guest, vcpus);
        let resources = &self.spec.domain.resources;
        let memory = resources.requests.get("memory").and_then(size).unwrap_or(guest);
        let mut requests: BTreeMap<String, String> =
            resources.requests.iter().map(|(name, q)| (name.clone(), q.0.clone())).collect();
        requests.insert("memory".into(), (memory + more).to_string());
        requests
            .entry("cpu".into())
            .or_insert(format!("{}m", vcpus.saturating_mul(MILLI_PER_VCPU)));
        let mut limits: BTreeMap<String, String> =
            resources.limits.iter().map(|(name, q)| (name.clone(), q.0.clone())).collect();
        if let Some(limit) = resources.limits.get("memory").and_then(size) {
            limits.insert("memory".into(), (limit + more).to_string());
        }
        if !self.emulated {
            // Nobody can have more of it than is asked for.
            for list in [&mut requests, &mut limits] {
                list.insert(keys::KVM.into(), "1".into());
            }
        }
        json!({"requests": requests, "limits": limits})
    }
}

/// Whether a claim is a device.
pub fn is_block(claim: &PersistentVolumeClaim) -> bool {
    claim.spec.as_ref().is_some_and(|spec| spec.volume_mode.as_deref() == Some("Block"))
}
