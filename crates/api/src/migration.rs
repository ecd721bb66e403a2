//! VirtualMachineInstanceMigration: one live migration; and how migrations are to be made.

use crate::conditions::{Condition, Transition};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::CustomResource;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What is wanted.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, CustomResource)]
#[kube(
    group = "kubevirt.io",
    version = "v1",
    kind = "VirtualMachineInstanceMigration",
    plural = "virtualmachineinstancemigrations",
    namespaced,
    status = "Status",
    schema = "disabled"
)]
#[serde(rename_all = "camelCase", default)]
pub struct Spec {
    /// Of which VMI.
    pub vmi_name: String,
    /// What the target's node must have besides.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub added_node_selector: BTreeMap<String, String>,
    /// How urgent it is: `system-critical`, `user-triggered`, `system-maintenance`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub priority: Option<String>,
    /// To a VMI of another cluster, or of another name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub send_to: Option<SendTo>,
    /// From a VMI of another cluster, or of another name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub receive: Option<Receive>,
}

/// Where a guest is sent.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SendTo {
    /// By which both sides know that they mean the same migration.
    #[serde(rename = "migrationID")]
    pub migration_id: String,
    /// The other cluster's synchronizer: `host:port`.
    #[serde(rename = "connectURL")]
    pub connect_url: String,
}

/// That a guest is received.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Receive {
    /// By which both sides know that they mean the same migration.
    #[serde(rename = "migrationID")]
    pub migration_id: String,
}

/// Which side of a migration between two VMIs one is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// Whose guest leaves.
    Source,
    /// To whom it comes.
    Target,
}

impl Side {
    /// The other one.
    pub fn other(self) -> Self {
        match self {
            Self::Source => Self::Target,
            Self::Target => Self::Source,
        }
    }
}

impl Spec {
    /// The side that it is, and by which id, of a migration between two VMIs. None: the guest stays its
    /// VMI's. N.B. one that both sends and receives is of that kind, as KubeVirt has it.
    pub fn half(&self) -> Option<(Side, &str)> {
        match (&self.send_to, &self.receive) {
            (Some(to), None) => Some((Side::Source, &to.migration_id)),
            (None, Some(from)) => Some((Side::Target, &from.migration_id)),
            _ => None,
        }
    }
}

impl VirtualMachineInstanceMigration {
    /// Where it is.
    pub fn phase(&self) -> Phase {
        self.status.as_ref().map(|status| status.phase).unwrap_or_default()
    }

    /// Whether it is over.
    pub fn is_over(&self) -> bool {
        self.phase().is_final()
    }
}

/// Where a migration is.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
pub enum Phase {
    /// New.
    #[default]
    #[serde(rename = "")]
    Unset,
    /// It waits for its source, to say that it is there.
    WaitingForSync,
    /// It waits for its target, to say that it is there.
    Synchronizing,
    /// It waits for its turn.
    Pending,
    /// The target's pod looks for a node and is made ready.
    Scheduling,
    /// The target's pod is ready.
    Scheduled,
    /// The target's launcher is made ready.
    PreparingTarget,
    /// The target waits for the guest.
    TargetReady,
    /// The guest is on its way.
    Running,
    /// The guest runs at the target.
    Succeeded,
    /// The guest runs where it ran, or has ended.
    Failed,
}

impl Phase {
    /// All of them, in the order in which they come.
    pub const ALL: [Self; 11] = [
        Self::Unset,
        Self::WaitingForSync,
        Self::Synchronizing,
        Self::Pending,
        Self::Scheduling,
        Self::Scheduled,
        Self::PreparingTarget,
        Self::TargetReady,
        Self::Running,
        Self::Succeeded,
        Self::Failed,
    ];

    /// Whether it is over.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed)
    }

    /// Whether it has a place among those that are carried out at the same time.
    pub fn is_active(self) -> bool {
        self > Self::Pending && !self.is_final()
    }

    /// Whether launchers and handlers have it in hand.
    pub fn is_handed_off(self) -> bool {
        matches!(self, Self::PreparingTarget | Self::TargetReady | Self::Running)
    }
}

impl std::fmt::Display for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unset => Ok(()),
            named => std::fmt::Debug::fmt(named, f),
        }
    }
}

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Status {
    /// How far it is.
    pub phase: Phase,
    /// When it came to each phase.
    pub phase_transition_timestamps: Vec<Transition<Phase>>,
    /// What holds and what does not.
    pub conditions: Vec<Condition>,
    /// How far it is, as the launcher tells. N.B. handlers write it, and it is never written from here.
    #[serde(skip_serializing)]
    pub progress: Option<serde_json::Value>,
    /// What the VMI says of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub migration_state: Option<State>,
    /// Where its source finds this cluster's synchronizer.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub synchronization_addresses: Vec<String>,
    /// What the other side says. N.B. synchronizers write it, and it is never written from here.
    #[serde(skip_serializing)]
    pub peer: Option<Peer>,
}

/// What is known of the other side of a migration between two VMIs.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Peer {
    /// What it said last.
    pub half: Option<Half>,
    /// Why it is not heard of, where it is not.
    pub trouble: Option<String>,
    /// Its cluster is not believed any more.
    pub revoked: bool,
}

/// One side of a migration between two VMIs, as it tells the other.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Half {
    /// Counts what it says: what is older than what is known is not heard.
    pub sequence: u64,
    /// Its cluster's id, which its certificate proves.
    pub cluster: String,
    /// Its VMI's namespace.
    pub namespace: String,
    /// Its VMI's name.
    pub name: String,
    /// Its VMI's uid.
    pub vmi: String,
    /// Its migration's uid.
    pub migration: String,
    /// How far it is.
    pub phase: Phase,
    /// Where its synchronizer is found.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// The node on which its pod is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// That node's gateway.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gateway: Option<String>,
    /// The pod that has the guest, or is to have it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    /// What a node must have for the guest's processor: a source's.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub node_selectors: BTreeMap<String, String>,
    /// When the guest began to move: a source's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub started: Option<String>,
    /// When the guest ran there: a target's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub arrived: Option<String>,
    /// It is not wanted any more.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub aborts: bool,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
}

impl Status {
    /// Comes to a phase, and writes down when.
    pub fn enter(&mut self, phase: Phase, now: jiff::Timestamp) {
        if self.phase != phase {
            self.phase = phase;
            self.phase_transition_timestamps.push(Transition::new(phase, now));
        }
    }

    /// When it came to the phase in which it is.
    pub fn since(&self) -> Option<jiff::Timestamp> {
        self.phase_transition_timestamps.last()?.at()
    }
}

/// A migration as its VMI's status has it (`migrationState`). It is written by merge patches in
/// which `null` removes: so all of it is always said.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct State {
    /// The migration's uid.
    pub migration_uid: Option<String>,
    /// The node that the guest leaves.
    pub source_node: Option<String>,
    /// The pod that the guest leaves.
    pub source_pod: Option<String>,
    /// The node to which it goes.
    pub target_node: Option<String>,
    /// The pod to which it goes.
    pub target_pod: Option<String>,
    /// Where the target's gateway is: the target waits for the guest.
    pub target_node_address: Option<String>,
    /// When the guest began to move.
    pub start_timestamp: Option<String>,
    /// When it ran at the target.
    pub target_node_domain_ready_timestamp: Option<String>,
    /// Whether it was seen at the target.
    pub target_node_domain_detected: Option<bool>,
    /// When it was over.
    pub end_timestamp: Option<String>,
    /// It is over, and the guest runs at the target.
    pub completed: Option<bool>,
    /// It is over, and the guest does not.
    pub failed: Option<bool>,
    /// Why not.
    pub failure_reason: Option<String>,
    /// It is not wanted any more.
    pub abort_requested: Option<bool>,
    /// What became of that: `Aborting`, `Succeeded`, `Failed`.
    pub abort_status: Option<String>,
    /// `PreCopy`.
    pub mode: Option<String>,
    /// The policy by which it is made.
    pub migration_policy_name: Option<String>,
    /// How it is made.
    pub migration_configuration: Option<Options>,
    /// Over which network: `Pod` or `Migration`.
    pub migration_network_type: Option<String>,
    /// The VMI that the guest leaves, where that is another.
    pub source_state: Option<End>,
    /// The VMI to which the guest goes, where that is another.
    pub target_state: Option<End>,
}

/// One end of a migration between two VMIs.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct End {
    /// The cluster's id.
    pub cluster: Option<String>,
    /// The VMI's namespace.
    pub domain_namespace: Option<String>,
    /// The VMI's name.
    pub domain_name: Option<String>,
    /// The VMI's uid.
    #[serde(rename = "virtualMachineInstanceUID")]
    pub vmi_uid: Option<String>,
    /// The migration's uid there.
    #[serde(rename = "migrationUID")]
    pub migration_uid: Option<String>,
    /// Where the synchronizer is found.
    pub sync_address: Option<String>,
    /// The pod's node.
    pub node: Option<String>,
    /// The node's gateway.
    pub gateway: Option<String>,
    /// The pod that has the guest, or is to have it.
    pub pod: Option<String>,
    /// What a node must have for the guest's processor: a source's.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub node_selectors: BTreeMap<String, String>,
}

impl From<&Half> for End {
    fn from(half: &Half) -> Self {
        let half = half.clone();
        Self {
            cluster: Some(half.cluster),
            domain_namespace: Some(half.namespace),
            domain_name: Some(half.name),
            vmi_uid: Some(half.vmi),
            migration_uid: Some(half.migration),
            sync_address: half.address,
            node: half.node,
            gateway: half.gateway,
            pod: half.pod,
            node_selectors: half.node_selectors,
        }
    }
}

impl State {
    /// The attempt, as launchers and owner records know it: the uid of the migration at the target.
    pub fn attempt(&self) -> Option<&str> {
        let at_target = self.target_state.as_ref().and_then(|end| end.migration_uid.as_deref());
        at_target.or(self.migration_uid.as_deref())
    }

    /// The other end, where the guest comes from another VMI or goes to one.
    pub fn other_end(&self) -> Option<&End> {
        // N.B. each side says of itself what all migrations say.
        self.source_state.as_ref().or(self.target_state.as_ref())
    }

    /// Whether it is over, one way or the other.
    pub fn is_over(&self) -> bool {
        self.completed == Some(true) || self.failed == Some(true)
    }
}

/// How migrations are made: what the cluster's settings say, what a policy says, and what is in
/// effect, in the order in which each overrules the one before.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Options {
    /// Whether a guest that cannot be caught is slowed down.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allow_auto_converge: Option<bool>,
    /// Whether a guest that has not been caught in its time is stopped until it is through.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allow_workload_disruption: Option<bool>,
    /// What may change. A policy's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub experimental: Option<Experimental>,
    /// The network that guests take, by its name; none: the one that nodes have anyhow.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network: Option<String>,
    /// Bytes per second; none or 0: no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth_per_migration: Option<Quantity>,
    /// Seconds for each GiB of memory and of disks that are copied.
    #[serde(rename = "completionTimeoutPerGiB", skip_serializing_if = "Option::is_none")]
    pub completion_timeout_per_gib: Option<i64>,
    /// The longest pause of the guest, milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_downtime_ms: Option<i64>,
    /// Seconds without progress.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub progress_timeout: Option<i64>,
    /// Migrations of the cluster at the same time. No policy's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parallel_migrations_per_cluster: Option<u32>,
    /// Migrations away from one node at the same time. No policy's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parallel_outbound_migrations_per_node: Option<u32>,
    /// The taint of a node that guests are to leave. No policy's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_drain_taint_key: Option<String>,
}

/// What may change, of a policy.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Experimental {
    /// How disks and memory are compressed; none: disks are where it makes the move faster.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compression: Option<Compression>,
    /// How a longer pause comes to be allowed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downtime_tuning: Option<DowntimeTuning>,
    /// When a move is held to be stuck.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stall_detector: Option<StallDetector>,
}

/// How a move is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// Not at all.
    None,
    /// By Zstandard.
    Zstd,
}

/// How a longer pause comes to be allowed.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct DowntimeTuning {
    /// The pause to be aimed at first, milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initial_ms: Option<i64>,
}

/// When a move is held to be stuck.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct StallDetector {
    /// Seconds without progress.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stall_progress_timeout: Option<i64>,
}

/// Seconds per GiB where nothing is said; as KubeVirt.
pub const COMPLETION_PER_GIB: i64 = 150;
/// The longest pause where nothing is said; as KubeVirt.
pub const MAX_DOWNTIME_MS: i64 = 900;
/// Seconds without progress where nothing is said; as KubeVirt.
pub const PROGRESS_TIMEOUT: i64 = 150;
/// Migrations of a cluster at the same time where nothing is said; as KubeVirt.
pub const PER_CLUSTER: u32 = 5;
/// Migrations away from a node at the same time where nothing is said; as KubeVirt.
pub const PER_NODE: u32 = 2;
/// The taint of a node that guests are to leave where nothing is said; as KubeVirt.
pub const DRAIN_TAINT: &str = "kubevirt.io/drain";

impl Options {
    /// These, and where they say nothing what `others` say.
    pub fn or(self, others: &Self) -> Self {
        let others = others.clone();
        Self {
            allow_auto_converge: self.allow_auto_converge.or(others.allow_auto_converge),
            allow_workload_disruption: self
                .allow_workload_disruption
                .or(others.allow_workload_disruption),
            experimental: self.experimental.or(others.experimental),
            network: self.network.or(others.network),
            bandwidth_per_migration: self
                .bandwidth_per_migration
                .or(others.bandwidth_per_migration),
            completion_timeout_per_gib: self
                .completion_timeout_per_gib
                .or(others.completion_timeout_per_gib),
            max_downtime_ms: self.max_downtime_ms.or(others.max_downtime_ms),
            progress_timeout: self.progress_timeout.or(others.progress_timeout),
            parallel_migrations_per_cluster: self
                .parallel_migrations_per_cluster
                .or(others.parallel_migrations_per_cluster),
            parallel_outbound_migrations_per_node: self
                .parallel_outbound_migrations_per_node
                .or(others.parallel_outbound_migrations_per_node),
            node_drain_taint_key: self.node_drain_taint_key.or(others.node_drain_taint_key),
        }
    }

    /// What is in effect where nobody says anything.
    pub fn defaults() -> Self {
        Self {
            allow_auto_converge: Some(false),
            allow_workload_disruption: Some(false),
            experimental: None,
            network: None,
            bandwidth_per_migration: Some(Quantity("0".into())),
            completion_timeout_per_gib: Some(COMPLETION_PER_GIB),
            max_downtime_ms: Some(MAX_DOWNTIME_MS),
            progress_timeout: Some(PROGRESS_TIMEOUT),
            parallel_migrations_per_cluster: Some(PER_CLUSTER),
            parallel_outbound_migrations_per_node: Some(PER_NODE),
            node_drain_taint_key: Some(DRAIN_TAINT.into()),
        }
    }
}

/// MigrationPolicy: how migrations of some VMIs are made.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, CustomResource)]
#[kube(
    group = "migrations.kubevirt.io",
    version = "v1alpha1",
    kind = "MigrationPolicy",
    plural = "migrationpolicies",
    schema = "disabled"
)]
#[serde(rename_all = "camelCase", default)]
pub struct PolicySpec {
    /// Of which; none: of no VMI.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub selectors: Option<Selectors>,
    /// How.
    #[serde(flatten)]
    pub options: Options,
}

/// Labels that all must be there.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Selectors {
    /// Of the VMI's namespace.
    pub namespace_selector: BTreeMap<String, String>,
    /// Of the VMI.
    pub virtual_machine_instance_selector: BTreeMap<String, String>,
}
