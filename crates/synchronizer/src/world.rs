//! What a synchronizer looks at, kept by watches; and what it writes.

use crate::ground::Ground;
use crate::halves::{self, Facts};
use crate::place::Wanted;
use crate::wire::fingerprint;
use crate::{Advertise, Config};
use api::keys;
use api::kubevirt::{self, Configuration, KubeVirt};
use api::link::ClusterLink;
use api::migration::{Half, Phase, Side, VirtualMachineInstanceMigration as Migration};
use api::owner::OwnerRecord;
use api::relocation::VirtualMachineMove;
use api::vmi::VirtualMachineInstance;
use channel::identity::{Credentials, linked_of};
use k8s_openapi::api::core::v1::{Namespace, Node, Service};
use k8s_openapi::api::storage::v1::StorageClass;
use kube::api::{Patch, PatchParams};
use kube::runtime::reflector::{ObjectRef, Store};
use kube::runtime::watcher;
use kube::{Api, Client, ResourceExt};
use reconcile::events::why;
use reconcile::kept::Keeper;
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::watch;

/// Which clusters a namespace takes guests from and sends them to, by their ids with commas between;
/// a namespace that does not say it does with all that are believed.
const PEERS: &str = "godwit.dev/peers";
/// What could not be written is written again after this.
const AGAIN: Duration = Duration::from_secs(2);

/// All that is kept.
pub struct World {
    pub client: Client,
    /// Where others find this synchronizer.
    address: Mutex<String>,
    pub credentials: watch::Receiver<Credentials>,
    pub ground: Arc<dyn Ground>,
    pub migrations: Store<Migration>,
    vmis: Store<VirtualMachineInstance>,
    pub owners: Store<OwnerRecord>,
    nodes: Store<Node>,
    namespaces: Store<Namespace>,
    settings: Store<KubeVirt>,
    pub links: Store<ClusterLink>,
    pub moves: Store<VirtualMachineMove>,
    classes: Store<StorageClass>,
    /// The Service that says where this synchronizer is found, if one does.
    service: Option<Store<Service>>,
    /// Counts changes of any of these.
    pub changes: watch::Receiver<u64>,
    /// When the other side of a migration was last heard of, by its uid.
    heard: Mutex<HashMap<String, Instant>>,
}

impl World {
    /// Begins to keep it.
    pub fn open(client: Client, config: &Config) -> (Self, Keeper) {
        let (sender, changes) = watch::channel(0_u64);
        let mut keeper = Keeper::default();
        let all = watcher::Config::default;
        let ring = || {
            let sender = sender.clone();
            move || sender.send_modify(|count| *count += 1)
        };
        macro_rules! keep {
            () => {{
                let ring = ring();
                keeper.keep_and(Api::all(client.clone()), all(), move |_| ring())
            }};
        }
        let service = match &config.advertise {
            Advertise::Service(name) => {
                let ring = ring();
                let services = Api::namespaced(client.clone(), api::NAMESPACE);
                let named = all().fields(&format!("metadata.name={name}"));
                Some(keeper.keep_and(services, named, move |_| ring()))
            }
            Advertise::Here | Advertise::At(_) => None,
        };
        let world = Self {
            service,
            migrations: keep!(),
            vmis: keep!(),
            owners: keep!(),
            nodes: keep!(),
            namespaces: keep!(),
            settings: keep!(),
            links: keep!(),
            moves: keep!(),
            classes: keep!(),
            client,
            address: Mutex::default(),
            credentials: config.credentials.clone(),
            ground: Arc::clone(&config.ground),
            changes,
            heard: Mutex::default(),
        };
        (world, keeper)
    }

    /// Waits until all of it is there.
    pub async fn ready(&self) {
        let Self { migrations, vmis, owners, nodes, namespaces, .. } = self;
        let Self { settings, links, moves, classes, .. } = self;
        reconcile::ready!(migrations, vmis, owners, nodes, namespaces, settings, links);
        reconcile::ready!(moves, classes);
        if let Some(service) = &self.service {
            reconcile::ready!(service);
        }
    }

    /// Where the settings want a synchronizer. None: they want none.
    pub fn wanted(&self) -> Option<Wanted> {
        let settings = kubevirt::foremost(self.settings.state())?;
        let port = settings.spec.synchronizer()?;
        Some(Wanted { port, network: settings.spec.configuration.migrations.network.clone() })
    }

    /// The Service that says where this synchronizer is found.
    pub fn service(&self) -> Option<Arc<Service>> {
        self.service.as_ref()?.state().first().cloned()
    }

    /// The link to a cluster.
    pub fn link(&self, cluster: &str) -> Option<Arc<ClusterLink>> {
        self.links.get(&ObjectRef::new(cluster))
    }

    /// Where a cluster's synchronizer is found, as its link says, and as it told itself by migrations.
    pub fn addresses(&self, cluster: &str) -> Vec<String> {
        let mut all =
            self.link(cluster).map(|link| link.spec.addresses.clone()).unwrap_or_default();
        for migration in self.migrations.state() {
            let half =
                migration.status.as_ref().and_then(|status| status.peer.as_ref()?.half.clone());
            let Some(half) = half.filter(|half| half.cluster == cluster) else { continue };
            let named = migration.spec.send_to.as_ref().map(|to| to.connect_url.clone());
            for address in half.address.into_iter().chain(named) {
                if !all.contains(&address) {
                    all.push(address);
                }
            }
        }
        all
    }

    /// Where this synchronizer is found.
    pub fn address(&self) -> String {
        self.address.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Says where this synchronizer is found from now on.
    pub fn be_at(&self, address: &str) {
        *self.address.lock().unwrap_or_else(PoisonError::into_inner) = address.to_owned();
    }

    /// Says in the settings' status where the synchronizer is found, or that there is none.
    pub async fn publish(&self, address: Option<&str>) {
        let wanted: Vec<String> = address.into_iter().map(str::to_owned).collect();
        for settings in self.settings.state() {
            let said = settings.status.as_ref().map(|s| s.synchronization_addresses.clone());
            if said.unwrap_or_default() == wanted {
                continue;
            }
            let api: Api<KubeVirt> =
                Api::namespaced(self.client.clone(), &settings.namespace().unwrap_or_default());
            let patch = json!({"status": {"synchronizationAddresses": wanted}});
            let patch = Patch::Merge(&patch);
            let name = settings.name_any();
            if let Err(error) = api.patch_status(&name, &PatchParams::default(), &patch).await {
                tracing::warn!("where the synchronizer is found is not told: {}", why(&error));
                tokio::time::sleep(AGAIN).await;
            }
        }
    }

    /// The id of this cluster.
    pub fn cluster(&self) -> String {
        self.credentials.borrow().identity.id().cluster().to_owned()
    }

    /// The migration of a uid.
    pub fn migration(&self, uid: &str) -> Option<Arc<Migration>> {
        self.migrations.find(|migration| migration.uid().as_deref() == Some(uid))
    }

    /// The half that a migration is of a migration between two VMIs.
    pub fn half(&self, migration: &Migration) -> Option<(Side, Half)> {
        let namespace = migration.namespace().unwrap_or_default();
        let name = &migration.spec.vmi_name;
        let vmi = self.vmis.get(&ObjectRef::new(name).within(&namespace));
        let owner = self.owners.get(&ObjectRef::new(name).within(&namespace));
        let settings = self.configuration();
        halves::half(&Facts {
            cluster: &self.cluster(),
            address: &self.address(),
            migration,
            vmi: vmi.as_deref(),
            owner: owner.as_deref(),
            node: &|name| self.nodes.get(&ObjectRef::new(name)),
            settings: &settings,
        })
    }

    /// The node on which a VMI's guest runs.
    pub fn node_of(&self, namespace: &str, name: &str) -> Option<String> {
        let vmi = self.vmis.get(&ObjectRef::new(name).within(namespace))?;
        vmi.status.as_ref()?.node_name.clone()
    }

    /// What a node must have for a guest.
    pub fn selectors(&self, vmi: &VirtualMachineInstance) -> BTreeMap<String, String> {
        let node = vmi.status.as_ref().and_then(|status| status.node_name.clone());
        let node = node.and_then(|name| self.nodes.get(&ObjectRef::new(&name)));
        halves::selectors(vmi, node.as_deref(), &self.configuration())
    }

    pub fn configuration(&self) -> Configuration {
        let settings = kubevirt::foremost(self.settings.state());
        settings.map(|settings| settings.spec.configuration.clone()).unwrap_or_default()
    }

    /// Whether there is a namespace.
    pub fn has_namespace(&self, name: &str) -> bool {
        self.namespaces.get(&ObjectRef::new(name)).is_some()
    }

    /// Whether there is a class of storage.
    pub fn has_class(&self, name: &str) -> bool {
        self.classes.get(&ObjectRef::new(name)).is_some()
    }

    /// The labels among these that no node has which takes guests.
    pub fn lacking<'a>(&self, labels: &'a BTreeMap<String, String>) -> Vec<&'a str> {
        let mut nodes = self.nodes.state();
        nodes.retain(|node| node.labels().get(keys::SCHEDULABLE).is_some_and(|is| is == "true"));
        let has = |(name, value): &(&String, &String)| {
            nodes.iter().any(|node| node.labels().get(*name) == Some(value))
        };
        labels.iter().filter(|label| !has(label)).map(|(name, _)| name.as_str()).collect()
    }

    /// Where a node's gateway is, as its handler says.
    pub fn gateway(&self, node: &str) -> Option<String> {
        let node = self.nodes.get(&ObjectRef::new(node))?;
        node.annotations().get(keys::GATEWAY).cloned()
    }

    /// Who else has a hardware address.
    pub fn has_address(&self, mac: &str, namespace: &str, name: &str) -> Option<String> {
        let has = |vmi: &VirtualMachineInstance| {
            let interfaces = vmi.spec.0["domain"]["devices"]["interfaces"].as_array();
            interfaces.into_iter().flatten().any(|interface| {
                interface["macAddress"].as_str().is_some_and(|own| own.eq_ignore_ascii_case(mac))
            })
        };
        let all = self.vmis.state();
        let other = all.iter().find(|vmi| {
            (vmi.namespace().as_deref(), vmi.name_any().as_str()) != (Some(namespace), name)
                && has(vmi)
        })?;
        Some(format!("{}/{}", other.namespace().unwrap_or_default(), other.name_any()))
    }

    /// Whether a namespace has to do with a cluster.
    pub fn allows(&self, namespace: &str, cluster: &str) -> bool {
        if namespace.starts_with("kube-") || namespace == api::NAMESPACE {
            // What runs the cluster is no other cluster's business.
            return false;
        }
        let found = self.namespaces.get(&ObjectRef::new(namespace));
        let said = found.as_ref().and_then(|namespace| namespace.annotations().get(PEERS));
        said.is_none_or(|said| said.split(',').any(|one| one.trim() == cluster))
    }

    /// How long ago the other side was heard of.
    pub fn silence(&self, uid: &str) -> Option<Duration> {
        let heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        heard.get(uid).map(Instant::elapsed)
    }

    /// Forgets migrations that are gone.
    pub fn keep(&self, is_there: impl Fn(&str) -> bool) {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).retain(|uid, _| is_there(uid));
    }

    /// Takes note of what the other side says, which `cluster` has proven to be.
    ///
    /// # Errors
    /// Why it is not taken, for people.
    pub async fn hear(
        &self,
        migration: &Migration,
        cluster: &str,
        half: &Half,
    ) -> Result<(), String> {
        self.judge(migration, cluster, half)?;
        let uid = migration.uid().unwrap_or_default();
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).insert(uid, Instant::now());
        let known = migration.status.as_ref().and_then(|status| status.peer.as_ref());
        let is_news = known.is_none_or(|known| {
            known.trouble.is_some()
                || known.half.as_ref().map(fingerprint) != Some(fingerprint(half))
        });
        if !is_news || migration.is_over() {
            return Ok(());
        }
        // N.B. all of it: a merge patch keeps what it does not name.
        let mut told = json!(half);
        if let Some(Value::Object(before)) =
            known.and_then(|known| known.half.as_ref()).map(|h| json!(h))
        {
            for field in before.keys().filter(|field| json!(half).get(field).is_none()) {
                told[field] = Value::Null;
            }
        }
        self.patch(migration, &json!({"peer": {"half": told, "trouble": null}})).await
    }

    /// Whether a half may be the other side's of a migration.
    fn judge(&self, migration: &Migration, cluster: &str, half: &Half) -> Result<(), String> {
        let name =
            format!("{}/{}", migration.namespace().unwrap_or_default(), migration.name_any());
        if half.cluster != cluster {
            return Err(format!("{cluster} may not speak for cluster {}", half.cluster));
        }
        if !self.allows(&migration.namespace().unwrap_or_default(), cluster) {
            return Err(format!(
                "the namespace of migration {name} has nothing to do with {cluster}"
            ));
        }
        let known = migration.status.as_ref().and_then(|s| s.peer.as_ref()?.half.as_ref());
        let Some(known) = known else { return Ok(()) };
        let same = (&known.cluster, &known.migration) == (&half.cluster, &half.migration);
        // One that has not begun may be begun anew from another side.
        if !same && migration.phase() > Phase::Pending {
            return Err(format!(
                "migration {name} is with migration {} of cluster {}",
                known.migration, known.cluster
            ));
        }
        // How it ended is the last that there is to say, also when the VMI by which it was counted has gone.
        if same && half.sequence < known.sequence && !half.phase.is_final() {
            return Err(format!("migration {name} has heard something newer"));
        }
        Ok(())
    }

    /// Whether a cluster is believed: it is linked, or people have put its CA there.
    pub fn believes(&self, cluster: &str) -> bool {
        let credentials = self.credentials.borrow();
        !linked_of(credentials.bundle(), cluster, SystemTime::now()).is_empty()
    }

    /// Writes down whether the other side's cluster is believed.
    pub async fn revoke(&self, migration: &Migration, revoked: bool) {
        let known = migration.status.as_ref().and_then(|status| status.peer.as_ref());
        if migration.is_over() || known.is_some_and(|known| known.revoked) == revoked {
            return;
        }
        if let Err(error) = self.patch(migration, &json!({"peer": {"revoked": revoked}})).await {
            tracing::warn!("{error}");
        }
    }

    /// Writes down why the other side is not heard of.
    pub async fn trouble(&self, migration: &Migration, why: &str) {
        let known = migration.status.as_ref().and_then(|status| status.peer.as_ref());
        if migration.is_over() || known.and_then(|known| known.trouble.as_deref()) == Some(why) {
            return;
        }
        if let Err(error) = self.patch(migration, &json!({"peer": {"trouble": why}})).await {
            tracing::warn!("{error}");
        }
    }

    async fn patch(&self, migration: &Migration, status: &Value) -> Result<(), String> {
        let (namespace, name) = (migration.namespace().unwrap_or_default(), migration.name_any());
        let migrations: Api<Migration> = Api::namespaced(self.client.clone(), &namespace);
        let patch = json!({"metadata": {"uid": migration.uid()}, "status": status});
        let patch = Patch::Merge(&patch);
        match migrations.patch_status(&name, &PatchParams::default(), &patch).await {
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            Err(error) => {
                Err(format!("migration {namespace}/{name} is not written: {}", why(&error)))
            }
            Ok(_) => Ok(()),
        }
    }
}
