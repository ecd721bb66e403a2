//! QEMU's command line for a VM. Pure.
//!
//! Everything that a migration compares is explicit: device ids, addresses and
//! their order are the same on both sides. All sockets are named relative to the
//! launcher's folder, which is QEMU's working directory: long paths do not fit.
//!
//! ```text
//! disk:  <name>-file  ->  <name>-raw  ->  <name>      ->  device
//!        file or device   raw, size=N     throttle node   virtio, scsi, sata
//! ```

use crate::spec::{Accelerator, Backend, Bus, Disk, VmSpec};
use mover::disk::Medium;
use serde_json::json;
use std::ffi::OsString;

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
        Accelerator::Tcg => ("tcg", "max"),
    };
    add(&["-machine", &spec.machine, "-accel", accelerator]);
    add(&["-cpu", spec.cpu.as_deref().unwrap_or(cpu)]);
    add(&["-smp", &spec.vcpus.to_string(), "-m", &format!("{}M", spec.memory_mib)]);
    add(&["-chardev", &format!("socket,id=qmp,path={QMP},server=on,wait=off")]);
    add(&["-mon", "chardev=qmp,mode=control"]);
    for (i, serial) in spec.serials.iter().enumerate() {
        // QEMU connects to us: we hear the guest from its first byte.
        let path = serial_socket(serial);
        add(&["-chardev", &format!("socket,id=serial{i},path={path},server=off")]);
        add(&["-device", &format!("isa-serial,chardev=serial{i},id=serial-{i},index={i}")]);
    }
    add(&["-object", "rng-random,id=rng0,filename=/dev/urandom"]);
    add(&["-device", "virtio-rng-pci,rng=rng0,id=rng-0"]);
    if let Some(uefi) = &spec.uefi {
        let code = uefi.code.to_string_lossy();
        let node = json!({"driver": "file", "node-name": "uefi-code", "filename": code, "read-only": true});
        add(&["-blockdev", &node.to_string(), "-machine", "pflash0=uefi-code"]);
    }
    if spec.disks.iter().any(|d| d.bus == Bus::Scsi) {
        add(&["-device", "virtio-scsi-pci,id=scsi0"]);
    }
    if spec.disks.iter().any(|d| d.bus == Bus::Sata) && !spec.machine.contains("q35") {
        add(&["-device", "ich9-ahci,id=sata0"]);
    }
    let mut sata = 0;
    for (disk, facts) in spec.disks.iter().zip(facts) {
        disk_arguments(&mut add, spec, disk, *facts, &mut sata);
    }
    for nic in &spec.nics {
        let backend = match &nic.backend {
            Backend::User => "user".to_owned(),
            Backend::Tap(name) => format!("tap,ifname={name},script=no,downscript=no"),
        };
        add(&["-netdev", &format!("{backend},id={}-net", nic.name)]);
        let device = format!("virtio-net-pci,netdev={0}-net,id={0}-nic,mac={1},romfile=", nic.name, nic.mac);
        add(&["-device", &device]);
    }
    if let Some(boot) = &spec.boot {
        add(&["-kernel", &boot.kernel.to_string_lossy(), "-append", &boot.cmdline]);
        if let Some(initrd) = &boot.initrd {
            add(&["-initrd", &initrd.to_string_lossy()]);
        }
    }
    if mode == Mode::Incoming {
        add(&["-incoming", "defer"]);
    }
    arguments.into_iter().map(OsString::from).collect()
}

fn disk_arguments(
    add: &mut impl FnMut(&[&str]),
    spec: &VmSpec,
    disk: &Disk,
    facts: Facts,
    sata: &mut u32,
) {
    let name = &disk.name;
    let group = throttle_group(name);
    add(&["-object", &json!({"qom-type": "throttle-group", "id": group}).to_string()]);
    let driver = match facts.medium {
        Medium::File => "file",
        Medium::Block => "host_device",
    };
    let file = json!({
        "driver": driver, "node-name": format!("{name}-file"), "filename": disk.path.to_string_lossy(),
        "cache": {"direct": facts.direct, "no-flush": false}, "aio": "threads", "discard": "unmap",
        "locking": "on", "read-only": disk.read_only, "auto-read-only": false,
    });
    add(&["-blockdev", &file.to_string()]);
    add(&["-blockdev", &raw_node(disk).to_string()]);
    let throttle = json!({
        "driver": "throttle", "node-name": name, "throttle-group": group,
        "file": format!("{name}-raw"), "read-only": disk.read_only,
    });
    add(&["-blockdev", &throttle.to_string()]);
    let device = match disk.bus {
        Bus::Virtio => format!("virtio-blk-pci,drive={name},id={name}-disk"),
        Bus::Scsi => format!("scsi-hd,bus=scsi0.0,drive={name},id={name}-disk"),
        Bus::Sata => {
            let controller = if spec.machine.contains("q35") { "ide" } else { "sata0" };
            *sata += 1;
            format!("ide-hd,bus={controller}.{},drive={name},id={name}-disk", *sata - 1)
        }
    };
    // The guest flushes because it sees a write cache; we never keep one.
    add(&["-device", &format!("{device},write-cache=on,share-rw={}", on(disk.shared))]);
}

/// The raw node of a disk, as `blockdev-reopen` takes it too.
pub fn raw_node(disk: &Disk) -> serde_json::Value {
    let name = &disk.name;
    let mut node = json!({
        "driver": "raw", "node-name": format!("{name}-raw"), "file": format!("{name}-file"),
        "read-only": disk.read_only,
    });
    if let Some(size) = disk.size {
        node["size"] = size.into();
    }
    node
}

fn on(yes: bool) -> &'static str {
    if yes { "on" } else { "off" }
}
