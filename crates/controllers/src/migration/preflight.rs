//! All that would make a move fail, before it begins, at once. Pure, but for [`gather`].

mod gather;

pub use gather::{Lately, gather};

use super::plan::{Snapshot, not_yet, target_pod};
use super::{disks, policy, processor};
use crate::vmi::claim_info;
use api::conditions::{Condition, Is, types};
use api::keys;
use api::kubevirt::Configuration;
use api::migration::{
    MigrationPolicy, Options, Spec as Migration, VirtualMachineInstanceMigration,
};
use api::vmi::{MigratedVolume, Spec, VirtualMachineInstance};
use apiserver::quota::{self, Usage};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, PersistentVolumeClaim, Pod, ResourceQuota};
use k8s_openapi::api::storage::v1::StorageClass;
use kube::ResourceExt;
use node::scheduler::plan::{Decision, decide};
use node::scheduler::snapshot::Snapshot as Cluster;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Whether a migration was found to have nothing in its way before it began.
pub const CONDITION: &str = "migrationPreflight";

/// What is needed to know.
pub struct Facts {
    /// The VMI.
    pub vmi: VirtualMachineInstance,
    /// All migrations of it.
    pub migrations: Vec<VirtualMachineInstanceMigration>,
    /// Where it is to go, by nodes' labels.
    pub selector: BTreeMap<String, String>,
    /// Where its disks are to go.
    pub disks: Disks,
    /// The settings.
    pub settings: Configuration,
    /// All policies.
    pub policies: Vec<MigrationPolicy>,
    /// The quotas of its namespace.
    pub quotas: Vec<ResourceQuota>,
    /// Nodes, pods and volumes.
    pub cluster: Cluster,
    /// Now.
    pub now: Timestamp,
}

/// Where a guest's disks are to go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Disks {
    /// Those go along that must.
    Follow,
    /// To the claims that its VMI names by now.
    Named,
    /// To claims of this storage class.
    Class(String),
}

/// Something that would make the move fail.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// In one word.
    pub reason: String,
    /// What it is, and what can be done.
    pub message: String,
}

/// What was found.
#[derive(Debug, Default)]
pub struct Found {
    /// All that speaks against it.
    pub faults: Vec<Fault>,
    /// The node to which it would go.
    pub node: Option<String>,
    /// The policy by which it would be moved, and how.
    pub policy: Option<String>,
    /// Its options.
    pub options: Options,
}

impl Found {
    fn fault(&mut self, reason: &str, message: impl Into<String>) {
        self.faults.push(Fault { reason: reason.into(), message: message.into() });
    }
}

/// What is told of a migration that is about to begin: it begins all the same, since what stands in its
/// way may go.
pub fn condition(faults: &[Fault]) -> Condition {
    let reason = match faults {
        [] => "Passed",
        [fault] => &fault.reason,
        _ => "SeveralFaults",
    };
    let messages: Vec<&str> = faults.iter().map(|fault| &*fault.message).collect();
    let message = match faults {
        [] => "nothing was found that would make it fail".into(),
        _ => messages.join("; "),
    };
    Condition::new(CONDITION, faults.is_empty(), reason, &message)
}

/// Looks at a move that is not made.
pub fn check(facts: &Facts) -> Found {
    let mut found = Found::default();
    state(facts, &mut found);
    let snapshot = snapshot(facts);
    (found.policy, found.options) = snapshot.options.clone();
    let spec = match facts.vmi.parse() {
        Ok(spec) => spec,
        Err(why) => {
            found.fault("Invalid", why);
            return found;
        }
    };
    let (moves, claims) = disks_of(facts, &snapshot, &spec, &mut found);
    place(facts, snapshot, moves, &claims, &mut found);
    found
}

/// Looks at a guest of another cluster that may come to a VMI which is not there yet, on claims that are
/// to be made for it.
pub fn check_arrival(facts: &Facts, claims: &[PersistentVolumeClaim]) -> Found {
    let mut found = Found::default();
    match facts.vmi.parse() {
        Ok(_) => place(facts, snapshot(facts), Vec::new(), claims, &mut found),
        Err(why) => found.fault("Invalid", why),
    }
    found
}

/// What the VMI is.
fn state(facts: &Facts, found: &mut Found) {
    let name = facts.vmi.name_any();
    if let Some(why) = not_yet(&facts.vmi) {
        found.fault("NotRunning", format!("{name}: {why}"));
    }
    if facts.vmi.metadata.deletion_timestamp.is_some() {
        found.fault("NotRunning", format!("{name} is being ended"));
    }
    let open = |m: &&VirtualMachineInstanceMigration| m.spec.vmi_name == name && !m.is_over();
    if let Some(other) = facts.migrations.iter().find(open) {
        let other = other.name_any();
        found.fault("Migrating", format!("migration {other} moves {name} already"));
    }
    let conditions = facts.vmi.status.iter().flat_map(|status| &status.conditions);
    let kind = match facts.disks {
        Disks::Follow => types::LIVE_MIGRATABLE,
        Disks::Named | Disks::Class(_) => types::STORAGE_LIVE_MIGRATABLE,
    };
    for condition in conditions.filter(|c| c.kind == kind && c.status == Is::False) {
        let reason = condition.reason.clone().unwrap_or_default();
        for message in condition.message.as_deref().unwrap_or("nobody says why").split("; ") {
            found.fault(&reason, message);
        }
    }
}

/// Where the disks would go, and the claims that would be made for them.
fn disks_of(
    facts: &Facts,
    snapshot: &Snapshot,
    spec: &Spec,
    found: &mut Found,
) -> (Vec<MigratedVolume>, Vec<PersistentVolumeClaim>) {
    let made = |claims: Vec<Value>| {
        claims.into_iter().filter_map(|claim| serde_json::from_value(claim).ok()).collect()
    };
    let class = match &facts.disks {
        Disks::Class(class) => class,
        Disks::Named => {
            let status = facts.vmi.status.as_ref();
            return (status.map(|s| s.migrated_volumes.clone()).unwrap_or_default(), Vec::new());
        }
        Disks::Follow => {
            return match disks::follow(snapshot, &facts.vmi, spec) {
                Ok(disks::Follow { claims, moves }) => (moves, made(claims)),
                Err(why) => {
                    found.fault("DisksNotLiveMigratable", why);
                    Default::default()
                }
            };
        }
    };
    if !facts.cluster.classes.iter().any(|c| c.name_any() == *class) {
        found.fault("NoStorageClass", format!("there is no storage class {class}"));
    }
    let (mut moves, mut claims) = (Vec::new(), Vec::new());
    for (volume, name) in spec.claims() {
        let Some((_, claim)) = snapshot.claims.iter().find(|(n, _)| *n == name) else {
            found.fault("NoClaim", format!("claim {name} of volume {volume} is not there"));
            continue;
        };
        // N.B. no claim is called so: the one that is made gets a name that is free then.
        let to = format!("{name} on {class}");
        claims.push(json!({
            "apiVersion": "v1", "kind": "PersistentVolumeClaim",
            "metadata": {"name": to, "namespace": facts.vmi.namespace()},
            "spec": {
                "storageClassName": class,
                "accessModes": claim.spec.as_ref().and_then(|spec| spec.access_modes.clone()),
                "volumeMode": claim.spec.as_ref().and_then(|spec| spec.volume_mode.clone()),
                "resources": {"requests":
                    claim.status.as_ref().and_then(|status| status.capacity.clone())},
            },
        }));
        let source = claim_info(claim);
        let destination = api::vmi::ClaimInfo { claim_name: to, ..source.clone() };
        moves.push(MigratedVolume { volume_name: volume, source, destination });
    }
    if moves.is_empty() {
        found.fault("NoDisks", "it has no disks on claims that could go to another class");
    }
    (moves, made(claims))
}

/// Whether there is a node for it, and room in the namespace.
fn place(
    facts: &Facts,
    mut snapshot: Snapshot,
    moves: Vec<MigratedVolume>,
    claims: &[PersistentVolumeClaim],
    found: &mut Found,
) {
    let mut vmi = facts.vmi.clone();
    vmi.status.get_or_insert_default().migrated_volumes = moves;
    let mut cluster = facts.cluster.clone();
    for claim in claims {
        let claim = Arc::new(claim.clone());
        snapshot.claims.push((claim.name_any(), Arc::clone(&claim)));
        cluster.claims.push(claim);
    }
    let mut pod = match target_pod(&snapshot, &vmi, false) {
        Ok(pod) => pod,
        Err(why) => return found.fault("NoPod", why),
    };
    room(facts, &pod, claims, found);
    without_immediate(&mut pod, claims, &cluster);
    match decide(&pod, &cluster) {
        Decision::Bind(node) | Decision::Provision { node, .. } => found.node = Some(node),
        Decision::Unschedulable(why) => found.fault("Unschedulable", why),
    }
}

/// Claims that are bound at once, wherever, are once they are made: they say nothing about nodes now.
fn without_immediate(pod: &mut Pod, claims: &[PersistentVolumeClaim], cluster: &Cluster) {
    let waits = |name: &str| {
        let claim = claims.iter().find(|claim| claim.name_any() == name)?;
        let class = claim.spec.as_ref()?.storage_class_name.as_ref();
        let is = |c: &&Arc<StorageClass>| class.is_none_or(|class| c.name_any() == *class);
        let class = cluster.classes.iter().find(is)?;
        Some(class.volume_binding_mode.as_deref() == Some("WaitForFirstConsumer"))
    };
    let volumes = pod.spec.as_mut().and_then(|spec| spec.volumes.as_mut());
    volumes.into_iter().for_each(|volumes| {
        volumes.retain(|volume| {
            let claim = volume.persistent_volume_claim.as_ref();
            claim.is_none_or(|claim| waits(&claim.claim_name) != Some(false))
        });
    });
}

/// Whether the namespace's quotas let the pod and the claims in.
fn room(facts: &Facts, pod: &Pod, claims: &[PersistentVolumeClaim], found: &mut Found) {
    let value = |object: &dyn Fn() -> Option<Value>| object().unwrap_or_default();
    let pod = ("pods", value(&|| serde_json::to_value(pod).ok()));
    let claims = claims
        .iter()
        .map(|claim| ("persistentvolumeclaims", value(&|| serde_json::to_value(claim).ok())));
    let objects: Vec<_> = std::iter::once(pod).chain(claims).collect();
    for limit in &facts.quotas {
        let name = limit.name_any();
        let limit = serde_json::to_value(limit).unwrap_or_default();
        let mine = objects.iter().filter(|(key, object)| quota::is_in_scope(&limit, key, object));
        let more =
            mine.fold(Usage::default(), |sum, (key, object)| sum.plus(&quota::usage(key, object)));
        let more = more.limited_by(&limit);
        let used = Usage::of_status(&limit);
        if let Some(beyond) = quota::beyond(&limit, &used.plus(&more), &more) {
            let told = beyond.told(&more, &used);
            found.fault("ExceededQuota", format!("quota {name} is exceeded: {told}"));
        }
    }
}

/// The migration that is not made, as it would be seen.
fn snapshot(facts: &Facts) -> Snapshot {
    let vmi = Arc::new(facts.vmi.clone());
    let namespace = vmi.namespace().unwrap_or_default();
    let migration = Migration {
        vmi_name: vmi.name_any(),
        added_node_selector: facts.selector.clone(),
        ..Migration::default()
    };
    let mut migration = VirtualMachineInstanceMigration::new("preflight", migration);
    migration.metadata.namespace = Some(namespace.clone());
    // As long as a uid is.
    migration.metadata.uid = Some("00000000-0000-0000-0000-000000000000".into());
    if facts.disks != Disks::Follow {
        let label = (keys::VOLUME_UPDATE.to_owned(), vmi.name_any());
        migration.metadata.labels = Some(BTreeMap::from([label]));
    }
    let own = |claim: &&Arc<PersistentVolumeClaim>| claim.namespace().as_ref() == Some(&namespace);
    let claims: Vec<_> = facts.cluster.claims.iter().filter(own).cloned().collect();
    let left = claims.iter().filter(|claim| disks::is_left_by(claim, &vmi.name_any())).cloned();
    let labels = facts.cluster.namespace(&namespace).map(|n| n.labels().clone());
    let node = vmi.status.as_ref().and_then(|status| status.node_name.clone());
    let node: Option<&Node> =
        facts.cluster.nodes.iter().map(|node| &**node).find(|n| Some(n.name_any()) == node);
    Snapshot {
        left: left.collect(),
        claims: claims.into_iter().map(|claim| (claim.name_any(), claim)).collect(),
        unmade: None,
        pods: Vec::new(),
        owner: None,
        turn: Ok(()),
        backoff: None,
        options: policy::resolve(
            &facts.policies,
            &labels.unwrap_or_default(),
            vmi.labels(),
            &facts.settings.migrations,
        ),
        processor: processor(node, Some(&facts.vmi), &facts.settings),
        emulated: facts.settings.developer_configuration.use_emulation,
        faults: None,
        heard: None,
        later: 0,
        addresses: Vec::new(),
        now: facts.now,
        vmi: Some(vmi),
        migration: Arc::new(migration),
    }
}

#[cfg(test)]
mod test {
    use super::*;

    /// Changes what is known.
    type Obstacle = fn(&mut Facts);

    fn made<T: serde::de::DeserializeOwned>(value: Value) -> T {
        serde_json::from_value(value).expect("a whole object")
    }

    fn node(name: &str) -> Arc<Node> {
        Arc::new(made(json!({
            "metadata": {"name": name, "labels": {
                "kubernetes.io/hostname": name, keys::SCHEDULABLE: "true",
            }},
            "status": {"allocatable": {
                "cpu": "4", "memory": "4Gi", "pods": "10", keys::KVM: "1000",
            }},
        })))
    }

    fn facts() -> Facts {
        let claim = json!({
            "metadata": {"name": "disk", "namespace": "a", "annotations":
                {"volume.kubernetes.io/selected-node": "one", "pv.kubernetes.io/bind-completed": "yes"}},
            "spec": {"accessModes": ["ReadWriteOnce"], "storageClassName": "local", "volumeName": "v",
                "resources": {"requests": {"storage": "1Gi"}}},
            "status": {"phase": "Bound", "capacity": {"storage": "1Gi"}},
        });
        let class = json!({
            "metadata": {"name": "local"}, "provisioner": "p",
            "volumeBindingMode": "WaitForFirstConsumer",
        });
        let namespace = json!({"metadata": {"name": "a"}});
        Facts {
            vmi: made(json!({
                "metadata": {"name": "web", "namespace": "a", "uid": "1"},
                "spec": {
                    "domain": {"memory": {"guest": "1Gi"}, "devices": {"disks": [{"name": "root"}]}},
                    "volumes": [{"name": "root", "persistentVolumeClaim": {"claimName": "disk"}}],
                },
                "status": {"phase": "Running", "nodeName": "one"},
            })),
            migrations: Vec::new(),
            selector: BTreeMap::new(),
            disks: Disks::Follow,
            settings: Configuration::default(),
            policies: Vec::new(),
            quotas: Vec::new(),
            cluster: Cluster {
                nodes: vec![node("one"), node("two")],
                pods: vec![Arc::new(made(json!({
                    "metadata": {"name": "source", "namespace": "a", "labels": {
                        "kubevirt.io/created-by": "1",
                    }},
                    "spec": {"nodeName": "one", "containers": []},
                })))],
                namespaces: vec![Arc::new(made(namespace))],
                claims: vec![Arc::new(made(claim))],
                volumes: Vec::new(),
                classes: vec![Arc::new(made(class))],
            },
            now: Timestamp::UNIX_EPOCH,
        }
    }

    fn reasons(facts: &Facts) -> Vec<String> {
        check(facts).faults.into_iter().map(|fault| fault.reason).collect()
    }

    #[test]
    fn a_move_that_can_be_made_is_found_a_node_and_each_obstacle_alone_is_named() {
        let fine = check(&facts());
        assert_eq!((fine.faults, fine.node.as_deref()), (Vec::new(), Some("two")));
        let obstacles: [(&str, Obstacle); 6] = [
            ("Unschedulable", |f| f.selector = [("disk".into(), "ssd".into())].into()),
            ("NotRunning", |f| f.vmi.status.as_mut().unwrap().phase = api::vmi::Phase::Scheduled),
            ("NoStorageClass", |f| f.disks = Disks::Class("fast".into())),
            ("DisksNotLiveMigratable", |f| f.cluster.claims.clear()),
            ("ExceededQuota", |f| {
                f.quotas.push(made(json!({
                    "metadata": {"name": "small", "namespace": "a"},
                    "spec": {"hard": {"pods": "1"}},
                    "status": {"hard": {"pods": "1"}, "used": {"pods": "1"}},
                })));
            }),
            ("Migrating", |f| {
                f.migrations.push(made(json!({
                    "metadata": {"name": "other"}, "spec": {"vmiName": "web"},
                })));
            }),
        ];
        for (reason, obstacle) in &obstacles {
            let mut facts = facts();
            obstacle(&mut facts);
            assert!(reasons(&facts).iter().any(|r| r == reason), "{reason}: {:?}", reasons(&facts));
        }
        let mut all = facts();
        obstacles.iter().for_each(|(_, obstacle)| obstacle(&mut all));
        let found = reasons(&all);
        let named = |reason: &&str| found.iter().any(|r| r == reason);
        let some = ["Unschedulable", "NotRunning", "NoStorageClass", "ExceededQuota", "Migrating"];
        assert!(some.iter().all(named), "{found:?}");
    }

    #[test]
    fn disks_may_go_to_another_class_on_the_same_node() {
        let mut facts = facts();
        facts.disks = Disks::Class("local".into());
        facts.cluster.nodes.truncate(1);
        let found = check(&facts);
        assert_eq!((found.faults, found.node.as_deref()), (Vec::new(), Some("one")));
    }

    #[test]
    fn a_guest_on_kvm_goes_to_no_node_that_has_none_and_one_that_is_emulated_does() {
        let mut facts = facts();
        for node in &mut facts.cluster.nodes {
            let has = Arc::make_mut(node).status.as_mut().and_then(|s| s.allocatable.as_mut());
            has.and_then(|has| has.remove(keys::KVM)).unwrap();
        }
        let [fault] = &*check(&facts).faults else { panic!("{:?}", check(&facts)) };
        assert!(fault.message.contains(keys::KVM), "{fault:?}");
        facts.settings.developer_configuration.use_emulation = true;
        assert_eq!(reasons(&facts), [""; 0]);
    }
}
