//! What a VM is: the part that the guest sees and the part that is its host's.

mod differences;

use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fmt::Debug;
use std::path::{Path, PathBuf};

/// A VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct VmSpec {
    /// Lower-case letters, digits, dots and dashes, at most 63.
    pub name: String,
    /// Virtual CPUs.
    #[serde(default = "one")]
    pub vcpus: u32,
    /// How they are arranged; None is one socket for each.
    #[serde(default)]
    pub topology: Option<Topology>,
    /// Guest memory in MiB.
    #[serde(rename = "memoryMiB")]
    pub memory_mib: u64,
    /// QEMU's machine type: `pc`, `q35`, or a version of them (`pc-q35-7.2`). The first two become the
    /// newest version that the QEMU knows which starts the VM; the VM keeps it while it runs,
    /// wherever it moves.
    #[serde(default = "pc")]
    pub machine: String,
    /// QEMU's CPU model. None is `host` with KVM, `Westmere-v1` with TCG.
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
    /// Devices by which people point; at most 2.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tablets: Vec<Tablet>,
    /// Whether the guest has a balloon, by which it reports the pages that it does not use: they are
    /// given back, and are not sent when it moves.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub balloon: bool,
    /// UEFI firmware; None is BIOS.
    #[serde(default)]
    pub uefi: Option<Uefi>,
    /// A kernel that is started without a boot loader.
    #[serde(default)]
    pub boot: Option<DirectBoot>,
    /// What the guest knows the machine by (SMBIOS, RFC 9562).
    #[serde(default)]
    pub uuid: Option<String>,
    /// The machine's serial number (SMBIOS).
    #[serde(default)]
    pub serial_number: Option<String>,
    /// Names of the serial ports, as in [`Disk::name`]; the first is the console.
    #[serde(default = "console")]
    pub serials: Vec<String>,
}

/// How virtual CPUs are arranged: as many as their product.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Topology {
    /// Sockets.
    pub sockets: u32,
    /// Of each socket.
    pub cores: u32,
    /// Of each core.
    pub threads: u32,
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

/// A disk. At most 15 on virtio, 6 on SATA, 24 in all.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Disk {
    /// A letter, then at most 19 of a-z, 0-9 and '-'; QEMU's ids are made of it.
    pub name: String,
    /// A raw file or a block device, by its absolute path.
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
    /// Grow its file to so many bytes before it starts, if it is smaller.
    #[serde(default)]
    pub grow_to: Option<u64>,
    /// Make a file of so many bytes before it starts, if there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blank: Option<u64>,
    /// It is a CD-ROM: on SCSI or SATA, and read-only.
    #[serde(default)]
    pub cdrom: bool,
    /// What the guest knows it by.
    #[serde(default)]
    pub serial: Option<String>,
    /// Its turn at boot, from 1 on. If no disk has one, they are tried in their order.
    #[serde(default)]
    pub boot_order: Option<u32>,
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
    /// USB 3.
    Usb,
    /// The flash memory where UEFI firmware keeps its variables (boot entries, Secure Boot keys);
    /// begin with a copy of the `OVMF_VARS.fd` that belongs to the firmware. At most one.
    Flash,
}

/// A device by which people point at a place, rather than move from it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Tablet {
    /// As in [`Disk::name`].
    pub name: String,
    /// On USB; else it is virtio's.
    #[serde(default)]
    pub usb: bool,
}

/// A network card; at most 8.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Nic {
    /// As in [`Disk::name`].
    pub name: String,
    /// Its address.
    pub mac: String,
    /// What it is connected to on its host.
    #[serde(default)]
    pub backend: Backend,
    /// What reaches the guest through [`Backend::User`].
    #[serde(default)]
    pub forwards: Vec<Forward>,
}

/// A port of the host that leads to the same port of the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Forward {
    /// UDP, not TCP.
    #[serde(default)]
    pub udp: bool,
    /// The host's address.
    pub address: std::net::IpAddr,
    /// The port of both.
    pub port: u16,
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

/// UEFI firmware. Without a disk on [`Bus::Flash`] its variables live in the guest's memory: they
/// move with it, and each start of QEMU begins with the firmware's own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Uefi {
    /// The code (`OVMF_CODE.fd`), by its absolute path; read only.
    pub code: PathBuf,
}

/// A kernel that is started without a boot loader.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct DirectBoot {
    /// The kernel, by its absolute path.
    pub kernel: PathBuf,
    /// The initial root filesystem, by its absolute path.
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
/// Slots from 0x10 to 0x1e; q35 has devices of its own in 0x1f.
const MAX_VIRTIO_DISKS: usize = 15;
/// Ports of an AHCI controller.
const MAX_SATA_DISKS: usize = 6;
/// Ports of the USB controller, which tablets take too.
const MAX_USB_DISKS: usize = 4;
/// Slots 0x6 and 0x7, and ports of the USB controller.
const MAX_TABLETS: usize = 2;
/// Slots from 0x8 to 0xf.
const MAX_NICS: usize = 8;
/// ISA has four.
const MAX_SERIALS: usize = 4;
/// QEMU's node names hold 31 bytes; the longest suffix of a node is 5.
const MAX_ID: usize = 20;
/// What QEMU's ids are made of names with.
const SUFFIXES: [&str; 7] = ["-file", "-raw", "-tg", "-net", "-nic", "-disk", "-tablet"];
/// Sockets of a launcher's folder, which a serial port's would replace.
const SOCKETS: [&str; 4] = ["launcher", "streams", "qmp", "nbd"];

/// Short names of machine types, and how their versions begin.
const ALIASES: [(&str, &str); 2] = [("pc", "pc-i440fx-"), ("q35", "pc-q35-")];

/// Whether `name` is that machine type or, if it is a short name, can mean it.
fn may_be(name: &str, machine: &str) -> bool {
    let means = |(alias, begin): &(&str, &str)| name == *alias && machine.starts_with(begin);
    name == machine || ALIASES.iter().any(means)
}

/// Whether a name can stand for a VM's folder.
pub fn is_name(name: &str) -> bool {
    let bytes = name.as_bytes();
    (1..=63).contains(&bytes.len())
        && bytes[0].is_ascii_alphanumeric()
        && bytes.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-.".contains(b))
}

/// Whether QEMU's ids can be made of a name, such that no two of them are the same.
fn is_id(name: &str) -> bool {
    let bytes = name.as_bytes();
    (1..=MAX_ID).contains(&bytes.len())
        && bytes[0].is_ascii_lowercase()
        && bytes.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-')
        && !SUFFIXES.iter().any(|suffix| name.ends_with(suffix))
}

fn is_mac(text: &str) -> bool {
    let parts: Vec<_> = text.split(':').collect();
    let byte =
        |p: &str| u8::from_str_radix(p, 16).ok().filter(|_| p.len() == 2 && !p.starts_with('+'));
    let bytes: Vec<_> = parts.iter().filter_map(|p| byte(p)).collect();
    parts.len() == 6 && bytes.len() == 6 && bytes[0] & 1 == 0
}

/// QEMU splits its options at commas; none of ours may smuggle one in.
fn is_plain(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.+=".contains(&b))
}

/// QEMU works in a folder of its own, and takes its arguments as text.
fn is_place(path: &Path) -> bool {
    path.is_absolute() && path.to_str().is_some_and(|text| !text.chars().any(char::is_control))
}

/// A path beneath a folder in which others have put links for what is mounted in it: through the
/// first link on its way. What lies behind that may be in a guest's hands: no link there is followed.
pub fn beneath(root: &Path, path: &Path) -> PathBuf {
    let mut place = root.to_owned();
    let mut mounted = false;
    for part in path.components() {
        if let std::path::Component::Normal(name) = part {
            place.push(name);
            if !mounted && let Ok(target) = std::fs::read_link(&place) {
                (place, mounted) = (target, true);
            }
        }
    }
    place
}

#[derive(Default)]
struct Faults(Vec<String>);

impl Faults {
    fn demand(&mut self, holds: bool, fault: impl FnOnce() -> String) {
        if !holds {
            self.0.push(fault());
        }
    }

    fn names<'a>(&mut self, what: &str, names: impl Iterator<Item = &'a String>) {
        let mut seen = BTreeSet::new();
        for name in names {
            self.demand(is_id(name), || {
                format!(
                    "{what} name '{name}' must be a letter, then at most {} of a-z, 0-9 and '-', and \
                     not end in {}",
                    MAX_ID - 1,
                    SUFFIXES.join(", ")
                )
            });
            self.demand(seen.insert(name), || format!("two {what}s are named '{name}'"));
        }
    }

    fn place(&mut self, what: &str, path: &Path) {
        self.demand(is_place(path), || {
            format!("{what}: path '{}' must be absolute, in UTF-8 and printable", path.display())
        });
    }
}

impl VmSpec {
    /// Checks the spec.
    ///
    /// # Errors
    /// [`Invalid`] with all faults at once.
    pub fn validate(&self) -> Result<(), Invalid> {
        let mut faults = Faults::default();
        faults.demand(is_name(&self.name), || {
            "name must be 1 to 63 of a-z, 0-9, '-' and '.', and begin with a letter or a digit"
                .into()
        });
        self.check_machine(&mut faults);
        self.check_disks(&mut faults);
        self.check_cards(&mut faults);
        self.check_boot(&mut faults);
        let Faults(faults) = faults;
        if faults.is_empty() { Ok(()) } else { Err(Invalid { name: self.name.clone(), faults }) }
    }

    /// The same spec with its paths beneath a folder in which others have put links for what is
    /// mounted in it: that of a container without a file system of its own.
    ///
    /// N.B. only such links are followed: what lies behind them may be in a guest's hands.
    pub fn below(mut self, root: Option<&Path>) -> Self {
        let Some(root) = root else { return self };
        let disks = self.disks.iter_mut().map(|disk| &mut disk.path);
        let boot = self
            .boot
            .iter_mut()
            .flat_map(|boot| std::iter::once(&mut boot.kernel).chain(boot.initrd.as_mut()));
        for path in disks.chain(boot) {
            *path = beneath(root, path);
        }
        self
    }

    /// Whether it is of the q35 kind, which has other buses than pc.
    pub fn is_q35(&self) -> bool {
        may_be("q35", &self.machine)
    }

    /// Whether the machine type is a short name, which each QEMU takes for another version.
    pub fn has_machine_alias(&self) -> bool {
        ALIASES.iter().any(|(alias, _)| self.machine == *alias)
    }

    /// Size of the UEFI firmware in bytes, if there is one.
    ///
    /// # Errors
    /// When its file cannot be looked at.
    pub fn firmware_size(&self) -> std::io::Result<Option<u64>> {
        self.uefi.as_ref().map(|uefi| Ok(std::fs::metadata(&uefi.code)?.len())).transpose()
    }

    fn check_machine(&self, faults: &mut Faults) {
        let Self { machine, vcpus, memory_mib, serials, .. } = self;
        faults
            .demand((1..=MAX_VCPUS).contains(vcpus), || format!("vcpus must be 1 to {MAX_VCPUS}"));
        if let Some(Topology { sockets, cores, threads }) = self.topology {
            let product = sockets.checked_mul(cores).and_then(|n| n.checked_mul(threads));
            faults.demand(product == Some(*vcpus), || {
                format!("topology {sockets} x {cores} x {threads} is not {vcpus} vcpus")
            });
        }
        for (what, text) in [("uuid", &self.uuid), ("serialNumber", &self.serial_number)] {
            faults.demand(text.as_deref().is_none_or(is_plain), || {
                format!("{what} must be of letters, digits and -_.+=")
            });
        }
        faults.demand((16..=MAX_MEMORY_MIB).contains(memory_mib), || {
            format!("memoryMiB must be 16 to {MAX_MEMORY_MIB}")
        });
        let known = ALIASES.iter().any(|(alias, _)| may_be(alias, machine));
        faults.demand(known && is_plain(machine), || {
            format!("machine '{machine}' must be pc, q35, pc-i440fx-VERSION or pc-q35-VERSION")
        });
        if let Some(cpu) = &self.cpu {
            faults.demand(cpu.split(',').all(is_plain), || format!("cpu '{cpu}' is no CPU model"));
        }
        faults.demand((1..=MAX_SERIALS).contains(&serials.len()), || {
            format!("serials must name 1 to {MAX_SERIALS} serial ports")
        });
        faults.names("serial port", serials.iter());
        for name in serials.iter().filter(|name| SOCKETS.contains(&name.as_str())) {
            faults.0.push(format!("serial port name '{name}' is taken by the launcher"));
        }
    }

    fn check_disks(&self, faults: &mut Faults) {
        faults.names("disk", self.disks.iter().map(|disk| &disk.name));
        let on = |bus| self.disks.iter().filter(|disk| disk.bus == bus).count();
        for (count, most, what) in [
            (self.disks.len(), MAX_DISKS, "disks"),
            (on(Bus::Virtio), MAX_VIRTIO_DISKS, "virtio disks"),
            (on(Bus::Sata), MAX_SATA_DISKS, "SATA disks"),
            (on(Bus::Usb), MAX_USB_DISKS, "USB disks"),
            (on(Bus::Flash), 1, "disk on flash"),
        ] {
            faults.demand(count <= most, || format!("at most {most} {what}"));
        }
        faults.demand(self.uefi.is_some() || on(Bus::Flash) == 0, || {
            "a disk on flash holds the variables of UEFI firmware: name that under uefi".into()
        });
        let mut paths = BTreeSet::new();
        for disk in &self.disks {
            let Disk { name, path, size, bus, read_only, cdrom, serial, .. } = disk;
            for (what, size) in [("growTo", disk.grow_to), ("blank", disk.blank)] {
                faults.demand(size.is_none_or(|size| size % 512 == 0 && !read_only), || {
                    format!(
                        "disk {name}: {what} must be a multiple of 512, of a disk that is written"
                    )
                });
            }
            faults.demand(!cdrom || (*read_only && matches!(bus, Bus::Scsi | Bus::Sata)), || {
                format!("disk {name}: a CD-ROM is on scsi or sata, and readOnly")
            });
            faults.demand(serial.as_deref().is_none_or(|s| is_plain(s) && s.len() <= 36), || {
                format!("disk {name}: serial must be at most 36 of letters, digits and -_.+=")
            });
            faults.place(&format!("disk {name}"), path);
            faults.demand(paths.insert(path), || {
                format!("disk {name}: another disk has its path {}", path.display())
            });
            faults.demand(size.is_none_or(|size| size > 0 && size % 512 == 0), || {
                format!("disk {name}: size must be a multiple of 512")
            });
            faults.demand(*bus != Bus::Flash || (size.is_none() && !read_only), || {
                format!("disk {name}: flash is written, and has the size of its file")
            });
        }
    }

    fn check_cards(&self, faults: &mut Faults) {
        faults.names("tablet", self.tablets.iter().map(|tablet| &tablet.name));
        faults
            .demand(self.tablets.len() <= MAX_TABLETS, || format!("at most {MAX_TABLETS} tablets"));
        faults.names("nic", self.nics.iter().map(|nic| &nic.name));
        faults.demand(self.nics.len() <= MAX_NICS, || format!("at most {MAX_NICS} nics"));
        for Nic { name, mac, backend, forwards } in &self.nics {
            faults.demand(forwards.is_empty() || *backend == Backend::User, || {
                format!("nic {name}: ports are forwarded by the user-mode network only")
            });
            faults.demand(is_mac(mac), || format!("nic {name}: '{mac}' is no unicast MAC address"));
            if let Backend::Tap(tap) = backend {
                faults.demand(is_plain(tap) && tap.len() < 16, || {
                    format!("nic {name}: '{tap}' is no interface name")
                });
            }
        }
    }

    fn check_boot(&self, faults: &mut Faults) {
        if let Some(uefi) = &self.uefi {
            faults.place("uefi code", &uefi.code);
        }
        if let Some(boot) = &self.boot {
            faults.place("kernel", &boot.kernel);
            if let Some(initrd) = &boot.initrd {
                faults.place("initrd", initrd);
            }
            faults.demand(!boot.cmdline.chars().any(char::is_control), || {
                "cmdline must be one printable line".into()
            });
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    const GOOD: &str = r#"{"name":"web","memoryMiB":64,"accelerator":"tcg",
        "disks":[{"name":"root","path":"/disks/root"}],"boot":{"kernel":"/boot/kernel","cmdline":"quiet"},
        "nics":[{"name":"lan","mac":"52:54:00:AA:00:01"}]}"#;

    fn spec(text: &str) -> VmSpec {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn a_bad_spec_is_told_all_its_faults_at_once() {
        spec(GOOD).validate().unwrap();
        let bad = spec(
            r#"{"name":"Web!","memoryMiB":1,"accelerator":"tcg","machine":"pc,foo=1","vcpus":0,
            "disks":[{"name":"a","path":"x"},{"name":"a","path":"/y","size":100},{"name":"b-raw","path":"/y"}],
            "nics":[{"name":"a-name-that-is-too-long","mac":"01:00:00:00:00:00","backend":{"tap":"a,b"}}],
            "boot":{"kernel":"vmlinuz","initrd":"/a\u0000b"},"serials":["qmp"]}"#,
        );
        let faults = bad.validate().unwrap_err().faults;
        assert_eq!(faults.len(), 15, "{faults:#?}");
    }

    #[test]
    fn flash_belongs_to_firmware_and_has_the_size_of_its_file() {
        let flash = GOOD.replace("\"path\"", "\"bus\":\"flash\",\"path\"");
        let faults = spec(&flash).validate().unwrap_err().faults;
        assert!(faults.len() == 1 && faults[0].contains("uefi"), "{faults:?}");
        let flash = flash.replace("\"boot\"", "\"uefi\":{\"code\":\"/code\"},\"boot\"");
        spec(&flash).validate().unwrap();
        for more in ["\"readOnly\":true", "\"size\":512"] {
            let faults = spec(&flash.replace("\"bus\"", &format!("{more},\"bus\""))).validate();
            assert_eq!(faults.unwrap_err().faults.len(), 1);
        }
    }

    #[test]
    fn unknown_fields_and_missing_accelerators_are_refused() {
        assert!(serde_json::from_str::<VmSpec>(r#"{"name":"a","memoryMiB":64}"#).is_err());
        let extra = r#"{"name":"a","memoryMiB":64,"accelerator":"tcg","color":"red"}"#;
        assert!(serde_json::from_str::<VmSpec>(extra).unwrap_err().to_string().contains("color"));
    }

    #[test]
    fn all_that_the_guest_sees_differ_is_named_and_nothing_of_its_host() {
        let here = spec(GOOD);
        let host =
            GOOD.replace("/disks/root\"", "/other\",\"size\":512").replace("/boot/kernel", "/k");
        let host = host.replace("01\"", "01\",\"backend\":{\"tap\":\"tap0\"}").replace("AA", "aa");
        assert_eq!(here.differences(&spec(&host)), [""; 0]);
        let on = |machine: &str| {
            spec(&GOOD.replace("\"tcg\"", &format!("\"tcg\",\"machine\":\"{machine}\"")))
        };
        let (old, new) = (on("pc-i440fx-7.2"), on("pc-i440fx-8.0"));
        assert_eq!(here.differences(&old), [""; 0]);
        assert_eq!(old.differences(&here), [""; 0]);
        assert!(
            old.differences(&new)[0].contains("7.2") && here.differences(&on("q35")).len() == 1
        );
        let guest = GOOD
            .replace(":64", ":128")
            .replace("quiet", "")
            .replace("root", "data")
            .replace("00:01", "00:02");
        let told = here.differences(&spec(&guest)).join("; ");
        for what in ["memoryMiB: 64 and 128", "boot", "disks", "nic lan: mac"] {
            assert!(told.contains(what), "{told}");
        }
    }
}
