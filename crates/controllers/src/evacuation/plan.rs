//! What is to be done about a VMI that is to leave its node, or no longer is. Pure.

use api::conditions::{self, Condition, types};
use api::eviction::Strategy;
use api::migration::{self, VirtualMachineInstanceMigration as Migration};
use api::owner::OwnerRecord;
use api::vmi::{Phase, VirtualMachineInstance};
use api::{keys, kubevirt};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use serde_json::{Value, json};
use std::fmt;
use std::sync::Arc;

/// Beginning of the migrations' names.
const NAME: &str = "kubevirt-evacuation-";
/// How urgent they are: nobody waits for a descheduler.
const URGENT: &str = "system-critical";
const PATIENT: &str = "system-maintenance";

/// A VMI and what there is of it.
#[derive(Debug)]
pub struct Snapshot {
    /// The VMI.
    pub vmi: Arc<VirtualMachineInstance>,
    /// Its pods.
    pub pods: Vec<Arc<Pod>>,
    /// Who runs its guest.
    pub owner: Option<Arc<OwnerRecord>>,
    /// Whether a migration of it is under way, or waits.
    pub moving: bool,
    /// Whether all guests are to leave its node.
    pub drained: bool,
    /// The cluster's settings.
    pub cluster: kubevirt::Spec,
    /// Now.
    pub now: Timestamp,
}

/// One thing to be done.
#[derive(Debug)]
pub enum Action {
    /// Change the VMI's status.
    PatchStatus(Value),
    /// Change its annotations.
    Annotate(Value),
    /// Change a pod's.
    AnnotatePod {
        /// Which.
        pod: String,
        /// How: null removes.
        annotations: Value,
    },
    /// Make a migration.
    Migrate(Box<Migration>),
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Action::PatchStatus(_) => f.write_str("say that the instance is to leave its node"),
            Action::Annotate(_) => f.write_str("change the instance"),
            Action::AnnotatePod { pod, .. } => write!(f, "change pod {pod}"),
            Action::Migrate(_) => f.write_str("create a migration away from the node"),
        }
    }
}

impl Snapshot {
    fn strategy(&self) -> Strategy {
        Strategy::of(&self.vmi.parse().unwrap_or_default(), &self.cluster)
    }

    /// The node that the guest is to leave.
    fn leaves(&self) -> Option<&str> {
        let status = self.vmi.status.as_ref()?;
        let node = status.node_name.as_deref()?;
        let marked = status.evacuation_node_name.as_deref() == Some(node);
        let drained = self.drained && self.strategy().migrates();
        let lives =
            status.phase == Phase::Running && self.vmi.metadata.deletion_timestamp.is_none();
        (lives && (marked || drained)).then_some(node)
    }

    /// The pod in which the guest runs.
    fn source(&self) -> Option<&Arc<Pod>> {
        let name = self.owner.as_ref()?.status.as_ref()?.pod.as_ref();
        self.pods.iter().find(|pod| pod.metadata.name.as_ref() == name)
    }
}

/// What is to be done, in this order.
pub fn plan(snapshot: &Snapshot) -> Vec<Action> {
    let leaves = snapshot.leaves();
    let mut actions = Vec::new();
    actions.extend(condition(snapshot, leaves));
    actions.extend(tell_deschedulers(snapshot, leaves));
    let annotated = snapshot.vmi.annotations().contains_key(keys::EVICTION_SOURCE);
    if leaves.is_none() && annotated {
        actions.push(Action::Annotate(json!({keys::EVICTION_SOURCE: null})));
    }
    let can = snapshot.vmi.status.as_ref().is_some_and(|status| {
        conditions::is(&status.conditions, types::LIVE_MIGRATABLE)
            && status.migration_state.as_ref().is_none_or(migration::State::is_over)
    });
    if let Some(node) = leaves
        && can
        && !snapshot.moving
        && snapshot.strategy().migrates()
    {
        actions.push(Action::Migrate(Box::new(away_from(snapshot, node))));
    }
    actions
}

/// Whether the guest is to leave, as the VMI's status has it.
fn condition(snapshot: &Snapshot, leaves: Option<&str>) -> Option<Action> {
    let old = &snapshot.vmi.status.as_ref()?.conditions;
    let reason = types::EVICTION_REQUESTED;
    let new = leaves.map(|node| {
        let message = format!("the guest is to leave node {node}");
        Condition::new(types::EVICTION_REQUESTED, true, reason, &message)
    });
    let gone = [types::EVICTION_REQUESTED];
    let merged = conditions::merge(old, new.into_iter().collect(), &gone, snapshot.now);
    (merged != *old).then(|| Action::PatchStatus(json!({"conditions": merged})))
}

/// A descheduler does not ask again for what is under way.
fn tell_deschedulers(snapshot: &Snapshot, leaves: Option<&str>) -> Option<Action> {
    let pod = snapshot.source()?;
    let told = pod.annotations().contains_key(keys::EVICTION_IN_PROGRESS);
    (told != leaves.is_some()).then(|| Action::AnnotatePod {
        pod: pod.name_any(),
        annotations: json!({keys::EVICTION_IN_PROGRESS: leaves.map(|_| "kubevirt")}),
    })
}

fn away_from(snapshot: &Snapshot, node: &str) -> Migration {
    let source = snapshot.vmi.annotations().get(keys::EVICTION_SOURCE);
    let spec = migration::Spec {
        vmi_name: snapshot.vmi.name_any(),
        priority: Some(if source.is_some() { PATIENT } else { URGENT }.into()),
        ..migration::Spec::default()
    };
    let mut migration = Migration::new("", spec);
    migration.metadata.name = None;
    migration.metadata.generate_name = Some(NAME.into());
    let annotations = migration.annotations_mut();
    annotations.insert(keys::EVACUATION.into(), node.into());
    if let Some(source) = source {
        annotations.insert(keys::EVICTION_SOURCE.into(), source.clone());
    }
    migration
}

#[cfg(test)]
mod test {
    use super::*;
    use api::migration::State;
    use api::owner;
    use proptest::prelude::*;

    const POD: &str = "virt-launcher-web-a";

    prop_compose! {
        fn snapshots()(
            strategy in prop::sample::select(api::eviction::Strategy::NAMES.to_vec()),
            phase in prop::sample::select(vec![Phase::Scheduled, Phase::Running, Phase::Failed]),
            marked in prop::sample::select(vec![None, Some("n1"), Some("n2")]),
            (drained, moving, deleted, told) in any::<(bool, bool, bool, bool)>(),
            (migratable, requested, descheduler, busy) in any::<(bool, bool, bool, bool)>(),
        ) -> Snapshot {
            let spec = api::vmi::RawSpec(json!({"evictionStrategy": strategy, "domain": {}}));
            let mut vmi = VirtualMachineInstance::new("web", spec);
            if descheduler {
                vmi.annotations_mut().insert(keys::EVICTION_SOURCE.into(), "descheduler".into());
            }
            vmi.metadata.deletion_timestamp =
                deleted.then(|| k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(Timestamp::now()));
            let can = Condition::new(types::LIVE_MIGRATABLE, migratable, "Reason", "why");
            let asked = Condition::new(types::EVICTION_REQUESTED, true, "EvictionRequested", "so");
            let conditions = [Some(can), requested.then_some(asked)];
            vmi.status = Some(api::vmi::Status {
                phase,
                node_name: Some("n1".into()),
                evacuation_node_name: marked.map(str::to_owned),
                conditions: conditions.into_iter().flatten().collect(),
                migration_state: busy.then(State::default),
                ..api::vmi::Status::default()
            });
            let mut pod = Pod::default();
            pod.metadata.name = Some(POD.into());
            if told {
                pod.annotations_mut().insert(keys::EVICTION_IN_PROGRESS.into(), "kubevirt".into());
            }
            let mut record = OwnerRecord::new("web", owner::Spec::default());
            record.status =
                Some(owner::Status { pod: Some(POD.into()), ..owner::Status::default() });
            Snapshot {
                vmi: Arc::new(vmi),
                pods: vec![Arc::new(pod)],
                owner: Some(Arc::new(record)),
                moving,
                drained,
                cluster: kubevirt::Spec::default(),
                now: Timestamp::UNIX_EPOCH,
            }
        }
    }

    /// What is there once it is done.
    fn done(mut snapshot: Snapshot, actions: Vec<Action>) -> Snapshot {
        for action in actions {
            let vmi = Arc::make_mut(&mut snapshot.vmi);
            match action {
                Action::PatchStatus(patch) => {
                    let conditions = serde_json::from_value(patch["conditions"].clone()).unwrap();
                    vmi.status.as_mut().unwrap().conditions = conditions;
                }
                Action::Annotate(_) => {
                    vmi.annotations_mut().remove(keys::EVICTION_SOURCE);
                }
                Action::AnnotatePod { annotations, .. } => {
                    let pod = Arc::make_mut(&mut snapshot.pods[0]);
                    match annotations[keys::EVICTION_IN_PROGRESS].as_str() {
                        Some(value) => {
                            let key = keys::EVICTION_IN_PROGRESS.to_owned();
                            pod.annotations_mut().insert(key, value.into());
                        }
                        None => {
                            pod.annotations_mut().remove(keys::EVICTION_IN_PROGRESS);
                        }
                    }
                }
                Action::Migrate(_) => snapshot.moving = true,
            }
        }
        snapshot
    }

    proptest! {
        #[test]
        fn who_is_to_leave_moves_once_at_a_time_and_all_are_told(snapshot in snapshots()) {
            let status = snapshot.vmi.status.clone().unwrap();
            let migrates = snapshot.strategy().migrates();
            let lives = status.phase == Phase::Running
                && snapshot.vmi.metadata.deletion_timestamp.is_none();
            let leaves = lives
                && (status.evacuation_node_name.as_deref() == Some("n1")
                    || snapshot.drained && migrates);
            let free = !snapshot.moving && status.migration_state.is_none();
            let can = conditions::is(&status.conditions, types::LIVE_MIGRATABLE);
            let patient = snapshot.vmi.annotations().contains_key(keys::EVICTION_SOURCE);
            let actions = plan(&snapshot);
            let made: Vec<&Migration> = actions.iter().filter_map(|action| match action {
                Action::Migrate(migration) => Some(&**migration),
                _ => None,
            }).collect();
            prop_assert_eq!(made.len(), usize::from(leaves && migrates && free && can));
            for migration in made {
                let priority = if patient { PATIENT } else { URGENT };
                prop_assert_eq!(migration.spec.priority.as_deref(), Some(priority));
                prop_assert_eq!(migration.annotations().get(keys::EVACUATION), Some(&"n1".into()));
            }
            let after = done(snapshot, actions);
            let conditions = &after.vmi.status.as_ref().unwrap().conditions;
            prop_assert_eq!(conditions::is(conditions, types::EVICTION_REQUESTED), leaves);
            let told = after.pods[0].annotations().contains_key(keys::EVICTION_IN_PROGRESS);
            prop_assert_eq!(told, leaves);
            // And then there is nothing to be done.
            prop_assert!(plan(&after).is_empty(), "{:?}", plan(&after));
        }
    }
}
