//! What is done with a request that is understood and allowed: one way for all resources.
//!
//! A write reads the object, makes its successor, checks it, and stores it on the condition that
//! nobody else has meanwhile; if somebody has, it begins again.

pub mod admission;
pub mod delete;
pub mod options;
pub mod prepare;
pub mod read;
pub mod respond;
pub mod subresource;
pub mod watch;
pub mod write;

use crate::auth::User;
use crate::body::Answer;
use crate::deletion::{self, Grace};
use crate::request::{Accept, Verb};
use crate::resource::Resource;
use crate::selector::Selection;
use crate::status::{Failure, Subject};
use crate::store::{Key, Store};
use bytes::Bytes;
use http::{HeaderValue, StatusCode};
use serde_json::Value;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch as channel;

/// A request to a resource, from one who may make it.
#[derive(Debug, Clone)]
pub struct Call {
    /// What to do.
    pub verb: Verb,
    /// With what.
    pub resource: Arc<Resource>,
    /// Empty: in all, or the resource has none.
    pub namespace: Box<str>,
    /// Empty: with all of them.
    pub name: Box<str>,
    /// Empty: with the object itself.
    pub subresource: Box<str>,
    /// By labels and fields.
    pub selection: Selection,
    /// The rest of the query.
    pub options: Options,
    /// Who asks.
    pub user: Arc<User>,
    /// What the client takes.
    pub accept: Accept,
    /// The body's media type.
    pub media: Option<String>,
    /// The client's program.
    pub user_agent: String,
    /// What was sent.
    pub body: Bytes,
}

/// The query of a request.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// `resourceVersion`.
    pub revision: Option<u64>,
    /// `resourceVersionMatch`.
    pub matching: Option<read::Match>,
    /// `limit`.
    pub limit: Option<usize>,
    /// `continue`.
    pub next: Option<String>,
    /// `allowWatchBookmarks`.
    pub bookmarks: bool,
    /// `sendInitialEvents`.
    pub initial_events: Option<bool>,
    /// `timeoutSeconds`.
    pub timeout: Option<Duration>,
    /// `dryRun=All`.
    pub dry_run: bool,
    /// `fieldManager`.
    pub manager: Option<String>,
    /// `force` of an apply.
    pub force: bool,
    /// `fieldValidation`.
    pub unknown: prepare::Unknown,
    /// Of a delete.
    pub deletion: deletion::Options,
    /// All of it, for subresources that know more.
    pub query: Vec<(String, String)>,
}

impl Call {
    /// Where an object of this name is kept.
    pub fn key(&self, name: &str) -> Key {
        Key::new(&self.resource.storage_key(), &self.namespace, name)
    }

    /// An object of this name, as failures tell of it.
    pub fn subject<'a>(&'a self, name: &'a str) -> Subject<'a> {
        Subject { group: &self.resource.group, kind: &self.resource.plural, name }
    }

    /// Whether the objects can be given time to end.
    pub fn grace(&self) -> Grace {
        match (&*self.resource.group, &*self.resource.plural) {
            ("", "pods") => Grace::Pod,
            ("", "namespaces") => Grace::Namespace,
            _ => Grace::None,
        }
    }
}

/// `dryRun`, which is `All` or not given.
///
/// # Errors
/// 400 for anything else.
pub fn is_dry_run<'a>(values: impl Iterator<Item = &'a Value>) -> Result<bool, Failure> {
    let mut dry = false;
    for value in values {
        match value.as_str() {
            Some("All") => dry = true,
            _ => {
                return Err(Failure::bad_request(format!(
                    "dryRun: Unsupported value: {value}: supported values: \"All\""
                )));
            }
        }
    }
    Ok(dry)
}

/// Does what requests ask for.
#[derive(Clone)]
pub struct Handler {
    /// All objects.
    pub store: Store,
    /// Who hears of what was written.
    pub shared: Arc<crate::api::Shared>,
    /// Turns true when the server ends: then all watches do.
    pub ending: channel::Receiver<bool>,
}

impl Handler {
    /// Does it.
    ///
    /// # Errors
    /// Why not.
    pub async fn serve(&self, call: Call) -> Result<Answer, Failure> {
        match &*call.subresource {
            "" => {}
            "status" if call.resource.status => {}
            _ => return self.subresource(&call).await,
        }
        if !call.resource.stored {
            return self.ask(&call).await;
        }
        match call.verb {
            Verb::Get => self.get(&call).await,
            Verb::List => self.list(&call).await,
            Verb::Watch => self.watch(call).await,
            Verb::Delete => self.delete(&call).await,
            Verb::DeleteCollection => self.delete_all(&call).await,
            Verb::Create => self.answer(&call, self.create(&call).await?),
            Verb::Update => self.answer(&call, self.update(&call).await?),
            Verb::Patch => self.answer(&call, self.patch(&call).await?),
        }
    }

    fn answer(&self, call: &Call, written: write::Written) -> Result<Answer, Failure> {
        let code = if written.created { StatusCode::CREATED } else { StatusCode::OK };
        let mut answer = respond::one(call, code, &call.resource.served(&written.object))?;
        warn(&mut answer, &written.warnings);
        Ok(answer)
    }
}

/// Adds warnings for people, as RFC 7234 has them.
pub fn warn(answer: &mut Answer, warnings: &[String]) {
    for warning in warnings {
        let quoted = warning.replace('\\', "\\\\").replace('"', "\\\"");
        if let Ok(value) = HeaderValue::from_str(&format!("299 - \"{quoted}\"")) {
            answer.headers_mut().append("Warning", value);
        }
    }
}
