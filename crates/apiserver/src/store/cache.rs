//! All objects in memory, and the last changes of each resource.

use super::{Key, Object, Query};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::{Bound, RangeBounds};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use tokio::sync::watch;

/// Changes of one resource that are remembered. A watcher that lags behind by more has to list
/// again.
const EVENTS: usize = 1024;
/// What a watcher is handed at once.
const BATCH: usize = 256;

/// A change, as watchers see it.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Of what.
    pub key: Key,
    /// What it was; None: it did not exist.
    pub before: Option<Object>,
    /// What it is; of one that was deleted, what it was last, at the revision of its deletion.
    pub object: Object,
    /// It is gone.
    pub deleted: bool,
}

/// The revision is too old: what has changed since was partly forgotten. List again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("revision {asked} is too old; changes are remembered from {oldest} on")]
pub struct Expired {
    /// What was asked for.
    pub asked: u64,
    /// The oldest that can be had.
    pub oldest: u64,
}

/// A part of a resource's objects.
#[derive(Debug, Clone, PartialEq)]
pub struct List {
    /// As of which all of it is; a watch from it misses nothing.
    pub revision: u64,
    /// In the order of their keys.
    pub objects: Vec<(Key, Object)>,
    /// How many more there are behind the last one.
    pub remaining: usize,
}

#[derive(Debug, Default)]
pub(super) struct Cache {
    shelves: RwLock<HashMap<Arc<str>, Arc<Shelf>>>,
    /// Every change up to here is on its shelf.
    revision: AtomicU64,
    /// Up to here nothing is remembered: what was in the database when it was opened.
    opened_at: u64,
}

/// The objects of one resource.
#[derive(Debug)]
struct Shelf {
    content: RwLock<Content>,
    /// Revision of the last change.
    changed: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Content {
    objects: BTreeMap<Key, Object>,
    events: VecDeque<Event>,
    /// Changes up to here are forgotten.
    forgotten: u64,
}

fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

impl Cache {
    pub(super) fn new(revision: u64, objects: impl IntoIterator<Item = (Key, Object)>) -> Self {
        let cache = Self { opened_at: revision, revision: revision.into(), ..Self::default() };
        for (key, object) in objects {
            let shelf = cache.shelf(&key.resource);
            write(&shelf.content).objects.insert(key, object);
        }
        cache
    }

    pub(super) fn revision(&self) -> u64 {
        self.revision.load(Ordering::Acquire)
    }

    pub(super) fn changed(&self, resource: &str) -> u64 {
        read(&self.shelf(resource).content).revision()
    }

    fn shelf(&self, resource: &str) -> Arc<Shelf> {
        if let Some(shelf) = read(&self.shelves).get(resource) {
            return shelf.clone();
        }
        let empty = || {
            let content = Content { forgotten: self.opened_at, ..Content::default() };
            Arc::new(Shelf {
                content: RwLock::new(content),
                changed: watch::Sender::new(self.opened_at),
            })
        };
        write(&self.shelves).entry(resource.into()).or_insert_with(empty).clone()
    }

    /// Shows committed changes, which are in the order of their revisions.
    pub(super) fn publish(&self, events: Vec<Event>) {
        let Some(last) = events.last().map(|event| event.object.revision) else { return };
        let mut by_resource: HashMap<Arc<str>, Vec<Event>> = HashMap::new();
        for event in events {
            by_resource.entry(event.key.resource.clone()).or_default().push(event);
        }
        let shelves: Vec<_> = by_resource
            .into_iter()
            .map(|(resource, events)| {
                let shelf = self.shelf(&resource);
                shelf.put(events);
                shelf
            })
            .collect();
        self.revision.store(last, Ordering::Release);
        for shelf in shelves {
            shelf.changed.send_replace(last);
        }
    }

    pub(super) fn get(&self, key: &Key) -> Option<Object> {
        read(&self.shelf(&key.resource).content).objects.get(key).cloned()
    }

    pub(super) fn list(&self, query: &Query<'_>) -> Result<List, Expired> {
        let shelf = self.shelf(query.resource);
        let content = read(&shelf.content);
        let now = content.revision().max(self.revision());
        let at = query.at.unwrap_or(now).min(now);
        let older = content.before_what_followed(at)?;
        let from = match &query.after {
            Some(key) => Bound::Excluded(key.clone()),
            None => {
                let namespace = query.namespace.unwrap_or_default();
                Bound::Included(Key::new(query.resource, namespace, ""))
            }
        };
        let range = (from, Bound::Unbounded);
        let wanted = |key: &Key| query.namespace.is_none_or(|wanted| wanted == &*key.namespace);
        // What has changed since `at` is taken from `older` alone.
        let same = content.objects.range(range.clone()).take_while(|(key, _)| wanted(key));
        let same = same.filter(|(key, _)| !older.contains_key(*key));
        let undone = older.iter().filter(|(key, _)| wanted(key) && range.contains(**key));
        let undone = undone.filter_map(|(key, object)| Some((*key, (*object)?)));
        let mut found: Vec<_> = same.chain(undone).collect();
        found.sort_unstable_by_key(|(key, _)| *key);
        let remaining = found.len().saturating_sub(query.limit);
        let objects = found.into_iter().take(query.limit);
        let objects = objects.map(|(key, object)| (key.clone(), object.clone())).collect();
        Ok(List { revision: at, objects, remaining })
    }

    pub(super) fn watch(self: &Arc<Self>, resource: &str, after: u64) -> Result<Watch, Expired> {
        let shelf = self.shelf(resource);
        let changes = shelf.changed.subscribe();
        drop(read(&shelf.content).since(after)?);
        Ok(Watch { cache: self.clone(), shelf, changes, seen: after })
    }
}

impl Shelf {
    fn put(&self, events: Vec<Event>) {
        let mut content = write(&self.content);
        for event in events {
            match event.deleted {
                true => content.objects.remove(&event.key),
                false => content.objects.insert(event.key.clone(), event.object.clone()),
            };
            content.events.push_back(event);
        }
        while content.events.len() > EVENTS {
            content.forgotten = content.events.pop_front().map_or(0, |e| e.object.revision);
        }
    }
}

impl Content {
    /// Of the last change.
    fn revision(&self) -> u64 {
        self.events.back().map_or(self.forgotten, |event| event.object.revision)
    }

    fn since(&self, seen: u64) -> Result<impl Iterator<Item = &Event>, Expired> {
        if seen < self.forgotten {
            return Err(Expired { asked: seen, oldest: self.forgotten });
        }
        let first = self.events.partition_point(|event| event.object.revision <= seen);
        Ok(self.events.range(first..))
    }

    /// Of everything that has changed since a revision, what it was then.
    fn before_what_followed(&self, at: u64) -> Result<BTreeMap<&Key, Option<&Object>>, Expired> {
        let mut before = BTreeMap::new();
        for event in self.since(at)? {
            before.entry(&event.key).or_insert(event.before.as_ref());
        }
        Ok(before)
    }
}

/// Changes of a resource, in order.
#[derive(Debug)]
pub struct Watch {
    cache: Arc<Cache>,
    shelf: Arc<Shelf>,
    changes: watch::Receiver<u64>,
    seen: u64,
}

impl Watch {
    /// Waits for changes, and returns some of them; never none. What is not awaited to the end
    /// is not lost.
    ///
    /// # Errors
    /// [`Expired`]: this watcher was too slow.
    pub async fn next(&mut self) -> Result<Vec<Event>, Expired> {
        loop {
            self.changes.mark_unchanged();
            let events: Vec<_> =
                read(&self.shelf.content).since(self.seen)?.take(BATCH).cloned().collect();
            if let Some(last) = events.last() {
                self.seen = last.object.revision;
                return Ok(events);
            }
            // It lives as long as the shelf, which is ours.
            let _ = self.changes.changed().await;
        }
    }

    /// A revision up to which this watcher has been told all.
    pub fn position(&self) -> u64 {
        let content = read(&self.shelf.content);
        let now = content.revision().max(self.cache.revision());
        if content.revision() <= self.seen { now.max(self.seen) } else { self.seen }
    }
}
