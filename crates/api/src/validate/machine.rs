//! Processors, memory, firmware, and how a VMI starts and ends.

use super::{Report, is_label, one_of};
use crate::eviction::Strategy;
use crate::vmi::{Domain, Feature, Firmware, Input, Spec};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

const MAX_VCPUS: u32 = 512;
const MAX_INPUTS: usize = 2;
const MIB: i128 = 1 << 20;
const MIN_MEMORY: i128 = 16 * MIB;
const MAX_MEMORY: i128 = (64 << 20) * MIB;

pub fn check(report: &mut Report, field: &str, spec: &Spec) {
    processors(report, field, &spec.domain);
    memory(report, field, spec);
    firmware(report, &format!("{field}.domain.firmware"), &spec.domain.firmware);
    let Domain { machine, features, devices, .. } = &spec.domain;
    let inputs = format!("{field}.domain.devices.inputs");
    report.unique(&inputs, "input", devices.inputs.iter().map(|input| &*input.name));
    report.demand(devices.inputs.len() <= MAX_INPUTS, &inputs, || {
        format!("at most {MAX_INPUTS} inputs")
    });
    for (index, Input { kind, bus, .. }) in devices.inputs.iter().enumerate() {
        let at = format!("{inputs}[{index}]");
        report.demand(kind == "tablet", &format!("{at}.type"), || "say tablet".into());
        let known = matches!(bus.as_deref(), None | Some("" | "usb" | "virtio"));
        report.demand(known, &format!("{at}.bus"), || "say usb or virtio".into());
    }
    let known = |kind: &str| {
        ["pc", "q35", ""].contains(&kind)
            || ["pc-i440fx-", "pc-q35-"].iter().any(|begin| {
                kind.strip_prefix(begin).is_some_and(|version| {
                    !version.is_empty()
                        && version.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
                })
            })
    };
    report.demand(known(&machine.kind), &format!("{field}.domain.machine.type"), || {
        format!("'{}' is not known: say q35, pc, pc-q35-VERSION or pc-i440fx-VERSION", machine.kind)
    });
    let off =
        |feature: &Option<Feature>| feature.as_ref().is_some_and(|f| f.enabled == Some(false));
    for (name, feature) in [("acpi", &features.acpi), ("apic", &features.apic)] {
        report.demand(!off(feature), &format!("{field}.domain.features.{name}.enabled"), || {
            "cannot be switched off".into()
        });
    }
    life(report, field, spec);
}

fn life(report: &mut Report, field: &str, spec: &Spec) {
    let grace = spec.termination_grace_period_seconds.unwrap_or(0);
    report.demand(grace >= 0, &format!("{field}.terminationGracePeriodSeconds"), || {
        "must not be negative".into()
    });
    let choice = |report: &mut Report, name: &str, value: &Option<String>, all: &[&str]| {
        let known = value.as_deref().is_none_or(|value| all.contains(&value));
        report.demand(known, &format!("{field}.{name}"), || {
            format!(
                "'{}' is not known: say one of {}",
                value.as_deref().unwrap_or_default(),
                all.join(", ")
            )
        });
    };
    choice(report, "startStrategy", &spec.start_strategy, &["Paused"]);
    choice(report, "evictionStrategy", &spec.eviction_strategy, &Strategy::NAMES);
    choice(report, "architecture", &spec.architecture, &["", "amd64"]);
    for (name, value) in [("hostname", &spec.hostname), ("subdomain", &spec.subdomain)] {
        let label = value.as_deref().is_none_or(|value| value.is_empty() || is_label(value));
        report.demand(label, &format!("{field}.{name}"), || {
            "must be 1 to 63 of a-z, 0-9 and '-'".into()
        });
    }
}

fn processors(report: &mut Report, field: &str, domain: &Domain) {
    let (field, cpu) = (format!("{field}.domain.cpu"), &domain.cpu);
    let vcpus = cpu.topology().vcpus();
    report.demand(vcpus.is_some_and(|vcpus| vcpus <= MAX_VCPUS), &field, || {
        format!("sockets x cores x threads is more than {MAX_VCPUS}")
    });
    let sockets = cpu.sockets.unwrap_or(1);
    let most = cpu.max_sockets.filter(|most| *most > 0);
    report.demand(most.is_none_or(|most| sockets <= most), &format!("{field}.sockets"), || {
        "more sockets than maxSockets".into()
    });
    let plain = |model: &str| {
        !model.is_empty() && model.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
    };
    report.demand(cpu.model.as_deref().is_none_or(plain), &format!("{field}.model"), || {
        "say host-model, host-passthrough, or a model that QEMU knows".into()
    });
}

fn memory(report: &mut Report, field: &str, spec: &Spec) {
    let domain = &spec.domain;
    let field = format!("{field}.domain");
    let guest = format!("{field}.memory.guest");
    let Some(wanted) = spec.memory() else {
        report.fault(guest, "say how much memory the guest has, like 512Mi");
        return;
    };
    let Some(bytes) = bytes(wanted) else {
        report.fault(guest, format!("'{}' is no size: say 512Mi, or 2Gi", wanted.0));
        return;
    };
    report.demand((MIN_MEMORY..=MAX_MEMORY).contains(&bytes), &guest, || {
        format!("'{}' must be 16Mi to 64Ti", wanted.0)
    });
    let limit = domain.resources.limits.get("memory").and_then(super::machine::bytes);
    report.demand(limit.is_none_or(|limit| bytes <= limit), &guest, || {
        "the guest has more memory than the limit allows".into()
    });
    let requests = format!("{field}.resources.requests.memory");
    let requested = domain.resources.requests.get("memory").and_then(super::machine::bytes);
    report.demand(
        limit.is_none_or(|limit| requested.is_none_or(|requested| requested <= limit)),
        &requests,
        || "more is requested than the limit allows".into(),
    );
    report.demand(requested.is_none_or(|requested| requested >= 0), &requests, || {
        "must not be negative".into()
    });
    let most = domain.memory.max_guest.as_ref().and_then(super::machine::bytes);
    report.demand(
        most.is_none_or(|most| bytes <= most),
        &format!("{field}.memory.maxGuest"),
        || "less than the guest's memory".into(),
    );
}

fn firmware(report: &mut Report, field: &str, firmware: &Firmware) {
    if let Some(uuid) = &firmware.uuid {
        let parts: Vec<usize> = uuid.split('-').map(str::len).collect();
        let hex = uuid.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-');
        report.demand(hex && parts == [8, 4, 4, 4, 12], &format!("{field}.uuid"), || {
            format!("'{uuid}' is no UUID")
        });
    }
    let serial = firmware.serial.as_deref().unwrap_or_default();
    let plain = serial.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.+=".contains(&b));
    report.demand(plain && serial.len() <= 256, &format!("{field}.serial"), || {
        "say at most 256 of a-z, A-Z, 0-9 and -_.+=".into()
    });
    if let Some(loader) = &firmware.bootloader {
        let choices = [("bios", loader.bios.is_some()), ("efi", loader.efi.is_some())];
        one_of(report, &format!("{field}.bootloader"), &choices);
        let secure = loader.efi.as_ref().is_some_and(|efi| efi.secure_boot != Some(false));
        report.demand(!secure, &format!("{field}.bootloader.efi.secureBoot"), || {
            "Secure Boot, which is the default, is not built: say secureBoot: false".into()
        });
    }
    let Some(boot) = &firmware.kernel_boot else { return };
    let field = format!("{field}.kernelBoot");
    let args = boot.kernel_args.as_deref().unwrap_or_default();
    let Some(container) = &boot.container else {
        let message = "name the image with the kernel in it";
        report.fault(format!("{field}.container"), message);
        return;
    };
    let at = format!("{field}.container");
    report.demand(!container.image.is_empty(), &format!("{at}.image"), || {
        "name the image with the kernel in it".into()
    });
    let kernel = container.kernel_path.as_deref();
    report.demand(kernel.is_some(), &format!("{at}.kernelPath"), || {
        "name the kernel in the image".into()
    });
    for (name, path) in [("kernelPath", kernel), ("initrdPath", container.initrd_path.as_deref())] {
        report.demand(path.is_none_or(super::disks::is_path), &format!("{at}.{name}"), || {
            "must be an absolute path without '..'".into()
        });
    }
    report.demand(!args.chars().any(char::is_control), &format!("{field}.kernelArgs"), || {
        "must be one printable line".into()
    });
}

/// A quantity in whole bytes.
pub fn bytes(quantity: &Quantity) -> Option<i128> {
    crate::quantity::bytes(&quantity.0)
}
