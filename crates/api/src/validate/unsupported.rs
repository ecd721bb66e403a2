//! Fields of KubeVirt's API on which Godwit does not act.

use super::Report;
use crate::support;
use serde_json::Value;

/// Without these a guest would not be what its owner expects: they are refused. All others are
/// warned of.
const REFUSED: [(&str, &str); 37] = [
    ("instancetype.inferFromVolume", "it is not found by a volume: name it"),
    ("preference.inferFromVolume", "it is not found by a volume: name it"),
    ("utilityVolumes", "utility volumes are not built"),
    ("accessCredentials", "access credentials are not built: put keys into cloud-init's user data"),
    ("resourceClaims", "claims of devices are not built"),
    ("domain.chassis", "the chassis cannot be set"),
    ("domain.launchSecurity", "confidential guests are not built"),
    ("domain.ioThreads", "I/O threads cannot be set"),
    ("domain.ioThreadsPolicy", "I/O threads cannot be set"),
    ("domain.cpu.dedicatedCpuPlacement", "processors cannot be dedicated"),
    ("domain.cpu.isolateEmulatorThread", "processors cannot be dedicated"),
    ("domain.cpu.realtime", "realtime guests are not built"),
    ("domain.cpu.numa", "NUMA cannot be passed through"),
    ("domain.cpu.features", "features cannot be set one by one: name a model that has them"),
    ("domain.memory.hugepages", "huge pages are not built"),
    ("domain.memory.reservedOverhead", "reserved overhead is not built"),
    ("domain.devices.hostDevices", "devices of the host cannot be passed through"),
    ("domain.devices.gpus", "GPUs cannot be passed through"),
    ("domain.devices.filesystems", "virtiofs is not built: use a disk"),
    ("domain.devices.tpm", "TPMs are not built"),
    ("domain.devices.watchdog", "watchdogs are not built"),
    ("domain.devices.clientPassthrough", "USB redirection is not built"),
    ("domain.devices.sound", "sound cards are not built"),
    ("domain.devices.autoattachVSOCK", "VSOCK is not built"),
    ("domain.devices.downwardMetrics", "downward metrics are not built"),
    ("domain.devices.panicDevices", "panic devices are not built"),
    ("domain.devices.useVirtioTransitional", "transitional virtio is not built"),
    ("domain.features.hyperv", "Hyper-V enlightenments are not built"),
    ("domain.features.hypervPassthrough", "Hyper-V enlightenments are not built"),
    ("domain.features.kvm", "KVM cannot be hidden"),
    ("domain.features.smm", "SMM cannot be set"),
    ("domain.firmware.acpi", "ACPI tables cannot be given"),
    ("domain.firmware.bootloader.efi.persistent", "UEFI variables are not kept yet"),
    ("readinessProbe", "probes of guests are not built"),
    ("livenessProbe", "probes of guests are not built"),
    ("sourceRef", "DataSources are not built: name the source itself"),
    ("checkpoints", "imports in steps are not built"),
];
/// Of each disk.
const OF_DISKS: [(&str, &str); 4] = [
    ("lun", "LUNs are not built: use disk"),
    ("shareable", "disks cannot be shared between guests"),
    ("blockSize", "block sizes cannot be set"),
    ("errorPolicy", "a guest is told of errors, always"),
];
/// Of each interface.
const OF_INTERFACES: [(&str, &str); 6] = [
    ("sriov", "SR-IOV is not built: use masquerade or bridge"),
    ("macvtap", "macvtap is gone: use masquerade or bridge"),
    ("slirp", "slirp is gone: use masquerade"),
    ("passt", "passt is not built: say masquerade"),
    ("passtBinding", "passt is not built: say masquerade"),
    ("binding", "network binding plugins are not built: use masquerade or bridge"),
];

/// Notes fields that Godwit does not know: refused or warned of.
pub fn judge(report: &mut Report, field: &str, spec: &Value, unknown: &[String]) {
    let mut rest = Vec::new();
    for path in unknown {
        match refusal(path) {
            Some(why) if !is_off(support::at(spec, path)) => {
                report.fault(format!("{field}.{path}"), why);
            }
            Some(_) => {}
            None => rest.push(path.clone()),
        }
    }
    warn(report, field, &rest);
}

/// Warns of fields that Godwit does not know.
pub fn warn(report: &mut Report, field: &str, unknown: &[String]) {
    for path in unknown {
        report.warnings.push(format!("{field}.{path} is not supported and has no effect"));
    }
}

/// Why a field cannot be let pass.
fn refusal(path: &str) -> Option<&'static str> {
    let below = |(name, why): &(&str, &'static str)| {
        let rest = path.strip_prefix(name)?;
        (rest.is_empty() || rest.starts_with(['.', '['])).then_some(*why)
    };
    let element = |list: &str, of: &[(&str, &'static str)]| {
        let (_, rest) = path.strip_prefix(list)?.split_once("].")?;
        of.iter().find(|(name, _)| rest.split('.').next() == Some(name)).map(|(_, why)| *why)
    };
    REFUSED
        .iter()
        .find_map(below)
        .or_else(|| element("domain.devices.disks[", &OF_DISKS))
        .or_else(|| element("domain.devices.interfaces[", &OF_INTERFACES))
        .or_else(|| source(path))
}

/// Sources of volumes and DataVolumes without which there is no disk.
fn source(path: &str) -> Option<&'static str> {
    if path.starts_with("volumes[") && !path.ends_with(".name") {
        let (_, field) = path.split_once("].")?;
        return (!field.contains('.')).then_some("volumes of this kind are not built");
    }
    let field = path.strip_prefix("source.")?;
    (!field.contains('.'))
        .then_some("sources of this kind are not built: use http, registry, pvc, upload or blank")
}

/// Whether a field says that something is not wanted.
fn is_off(value: Option<&Value>) -> bool {
    matches!(value, None | Some(Value::Null | Value::Bool(false)))
}
