//! A VMI as its launcher knows it. Pure.

use api::kubevirt::KubeVirt;
use api::vmi::{Disk, Input, Interface, Spec, Volume};
use launcher::spec::{
    Accelerator, Backend, Bus, DirectBoot, Disk as VmDisk, Forward, Nic, Tablet, Topology, Uefi,
    VmSpec,
};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

/// QEMU's ids are made of names of at most this length.
const MAX_ID: usize = 20;
/// OVMF's code, as Debian's package has it.
const UEFI: &str = "/usr/share/OVMF/OVMF_CODE_4M.fd";
/// The pod's folder of what the handler prepares, in the pod.
pub const PREPARED: &str = "/run/godwit/prepared";
/// A claim's disk, where the claim is a folder.
pub const DISK: &str = "disk.img";

/// What the spec does not say.
#[derive(Debug)]
pub struct Facts<'a> {
    /// The VM, as launchers know it.
    pub vm: String,
    /// The cluster's settings.
    pub cluster: &'a KubeVirt,
    /// Whether a claim is a device, by its name.
    pub blocks: BTreeMap<String, bool>,
    /// Whether a claim can be used on several nodes at once, by its name.
    pub shared: BTreeMap<String, bool>,
    /// To how many bytes a claim's disk may grow, by its name.
    pub sizes: BTreeMap<String, u64>,
    /// How large a disk to make in a claim that has none yet, by its name.
    pub blanks: BTreeMap<String, u64>,
    /// The pod's address.
    pub address: Option<IpAddr>,
    /// Taps of network cards that are bridged, by their names.
    pub taps: BTreeMap<String, String>,
}

/// A name of which QEMU's ids can be made: as it is, or by its place.
fn id(kind: &str, index: usize, name: &str) -> String {
    let bytes = name.as_bytes();
    let plain = (1..=MAX_ID).contains(&bytes.len())
        && bytes[0].is_ascii_lowercase()
        && bytes.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-')
        // What the launcher's own ids end in.
        && !["-file", "-raw", "-tg", "-net", "-nic", "-disk", "-tablet"].iter().any(|end| name.ends_with(end))
        && name.strip_prefix(kind).is_none_or(|rest| rest.parse::<usize>().is_err());
    if plain { name.to_owned() } else { format!("{kind}{index}") }
}

/// The claims of disks, by the names that launchers have for them; `volumes`: by the volumes'.
pub fn claims(vmi: &Spec, volumes: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    let disks = vmi.domain.devices.disks.iter().enumerate();
    let one = |(index, disk): (usize, &Disk)| {
        Some((id("disk", index, &disk.name), volumes.get(&disk.name)?.clone()))
    };
    disks.filter_map(one).collect()
}

/// Where a volume's disk is, in the pod.
pub fn place(volume: &Volume, blocks: &BTreeMap<String, bool>) -> PathBuf {
    match volume.claim() {
        Some(claim) if blocks.get(claim) == Some(&true) => {
            Path::new("/dev/disks").join(&volume.name)
        }
        Some(_) => Path::new("/disks").join(&volume.name).join(DISK),
        None if volume.host_disk.is_some() => {
            let path = volume.host_disk.as_ref().map(|disk| Path::new(&disk.path));
            let name = path.and_then(Path::file_name).unwrap_or_default();
            Path::new("/host").join(&volume.name).join(name)
        }
        None => Path::new(PREPARED).join(&volume.name),
    }
}

/// The spec for the launcher.
///
/// # Errors
/// What makes no sense, for people.
pub fn spec(vmi: &Spec, facts: &Facts<'_>) -> Result<VmSpec, String> {
    let domain = &vmi.domain;
    let topology = domain.cpu.topology();
    let configuration = &facts.cluster.spec.configuration;
    let emulated = configuration.developer_configuration.use_emulation;
    let memory = vmi.memory().and_then(|memory| api::quantity::bytes(&memory.0));
    let memory = memory.ok_or("it does not say how much memory the guest has")?;
    let model = domain.cpu.model.clone().or_else(|| configuration.cpu_model.clone());
    let machine = match &*domain.machine.kind {
        "" => configuration.machine_type.clone().unwrap_or_else(|| "q35".into()),
        named => named.to_owned(),
    };
    let uefi = domain.firmware.bootloader.as_ref().and_then(|loader| loader.efi.as_ref());
    let spec = VmSpec {
        name: facts.vm.clone(),
        vcpus: topology.vcpus().ok_or("it has too many processors")?,
        topology: Some(Topology {
            sockets: topology.sockets,
            cores: topology.cores,
            threads: topology.threads,
        }),
        memory_mib: u64::try_from(memory.div_euclid(1 << 20)).map_err(|e| e.to_string())?,
        machine,
        // The host's model is what the accelerator takes by itself.
        cpu: model.filter(|model| !["host-model", "host-passthrough"].contains(&&**model)),
        accelerator: if emulated { Accelerator::Tcg } else { Accelerator::Kvm },
        disks: disks(vmi, facts)?,
        nics: nics(vmi, facts),
        tablets: tablets(vmi),
        balloon: domain.devices.autoattach_mem_balloon == Some(true),
        uefi: uefi.map(|_| Uefi { code: UEFI.into() }),
        boot: boot(vmi),
        uuid: domain.firmware.uuid.clone(),
        serial_number: domain.firmware.serial.clone(),
        serials: vec!["console".into()],
    };
    spec.validate().map_err(|invalid| invalid.to_string())?;
    Ok(spec)
}

/// A spec for a guest that arrives: its disks are as large as they are where it comes from.
pub fn arriving(mut vm: VmSpec) -> VmSpec {
    for disk in &mut vm.disks {
        (disk.grow_to, disk.blank) = (None, None);
    }
    vm
}

/// A kernel from an image is prepared by these names.
fn boot(vmi: &Spec) -> Option<DirectBoot> {
    let boot = vmi.domain.firmware.kernel_boot.as_ref()?;
    let container = boot.container.as_ref()?;
    Some(DirectBoot {
        kernel: Path::new(PREPARED).join("kernel"),
        initrd: container.initrd_path.as_ref().map(|_| Path::new(PREPARED).join("initrd")),
        cmdline: boot.kernel_args.clone().unwrap_or_default(),
    })
}

fn disks(vmi: &Spec, facts: &Facts<'_>) -> Result<Vec<VmDisk>, String> {
    let one = |(index, disk): (usize, &Disk)| {
        let volume = vmi.volume(&disk.name).ok_or(format!("no volume is named {}", disk.name))?;
        let cdrom = disk.cdrom.is_some();
        let target = disk.disk.as_ref().or(disk.cdrom.as_ref());
        let bus = target.and_then(|target| target.bus.as_deref());
        let bus = match bus.unwrap_or(if cdrom { "sata" } else { "virtio" }) {
            "sata" => Bus::Sata,
            "scsi" => Bus::Scsi,
            "usb" => Bus::Usb,
            _ => Bus::Virtio,
        };
        let claim = volume.persistent_volume_claim.as_ref();
        let read_only = cdrom
            || target.is_some_and(|target| target.readonly == Some(true))
            || claim.is_some_and(|claim| claim.read_only == Some(true));
        let shared = volume.claim().and_then(|claim| facts.shared.get(claim)).copied();
        let grow_to = volume.claim().and_then(|claim| facts.sizes.get(claim)).copied();
        let blank = volume.claim().and_then(|claim| facts.blanks.get(claim)).copied();
        Ok(VmDisk {
            name: id("disk", index, &disk.name),
            path: place(volume, &facts.blocks),
            bus,
            read_only,
            shared: shared.unwrap_or(false),
            size: None,
            grow_to: grow_to.filter(|_| !read_only),
            blank: blank.filter(|_| !read_only),
            cdrom,
            serial: disk.serial.clone(),
            boot_order: disk.boot_order,
        })
    };
    vmi.domain.devices.disks.iter().enumerate().map(one).collect()
}

fn nics(vmi: &Spec, facts: &Facts<'_>) -> Vec<Nic> {
    let one = |(index, interface): (usize, &Interface)| {
        let tap = facts.taps.get(&interface.name);
        let backend = tap.map_or(Backend::User, |tap| Backend::Tap(tap.clone()));
        let forward = |port: &api::vmi::Port| {
            let udp = port.protocol.as_deref() == Some("UDP");
            facts.address.map(|address| Forward { udp, address, port: port.port })
        };
        let forwards = match backend {
            Backend::User => interface.ports.iter().filter_map(forward).collect(),
            Backend::Tap(_) => Vec::new(),
        };
        Nic { name: id("nic", index, &interface.name), mac: mac(interface), backend, forwards }
    };
    vmi.domain.devices.interfaces.iter().enumerate().map(one).collect()
}

fn tablets(vmi: &Spec) -> Vec<Tablet> {
    let one = |(index, input): (usize, &Input)| Tablet {
        name: id("input", index, &input.name),
        usb: input.bus.as_deref() != Some("virtio"),
    };
    vmi.domain.devices.inputs.iter().enumerate().map(one).collect()
}

/// A card's address: admission gives each one that has none.
pub fn mac(interface: &Interface) -> String {
    interface.mac_address.clone().unwrap_or_default().replace('-', ":").to_lowercase()
}

/// What guests call disks, in their order: `vda`, `sda`.
pub fn targets(spec: &VmSpec) -> Vec<String> {
    let (mut virtio, mut other) = (0_u8, 0_u8);
    let next = |disk: &VmDisk| {
        let (prefix, count) = match disk.bus {
            Bus::Virtio => ("vd", &mut virtio),
            _ => ("sd", &mut other),
        };
        *count += 1;
        format!("{prefix}{}", char::from(b'a' + (*count - 1) % 26))
    };
    spec.disks.iter().map(next).collect()
}
