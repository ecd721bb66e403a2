//! A namespace that is deleted is emptied, and then goes.

use super::{all, kept, path_of, whenever};
use crate::api::Api;
use crate::local::Local;
use crate::meta;
use crate::status::Failure;
use http::Method;
use serde_json::{Value, json};

pub(super) async fn run(api: Api, account: Local) {
    let act = async || {
        let mut left = None;
        for namespace in all(&api, "namespaces") {
            let held = namespace["spec"]["finalizers"].as_array().is_some_and(|f| !f.is_empty());
            if meta::is_terminating(&namespace)
                && held
                && let Err(failure) = empty(&api, &account, &namespace).await
            {
                left = Some(failure);
            }
        }
        left.map_or(Ok(()), Err)
    };
    whenever(&api, "namespaces", &["namespaces", "pods"], act).await;
}

async fn empty(api: &Api, account: &Local, namespace: &Value) -> Result<(), Failure> {
    let name = meta::text(namespace, "name");
    let inside = |resource: &str| -> Vec<_> {
        let all = all(api, resource).into_iter();
        all.filter(|object| meta::text(object, "namespace") == name).collect()
    };
    let kept = kept(api);
    let namespaced = || kept.iter().filter(|(_, r)| r.namespaced);
    for (key, resource) in namespaced() {
        if inside(key).iter().any(|object| !meta::is_terminating(object)) {
            account.delete(&path_of(resource, name, ""), &json!({})).await?;
        }
    }
    let mut left = Vec::new();
    let mut finalizers = Vec::new();
    for (key, _) in namespaced() {
        let objects = inside(key);
        if !objects.is_empty() {
            left.push(format!("{key} has {} resource instances", objects.len()));
        }
        for object in objects {
            finalizers.extend(meta::finalizers(&object).into_iter().map(str::to_owned));
        }
    }
    let path = format!("/api/v1/namespaces/{name}");
    if !left.is_empty() {
        finalizers.sort();
        finalizers.dedup();
        tell(account, &path, namespace, &left, &finalizers).await?;
        return Err(Failure::timeout(format!("{name} is not empty yet: {}", left.join(", "))));
    }
    let mut next = namespace.clone();
    next["spec"]["finalizers"] = json!([]);
    account.send(Method::PUT, &format!("{path}/finalize"), "application/json", Some(&next)).await?;
    Ok(())
}

/// Says what a namespace waits for.
async fn tell(
    account: &Local,
    path: &str,
    namespace: &Value,
    left: &[String],
    finalizers: &[String],
) -> Result<(), Failure> {
    let condition = |kind: &str, reason: &str, message: String| {
        json!({
            "type": kind, "status": "True", "reason": reason, "message": message,
            "lastTransitionTime": meta::text(namespace, "deletionTimestamp"),
        })
    };
    let mut conditions = vec![condition(
        "NamespaceContentRemaining",
        "SomeResourcesRemain",
        format!("Some resources are remaining: {}", left.join(", ")),
    )];
    if !finalizers.is_empty() {
        conditions.push(condition(
            "NamespaceFinalizersRemaining",
            "SomeFinalizersRemain",
            format!(
                "Some content in the namespace has finalizers remaining: {}",
                finalizers.join(", ")
            ),
        ));
    }
    if namespace["status"]["conditions"] == json!(conditions) {
        return Ok(());
    }
    let patch = json!({"status": {"conditions": conditions}});
    account.merge(&format!("{path}/status"), &patch).await.map(|_| ())
}
