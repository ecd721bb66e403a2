//! Storage: the classes of an embedded cluster, and the volumes that claims get of them.
//!
//! Each round takes a [`plan::Stock`], plans with [`plan::plan`], and acts.

pub mod claims;
pub mod classes;
pub mod disks;
pub mod plan;

use claims::{
    BIND_COMPLETED, BOUND_BY_CONTROLLER, Claim, PROVISIONED_BY, PROVISIONER, SELECTED_NODE,
};
use disks::Disks;
use k8s_openapi::api::core::v1::{Node, PersistentVolume, PersistentVolumeClaim};
use k8s_openapi::api::storage::v1::StorageClass;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::runtime::reflector::Store;
use kube::runtime::watcher;
use kube::{Api, Client};
use plan::{Step, Stock};
use reconcile::events::{Kind, Recorder, why};
use reconcile::kept::{Keeper, reference};
use reconcile::ready;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;

/// What failed is tried again after this, though nothing has changed.
const AGAIN: Duration = Duration::from_secs(10);
/// Changes that come together are looked at together.
const GATHER: Duration = Duration::from_millis(2);

/// Where volumes are, and how much they may take.
#[derive(Debug, Clone)]
pub struct Config {
    /// The folders of all nodes are below it.
    pub disks: Disks,
    /// Bytes for the volumes that all nodes share.
    pub shared: i64,
}

/// Why a step could not be done.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("{}", why(.0))]
    Api(#[from] kube::Error),
    #[error("{0}")]
    Disk(#[from] std::io::Error),
    #[error("{0}")]
    Class(String),
}

struct Storage {
    client: Client,
    config: Config,
    events: Recorder,
    claims: Store<PersistentVolumeClaim>,
    volumes: Store<PersistentVolume>,
    classes: Store<StorageClass>,
    nodes: Store<Node>,
    /// What was last said of a claim, by uid: once is enough.
    said: HashMap<String, String>,
}

/// Makes the classes that every embedded cluster has. One that a person changed is let be.
///
/// # Errors
/// When one cannot be made.
pub async fn make_classes(client: &Client) -> kube::Result<()> {
    let api: Api<StorageClass> = Api::all(client.clone());
    for class in classes::all() {
        match api.create(&PostParams::default(), &class).await {
            Err(kube::Error::Api(status)) if status.code == 409 => {}
            other => drop(other?),
        }
    }
    Ok(())
}

/// Runs until it is dropped.
pub async fn run(client: Client, config: Config) {
    let mut keeper = Keeper::default();
    let all = watcher::Config::default;
    let mut storage = Storage {
        claims: keeper.keep(Api::all(client.clone()), all()),
        volumes: keeper.keep(Api::all(client.clone()), all()),
        classes: keeper.keep(Api::all(client.clone()), all()),
        nodes: keeper.keep(Api::all(client.clone()), all()),
        events: Recorder::new(client.clone(), "persistentvolume-controller", None),
        said: HashMap::new(),
        client,
        config,
    };
    ready!(storage.claims, storage.volumes, storage.classes, storage.nodes);
    loop {
        storage.round().await;
        // What failed for want of the API or of a disk is tried again in any case.
        let _ = tokio::time::timeout(AGAIN, keeper.bell.notified()).await;
        tokio::time::sleep(GATHER).await;
    }
}

fn name<K: kube::Resource>(object: &K) -> &str {
    object.meta().name.as_deref().unwrap_or_default()
}

fn uid<K: kube::Resource>(object: &K) -> &str {
    object.meta().uid.as_deref().unwrap_or_default()
}

/// The file or folder that a volume is.
pub fn path(volume: &PersistentVolume) -> Option<PathBuf> {
    let spec = volume.spec.as_ref()?;
    let local = spec.local.as_ref().map(|local| &local.path);
    local.or(spec.host_path.as_ref().map(|host| &host.path)).map(PathBuf::from)
}

/// The size that a claim asks for, as it was written.
fn asked(claim: &PersistentVolumeClaim) -> Option<Quantity> {
    claim.spec.as_ref()?.resources.as_ref()?.requests.as_ref()?.get("storage").cloned()
}

fn is_block(mode: Option<&String>) -> bool {
    mode.is_some_and(|mode| mode == "Block")
}

/// A volume as it is to be made for a claim.
fn object(
    claim: &PersistentVolumeClaim,
    class: &StorageClass,
    node: Option<&str>,
    path: &std::path::Path,
) -> Value {
    let spec = claim.spec.clone().unwrap_or_default();
    let mut volume = json!({
        "apiVersion": "v1", "kind": "PersistentVolume",
        "metadata": {
            "name": plan::volume_name(claim),
            "annotations": {PROVISIONED_BY: class.provisioner},
        },
        "spec": {
            "capacity": {"storage": asked(claim)},
            "accessModes": spec.access_modes,
            "volumeMode": spec.volume_mode,
            "storageClassName": name(class),
            "persistentVolumeReclaimPolicy": class.reclaim_policy,
            "claimRef": {
                "apiVersion": "v1", "kind": "PersistentVolumeClaim",
                "namespace": claim.metadata.namespace, "name": name(claim), "uid": uid(claim),
            },
        },
    });
    let Some(node) = node else {
        volume["spec"]["hostPath"] = json!({"path": path});
        return volume;
    };
    volume["spec"]["local"] = json!({"path": path});
    volume["spec"]["nodeAffinity"] = json!({"required": {"nodeSelectorTerms": [{
        "matchExpressions": [
            {"key": "kubernetes.io/hostname", "operator": "In", "values": [node]},
        ],
    }]}});
    volume
}

impl Storage {
    async fn round(&mut self) {
        let stock = Stock {
            claims: self.claims.state(),
            volumes: self.volumes.state(),
            classes: self.classes.state(),
            nodes: self.nodes.state(),
            shared: self.config.shared,
        };
        self.said
            .retain(|uid, _| stock.claims.iter().any(|claim| self::uid(claim.as_ref()) == uid));
        for step in plan::plan(&stock) {
            if let Err(error) = self.act(&step).await {
                tracing::warn!("a step of storage is tried again: {error}");
                if let Step::Provision(claim, class, _) = &step {
                    let text = format!(
                        "failed to provision volume with StorageClass \"{}\": {error}",
                        name(class.as_ref())
                    );
                    self.say(claim, Kind::Warning, "ProvisioningFailed", &text).await;
                }
            }
        }
    }

    async fn act(&mut self, step: &Step) -> Result<(), Error> {
        match step {
            Step::Provision(claim, class, node) => {
                self.provision(claim, class, node.as_deref()).await
            }
            Step::Reserve(volume, claim) => Ok(self.reserve(volume, claim).await?),
            Step::Bind(claim, volume) => Ok(self.bind(claim, volume).await?),
            Step::ClaimStatus(claim, volume) => Ok(self.claim_status(claim, volume).await?),
            Step::Lost(claim) => {
                self.patch_claim_status(claim, json!({"phase": "Lost"})).await?;
                let text =
                    "Bound claim has lost its PersistentVolume. Any data on the volume is lost!";
                self.say(claim, Kind::Warning, "ClaimLost", text).await;
                Ok(())
            }
            Step::Expand(volume, claim) => self.expand(volume, claim).await,
            Step::Phase(volume, phase) => Ok(self.phase(volume, phase).await?),
            Step::Reclaim(volume) => self.reclaim(volume).await,
            Step::Say(claim, reason, text) => {
                let kind = if reason.ends_with("Failed") { Kind::Warning } else { Kind::Normal };
                self.say(claim, kind, reason, text).await;
                Ok(())
            }
            Step::Unselect(claim, text) => {
                self.say(claim, Kind::Warning, "ProvisioningFailed", text).await;
                self.annotate(claim, &json!({SELECTED_NODE: null})).await?;
                Ok(())
            }
        }
    }

    fn volumes_api(&self) -> Api<PersistentVolume> {
        Api::all(self.client.clone())
    }

    fn claims_of(&self, claim: &PersistentVolumeClaim) -> Api<PersistentVolumeClaim> {
        let namespace = claim.metadata.namespace.as_deref().unwrap_or_default();
        Api::namespaced(self.client.clone(), namespace)
    }

    async fn say(&mut self, claim: &PersistentVolumeClaim, kind: Kind, reason: &str, text: &str) {
        let new = format!("{reason}: {text}");
        if self.said.get(uid(claim)) == Some(&new) {
            return;
        }
        self.said.insert(uid(claim).to_owned(), new);
        self.events.say(&reference(claim), kind, reason, text).await;
    }

    /// Changes annotations, unless the claim has changed in between.
    async fn annotate(
        &self,
        claim: &PersistentVolumeClaim,
        annotations: &Value,
    ) -> kube::Result<()> {
        let patch = json!({"metadata": {
            "resourceVersion": claim.metadata.resource_version,
            "annotations": annotations,
        }});
        let api = self.claims_of(claim);
        api.patch(name(claim), &PatchParams::default(), &Patch::Merge(patch)).await.map(|_| ())
    }

    async fn provision(
        &mut self,
        claim: &PersistentVolumeClaim,
        class: &StorageClass,
        node: Option<&str>,
    ) -> Result<(), Error> {
        if let Some(why) = classes::refuses(class, claim) {
            return Err(Error::Class(why));
        }
        let block = is_block(claim.spec.as_ref().and_then(|spec| spec.volume_mode.as_ref()));
        let size = u64::try_from(claim.size()).unwrap_or(0);
        let (disks, made_for) = (self.config.disks.clone(), node.map(str::to_owned));
        let volume = plan::volume_name(claim);
        let make = move || disks.make(made_for.as_deref(), &volume, block, size);
        let path = off_thread(make).await?;
        let object = object(claim, class, node, &path);
        let object = serde_json::from_value(object).map_err(kube::Error::SerdeError)?;
        match self.volumes_api().create(&PostParams::default(), &object).await {
            // It was made before; the watch has not shown it yet.
            Err(kube::Error::Api(status)) if status.code == 409 => return Ok(()),
            other => drop(other?),
        }
        let text = format!("Successfully provisioned volume {}", name(&object));
        self.say(claim, Kind::Normal, "ProvisioningSucceeded", &text).await;
        Ok(())
    }

    async fn reserve(
        &self,
        volume: &PersistentVolume,
        claim: &PersistentVolumeClaim,
    ) -> kube::Result<()> {
        let patch = json!({
            "metadata": {
                "resourceVersion": volume.metadata.resource_version,
                "annotations": {BOUND_BY_CONTROLLER: "yes"},
            },
            "spec": {"claimRef": {
                "apiVersion": "v1", "kind": "PersistentVolumeClaim",
                "namespace": claim.metadata.namespace, "name": name(claim), "uid": uid(claim),
            }},
        });
        let patch = Patch::Merge(patch);
        self.volumes_api().patch(name(volume), &PatchParams::default(), &patch).await.map(|_| ())
    }

    async fn bind(
        &self,
        claim: &PersistentVolumeClaim,
        volume: &PersistentVolume,
    ) -> kube::Result<()> {
        self.phase(volume, "Bound").await?;
        let provisioner = volume.metadata.annotations.as_ref().and_then(|a| a.get(PROVISIONED_BY));
        let mut annotations = json!({BIND_COMPLETED: "yes", BOUND_BY_CONTROLLER: "yes"});
        if let Some(provisioner) = provisioner {
            annotations[PROVISIONER] = json!(provisioner);
        }
        let patch = json!({
            "metadata": {
                "resourceVersion": claim.metadata.resource_version,
                "annotations": annotations,
            },
            "spec": {"volumeName": name(volume)},
        });
        let api = self.claims_of(claim);
        api.patch(name(claim), &PatchParams::default(), &Patch::Merge(patch)).await?;
        self.claim_status(claim, volume).await
    }

    async fn claim_status(
        &self,
        claim: &PersistentVolumeClaim,
        volume: &PersistentVolume,
    ) -> kube::Result<()> {
        let spec = volume.spec.clone().unwrap_or_default();
        let status = json!({
            "phase": "Bound", "capacity": spec.capacity, "accessModes": spec.access_modes,
        });
        self.patch_claim_status(claim, status).await
    }

    async fn patch_claim_status(
        &self,
        claim: &PersistentVolumeClaim,
        status: Value,
    ) -> kube::Result<()> {
        let patch = Patch::Merge(json!({"status": status}));
        let api = self.claims_of(claim);
        api.patch_status(name(claim), &PatchParams::default(), &patch).await.map(|_| ())
    }

    async fn phase(&self, volume: &PersistentVolume, phase: &str) -> kube::Result<()> {
        let patch = Patch::Merge(json!({"status": {"phase": phase}}));
        let api = self.volumes_api();
        api.patch_status(name(volume), &PatchParams::default(), &patch).await.map(|_| ())
    }

    async fn expand(
        &self,
        volume: &PersistentVolume,
        claim: &PersistentVolumeClaim,
    ) -> Result<(), Error> {
        let path = path(volume)
            .filter(|_| is_block(volume.spec.as_ref().and_then(|spec| spec.volume_mode.as_ref())));
        if let Some(path) = path {
            let disks = self.config.disks.clone();
            let bytes = u64::try_from(claim.size()).unwrap_or(0);
            off_thread(move || disks.expand(&path, bytes)).await?;
        }
        let patch = Patch::Merge(json!({
            "metadata": {"resourceVersion": volume.metadata.resource_version},
            "spec": {"capacity": {"storage": asked(claim)}},
        }));
        self.volumes_api().patch(name(volume), &PatchParams::default(), &patch).await?;
        Ok(())
    }

    /// Deletes a volume's data and itself, once the API itself has said that its claim is gone.
    async fn reclaim(&self, volume: &PersistentVolume) -> Result<(), Error> {
        let spec = volume.spec.as_ref();
        let Some(by) = spec.and_then(|spec| spec.claim_ref.as_ref()) else { return Ok(()) };
        let namespace = by.namespace.as_deref().unwrap_or_default();
        let claims: Api<PersistentVolumeClaim> = Api::namespaced(self.client.clone(), namespace);
        let found = claims.get_opt(by.name.as_deref().unwrap_or_default()).await?;
        let now = self.volumes_api().get_opt(name(volume)).await?;
        let unchanged = now
            .is_some_and(|now| now.metadata.resource_version == volume.metadata.resource_version);
        if found.is_some_and(|claim| claim.metadata.uid == by.uid) || !unchanged {
            return Ok(());
        }
        if let Some(path) = path(volume) {
            let disks = self.config.disks.clone();
            off_thread(move || disks.remove(&path)).await?;
        }
        match self.volumes_api().delete(name(volume), &DeleteParams::default()).await {
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            other => {
                other?;
                Ok(())
            }
        }
    }
}

/// Does what may block on a disk.
async fn off_thread<T: Send + 'static>(
    work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> Result<T, Error> {
    let done = tokio::task::spawn_blocking(work).await;
    Ok(done.map_err(std::io::Error::other)??)
}
