//! What Godwit does of a VMI's spec.

use k8s_openapi::api::core::v1::{Affinity, LocalObjectReference, Toleration};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What Godwit does of a VMI's spec.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Spec {
    /// The machine.
    pub domain: Domain,
    /// What is behind its disks.
    pub volumes: Vec<Volume>,
    /// What is behind its network cards.
    pub networks: Vec<Network>,
    /// How long it may take to shut down; 30 s by default.
    pub termination_grace_period_seconds: Option<i64>,
    /// `Paused`: it begins standing still.
    pub start_strategy: Option<String>,
    /// What happens when its node is drained.
    pub eviction_strategy: Option<String>,
    /// The guest's host name, as cloud-init hears of it.
    pub hostname: Option<String>,
    /// The pod's.
    pub subdomain: Option<String>,
    /// `amd64`.
    pub architecture: Option<String>,
    /// The pod's.
    pub node_selector: BTreeMap<String, String>,
    /// The pod's.
    pub affinity: Option<Affinity>,
    /// The pod's.
    pub tolerations: Vec<Toleration>,
    /// The pod's.
    pub priority_class_name: Option<String>,
    /// The pod's.
    pub scheduler_name: Option<String>,
}

/// A machine.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Domain {
    /// Its processors.
    pub cpu: Cpu,
    /// Its memory.
    pub memory: Memory,
    /// What the pod asks for.
    pub resources: Resources,
    /// Its type.
    pub machine: Machine,
    /// What it boots.
    pub firmware: Firmware,
    /// Its devices.
    pub devices: Devices,
    /// What it can.
    pub features: Features,
}

/// Features that every guest has here: switched off, they are refused.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Features {
    /// Power management and discovery.
    pub acpi: Option<Feature>,
    /// Interrupts.
    pub apic: Option<Feature>,
}

/// On, unless it says otherwise.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Feature {
    /// None: on.
    pub enabled: Option<bool>,
}

/// Processors.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Cpu {
    /// Of each socket.
    pub cores: Option<u32>,
    /// How many.
    pub sockets: Option<u32>,
    /// Of each core.
    pub threads: Option<u32>,
    /// `host-model`, `host-passthrough`, or one that QEMU knows.
    pub model: Option<String>,
    /// Sockets that can be there at most: none are added while it runs.
    pub max_sockets: Option<u32>,
}

/// How processors are arranged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Topology {
    /// Sockets.
    pub sockets: u32,
    /// Of each socket.
    pub cores: u32,
    /// Of each core.
    pub threads: u32,
}

impl Cpu {
    /// What is not said is one.
    pub fn topology(&self) -> Topology {
        let or_one = |count: Option<u32>| count.filter(|count| *count > 0).unwrap_or(1);
        Topology {
            sockets: or_one(self.sockets),
            cores: or_one(self.cores),
            threads: or_one(self.threads),
        }
    }
}

impl Topology {
    /// How many processors the guest sees; None if that is more than can be counted.
    pub fn vcpus(self) -> Option<u32> {
        self.sockets.checked_mul(self.cores)?.checked_mul(self.threads)
    }
}

/// Memory.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Memory {
    /// What the guest sees.
    pub guest: Option<Quantity>,
    /// What it could see at most: none is added while it runs.
    pub max_guest: Option<Quantity>,
}

/// What a pod asks for.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Resources {
    /// At least.
    pub requests: BTreeMap<String, Quantity>,
    /// At most.
    pub limits: BTreeMap<String, Quantity>,
}

/// A machine's type.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Machine {
    /// `q35`, `pc`, or a version of them.
    #[serde(rename = "type")]
    pub kind: String,
}

/// What a machine boots.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Firmware {
    /// What the guest knows itself by.
    pub uuid: Option<String>,
    /// The machine's serial number.
    pub serial: Option<String>,
    /// BIOS or UEFI.
    pub bootloader: Option<Bootloader>,
    /// A kernel without a boot loader.
    pub kernel_boot: Option<KernelBoot>,
}

/// BIOS or UEFI.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Bootloader {
    /// BIOS.
    pub bios: Option<Bios>,
    /// UEFI.
    pub efi: Option<Efi>,
}

/// BIOS.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
pub struct Bios {}

/// UEFI.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Efi {
    /// Only signed systems: true by default, and not built.
    pub secure_boot: Option<bool>,
}

/// A kernel without a boot loader.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct KernelBoot {
    /// Its arguments.
    pub kernel_args: Option<String>,
    /// Where it comes from.
    pub container: Option<KernelContainer>,
}

/// An image with a kernel in it.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct KernelContainer {
    /// The image.
    pub image: String,
    /// When it is fetched.
    pub image_pull_policy: Option<String>,
    /// With whose credentials.
    pub image_pull_secret: Option<String>,
    /// The kernel in it.
    pub kernel_path: Option<String>,
    /// The initial root filesystem in it.
    pub initrd_path: Option<String>,
}

/// Devices.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Devices {
    /// Disks, in the guest's order.
    pub disks: Vec<Disk>,
    /// Network cards, in the guest's order.
    pub interfaces: Vec<Interface>,
    /// Tablets.
    pub inputs: Vec<Input>,
    /// A source of random numbers.
    pub rng: Option<Rng>,
    /// Whether a VMI without networks gets the pod's: true by default.
    pub autoattach_pod_interface: Option<bool>,
    /// Guests have none here.
    pub autoattach_graphics_device: Option<bool>,
    /// Guests have one here, always.
    pub autoattach_serial_console: Option<bool>,
    /// Whether the guest can give back memory that it does not use; VMIs that were made before Godwit
    /// could do that do not say it, and cannot.
    #[serde(rename = "autoattachMemBalloon")]
    pub autoattach_mem_balloon: Option<bool>,
}

/// A device by which people point or type: tablets, and nothing else here.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Input {
    /// Its name.
    pub name: String,
    /// `tablet`.
    #[serde(rename = "type")]
    pub kind: String,
    /// `usb` or `virtio`; `usb` by default.
    pub bus: Option<String>,
}

/// A source of random numbers.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
pub struct Rng {}

/// A disk.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Disk {
    /// That of its volume.
    pub name: String,
    /// A disk.
    pub disk: Option<DiskTarget>,
    /// A CD-ROM.
    pub cdrom: Option<DiskTarget>,
    /// From 1 on; disks without come after those with.
    pub boot_order: Option<u32>,
    /// What the guest knows it by.
    pub serial: Option<String>,
    /// `none`, `writethrough` or `writeback`: disks are always opened past the page cache.
    pub cache: Option<String>,
}

/// How a guest sees a disk.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct DiskTarget {
    /// `virtio`, `sata`, `scsi`, `usb`.
    pub bus: Option<String>,
    /// The guest may not write it: a CD-ROM never may.
    pub readonly: Option<bool>,
}

/// A network card.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Interface {
    /// That of its network.
    pub name: String,
    /// `virtio`, and nothing else here.
    pub model: Option<String>,
    /// Its hardware address.
    pub mac_address: Option<String>,
    /// Behind the pod's address.
    pub masquerade: Option<Binding>,
    /// On the network itself.
    pub bridge: Option<Binding>,
    /// Ports that can be reached; none: all that the pod's network lets through.
    pub ports: Vec<Port>,
}

/// How a network card is connected.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
pub struct Binding {}

/// A port of a guest.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Port {
    /// For people.
    pub name: Option<String>,
    /// TCP or UDP.
    pub protocol: Option<String>,
    /// Its number.
    pub port: u16,
}

/// A network.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Network {
    /// Its name in this VMI.
    pub name: String,
    /// The pod's.
    pub pod: Option<PodNetwork>,
    /// Another: here a Linux bridge of the node.
    pub multus: Option<Multus>,
}

/// The pod's network.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
pub struct PodNetwork {}

/// A secondary network.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Multus {
    /// Its name: that of a Linux bridge of the node.
    pub network_name: String,
}

/// A volume: exactly one of its sources is there.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Volume {
    /// Its name in this VMI.
    pub name: String,
    /// A claim.
    pub persistent_volume_claim: Option<Claim>,
    /// The claim of a DataVolume.
    pub data_volume: Option<Named>,
    /// An image; what is written to it is lost.
    pub container_disk: Option<ContainerDisk>,
    /// An empty disk; what is written to it is lost.
    pub empty_disk: Option<EmptyDisk>,
    /// cloud-init's seed.
    pub cloud_init_no_cloud: Option<CloudInit>,
    /// cloud-init's seed, in OpenStack's form.
    pub cloud_init_config_drive: Option<CloudInit>,
    /// A disk with a ConfigMap's files.
    pub config_map: Option<Files>,
    /// A disk with a Secret's files.
    pub secret: Option<Secret>,
    /// A file of the node.
    pub host_disk: Option<HostDisk>,
}

/// A claim.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Claim {
    /// Its name.
    pub claim_name: String,
    /// Whether it is only read.
    pub read_only: Option<bool>,
}

/// Something by its name.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Named {
    /// Its name.
    pub name: String,
}

/// An image as a disk.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ContainerDisk {
    /// The image.
    pub image: String,
    /// Always, IfNotPresent, Never.
    pub image_pull_policy: Option<String>,
    /// With whose credentials.
    pub image_pull_secret: Option<String>,
    /// The disk in it, if not the one in `/disk`.
    pub path: Option<String>,
}

/// An empty disk.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct EmptyDisk {
    /// How large.
    pub capacity: Quantity,
}

/// cloud-init's seed.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct CloudInit {
    /// As text.
    pub user_data: Option<String>,
    /// As base64.
    pub user_data_base64: Option<String>,
    /// Key `userdata` of a Secret.
    pub secret_ref: Option<LocalObjectReference>,
    /// As text.
    pub network_data: Option<String>,
    /// As base64.
    pub network_data_base64: Option<String>,
    /// Key `networkdata` of a Secret.
    pub network_data_secret_ref: Option<LocalObjectReference>,
}

/// Files of a ConfigMap.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Files {
    /// Its name.
    pub name: String,
    /// Whether it may lack.
    pub optional: Option<bool>,
    /// The disk's label.
    pub volume_label: Option<String>,
}

/// Files of a Secret.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Secret {
    /// Its name.
    pub secret_name: String,
    /// Whether it may lack.
    pub optional: Option<bool>,
    /// The disk's label.
    pub volume_label: Option<String>,
}

/// A file of the node.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct HostDisk {
    /// Where.
    pub path: String,
    /// `Disk`, or `DiskOrCreate`.
    #[serde(rename = "type")]
    pub kind: String,
}

impl Volume {
    /// The claim behind it.
    pub fn claim(&self) -> Option<&str> {
        let claim = self.persistent_volume_claim.as_ref().map(|claim| &*claim.claim_name);
        claim.or_else(|| self.data_volume.as_ref().map(|volume| &*volume.name))
    }
}

impl Spec {
    /// The claims of its volumes, by the volumes' names.
    pub fn claims(&self) -> BTreeMap<String, String> {
        let claims = self
            .volumes
            .iter()
            .filter_map(|volume| Some((volume.name.clone(), volume.claim()?.to_owned())));
        claims.collect()
    }

    /// Lets volumes be other claims: those that are given for their names.
    pub fn use_claims(&mut self, claims: &BTreeMap<String, String>) {
        for volume in &mut self.volumes {
            let own = volume.claim().map(str::to_owned);
            let given = claims.get(&volume.name).filter(|claim| Some(*claim) != own.as_ref());
            if let (Some(claim), true) = (given, own.is_some()) {
                let read_only = volume.persistent_volume_claim.as_ref().and_then(|c| c.read_only);
                volume.data_volume = None;
                volume.persistent_volume_claim =
                    Some(Claim { claim_name: claim.clone(), read_only });
            }
        }
    }

    /// The volume of a name.
    pub fn volume(&self, name: &str) -> Option<&Volume> {
        self.volumes.iter().find(|volume| volume.name == name)
    }

    /// How long the guest may take to shut down, in seconds.
    pub fn grace(&self) -> u64 {
        const KUBEVIRT: i64 = 30;
        self.termination_grace_period_seconds.unwrap_or(KUBEVIRT).max(0).unsigned_abs()
    }

    /// Bytes that the guest sees, from what is said of memory first: `guest`, requests, limits.
    pub fn memory(&self) -> Option<&Quantity> {
        let Domain { memory, resources, .. } = &self.domain;
        let requested = resources.requests.get("memory");
        memory.guest.as_ref().or(requested).or_else(|| resources.limits.get("memory"))
    }
}
