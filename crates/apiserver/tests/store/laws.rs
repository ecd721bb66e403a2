//! Against a model: a map per revision.

use crate::{RESOURCE, all, body, key};
use apiserver::store::{Change, Event, Expect, Key, Query, Store, To, WriteError};
use proptest::prelude::*;
use std::collections::BTreeMap;

/// What an object's `n` is.
type Model = BTreeMap<Key, u64>;

/// (namespace, name, delete, whether its precondition is to hold)
type Step = (u8, u8, bool, bool);

fn place((namespace, name, ..): &Step) -> Key {
    Key::new(RESOURCE, &format!("ns-{namespace}"), &format!("thing-{name}"))
}

fn of(objects: Vec<(Key, apiserver::store::Object)>) -> Vec<(Key, u64)> {
    let number = |(key, object): (Key, apiserver::store::Object)| {
        assert_eq!(object.body["metadata"]["resourceVersion"], object.revision.to_string());
        (key, object.body["n"].as_u64().expect("a number"))
    };
    objects.into_iter().map(number).collect()
}

fn replayed(mut model: Model, events: &[Event]) -> Model {
    for Event { key, before, object, deleted } in events {
        let was = model.get(key).copied();
        assert_eq!(was, before.as_ref().and_then(|object| object.body["n"].as_u64()));
        match deleted {
            true => model.remove(key),
            false => model.insert(key.clone(), object.body["n"].as_u64().expect("a number")),
        };
    }
    model
}

/// Does the steps of a transaction; returns the model after each revision that it made.
async fn transact(store: &Store, n: &mut u64, now: &Model, steps: &[Step]) -> Vec<Model> {
    let mut changes = Vec::new();
    let mut models = Vec::new();
    let mut next = now.clone();
    for step @ (_, _, delete, holds) in steps {
        let key = place(step);
        if changes.iter().any(|change: &Change| change.key == key) {
            continue;
        }
        *n += 1;
        let found = store.get(&key).map(|object| object.revision);
        let expect = match (found, holds) {
            (Some(revision), true) => Expect::At(revision),
            (Some(revision), false) => Expect::At(revision - 1),
            (None, true) => Expect::Absent,
            (None, false) => Expect::At(1),
        };
        let to = match (found, delete) {
            (Some(_), true) => To::Nothing(body(*n)),
            (None, true) => To::Same,
            (_, false) => To::Body(body(*n)),
        };
        match to {
            To::Same => {}
            To::Nothing(_) => drop(next.remove(&key)),
            To::Body(_) => drop(next.insert(key.clone(), *n)),
        }
        if to != To::Same {
            models.push(next.clone());
        }
        changes.push(Change { key, expect, to });
    }
    let holds = steps.iter().zip(&changes).all(|(_, change)| match change.expect {
        Expect::Absent => store.get(&change.key).is_none(),
        Expect::At(revision) => store.get(&change.key).is_some_and(|o| o.revision == revision),
    });
    match (store.write(changes).await, holds) {
        (Ok(_), true) => models,
        (Err(WriteError::Conflict { .. }), false) => vec![],
        (outcome, _) => panic!("expected {holds}, got {outcome:?}"),
    }
}

async fn obeys(transactions: Vec<Vec<Step>>) {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("db");
    let store = Store::open(&file).expect("opened");
    // As of each revision, 0 first.
    let mut models = vec![Model::new()];
    let mut n = 0;
    for steps in &transactions {
        let now = models.last().expect("one").clone();
        models.extend(transact(&store, &mut n, &now, steps).await);
        assert_eq!(store.revision(), models.len() as u64 - 1);
    }
    let last = models.last().expect("one").clone();
    for (revision, model) in models.iter().enumerate() {
        let revision = revision as u64;
        assert_eq!(pages_at(&store, revision), model.clone().into_iter().collect::<Vec<_>>());
        if revision < store.revision() {
            let mut watch = store.watch(RESOURCE, revision).expect("not expired");
            let mut events = Vec::new();
            while watch.position() < store.revision() {
                events.extend(watch.next().await.expect("not expired"));
            }
            assert_eq!(replayed(model.clone(), &events), last);
        }
    }
    let of_one = Query { namespace: Some("ns-1"), ..all() };
    let mut expected: Vec<_> = last.clone().into_iter().collect();
    expected.retain(|(key, _)| &*key.namespace == "ns-1");
    assert_eq!(of(store.list(&of_one).expect("a list").objects), expected);

    let revision = store.revision();
    drop(store);
    let store = Store::open(&file).expect("opened again");
    assert_eq!(store.revision(), revision);
    assert_eq!(
        of(store.list(&all()).expect("a list").objects),
        last.into_iter().collect::<Vec<_>>()
    );
    if revision > 0 {
        let old = store.watch(RESOURCE, revision - 1).expect_err("its changes are forgotten");
        assert_eq!(old.oldest, revision);
    }
}

/// All as of a revision, three at a time.
fn pages_at(store: &Store, revision: u64) -> Vec<(Key, u64)> {
    let mut query = Query { at: Some(revision), limit: 3, ..all() };
    let mut found = Vec::new();
    loop {
        let page = store.list(&query).expect("not expired");
        assert_eq!(page.revision, revision);
        query.after = page.objects.last().map(|(key, _)| key.clone());
        found.extend(of(page.objects));
        if page.remaining == 0 {
            return found;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn every_revision_can_be_listed_and_watched_as_it_was(
        transactions in prop::collection::vec(
            prop::collection::vec((0..3u8, 0..4u8, any::<bool>(), prop::bool::weighted(0.9)), 1..4),
            0..40,
        )
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        runtime.block_on(obeys(transactions));
    }
}

#[tokio::test]
async fn of_many_that_expect_the_same_one_gets_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = Store::open(&folder.path().join("db")).expect("opened");
    store.write(vec![crate::create("a", 0)]).await.expect("created");
    let racers = (0..64).map(|n| {
        let change = Change { key: key("a"), expect: Expect::At(1), to: To::Body(body(n)) };
        let store = store.clone();
        tokio::spawn(async move { store.write(vec![change]).await.is_ok() })
    });
    let mut winners = 0;
    for racer in racers.collect::<Vec<_>>() {
        winners += usize::from(racer.await.expect("ended"));
    }
    assert_eq!((winners, store.revision()), (1, 2));
}

#[tokio::test]
async fn a_watcher_that_is_too_slow_is_told() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = Store::open(&folder.path().join("db")).expect("opened");
    let mut slow = store.watch(RESOURCE, 0).expect("a watch");
    for n in 0..50 {
        store
            .write((0..100).map(|i| crate::create(&format!("{n}-{i}"), 0)).collect())
            .await
            .expect("written");
    }
    let expired = slow.next().await.expect_err("it missed some");
    assert!(expired.oldest > 0 && expired.asked == 0, "{expired}");
    store.list(&Query { at: Some(1), ..all() }).expect_err("too old for a list as well");
    let mut now = store.watch(RESOURCE, expired.oldest).expect("as it was told");
    assert_eq!(now.next().await.expect("events")[0].object.revision, expired.oldest + 1);
}
