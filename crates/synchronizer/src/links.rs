//! Links to other clusters: each keeps the other's CAs and address true, through every rotation.

use crate::join;
use crate::wire::{self, Ask, Told};
use crate::world::World;
use api::conditions::{self, Condition, moment};
use api::link::{ClusterLink, Status};
use channel::identity::{linked_of, soonest_end};
use jiff::Timestamp;
use kube::api::{Patch, PatchParams};
use kube::{Api, ResourceExt};
use reconcile::events::why;
use serde_json::json;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::task::{AbortHandle, JoinSet};

/// How often the other cluster is told and asked, though nothing has changed here: its CAs are out for
/// some time before they sign.
const OFTEN: Duration = Duration::from_secs(10);
/// The condition that it answers.
const READY: &str = "Ready";
/// A CA that ends so soon is warned of.
const SOON: Duration = Duration::from_secs(24 * 3600);

/// Looks after all of them. Never ends by itself.
pub async fn run(world: Arc<World>) {
    let mut changes = world.changes.clone();
    let mut tasks = JoinSet::new();
    let mut links: HashMap<String, AbortHandle> = HashMap::new();
    loop {
        while tasks.try_join_next().is_some() {}
        let names: Vec<String> = world.links.state().iter().map(|link| link.name_any()).collect();
        links.retain(|name, task| {
            let stays = names.contains(name);
            if !stays {
                task.abort();
            }
            stays
        });
        for name in names {
            let world = Arc::clone(&world);
            links
                .entry(name.clone())
                .or_insert_with(|| tasks.spawn(async move { keep(&world, &name).await }));
        }
        // Its sender lives as long as the watches do.
        if changes.changed().await.is_err() {
            return;
        }
    }
}

/// Keeps one link true.
async fn keep(world: &World, name: &str) {
    let mut credentials = world.credentials.clone();
    loop {
        let Some(link) = world.link(name) else { return };
        let mut said = exchange(world, name, &link).await;
        if said.is_err() {
            // It may have invited this cluster, and not know it yet.
            match join::take_up(world, &link).await {
                Ok(()) => said = exchange(world, name, &link).await,
                Err(Some(why)) => said = Err(format!("it was not joined: {why}")),
                Err(None) => {}
            }
        }
        if let Err(why) = &said {
            tracing::debug!(cluster = name, "{why}");
        }
        show(world, &link, said).await;
        // What is believed here may have changed.
        drop(tokio::time::timeout(OFTEN, credentials.changed()).await);
    }
}

/// Tells the other cluster this one's CAs and address, and hears its.
async fn exchange(world: &World, name: &str, link: &ClusterLink) -> Result<(), String> {
    let credentials = world.credentials.borrow().clone();
    let ask = Ask::Trust { bundle: own(world), address: world.address() };
    let mut last = "it does not say where it is found".to_owned();
    for address in &link.spec.addresses {
        match wire::ask(&credentials, address, Some(name), &ask).await {
            Ok((_, Told::Trust { bundle, address })) => {
                return hear(world, name, &bundle, &address).await;
            }
            Ok((_, Told::Refused { why } | Told::Unknown { why })) => last = why,
            Ok(_) => last = format!("{address}: it answers what was not asked"),
            Err(why) => last = why,
        }
    }
    Err(last)
}

/// The certificates of this cluster's own CAs.
pub fn own(world: &World) -> String {
    let bundle = world.credentials.borrow().bundle().to_owned();
    linked_of(&bundle, &world.cluster(), SystemTime::now()).concat()
}

/// Takes what another cluster says of itself, if there is a link to it.
///
/// # Errors
/// Why it is not taken, for people.
pub async fn hear(world: &World, cluster: &str, bundle: &str, address: &str) -> Result<(), String> {
    let Some(link) = world.link(cluster) else {
        return Err(format!("cluster {} has no link to cluster {cluster}", world.cluster()));
    };
    // N.B. of that cluster alone, whatever else it has sent.
    let bundle = linked_of(bundle, cluster, SystemTime::now()).concat();
    let mut addresses = link.spec.addresses.clone();
    addresses.retain(|known| known != address);
    addresses.insert(0, address.to_owned());
    addresses.truncate(4);
    if bundle.is_empty() || (&bundle, &addresses) == (&link.spec.ca_bundle, &link.spec.addresses) {
        return Ok(());
    }
    let links: Api<ClusterLink> = Api::all(world.client.clone());
    let patch = Patch::Merge(json!({"spec": {"caBundle": bundle, "addresses": addresses}}));
    let patched = links.patch(cluster, &PatchParams::default(), &patch).await;
    patched.map(|_| ()).map_err(|error| format!("link {cluster}: {}", why(&error)))
}

/// Shows how a link is.
async fn show(world: &World, link: &ClusterLink, said: Result<(), String>) {
    let old = link.status.clone().unwrap_or_default();
    let now = Timestamp::now();
    let expires = soonest_end(&link.spec.ca_bundle);
    let ends_soon =
        expires.is_some_and(|at| at.duration_since(SystemTime::now()).unwrap_or_default() < SOON);
    let condition = match said {
        Ok(()) => Condition::new(READY, true, "Answers", "it answers, and believes this cluster"),
        Err(why) if ends_soon => {
            let why =
                format!("{why}; what is known of its CAs ends within a day: link it anew then");
            Condition::new(READY, false, "NotHeardOf", &why)
        }
        Err(why) => Condition::new(READY, false, "NotHeardOf", &why),
    };
    let expires = expires.and_then(|at| Timestamp::try_from(at).ok()).map(moment);
    let conditions = conditions::merge(&old.conditions, vec![condition], &[], now);
    let new = Status { conditions, expires };
    if new == old {
        return;
    }
    let links: Api<ClusterLink> = Api::all(world.client.clone());
    let patch = Patch::Merge(json!({"status": new}));
    let shown = links.patch_status(&link.name_any(), &PatchParams::default(), &patch).await;
    if let Err(error) = shown {
        tracing::debug!(link = link.name_any(), "its state is not shown: {}", why(&error));
    }
}
