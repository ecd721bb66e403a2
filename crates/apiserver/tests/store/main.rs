//! The store: nothing lost, nothing invented, nothing half done.

mod files;
mod killed;
mod laws;

use apiserver::store::{Change, Expect, Key, Query, To};
use serde_json::{Value, json};

const RESOURCE: &str = "things.example.com";

fn key(name: &str) -> Key {
    Key::new(RESOURCE, "default", name)
}

fn body(n: u64) -> Value {
    json!({"metadata": {"name": "any"}, "n": n})
}

fn create(name: &str, n: u64) -> Change {
    Change { key: key(name), expect: Expect::Absent, to: To::Body(body(n)) }
}

fn all() -> Query<'static> {
    Query { resource: RESOURCE, namespace: None, at: None, after: None, limit: usize::MAX }
}
