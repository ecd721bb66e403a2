//! Whose turn it is: how many migrations are carried out at the same time, and in which order. Pure.

use api::migration::{Options, PER_CLUSTER, PER_NODE, Phase};
use std::cmp::Reverse;
use std::collections::HashMap;

/// A migration, as far as its turn depends on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct One {
    /// Its uid.
    pub uid: String,
    /// Where it is.
    pub phase: Phase,
    /// How urgent it is: more is more.
    pub weight: u32,
    /// When it was made, in seconds since 1970.
    pub made: i64,
    /// The node that its guest leaves.
    pub node: String,
}

/// How urgent a priority is, as KubeVirt has it.
pub fn weight(priority: Option<&str>) -> u32 {
    match priority {
        Some("system-critical") => 100,
        Some("user-triggered") => 50,
        Some("system-maintenance") => 20,
        _ => 0,
    }
}

/// Whether a migration may begin; or why not. Those that are under way have their places, and the
/// rest is let in one after the other, the most urgent and then the oldest first, each if its node
/// has a place left.
pub fn turn(own: &str, all: &[One], limits: &Options) -> Result<(), String> {
    let per_cluster = limits.parallel_migrations_per_cluster.unwrap_or(PER_CLUSTER) as usize;
    let per_node = limits.parallel_outbound_migrations_per_node.unwrap_or(PER_NODE) as usize;
    let mut from: HashMap<&str, usize> = HashMap::new();
    let active = all.iter().filter(|one| one.phase.is_active());
    let mut places = per_cluster.saturating_sub(active.clone().count());
    active.for_each(|one| *from.entry(&one.node).or_default() += 1);
    let mut waiting: Vec<&One> =
        all.iter().filter(|one| !one.phase.is_active() && !one.phase.is_final()).collect();
    waiting.sort_by_key(|one| (Reverse(one.weight), one.made, &one.uid));
    for one in waiting {
        let outbound = from.entry(&one.node).or_default();
        let fits = places > 0 && *outbound < per_node;
        if one.uid == own {
            return match () {
                () if fits => Ok(()),
                () if places == 0 => Err(format!(
                    "it waits for its turn: {per_cluster} migrations of the cluster at the same time \
                     are allowed (parallelMigrationsPerCluster)"
                )),
                () => Err(format!(
                    "it waits for its turn: {per_node} migrations away from node {} at the same time \
                     are allowed (parallelOutboundMigrationsPerNode)",
                    one.node
                )),
            };
        }
        if fits {
            places -= 1;
            *outbound += 1;
        }
    }
    // It is under way, or over.
    Ok(())
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    fn ones() -> impl Strategy<Value = Vec<One>> {
        let phases = vec![Phase::Pending, Phase::Pending, Phase::Running, Phase::Succeeded];
        let one = (prop::sample::select(phases), 0u32..3, 0i64..5, 0u8..3);
        prop::collection::vec(one, 1..14).prop_map(|all| {
            let make = |(n, (phase, weight, made, node)): (usize, _)| One {
                uid: format!("{n:02}"),
                phase,
                weight,
                made,
                node: format!("node-{node}"),
            };
            all.into_iter().enumerate().map(make).collect()
        })
    }

    fn limits(cluster: u32, node: u32) -> Options {
        Options {
            parallel_migrations_per_cluster: Some(cluster),
            parallel_outbound_migrations_per_node: Some(node),
            ..Options::default()
        }
    }

    proptest! {
        #[test]
        fn all_that_may_begin_may_begin_at_once_and_none_that_fits_is_kept_back(
            all in ones(), cluster in 1u32..5, node in 1u32..4,
        ) {
            let limits = limits(cluster, node);
            let begins = |one: &&One| {
                one.phase == Phase::Pending && turn(&one.uid, &all, &limits).is_ok()
            };
            let mut after: Vec<One> = all.clone();
            for one in after.iter_mut().filter(|one| begins(&&**one)) {
                one.phase = Phase::Running;
            }
            // Those of before may be too many, since limits change.
            let count = |all: &[One], on: Option<&str>| all.iter()
                .filter(|o| o.phase.is_active() && on.is_none_or(|node| o.node == node)).count();
            let bound = |limit: u32, before: usize| (limit as usize).max(before);
            prop_assert!(count(&after, None) <= bound(cluster, count(&all, None)));
            for n in ["node-0", "node-1", "node-2"] {
                prop_assert!(count(&after, Some(n)) <= bound(node, count(&all, Some(n))));
            }
            for one in after.iter().filter(|one| one.phase == Phase::Pending) {
                let full = count(&after, None) >= cluster as usize
                    || count(&after, Some(&one.node)) >= node as usize;
                prop_assert!(full, "{one:?} is kept back for nothing");
            }
        }

        #[test]
        fn the_more_urgent_overtakes_on_its_node(all in ones(), cluster in 1u32..5, node in 1u32..4) {
            let limits = limits(cluster, node);
            let pending: Vec<&One> = all.iter().filter(|o| o.phase == Phase::Pending).collect();
            for (one, other) in pending.iter().flat_map(|a| pending.iter().map(move |b| (a, b))) {
                if one.node == other.node && one.weight > other.weight
                    && turn(&other.uid, &all, &limits).is_ok()
                {
                    prop_assert!(turn(&one.uid, &all, &limits).is_ok());
                }
            }
        }
    }
}
