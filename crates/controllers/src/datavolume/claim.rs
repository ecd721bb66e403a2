//! The claim of a DataVolume: its class, its modes, its size. Pure.

use super::Waits;
use crate::vmi::is_block;
use api::datavolume::{CDIConfig, ClaimProperties, DataVolume, Overhead, StorageProfile};
use api::import::BLOCK;
use api::{datavolume, keys, quantity};
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, PersistentVolumeClaimSpec};
use k8s_openapi::api::storage::v1::StorageClass;
use kube::{Resource, ResourceExt};
use serde_json::{Value, json};
use std::sync::Arc;

const DEFAULT_FOR_DISKS: &str = "storageclass.kubevirt.io/is-default-virt-class";
const DEFAULT: &str = "storageclass.kubernetes.io/is-default-class";
/// Kubectl's own, which is of the DataVolume alone.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";
/// Provisioners whose file systems take nothing of a claim: their volumes are folders.
const FOLDERS: &str = "storage.godwit.dev/";
/// What other file systems take, in millionths, as CDI has it.
const OVERHEAD: u64 = 60_000;
const MILLION: u64 = 1_000_000;
const MIB: u64 = 1 << 20;

/// What there is to make a claim of.
#[derive(Debug, Clone, Default)]
pub struct Terms {
    /// All classes.
    pub classes: Vec<Arc<StorageClass>>,
    /// What they can do.
    pub profiles: Vec<Arc<StorageProfile>>,
    /// What a person says of all imports.
    pub config: Option<Arc<CDIConfig>>,
}

impl Terms {
    /// A class by its name.
    pub fn class(&self, name: &str) -> Option<&Arc<StorageClass>> {
        self.classes.iter().find(|class| class.name_any() == name)
    }

    /// The class of who names none: of several, the newest, as Kubernetes has it.
    fn default_class(&self) -> Option<&Arc<StorageClass>> {
        let marked = |mark| {
            let is = |class: &&Arc<StorageClass>| {
                class.annotations().get(mark).is_some_and(|is| is == "true")
            };
            self.classes.iter().filter(is).max_by_key(|class| {
                (class.creation_timestamp(), std::cmp::Reverse(class.name_any()))
            })
        };
        marked(DEFAULT_FOR_DISKS).or_else(|| marked(DEFAULT))
    }

    /// What a file system of a class takes of a claim, in millionths.
    fn overhead(&self, class: &str) -> u64 {
        let config = self.config.as_ref();
        let said = config.and_then(|config| config.spec.filesystem_overhead.as_ref());
        let found = config.and_then(|config| config.status.as_ref()?.filesystem_overhead.as_ref());
        let parse = |text: &String| {
            let part = text.parse::<f64>().ok().filter(|part| (0.0..1.0).contains(part))?;
            Some((part * MILLION as f64).round() as u64)
        };
        let of_class = |o: &Overhead| o.storage_class.get(class).and_then(parse);
        let of_all = |o: &Overhead| o.global.as_ref().and_then(parse);
        let exact = self.class(class).is_some_and(|c| c.provisioner.starts_with(FOLDERS));
        said.and_then(of_class)
            .or(exact.then_some(0))
            .or(said.and_then(of_all))
            .or(found.and_then(of_class))
            .or(found.and_then(of_all))
            .unwrap_or(OVERHEAD)
    }

    /// The size of a claim on whose file system a disk of this size fits.
    fn with_overhead(&self, disk: u64, class: &str) -> u64 {
        let whole = u128::from(disk.next_multiple_of(MIB)) * u128::from(MILLION);
        let left = u128::from(MILLION - self.overhead(class).min(MILLION - 1));
        u64::try_from(whole.div_ceil(left)).unwrap_or(u64::MAX)
    }

    /// The size of the disk that fits on a file system of a claim of this size.
    fn without_overhead(&self, claim: u64, class: &str) -> u64 {
        let left = u128::from(claim) * u128::from(MILLION - self.overhead(class));
        u64::try_from(left / u128::from(MILLION)).unwrap_or(u64::MAX)
    }

    /// The size of the disk that a claim can hold.
    fn disk_in(&self, claim: &PersistentVolumeClaim) -> u64 {
        let size = size_of(claim);
        match is_block(claim) {
            true => size,
            false => self.without_overhead(size, class_of(claim)),
        }
    }

    /// What a person says of a class, or else what was found of it.
    fn properties(&self, class: &str) -> Option<&[ClaimProperties]> {
        let profile = self.profiles.iter().find(|profile| profile.name_any() == class)?;
        let said = &profile.spec.claim_property_sets;
        let found = || profile.status.as_ref().map(|status| &status.claim_property_sets);
        let sets = if said.is_empty() { found()? } else { said };
        Some(sets)
    }
}

fn class_of(claim: &PersistentVolumeClaim) -> &str {
    let spec = claim.spec.as_ref();
    spec.and_then(|spec| spec.storage_class_name.as_deref()).unwrap_or_default()
}

fn requested(spec: &PersistentVolumeClaimSpec) -> Option<u64> {
    u64::try_from(quantity::bytes(&datavolume::requested(spec)?.0)?).ok()
}

/// What a claim has, or else asks for.
fn size_of(claim: &PersistentVolumeClaim) -> u64 {
    let capacity =
        claim.status.as_ref().and_then(|status| status.capacity.as_ref()?.get("storage"));
    let has = capacity.and_then(|size| u64::try_from(quantity::bytes(&size.0)?).ok());
    let asks = claim.spec.as_ref().and_then(requested);
    has.or(asks).unwrap_or_default()
}

/// The size of the disk that is made on a claim's file system; None for that of a clone's source.
pub fn disk_size(volume: &DataVolume, claim: &PersistentVolumeClaim, terms: &Terms) -> Option<u64> {
    let asked = match (&volume.spec.storage, &volume.spec.pvc) {
        (Some(storage), _) => requested(storage),
        (None, _) => claim
            .spec
            .as_ref()
            .and_then(requested)
            .map(|size| terms.without_overhead(size, class_of(claim))),
    };
    asked.map(|size| size / BLOCK * BLOCK)
}

/// The claim of a DataVolume, which may be made of another claim.
pub fn build(
    volume: &DataVolume,
    terms: &Terms,
    source: Option<&PersistentVolumeClaim>,
) -> Result<PersistentVolumeClaim, Waits> {
    let spec = match (&volume.spec.storage, &volume.spec.pvc) {
        (Some(storage), _) => completed(volume, storage, terms, source)?,
        (None, Some(claim)) => claim.clone(),
        (None, None) => PersistentVolumeClaimSpec::default(),
    };
    let mut labels = volume.labels().clone();
    labels.insert("app".into(), "containerized-data-importer".into());
    let mut annotations = volume.annotations().clone();
    // N.B. that a disk is complete is never taken over: nothing is on this claim yet.
    annotations.retain(|name, _| ![LAST_APPLIED, keys::POD_PHASE].contains(&&**name));
    annotations.insert(keys::CONTENT.into(), "kubevirt".into());
    let object: Value = json!({
        "apiVersion": "v1", "kind": "PersistentVolumeClaim",
        "metadata": {
            "name": volume.name_any(), "namespace": volume.namespace(),
            "labels": labels, "annotations": annotations,
            "ownerReferences": [volume.controller_owner_ref(&())],
        },
        "spec": spec,
    });
    serde_json::from_value(object)
        .map_err(|why| Waits::wrong("ErrClaimNotValid", format!("its claim cannot be made: {why}")))
}

/// What the form `storage` leaves open, from the profile of its class.
fn completed(
    volume: &DataVolume,
    storage: &PersistentVolumeClaimSpec,
    terms: &Terms,
    source: Option<&PersistentVolumeClaim>,
) -> Result<PersistentVolumeClaimSpec, Waits> {
    let mut spec = storage.clone();
    if spec.storage_class_name.is_none() {
        spec.storage_class_name = terms.default_class().map(|class| class.name_any());
    }
    let class = spec.storage_class_name.clone().unwrap_or_default();
    modes(&mut spec, &class, terms)?;
    let block = spec.volume_mode.as_deref() == Some("Block");
    let disk = match (requested(storage), source) {
        (Some(size), _) => size,
        (None, Some(source)) => terms.disk_in(source),
        (None, None) => {
            let message = format!("DataVolume {} does not say how large it is", volume.name_any());
            return Err(Waits::wrong("ErrClaimNotValid", message));
        }
    };
    let size = if block { disk } else { terms.with_overhead(disk, &class) };
    let resources = spec.resources.get_or_insert_default();
    let asks = k8s_openapi::apimachinery::pkg::api::resource::Quantity(size.to_string());
    resources.requests.get_or_insert_default().insert("storage".into(), asks);
    Ok(spec)
}

/// The first set of modes that a class has and that fits what was asked for.
fn modes(spec: &mut PersistentVolumeClaimSpec, class: &str, terms: &Terms) -> Result<(), Waits> {
    let asked = spec.access_modes.clone().unwrap_or_default();
    if !asked.is_empty() && spec.volume_mode.is_some() {
        return Ok(());
    }
    if class.is_empty() {
        let message =
            "there is no default class of storage: say spec.storage.storageClassName, or \
                       both accessModes and volumeMode"
                .into();
        return Err(Waits::wrong("ErrClaimNotValid", message));
    }
    let Some(sets) = terms.properties(class) else {
        let message = format!("StorageProfile {class} does not say yet what class {class} can do");
        return Err(Waits::new("ErrClaimNotValid", message));
    };
    let mode = |set: &ClaimProperties| set.volume_mode.clone().unwrap_or("Filesystem".into());
    let fits = |set: &&ClaimProperties| {
        spec.volume_mode.as_ref().is_none_or(|asked| *asked == mode(set))
            && asked.iter().all(|asked| set.access_modes.contains(asked))
            && !set.access_modes.is_empty()
    };
    match sets.iter().find(fits) {
        Some(set) => {
            spec.volume_mode = Some(mode(set));
            if asked.is_empty() {
                spec.access_modes = Some(set.access_modes.clone());
            }
            Ok(())
        }
        // A person may know more of a class than its profile.
        None if !asked.is_empty() => {
            spec.volume_mode = Some("Filesystem".into());
            Ok(())
        }
        None => {
            let message = format!(
                "StorageProfile {class} does not say which accessModes class {class} has with the \
                 volumeMode {}: say accessModes in spec.storage, or claimPropertySets in the profile",
                spec.volume_mode.as_deref().unwrap_or("Filesystem")
            );
            Err(Waits::wrong("ErrClaimNotValid", message))
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    fn of<K: serde::de::DeserializeOwned>(object: Value) -> K {
        serde_json::from_value(object).unwrap()
    }

    fn terms(overhead: &str) -> Terms {
        let class = |name: &str, annotations: Value| {
            Arc::new(of(json!({
                "metadata": {"name": name, "annotations": annotations}, "provisioner": "x",
            })))
        };
        let profile = |name: &str, modes: Value| {
            Arc::new(of(json!({
                "metadata": {"name": name}, "spec": {}, "status": {"claimPropertySets": modes},
            })))
        };
        let both = json!([
            {"accessModes": ["ReadWriteMany"], "volumeMode": "Block"},
            {"accessModes": ["ReadWriteOnce"], "volumeMode": "Filesystem"},
        ]);
        Terms {
            classes: vec![
                class("plain", json!({DEFAULT: "true"})),
                class("disks", json!({DEFAULT_FOR_DISKS: "true"})),
            ],
            profiles: vec![profile("plain", both.clone()), profile("disks", both)],
            config: Some(Arc::new(of(json!({
                "metadata": {"name": "config"},
                "spec": {"filesystemOverhead": {"global": overhead}},
            })))),
        }
    }

    fn volume(storage: Value) -> DataVolume {
        of(json!({
            "metadata": {"name": "d", "namespace": "n", "uid": "u", "labels": {"a": "b"}},
            "spec": {"source": {"blank": {}}, "storage": storage},
        }))
    }

    #[test]
    fn what_a_person_leaves_open_comes_from_the_profile_and_what_they_say_stays() {
        let size = json!({"requests": {"storage": "1Gi"}});
        let modes = |storage: Value| {
            let claim = build(&volume(storage), &terms("0.5"), None).unwrap();
            assert_eq!(claim.labels()["app"], "containerized-data-importer");
            assert_eq!(
                (&*claim.labels()["a"], &*claim.annotations()[keys::CONTENT]),
                ("b", "kubevirt")
            );
            let size = size_of(&claim) >> 20;
            let spec = claim.spec.unwrap();
            let access = spec.access_modes.unwrap().remove(0);
            (spec.storage_class_name.unwrap(), access, spec.volume_mode.unwrap(), size)
        };
        let wanted = |class: &str, access: &str, mode: &str, size| {
            (class.to_owned(), access.to_owned(), mode.to_owned(), size)
        };
        assert_eq!(
            modes(json!({"resources": size})),
            wanted("disks", "ReadWriteMany", "Block", 1024)
        );
        assert_eq!(
            modes(
                json!({"resources": size, "volumeMode": "Filesystem", "storageClassName": "plain"})
            ),
            wanted("plain", "ReadWriteOnce", "Filesystem", 2048)
        );
        assert_eq!(
            modes(json!({"resources": size, "accessModes": ["ReadWriteOncePod"]})),
            wanted("disks", "ReadWriteOncePod", "Filesystem", 2048)
        );
        let none = build(&volume(json!({"resources": size})), &Terms::default(), None);
        assert_eq!(none.unwrap_err().reason, "ErrClaimNotValid");
    }

    proptest! {
        #[test]
        fn a_disk_fits_on_the_claim_that_was_made_for_it(size in 1u64..1 << 50, ppm in 0u32..990_000) {
            let terms = terms(&format!("0.{ppm:06}"));
            let asked = json!({
                "resources": {"requests": {"storage": size.to_string()}},
                "volumeMode": "Filesystem",
            });
            let volume = volume(asked);
            let claim = build(&volume, &terms, None).unwrap();
            let disk = disk_size(&volume, &claim, &terms).unwrap();
            prop_assert!(disk <= size && size - disk < BLOCK && disk.is_multiple_of(BLOCK));
            prop_assert!(terms.disk_in(&claim) >= disk);
        }
    }
}
