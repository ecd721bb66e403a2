//! Who asks, and whether the cluster lets them do something: by its own answer.

use crate::failure;
use apiserver::auth::{Attributes, MASTERS, User, rbac};
use apiserver::status::Failure;
use http::HeaderMap;
use kube::Client;
use serde_json::{Value, json};

/// Asks the cluster whether a user may do something.
///
/// # Errors
/// 403 when they may not, and the API's.
pub async fn permit(client: &Client, user: &User, what: &Attributes) -> Result<(), Failure> {
    refusal(client, user, what).await?.map_or(Ok(()), Err)
}

/// Asks the cluster what it would refuse a user with; None: it would not.
///
/// # Errors
/// The API's. N.B. that this may not ask is one of them, and no answer.
pub async fn refusal(
    client: &Client,
    user: &User,
    what: &Attributes,
) -> Result<Option<Failure>, Failure> {
    if user.is_in(MASTERS) {
        return Ok(None);
    }
    let path = "/apis/authorization.k8s.io/v1/subjectaccessreviews";
    let answer = ask(client, path, &question(user, what)).await?;
    let status = &answer["status"];
    let allowed = status["allowed"] == true && status["denied"] != true;
    let reason = status["reason"].as_str().unwrap_or_default();
    Ok((!allowed).then(|| rbac::denied(user, what, reason)))
}

/// The token that a request has.
pub fn token(headers: &HeaderMap) -> Option<&str> {
    let given = headers.get("Authorization")?.to_str().ok()?;
    given.strip_prefix("Bearer ").filter(|token| !token.is_empty())
}

/// Asks the cluster whose token it is.
///
/// # Errors
/// 401 when it is nobody's, and the API's.
pub async fn authenticate(client: &Client, token: &str) -> Result<User, Failure> {
    let review = json!({
        "apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": token},
    });
    let path = "/apis/authentication.k8s.io/v1/tokenreviews";
    let answer = ask(client, path, &review).await?;
    let status = &answer["status"];
    match status["authenticated"] == true {
        true => Ok(User::from_json(&status["user"])),
        false => Err(Failure::unauthorized()),
    }
}

async fn ask(client: &Client, path: &str, review: &Value) -> Result<Value, Failure> {
    let request = http::Request::post(path)
        .header("Content-Type", "application/json")
        .body(review.to_string().into_bytes())
        .map_err(|error| Failure::internal(error.to_string()))?;
    client.request(request).await.map_err(failure)
}

fn question(user: &User, what: &Attributes) -> Value {
    let mut spec = json!({
        "user": user.name, "uid": user.uid, "groups": user.groups, "extra": user.extra,
    });
    if what.path.is_empty() {
        spec["resourceAttributes"] = json!({
            "verb": what.verb, "group": what.group, "version": what.version,
            "resource": what.resource, "subresource": what.subresource,
            "namespace": what.namespace, "name": what.name,
        });
    } else {
        spec["nonResourceAttributes"] = json!({"verb": what.verb, "path": what.path});
    }
    json!({
        "apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": spec,
    })
}
