//! A pod's volumes, and what its containers see of them.
//!
//! There are no mounts: a container's `/` is a folder of its own, `GODWIT_ROOT` in its environment,
//! and a volume is a link in it. A mount inside another one is a link inside that volume.

use super::command::{Contents, Place, field, resource};
use super::files::{self, Files, stays_below};
use crate::storage::{self, claims::Claim};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{
    ConfigMap, ConfigMapProjection, ConfigMapVolumeSource, Container, DownwardAPIProjection,
    DownwardAPIVolumeFile, DownwardAPIVolumeSource, KeyToPath, Node, PersistentVolume,
    PersistentVolumeClaim, Pod, Secret, SecretProjection, SecretVolumeSource, ServiceAccount,
    ServiceAccountTokenProjection, Volume, VolumeProjection,
};
use kube::api::PostParams;
use kube::{Api, Client};
use reconcile::events::why;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

/// Changed ConfigMaps and Secrets are seen after this at the latest.
pub const REFRESH: SignedDuration = SignedDuration::from_secs(10);
/// A token is renewed when this many tenths of its life are over.
const RENEWED_AFTER: i64 = 8;

/// What pods may see of the node besides their own: folders, and which of the machine's stand for
/// them.
#[derive(Debug, Clone, Default)]
pub struct HostPaths(pub Vec<(PathBuf, PathBuf)>);

impl HostPaths {
    /// The machine's path for one of the node's.
    fn find(&self, wanted: &Path) -> Option<PathBuf> {
        let plain = wanted.components().all(|part| part != std::path::Component::ParentDir);
        let below = |(node, machine): &(PathBuf, PathBuf)| {
            wanted.strip_prefix(node).ok().map(|rest| machine.join(rest))
        };
        self.0.iter().find_map(below).filter(|_| plain)
    }
}

/// A pod's volumes.
pub struct Volumes {
    client: Client,
    /// The pod's folder.
    folder: PathBuf,
    host_paths: HostPaths,
    /// Tokens, by volume and path, until they are to be renewed.
    tokens: BTreeMap<(String, String), (String, Timestamp)>,
    /// What its ConfigMaps hold.
    pub config_maps: Contents,
    /// What its Secrets hold.
    pub secrets: Contents,
}

/// What a volume's files may be made of.
struct Filling<'a> {
    pod: &'a Pod,
    place: &'a Place,
    node: &'a Node,
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// The names of the ConfigMaps and Secrets that a pod uses.
fn uses(pod: &Pod) -> (BTreeSet<String>, BTreeSet<String>) {
    let (mut maps, mut secrets) = (BTreeSet::new(), BTreeSet::new());
    let Some(spec) = &pod.spec else { return (maps, secrets) };
    for container in spec.init_containers.iter().flatten().chain(&spec.containers) {
        for from in container.env_from.iter().flatten() {
            maps.extend(from.config_map_ref.iter().map(|r| r.name.clone()));
            secrets.extend(from.secret_ref.iter().map(|r| r.name.clone()));
        }
        for source in container.env.iter().flatten().filter_map(|v| v.value_from.as_ref()) {
            maps.extend(source.config_map_key_ref.iter().map(|r| r.name.clone()));
            secrets.extend(source.secret_key_ref.iter().map(|r| r.name.clone()));
        }
    }
    for volume in spec.volumes.iter().flatten() {
        maps.extend(volume.config_map.iter().map(|r| r.name.clone()));
        secrets.extend(volume.secret.iter().filter_map(|r| r.secret_name.clone()));
        let projected = volume.projected.iter().flat_map(|p| p.sources.iter().flatten());
        for source in projected {
            maps.extend(source.config_map.iter().map(|r| r.name.clone()));
            secrets.extend(source.secret.iter().map(|r| r.name.clone()));
        }
    }
    (maps, secrets)
}

impl Volumes {
    /// Of the pod that has this folder.
    pub fn new(client: Client, folder: PathBuf, host_paths: HostPaths) -> Self {
        let (config_maps, secrets) = (Contents::new(), Contents::new());
        Self { client, folder, host_paths, tokens: BTreeMap::new(), config_maps, secrets }
    }

    fn api<K>(&self, pod: &Pod) -> Api<K>
    where
        K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>,
    {
        Api::namespaced(self.client.clone(), pod.metadata.namespace.as_deref().unwrap_or_default())
    }

    /// Makes all of them what they should be now.
    ///
    /// # Errors
    /// Which one cannot be had, and why.
    pub async fn refresh(&mut self, pod: &Pod, place: &Place, node: &Node) -> Result<(), String> {
        self.fetch(pod).await?;
        let filling = Filling { pod, place, node };
        for volume in pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten()) {
            let cannot =
                |why| format!("MountVolume.SetUp failed for volume {:?} : {why}", volume.name);
            self.make(volume, &filling).await.map_err(cannot)?;
        }
        Ok(())
    }

    async fn fetch(&mut self, pod: &Pod) -> Result<(), String> {
        let (maps, secrets) = uses(pod);
        for name in maps {
            let found = self.api::<ConfigMap>(pod).get_opt(&name).await.map_err(|e| why(&e))?;
            let contents = found.map(|map| {
                let binary = map.binary_data.unwrap_or_default();
                let binary = binary.into_iter().map(|(key, value)| (key, value.0));
                let plain = map.data.unwrap_or_default();
                binary.chain(plain.into_iter().map(|(k, v)| (k, v.into_bytes()))).collect()
            });
            self.config_maps.insert(name, contents);
        }
        for name in secrets {
            let found = self.api::<Secret>(pod).get_opt(&name).await.map_err(|e| why(&e))?;
            let contents = found.map(|secret| {
                let data = secret.data.unwrap_or_default();
                data.into_iter().map(|(key, value)| (key, value.0)).collect()
            });
            self.secrets.insert(name, contents);
        }
        Ok(())
    }

    async fn make(&mut self, volume: &Volume, filling: &Filling<'_>) -> Result<(), String> {
        let path = self.folder.join("volumes").join(&volume.name);
        if let Some(claim) = &volume.persistent_volume_claim {
            return relink(&self.claimed(filling.pod, &claim.claim_name).await?, &path);
        }
        if let Some(host) = &volume.host_path {
            let wanted = self.host_paths.find(Path::new(&host.path)).ok_or_else(|| {
                format!("hostPath {} is not one that pods may use here", host.path)
            })?;
            if host.type_.as_deref().is_some_and(|kind| kind.ends_with("OrCreate")) {
                fs::create_dir_all(&wanted).map_err(text)?;
            }
            return relink(&wanted, &path);
        }
        if volume.empty_dir.is_some() {
            return fs::create_dir_all(&path).map_err(text);
        }
        let files = self.files(volume, filling).await?;
        files::write(&path, &files).map_err(text)
    }

    /// Where a claim's data is.
    async fn claimed(&self, pod: &Pod, name: &str) -> Result<PathBuf, String> {
        let claim =
            self.api::<PersistentVolumeClaim>(pod).get_opt(name).await.map_err(|e| why(&e))?;
        let claim = claim.ok_or(format!("persistentvolumeclaim {name:?} not found"))?;
        let volume = claim.spec.as_ref().and_then(|spec| spec.volume_name.clone());
        let volume = volume.filter(|_| claim.is_bound());
        let volume = volume.ok_or(format!("PVC {name} is not bound"))?;
        let volumes: Api<PersistentVolume> = Api::all(self.client.clone());
        let volume = volumes.get(&volume).await.map_err(|e| why(&e))?;
        let path = storage::path(&volume);
        let path =
            path.ok_or("its volume is neither local nor hostPath: this node has no other")?;
        match path.exists() {
            true => Ok(path),
            false => Err(format!("{} does not exist on this node", path.display())),
        }
    }

    async fn files(&mut self, volume: &Volume, filling: &Filling<'_>) -> Result<Files, String> {
        let (sources, mode) = sources(volume).ok_or(
            "this node has volumes of these kinds only: configMap, downwardAPI, emptyDir, hostPath, \
             persistentVolumeClaim, projected, secret",
        )?;
        let mode = mode.unwrap_or(0o644).unsigned_abs();
        let mut files = Files::new();
        for source in sources {
            if let Some(map) = &source.config_map {
                let wanted = (&*map.name, map.items.as_deref(), map.optional, mode);
                pick("configmap", &self.config_maps, wanted, &mut files)?;
            }
            if let Some(secret) = &source.secret {
                let wanted = (&*secret.name, secret.items.as_deref(), secret.optional, mode);
                pick("secret", &self.secrets, wanted, &mut files)?;
            }
            if let Some(api) = &source.downward_api {
                filling.downward(api.items.as_deref(), mode, &mut files)?;
            }
            if let Some(wanted) = &source.service_account_token {
                let token = self.token(&volume.name, wanted, filling.pod).await?;
                files.insert(wanted.path.clone(), (token.into_bytes(), 0o600));
            }
        }
        Ok(files)
    }

    /// A token of the pod's account, bound to the pod.
    async fn token(
        &mut self,
        volume: &str,
        wanted: &ServiceAccountTokenProjection,
        pod: &Pod,
    ) -> Result<String, String> {
        let key = (volume.to_owned(), wanted.path.clone());
        let now = Timestamp::now();
        if let Some((token, until)) = self.tokens.get(&key)
            && *until > now
        {
            return Ok(token.clone());
        }
        let account = pod.spec.as_ref().and_then(|spec| spec.service_account_name.clone());
        let account = account.unwrap_or_else(|| "default".into());
        let request = TokenRequest {
            spec: TokenRequestSpec {
                audiences: wanted.audience.clone().into_iter().collect(),
                expiration_seconds: wanted.expiration_seconds,
                bound_object_ref: Some(BoundObjectReference {
                    api_version: Some("v1".into()),
                    kind: Some("Pod".into()),
                    name: pod.metadata.name.clone(),
                    uid: pod.metadata.uid.clone(),
                }),
            },
            ..TokenRequest::default()
        };
        let api = self.api::<ServiceAccount>(pod);
        let given = api.create_token_request(&account, &PostParams::default(), &request).await;
        let given = given.map_err(|e| why(&e))?.status.ok_or("the token has no status")?;
        let life = given.expiration_timestamp.0.duration_since(now).as_secs();
        let until = now + SignedDuration::from_secs(life.max(0) * RENEWED_AFTER / 10);
        self.tokens.insert(key, (given.token.clone(), until));
        Ok(given.token)
    }

    /// Makes a container's `/`: links to its volumes, where it wants them.
    ///
    /// # Errors
    /// Which mount cannot be made, and why.
    pub fn root(&self, container: &Container) -> Result<PathBuf, String> {
        let root = self.folder.join("containers").join(&container.name).join("root");
        fs::create_dir_all(&root).map_err(text)?;
        let mounts = container.volume_mounts.iter().flatten();
        let mut links: Vec<(&str, &str, Option<&str>)> =
            mounts.map(|m| (&*m.mount_path, &*m.name, m.sub_path.as_deref())).collect();
        let devices = container.volume_devices.iter().flatten();
        links.extend(devices.map(|d| (&*d.device_path, &*d.name, None)));
        links.sort();
        for (place, volume, below) in links {
            let mut target = self.folder.join("volumes").join(volume);
            // N.B. one link leads to a claim: who opens a disk follows no second one.
            if let Ok(claimed) = fs::read_link(&target) {
                target = claimed;
            }
            let place = place.trim_start_matches('/');
            let below = below.filter(|path| !path.is_empty());
            if !stays_below(place) || below.is_some_and(|path| !stays_below(path)) {
                return Err(format!("the mount of {volume} at {place:?} leads out of the volume"));
            }
            if let Some(below) = below {
                target.push(below);
                if !target.exists() {
                    fs::create_dir_all(&target).map_err(text)?;
                }
            }
            let link = root.join(place);
            fs::create_dir_all(link.parent().unwrap_or(&root)).map_err(text)?;
            relink(&target, &link)?;
        }
        Ok(root)
    }
}

/// Makes a link lead to a target.
fn relink(target: &Path, link: &Path) -> Result<(), String> {
    if fs::read_link(link).is_ok_and(|now| now == target) {
        return Ok(());
    }
    fs::create_dir_all(link.parent().unwrap_or(link)).map_err(text)?;
    match fs::remove_file(link) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(text(error)),
        _ => {}
    }
    symlink(target, link).map_err(text)
}

/// What a volume's files are made of, and their mode: None for a volume that is not made of files.
/// What is of one kind alone is as if it were projected.
fn sources(volume: &Volume) -> Option<(Vec<VolumeProjection>, Option<i32>)> {
    if let Some(projected) = volume.projected.clone() {
        return Some((projected.sources.unwrap_or_default(), projected.default_mode));
    }
    let mut one = VolumeProjection::default();
    let mode = if let Some(map) = volume.config_map.clone() {
        let ConfigMapVolumeSource { default_mode, items, name, optional } = map;
        one.config_map = Some(ConfigMapProjection { items, name, optional });
        default_mode
    } else if let Some(secret) = volume.secret.clone() {
        let SecretVolumeSource { default_mode, items, secret_name, optional } = secret;
        let name = secret_name.unwrap_or_default();
        one.secret = Some(SecretProjection { items, name, optional });
        default_mode
    } else {
        let DownwardAPIVolumeSource { default_mode, items } = volume.downward_api.clone()?;
        one.downward_api = Some(DownwardAPIProjection { items });
        default_mode
    };
    Some((vec![one], mode))
}

/// What is wanted of a ConfigMap or Secret: its name, keys and paths, whether it may lack, the mode.
type Wanted<'a> = (&'a str, Option<&'a [KeyToPath]>, Option<bool>, u32);

/// Takes files of a ConfigMap or Secret: all, or those that are named.
fn pick(
    kind: &str,
    all: &Contents,
    (name, items, optional, mode): Wanted<'_>,
    files: &mut Files,
) -> Result<(), String> {
    let optional = optional == Some(true);
    let Some(contents) = all.get(name).and_then(Option::as_ref) else {
        return if optional { Ok(()) } else { Err(format!("{kind} {name:?} not found")) };
    };
    let Some(items) = items.filter(|items| !items.is_empty()) else {
        files.extend(contents.iter().map(|(key, value)| (key.clone(), (value.clone(), mode))));
        return Ok(());
    };
    for item in items {
        match contents.get(&item.key) {
            Some(value) => {
                let mode = item.mode.map_or(mode, i32::unsigned_abs);
                files.insert(item.path.clone(), (value.clone(), mode));
            }
            None if optional => {}
            None => return Err(format!("{kind} references non-existent key: {}", item.key)),
        }
    }
    Ok(())
}

impl Filling<'_> {
    fn downward(
        &self,
        items: Option<&[DownwardAPIVolumeFile]>,
        mode: u32,
        files: &mut Files,
    ) -> Result<(), String> {
        for item in items.unwrap_or_default() {
            let first = self.pod.spec.as_ref().and_then(|spec| spec.containers.first());
            let value = match (&item.field_ref, &item.resource_field_ref, first) {
                (Some(selector), _, _) => field(selector, self.pod, self.place)?,
                (None, Some(selector), Some(first)) => {
                    resource(selector, first, self.pod, self.node)?
                }
                _ => return Err(format!("item {:?} says nothing", item.path)),
            };
            let mode = item.mode.map_or(mode, i32::unsigned_abs);
            files.insert(item.path.clone(), (value.into_bytes(), mode));
        }
        Ok(())
    }
}
