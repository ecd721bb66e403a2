//! Whom a cluster believes, as everybody can read it: the ConfigMap `kubevirt-ca`.
//!
//! It has the cluster's own CAs, those that people have put into `kubevirt-external-ca`, as KubeVirt has
//! it, and those of its ClusterLinks, each for its own cluster alone.

use anyhow::{Context, Result, anyhow};
use api::keys;
use api::link::ClusterLink;
use channel::identity::{Credentials, Trust, linked, linked_of};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{Patch, PatchParams, PostParams};
use kube::runtime::reflector::Store;
use kube::runtime::watcher;
use kube::{Api, Client, ResourceExt};
use reconcile::kept::Keeper;
use reconcile::why;
use serde_json::json;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::watch;

/// The ConfigMap of those that are believed, as KubeVirt's.
pub const BUNDLE: &str = "kubevirt-ca";
/// The ConfigMap of other clusters' CAs, as KubeVirt's: what people put there is taken.
const EXTERNAL: &str = "kubevirt-external-ca";
const KEY: &str = "ca-bundle";
/// Annotation of the bundle: the clusters that are believed because they are linked.
const LINKED: &str = "godwit.dev/linked";
/// What could not be done is tried again after this.
const AGAIN: Duration = Duration::from_secs(2);
/// CAs end, though nothing changes.
const LOOK: Duration = Duration::from_secs(60);

/// Other clusters' CAs, as a cluster believes them.
pub struct Others {
    cluster: String,
    /// Their certificates, PEM.
    certificates: Vec<String>,
    /// The clusters among them that are linked.
    linked: BTreeSet<String>,
}

/// What other clusters' CAs follow from, kept by watches.
pub struct Sources {
    external: Store<ConfigMap>,
    links: Store<ClusterLink>,
}

impl Sources {
    /// Begins to keep them.
    pub fn open(keeper: &mut Keeper, client: &Client) -> Self {
        let maps: Api<ConfigMap> = Api::namespaced(client.clone(), api::NAMESPACE);
        let named = watcher::Config::default().fields(&format!("metadata.name={EXTERNAL}"));
        let external = keeper.keep(maps, named);
        let links =
            keeper.keep(Api::<ClusterLink>::all(client.clone()), watcher::Config::default());
        Self { external, links }
    }

    /// Waits until they are there.
    pub async fn ready(&self) {
        let Self { external, links } = self;
        reconcile::ready!(external, links);
    }

    /// What people have put among other clusters' CAs.
    pub fn external(&self) -> String {
        self.external.state().first().map(|map| bundle_of(map)).unwrap_or_default()
    }
}

impl Others {
    /// Nobody yet.
    pub fn none(cluster: &str) -> Self {
        let (certificates, linked) = Default::default();
        Self { cluster: cluster.into(), certificates, linked }
    }

    /// Believes again whom the cluster believed before; but those whose links have gone meanwhile. Ends once
    /// that is known: what is published without it would forget those whom people have named.
    pub async fn recall(&mut self, client: &Client, sources: &Sources) {
        let maps: Api<ConfigMap> = Api::namespaced(client.clone(), api::NAMESPACE);
        let before = loop {
            match maps.get_opt(BUNDLE).await {
                Ok(Some(before)) => break before,
                Ok(None) => return,
                Err(error) => {
                    tracing::warn!(
                        "ConfigMap {BUNDLE} cannot be read; trying again: {}",
                        why(&error)
                    );
                    tokio::time::sleep(AGAIN).await;
                }
            }
        };
        self.certificates = linked(&bundle_of(&before), &self.cluster, SystemTime::now());
        let were = before.annotations().get(LINKED).map(String::as_str).unwrap_or_default();
        self.linked = were.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect();
        self.believe(sources);
    }

    /// Believes linked clusters by what their links say of them, and no longer than they are linked; and
    /// those whom people have put among other clusters' CAs.
    pub fn believe(&mut self, sources: &Sources) {
        let now = SystemTime::now();
        let links = sources.links.state();
        let names: BTreeSet<String> = links.iter().map(|link| link.name_any()).collect();
        for cluster in self.linked.union(&names) {
            let theirs = linked_of(&self.certificates.concat(), cluster, now);
            self.certificates.retain(|one| !theirs.contains(one));
        }
        for link in links.iter().filter(|link| link.name_any() != self.cluster) {
            self.certificates.extend(linked_of(&link.spec.ca_bundle, &link.name_any(), now));
        }
        self.linked = names;
        let all = self.certificates.concat() + &sources.external();
        self.certificates = linked(&all, &self.cluster, now);
    }

    /// The certificates, PEM.
    pub fn pem(&self) -> String {
        self.certificates.concat()
    }

    /// Lets everybody have the bundle of all that are believed, and sees to it that there is a place for
    /// other clusters'.
    ///
    /// # Errors
    /// What the API answers.
    pub async fn publish(&self, client: &Client, bundle: &str) -> Result<()> {
        let maps: Api<ConfigMap> = Api::namespaced(client.clone(), api::NAMESPACE);
        let refused = |error| anyhow!("ConfigMap {}/{BUNDLE}: {}", api::NAMESPACE, why(&error));
        for (name, text) in [(EXTERNAL, ""), (BUNDLE, bundle)] {
            let map = json!({
                "apiVersion": "v1", "kind": "ConfigMap",
                "metadata": {"name": name}, "data": {KEY: text},
            });
            let made = serde_json::from_value(map)?;
            match maps.create(&PostParams::default(), &made).await {
                Err(kube::Error::Api(status)) if status.reason == "AlreadyExists" => {}
                other => other.map(|_| ()).map_err(refused)?,
            }
        }
        let linked = self.linked.iter().cloned().collect::<Vec<_>>().join(",");
        let notes = json!({keys::CLUSTER: self.cluster, LINKED: linked});
        let patch =
            Patch::Merge(json!({"metadata": {"annotations": notes}, "data": {KEY: bundle}}));
        maps.patch(BUNDLE, &PatchParams::default(), &patch).await.map_err(refused)?;
        Ok(())
    }
}

fn bundle_of(map: &ConfigMap) -> String {
    map.data.as_ref().and_then(|data| data.get(KEY).cloned()).unwrap_or_default()
}

/// Takes from other clusters' CAs what is believed by now, as KubeVirt does it. What was changed
/// meanwhile is left.
///
/// # Errors
/// What the API answers.
pub async fn take(client: &Client, text: &str) -> Result<()> {
    if text.trim().is_empty() {
        return Ok(());
    }
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), api::NAMESPACE);
    let test = json!([
        {"op": "test", "path": format!("/data/{KEY}"), "value": text},
        {"op": "replace", "path": format!("/data/{KEY}"), "value": ""},
    ]);
    let patch = Patch::<ConfigMap>::Json(serde_json::from_value(test)?);
    let taken = maps.patch(EXTERNAL, &PatchParams::default(), &patch).await;
    taken.map(|_| ()).map_err(|error| anyhow!("ConfigMap {EXTERNAL}: {}", why(&error)))
}

/// Keeps `kubevirt-ca` true of a cluster whose own CAs, PEM, do not change. Never ends by itself.
///
/// # Errors
/// When they are no CAs of one cluster.
pub async fn keep(client: Client, own: String) -> Result<()> {
    let mut trust = Trust::new();
    trust.add_pem(&own).context("the cluster's CA cannot be read")?;
    let cluster = trust.clusters().next().context("there is no CA")?.to_owned();
    let mut keeper = Keeper::default();
    let sources = Sources::open(&mut keeper, &client);
    sources.ready().await;
    let mut others = Others::none(&cluster);
    others.recall(&client, &sources).await;
    let mut published = String::new();
    loop {
        let text = sources.external();
        others.believe(&sources);
        let bundle = own.clone() + &others.pem();
        let kept = async {
            if bundle != published {
                others.publish(&client, &bundle).await?;
            }
            take(&client, &text).await
        };
        let pause = match kept.await {
            Ok(()) => LOOK,
            Err(error) => {
                tracing::warn!("whom to believe is not told: {error:#}");
                AGAIN
            }
        };
        published = bundle;
        drop(tokio::time::timeout(pause, keeper.bell.notified()).await);
    }
}

/// Credentials that also believe other clusters, as `kubevirt-ca` has them: for roles whose own say
/// nothing of those. Ends with the last receiver.
pub fn follow(client: &Client, own: watch::Receiver<Credentials>) -> watch::Receiver<Credentials> {
    let (sender, receiver) = watch::channel(own.borrow().clone());
    let client = client.clone();
    tokio::spawn(async move {
        let mut own = own;
        let mut keeper = Keeper::default();
        let maps: Api<ConfigMap> = Api::namespaced(client, api::NAMESPACE);
        let named = watcher::Config::default().fields(&format!("metadata.name={BUNDLE}"));
        let maps = keeper.keep(maps, named);
        loop {
            let mine = own.borrow_and_update().clone();
            let map: Option<Arc<ConfigMap>> = maps.state().first().cloned();
            match with(&mine, &map.map(|map| bundle_of(&map)).unwrap_or_default()) {
                Ok(both) => {
                    sender.send_if_modified(|known| known.replace(both));
                }
                Err(error) => tracing::warn!("whom to believe is not known: {error:#}"),
            }
            tokio::select! {
                () = keeper.bell.notified() => {}
                changed = own.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(LOOK) => {}
                () = sender.closed() => return,
            }
        }
    });
    receiver
}

/// Credentials with other clusters' CAs. N.B. of the own cluster those are believed that came with the
/// credentials, and no others.
fn with(own: &Credentials, bundle: &str) -> Result<Credentials> {
    let cluster = own.identity.id().cluster();
    let now = SystemTime::now();
    let mut all = vec![own.bundle().to_owned()];
    let known = linked(own.bundle(), cluster, now);
    all.extend(linked(bundle, cluster, now).into_iter().filter(|one| !known.contains(one)));
    Ok(Credentials::new(own.identity.clone(), &all.concat())?)
}

#[cfg(test)]
mod test {
    use super::*;
    use channel::identity::{Ca, Role, SpiffeId};

    #[test]
    fn what_the_bundle_says_of_the_own_cluster_is_not_believed() {
        let (east, west) = (Ca::create("east").unwrap(), Ca::create("west").unwrap());
        let forged = Ca::create("east").unwrap();
        let id = SpiffeId::new("east", Role::Handler, "one").unwrap();
        let identity = east.issue(&id, Duration::from_secs(60)).unwrap();
        let own = Credentials::new(identity, east.certificate_pem()).unwrap();
        let bundle = [&forged, &west, &west].map(Ca::certificate_pem).concat();
        let both = with(&own, &bundle).unwrap();
        assert_eq!(both.trust.clusters().collect::<Vec<_>>(), ["east", "west"]);
        assert_eq!(both.bundle().matches("BEGIN").count(), 2);
        // And the other way round once more: what is known is not there twice.
        let again = with(&both, &bundle).unwrap();
        assert_eq!(again.bundle(), both.bundle());
    }
}
