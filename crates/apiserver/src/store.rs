//! Objects by key, each with a revision: transactions with preconditions, lists as of a
//! revision, and watches that miss nothing or say so.
//!
//! ```text
//! write() --queue--> one writer thread --group commit--> SQLite (WAL, FULL)
//!                         |  only what is committed
//!                         v
//!                    cache: a shelf per resource {objects, the last events}
//!                         |
//! get(), list(), watch() <+      these never touch SQLite
//! ```
//!
//! A write is acknowledged when it is on the disk and every later read sees it. One revision
//! counts all changes of all resources; no two changes share one.

mod cache;
mod database;
mod writer;

pub use cache::{Event, Expired, List, Watch};
pub use database::OpenError;

use cache::Cache;
use serde_json::Value;
use std::path::Path;
use std::sync::Arc;

/// Where an object is kept. The order is that of lists.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// Plural and group: `pods`, `virtualmachines.kubevirt.io`.
    pub resource: Arc<str>,
    /// Empty for what has none.
    pub namespace: Arc<str>,
    /// Unique in both.
    pub name: Arc<str>,
}

impl Key {
    /// A key of its parts.
    pub fn new(resource: &str, namespace: &str, name: &str) -> Self {
        Self { resource: resource.into(), namespace: namespace.into(), name: name.into() }
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { resource, namespace, name } = self;
        match &**namespace {
            "" => write!(f, "{resource} {name}"),
            namespace => write!(f, "{resource} {namespace}/{name}"),
        }
    }
}

/// An object as it was at one revision. Clones share the body.
#[derive(Debug, Clone, PartialEq)]
pub struct Object {
    /// Of the change that made it so.
    pub revision: u64,
    /// With `metadata.resourceVersion`.
    pub body: Arc<Value>,
}

/// What an object must be for a transaction to happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    /// It does not exist.
    Absent,
    /// It is as it was at this revision.
    At(u64),
}

/// One change of a transaction.
#[derive(Debug, Clone, PartialEq)]
pub struct Change {
    /// Of what.
    pub key: Key,
    /// Its precondition.
    pub expect: Expect,
    /// The new body; its `metadata.resourceVersion` is set by the store.
    pub to: To,
}

/// What becomes of an object.
#[derive(Debug, Clone, PartialEq)]
pub enum To {
    /// This.
    Body(Value),
    /// It is deleted; this is what watchers are told was deleted.
    Nothing(Value),
    /// It stays as it is: only its precondition counts.
    Same,
}

/// Which objects are listed.
#[derive(Debug, Clone)]
pub struct Query<'a> {
    /// Of this resource.
    pub resource: &'a str,
    /// Of this namespace; None: of all.
    pub namespace: Option<&'a str>,
    /// As they were at this revision, if it is not still to come; None: as they are.
    pub at: Option<u64>,
    /// Only those behind this one.
    pub after: Option<Key>,
    /// At most so many.
    pub limit: usize,
}

/// Why a transaction did not happen.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// A precondition does not hold.
    #[error("{key} is not as expected: {}", Self::state(.found))]
    Conflict {
        /// Of what.
        key: Key,
        /// Its revision now; None if it does not exist.
        found: Option<u64>,
    },
    /// The body is no JSON object with `metadata`.
    #[error("{0} has no metadata")]
    NoMetadata(Key),
    /// The database refused; nothing was changed.
    #[error("the database cannot be written; is its disk full? Nothing was changed")]
    Database(#[source] Arc<rusqlite::Error>),
    /// What the database holds is in doubt, and nothing more is written to it.
    #[error(
        "the database stopped at an error, and whether this write is in it is not known; restart, which reads it anew"
    )]
    Stopped,
}

impl WriteError {
    fn state(found: &Option<u64>) -> String {
        match found {
            Some(revision) => format!("it is at revision {revision}"),
            None => "it does not exist".into(),
        }
    }
}

/// A database and its cache. Clones share both; the file is closed when the last one is dropped.
#[derive(Debug, Clone)]
pub struct Store {
    cache: Arc<Cache>,
    writer: Arc<writer::Writer>,
}

impl Store {
    /// Opens the database of a file, which is made if there is none, and reads all of it.
    /// Blocks meanwhile.
    ///
    /// # Errors
    /// [`OpenError`]; the file is left as it is.
    pub fn open(file: &Path) -> Result<Self, OpenError> {
        let database = database::Database::open(file)?;
        let cache = Arc::new(database.load()?);
        let writer = Arc::new(writer::Writer::start(database, cache.clone()));
        Ok(Self { cache, writer })
    }

    /// Does all of the changes in their order, or none; the preconditions are of what was before
    /// the first. Returns what each object has become, in their order;
    /// of one that was deleted, what watchers were told.
    ///
    /// The outcome is the writer's even if the caller stops waiting.
    ///
    /// # Errors
    /// [`WriteError`].
    pub async fn write(&self, changes: Vec<Change>) -> Result<Vec<Object>, WriteError> {
        self.writer.write(changes).await
    }

    /// An object as it is now.
    pub fn get(&self, key: &Key) -> Option<Object> {
        self.cache.get(key)
    }

    /// Objects in the order of their keys.
    ///
    /// # Errors
    /// [`Expired`]: the revision is too old to be reconstructed.
    pub fn list(&self, query: &Query<'_>) -> Result<List, Expired> {
        self.cache.list(query)
    }

    /// All changes of a resource after a revision.
    ///
    /// # Errors
    /// [`Expired`]: changes after it may have been forgotten.
    pub fn watch(&self, resource: &str, after: u64) -> Result<Watch, Expired> {
        self.cache.watch(resource, after)
    }

    /// Of the last change of a resource that is seen; when it was opened, if there was none since.
    pub fn changed(&self, resource: &str) -> u64 {
        self.cache.changed(resource)
    }

    /// Of the last change that every reader sees.
    pub fn revision(&self) -> u64 {
        self.cache.revision()
    }
}
