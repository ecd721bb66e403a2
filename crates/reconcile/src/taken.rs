//! What a VM takes from its instancetype and its preference, as the API has it now: for those who keep
//! neither by watches.

use api::instancetype::{GROUP, Kind, Taken, VERSION, wanted};
use api::vm;
use kube::Client;
use serde_json::Value;

/// All that a VM takes.
///
/// # Errors
/// Those of the API, but for what is not there.
pub async fn taken(
    client: &Client,
    namespace: &str,
    spec: &vm::Spec,
    status: Option<&vm::Status>,
) -> kube::Result<Vec<Taken>> {
    let mut all = Vec::new();
    for one in wanted(spec, status) {
        let held = match &one.revision {
            Some(name) => revision(client, namespace, name).await?,
            None => None,
        };
        let live = match held {
            Some(_) => None,
            None => object(client, one.kind, namespace, &one.name).await?,
        };
        all.push(one.found(held.map(|mut revision| revision["data"].take()), live));
    }
    Ok(all)
}

/// An instancetype or a preference.
///
/// # Errors
/// Those of the API, but for one that is not there.
pub async fn object(
    client: &Client,
    kind: &Kind,
    namespace: &str,
    name: &str,
) -> kube::Result<Option<Value>> {
    let place = if kind.namespaced { format!("namespaces/{namespace}/") } else { String::new() };
    get(client, &format!("/apis/{GROUP}/{VERSION}/{place}{}", kind.plural), name).await
}

/// A ControllerRevision.
///
/// # Errors
/// Those of the API, but for one that is not there.
pub async fn revision(client: &Client, namespace: &str, name: &str) -> kube::Result<Option<Value>> {
    get(client, &format!("/apis/apps/v1/namespaces/{namespace}/controllerrevisions"), name).await
}

async fn get(client: &Client, collection: &str, name: &str) -> kube::Result<Option<Value>> {
    // What is no name would lead elsewhere.
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.';
    if name.is_empty() || !name.bytes().all(plain) || name.starts_with('.') {
        return Ok(None);
    }
    let request = http::Request::get(format!("{collection}/{name}")).body(Vec::new());
    match client.request(request.map_err(kube::Error::HttpError)?).await {
        Ok(object) => Ok(Some(object)),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(None),
        Err(error) => Err(error),
    }
}
