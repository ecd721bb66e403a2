//! What would become of a move, before it is made.

use super::{Options, Target};
use crate::{Plan, failure};
use apiserver::body::{self, Answer};
use apiserver::status::Failure;
use controllers::migration::preflight::{Facts, Fault, check};
use http::StatusCode;
use jiff::Timestamp;
use kube::api::ListParams;
use kube::{Api, Client, Resource};
use node::scheduler::snapshot::{Snapshot, has_ended, node_name};
use serde::de::DeserializeOwned;
use serde_json::json;
use std::fmt::Debug;
use std::sync::Arc;

/// Checks all that would make it fail; measures the guest and the way, and tells what it would take.
pub async fn look(target: &Target<'_>, options: &Options) -> Result<Answer, Failure> {
    target.vm().await?;
    let vmi = target.vmi().await?;
    let source = vmi.status.as_ref().and_then(|status| status.node_name.clone());
    let client = &target.web.client;
    let facts = Facts {
        migrations: all_in(client, target.namespace).await?,
        selector: options.added_node_selector.clone(),
        class: options.storage_class.clone(),
        settings: target.web.settings.get().await?.configuration.clone(),
        policies: all(client).await?,
        quotas: all_in(client, target.namespace).await?,
        cluster: cluster(client, target.namespace).await?,
        now: Timestamp::now(),
        vmi,
    };
    let mut found = check(&facts);
    let mut outlook = None;
    if let (Some(to), Some(source)) = (&found.node, source) {
        let plan = Plan {
            source: &source,
            namespace: target.namespace,
            name: target.name,
            node: to,
            all: facts.class.is_some(),
            options: &found.options,
        };
        match target.web.guests.forecast(plan).await {
            Ok(told) => outlook = Some(told),
            Err(Failure { message, .. }) => {
                found.faults.push(Fault { reason: "NotMeasured".into(), message });
            }
        }
    }
    let found = json!({
        "node": found.node, "policy": found.policy, "options": found.options,
        "faults": found.faults, "outlook": outlook,
    });
    Ok(body::json(StatusCode::OK, &found))
}

/// What a scheduler would see; of other namespaces' claims nothing matters here.
async fn cluster(client: &Client, namespace: &str) -> Result<Snapshot, Failure> {
    let mut pods = all(client).await?;
    pods.retain(|pod| node_name(pod).is_some() && !has_ended(pod));
    Ok(Snapshot {
        nodes: shared(all(client).await?),
        pods: shared(pods),
        namespaces: shared(all(client).await?),
        claims: shared(all_in(client, namespace).await?),
        volumes: shared(all(client).await?),
        classes: shared(all(client).await?),
    })
}

fn shared<K>(all: Vec<K>) -> Vec<Arc<K>> {
    all.into_iter().map(Arc::new).collect()
}

async fn all<K>(client: &Client) -> Result<Vec<K>, Failure>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned,
{
    list(Api::all(client.clone())).await
}

async fn all_in<K>(client: &Client, namespace: &str) -> Result<Vec<K>, Failure>
where
    K: Resource<DynamicType = (), Scope = kube::core::NamespaceResourceScope>
        + Clone
        + Debug
        + DeserializeOwned,
{
    list(Api::namespaced(client.clone(), namespace)).await
}

async fn list<K>(api: Api<K>) -> Result<Vec<K>, Failure>
where
    K: Clone + Debug + DeserializeOwned,
{
    Ok(api.list(&ListParams::default()).await.map_err(failure)?.items)
}
