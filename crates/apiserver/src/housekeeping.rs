//! What Kubernetes' controller manager does for the API itself. Each controller looks at what is,
//! plans (pure), and acts through the API under an account of its own.

mod accounts;
mod crds;
mod events;
mod garbage;
mod namespaces;
mod protection;
mod quotas;
mod roles;

use crate::api::Api;
use crate::auth::User;
use crate::resource::Resource;
use crate::status::Failure;
use crate::store::{Object, Query};
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;

/// A controller that hears of nothing looks again after this.
const LOOK_AGAIN: Duration = Duration::from_secs(30);
/// Changes that come together are looked at together.
const GATHER: Duration = Duration::from_millis(200);
/// After a failure; doubled with each, up to [`LOOK_AGAIN`].
const RETRY: Duration = Duration::from_millis(200);

/// Starts all controllers.
pub fn start(api: &Api, authority: &str, tasks: &mut JoinSet<()>) {
    let account = |name: &str| api.as_user(User::new(&format!("system:{name}"), &[]));
    let manager = || account("kube-controller-manager");
    tasks.spawn(accounts::run(api.clone(), manager(), authority.to_owned()));
    tasks.spawn(crds::run(api.clone(), manager()));
    tasks.spawn(events::run(api.clone(), manager()));
    tasks.spawn(garbage::run(api.clone(), account("generic-garbage-collector")));
    tasks.spawn(namespaces::run(api.clone(), account("namespace-controller")));
    tasks.spawn(protection::run(api.clone(), manager()));
    tasks.spawn(quotas::run(api.clone(), manager()));
    tasks.spawn(roles::run(api.clone(), manager()));
}

/// All objects of a resource.
fn all(api: &Api, resource: &str) -> Vec<Arc<Value>> {
    let query = Query { resource, namespace: None, at: None, after: None, limit: usize::MAX };
    // Of the present, which is never too old.
    let list = api.store().list(&query).map(|list| list.objects).unwrap_or_default();
    list.into_iter().map(|(_, object): (_, Object)| object.body).collect()
}

/// Calls `act` now and whenever one of these resources changes. A failure is tried again.
async fn whenever<F, A>(api: &Api, who: &'static str, resources: &[&str], mut act: F)
where
    F: FnMut() -> A,
    A: Future<Output = Result<(), Failure>>,
{
    let mut pause = RETRY;
    loop {
        let from = api.store().revision();
        let wait = match act().await {
            Ok(()) => {
                pause = RETRY;
                LOOK_AGAIN
            }
            Err(failure) => {
                tracing::debug!(who, %failure, "to be tried again");
                pause = (pause * 2).min(LOOK_AGAIN);
                pause
            }
        };
        // A watch that is too old is a change.
        let mut changes = JoinSet::new();
        for resource in resources {
            if let Ok(mut watch) = api.store().watch(resource, from) {
                changes.spawn(async move {
                    // Either way it is time to look.
                    let _ = watch.next().await;
                });
            }
        }
        match changes.is_empty() {
            true => tokio::time::sleep(wait).await,
            // It is looked at again in any case.
            false => drop(tokio::time::timeout(wait, changes.join_next()).await),
        }
        tokio::time::sleep(GATHER).await;
    }
}

/// The path of an object, or of all of a namespace when the name is empty.
fn path_of(resource: &Resource, namespace: &str, name: &str) -> String {
    let root = match &*resource.group {
        "" => format!("/api/{}", resource.version),
        group => format!("/apis/{group}/{}", resource.version),
    };
    let place = match resource.namespaced && !namespace.is_empty() {
        true => format!("{root}/namespaces/{namespace}/{}", resource.plural),
        false => format!("{root}/{}", resource.plural),
    };
    if name.is_empty() { place } else { format!("{place}/{name}") }
}

/// One version of each resource that is kept, by its storage key.
fn kept(api: &Api) -> BTreeMap<String, Arc<Resource>> {
    let catalog = api.catalog();
    let stored = catalog.all().filter(|r| r.stored);
    stored.map(|r| (r.storage_key(), r.clone())).collect()
}
