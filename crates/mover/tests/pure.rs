//! Laws of the pure parts.

use mover::extent::{Extent, ExtentSet};
use mover::wire;
use mover::work::{Task, Work};
use proptest::prelude::*;
use std::collections::BTreeSet;

fn extents() -> impl Strategy<Value = Vec<Extent>> {
    let one = (0u64..200, 0u64..40).prop_map(|(offset, len)| Extent::new(offset, len));
    proptest::collection::vec(one, 0..20)
}

fn bytes(set: &ExtentSet) -> BTreeSet<u64> {
    set.iter().flat_map(|e| e.offset..e.end()).collect()
}

proptest! {
    #[test]
    fn extent_sets_are_sets_of_bytes(a in extents(), b in extents(), at in 0u64..200, len in 0u64..60) {
        let (a, b) = (ExtentSet::from(a), ExtentSet::from(b));
        let (x, y) = (bytes(&a), bytes(&b));
        let mut union = a.clone();
        union.union_with(&b);
        prop_assert_eq!(bytes(&union), x.union(&y).copied().collect());
        let mut rest = a.clone();
        rest.subtract(&b);
        prop_assert_eq!(bytes(&rest), x.difference(&y).copied().collect());
        prop_assert_eq!(rest.bytes(), bytes(&rest).len() as u64);
        let window = Extent::new(at, len);
        prop_assert_eq!(bytes(&a.within(window)), x.iter().copied().filter(|b| (at..at + len).contains(b)).collect());
        // Canonical: extents are disjoint and never touch.
        let list: Vec<_> = union.iter().collect();
        prop_assert!(list.windows(2).all(|w| w[0].end() < w[1].offset));
        prop_assert!(bytes(&a.coarsened(16, 240)).is_superset(&x));
    }

    #[test]
    fn popping_takes_every_byte_once_in_aligned_pieces(a in extents(), max in 1u64..50) {
        let mut set = ExtentSet::from(a);
        let mut left = bytes(&set);
        while let Some(piece) = set.pop_front(max) {
            prop_assert!(piece.len <= max && piece.offset / max == (piece.end() - 1) / max);
            for byte in piece.offset..piece.end() {
                prop_assert!(left.remove(&byte));
            }
        }
        prop_assert!(left.is_empty());
    }

    #[test]
    fn any_bytes_as_a_frame_or_a_reply_are_an_answer_and_never_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        if let Ok(head) = wire::read_head(&mut bytes.as_slice()) {
            prop_assert!(u64::from(head.payload) <= wire::CHUNK);
            prop_assert!(head.extent.offset.checked_add(head.extent.len).is_some());
        }
        let _ = wire::read_reply(&mut bytes.as_slice());
    }

    /// Streams take, send, are acknowledged and break at random; no byte is ever forgotten.
    #[test]
    fn no_work_is_forgotten(pushed in extents(), steps in proptest::collection::vec((0u16..2, 0u8..5), 0..120)) {
        let pushed = ExtentSet::from(pushed);
        let mut work = Work::new(1, 2);
        work.push(0, Task::Copy { blank: true }, &pushed);
        let mut safe = ExtentSet::new();
        let mut held: [Vec<(u64, Extent)>; 2] = Default::default();
        let mut in_hand: [Option<Extent>; 2] = [None; 2];
        for (stream, step) in steps {
            let s = usize::from(stream);
            match step {
                0 if in_hand[s].is_none() => in_hand[s] = work.take(stream).map(|i| i.extent),
                1 => if let Some(extent) = in_hand[s].take() {
                    let seq = work.next_seq(stream);
                    let item = mover::work::Item { disk: 0, extent, task: Task::Copy { blank: true } };
                    work.sending(stream, seq, item);
                    held[s].push((seq, extent));
                },
                2 => if !held[s].is_empty() {
                    let (seq, extent) = held[s].remove(0);
                    prop_assert_eq!(work.durable(stream, seq), Some(extent.len));
                    safe.insert(extent);
                },
                3 => {
                    work.reconnected(stream);
                    held[s].clear();
                    in_hand[s] = None;
                }
                _ => prop_assert_eq!(work.durable(stream, work.last_seq(stream) + 1), None),
            }
            let mut all = work.outstanding()[0].copy.clone();
            prop_assert_eq!(all.bytes(), work.left());
            all.union_with(&safe);
            prop_assert_eq!(&all, &pushed);
        }
    }
}
