//! Migrations that nobody asked for by hand wait after others that failed. Pure.

use api::keys;
use api::migration::{Phase, VirtualMachineInstanceMigration as Migration};
use jiff::{SignedDuration, Timestamp};
use kube::ResourceExt;
use std::collections::HashMap;

/// The wait after a first failure; it doubles with each more. As KubeVirt.
const FIRST: SignedDuration = SignedDuration::from_secs(20);
/// It doubles so often at most.
const DOUBLES: u32 = 16;

/// Those that are held back, by their uids, and until when.
pub fn held_back<'a>(
    all: impl IntoIterator<Item = &'a Migration>,
    now: Timestamp,
) -> HashMap<String, Timestamp> {
    let mut of_vmis: HashMap<(Option<String>, &str), Vec<&Migration>> = HashMap::new();
    for migration in all {
        let vmi = (migration.namespace(), &*migration.spec.vmi_name);
        of_vmis.entry(vmi).or_default().push(migration);
    }
    let mut held = HashMap::new();
    for mut own in of_vmis.into_values() {
        own.sort_by_key(|m| (m.creation_timestamp().map(|at| at.0), m.name_any()));
        for (at, migration) in own.iter().enumerate() {
            let until = until(migration, &own[..at]).filter(|until| *until > now);
            held.extend(migration.uid().zip(until));
        }
    }
    held
}

/// Until when a migration waits because of those that were made before it.
fn until(migration: &Migration, earlier: &[&Migration]) -> Option<Timestamp> {
    if !is_automatic(migration) || migration.phase() > Phase::Pending {
        return None;
    }
    let since_success = earlier.iter().rev().take_while(|m| m.phase() != Phase::Succeeded);
    let mut failed = since_success.filter(|m| {
        is_automatic(m) && m.phase() == Phase::Failed && m.metadata.deletion_timestamp.is_none()
    });
    let last = failed.next()?.status.as_ref()?.since()?;
    let doubles = u32::try_from(failed.count()).unwrap_or(DOUBLES).min(DOUBLES);
    Some(last + FIRST * 2_i32.pow(doubles))
}

fn is_automatic(migration: &Migration) -> bool {
    let annotations = migration.annotations();
    [keys::EVACUATION, keys::WORKLOAD_UPDATE].iter().any(|key| annotations.contains_key(*key))
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(1_700_000_000 + seconds).unwrap()
    }

    fn made(n: i64, automatic: bool, phase: &str) -> Migration {
        let time = api::conditions::moment(at(n));
        let annotations = if automatic { json!({keys::EVACUATION: "n1"}) } else { json!({}) };
        serde_json::from_value(json!({
            "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstanceMigration",
            "metadata": {
                "name": format!("m{n:02}"), "uid": format!("m{n:02}"), "namespace": "default",
                "creationTimestamp": time, "annotations": annotations,
            },
            "spec": {"vmiName": "web"},
            "status": {"phase": phase, "phaseTransitionTimestamps": [
                {"phase": phase, "phaseTransitionTimestamp": time},
            ]},
        }))
        .unwrap()
    }

    proptest! {
        #[test]
        fn each_failure_in_a_row_doubles_the_wait_and_a_success_ends_it(
            failures in 0i64..5, before in 0i64..5, own in any::<bool>(),
        ) {
            let mut all: Vec<Migration> =
                (0..before).map(|n| made(n, true, "Failed")).collect();
            all.push(made(before, own, "Succeeded"));
            let last = before + failures;
            all.extend((before + 1..=last).map(|n| made(n, true, "Failed")));
            // What people make neither waits nor counts.
            all.push(made(last + 1, false, "Failed"));
            all.push(made(last + 2, false, "Pending"));
            all.push(made(last + 3, true, "Pending"));
            let held = held_back(&all, at(0));
            let expected = (failures > 0).then(|| at(last) + FIRST * 2_i32.pow(failures as u32 - 1));
            prop_assert_eq!(held.get(&format!("m{:02}", last + 3)), expected.as_ref());
            prop_assert_eq!(held.len(), usize::from(failures > 0));
            prop_assert!(expected.is_none_or(|until| held_back(&all, until).is_empty()));
        }
    }
}
