//! Which guests get new launchers now. Pure.

use crate::world::Key;
use api::keys;
use api::kubevirt::{EVICT, LIVE_MIGRATE, WorkloadUpdateStrategy};
use api::migration::{self, VirtualMachineInstanceMigration as Migration};
use jiff::{SignedDuration, Timestamp};
use kube::ResourceExt;
use std::time::Duration;

/// Beginning of the migrations' names.
const NAME: &str = "kubevirt-workload-update-";
/// How urgent they are; as KubeVirt.
const PRIORITY: &str = "system-critical";

/// A guest that runs.
#[derive(Debug, Clone)]
pub struct Guest {
    /// Its VMI.
    pub key: Key,
    /// Its launcher is of another version.
    pub is_outdated: bool,
    /// And that is said.
    pub is_labelled: bool,
    /// It can move.
    pub can_move: bool,
    /// It ends for nobody: what asks it to leave has it moved, or is refused.
    pub moves_only: bool,
    /// It moves already, or is about to.
    pub moves: bool,
}

/// All guests.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// They.
    pub guests: Vec<Guest>,
    /// What the cluster's settings want.
    pub strategy: WorkloadUpdateStrategy,
    /// How many more migrations may begin.
    pub places: usize,
    /// When guests were last evicted.
    pub last: Option<Timestamp>,
    /// Now.
    pub now: Timestamp,
}

/// What is to be done.
#[derive(Debug, Default)]
pub struct Plan {
    /// How many are outdated.
    pub outdated: usize,
    /// Whose label is to be set, or removed.
    pub labels: Vec<(Key, bool)>,
    /// Who moves.
    pub migrate: Vec<Key>,
    /// Who is evicted.
    pub evict: Vec<Key>,
    /// When to look again though nothing has changed.
    pub again: Option<Duration>,
}

/// What is to be done.
pub fn plan(snapshot: &Snapshot) -> Plan {
    let mut plan = Plan::default();
    let wrong = snapshot.guests.iter().filter(|guest| guest.is_labelled != guest.is_outdated);
    plan.labels = wrong.map(|guest| (guest.key.clone(), guest.is_outdated)).collect();
    let outdated = || snapshot.guests.iter().filter(|guest| guest.is_outdated);
    plan.outdated = outdated().count();
    let strategy = &snapshot.strategy;
    let waits = || outdated().filter(|guest| !guest.moves);
    let by_move = |guest: &&Guest| strategy.does(LIVE_MIGRATE) && guest.can_move;
    let movers = waits().filter(by_move).map(|guest| guest.key.clone());
    plan.migrate = movers.take(snapshot.places).collect();
    // Nobody is asked in vain.
    let ends = |guest: &&Guest| !by_move(guest) && (guest.can_move || !guest.moves_only);
    let mut rest = waits().filter(|guest| strategy.does(EVICT) && ends(guest)).peekable();
    if rest.peek().is_none() {
        return plan;
    }
    let pause = strategy.interval();
    match snapshot.last.map(|last| left(last, pause, snapshot.now)) {
        Some(left) if !left.is_zero() => plan.again = Some(left),
        _ => {
            plan.evict =
                rest.by_ref().take(strategy.batch()).map(|guest| guest.key.clone()).collect();
            plan.again = Some(pause);
        }
    }
    plan
}

/// How much of a pause is left.
fn left(last: Timestamp, pause: Duration, now: Timestamp) -> Duration {
    let gone = now.duration_since(last).max(SignedDuration::ZERO);
    pause.saturating_sub(gone.unsigned_abs())
}

/// A migration by which a guest gets a new launcher.
pub fn renewing((_, vmi): &Key) -> Migration {
    let spec = migration::Spec {
        vmi_name: vmi.clone(),
        priority: Some(PRIORITY.into()),
        ..migration::Spec::default()
    };
    let mut migration = Migration::new("", spec);
    migration.metadata.name = None;
    migration.metadata.generate_name = Some(NAME.into());
    migration.annotations_mut().insert(keys::WORKLOAD_UPDATE.into(), String::new());
    migration
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    prop_compose! {
        fn snapshots()(
            guests in prop::collection::vec(any::<(bool, bool, bool, bool, bool)>(), 0..12),
            methods in prop::sample::subsequence(vec![LIVE_MIGRATE, EVICT], 0..=2),
            batch in 1u32..4,
            places in 0usize..6,
            last in prop::option::of(0i64..120),
        ) -> Snapshot {
            let guest = |(n, of): (usize, (bool, bool, bool, bool, bool))| {
                let (is_outdated, is_labelled, can_move, moves_only, moves) = of;
                let key = ("default".to_owned(), format!("vm-{n}"));
                Guest { key, is_outdated, is_labelled, can_move, moves_only, moves }
            };
            let now = Timestamp::from_second(1_700_000_000).unwrap();
            Snapshot {
                guests: guests.into_iter().enumerate().map(guest).collect(),
                strategy: WorkloadUpdateStrategy {
                    workload_update_methods: methods.into_iter().map(str::to_owned).collect(),
                    batch_eviction_size: Some(batch),
                    batch_eviction_interval: None,
                },
                places,
                last: last.map(|ago| now - SignedDuration::from_secs(ago)),
                now,
            }
        }
    }

    proptest! {
        #[test]
        fn outdated_guests_move_where_they_can_and_end_batch_by_batch_where_they_may(
            snapshot in snapshots(),
        ) {
            let plan = plan(&snapshot);
            let migrates: HashSet<&Key> = plan.migrate.iter().collect();
            let ends: HashSet<&Key> = plan.evict.iter().collect();
            let strategy = &snapshot.strategy;
            prop_assert!(migrates.is_disjoint(&ends));
            prop_assert!(migrates.len() <= snapshot.places && ends.len() <= strategy.batch());
            let too_soon = snapshot.last.is_some_and(|last| {
                snapshot.now.duration_since(last) < SignedDuration::from_secs(60)
            });
            prop_assert!(ends.is_empty() || !too_soon);
            for guest in &snapshot.guests {
                let (moves, goes) = (migrates.contains(&guest.key), ends.contains(&guest.key));
                prop_assert!(!(moves || goes) || guest.is_outdated && !guest.moves);
                                prop_assert!(!goes || strategy.does(EVICT));
                // Moving comes first.
                let by_move = guest.can_move && strategy.does(LIVE_MIGRATE);
                prop_assert!(!moves || by_move);
                prop_assert!(!goes || !by_move);
                prop_assert!(!goes || guest.can_move || !guest.moves_only);
                let labelled = plan.labels.iter().find(|(key, _)| *key == guest.key);
                let after = labelled.map_or(guest.is_labelled, |(_, is)| *is);
                prop_assert_eq!(after, guest.is_outdated);
                // Nobody is kept back for nothing.
                if guest.is_outdated && !guest.moves && !moves && !goes {
                    let by_end = strategy.does(EVICT) && !by_move
                        && (guest.can_move || !guest.moves_only);
                    prop_assert!(!by_move || migrates.len() == snapshot.places);
                    prop_assert!(!by_end || too_soon || ends.len() == strategy.batch());
                    prop_assert!(!by_end || plan.again.is_some());
                }
            }
            prop_assert_eq!(plan.outdated, snapshot.guests.iter().filter(|g| g.is_outdated).count());
        }
    }
}
