//! QEMU's command line for a VM. Pure.
//!
//! Everything that a migration compares is explicit: device ids, addresses and
//! their order are the same on both sides. All sockets are named relative to the
//! launcher's folder, which is QEMU's working directory: long paths do not fit.
//!
//! ```text
//! disk:  <name>-file  ->  <name>-raw  ->  <name>      ->  device
//!        file or device   raw, size=N     throttle node   virtio, scsi, sata, usb, flash
//! ```

use crate::spec::{Accelerator, Backend, Bus, Disk, Forward, Nic, Tablet, Topology, VmSpec};
use mover::disk::Medium;
use serde_json::json;
use std::borrow::Cow;
use std::ffi::OsString;
use std::path::Path;

/// How QEMU is to begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// With the guest at its boot, stopped until told otherwise.
    Boot,
    /// Waiting for a guest that moves in.
    Incoming,
}

/// A disk's facts that the command line needs and the spec does not have.
#[derive(Debug, Clone, Copy)]
pub struct Facts {
    /// What holds the disk.
    pub medium: Medium,
    /// Whether it can be used past the page cache.
    pub direct: bool,
}

/// PCI slots, free on `pc` and `q35` alike. See [`crate::spec`] for how many each kind may have.
const RNG_SLOT: usize = 0x2;
const SCSI_SLOT: usize = 0x3;
const AHCI_SLOT: usize = 0x4;
const USB_SLOT: usize = 0x5;
const TABLET_SLOT: usize = 0x6;
const NIC_SLOT: usize = 0x8;
const VIRTIO_SLOT: usize = 0x10;

/// Ports of the USB controller, the first of which are disks'; as many as a VM may have, and tablets.
const USB_PORTS: usize = 8;
const USB_DISKS: usize = 4;

/// The node of the firmware; no disk's node can be named like it.
const FIRMWARE: &str = "uefi-file";

/// QMP's socket, in the launcher's folder.
pub const QMP: &str = "qmp.sock";

/// Name of a disk's node that carries its bitmaps.
pub fn bitmap_node(disk: &str) -> String {
    format!("{disk}-raw")
}

/// Name of a disk's throttle group.
pub fn throttle_group(disk: &str) -> String {
    format!("{disk}-tg")
}

/// Socket of a serial port, between QEMU and the launcher.
pub fn serial_socket(serial: &str) -> String {
    format!("{serial}.qemu")
}

/// The arguments for QEMU. `facts` are the disks', in the spec's order.
pub fn arguments(spec: &VmSpec, facts: &[Facts], mode: Mode) -> Vec<OsString> {
    let mut arguments: Vec<String> = Vec::new();
    let mut add = |words: &[&str]| arguments.extend(words.iter().map(|w| (*w).to_owned()));
    add(&["-nodefaults", "-no-user-config", "-display", "none", "-S"]);
    add(&["-name", &format!("guest={},debug-threads=on", spec.name)]);
    add(&["-msg", "timestamp=on"]);
    add(&["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]);
    let (accelerator, cpu) = match spec.accelerator {
        Accelerator::Kvm => ("kvm", "host"),
        // N.B. not `max`, whose features differ from one QEMU to the next.
        Accelerator::Tcg => ("tcg", "Westmere-v1"),
    };
    // Without graphics SeaBIOS and boot loaders speak on the console.
    add(&["-machine", &format!("{},graphics=off", spec.machine), "-accel", accelerator]);
    add(&["-cpu", spec.cpu.as_deref().unwrap_or(cpu)]);
    add(&["-smp", &processors(spec), "-m", &format!("{}k", memory_kib(spec))]);
    if let Some(uuid) = &spec.uuid {
        add(&["-uuid", uuid]);
    }
    if let Some(serial) = &spec.serial_number {
        add(&["-smbios", &format!("type=1,serial={serial}")]);
    }
    add(&["-chardev", &format!("socket,id=qmp,path={QMP},server=on,wait=off")]);
    add(&["-mon", "chardev=qmp,mode=control"]);
    for (i, serial) in spec.serials.iter().enumerate() {
        // QEMU connects to us: we hear the guest from its first byte.
        let path = serial_socket(serial);
        add(&["-chardev", &format!("socket,id=serial{i},path={path},server=off")]);
        add(&["-device", &format!("isa-serial,chardev=serial{i},id=serial-{i},index={i}")]);
    }
    add(&["-object", "rng-random,id=rng0,filename=/dev/urandom"]);
    let rng = format!("virtio-rng-pci,rng=rng0,id=rng-0,addr={RNG_SLOT:#x}");
    if spec.balloon {
        // All slots are taken: the two share one.
        let balloon = "virtio-balloon-pci,id=balloon0,free-page-reporting=on";
        add(&["-device", &format!("{rng},multifunction=on")]);
        add(&["-device", &format!("{balloon},addr={RNG_SLOT:#x}.1")]);
    } else {
        add(&["-device", &rng]);
    }
    if let Some(uefi) = &spec.uefi {
        let node = json!({
            "driver": "file", "node-name": FIRMWARE, "filename": text(&uefi.code), "read-only": true,
        });
        add(&["-blockdev", &node.to_string(), "-machine", &format!("pflash0={FIRMWARE}")]);
    }
    let on_usb = spec.tablets.iter().any(|tablet| tablet.usb);
    if on_usb || spec.disks.iter().any(|disk| disk.bus == Bus::Usb) {
        add(&[
            "-device",
            &format!("qemu-xhci,id=usb0,p2={USB_PORTS},p3={USB_PORTS},addr={USB_SLOT:#x}"),
        ]);
    }
    disks(&mut add, spec, facts);
    for (i, Tablet { name, usb }) in spec.tablets.iter().enumerate() {
        // Disks have the ports before.
        let device = match usb {
            true => format!("usb-tablet,id={name}-tablet,bus=usb0.0,port={}", USB_DISKS + i + 1),
            false => format!("virtio-tablet-pci,id={name}-tablet,addr={:#x}", TABLET_SLOT + i),
        };
        add(&["-device", &device]);
    }
    for (i, nic) in spec.nics.iter().enumerate() {
        let Nic { name, mac, backend, forwards } = nic;
        let backend = match backend {
            Backend::User => format!("user{}", forwards.iter().map(forward).collect::<String>()),
            Backend::Tap(tap) => format!("tap,ifname={tap},script=no,downscript=no"),
        };
        add(&["-netdev", &format!("{backend},id={name}-net")]);
        let slot = NIC_SLOT + i;
        // N.B. we announce a guest that has come, once it runs. A card that has the guest do it, in a
        // QEMU that is told not to, ends that QEMU when the guest is reset after a move.
        let device = format!(
            "virtio-net-pci,netdev={name}-net,id={name}-nic,mac={mac},addr={slot:#x},\
             romfile=,guest_announce=off"
        );
        add(&["-device", &device]);
    }
    if let Some(boot) = &spec.boot {
        add(&["-kernel", &text(&boot.kernel), "-append", &boot.cmdline]);
        if let Some(initrd) = &boot.initrd {
            add(&["-initrd", &text(initrd)]);
        }
    }
    if mode == Mode::Incoming {
        add(&["-incoming", "defer"]);
    }
    arguments.into_iter().map(OsString::from).collect()
}

fn processors(spec: &VmSpec) -> String {
    let arranged = |Topology { sockets, cores, threads }: Topology| {
        format!("{},sockets={sockets},cores={cores},threads={threads}", spec.vcpus)
    };
    spec.topology.map_or_else(|| spec.vcpus.to_string(), arranged)
}

fn forward(forward: &Forward) -> String {
    let Forward { udp, address, port } = forward;
    let protocol = if *udp { "udp" } else { "tcp" };
    format!(",hostfwd={protocol}:{address}:{port}-:{port}")
}

/// N.B. under TCG never a multiple of 256 KiB: QEMU before 9.0 then loses writes of a guest whose
/// memory moves (its dirty bitmap's fast path does not tell the emulated TLB).
fn memory_kib(spec: &VmSpec) -> u64 {
    let odd = match spec.accelerator {
        Accelerator::Kvm => 0,
        Accelerator::Tcg => 8,
    };
    spec.memory_mib * 1024 + odd
}

fn disks(add: &mut impl FnMut(&[&str]), spec: &VmSpec, facts: &[Facts]) {
    if spec.disks.iter().any(|d| d.bus == Bus::Scsi) {
        add(&["-device", &format!("virtio-scsi-pci,id=scsi0,addr={SCSI_SLOT:#x}")]);
    }
    // q35 has one built in, whose buses are ide.0 to ide.5.
    let ahci = if spec.is_q35() { "ide" } else { "sata0" };
    if spec.disks.iter().any(|d| d.bus == Bus::Sata) && !spec.is_q35() {
        add(&["-device", &format!("ich9-ahci,id=sata0,addr={AHCI_SLOT:#x}")]);
    }
    let mut places = Places::default();
    let ordered = spec.disks.iter().any(|disk| disk.boot_order.is_some());
    for (i, (disk, facts)) in spec.disks.iter().zip(facts).enumerate() {
        let name = &disk.name;
        let kind = if disk.cdrom { "cd" } else { "hd" };
        nodes(add, disk, *facts);
        let device = match disk.bus {
            Bus::Virtio => {
                format!("virtio-blk-pci,addr={:#x}", VIRTIO_SLOT + next(&mut places.virtio))
            }
            Bus::Scsi => {
                format!("scsi-{kind},bus=scsi0.0,scsi-id={},lun=0", next(&mut places.scsi))
            }
            Bus::Sata => format!("ide-{kind},bus={ahci}.{}", next(&mut places.sata)),
            Bus::Usb => format!("usb-storage,bus=usb0.0,port={}", next(&mut places.usb) + 1),
            Bus::Flash => {
                add(&["-machine", &format!("pflash1={name}")]);
                continue;
            }
        };
        // The guest flushes because it sees a write cache; we never keep one.
        let mut device = format!("{device},drive={name},id={name}-disk,write-cache=on");
        if let Some(serial) = &disk.serial {
            device.push_str(&format!(",serial={serial}"));
        }
        let turn = if ordered { disk.boot_order } else { u32::try_from(i + 1).ok() };
        if let (None, Some(turn)) = (&spec.boot, turn) {
            device.push_str(&format!(",bootindex={turn}"));
        }
        add(&["-device", &device]);
    }
}

/// The next free place on each bus.
#[derive(Default)]
struct Places {
    virtio: usize,
    scsi: usize,
    sata: usize,
    usb: usize,
}

fn next(place: &mut usize) -> usize {
    *place += 1;
    *place - 1
}

/// N.B. `discard` at each of a disk's nodes: one without it swallows what the guest discards.
fn nodes(add: &mut impl FnMut(&[&str]), disk: &Disk, facts: Facts) {
    let name = &disk.name;
    let group = throttle_group(name);
    add(&["-object", &json!({"qom-type": "throttle-group", "id": group}).to_string()]);
    let driver = match facts.medium {
        Medium::File => "file",
        Medium::Block => "host_device",
    };
    let file = json!({
        "driver": driver, "node-name": format!("{name}-file"), "filename": text(&disk.path),
        "cache": {"direct": facts.direct, "no-flush": false}, "aio": "threads", "discard": "unmap",
        "locking": "on", "read-only": disk.read_only, "auto-read-only": false,
    });
    let throttle = json!({
        "driver": "throttle", "node-name": name, "throttle-group": group, "discard": "unmap",
        "file": format!("{name}-raw"), "read-only": disk.read_only,
    });
    for node in [file, raw_node(disk), throttle] {
        add(&["-blockdev", &node.to_string()]);
    }
}

/// The raw node of a disk, as `blockdev-reopen` takes it too.
pub fn raw_node(disk: &Disk) -> serde_json::Value {
    let name = &disk.name;
    let mut node = json!({
        "driver": "raw", "node-name": format!("{name}-raw"), "file": format!("{name}-file"),
        "discard": "unmap", "read-only": disk.read_only,
    });
    if let Some(size) = disk.size {
        node["size"] = size.into();
    }
    node
}

/// N.B. nothing is lost: a valid spec's paths are UTF-8.
fn text(path: &Path) -> Cow<'_, str> {
    path.to_string_lossy()
}
