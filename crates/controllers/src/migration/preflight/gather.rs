//! What a preflight looks at, asked of the API.

use super::{Disks, Facts};
use api::keys;
use api::kubevirt::Configuration;
use api::vmi::VirtualMachineInstance;
use jiff::Timestamp;
use kube::api::ListParams;
use kube::core::NamespaceResourceScope;
use kube::{Api, Client, Resource, ResourceExt};
use node::scheduler::snapshot::{Snapshot, has_ended, node_name};
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::Mutex;

/// What was looked at so long ago is looked at anew.
const FRESH: Duration = Duration::from_secs(2);

/// Nodes, pods and volumes, as they were a moment ago: of many moves that begin at once, each would have
/// to list them.
#[derive(Default)]
pub struct Lately(Mutex<Option<(Instant, Snapshot)>>);

impl Lately {
    async fn get(&self, client: &Client) -> kube::Result<Snapshot> {
        let mut seen = self.0.lock().await;
        if let Some((_, cluster)) = seen.as_ref().filter(|(at, _)| at.elapsed() < FRESH) {
            return Ok(cluster.clone());
        }
        let cluster = cluster(client).await?;
        *seen = Some((Instant::now(), cluster.clone()));
        Ok(cluster)
    }
}

/// All that there is to know of a move that is not begun.
///
/// # Errors
/// What the API answers.
pub async fn gather(
    client: &Client,
    lately: &Lately,
    vmi: VirtualMachineInstance,
    selector: BTreeMap<String, String>,
    disks: Disks,
    settings: Configuration,
) -> kube::Result<Facts> {
    let namespace = vmi.namespace().unwrap_or_default();
    let own = format!("{}={}", keys::MIGRATES, vmi.name_any());
    let migrations = Api::namespaced(client.clone(), &namespace);
    Ok(Facts {
        migrations: migrations.list(&ListParams::default().labels(&own)).await?.items,
        policies: all(client).await?,
        quotas: all_in(client, &namespace).await?,
        cluster: lately.get(client).await?,
        now: Timestamp::now(),
        vmi,
        selector,
        disks,
        settings,
    })
}

/// What a scheduler would see.
async fn cluster(client: &Client) -> kube::Result<Snapshot> {
    let mut pods = all(client).await?;
    pods.retain(|pod| node_name(pod).is_some() && !has_ended(pod));
    Ok(Snapshot {
        nodes: shared(all(client).await?),
        pods: shared(pods),
        namespaces: shared(all(client).await?),
        claims: shared(all(client).await?),
        volumes: shared(all(client).await?),
        classes: shared(all(client).await?),
    })
}

fn shared<K>(all: Vec<K>) -> Vec<Arc<K>> {
    all.into_iter().map(Arc::new).collect()
}

async fn all<K>(client: &Client) -> kube::Result<Vec<K>>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned,
{
    Ok(Api::all(client.clone()).list(&ListParams::default()).await?.items)
}

async fn all_in<K>(client: &Client, namespace: &str) -> kube::Result<Vec<K>>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
        + Clone
        + Debug
        + DeserializeOwned,
{
    Ok(Api::namespaced(client.clone(), namespace).list(&ListParams::default()).await?.items)
}
