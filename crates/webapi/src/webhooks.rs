//! Admission for API servers that are not ours: what they ask (`AdmissionReview`, v1) is judged as
//! in process.
//!
//! ```text
//! POST /mutate   -> fill_in -> what it has changed, as a JSON patch
//! POST /validate -> judge   -> allowed, with warnings; or not, with the status that clients see
//! ```

use crate::is_name;
use apiserver::auth::User;
use apiserver::extension::{Extension, Review};
use apiserver::meta;
use apiserver::request::Verb;
use apiserver::status::Failure;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde_json::{Value, json};

const VERSION: &str = "admission.k8s.io/v1";
const KIND: &str = "AdmissionReview";
/// Bytes of a review, at most: two objects, each as large as the API takes them, and some more.
pub const MOST: usize = 8 << 20;

/// What an API server asks: only what is acted on.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Asked {
    uid: String,
    resource: Resource,
    #[serde(default)]
    sub_resource: String,
    #[serde(default)]
    namespace: String,
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    dry_run: Option<bool>,
    operation: String,
    user_info: Value,
    #[serde(default)]
    object: Value,
    #[serde(default)]
    old_object: Value,
}

#[derive(Deserialize)]
struct Resource {
    group: String,
    resource: String,
}

impl Asked {
    /// 400 when it is nothing that an API server asks.
    fn parse(sent: &[u8]) -> Result<Self, Failure> {
        let wrong = |why: &dyn std::fmt::Display| {
            Failure::bad_request(format!(
                "the body is no {KIND} of {VERSION}, as API servers send it: {why}"
            ))
        };
        let mut review: Value = serde_json::from_slice(sent).map_err(|error| wrong(&error))?;
        if review["apiVersion"] != VERSION || review["kind"] != KIND {
            return Err(wrong(&"its apiVersion and kind are others"));
        }
        // A list would be taken for the fields in their order.
        if !review["request"].is_object() {
            return Err(wrong(&"it has no request"));
        }
        let asked: Self =
            serde_json::from_value(review["request"].take()).map_err(|error| wrong(&error))?;
        // What is no name would lead our own requests elsewhere.
        if !asked.namespace.is_empty() && !is_name(&asked.namespace) {
            return Err(wrong(&"its namespace is no name"));
        }
        Ok(asked)
    }

    fn verb(&self) -> Result<Verb, Failure> {
        match &*self.operation {
            "CREATE" => Ok(Verb::Create),
            "UPDATE" => Ok(Verb::Update),
            "DELETE" => Ok(Verb::Delete),
            other => Err(Failure::bad_request(format!(
                "only CREATE, UPDATE and DELETE are judged, not {other:?}"
            ))),
        }
    }

    fn review<'a>(&'a self, verb: Verb, user: &'a User) -> Review<'a> {
        Review {
            verb,
            group: &self.resource.group,
            resource: &self.resource.resource,
            subresource: &self.sub_resource,
            namespace: &self.namespace,
            name: self.name.as_deref().unwrap_or_default(),
            dry_run: self.dry_run == Some(true),
            user,
            old: Some(&self.old_object).filter(|old| !old.is_null()),
        }
    }

    fn object(&self) -> Option<&Value> {
        Some(&self.object).filter(|object| !object.is_null())
    }
}

/// What the API server is told: an answer, or why it gets no other.
fn told(uid: &str, answer: Result<Value, Failure>) -> Value {
    let mut response = match answer {
        Ok(more) => more,
        Err(failure) => json!({"status": failure.to_json()}),
    };
    response["uid"] = uid.into();
    response["allowed"] = response.get("status").is_none().into();
    json!({"apiVersion": VERSION, "kind": KIND, "response": response})
}

/// Answers what is to be filled in.
///
/// # Errors
/// 400 when it is no review.
pub async fn mutate(extension: &impl Extension, sent: &[u8]) -> Result<Value, Failure> {
    let asked = Asked::parse(sent)?;
    Ok(told(&asked.uid, patch(extension, &asked).await))
}

async fn patch(extension: &impl Extension, asked: &Asked) -> Result<Value, Failure> {
    let Some(object) = asked.object() else { return Ok(json!({})) };
    let user = User::from_json(&asked.user_info);
    let addressed = addressed(object, asked);
    let mut filled = addressed.clone();
    extension.fill_in(asked.review(asked.verb()?, &user), &mut filled).await?;
    let patch = json_patch::diff(&addressed, &filled);
    if patch.0.is_empty() {
        return Ok(json!({}));
    }
    let text = json!(patch).to_string();
    Ok(json!({"patchType": "JSONPatch", "patch": STANDARD.encode(text)}))
}

/// An object with the address that older API servers give it only after their webhooks: what is made
/// of it must differ from object to object.
fn addressed(object: &Value, asked: &Asked) -> Value {
    let mut object = object.clone();
    for (field, value) in [("namespace", &asked.namespace), ("name", &asked.uid)] {
        if meta::text(&object, field).is_empty() {
            meta::set(&mut object, field, value.as_str().into());
        }
    }
    object
}

/// Answers whether it is kept.
///
/// # Errors
/// 400 when it is no review.
pub async fn validate(extension: &impl Extension, sent: &[u8]) -> Result<Value, Failure> {
    let asked = Asked::parse(sent)?;
    Ok(told(&asked.uid, judgement(extension, &asked).await))
}

async fn judgement(extension: &impl Extension, asked: &Asked) -> Result<Value, Failure> {
    let user = User::from_json(&asked.user_info);
    let review = asked.review(asked.verb()?, &user);
    let warnings = extension.judge(review, asked.object()).await?;
    Ok(match warnings.is_empty() {
        true => json!({}),
        false => json!({"warnings": warnings}),
    })
}
