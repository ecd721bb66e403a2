//! QEMU itself, the machine and its vCPUs.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Empty;
use crate::schema::SchemaInfo;

open_enum! {
    /// A capability of the protocol.
    Capability {
        Oob = "oob",
    }
}

command! {
    /// Ends the negotiation. [`Client::connect`](crate::Client::connect) has sent it already.
    QmpCapabilities = "qmp_capabilities" {
        /// What to enable of what the greeting offered.
        enable: Vec<Capability>,
    } -> Empty
}

command! {
    /// Whether the guest runs, and in what state it is.
    QueryStatus = "query-status" -> StatusInfo
}

/// The reply of [`QueryStatus`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StatusInfo {
    /// Whether the vCPUs run.
    pub running: bool,
    /// The state.
    pub status: RunState,
}

open_enum! {
    /// The state of the machine.
    RunState {
        Debug = "debug",
        Inmigrate = "inmigrate",
        InternalError = "internal-error",
        IoError = "io-error",
        Paused = "paused",
        Postmigrate = "postmigrate",
        Prelaunch = "prelaunch",
        FinishMigrate = "finish-migrate",
        RestoreVm = "restore-vm",
        Running = "running",
        SaveVm = "save-vm",
        Shutdown = "shutdown",
        Suspended = "suspended",
        Watchdog = "watchdog",
        GuestPanicked = "guest-panicked",
        Colo = "colo",
    }
}

command! {
    /// QEMU's version.
    QueryVersion = "query-version" -> Version
}

/// QEMU's version. Say it to people; ask [`schema`](crate::schema) what a QEMU can do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// The numbers.
    pub qemu: VersionTriple,
    /// The packager's text; may be empty.
    #[serde(default)]
    pub package: String,
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let VersionTriple { major, minor, micro } = self.qemu;
        write!(f, "{major}.{minor}.{micro}")
    }
}

/// The three numbers of a version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct VersionTriple {
    /// Major.
    pub major: u32,
    /// Minor.
    pub minor: u32,
    /// Micro.
    pub micro: u32,
}

command! {
    /// All that this QEMU's QMP consists of; for [`Schema`](crate::schema::Schema).
    QueryQmpSchema = "query-qmp-schema" -> Vec<SchemaInfo>
}

command! {
    /// Stops the vCPUs.
    Stop = "stop" -> Empty
}

command! {
    /// Lets the vCPUs run. Takes the image locks if the machine came in by migration.
    Cont = "cont" -> Empty
}

command! {
    /// Presses the power button.
    SystemPowerdown = "system_powerdown" -> Empty
}

command! {
    /// Resets the machine.
    SystemReset = "system_reset" -> Empty
}

command! {
    /// Ends QEMU at once.
    Quit = "quit" -> Empty
}

command! {
    /// Whether KVM runs the guest.
    QueryKvm = "query-kvm" -> KvmInfo
}

/// The reply of [`QueryKvm`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct KvmInfo {
    /// Whether this machine uses KVM.
    pub enabled: bool,
    /// Whether this QEMU was built with it.
    pub present: bool,
}

command! {
    /// The machine types of this QEMU.
    QueryMachines = "query-machines" -> Vec<MachineInfo>
}

/// One machine type.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MachineInfo {
    /// Its name, such as `pc-q35-7.2`.
    pub name: String,
    /// What it is also called, such as `q35`.
    pub alias: Option<String>,
    /// Whether it is taken when none is named.
    #[serde(default)]
    pub is_default: bool,
    /// The most vCPUs it takes.
    pub cpu_max: u32,
    /// Whether it is to be removed from QEMU.
    #[serde(default)]
    pub deprecated: bool,
}

command! {
    /// The CPU models of this QEMU.
    QueryCpuDefinitions = "query-cpu-definitions" -> Vec<CpuDefinition>
}

/// One CPU model.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CpuDefinition {
    /// Its name.
    pub name: String,
    /// Whether it stays the same wherever it runs; `None` when unknown.
    pub migration_safe: Option<bool>,
    /// What keeps it from running on this host; empty when it runs.
    #[serde(default)]
    pub unavailable_features: Vec<String>,
    /// What name it is an alias of, on this machine type.
    pub alias_of: Option<String>,
    /// Whether it is to be removed from QEMU.
    #[serde(default)]
    pub deprecated: bool,
}

open_enum! {
    /// How a CPU model is spelt out.
    CpuModelExpansionType {
        /// A static base model and what differs from it.
        Static = "static",
        /// Every property.
        Full = "full",
    }
}

command! {
    /// What a CPU model means on this host.
    QueryCpuModelExpansion = "query-cpu-model-expansion" {
        /// How to spell it out.
        r#type: CpuModelExpansionType,
        /// The model.
        model: CpuModel,
    } -> CpuModelExpansion
}

/// A CPU model with its properties.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct CpuModel {
    /// Its name, such as `host` or `Nehalem`.
    pub name: String,
    /// Properties by name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub props: Option<Value>,
}

/// The reply of [`QueryCpuModelExpansion`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CpuModelExpansion {
    /// The model, spelt out.
    pub model: CpuModel,
}

command! {
    /// The vCPUs, without stopping them.
    QueryCpusFast = "query-cpus-fast" -> Vec<CpuInfo>
}

/// One vCPU.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CpuInfo {
    /// Its number.
    pub cpu_index: u32,
    /// Its object.
    pub qom_path: String,
    /// The host's thread that runs it.
    pub thread_id: u32,
}

command! {
    /// The character devices, with the names that QEMU gave to ptys and sockets.
    QueryChardev = "query-chardev" -> Vec<ChardevInfo>
}

/// One character device.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ChardevInfo {
    /// Its id.
    pub label: String,
    /// Where it leads, such as `pty:/dev/pts/3`.
    pub filename: String,
    /// Whether the guest's side is open.
    pub frontend_open: bool,
}

command! {
    /// A command of the human monitor. Its text differs between versions: for tests and people.
    HumanMonitorCommand = "human-monitor-command" {
        /// The command.
        command_line: String,
    } -> String
}
