//! What others add to the API, in this process: admission of their kinds, and groups whose
//! resources they serve themselves. On another cluster the same is done by webhooks and by an
//! aggregated API server.

use crate::auth::User;
use crate::body::Answer;
use crate::request::{Path, Verb};
use crate::status::Failure;
use bytes::Bytes;
use http::request::Parts;
use serde_json::Value;
use std::pin::Pin;
use std::sync::Arc;

/// Later.
pub type Later<'a, T> = Pin<Box<dyn Future<Output = Result<T, Failure>> + Send + 'a>>;

/// A write that is to be judged.
#[derive(Debug, Clone, Copy)]
pub struct Review<'a> {
    /// Create, Update or Delete. A patch is an update.
    pub verb: Verb,
    /// The resource's.
    pub group: &'a str,
    /// The resource's.
    pub resource: &'a str,
    /// Empty: the object itself.
    pub subresource: &'a str,
    /// Empty for what has none.
    pub namespace: &'a str,
    /// Of the object; empty for a new one whose name is not made yet.
    pub name: &'a str,
    /// Nothing may change by it.
    pub dry_run: bool,
    /// Who writes.
    pub user: &'a User,
    /// What was there before, if anything was.
    pub old: Option<&'a Value>,
}

/// A request to a group that an extension serves. Its sender may make it.
#[derive(Debug)]
pub struct Request {
    /// To what.
    pub path: Path,
    /// Who asks.
    pub user: Arc<User>,
    /// Its query.
    pub query: Vec<(String, String)>,
    /// Its head; with the means to upgrade the connection, if it has one.
    pub head: Parts,
    /// What was sent.
    pub body: Bytes,
}

/// What is added.
pub trait Extension: Send + Sync {
    /// Whether it judges writes of a resource, or creates of its subresource.
    fn admits(&self, group: &str, resource: &str, subresource: &str) -> bool;

    /// Fills in what an object that is written does not say.
    fn fill_in<'a>(&'a self, review: Review<'a>, object: &'a mut Value) -> Later<'a, ()>;

    /// Judges an object as it would be stored; None: it is deleted. Returns warnings.
    fn judge<'a>(&'a self, review: Review<'a>, object: Option<&'a Value>)
    -> Later<'a, Vec<String>>;

    /// The groups that it serves, each with its versions, the preferred one first.
    fn groups(&self) -> Vec<(&'static str, Vec<&'static str>)>;

    /// The resources of a group and version that it serves, as `APIResourceList` has them.
    fn resources(&self, group: &str, version: &str) -> Option<Vec<Value>>;

    /// What it adds to the server's metrics.
    fn metrics(&self) -> Later<'_, String>;

    /// Answers a request to such a group.
    fn serve(&self, request: Request) -> Later<'_, Answer>;
}
