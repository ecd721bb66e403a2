//! A cluster in this process, whose controllers fill DataVolumes.

use api::datavolume::{DataVolume, Phase};
use apiserver::auth::{MASTERS, User};
use apiserver::embedded::{Config, Server};
use jiff::SignedDuration;
use k8s_openapi::api::core::v1::{Event, PersistentVolume, PersistentVolumeClaim, Pod};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::{Api, Client, ResourceExt};
use node::agent::images::{Image, Images};
use node::agent::{self, Ending, pod_address};
use node::logs::serve::PodLogs;
use node::storage::disks::Disks;
use node::{scheduler, storage};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio::task::JoinSet;

const PROGRAM: &str = env!("CARGO_BIN_EXE_godwit");
const POOL: i64 = 1 << 40;
const PATIENCE: Duration = Duration::from_secs(60);
pub const NAMESPACE: &str = "default";

/// Ends when it is dropped.
pub struct Cluster {
    pub client: Client,
    pub folder: tempfile::TempDir,
    ending: watch::Sender<Ending>,
    agents: JoinSet<()>,
    controllers: JoinSet<()>,
    server: Server,
}

impl Cluster {
    /// One with one node.
    pub async fn start() -> Self {
        Self::with_nodes(1).await
    }

    pub async fn with_nodes(count: usize) -> Self {
        // Another test may have installed it.
        #[expect(clippy::disallowed_methods, reason = "reqwest and oci-client take no other")]
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let folder = tempfile::tempdir().unwrap();
        let disks = Disks::new(folder.path().join("machine"));
        let server = Server::start(Config {
            folder: folder.path().to_owned(),
            listen: "127.0.0.1:0".parse().unwrap(),
            logs: Some(Box::new(PodLogs { disks: disks.clone() })),
        });
        let server = server.await.unwrap();
        let client = |user: &str, groups: &[&str]| {
            Client::new(server.api.as_user(User::new(user, groups)), NAMESPACE)
        };
        let admin = client("admin", &[MASTERS]);
        install(&admin).await;
        let mut controllers = JoinSet::new();
        let binder = client("system:persistent-volume-binder", &[]);
        storage::make_classes(&binder).await.unwrap();
        controllers
            .spawn(storage::run(binder, storage::Config { disks: disks.clone(), shared: POOL }));
        controllers.spawn(scheduler::run(client("system:kube-scheduler", &[])));
        let own = client("virt-controller", &[MASTERS]);
        controllers.spawn(async move { controllers::run(own, controllers::IMAGE).await });
        let (ending, ends) = watch::channel(Ending::Not);
        let mut agents = JoinSet::new();
        for number in 1..=count {
            let config = node(&folder, &disks, number);
            let kubelet = client(&format!("system:node:{}", config.name), &["system:nodes"]);
            let registered = agent::register::register(&kubelet, &config).await.unwrap();
            agents.spawn(agent::run(kubelet, config, registered, ends.clone()));
        }
        Self { client: admin, folder, ending, agents, controllers, server }
    }

    /// Ends it, and all that runs in it.
    pub async fn end(mut self) {
        self.ending.send_replace(Ending::WithPods);
        while self.agents.join_next().await.is_some() {}
        self.controllers.shutdown().await;
        self.server.stop().await;
    }

    pub fn api<K>(&self) -> Api<K>
    where
        K: kube::Resource<Scope = kube::core::NamespaceResourceScope, DynamicType = ()>,
    {
        Api::default_namespaced(self.client.clone())
    }

    /// Makes an object in its namespace.
    pub async fn create<K>(&self, object: Value) -> K
    where
        K: kube::Resource<Scope = kube::core::NamespaceResourceScope, DynamicType = ()>
            + DeserializeOwned
            + serde::Serialize
            + Clone
            + Debug,
    {
        let object: K = serde_json::from_value(object).unwrap();
        let api: Api<K> = match object.namespace() {
            Some(namespace) => Api::namespaced(self.client.clone(), &namespace),
            None => self.api(),
        };
        api.create(&PostParams::default(), &object).await.unwrap()
    }

    /// The API of a kind for `name`, or `namespace/name`; and the name.
    pub fn at<'a, K>(&self, name: &'a str) -> (Api<K>, &'a str)
    where
        K: kube::Resource<Scope = kube::core::NamespaceResourceScope, DynamicType = ()>,
    {
        match name.split_once('/') {
            Some((namespace, name)) => (Api::namespaced(self.client.clone(), namespace), name),
            None => (self.api(), name),
        }
    }

    /// Makes a DataVolume of 16 MiB that waits for its first consumer.
    pub async fn late(&self, name: &str, class: &str, source: Value) {
        let storage = json!({
            "storageClassName": class, "resources": {"requests": {"storage": "16Mi"}},
        });
        let (namespace, name) = name.split_once('/').unwrap_or((NAMESPACE, name));
        let object = json!({
            "apiVersion": "cdi.kubevirt.io/v1beta1", "kind": "DataVolume",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {"source": source, "storage": storage},
        });
        self.create::<DataVolume>(object).await;
    }

    /// Makes a pod that runs on a node, with a claim.
    pub async fn consumer(&self, claim: &str, node: &str) {
        let (namespace, claim) = claim.split_once('/').unwrap_or((NAMESPACE, claim));
        self.create::<Pod>(json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": format!("consumer-{claim}"), "namespace": namespace},
            "spec": {
                "restartPolicy": "Never", "nodeSelector": {"node": node},
                "containers": [{
                    "name": "c", "image": controllers::IMAGE, "command": ["godwit", "--version"],
                    "volumeMounts": [{"name": "d", "mountPath": "/d"}],
                }],
                "volumes": [{"name": "d", "persistentVolumeClaim": {"claimName": claim}}],
            },
        }))
        .await;
    }

    /// Waits until something holds.
    pub async fn soon(&self, what: &str, holds: impl AsyncFn() -> bool) {
        let until = Instant::now() + PATIENCE;
        while !holds().await {
            assert!(Instant::now() < until, "not soon: {what}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Makes a DataVolume of 16 MiB.
    pub async fn volume(&self, name: &str, class: &str, source: Value) {
        self.sized(name, class, source, Some("16Mi")).await;
    }

    /// Makes a DataVolume that is bound at once.
    pub async fn sized(&self, name: &str, class: &str, source: Value, size: Option<&str>) {
        let requests = size.map(|size| json!({"requests": {"storage": size}}));
        let (namespace, name) = name.split_once('/').unwrap_or((NAMESPACE, name));
        let object = json!({
            "apiVersion": "cdi.kubevirt.io/v1beta1", "kind": "DataVolume",
            "metadata": {
                "name": name, "namespace": namespace,
                "annotations": {api::keys::IMMEDIATE: "true"},
            },
            "spec": {
                "source": source,
                "storage": {"storageClassName": class, "resources": requests},
            },
        });
        self.create::<DataVolume>(object).await;
    }

    /// Waits until a DataVolume is as wanted.
    pub async fn until(&self, name: &str, is: impl Fn(&DataVolume) -> bool) -> DataVolume {
        let until = Instant::now() + PATIENCE;
        loop {
            let (volumes, plain) = self.at::<DataVolume>(name);
            let found = volumes.get(plain).await.unwrap();
            if is(&found) {
                return found;
            }
            if Instant::now() > until {
                let pods: Api<Pod> = Api::all(self.client.clone());
                let pods = pods.list(&ListParams::default()).await.unwrap();
                let statuses: Vec<_> = pods.iter().map(|p| (p.name_any(), &p.status)).collect();
                panic!(
                    "{name}: {:#?}\n{statuses:#?}\n{:#?}",
                    found.status,
                    self.events(name).await
                );
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    pub async fn succeeded(&self, name: &str) -> DataVolume {
        self.until(name, |volume| phase(volume) == Phase::Succeeded).await
    }

    /// Where a claim's data is.
    pub async fn data(&self, claim: &str) -> PathBuf {
        let (claims, claim) = self.at::<PersistentVolumeClaim>(claim);
        let claim = claims.get(claim).await.unwrap();
        let volume = claim.spec.and_then(|spec| spec.volume_name).unwrap();
        let volumes: Api<PersistentVolume> = Api::all(self.client.clone());
        storage::path(&volumes.get(&volume).await.unwrap()).unwrap()
    }

    pub async fn no_pod(&self, name: &str) {
        let until = Instant::now() + PATIENCE;
        let (pods, name) = self.at::<Pod>(name);
        while pods.get_opt(&format!("importer-{name}")).await.unwrap().is_some() {
            assert!(Instant::now() < until, "the importer of {name} stays");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Reasons of what was told of a DataVolume.
    pub async fn events(&self, name: &str) -> Vec<String> {
        let all = self.api::<Event>().list(&ListParams::default()).await.unwrap();
        let of =
            all.into_iter().filter(|event| event.involved_object.name.as_deref() == Some(name));
        of.map(|event| event.reason.unwrap_or_default()).collect()
    }

    pub async fn delete_pod(&self, name: &str) {
        let now = DeleteParams::default().grace_period(0);
        self.api::<Pod>().delete(name, &now).await.unwrap();
    }

    pub async fn patch_status(&self, name: &str, status: Value) {
        let patch = Patch::Merge(json!({"status": status}));
        let volumes = self.api::<DataVolume>();
        volumes.patch_status(name, &PatchParams::default(), &patch).await.unwrap();
    }
}

pub fn phase(volume: &DataVolume) -> Phase {
    volume.status.as_ref().map(|status| status.phase).unwrap_or_default()
}

/// The message of a condition that is as given.
pub fn condition(volume: &DataVolume, kind: &str, holds: bool) -> Option<(String, String)> {
    let status = volume.status.clone()?;
    let found = status.conditions.into_iter().find(|condition| condition.kind == kind)?;
    (found.status == holds.into())
        .then(|| (found.reason.unwrap_or_default(), found.message.unwrap_or_default()))
}

/// Installs the CRDs, and waits until they are served.
async fn install(client: &Client) {
    let api: Api<CustomResourceDefinition> = Api::all(client.clone());
    for crd in api::crds() {
        let crd = serde_json::from_value(crd).unwrap();
        api.create(&PostParams::default(), &crd).await.unwrap();
    }
    let served = |crd: &CustomResourceDefinition| {
        let conditions = crd.status.iter().flat_map(|status| status.conditions.iter().flatten());
        conditions.into_iter().any(|c| c.type_ == "Established" && c.status == "True")
    };
    while !api.list(&ListParams::default()).await.unwrap().iter().all(served) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn node(folder: &tempfile::TempDir, disks: &Disks, number: usize) -> agent::Config {
    let name = format!("node-{number}");
    let own = Image {
        entrypoint: vec!["godwit".into()],
        programs: BTreeMap::from([("godwit".into(), PROGRAM.into())]),
        machine: false,
    };
    agent::Config {
        address: pod_address(&format!("{}/{name}", folder.path().display())),
        labels: BTreeMap::from([("node".to_owned(), name.clone())]),
        taints: Vec::new(),
        extended: BTreeMap::new(),
        pool: POOL,
        images: Images(BTreeMap::from([(controllers::IMAGE.to_owned(), own)])),
        host_paths: agent::volumes::HostPaths::default(),
        environment: Vec::new(),
        folder: disks.node(&name),
        name,
        supervisor: PROGRAM.into(),
        leaving: SignedDuration::from_secs(5),
    }
}
