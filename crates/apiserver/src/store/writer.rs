//! The one thread that writes: takes what waits, commits it together, shows it, answers.

use super::cache::{Cache, Event};
use super::database::{self, Database};
use super::{Change, Expect, Key, Object, To, WriteError};
use std::collections::HashMap;
use std::sync::Arc;
use std::thread::JoinHandle;
use tokio::sync::{mpsc, oneshot};

/// Transactions that are committed together.
const GROUP: usize = 128;
/// Transactions that wait for the writer; more callers wait for room.
const QUEUE: usize = 1024;

/// The thread's handle; it ends, and closes the file, when this is dropped.
#[derive(Debug)]
pub(super) struct Writer {
    queue: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

/// What the writer is handed.
#[derive(Debug)]
struct Job {
    changes: Vec<Change>,
    done: oneshot::Sender<Outcome>,
}

struct Thread {
    database: Database,
    cache: Arc<Cache>,
    /// Of the last change that was committed.
    revision: u64,
}

/// Changes that are not yet committed.
struct Draft<'a> {
    cache: &'a Cache,
    revision: u64,
    events: Vec<Event>,
    /// What the events have made of their keys.
    now: HashMap<Key, Option<Object>>,
}

/// Objects, as a transaction has left them.
type Outcome = Result<Vec<Object>, WriteError>;

impl Writer {
    pub(super) fn start(database: Database, cache: Arc<Cache>) -> Self {
        let (queue, jobs) = mpsc::channel(QUEUE);
        let thread = Thread { revision: cache.revision(), database, cache };
        let thread = std::thread::spawn(move || thread.run(jobs));
        Self { queue: Some(queue), thread: Some(thread) }
    }

    pub(super) async fn write(&self, changes: Vec<Change>) -> Outcome {
        let (done, outcome) = oneshot::channel();
        let queue = self.queue.as_ref().ok_or(WriteError::Stopped)?;
        queue.send(Job { changes, done }).await.map_err(|_| WriteError::Stopped)?;
        outcome.await.map_err(|_| WriteError::Stopped)?
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.queue.take();
        if let Some(thread) = self.thread.take() {
            // It has panicked, and said so.
            let _ = thread.join();
        }
    }
}

impl Thread {
    fn run(mut self, mut jobs: mpsc::Receiver<Job>) {
        while let Some(first) = jobs.blocking_recv() {
            let mut group = vec![first];
            while group.len() < GROUP
                && let Ok(job) = jobs.try_recv()
            {
                group.push(job);
            }
            if !self.write(group) {
                tracing::error!("the database is in doubt, and is not written any more; restart");
                return;
            }
            while jobs.is_empty() && self.shrink() {}
        }
    }

    /// False: what is on the disk is not known any more, and nobody was answered.
    fn write(&mut self, group: Vec<Job>) -> bool {
        let mut draft = Draft::new(&self.cache, self.revision);
        let (answers, outcomes): (Vec<_>, Vec<_>) =
            group.into_iter().map(|job| (job.done, draft.add(job.changes))).unzip();
        let Draft { revision, events, .. } = draft;
        let refused = match self.commit(&events, revision) {
            Ok(()) => {
                self.revision = revision;
                self.cache.publish(events);
                None
            }
            // It has to be as it was before, or nobody can say what it is.
            Err(_) if self.database.revision().ok() != Some(self.revision) => return false,
            Err(error) => {
                tracing::error!(%error, "the database refuses a write");
                Some(Arc::new(error))
            }
        };
        for (answer, outcome) in answers.into_iter().zip(outcomes) {
            let outcome = match &refused {
                Some(error) => outcome.and(Err(WriteError::Database(error.clone()))),
                None => outcome,
            };
            // Whoever asked may be gone; it is done all the same.
            let _ = answer.send(outcome);
        }
        true
    }

    fn commit(&mut self, events: &[Event], revision: u64) -> rusqlite::Result<()> {
        if events.is_empty() {
            return Ok(());
        }
        let transaction = self.database.begin()?;
        for event in events {
            match event.deleted {
                true => database::remove(&transaction, &event.key)?,
                false => database::put(&transaction, &event.key, &event.object)?,
            }
        }
        database::set_revision(&transaction, revision)?;
        transaction.commit()
    }

    /// Whether there is more to be done.
    fn shrink(&self) -> bool {
        self.database.shrink().unwrap_or_else(|error| {
            tracing::warn!(%error, "the database file cannot be made smaller");
            false
        })
    }
}

impl<'a> Draft<'a> {
    fn new(cache: &'a Cache, revision: u64) -> Self {
        Self { cache, revision, events: Vec::new(), now: HashMap::new() }
    }

    fn current(&self, key: &Key) -> Option<Object> {
        self.now.get(key).cloned().unwrap_or_else(|| self.cache.get(key))
    }

    /// Adds all of a transaction or nothing.
    fn add(&mut self, changes: Vec<Change>) -> Outcome {
        for change in &changes {
            let found = self.current(&change.key).map(|object| object.revision);
            let expected = match change.expect {
                Expect::Absent => None,
                Expect::At(revision) => Some(revision),
            };
            if found != expected {
                return Err(WriteError::Conflict { key: change.key.clone(), found });
            }
            if let To::Body(body) | To::Nothing(body) = &change.to
                && !body.get("metadata").is_some_and(serde_json::Value::is_object)
            {
                return Err(WriteError::NoMetadata(change.key.clone()));
            }
        }
        Ok(changes.into_iter().filter_map(|change| self.apply(change)).collect())
    }

    fn apply(&mut self, Change { key, to, .. }: Change) -> Option<Object> {
        let before = self.current(&key);
        let (mut body, deleted) = match to {
            To::Same => return before,
            To::Body(body) => (body, false),
            To::Nothing(body) => (body, true),
        };
        self.revision += 1;
        body["metadata"]["resourceVersion"] = self.revision.to_string().into();
        let object = Object { revision: self.revision, body: Arc::new(body) };
        self.now.insert(key.clone(), (!deleted).then(|| object.clone()));
        self.events.push(Event { key, before, object: object.clone(), deleted });
        Some(object)
    }
}
