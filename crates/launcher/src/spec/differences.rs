//! In what the guests of two specs differ.

use super::{DirectBoot, Disk, Nic, VmSpec, may_be};
use std::fmt::Debug;

impl VmSpec {
    /// Becomes the machine that another is, as far as its ids and hardware addresses make it: a guest
    /// that comes from there knows itself by them.
    pub fn be_as(&mut self, other: &Self) {
        self.uuid.clone_from(&other.uuid);
        self.serial_number.clone_from(&other.serial_number);
        for nic in &mut self.nics {
            if let Some(there) = other.nics.iter().find(|there| there.name == nic.name) {
                nic.mac.clone_from(&there.mac);
            }
        }
    }

    /// All in which the guests of two specs differ, this one's value first: a guest of one cannot
    /// move to the other unless there is nothing.
    ///
    /// A host's own affairs do not count: paths, shown sizes, what a network card is connected to.
    pub fn differences(&self, other: &Self) -> Vec<String> {
        // N.B. all fields by name: one that is added has to be thought of here.
        let Self {
            name,
            vcpus,
            topology,
            memory_mib,
            machine,
            cpu,
            accelerator,
            disks,
            nics,
            tablets,
            balloon,
            uefi,
            boot,
            uuid,
            serial_number,
            serials,
        } = self;
        let mut found = Differences::default();
        found.compare("name", name, &other.name);
        found.compare("vcpus", vcpus, &other.vcpus);
        found.compare("topology", topology, &other.topology);
        found.compare("uuid", uuid, &other.uuid);
        found.compare("serialNumber", serial_number, &other.serial_number);
        found.compare("memoryMiB", memory_mib, &other.memory_mib);
        if !may_be(machine, &other.machine) && !may_be(&other.machine, machine) {
            found.compare("machine", machine, &other.machine);
        }
        found.compare("tablets", tablets, &other.tablets);
        found.compare("balloon", balloon, &other.balloon);
        found.compare("cpu", cpu, &other.cpu);
        found.compare("accelerator", accelerator, &other.accelerator);
        found.compare("uefi", &uefi.is_some(), &other.uefi.is_some());
        found.compare("boot", &guest_boot(boot), &guest_boot(&other.boot));
        found.compare("serials", serials, &other.serials);
        found.compare("disks", &names(disks, |d| &d.name), &names(&other.disks, |d| &d.name));
        for (disk, other) in disks.iter().zip(&other.disks).filter(|(a, b)| a.name == b.name) {
            // N.B. whether it is shared is the target's to say: what it does not share is copied.
            let Disk { name, path: _, bus, read_only, cdrom, serial, boot_order, .. } = disk;
            found.compare(&format!("disk {name}: cdrom"), cdrom, &other.cdrom);
            found.compare(&format!("disk {name}: serial"), serial, &other.serial);
            found.compare(&format!("disk {name}: bootOrder"), boot_order, &other.boot_order);
            found.compare(&format!("disk {name}: bus"), bus, &other.bus);
            found.compare(&format!("disk {name}: readOnly"), read_only, &other.read_only);
        }
        found.compare("nics", &names(nics, |n| &n.name), &names(&other.nics, |n| &n.name));
        for (nic, other) in nics.iter().zip(&other.nics).filter(|(a, b)| a.name == b.name) {
            let Nic { name, mac, backend: _, forwards: _ } = nic;
            let (mac, other) = (mac.to_ascii_lowercase(), other.mac.to_ascii_lowercase());
            found.compare(&format!("nic {name}: mac"), &mac, &other);
        }
        found.0
    }
}

#[derive(Default)]
struct Differences(Vec<String>);

impl Differences {
    fn compare<T: PartialEq + Debug>(&mut self, what: &str, own: &T, other: &T) {
        if own != other {
            self.0.push(format!("{what}: {own:?} and {other:?}"));
        }
    }
}

fn names<T>(all: &[T], name: impl Fn(&T) -> &String) -> Vec<&String> {
    all.iter().map(name).collect()
}

/// Where the files lie is the host's affair; whether there is an initrd is not.
fn guest_boot(boot: &Option<DirectBoot>) -> Option<(bool, &str)> {
    boot.as_ref().map(|boot| (boot.initrd.is_some(), boot.cmdline.as_str()))
}
