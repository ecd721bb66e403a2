//! What keeps a guest from being moved, all of it at once. Pure.

use super::super::guests::{Guest, get};
use api::conditions::{Condition, types};
use api::vmi::{Spec, Status};

/// What keeps a guest where it is: a reason of KubeVirt's, and for people.
pub type Hindrance = (&'static str, String);

const DISKS: &str = "DisksNotLiveMigratable";

/// Those that nothing but another VM would change.
fn fixed(spec: &Spec) -> Vec<Hindrance> {
    let files = spec.volumes.iter().filter(|volume| volume.host_disk.is_some());
    files.map(|volume| (DISKS, format!("volume {} is a file of its node", volume.name))).collect()
}

/// Those of a VMI. `known`: whether a claim is. One that only its node can use is none: its disk
/// follows.
pub fn hindrances(spec: &Spec, known: impl Fn(&str) -> bool) -> Vec<Hindrance> {
    let mut found = fixed(spec);
    let unknown = spec.claims().into_iter().filter(|(_, claim)| !known(claim));
    let say = |(name, claim)| (DISKS, format!("claim {claim} of volume {name} is not known"));
    found.extend(unknown.map(say));
    found
}

/// Whether disks are copied when a guest moves: those that only its pod has.
fn copies(spec: &Spec) -> bool {
    spec.volumes.iter().any(|volume| volume.container_disk.is_some() || volume.empty_disk.is_some())
}

impl Guest<'_> {
    /// Whether the guest can move, as conditions; and how, in its status.
    pub(in super::super) fn mobility(&self, status: &mut Status) -> Vec<Condition> {
        let Ok(spec) = self.vmi.parse() else { return Vec::new() };
        let of = |claim: &str| get(&self.shared.claims, &(self.key.0.clone(), claim.to_owned()));
        let found = hindrances(&spec, |claim| of(claim).is_some());
        let is_shared = |claim: &str| {
            let modes = of(claim).and_then(|claim| claim.spec.clone()?.access_modes);
            modes.unwrap_or_default().iter().any(|mode| mode == "ReadWriteMany")
        };
        let follows = spec.claims().values().any(|claim| !is_shared(claim));
        let copied = copies(&spec) || follows || !status.migrated_volumes.is_empty();
        let method = if copied { "BlockMigration" } else { "LiveMigration" };
        status.migration_method = Some(method.into());
        status.migration_transport = Some("Unix".into());
        let live = condition(types::LIVE_MIGRATABLE, &found);
        let storage = condition(types::STORAGE_LIVE_MIGRATABLE, &fixed(&spec));
        vec![live, storage]
    }
}

fn condition(kind: &str, found: &[Hindrance]) -> Condition {
    let all: Vec<&str> = found.iter().map(|(_, message)| &**message).collect();
    match found.first() {
        None => Condition::new(kind, true, "", ""),
        // As KubeVirt has it: the first for one, all for the other.
        Some(_) if kind == types::STORAGE_LIVE_MIGRATABLE => {
            Condition::new(kind, false, "NotMigratable", &all.join("; "))
        }
        Some((reason, _)) => Condition::new(kind, false, reason, &all.join("; ")),
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use serde_json::json;

    #[test]
    fn all_that_keeps_a_guest_is_said_at_once_and_each_thing_alone_does() {
        let spec = |volumes: serde_json::Value| -> Spec {
            serde_json::from_value(json!({"volumes": volumes})).unwrap()
        };
        let claim =
            |name: &str| json!({"name": name, "persistentVolumeClaim": {"claimName": name}});
        let host = json!({"name": "host", "hostDisk": {"path": "/a", "type": "Disk"}});
        let count = |volumes| hindrances(&spec(volumes), |name| name != "gone").len();
        assert_eq!(count(json!([claim("disk")])), 0);
        for one in [claim("gone"), host.clone()] {
            assert_eq!(count(json!([claim("disk"), one])), 1);
        }
        assert_eq!(count(json!([claim("gone"), host])), 2);
    }
}
