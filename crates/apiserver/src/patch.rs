//! Patches of an object: JSON patch (RFC 6902), JSON merge patch (RFC 7386), strategic merge patch,
//! and what is to be applied by the server.

mod strategic;

use crate::decode;
use crate::schema::Schema;
use crate::status::Failure;
use serde_json::Value;

/// Operations of a JSON patch, at most.
const OPERATIONS: usize = 10_000;

/// A patch that was read.
#[derive(Debug, Clone, PartialEq)]
pub enum Patch {
    /// `application/json-patch+json`.
    Json(json_patch::Patch),
    /// `application/merge-patch+json`.
    Merge(Value),
    /// `application/strategic-merge-patch+json`.
    Strategic(Value),
    /// `application/apply-patch+yaml`.
    Apply(Value),
}

impl Patch {
    /// Reads a patch of a media type.
    ///
    /// # Errors
    /// 415 for another media type, 400 for what is no patch.
    pub fn parse(media: &str, body: &[u8]) -> Result<Self, Failure> {
        let media = media.split(';').next().unwrap_or_default().trim();
        match media {
            "application/json-patch+json" => {
                let value = decode::json(body)?.value;
                let count = value.as_array().map_or(0, Vec::len);
                if count > OPERATIONS {
                    return Err(Failure::too_large(OPERATIONS));
                }
                let patch = serde_json::from_value(value)
                    .map_err(|e| Failure::bad_request(format!("error decoding patch: {e}")))?;
                Ok(Self::Json(patch))
            }
            "application/merge-patch+json" => Ok(Self::Merge(object(decode::json(body)?.value)?)),
            "application/strategic-merge-patch+json" => {
                Ok(Self::Strategic(object(decode::json(body)?.value)?))
            }
            "application/apply-patch+yaml" => {
                let applied = object(decode::yaml(body)?.value)?;
                if applied["metadata"]["managedFields"].as_array().is_some_and(|m| !m.is_empty()) {
                    return Err(Failure::bad_request("metadata.managedFields must be nil"));
                }
                Ok(Self::Apply(applied))
            }
            other => Err(Failure::unsupported_media(format!(
                "the body of the request was in an unknown format - accepted media types include: \
                 application/json-patch+json, application/merge-patch+json, \
                 application/strategic-merge-patch+json, application/apply-patch+yaml; it was {other}"
            ))),
        }
    }

    /// What an object becomes. What is to be applied becomes itself.
    ///
    /// # Errors
    /// 422 when the patch does not fit the object.
    pub fn apply_to(&self, object: &Value, schema: &Schema) -> Result<Value, Failure> {
        let mut next = object.clone();
        match self {
            Self::Json(patch) => {
                for operation in &patch.0 {
                    apply(&mut next, operation).map_err(|error| misfit(&error.to_string()))?;
                }
            }
            Self::Merge(patch) => json_patch::merge(&mut next, patch),
            Self::Strategic(patch) => next = strategic::merge(object, patch, schema)?,
            Self::Apply(applied) => next.clone_from(applied),
        }
        match next.is_object() {
            true => Ok(next),
            false => Err(misfit("what is left is no object")),
        }
    }
}

fn object(value: Value) -> Result<Value, Failure> {
    match value.is_object() {
        true => Ok(value),
        false => Err(Failure::bad_request("error decoding patch: it is not an object")),
    }
}

fn misfit(why: &str) -> Failure {
    Failure {
        code: 422,
        reason: "Invalid",
        message: format!("the server rejected our request due to an error in our request: {why}"),
        details: Value::Null,
    }
}

/// Applies one operation of a JSON patch. What is not there passes a test for null, as it does in
/// Kubernetes' own library: kube-rs's finalizers depend on it.
fn apply(
    object: &mut Value,
    operation: &json_patch::PatchOperation,
) -> Result<(), json_patch::PatchError> {
    if let json_patch::PatchOperation::Test(test) = operation
        && test.value.is_null()
        && test.path.resolve(object).is_err()
    {
        return Ok(());
    }
    json_patch::patch(object, std::slice::from_ref(operation))
}
