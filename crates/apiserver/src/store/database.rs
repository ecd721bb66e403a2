//! The SQLite file: one table of objects, and the last revision.

use super::cache::Cache;
use super::{Key, Object};
use rusqlite::{Connection, ErrorCode, OpenFlags, Transaction, params};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// `application_id` of our files: "Gdwt".
const APPLICATION: i32 = 0x4764_7774;
/// `user_version` of our files. A file of a later one is left alone.
const FORMAT: i32 = 1;
/// Free pages, of 4 KiB, that are no reason to shrink the file.
const SPARE_PAGES: i64 = 1024;
/// Pages given back at a time, which takes a few milliseconds.
const SHRINK_PAGES: i64 = 256;
/// What is left of the write-ahead log once its content is in the database.
const LOG_BYTES: i64 = 16 << 20;

const SCHEMA: &str = "
    CREATE TABLE objects (
        resource TEXT NOT NULL, namespace TEXT NOT NULL, name TEXT NOT NULL,
        revision INTEGER NOT NULL, body TEXT NOT NULL,
        PRIMARY KEY (resource, namespace, name)
    ) STRICT;
    CREATE TABLE last (revision INTEGER NOT NULL) STRICT;
    INSERT INTO last VALUES (0);";

/// Why a database cannot be used. The file was not changed.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It is of a later version of this program.
    #[error(
        "{file} has format {found}, and this version reads {FORMAT}: use the version that wrote it"
    )]
    Newer {
        /// The database.
        file: PathBuf,
        /// Its format.
        found: i32,
    },
    /// It is a database, but not ours.
    #[error("{file} is not a database of this program: name another file, or move it away")]
    Foreign {
        /// The file.
        file: PathBuf,
    },
    /// Its content cannot be right.
    #[error(
        "{file} is damaged ({why}): put back a copy of it, or move it away to begin with an empty one"
    )]
    Damaged {
        /// The database.
        file: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// Another process has it.
    #[error("{file} is in use by another process: stop that one first")]
    InUse {
        /// The database.
        file: PathBuf,
    },
    /// The system refused.
    #[error("{file} cannot be opened")]
    Sqlite {
        /// The database.
        file: PathBuf,
        /// Why.
        #[source]
        source: rusqlite::Error,
    },
}

#[derive(Debug)]
pub(super) struct Database {
    file: PathBuf,
    connection: Connection,
}

impl Database {
    pub(super) fn open(file: &Path) -> Result<Self, OpenError> {
        Self::connect(file).map_err(|e| explained(file, e))?
    }

    fn connect(file: &Path) -> rusqlite::Result<Result<Self, OpenError>> {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
            | OpenFlags::SQLITE_OPEN_CREATE
            | OpenFlags::SQLITE_OPEN_NOFOLLOW
            | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(file, flags)?;
        // One process has it, from the first read on; another need not wait to be told.
        connection.busy_timeout(Duration::ZERO)?;
        connection.pragma_update(None, "locking_mode", "EXCLUSIVE")?;
        let number = |name: &str| connection.pragma_query_value(None, name, |row| row.get(0));
        let (application, format): (i32, i32) =
            (number("application_id")?, number("user_version")?);
        let tables: i64 =
            connection.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))?;
        let file = file.to_owned();
        match (application, format) {
            (0, 0) if tables == 0 => {}
            (APPLICATION, FORMAT) => {}
            (APPLICATION, found) => return Ok(Err(OpenError::Newer { file, found })),
            _ => return Ok(Err(OpenError::Foreign { file })),
        }
        if tables == 0 {
            connection.pragma_update(None, "auto_vacuum", "INCREMENTAL")?;
        }
        connection.pragma_update(None, "journal_mode", "WAL")?;
        connection.pragma_update(None, "synchronous", "FULL")?;
        connection.pragma_update(None, "journal_size_limit", LOG_BYTES)?;
        let mut database = Self { file, connection };
        if tables == 0 {
            database.create()?;
        }
        Ok(Ok(database))
    }

    fn create(&mut self) -> rusqlite::Result<()> {
        let transaction = self.connection.transaction()?;
        transaction.execute_batch(SCHEMA)?;
        transaction.pragma_update(None, "application_id", APPLICATION)?;
        transaction.pragma_update(None, "user_version", FORMAT)?;
        transaction.commit()
    }

    /// All of it, once it was found sound.
    pub(super) fn load(&self) -> Result<Cache, OpenError> {
        let failed = |e| explained(&self.file, e);
        let damaged = |why| OpenError::Damaged { file: self.file.clone(), why };
        let check = |row: &rusqlite::Row<'_>| row.get(0);
        let sound: String =
            self.connection.query_row("PRAGMA quick_check(1)", [], check).map_err(failed)?;
        if sound != "ok" {
            return Err(damaged(sound));
        }
        let last = self.revision().map_err(failed)?;
        let mut rows = self
            .connection
            .prepare("SELECT resource, namespace, name, revision, body FROM objects")
            .map_err(failed)?;
        let mut rows = rows.query([]).map_err(failed)?;
        let mut objects = Vec::new();
        while let Some(row) = rows.next().map_err(failed)? {
            let (key, revision, body) = columns(row).map_err(failed)?;
            let body: Value = serde_json::from_str(&body)
                .map_err(|e| damaged(format!("{key} is no JSON: {e}")))?;
            if revision > last {
                return Err(damaged(format!("{key} is newer than the last change")));
            }
            objects.push((key, Object { revision, body: Arc::new(body) }));
        }
        Ok(Cache::new(last, objects))
    }

    pub(super) fn revision(&self) -> rusqlite::Result<u64> {
        self.connection.query_row("SELECT revision FROM last", [], |row| row.get(0))
    }

    pub(super) fn begin(&mut self) -> rusqlite::Result<Transaction<'_>> {
        self.connection.transaction()
    }

    /// Gives free pages back to the file system, a few at a time. True: there are more.
    pub(super) fn shrink(&self) -> rusqlite::Result<bool> {
        let pages = |name| self.connection.pragma_query_value(None, name, |row| row.get(0));
        let (free, all): (i64, i64) = (pages("freelist_count")?, pages("page_count")?);
        if free <= SPARE_PAGES.max(all / 4) {
            return Ok(false);
        }
        let sql = format!("PRAGMA incremental_vacuum({SHRINK_PAGES})");
        let mut vacuum = self.connection.prepare(&sql)?;
        let mut pages = vacuum.query([])?;
        // N.B. each step gives back one page; all of them are one transaction.
        while pages.next()?.is_some() {}
        Ok(true)
    }
}

pub(super) fn put(to: &Transaction<'_>, key: &Key, object: &Object) -> rusqlite::Result<()> {
    let body = object.body.to_string();
    let sql = "INSERT OR REPLACE INTO objects VALUES (?, ?, ?, ?, ?)";
    let values = params![&*key.resource, &*key.namespace, &*key.name, object.revision, body];
    to.prepare_cached(sql)?.execute(values).map(drop)
}

pub(super) fn remove(from: &Transaction<'_>, key: &Key) -> rusqlite::Result<()> {
    let sql = "DELETE FROM objects WHERE resource = ? AND namespace = ? AND name = ?";
    let values = params![&*key.resource, &*key.namespace, &*key.name];
    from.prepare_cached(sql)?.execute(values).map(drop)
}

pub(super) fn set_revision(to: &Transaction<'_>, revision: u64) -> rusqlite::Result<()> {
    to.prepare_cached("UPDATE last SET revision = ?")?.execute([revision]).map(drop)
}

fn columns(row: &rusqlite::Row<'_>) -> rusqlite::Result<(Key, u64, String)> {
    let text = |n| row.get::<_, String>(n);
    Ok((Key::new(&text(0)?, &text(1)?, &text(2)?), row.get(3)?, text(4)?))
}

fn explained(file: &Path, error: rusqlite::Error) -> OpenError {
    let file = file.to_owned();
    match error.sqlite_error_code() {
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => OpenError::InUse { file },
        Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt) => {
            OpenError::Damaged { file, why: error.to_string() }
        }
        _ => OpenError::Sqlite { file, source: error },
    }
}
