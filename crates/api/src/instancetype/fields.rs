//! Where the fields of instancetypes and preferences are in a VMI's spec: whether Godwit acts on them there
//! is judged there.

/// A field, and the field of the VMI's spec that it is.
pub type Row = (&'static str, &'static str);

/// Of an instancetype.
pub const INSTANCETYPE: [Row; 16] = [
    ("cpu.model", "domain.cpu.model"),
    ("cpu.maxSockets", "domain.cpu.maxSockets"),
    ("cpu.dedicatedCPUPlacement", "domain.cpu.dedicatedCpuPlacement"),
    ("cpu.isolateEmulatorThread", "domain.cpu.isolateEmulatorThread"),
    ("cpu.numa", "domain.cpu.numa"),
    ("cpu.realtime", "domain.cpu.realtime"),
    ("memory.guest", "domain.memory.guest"),
    ("memory.maxGuest", "domain.memory.maxGuest"),
    ("memory.hugepages", "domain.memory.hugepages"),
    ("ioThreads", "domain.ioThreads"),
    ("ioThreadsPolicy", "domain.ioThreadsPolicy"),
    ("launchSecurity", "domain.launchSecurity"),
    ("gpus", "domain.devices.gpus"),
    ("hostDevices", "domain.devices.hostDevices"),
    ("nodeSelector", "nodeSelector"),
    ("schedulerName", "schedulerName"),
];
/// What a template cannot say besides, where there is an instancetype.
pub const RESOURCES: [&str; 4] = [
    "domain.resources.requests.cpu",
    "domain.resources.limits.cpu",
    "domain.resources.requests.memory",
    "domain.resources.limits.memory",
];

/// Of a preference.
pub const PREFERENCE: [Row; 26] = [
    ("clock.preferredClockOffset.utc", "domain.clock.utc"),
    ("clock.preferredClockOffset.timezone", "domain.clock.timezone"),
    ("clock.preferredTimer", "domain.clock.timer"),
    ("cpu.preferredCPUFeatures", "domain.cpu.features"),
    ("devices.preferredAutoattachGraphicsDevice", "domain.devices.autoattachGraphicsDevice"),
    ("devices.preferredAutoattachInputDevice", "domain.devices.autoattachInputDevice"),
    ("devices.preferredAutoattachMemBalloon", "domain.devices.autoattachMemBalloon"),
    ("devices.preferredAutoattachPodInterface", "domain.devices.autoattachPodInterface"),
    ("devices.preferredAutoattachSerialConsole", "domain.devices.autoattachSerialConsole"),
    ("devices.preferredBlockMultiQueue", "domain.devices.blockMultiQueue"),
    ("devices.preferredDisableHotplug", "domain.devices.disableHotplug"),
    ("devices.preferredNetworkInterfaceMultiQueue", "domain.devices.networkInterfaceMultiqueue"),
    ("devices.preferredRng", "domain.devices.rng"),
    ("devices.preferredTPM", "domain.devices.tpm"),
    ("devices.preferredUseVirtioTransitional", "domain.devices.useVirtioTransitional"),
    ("features.preferredAcpi", "domain.features.acpi"),
    ("features.preferredApic", "domain.features.apic"),
    ("features.preferredHyperv", "domain.features.hyperv"),
    ("features.preferredKvm", "domain.features.kvm"),
    ("features.preferredPvspinlock", "domain.features.pvspinlock"),
    ("features.preferredSmm", "domain.features.smm"),
    ("machine.preferredMachineType", "domain.machine.type"),
    ("preferredArchitecture", "architecture"),
    ("preferredLaunchSecurity", "domain.launchSecurity"),
    ("preferredSubdomain", "subdomain"),
    ("preferredTerminationGracePeriodSeconds", "terminationGracePeriodSeconds"),
];
/// Of a preference, for each disk of a kind.
pub const OF_DISKS: [(&str, Row); 7] = [
    ("disk", ("devices.preferredDiskBus", "disk.bus")),
    ("disk", ("devices.preferredDiskCache", "cache")),
    ("disk", ("devices.preferredDiskIO", "io")),
    ("disk", ("devices.preferredDiskBlockSize", "blockSize")),
    ("disk", ("devices.preferredDiskDedicatedIoThread", "dedicatedIOThread")),
    ("cdrom", ("devices.preferredCdromBus", "cdrom.bus")),
    ("lun", ("devices.preferredLunBus", "lun.bus")),
];
/// Of a preference, for each interface. N.B. how one is connected that does not say it is decided when the
/// VMI is made: by masquerade on the pod's network, which is all that could be preferred.
pub const OF_INTERFACES: [Row; 1] = [("devices.preferredInterfaceModel", "model")];
/// Of a preference, for each input.
pub const OF_INPUTS: [Row; 2] =
    [("devices.preferredInputBus", "bus"), ("devices.preferredInputType", "type")];

#[cfg(test)]
mod test {
    use super::*;
    use serde_json::Value;

    /// Of devices that no guest has here; and what is not said by a field of a VMI's spec, or not by one.
    const ELSEWHERE: [&str; 21] = [
        "annotations",
        "cpu.guest",
        "cpu.preferredCPUTopology",
        "cpu.spreadOptions",
        "preferSpreadSocketToCoreRatio",
        "memory.overcommitPercent",
        "requirements.architecture",
        "requirements.cpu",
        "requirements.memory",
        "volumes.preferredStorageClassName",
        "firmware.preferredEfi",
        "firmware.preferredUseBios",
        "firmware.preferredUseBiosSerial",
        "firmware.preferredUseEfi",
        "firmware.preferredUseSecureBoot",
        "clock.preferredClockOffset",
        "devices.preferredInterfaceMasquerade",
        "devices.preferredPanicDeviceModel",
        "devices.preferredSoundModel",
        "devices.preferredVideoType",
        "devices.preferredVirtualGPUOptions",
    ];
    /// Parts that have fields of their own.
    const PARTS: [&str; 9] = [
        "clock",
        "cpu",
        "devices",
        "features",
        "firmware",
        "machine",
        "memory",
        "requirements",
        "volumes",
    ];

    fn schema(kind: &str) -> Value {
        let crd = crate::crds().find(|crd| crd["spec"]["names"]["kind"] == kind).expect("a CRD");
        crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"].clone()
    }

    fn rows() -> impl Iterator<Item = Row> {
        let disks = OF_DISKS.iter().map(|(_, row)| *row);
        let lists = OF_INTERFACES.into_iter().chain(OF_INPUTS).chain(disks);
        INSTANCETYPE.into_iter().chain(PREFERENCE).chain(lists)
    }

    #[test]
    fn no_field_of_kubevirts_is_forgotten() {
        for kind in ["VirtualMachineInstancetype", "VirtualMachinePreference"] {
            let schema = schema(kind);
            let fields = |of: &Value| of["properties"].as_object().cloned().unwrap_or_default();
            for (field, inner) in fields(&schema) {
                let all: Vec<String> = match PARTS.contains(&&*field) {
                    true => fields(&inner).keys().map(|name| format!("{field}.{name}")).collect(),
                    false => vec![field],
                };
                for field in all {
                    let known = rows().any(|(from, _)| from == field);
                    assert!(known || ELSEWHERE.contains(&&*field), "{kind}: {field}");
                }
            }
        }
    }

    #[test]
    fn each_is_a_field_of_a_vmis_spec() {
        let spec = schema("VirtualMachineInstance");
        for (_, to) in INSTANCETYPE.into_iter().chain(PREFERENCE) {
            let found = to.split('.').try_fold(&spec, |of, part| of["properties"].get(part));
            assert!(found.is_some(), "{to}");
        }
    }
}
