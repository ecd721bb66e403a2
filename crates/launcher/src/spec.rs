//! What a VM is: the part that the guest sees and the part that is its host's.

use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

/// A VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct VmSpec {
    /// Lower-case letters, digits, dots and dashes, at most 63.
    pub name: String,
    /// Virtual CPUs.
    #[serde(default = "one")]
    pub vcpus: u32,
    /// Guest memory in MiB.
    #[serde(rename = "memoryMiB")]
    pub memory_mib: u64,
    /// QEMU's machine type. `pc` and `q35` are not pinned to a version: name one to move between QEMUs.
    #[serde(default = "pc")]
    pub machine: String,
    /// QEMU's CPU model; None is a plain one that every host has.
    #[serde(default)]
    pub cpu: Option<String>,
    /// What runs the guest. Never chosen silently: a `/dev/kvm` that opens is no proof that it works.
    pub accelerator: Accelerator,
    /// Disks, in the guest's order.
    #[serde(default)]
    pub disks: Vec<Disk>,
    /// Network cards, in the guest's order.
    #[serde(default)]
    pub nics: Vec<Nic>,
    /// UEFI firmware; None is BIOS.
    #[serde(default)]
    pub uefi: Option<Uefi>,
    /// A kernel that is started without a boot loader.
    #[serde(default)]
    pub boot: Option<DirectBoot>,
    /// Names of the serial ports; the first is the console.
    #[serde(default = "console")]
    pub serials: Vec<String>,
}

/// What runs the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    /// The processor.
    Kvm,
    /// QEMU's emulation.
    Tcg,
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Disk {
    /// Its name, as in [`VmSpec::name`].
    pub name: String,
    /// A raw file or a block device.
    pub path: PathBuf,
    /// How the guest sees it.
    #[serde(default)]
    pub bus: Bus,
    /// The guest may not write it.
    #[serde(default)]
    pub read_only: bool,
    /// Both hosts reach the same disk: it is not copied.
    #[serde(default)]
    pub shared: bool,
    /// Show only so many bytes of it: a larger target keeps the source's size while it moves.
    #[serde(default)]
    pub size: Option<u64>,
}

/// How the guest sees a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Bus {
    /// virtio-blk.
    #[default]
    Virtio,
    /// virtio-scsi.
    Scsi,
    /// AHCI.
    Sata,
}

/// A network card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Nic {
    /// Its name, as in [`VmSpec::name`].
    pub name: String,
    /// Its address.
    pub mac: String,
    /// What it is connected to on its host.
    #[serde(default)]
    pub backend: Backend,
}

/// What a network card is connected to.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// QEMU's user-mode network.
    #[default]
    User,
    /// A tap device that exists.
    Tap(String),
}

/// UEFI firmware files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Uefi {
    /// The code, read only.
    pub code: PathBuf,
}

/// A kernel that is started without a boot loader.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct DirectBoot {
    /// The kernel.
    pub kernel: PathBuf,
    /// The initial root filesystem.
    #[serde(default)]
    pub initrd: Option<PathBuf>,
    /// The kernel's arguments.
    #[serde(default)]
    pub cmdline: String,
}

fn one() -> u32 {
    1
}

fn pc() -> String {
    "pc".into()
}

fn console() -> Vec<String> {
    vec!["console".into()]
}

/// Everything that is wrong with a spec.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("VM {name}: {}", .faults.join("; "))]
pub struct Invalid {
    /// The VM's name, as given.
    pub name: String,
    /// All faults.
    pub faults: Vec<String>,
}

/// Limits that keep a typo from taking the host down.
const MAX_VCPUS: u32 = 512;
const MAX_MEMORY_MIB: u64 = 64 << 20;
const MAX_DISKS: usize = 24;

/// Whether a name can stand for a file, a socket and a QEMU id.
pub fn is_name(name: &str) -> bool {
    let bytes = name.as_bytes();
    (1..=63).contains(&bytes.len())
        && bytes[0].is_ascii_alphanumeric()
        && bytes.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-.".contains(b))
}

fn is_mac(text: &str) -> bool {
    let parts: Vec<_> = text.split(':').collect();
    let byte = |p: &&str| p.len() == 2 && u8::from_str_radix(p, 16).is_ok();
    parts.len() == 6 && parts.iter().all(byte) && u8::from_str_radix(parts[0], 16).is_ok_and(|b| b & 1 == 0)
}

/// QEMU splits its options at commas; none of ours may smuggle one in.
fn is_plain(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.+=".contains(&b))
}

impl VmSpec {
    /// Checks the spec.
    ///
    /// # Errors
    /// [`Invalid`] with all faults at once.
    pub fn validate(&self) -> Result<(), Invalid> {
        let mut faults = Vec::new();
        let mut demand = |holds: bool, fault: String| {
            if !holds {
                faults.push(fault);
            }
        };
        demand(is_name(&self.name), "name must be 1 to 63 of a-z, 0-9, '-' and '.'".into());
        demand((1..=MAX_VCPUS).contains(&self.vcpus), format!("vcpus must be 1 to {MAX_VCPUS}"));
        demand(
            (16..=MAX_MEMORY_MIB).contains(&self.memory_mib),
            format!("memoryMiB must be 16 to {MAX_MEMORY_MIB}"),
        );
        demand(is_plain(&self.machine), format!("machine '{}' is no machine type", self.machine));
        let cpu = self.cpu.as_deref().unwrap_or("max");
        demand(cpu.split(',').all(is_plain), format!("cpu '{cpu}' is no CPU model"));
        demand(self.disks.len() <= MAX_DISKS, format!("at most {MAX_DISKS} disks"));
        let names = |what: &str, names: Vec<&String>, faults: &mut Vec<String>| {
            let mut seen = BTreeSet::new();
            for name in names {
                if !is_name(name) {
                    faults.push(format!("{what} name '{name}' must be 1 to 63 of a-z, 0-9, '-' and '.'"));
                }
                if !seen.insert(name) {
                    faults.push(format!("two {what}s are named '{name}'"));
                }
            }
        };
        names("disk", self.disks.iter().map(|d| &d.name).collect(), &mut faults);
        names("nic", self.nics.iter().map(|n| &n.name).collect(), &mut faults);
        names("serial port", self.serials.iter().collect(), &mut faults);
        for nic in &self.nics {
            if !is_mac(&nic.mac) {
                faults.push(format!("nic {}: '{}' is no unicast MAC address", nic.name, nic.mac));
            }
            if let Backend::Tap(tap) = &nic.backend
                && !(is_plain(tap) && tap.len() < 16)
            {
                faults.push(format!("nic {}: '{tap}' is no interface name", nic.name));
            }
        }
        for disk in &self.disks {
            if disk.size.is_some_and(|size| size == 0 || size % 512 != 0) {
                faults.push(format!("disk {}: size must be a multiple of 512", disk.name));
            }
        }
        if self.serials.is_empty() || self.serials.len() > 4 {
            faults.push("serials must name 1 to 4 serial ports".into());
        }
        if faults.is_empty() { Ok(()) } else { Err(Invalid { name: self.name.clone(), faults }) }
    }

    /// The same guest with its disks at other places: what a target makes of the source's spec.
    pub fn with_disk_paths(&self, paths: &BTreeMap<String, PathBuf>) -> Self {
        let mut spec = self.clone();
        for disk in &mut spec.disks {
            if let Some(path) = paths.get(&disk.name) {
                disk.path.clone_from(path);
            }
        }
        spec
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_bad_spec_is_told_all_its_faults_at_once() {
        let text = r#"{"name":"Web!","memoryMiB":1,"accelerator":"tcg","machine":"pc,foo=1","vcpus":0,
            "disks":[{"name":"a","path":"x"},{"name":"a","path":"y","size":100}],
            "nics":[{"name":"n","mac":"01:00:00:00:00:00","backend":{"tap":"a,b"}}],"serials":[]}"#;
        let spec: VmSpec = serde_json::from_str(text).unwrap();
        let faults = spec.validate().unwrap_err().faults;
        assert_eq!(faults.len(), 9, "{faults:#?}");
    }

    #[test]
    fn unknown_fields_and_missing_accelerators_are_refused() {
        assert!(serde_json::from_str::<VmSpec>(r#"{"name":"a","memoryMiB":64}"#).is_err());
        let extra = r#"{"name":"a","memoryMiB":64,"accelerator":"tcg","color":"red"}"#;
        assert!(serde_json::from_str::<VmSpec>(extra).unwrap_err().to_string().contains("color"));
    }
}
