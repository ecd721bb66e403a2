//! How a request fails: Kubernetes' `Status`.

use serde_json::{Value, json};

/// A failure as the client is told. `code` is HTTP's, `reason` what programs look at.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// HTTP status.
    pub code: u16,
    /// Such as `AlreadyExists`.
    pub reason: &'static str,
    /// For people.
    pub message: String,
    /// `details`, or null.
    pub details: Value,
}

/// One of several things that are wrong with an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cause {
    /// Such as `FieldValueInvalid`, `FieldValueRequired`, `FieldManagerConflict`.
    pub reason: &'static str,
    /// For people.
    pub message: String,
    /// Such as `spec.containers[0].name`.
    pub field: String,
}

impl Cause {
    fn to_json(&self) -> Value {
        json!({"reason": self.reason, "message": self.message, "field": self.field})
    }
}

/// What an object is called in a failure.
#[derive(Debug, Clone, Copy)]
pub struct Subject<'a> {
    /// API group; empty for the core one.
    pub group: &'a str,
    /// The plural, or the kind of an object that is not valid.
    pub kind: &'a str,
    /// Its name; empty if it has none yet.
    pub name: &'a str,
}

impl Subject<'_> {
    fn details(&self, causes: &[Cause]) -> Value {
        let mut details = json!({"name": self.name, "group": self.group, "kind": self.kind});
        let map = details.as_object_mut();
        if let Some(map) = map {
            map.retain(|_, v| v != "");
            if !causes.is_empty() {
                map.insert("causes".into(), causes.iter().map(Cause::to_json).collect());
            }
        }
        details
    }

    fn kind_and_group(&self) -> String {
        match self.group {
            "" => self.kind.to_owned(),
            group => format!("{}.{group}", self.kind),
        }
    }

    /// `virtualmachines.kubevirt.io "web"`, as messages have it.
    fn quoted(&self) -> String {
        let kind = self.kind_and_group();
        match self.name {
            "" => kind,
            name => format!("{kind} {name:?}"),
        }
    }
}

impl Failure {
    fn new(code: u16, reason: &'static str, message: impl Into<String>) -> Self {
        Self { code, reason, message: message.into(), details: Value::Null }
    }

    /// 404: there is no such path.
    pub fn no_such_path() -> Self {
        Self::new(404, "NotFound", "the server could not find the requested resource")
    }

    /// 404: there is no such object.
    pub fn not_found(what: Subject<'_>) -> Self {
        let message = format!("{} not found", what.quoted());
        Self { details: what.details(&[]), ..Self::new(404, "NotFound", message) }
    }

    /// 409: it exists.
    pub fn exists(what: Subject<'_>) -> Self {
        let message = format!("{} already exists", what.quoted());
        Self { details: what.details(&[]), ..Self::new(409, "AlreadyExists", message) }
    }

    /// 409: it is not what the client thinks.
    pub fn conflict(what: Subject<'_>, why: &str) -> Self {
        let message = format!("Operation cannot be fulfilled on {}: {why}", what.quoted());
        Self { details: what.details(&[]), ..Self::new(409, "Conflict", message) }
    }

    /// 409 of a server-side apply: others own what it sets.
    pub fn apply_conflict(message: String, causes: &[Cause]) -> Self {
        let causes: Vec<_> = causes.iter().map(Cause::to_json).collect();
        Self { details: json!({"causes": causes}), ..Self::new(409, "Conflict", message) }
    }

    /// 422: the object is not valid. `what.kind` is the kind.
    pub fn invalid(what: Subject<'_>, causes: &[Cause]) -> Self {
        let told: Vec<_> = causes.iter().map(|c| format!("{}: {}", c.field, c.message)).collect();
        let told = match &told[..] {
            [one] => one.clone(),
            several => format!("[{}]", several.join(", ")),
        };
        let message = format!("{} {:?} is invalid: {told}", what.kind_and_group(), what.name);
        Self { details: what.details(causes), ..Self::new(422, "Invalid", message) }
    }

    /// 403: a rule or an admission check forbids it.
    pub fn forbidden(what: Subject<'_>, why: &str) -> Self {
        let message = format!("{} is forbidden: {why}", what.quoted());
        Self { details: what.details(&[]), ..Self::new(403, "Forbidden", message) }
    }

    /// 400: it cannot be understood.
    pub fn bad_request(why: impl Into<String>) -> Self {
        Self::new(400, "BadRequest", why)
    }

    /// 401: who asks is not known.
    pub fn unauthorized() -> Self {
        Self::new(401, "Unauthorized", "Unauthorized")
    }

    /// 405: this resource does not do that.
    pub fn no_such_verb() -> Self {
        let message = "the server does not allow this method on the requested resource";
        Self::new(405, "MethodNotAllowed", message)
    }

    /// 406: no media type that the client takes can be sent.
    pub fn not_acceptable(why: impl Into<String>) -> Self {
        Self::new(406, "NotAcceptable", why)
    }

    /// 410: the revision is too old.
    pub fn expired(why: impl Into<String>) -> Self {
        Self::new(410, "Expired", why)
    }

    /// 413: too much.
    pub fn too_large(limit: usize) -> Self {
        let message = format!("the request's body is larger than {limit} bytes");
        Self::new(413, "RequestEntityTooLarge", message)
    }

    /// 415: the body's media type is not known.
    pub fn unsupported_media(why: impl Into<String>) -> Self {
        Self::new(415, "UnsupportedMediaType", why)
    }

    /// 429: not now, such as an eviction that a budget forbids.
    pub fn too_many_requests(why: impl Into<String>) -> Self {
        Self::new(429, "TooManyRequests", why)
    }

    /// 500: our own fault.
    pub fn internal(why: impl Into<String>) -> Self {
        Self::new(500, "InternalError", why)
    }

    /// 501: this server does not do that at all.
    pub fn not_implemented(why: impl Into<String>) -> Self {
        Self::new(501, "NotImplemented", why)
    }

    /// 504: what was waited for did not come, such as a revision.
    pub fn timeout(why: impl Into<String>) -> Self {
        Self::new(504, "Timeout", why)
    }

    /// The `Status` object.
    pub fn to_json(&self) -> Value {
        let mut status = json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": self.message, "reason": self.reason, "code": self.code,
        });
        if let (Some(map), false) = (status.as_object_mut(), self.details.is_null()) {
            map.insert("details".into(), self.details.clone());
        }
        status
    }
}
