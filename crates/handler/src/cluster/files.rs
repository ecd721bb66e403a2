//! Files that a guest needs and that are not claims: disks of images, empty disks, seeds.

use super::Shared;
use api::import::{BLOCK, is_own_machine};
use api::vmi::{CloudInit, Spec, VirtualMachineInstance, Volume};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use images::{Credentials, Pull, Registry};
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::{Api, ResourceExt};
use reconcile::events::why;
use serde_json::json;
use std::collections::BTreeMap;
use std::path::Path;
use tokio::sync::watch;

/// Why a guest's files cannot be prepared: the reason in one word, and for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unprepared {
    /// `ErrImagePull`, `FailedMount`.
    pub reason: &'static str,
    /// What to do.
    pub message: String,
}

fn mount(message: impl Into<String>) -> Unprepared {
    Unprepared { reason: "FailedMount", message: message.into() }
}

/// Prepares all files of a VMI in a folder. What is there already is let be: it is the guest's.
///
/// # Errors
/// The first that cannot be.
pub async fn prepare(
    shared: &Shared,
    vmi: &VirtualMachineInstance,
    spec: &Spec,
    folder: &Path,
) -> Result<(), Unprepared> {
    let make = tokio::fs::create_dir_all(folder).await;
    make.map_err(|error| mount(format!("cannot make {}: {error}", folder.display())))?;
    let namespace = vmi.namespace().unwrap_or_default();
    for volume in &spec.volumes {
        let target = folder.join(&volume.name);
        if !tokio::fs::try_exists(&target).await.unwrap_or(false) {
            let one = One { shared, vmi, namespace: &namespace, spec };
            one.prepare(volume, &target).await.map_err(|unprepared| Unprepared {
                message: format!("volume {}: {}", volume.name, unprepared.message),
                ..unprepared
            })?;
        }
    }
    kernel(shared, &namespace, spec, folder).await
}

/// What volumes of one VMI are prepared with.
struct One<'a> {
    shared: &'a Shared,
    vmi: &'a VirtualMachineInstance,
    namespace: &'a str,
    spec: &'a Spec,
}

impl One<'_> {
    async fn prepare(&self, volume: &Volume, target: &Path) -> Result<(), Unprepared> {
        if let Some(image) = &volume.container_disk {
            let policy = image.image_pull_policy.as_deref();
            let pulled = Image {
                image: &image.image,
                policy,
                secret: image.image_pull_secret.as_deref(),
                path: image.path.clone(),
            };
            return pulled.pull(self.shared, self.namespace, target).await;
        }
        if let Some(empty) = &volume.empty_disk {
            let size = api::quantity::bytes(&empty.capacity.0).unwrap_or_default();
            let size = u64::try_from(size).unwrap_or_default().next_multiple_of(BLOCK);
            return blank(target, size).map_err(|error| mount(error.to_string()));
        }
        if let Some(seed) = &volume.cloud_init_no_cloud {
            let Seed { user, network } = self.seed(seed).await?;
            let meta = json!({
                "instance-id": self.vmi.uid().unwrap_or_default(), "local-hostname": self.hostname(),
            });
            let meta = meta.to_string();
            let made = images::seed::nocloud(
                target,
                meta.as_bytes(),
                user.as_deref().unwrap_or_default(),
                network.as_deref(),
            );
            return made.await.map_err(|error| mount(launcher::chain(&error)));
        }
        if let Some(seed) = &volume.cloud_init_config_drive {
            let Seed { user, network } = self.seed(seed).await?;
            let uuid = self.vmi.uid().unwrap_or_default();
            let meta = json!({
                "uuid": uuid, "instance_id": uuid, "hostname": self.hostname(), "name": self.vmi.name_any(),
            });
            let meta = meta.to_string();
            let made = images::seed::config_drive(
                target,
                meta.as_bytes(),
                user.as_deref().unwrap_or_default(),
                network.as_deref(),
            );
            return made.await.map_err(|error| mount(launcher::chain(&error)));
        }
        self.of_object(volume, target).await
    }

    /// A disk with the files of a ConfigMap or a Secret.
    async fn of_object(&self, volume: &Volume, target: &Path) -> Result<(), Unprepared> {
        let (files, label) = if let Some(map) = &volume.config_map {
            let files = self.config_map(&map.name).await?;
            let optional = map.optional == Some(true);
            let files = files.or_else(|| optional.then(BTreeMap::new));
            let missing = || mount(format!("there is no ConfigMap {}", map.name));
            (files.ok_or_else(missing)?, map.volume_label.clone())
        } else if let Some(secret) = &volume.secret {
            let files = secret_of(self.shared, self.namespace, &secret.secret_name).await?;
            let optional = secret.optional == Some(true);
            let files = files.or_else(|| optional.then(BTreeMap::new));
            let missing = || mount(format!("there is no Secret {}", secret.secret_name));
            (files.ok_or_else(missing)?, secret.volume_label.clone())
        } else {
            return Ok(());
        };
        let label = label.unwrap_or_else(|| "cfgdata".into());
        let made = images::seed::files(target, &label, &files).await;
        made.map_err(|error| mount(launcher::chain(&error)))
    }

    fn hostname(&self) -> String {
        let said = self.spec.hostname.clone().filter(|name| !name.is_empty());
        said.unwrap_or_else(|| self.vmi.name_any())
    }

    async fn config_map(
        &self,
        name: &str,
    ) -> Result<Option<BTreeMap<String, Vec<u8>>>, Unprepared> {
        let maps: Api<ConfigMap> = Api::namespaced(self.shared.client.clone(), self.namespace);
        let found = maps.get_opt(name).await.map_err(|error| mount(why(&error)))?;
        Ok(found.map(|map| {
            let text = map.data.unwrap_or_default().into_iter().map(|(k, v)| (k, v.into_bytes()));
            let binary = map.binary_data.unwrap_or_default().into_iter().map(|(k, v)| (k, v.0));
            text.chain(binary).collect()
        }))
    }

    async fn seed(&self, seed: &CloudInit) -> Result<Seed, Unprepared> {
        let user = (&seed.user_data, &seed.user_data_base64, &seed.secret_ref, "userdata");
        let network = (
            &seed.network_data,
            &seed.network_data_base64,
            &seed.network_data_secret_ref,
            "networkdata",
        );
        let mut found = Vec::new();
        for (plain, encoded, secret, key) in [user, network] {
            let bytes = match (plain, encoded, secret) {
                (Some(plain), _, _) => Some(plain.clone().into_bytes()),
                (_, Some(encoded), _) => {
                    let decoded = STANDARD.decode(encoded);
                    Some(decoded.map_err(|error| mount(format!("{key} is no base64: {error}")))?)
                }
                (_, _, Some(secret)) => {
                    let data = secret_of(self.shared, self.namespace, &secret.name).await?;
                    let data =
                        data.ok_or_else(|| mount(format!("there is no Secret {}", secret.name)))?;
                    // KubeVirt takes both spellings.
                    let camel = if key == "userdata" { "userData" } else { "networkData" };
                    let bytes = data.get(key).or_else(|| data.get(camel)).cloned();
                    let missing = || mount(format!("Secret {} has no key {key}", secret.name));
                    Some(bytes.ok_or_else(missing)?)
                }
                _ => None,
            };
            found.push(bytes);
        }
        let (network, user) = (found.pop().flatten(), found.pop().flatten());
        Ok(Seed { user, network })
    }
}

struct Seed {
    user: Option<Vec<u8>>,
    network: Option<Vec<u8>>,
}

async fn secret_of(
    shared: &Shared,
    namespace: &str,
    name: &str,
) -> Result<Option<BTreeMap<String, Vec<u8>>>, Unprepared> {
    let secrets: Api<Secret> = Api::namespaced(shared.client.clone(), namespace);
    let found = secrets.get_opt(name).await.map_err(|error| mount(why(&error)))?;
    Ok(found.map(|s| s.data.unwrap_or_default().into_iter().map(|(k, v)| (k, v.0)).collect()))
}

/// A sparse file.
fn blank(target: &Path, size: u64) -> std::io::Result<()> {
    let draft = target.with_extension("draft");
    let file = std::fs::File::create(&draft)?;
    file.set_len(size)?;
    file.sync_all()?;
    std::fs::rename(&draft, target)
}

/// An image of which a disk is made.
struct Image<'a> {
    image: &'a str,
    policy: Option<&'a str>,
    secret: Option<&'a str>,
    path: Option<String>,
}

impl Image<'_> {
    async fn pull(
        &self,
        shared: &Shared,
        namespace: &str,
        target: &Path,
    ) -> Result<(), Unprepared> {
        let failed = |message: String| Unprepared { reason: "ErrImagePull", message };
        let credentials = match self.secret {
            Some(secret) => credentials(shared, namespace, secret, self.image).await?,
            None => None,
        };
        let registry = Registry {
            url: format!("docker://{}", self.image),
            credentials,
            insecure: is_own_machine(self.image.split('/').next().unwrap_or_default()),
            disk_path: self.path.clone(),
            ..Registry::default()
        };
        let pull = match self.policy {
            Some("Always") => Pull::Always,
            Some("Never") => Pull::Never,
            Some("IfNotPresent") => Pull::IfNotPresent,
            // As the kubelet has it.
            _ if self.image.ends_with(":latest") || !names_version(self.image) => Pull::Always,
            _ => Pull::IfNotPresent,
        };
        let (reports, _) = watch::channel(images::Progress::default());
        let cached = shared.cache.get(&registry, pull, &shared.config.confine, &reports).await;
        let cached = cached.map_err(|error| failed(launcher::chain(&error)))?;
        let target = target.to_owned();
        let copied = tokio::task::spawn_blocking(move || {
            let draft = target.with_extension("draft");
            let _ = std::fs::remove_file(&draft);
            images::ephemeral(&cached.path, &draft)?;
            std::fs::rename(&draft, &target)
        });
        match copied.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(mount(format!("the image's disk cannot be copied: {error}"))),
            Err(error) => Err(mount(error.to_string())),
        }
    }
}

/// Whether a tag or digest is said.
fn names_version(image: &str) -> bool {
    let last = image.rsplit('/').next().unwrap_or_default();
    last.contains(':') || image.contains('@')
}

/// A registry's credentials from a Secret of docker's kind, or with `accessKeyId` and `secretKey`.
async fn credentials(
    shared: &Shared,
    namespace: &str,
    name: &str,
    image: &str,
) -> Result<Option<Credentials>, Unprepared> {
    let data = secret_of(shared, namespace, name).await?;
    let data = data.ok_or_else(|| mount(format!("there is no Secret {name}")))?;
    let text = |key: &str| data.get(key).and_then(|b| String::from_utf8(b.clone()).ok());
    if let (Some(user), Some(password)) = (text("accessKeyId"), text("secretKey")) {
        return Ok(Some(Credentials { user, password }));
    }
    let config: serde_json::Value =
        serde_json::from_str(&text(".dockerconfigjson").unwrap_or_default()).unwrap_or_default();
    let host = image.split('/').next().unwrap_or_default();
    let entry = &config["auths"][host];
    if let (Some(user), Some(password)) = (entry["username"].as_str(), entry["password"].as_str()) {
        return Ok(Some(Credentials { user: user.into(), password: password.into() }));
    }
    let pair = entry["auth"].as_str().and_then(|auth| STANDARD.decode(auth).ok());
    let pair = pair.and_then(|bytes| String::from_utf8(bytes).ok());
    Ok(pair.and_then(|pair| {
        let (user, password) = pair.split_once(':')?;
        Some(Credentials { user: user.into(), password: password.into() })
    }))
}

/// The kernel of an image, and its initial root filesystem.
async fn kernel(
    shared: &Shared,
    namespace: &str,
    spec: &Spec,
    folder: &Path,
) -> Result<(), Unprepared> {
    let Some(container) =
        spec.domain.firmware.kernel_boot.as_ref().and_then(|boot| boot.container.as_ref())
    else {
        return Ok(());
    };
    let paths = [("kernel", &container.kernel_path), ("initrd", &container.initrd_path)];
    for (name, path) in paths {
        let (Some(path), target) = (path, folder.join(name)) else { continue };
        if target.exists() {
            continue;
        }
        let image = Image {
            image: &container.image,
            policy: container.image_pull_policy.as_deref(),
            secret: container.image_pull_secret.as_deref(),
            path: Some(path.clone()),
        };
        image.pull(shared, namespace, &target).await?;
    }
    Ok(())
}
