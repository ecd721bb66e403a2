//! DataVolume: a claim with something in it.

use crate::conditions::Condition;
use k8s_openapi::api::core::v1::PersistentVolumeClaimSpec;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::CustomResource;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What is wanted.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, CustomResource)]
#[kube(
    group = "cdi.kubevirt.io",
    version = "v1beta1",
    kind = "DataVolume",
    plural = "datavolumes",
    namespaced,
    status = "Status",
    schema = "disabled"
)]
#[serde(rename_all = "camelCase", default)]
pub struct Spec {
    /// Where its content comes from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<Source>,
    /// The claim, as it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pvc: Option<PersistentVolumeClaimSpec>,
    /// The claim, completed from the StorageProfile of its class.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub storage: Option<PersistentVolumeClaimSpec>,
    /// `kubevirt`: a disk. `archive` is not built.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content_type: Option<String>,
    /// Whether all of it is allocated at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub preallocation: Option<bool>,
}

/// Where content comes from: exactly one of them.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Source {
    /// From nowhere: an empty disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blank: Option<Blank>,
    /// From a web server.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub http: Option<Http>,
    /// From an image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub registry: Option<Registry>,
    /// From another claim.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pvc: Option<FromClaim>,
    /// From a person.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub upload: Option<Upload>,
}

/// An empty disk.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Blank {}

/// From a person.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Upload {}

/// From a web server.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Http {
    /// http or https.
    pub url: String,
    /// `sha256:…` and the like.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checksum: Option<String>,
    /// A Secret with `accessKeyId` and `secretKey`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<String>,
    /// A ConfigMap with certificates of authorities.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cert_config_map: Option<String>,
    /// Headers of the request.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub extra_headers: Vec<String>,
}

/// From an image.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Registry {
    /// `docker://host/name:tag`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// `pod` or `node`: both mean the same here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pull_method: Option<String>,
    /// A Secret with `accessKeyId` and `secretKey`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<String>,
    /// A ConfigMap with certificates of authorities.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cert_config_map: Option<String>,
}

/// From another claim.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct FromClaim {
    /// The claim's; empty: the DataVolume's.
    pub namespace: String,
    /// The claim's.
    pub name: String,
}

impl FromClaim {
    /// The claim's namespace, as a DataVolume of a namespace means it.
    pub fn namespace_in<'a>(&'a self, own: &'a str) -> &'a str {
        if self.namespace.is_empty() { own } else { &self.namespace }
    }
}

/// How far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash, Serialize, Deserialize)]
#[expect(missing_docs, reason = "CDI's words")]
pub enum Phase {
    #[default]
    #[serde(rename = "")]
    Unset,
    Pending,
    #[serde(rename = "PVCBound")]
    PvcBound,
    ImportScheduled,
    ImportInProgress,
    CloneScheduled,
    CloneInProgress,
    UploadScheduled,
    UploadReady,
    WaitForFirstConsumer,
    PendingPopulation,
    Succeeded,
    Failed,
    Unknown,
    Paused,
}

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Status {
    /// The claim's: the DataVolume's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub claim_name: Option<String>,
    /// How far it is.
    pub phase: Phase,
    /// In percent, or `N/A`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub progress: Option<String>,
    /// How often it has begun again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub restart_count: Option<u32>,
    /// What holds and what does not.
    pub conditions: Vec<Condition>,
}

/// What a class of storage can do.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, CustomResource)]
#[kube(
    group = "cdi.kubevirt.io",
    version = "v1beta1",
    kind = "StorageProfile",
    plural = "storageprofiles",
    status = "ProfileStatus",
    schema = "disabled"
)]
#[serde(rename_all = "camelCase", default)]
pub struct ProfileSpec {
    /// What a person says of it: it goes before what was found.
    pub claim_property_sets: Vec<ClaimProperties>,
}

/// What was found of a class.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ProfileStatus {
    /// Best first.
    pub claim_property_sets: Vec<ClaimProperties>,
    /// Of the class.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub provisioner: Option<String>,
    /// The class.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub storage_class: Option<String>,
}

/// What a claim can be.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ClaimProperties {
    /// Who may use it at once.
    pub access_modes: Vec<String>,
    /// Filesystem or Block.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub volume_mode: Option<String>,
}

/// How disks are imported, for the whole cluster.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, CustomResource)]
#[kube(
    group = "cdi.kubevirt.io",
    version = "v1beta1",
    kind = "CDIConfig",
    plural = "cdiconfigs",
    status = "ConfigStatus",
    schema = "disabled"
)]
#[serde(rename_all = "camelCase", default)]
pub struct ConfigSpec {
    /// What file systems take of a claim.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub filesystem_overhead: Option<Overhead>,
    /// Hosts, with ports or without, whose registries may be asked over plain HTTP.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub insecure_registries: Vec<String>,
}

/// What is in force.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ConfigStatus {
    /// What file systems take of a claim.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub filesystem_overhead: Option<Overhead>,
}

/// What file systems take of a claim: a part of it, as `0.06`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Overhead {
    /// Of all classes that are not named.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub global: Option<String>,
    /// Of classes, by name.
    pub storage_class: BTreeMap<String, String>,
}

/// What was asked for in bytes.
pub fn requested(claim: &PersistentVolumeClaimSpec) -> Option<&Quantity> {
    let requests: Option<&BTreeMap<String, Quantity>> =
        claim.resources.as_ref().and_then(|resources| resources.requests.as_ref());
    requests.and_then(|requests| requests.get("storage"))
}
