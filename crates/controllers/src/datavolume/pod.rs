//! The pod of an importer: what it is told, and what is seen of it. Pure.

use super::claim::{Terms, disk_size};
use super::clone::Origin;
use crate::vmi::is_block;
use crate::vmi::plan::trouble;
use crate::world::IMPORTER;
use api::datavolume::DataVolume;
use api::import::{
    ADDRESS, CERTIFICATES, ORDER, Order, PASSWORD, Source, Target, USER, clone_secret,
    is_own_machine, upload_secret,
};
use api::keys;
use k8s_openapi::api::core::v1::{ContainerStatus, PersistentVolumeClaim, Pod};
use kube::{Resource, ResourceExt};
use serde_json::{Value, json};

/// Where the claim is.
const FOLDER: &str = "/data";
const DISK: &str = "/data/disk.img";
const DEVICE: &str = "/dev/target";
/// What the importer has done so far: on the claim, where that is a file system.
const WORK: &str = "/data/.godwit-import";
/// Beside a device.
const WORK_ASIDE: &str = "/work";
/// Annotation of an importer's pod: the claim's uid.
const FILLS: &str = "godwit.dev/fills";
/// Annotation of an importer's pod: the uid of the pod that lends what is cloned.
pub const BORROWS: &str = "godwit.dev/borrows";
/// The longest name of an object.
const NAME: usize = 253;

/// The name of a DataVolume's importer. There is one at most, because there is one name.
pub fn name(volume: &DataVolume) -> String {
    let name = format!("importer-{}", volume.name_any());
    if name.len() <= NAME {
        return name;
    }
    let hash = uuid::Uuid::new_v5(&uuid::Uuid::NAMESPACE_OID, name.as_bytes()).simple().to_string();
    format!("{}-{}", name[..NAME - 1 - hash.len()].trim_end_matches(['-', '.']), hash)
}

/// What an importer is told. The error is for people: it cannot get better.
pub fn order(
    volume: &DataVolume,
    claim: &PersistentVolumeClaim,
    terms: &Terms,
    origin: Option<&Origin>,
) -> Result<Order, String> {
    let source = source(volume, terms, origin)?;
    let (target, work) = match is_block(claim) {
        true => (Target::Device { path: DEVICE.into() }, WORK_ASIDE),
        false => {
            let size = disk_size(volume, claim, terms);
            (Target::File { path: DISK.into(), size }, WORK)
        }
    };
    Ok(Order {
        id: volume.uid().unwrap_or_default(),
        source,
        target,
        work: work.into(),
        preallocate: volume.spec.preallocation == Some(true),
    })
}

/// Where it is to be brought from.
fn source(volume: &DataVolume, terms: &Terms, origin: Option<&Origin>) -> Result<Source, String> {
    let source = volume.spec.source.clone().unwrap_or_default();
    if source.blank.is_some() {
        return Ok(Source::Blank);
    }
    if source.upload.is_some() {
        return Ok(Source::Upload);
    }
    if let Some(http) = source.http {
        let (scheme, _) = http.url.split_once("://").unwrap_or_default();
        return match scheme {
            "http" | "https" => Ok(Source::Http {
                url: http.url,
                checksum: http.checksum,
                headers: http.extra_headers,
            }),
            _ => Err(format!("'{}' is no http:// or https:// address", http.url)),
        };
    }
    if let Some(registry) = source.registry {
        let url = registry.url.unwrap_or_default();
        let Some((host, _)) = url.strip_prefix("docker://").and_then(|rest| rest.split_once('/'))
        else {
            return Err(format!("'{url}' is no image: say docker://HOST/NAME:TAG"));
        };
        let insecure = may_be_plain(host, terms) && registry.cert_config_map.is_none();
        return Ok(Source::Registry { insecure, url });
    }
    match origin {
        Some(Origin { lent: Some(lent), .. }) => Ok(Source::Clone(lent.clone())),
        Some(Origin { lent: None, .. }) => Err("it is not known where its source is lent".into()),
        None => Err("its source is none of blank, http, registry, pvc and upload".into()),
    }
}

/// Whether a registry may be asked over plain HTTP: one of this machine, or that a person named.
fn may_be_plain(host: &str, terms: &Terms) -> bool {
    let named = terms.config.iter().flat_map(|config| &config.spec.insecure_registries);
    let alone = host.rsplit_once(':').map_or(host, |(alone, _)| alone);
    is_own_machine(host) || named.into_iter().any(|name| name == host || name == alone)
}

/// The Secret and the ConfigMap that a source names.
fn extras(volume: &DataVolume) -> (Option<&str>, Option<&str>) {
    let source = volume.spec.source.as_ref();
    let http = source.and_then(|source| source.http.as_ref());
    let registry = source.and_then(|source| source.registry.as_ref());
    let secret = http.and_then(|http| http.secret_ref.as_deref());
    let map = http.and_then(|http| http.cert_config_map.as_deref());
    (
        secret.or(registry.and_then(|registry| registry.secret_ref.as_deref())),
        map.or(registry.and_then(|registry| registry.cert_config_map.as_deref())),
    )
}

/// What is mounted where.
#[derive(Default)]
struct Mounts {
    volumes: Vec<Value>,
    mounts: Vec<Value>,
    devices: Vec<Value>,
}

impl Mounts {
    fn claim(&mut self, name: &str, claim: &PersistentVolumeClaim) {
        let used = json!({"claimName": claim.name_any()});
        self.volumes.push(json!({"name": name, "persistentVolumeClaim": used}));
        match is_block(claim) {
            true => self.devices.push(json!({"name": name, "devicePath": DEVICE})),
            false => self.mounts.push(json!({"name": name, "mountPath": FOLDER})),
        }
    }

    fn add(&mut self, name: &str, kind: (&str, Value), path: &str) {
        self.volumes.push(json!({"name": name, kind.0: kind.1}));
        self.mounts.push(json!({"name": name, "mountPath": path}));
    }
}

/// The pod.
pub fn build(
    volume: &DataVolume,
    claim: &PersistentVolumeClaim,
    order: &Order,
    origin: Option<&Origin>,
) -> serde_json::Result<Pod> {
    let mut all = Mounts::default();
    all.claim("data", claim);
    if is_block(claim) {
        all.add("work", ("emptyDir", json!({})), WORK_ASIDE);
    }
    let (secret, certificates) = extras(volume);
    if let Some(map) = certificates {
        all.add("certificates", ("configMap", json!({"name": map})), CERTIFICATES);
    }
    let mut environment =
        vec![json!({"name": ORDER, "value": escaped(&serde_json::to_string(order)?)})];
    if let Some(secret) = secret {
        for (variable, key) in [(USER, "accessKeyId"), (PASSWORD, "secretKey")] {
            let key = json!({"secretKeyRef": {"name": secret, "key": key}});
            environment.push(json!({"name": variable, "valueFrom": key}));
        }
    }
    match &order.source {
        Source::Upload => environment.extend(listens(&upload_secret(&volume.name_any()))),
        Source::Clone(_) => environment.push(token(&clone_secret(&volume.name_any()))),
        _ => {}
    }
    let mut annotations = json!({FILLS: claim.uid()});
    if let Some(lender) = origin.and_then(|origin| origin.lender.as_ref()) {
        annotations[BORROWS] = lender.uid().into();
    }
    serde_json::from_value(json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": name(volume), "namespace": volume.namespace(),
            "annotations": annotations,
            "labels": {keys::APP: IMPORTER, "app": "containerized-data-importer"},
            "ownerReferences": [volume.controller_owner_ref(&())],
        },
        "spec": {
            "restartPolicy": "OnFailure",
            "automountServiceAccountToken": false,
            "enableServiceLinks": false,
            // What it has done is kept: it need not be waited for.
            "terminationGracePeriodSeconds": 5,
            "volumes": all.volumes,
            "containers": [{
                "name": IMPORTER, "command": ["godwit", "import"],
                "env": environment,
                "resources": {"requests": {"cpu": "100m", "memory": "64Mi"}},
                "volumeMounts": all.mounts, "volumeDevices": all.devices,
            }],
        },
    }))
}

/// The variable with the token of a Secret.
fn token(secret: &str) -> Value {
    let key = json!({"secretKeyRef": {"name": secret, "key": "token"}});
    json!({"name": PASSWORD, "valueFrom": key})
}

/// The variables of who lets in by the token of a Secret.
pub fn listens(secret: &str) -> [Value; 2] {
    let address = json!({"fieldRef": {"fieldPath": "status.podIP"}});
    [token(secret), json!({"name": ADDRESS, "valueFrom": address})]
}

/// `$(NAME)` in a variable's value would be replaced.
fn escaped(text: &str) -> String {
    text.replace('$', "$$")
}

/// Whether a pod fills exactly this claim.
pub fn fills(pod: &Pod, claim: &PersistentVolumeClaim) -> bool {
    pod.annotations().get(FILLS) == claim.uid().as_ref()
}

/// What is seen of an importer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Seen {
    /// It has not begun: why, if that is known.
    Waits(Option<(String, String)>),
    /// It imports.
    Runs,
    /// It went wrong, and is begun again by its node.
    Restarts(String, String),
    /// It is done.
    Done,
    /// Its node has given it up.
    Lost(String, String),
}

/// Looks at an importer.
pub fn see(pod: &Pod) -> Seen {
    let status = pod.status.clone().unwrap_or_default();
    let container = status.container_statuses.iter().flatten().next();
    match status.phase.as_deref() {
        Some("Succeeded") => return Seen::Done,
        Some("Failed") => {
            let (reason, message) = container.and_then(failure).unwrap_or_default();
            let text = |text: Option<String>, otherwise| text.unwrap_or(otherwise);
            return Seen::Lost(text(status.reason, reason), text(status.message, message));
        }
        _ => {}
    }
    let state = container.and_then(|container| container.state.as_ref());
    if state.is_some_and(|state| state.running.is_some()) {
        return Seen::Runs;
    }
    match container.and_then(failure) {
        Some((reason, message)) => Seen::Restarts(reason, message),
        None => Seen::Waits(trouble(pod)),
    }
}

/// How often an importer was begun again by its node.
pub fn restarts(pod: &Pod) -> u32 {
    let statuses = pod.status.iter().flat_map(|s| s.container_statuses.iter().flatten());
    statuses.map(|c| u32::try_from(c.restart_count).unwrap_or(0)).max().unwrap_or(0)
}

/// How a container went wrong last.
fn failure(container: &ContainerStatus) -> Option<(String, String)> {
    let states = [container.state.as_ref(), container.last_state.as_ref()];
    let ended = states.into_iter().flatten().find_map(|state| state.terminated.as_ref())?;
    let message = ended.message.as_deref().map(str::trim).filter(|said| !said.is_empty());
    let message = match message {
        Some(said) => said.to_owned(),
        None => format!("the importer ended with exit code {}, and said nothing", ended.exit_code),
    };
    (ended.exit_code != 0).then(|| (ended.reason.clone().unwrap_or("Error".into()), message))
}
