//! What has changed on a VM's disks since older epochs, so that a move back to
//! a disk that was left then sends only that.
//!
//! QEMU records what changes in its own time (the *since* bitmap). What changed
//! between an older epoch and this QEMU's begin came along with the guest, as
//! lists of extents. Both together are the answer for that older epoch.

use mover::extent::ExtentSet;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Visits that are remembered; a VM that goes round more hosts compares hashes.
const MAX_EPOCHS: usize = 8;
/// Extents that are worth carrying in all; longer lists are made coarser. As
/// JSON they must fit one message of the control stream (1 MiB).
const MAX_EXTENTS: usize = 10_000;

/// What changed before this QEMU began, by the epoch since which it is known,
/// per disk name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct History {
    /// The epoch whose end this QEMU's own bitmap goes back to; None: there is no such bitmap.
    pub own: Option<u64>,
    /// Older epochs.
    #[serde(default)]
    older: BTreeMap<u64, BTreeMap<String, ExtentSet>>,
}

impl History {
    /// The history of a guest that has just arrived from the owner of `epoch`.
    pub fn arrived(epoch: u64) -> Self {
        Self { own: Some(epoch), older: BTreeMap::new() }
    }

    /// Takes what the source knew.
    pub fn inherit(&mut self, older: History) {
        self.older = older.older;
        while self.older.len() > MAX_EPOCHS {
            self.older.pop_first();
        }
    }

    /// Whether it is known what changed since the end of `epoch`.
    pub fn reaches(&self, epoch: u64) -> bool {
        self.own == Some(epoch) || (self.own.is_some() && self.older.contains_key(&epoch))
    }

    /// What changed on a disk since the end of `epoch`, given what this QEMU
    /// recorded on it. None when that is not known.
    pub fn since(&self, epoch: u64, disk: &str, recorded: &ExtentSet) -> Option<ExtentSet> {
        if self.own == Some(epoch) {
            return Some(recorded.clone());
        }
        self.own?;
        let mut all = self.older.get(&epoch)?.get(disk)?.clone();
        all.union_with(recorded);
        Some(all)
    }

    /// What the next owner has to know: this history with all that was recorded
    /// here added. `recorded` and `sizes` are by disk.
    pub fn handed_on(
        &self,
        recorded: &BTreeMap<String, ExtentSet>,
        sizes: &BTreeMap<String, u64>,
    ) -> Self {
        let mut older = self.older.clone();
        for disks in older.values_mut() {
            // What was not recorded here is not known any more, nor what was not known before.
            disks.retain(|disk, _| recorded.contains_key(disk));
            for (disk, extents) in disks.iter_mut() {
                extents.union_with(&recorded[disk]);
            }
        }
        if let Some(own) = self.own {
            older.insert(own, recorded.clone());
        }
        let lists = (older.len() * recorded.len()).max(1);
        for disks in older.values_mut() {
            for (disk, extents) in disks.iter_mut() {
                let size = sizes.get(disk).copied().unwrap_or(u64::MAX);
                let mut granularity = 64 << 10;
                while extents.extents() > MAX_EXTENTS / lists {
                    *extents = extents.coarsened(granularity, size);
                    granularity *= 4;
                }
            }
        }
        Self { own: None, older }
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use mover::extent::Extent;

    fn set(offset: u64) -> ExtentSet {
        [Extent::new(offset, 1)].into_iter().collect()
    }

    #[test]
    fn of_a_disk_that_one_owner_did_not_record_nothing_older_is_known() {
        let (named, sizes) = (|name: &str, at| (name.to_owned(), set(at)), BTreeMap::new());
        let b = History::arrived(1);
        let mut c = History::arrived(2);
        c.inherit(b.handed_on(&BTreeMap::from([named("a", 1), named("b", 1)]), &sizes));
        let mut d = History::arrived(3);
        d.inherit(c.handed_on(&BTreeMap::from([named("a", 2)]), &sizes));
        let mut e = History::arrived(4);
        e.inherit(d.handed_on(&BTreeMap::from([named("a", 3), named("b", 3)]), &sizes));
        assert!([1, 2, 3].iter().all(|epoch| e.since(*epoch, "a", &set(9)).is_some()));
        let known: Vec<_> = [1, 2, 3].map(|epoch| e.since(epoch, "b", &set(9)).is_some()).into();
        assert_eq!(known, [false, false, true]);
    }

    #[test]
    fn a_way_back_over_two_hosts_knows_what_both_changed() {
        let sizes = BTreeMap::from([("d".to_owned(), 100u64)]);
        // A (epoch 1) -> B (epoch 2) -> C (epoch 3) -> back to A's disk.
        let b = History::arrived(1);
        let on_b = BTreeMap::from([("d".to_owned(), set(10))]);
        let mut c = History::arrived(2);
        c.inherit(b.handed_on(&on_b, &sizes));
        assert!(c.reaches(1) && c.reaches(2) && !c.reaches(3));
        let since_a = c.since(1, "d", &set(20)).unwrap();
        assert_eq!(since_a, [Extent::new(10, 1), Extent::new(20, 1)].into_iter().collect());
        assert_eq!(c.since(2, "d", &set(20)), Some(set(20)));
        assert_eq!(History::default().since(1, "d", &set(1)), None, "a guest that was booted here");
    }
}
