//! VirtualMachine: what a person wants to run, and when.

use crate::conditions::Condition;
use crate::instancetype::{Matcher, Pinned};
use crate::vmi::MigratedVolume;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::CustomResource;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What is wanted.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, CustomResource)]
#[kube(
    group = "kubevirt.io",
    version = "v1",
    kind = "VirtualMachine",
    plural = "virtualmachines",
    namespaced,
    status = "Status",
    schema = "disabled"
)]
#[serde(rename_all = "camelCase", default)]
pub struct Spec {
    /// The older form of the strategy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub running: Option<bool>,
    /// When it runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub run_strategy: Option<RunStrategy>,
    /// What a change of volumes means.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub update_volumes_strategy: Option<String>,
    /// What its guest has, if the template does not say it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instancetype: Option<Matcher>,
    /// How that is shown to the guest, where the template does not say it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub preference: Option<Matcher>,
    /// Its VMI.
    pub template: Template,
    /// Its disks, which live as long as it does.
    pub data_volume_templates: Vec<DataVolumeTemplate>,
}

/// When a VM runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum RunStrategy {
    /// Always.
    Always,
    /// Never.
    Halted,
    /// When a person says so.
    Manual,
    /// Until its guest shuts down by itself.
    RerunOnFailure,
    /// One time.
    Once,
    /// When its guest arrives from elsewhere.
    WaitAsReceiver,
}

impl Spec {
    /// The strategy, in either form.
    pub fn strategy(&self) -> RunStrategy {
        match (self.run_strategy, self.running) {
            (Some(strategy), _) => strategy,
            (None, Some(true)) => RunStrategy::Always,
            (None, _) => RunStrategy::Halted,
        }
    }
}

/// A VMI to be.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Template {
    /// Its labels and annotations.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metadata: Option<ObjectMeta>,
    /// Its spec, as it was sent.
    pub spec: Value,
}

/// A DataVolume to be.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DataVolumeTemplate {
    /// Its name, labels and annotations.
    pub metadata: ObjectMeta,
    /// Its spec, as it was sent.
    pub spec: Value,
}

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Status {
    /// There is a VMI.
    pub created: bool,
    /// It runs.
    pub ready: bool,
    /// In one word.
    pub printable_status: Printable,
    /// What holds and what does not.
    pub conditions: Vec<Condition>,
    /// What was asked for and is not done yet, first things first.
    pub state_change_requests: Vec<Request>,
    /// Starts that went wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start_failure: Option<StartFailure>,
    /// The generation of the spec that was last seen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// The generation of the spec.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub desired_generation: Option<i64>,
    /// The strategy that is followed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub run_strategy: Option<RunStrategy>,
    /// Which instancetype it has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instancetype_ref: Option<Pinned>,
    /// Which preference it has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub preference_ref: Option<Pinned>,
    /// Disks that are on their way to others. N.B. always said: `null` removes it.
    pub volume_update_state: Option<VolumeUpdateState>,
}

/// What becomes of a VM's volumes.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct VolumeUpdateState {
    /// Those that move.
    pub volume_migration_state: VolumeMigrationState,
}

/// Volumes that move.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct VolumeMigrationState {
    /// Which, and between which claims.
    pub migrated_volumes: Vec<MigratedVolume>,
}

/// A VM in one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash, Serialize, Deserialize)]
#[expect(missing_docs, reason = "KubeVirt's words")]
pub enum Printable {
    #[default]
    Stopped,
    Provisioning,
    Starting,
    Running,
    Paused,
    Stopping,
    Terminating,
    CrashLoopBackOff,
    Migrating,
    Unknown,
    ErrorUnschedulable,
    ErrImagePull,
    ImagePullBackOff,
    ErrorPvcNotFound,
    DataVolumeError,
    WaitingForVolumeBinding,
    WaitingForReceiver,
}

/// What a person asked for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Request {
    /// What.
    pub action: Action,
    /// How: `paused` is `true` for a start that stands still.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<std::collections::BTreeMap<String, String>>,
    /// With which VMI.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<String>,
}

/// What a person can ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Action {
    /// Make a VMI.
    Start,
    /// End the VMI.
    Stop,
}

/// Starts that went wrong, one after another.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct StartFailure {
    /// How many.
    pub consecutive_fail_count: u32,
    /// The last.
    #[serde(rename = "lastFailedVMIUID")]
    pub last_failed_vmi_uid: String,
    /// Not before this.
    pub retry_after_timestamp: Option<String>,
}
