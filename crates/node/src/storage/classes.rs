//! The classes of an embedded cluster.

use super::claims::OURS;
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use k8s_openapi::api::storage::v1::StorageClass;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use std::collections::BTreeMap;

/// Makes a claim get it when it names none.
const DEFAULT: &str = "storageclass.kubernetes.io/is-default-class";

/// A class: its volumes' scope and kind are what its provisioner's name says.
struct Class {
    name: &'static str,
    provisioner: &'static str,
    local: bool,
}

const CLASSES: [Class; 5] = [
    Class { name: "local", provisioner: "local", local: true },
    Class { name: "local-block", provisioner: "local-block", local: true },
    Class { name: "scratch", provisioner: "scratch", local: true },
    Class { name: "shared", provisioner: "shared", local: false },
    Class { name: "shared-block", provisioner: "shared-block", local: false },
];

/// All of them, as objects.
pub fn all() -> Vec<StorageClass> {
    let object = |class: &Class| StorageClass {
        metadata: ObjectMeta {
            name: Some(class.name.into()),
            annotations: (class.name == "local")
                .then(|| BTreeMap::from([(DEFAULT.to_owned(), "true".to_owned())])),
            ..ObjectMeta::default()
        },
        provisioner: format!("{OURS}{}", class.provisioner),
        reclaim_policy: Some("Delete".into()),
        allow_volume_expansion: Some(true),
        volume_binding_mode: Some(
            if class.local { "WaitForFirstConsumer" } else { "Immediate" }.into(),
        ),
        ..StorageClass::default()
    };
    CLASSES.iter().map(object).collect()
}

/// Why a class cannot serve a claim.
pub fn refuses(class: &StorageClass, claim: &PersistentVolumeClaim) -> Option<String> {
    let kind = class.provisioner.strip_prefix(OURS)?;
    let spec = claim.spec.as_ref()?;
    let mode = spec.volume_mode.as_deref().unwrap_or("Filesystem");
    let gives = if kind.ends_with("-block") { "Block" } else { "Filesystem" };
    if !CLASSES.iter().any(|class| class.provisioner == kind) {
        return Some(format!("there is no provisioner {:?}", class.provisioner));
    }
    if kind != "scratch" && mode != gives {
        return Some(format!("its volumes have volumeMode {gives}, and the claim wants {mode}"));
    }
    let shares = kind.starts_with("shared");
    let many = |mode: &&String| mode.ends_with("Many") && !shares;
    let modes = spec.access_modes.as_deref().unwrap_or_default();
    let wrong = modes.iter().find(many)?;
    Some(format!("its volumes are each on one node, and cannot be {wrong}"))
}
