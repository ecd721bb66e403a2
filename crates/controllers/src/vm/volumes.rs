//! Disks of a VM that runs, and what its template says of them now. Pure.
//!
//! ```text
//! template's claims differ --valid--> VMI's migratedVolumes --> a migration --> owner record's volumes
//!        | reverted: cancelled                                                     | the truth
//!        +----------------------------------------------------------------> VMI's spec, old claims
//! ```
//!
//! A VMI's spec names the disks that its guest has: it changes when the guest has moved, as the
//! owner record says it, never before. So whatever fails on the way, a guest is on its old disks.

use super::plan::{Action, Plan, Snapshot};
use api::conditions::{self, Condition, types};
use api::datavolume;
use api::keys;
use api::migration::{Phase as Moving, VirtualMachineInstanceMigration as Migration};
use api::vm::{Status, VolumeMigrationState, VolumeUpdateState};
use api::vmi::{ClaimInfo, MigratedVolume, Phase, Spec, VirtualMachineInstance, Volume};
use jiff::{SignedDuration, Timestamp};
use kube::{Resource, ResourceExt};
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// Pauses between migrations that fail double, from the first to the last; as KubeVirt's first.
const FIRST_PAUSE: i64 = 20;
const LAST_PAUSE: i64 = 600;

type Claims = BTreeMap<String, String>;

/// What becomes of a template whose volumes have changed.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    /// Nothing is to be done, or it is being done.
    Live,
    /// It takes a restart, and why.
    Restart(String),
}

/// A VM's volumes, as far as there are any.
struct Look<'a> {
    snapshot: &'a Snapshot,
    vmi: &'a VirtualMachineInstance,
    /// What the template says.
    wanted: Spec,
    /// What the VMI says.
    has: Spec,
}

/// Lets the disks of a VM that runs follow its template.
pub fn follow(snapshot: &Snapshot, status: &mut Status, plan: &mut Plan) -> Change {
    let lives = |vmi: &&VirtualMachineInstance| {
        let phase = vmi.status.as_ref().map(|status| status.phase);
        phase == Some(Phase::Running) && vmi.metadata.deletion_timestamp.is_none()
    };
    let Some(vmi) = snapshot.vmi.as_deref().filter(lives) else { return Change::Live };
    let wanted = api::support::parse(&snapshot.vm.spec.template.spec).map(|(spec, _)| spec);
    let (Ok(wanted), Ok(has)) = (wanted, vmi.parse()) else { return Change::Live };
    let look = Look { snapshot, vmi, wanted, has };
    if look.settle(status, plan) {
        return Change::Live;
    }
    let moves = vmi.status.as_ref().map(|s| s.migrated_volumes.clone()).unwrap_or_default();
    match moves.is_empty() {
        true => look.begin(status, plan),
        false => look.go_on(&moves, status, plan),
    }
}

/// The claims from which a VM is to start where its template names others: those that it has not
/// left yet.
pub fn not_left(snapshot: &Snapshot) -> Claims {
    let vm = &snapshot.vm;
    let status = vm.status.clone().unwrap_or_default();
    let record = snapshot.owner.as_ref().and_then(|owner| owner.status.clone()).unwrap_or_default();
    if !migrates(snapshot) {
        // A person takes the new ones as they are.
        return Claims::new();
    }
    let moves = status.volume_update_state.unwrap_or_default().volume_migration_state;
    let left = |moved: &MigratedVolume| {
        record.volumes.get(&moved.volume_name) == Some(&moved.destination.claim_name)
    };
    let kept = moves.migrated_volumes.iter().filter(|moved| !left(moved));
    kept.map(|moved| (moved.volume_name.clone(), moved.source.claim_name.clone())).collect()
}

fn migrates(snapshot: &Snapshot) -> bool {
    snapshot.vm.spec.update_volumes_strategy.as_deref() == Some("Migration")
}

/// Disks that have followed a guest which ended before its template knew: those the template names,
/// from now on and when it is started now.
pub fn followed(snapshot: &Snapshot) -> Claims {
    let status = snapshot.vm.status.clone().unwrap_or_default();
    let record = snapshot.owner.as_ref().and_then(|owner| owner.status.clone()).unwrap_or_default();
    let wanted = api::support::parse::<Spec>(&snapshot.vm.spec.template.spec);
    let wanted = wanted.map(|(spec, _)| spec.claims()).unwrap_or_default();
    let moves = status.volume_update_state.unwrap_or_default().volume_migration_state;
    let done = moves.migrated_volumes.into_iter().filter(|moved| {
        let to = Some(&moved.destination.claim_name);
        record.volumes.get(&moved.volume_name) == to
            && wanted.get(&moved.volume_name) == Some(&moved.source.claim_name)
    });
    done.map(|moved| (moved.volume_name, moved.destination.claim_name)).collect()
}

/// The change of a VM that has its template name other claims.
pub fn template_with(snapshot: &Snapshot, claims: &Claims) -> Value {
    let vm = &snapshot.vm;
    let template = &vm.spec.template.spec;
    let named = api::support::parse::<Spec>(template).map(|(spec, _)| spec.claims());
    let named = named.unwrap_or_default();
    let left = |name: Option<&str>| {
        named.iter().any(|(volume, claim)| claims.contains_key(volume) && Some(&**claim) == name)
    };
    let templates = vm.spec.data_volume_templates.iter();
    let kept: Vec<_> = templates.filter(|t| !left(t.metadata.name.as_deref())).collect();
    json!({
        "metadata": {"resourceVersion": vm.metadata.resource_version},
        "spec": {
            "dataVolumeTemplates": kept,
            "template": {"spec": {"volumes": with_claims(&template["volumes"], claims)}},
        },
    })
}

/// A template's volumes with other claims.
pub fn with_claims(volumes: &Value, claims: &Claims) -> Value {
    let mut volumes = volumes.clone();
    for volume in volumes.as_array_mut().into_iter().flatten() {
        let name = volume["name"].as_str().unwrap_or_default();
        if let Some(claim) = claims.get(name) {
            *volume = json!({"name": name, "persistentVolumeClaim": {"claimName": claim}});
        }
    }
    volumes
}

impl Look<'_> {
    /// Has the VMI say what the owner record does. Whether there was anything to be done.
    fn settle(&self, status: &mut Status, plan: &mut Plan) -> bool {
        let record = self.snapshot.owner.as_ref().and_then(|owner| owner.status.as_ref());
        let Some(record) = record.filter(|record| record.state == "idle") else { return false };
        let has = self.has.claims();
        let moved: Claims = record
            .volumes
            .iter()
            .filter(|(name, claim)| has.get(*name).is_some_and(|own| own != *claim))
            .map(|(name, claim)| (name.clone(), claim.clone()))
            .collect();
        if moved.is_empty() {
            return false;
        }
        let epoch = record.epoch.saturating_sub(1);
        for (name, claim) in has.iter().filter(|(name, _)| moved.contains_key(*name)) {
            plan.actions.push(Action::Supersede {
                claim: claim.clone(),
                note: format!(
                    "{} left it in epoch {epoch} for {}",
                    self.vmi.name_any(),
                    moved[name]
                ),
                left_by: crate::migration::left_by(&self.vmi.name_any(), name),
            });
        }
        let found = self.vmi.status.clone().unwrap_or_default();
        let gone = [types::VOLUMES_CHANGE];
        let kept = conditions::merge(&found.conditions, Vec::new(), &gone, self.snapshot.now);
        let told = json!({"migratedVolumes": null, "conditions": kept});
        plan.actions.push(Action::PatchVmi(json!({"status": told})));
        self.have_template_follow(&moved, plan);
        // N.B. last: by it all of this is known to be done.
        let volumes = with_claims(&self.vmi.spec.0["volumes"], &moved);
        plan.actions.push(Action::UseVolumes(volumes));
        status.volume_update_state = None;
        let message = "The disks are on the claims that the template names".into();
        plan.actions.push(Action::Say { warning: false, reason: "VolumesMigrated", message });
        true
    }

    /// Disks that have followed their guest to another node are the template's from now on.
    fn have_template_follow(&self, moved: &Claims, plan: &mut Plan) {
        let has = self.has.claims();
        let wanted = self.wanted.claims();
        let stale = |name: &String| wanted.get(name) == has.get(name);
        let moved: Claims = moved.clone().into_iter().filter(|(name, _)| stale(name)).collect();
        if !moved.is_empty() {
            plan.actions.push(Action::Patch(template_with(self.snapshot, &moved)));
        }
    }

    /// Volumes of the template whose claims are not the guest's.
    fn changed(&self) -> Vec<(&Volume, &Volume)> {
        let both = self.wanted.volumes.iter().filter_map(|new| {
            let old = self.has.volume(&new.name)?;
            (old.claim()? != new.claim()?).then_some((old, new))
        });
        both.collect()
    }

    fn begin(&self, status: &mut Status, plan: &mut Plan) -> Change {
        let changed = self.changed();
        if changed.is_empty() {
            status.volume_update_state = None;
            return Change::Live;
        }
        if let Some(why) = self.not_live() {
            return Change::Restart(why);
        }
        let mut faults = self.faults(&changed);
        let (mut moves, mut missing) = (Vec::new(), Vec::new());
        for (old, new) in &changed {
            let (from, to) = (old.claim().unwrap_or_default(), new.claim().unwrap_or_default());
            match (self.info(from), self.ready(to)) {
                (Some(source), Ok(destination)) => {
                    faults.extend(self.too_small(old, &destination));
                    moves.push(MigratedVolume {
                        volume_name: old.name.clone(),
                        source,
                        destination,
                    });
                }
                (None, _) => faults.push(format!("claim {from} of volume {} is gone", old.name)),
                (_, Err(why)) => missing.push(why),
            }
        }
        if !faults.is_empty() {
            return Change::Restart(faults.join("; "));
        }
        let waits = (!missing.is_empty()).then(|| missing.join("; "));
        if let Some(why) = waits {
            let waits = Condition::new(types::VOLUMES_CHANGE, false, "WaitingForVolumes", &why);
            self.say_of_vmi(waits, None, plan);
            return Change::Live;
        }
        let names: Vec<&str> = moves.iter().map(|moved| &*moved.volume_name).collect();
        let message = format!("volumes {} move to other claims", names.join(", "));
        let begun = Condition::new(types::VOLUMES_CHANGE, true, "VolumesChange", &message);
        self.say_of_vmi(begun, Some(json!(moves)), plan);
        let volume_migration_state = VolumeMigrationState { migrated_volumes: moves };
        status.volume_update_state = Some(VolumeUpdateState { volume_migration_state });
        Change::Live
    }

    /// Why the disks of this VM do not follow its template while it runs.
    fn not_live(&self) -> Option<String> {
        let cluster = self.snapshot.cluster.as_ref().map(|c| &c.spec)?;
        let lacks = match () {
            () if !migrates(self.snapshot) => {
                return Some("its volumes have changed since it was started".into());
            }
            () if cluster.configuration.vm_rollout_strategy.as_deref() == Some("Stage") => {
                "the cluster's vmRolloutStrategy is Stage, not LiveUpdate"
            }
            () if !cluster
                .workload_update_strategy
                .workload_update_methods
                .iter()
                .any(|method| method == "LiveMigrate") =>
            {
                "the cluster's workloadUpdateMethods do not have LiveMigrate"
            }
            () => return None,
        };
        Some(format!("its disks cannot move while it runs: {lacks}"))
    }

    /// All that keeps these volumes from moving.
    fn faults(&self, changed: &[(&Volume, &Volume)]) -> Vec<String> {
        let mut faults = Vec::new();
        let moves = |name: &str| changed.iter().any(|(old, _)| old.name == name);
        for volume in self.has.volumes.iter().filter(|volume| !moves(&volume.name)) {
            let Some(claim) = volume.claim() else { continue };
            let shared = self
                .info(claim)
                .is_some_and(|info| info.access_modes.iter().any(|mode| mode == "ReadWriteMany"));
            if !shared {
                faults.push(format!(
                    "volume {} stays on claim {claim}, which is not ReadWriteMany: let it move as well",
                    volume.name
                ));
            }
        }
        let found = self.vmi.status.as_ref();
        let stays = found.and_then(|status| {
            status.conditions.iter().find(|c| {
                c.kind == types::STORAGE_LIVE_MIGRATABLE && c.status == conditions::Is::False
            })
        });
        faults.extend(stays.map(|c| c.message.clone().unwrap_or_default()));
        faults
    }

    /// What is known of a claim.
    fn info(&self, name: &str) -> Option<ClaimInfo> {
        let (_, claim) = self.snapshot.claims.iter().find(|(n, _)| n == name)?;
        claim.as_ref().map(|claim| crate::vmi::claim_info(claim))
    }

    /// A claim to which a disk may go; or what is waited for.
    fn ready(&self, name: &str) -> Result<ClaimInfo, String> {
        let volume = self.snapshot.volumes.iter().find(|(n, _)| n == name);
        let volume = volume.and_then(|(_, volume)| volume.as_ref());
        let phase = volume.map(|v| v.status.as_ref().map(|s| s.phase).unwrap_or_default());
        // N.B. one that waits for its first consumer has it in the target's pod.
        let done = [datavolume::Phase::Succeeded, datavolume::Phase::WaitForFirstConsumer];
        match (self.info(name), phase) {
            (None, _) => Err(format!("claim {name} is not there yet")),
            (Some(_), Some(phase)) if !done.contains(&phase) => {
                Err(format!("DataVolume {name} is not ready yet"))
            }
            (Some(info), _) => Ok(info),
        }
    }

    /// Why a disk does not fit, where that is known before anything starts.
    fn too_small(&self, old: &Volume, destination: &ClaimInfo) -> Option<String> {
        let found = self.vmi.status.as_ref()?;
        let size = found.volume_status.iter().find(|v| v.name == old.name)?.size?;
        let room = destination.capacity.get("storage").or(destination.requests.get("storage"))?;
        let room = api::quantity::bytes(&room.0)?;
        (room < i128::from(size)).then(|| {
            format!(
                "claim {} has {room} bytes, the disk of volume {} has {size}: name a larger one",
                destination.claim_name, old.name
            )
        })
    }

    fn go_on(&self, moves: &[MigratedVolume], status: &mut Status, plan: &mut Plan) -> Change {
        if self.follows() {
            let volume_migration_state = VolumeMigrationState { migrated_volumes: moves.to_vec() };
            status.volume_update_state = Some(VolumeUpdateState { volume_migration_state });
            return Change::Live;
        }
        let changed = self.changed();
        let to = |(old, new): &(&Volume, &Volume)| {
            moves.iter().any(|moved| {
                moved.volume_name == old.name && Some(&*moved.destination.claim_name) == new.claim()
            })
        };
        if changed.is_empty() {
            self.cancel(status, plan);
            return Change::Live;
        }
        if changed.len() != moves.len() || !changed.iter().all(to) {
            return Change::Restart(
                "its volumes have changed again while they move: put all of the old ones back to \
                 cancel, or all of the new ones to go on"
                    .into(),
            );
        }
        if status.volume_update_state.is_none() {
            let volume_migration_state = VolumeMigrationState { migrated_volumes: moves.to_vec() };
            status.volume_update_state = Some(VolumeUpdateState { volume_migration_state });
        }
        self.migrate(plan);
        Change::Live
    }

    /// Whether disks follow a guest that a migration brings to another node.
    fn follows(&self) -> bool {
        self.snapshot.moves.iter().any(|m| {
            !m.labels().contains_key(keys::VOLUME_UPDATE)
                && m.finalizers().iter().any(|f| f == keys::MIGRATION_FINALIZER)
        })
    }

    fn cancel(&self, status: &mut Status, plan: &mut Plan) {
        let own = self
            .snapshot
            .moves
            .iter()
            .filter(|m| m.labels().contains_key(keys::VOLUME_UPDATE) && !m.is_over());
        let mut under_way = false;
        for migration in own {
            under_way = true;
            if migration.metadata.deletion_timestamp.is_none() {
                plan.actions.push(Action::Cancel(migration.name_any()));
            }
        }
        if under_way {
            // What it did is known when it is over.
            return;
        }
        let message = "the old volumes were put back";
        let reason = "VolumesChangeCancellation";
        let cancelled = Condition::new(types::VOLUMES_CHANGE, false, reason, message);
        self.say_of_vmi(cancelled, Some(Value::Null), plan);
        status.volume_update_state = None;
    }

    /// Has the guest moved to its new disks, with pauses between tries that fail.
    fn migrate(&self, plan: &mut Plan) {
        let all = &self.snapshot.moves;
        // What a migration that has succeeded did is the owner record's to say.
        let done = |m: &Migration| {
            m.phase() == Moving::Succeeded && self.is_of_this_change(m) && self.has_come(m)
        };
        if all.iter().any(|m| !m.is_over() || done(m)) {
            return;
        }
        if let Some(at) = self.not_before().filter(|at| *at > self.snapshot.now) {
            plan.again = plan.again.map_or(Some(at), |again| Some(again.min(at)));
            return;
        }
        let name = self.vmi.name_any();
        let label = if name.len() > 63 { self.vmi.uid().unwrap_or_default() } else { name.clone() };
        plan.actions.push(Action::Migrate(json!({
            "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstanceMigration",
            "metadata": {
                "generateName": "kubevirt-workload-update-", "namespace": self.vmi.namespace(),
                "labels": {keys::VOLUME_UPDATE: label},
                "ownerReferences": [self.vmi.controller_owner_ref(&())],
            },
            "spec": {"vmiName": name, "priority": "user-triggered"},
        })));
    }

    /// Whether a migration was made for the change that is under way, and has come to its phase since
    /// that began.
    fn is_of_this_change(&self, migration: &Migration) -> bool {
        let found = self.vmi.status.as_ref();
        let change = found.and_then(|status| {
            status.conditions.iter().find(|c| c.kind == types::VOLUMES_CHANGE)?.since()
        });
        let since = migration.status.as_ref().and_then(|status| status.since());
        migration.labels().contains_key(keys::VOLUME_UPDATE) && since >= change
    }

    /// Whether the disks are where this change brings them; or whether that is not to be doubted, as for a
    /// migration that was made after the change began.
    ///
    /// N.B. moments count whole seconds: one that was made in the same second may be of the change before.
    fn has_come(&self, migration: &Migration) -> bool {
        let conditions = self.vmi.status.iter().flat_map(|status| &status.conditions);
        let change = conditions.into_iter().find(|c| c.kind == types::VOLUMES_CHANGE);
        let change = change.and_then(Condition::since).map(|at| at.as_second());
        let made = migration.creation_timestamp().map(|at| at.0.as_second());
        let record = self.snapshot.owner.as_ref().and_then(|owner| owner.status.clone());
        let record = record.unwrap_or_default();
        let moves = self.vmi.status.iter().flat_map(|status| &status.migrated_volumes);
        let come = |moved: &MigratedVolume| {
            record.volumes.get(&moved.volume_name) == Some(&moved.destination.claim_name)
        };
        made > change || moves.into_iter().all(come)
    }

    /// When the next try may begin.
    fn not_before(&self) -> Option<Timestamp> {
        let failed = self.snapshot.moves.iter().filter(|m| self.is_of_this_change(m));
        let mut failed: Vec<Timestamp> = failed
            .filter_map(|m| m.status.as_ref().filter(|s| s.phase == Moving::Failed)?.since())
            .collect();
        failed.sort();
        let last = *failed.last()?;
        let doubled = FIRST_PAUSE.saturating_mul(1 << (failed.len() - 1).min(10));
        Some(last + SignedDuration::from_secs(doubled.min(LAST_PAUSE)))
    }

    /// Writes a condition of the VMI's, and its volumes that move.
    fn say_of_vmi(&self, condition: Condition, moves: Option<Value>, plan: &mut Plan) {
        let found = self.vmi.status.clone().unwrap_or_default();
        let merged = conditions::merge(&found.conditions, vec![condition], &[], self.snapshot.now);
        if merged == found.conditions && moves.is_none() {
            return;
        }
        let mut status = json!({"conditions": merged});
        if let Some(moves) = moves {
            status["migratedVolumes"] = moves;
        }
        plan.actions.push(Action::PatchVmi(json!({"status": status})));
    }
}
