//! Disks and volumes.

use super::{Report, one_of};
use crate::kubevirt;
use crate::vmi::{CloudInit, Disk, Spec, Volume};
use serde_json::Value;
use std::collections::BTreeSet;

const BUSES: [&str; 4] = ["virtio", "sata", "scsi", "usb"];
/// cloud-init's data in a VMI itself, as KubeVirt limits it.
const MAX_INLINE: usize = 2048;

pub fn check(report: &mut Report, field: &str, raw: &Value, spec: &Spec, cluster: &kubevirt::Spec) {
    let disks = format!("{field}.domain.devices.disks");
    let all = &spec.domain.devices.disks;
    report.unique(&disks, "disk", all.iter().map(|disk| &*disk.name));
    let mut orders = BTreeSet::new();
    for (index, disk) in all.iter().enumerate() {
        let at = format!("{disks}[{index}]");
        self::disk(report, &at, raw, index, disk);
        report.demand(spec.volume(&disk.name).is_some(), &format!("{at}.name"), || {
            format!("no volume is named '{}'", disk.name)
        });
        if let Some(order) = disk.boot_order {
            let at = format!("{at}.bootOrder");
            report.demand(order > 0, &at, || "must be 1 or more".into());
            report.demand(orders.insert(order), &at, || {
                format!("another disk has boot order {order}")
            });
        }
    }
    let volumes = format!("{field}.volumes");
    report.unique(&volumes, "volume", spec.volumes.iter().map(|volume| &*volume.name));
    let mut claims = BTreeSet::new();
    for (index, volume) in spec.volumes.iter().enumerate() {
        let at = format!("{volumes}[{index}]");
        self::volume(report, &at, raw, index, volume, cluster);
        let used = all.iter().any(|disk| disk.name == volume.name);
        if !used {
            report.warnings.push(format!("{at}: no disk shows volume '{}'", volume.name));
        }
        if let Some(claim) = volume.claim().filter(|claim| !claim.is_empty()) {
            report.demand(claims.insert(claim), &at, || {
                format!("another volume uses claim '{claim}'")
            });
        }
    }
}

fn disk(report: &mut Report, at: &str, raw: &Value, index: usize, disk: &Disk) {
    let target = disk.disk.as_ref().or(disk.cdrom.as_ref());
    // What is not built is told of elsewhere.
    let other = &raw["domain"]["devices"]["disks"][index]["lun"];
    if target.is_some() && (disk.disk.is_some() == disk.cdrom.is_some() || !other.is_null()) {
        report.fault(at, "say one only: disk or cdrom");
    }
    let bus = target.and_then(|target| target.bus.as_deref()).unwrap_or_default();
    let kind = if disk.cdrom.is_some() { "cdrom" } else { "disk" };
    let known = bus.is_empty() || BUSES.contains(&bus);
    report.demand(known, &format!("{at}.{kind}.bus"), || {
        format!("'{bus}' is not known here: say one of {}", BUSES.join(", "))
    });
    let fits = kind == "disk" || !["virtio", "usb"].contains(&bus);
    report.demand(fits, &format!("{at}.cdrom.bus"), || "a CD-ROM is on sata or scsi".into());
    let writable = disk.cdrom.as_ref().is_some_and(|cdrom| cdrom.readonly == Some(false));
    report.demand(!writable, &format!("{at}.cdrom.readonly"), || {
        "a CD-ROM cannot be written: use disk".into()
    });
    let serial = disk.serial.as_deref().unwrap_or_default();
    let plain = serial.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.+".contains(&b));
    report.demand(plain && serial.len() <= 36, &format!("{at}.serial"), || {
        "say at most 36 of a-z, A-Z, 0-9 and -_.+".into()
    });
    let cache = disk.cache.as_deref().unwrap_or("none");
    let known = ["none", "writethrough", "writeback"].contains(&cache);
    report.demand(known, &format!("{at}.cache"), || {
        format!("'{cache}' is not known: say none, writethrough or writeback")
    });
    if cache == "writeback" {
        let why = "disks are opened past the host's cache wherever its file system can";
        report.warnings.push(format!("{at}.cache has no effect: {why}"));
    }
}

fn volume(
    report: &mut Report,
    at: &str,
    raw: &Value,
    index: usize,
    volume: &Volume,
    cluster: &kubevirt::Spec,
) {
    let choices = [
        ("persistentVolumeClaim", volume.persistent_volume_claim.is_some()),
        ("dataVolume", volume.data_volume.is_some()),
        ("containerDisk", volume.container_disk.is_some()),
        ("emptyDisk", volume.empty_disk.is_some()),
        ("cloudInitNoCloud", volume.cloud_init_no_cloud.is_some()),
        ("cloudInitConfigDrive", volume.cloud_init_config_drive.is_some()),
        ("configMap", volume.config_map.is_some()),
        ("secret", volume.secret.is_some()),
        ("hostDisk", volume.host_disk.is_some()),
    ];
    // One of another kind is told of elsewhere.
    let fields = raw["volumes"][index].as_object().map_or(0, serde_json::Map::len);
    let any = choices.iter().any(|(_, there)| *there);
    if any || fields <= 1 {
        one_of(report, at, &choices);
    }
    let named = |report: &mut Report, field: &str, name: Option<&str>| {
        report.demand(name != Some(""), &format!("{at}.{field}"), || "must not be empty".into());
    };
    let claim = volume.persistent_volume_claim.as_ref();
    named(report, "persistentVolumeClaim.claimName", claim.map(|c| &*c.claim_name));
    named(report, "dataVolume.name", volume.data_volume.as_ref().map(|d| &*d.name));
    named(report, "configMap.name", volume.config_map.as_ref().map(|c| &*c.name));
    named(report, "secret.secretName", volume.secret.as_ref().map(|s| &*s.secret_name));
    if let Some(image) = &volume.container_disk {
        named(report, "containerDisk.image", Some(&image.image));
        let policies = ["", "Always", "IfNotPresent", "Never"];
        let policy = image.image_pull_policy.as_deref().unwrap_or_default();
        report.demand(
            policies.contains(&policy),
            &format!("{at}.containerDisk.imagePullPolicy"),
            || "say Always, IfNotPresent or Never".into(),
        );
        report.demand(
            image.path.as_deref().is_none_or(is_path),
            &format!("{at}.containerDisk.path"),
            || "must be an absolute path without '..'".into(),
        );
    }
    if let Some(empty) = &volume.empty_disk {
        let size = crate::quantity::bytes(&empty.capacity.0);
        report.demand(
            size.is_some_and(|size| (1..1 << 62).contains(&size)),
            &format!("{at}.emptyDisk.capacity"),
            || format!("'{}' is no size: say 2Gi", empty.capacity.0),
        );
    }
    if let Some(host) = &volume.host_disk {
        report.demand(cluster.gate("HostDisk"), &format!("{at}.hostDisk"), || {
            "disks of the node need the feature gate HostDisk, which is closed".into()
        });
        report.demand(is_path(&host.path), &format!("{at}.hostDisk.path"), || {
            "must be an absolute path without '..'".into()
        });
        report.demand(host.kind == "Disk", &format!("{at}.hostDisk.type"), || {
            "say Disk: the file must exist".into()
        });
    }
    let seeds = [
        ("cloudInitNoCloud", &volume.cloud_init_no_cloud),
        ("cloudInitConfigDrive", &volume.cloud_init_config_drive),
    ];
    for (name, seed) in seeds {
        if let Some(seed) = seed {
            self::seed(report, &format!("{at}.{name}"), seed);
        }
    }
}

fn seed(report: &mut Report, at: &str, seed: &CloudInit) {
    let user = [
        ("userData", seed.user_data.is_some()),
        ("userDataBase64", seed.user_data_base64.is_some()),
        ("secretRef", seed.secret_ref.is_some()),
    ];
    let network = [
        ("networkData", seed.network_data.is_some()),
        ("networkDataBase64", seed.network_data_base64.is_some()),
        ("networkDataSecretRef", seed.network_data_secret_ref.is_some()),
    ];
    if user.iter().chain(&network).all(|(_, there)| !there) {
        report.fault(at, "say userData, userDataBase64 or secretRef");
    }
    for group in [user, network] {
        if group.iter().any(|(_, there)| *there) {
            one_of(report, at, &group);
        }
    }
    for (name, text) in [("userData", &seed.user_data), ("networkData", &seed.network_data)] {
        let long = text.as_ref().is_some_and(|text| text.len() > MAX_INLINE);
        report.demand(!long, &format!("{at}.{name}"), || {
            format!("more than {MAX_INLINE} bytes: put it into a Secret and name that")
        });
    }
    for (name, text) in [
        ("userDataBase64", &seed.user_data_base64),
        ("networkDataBase64", &seed.network_data_base64),
    ] {
        let bad = text.as_ref().is_some_and(|text| !is_base64(text));
        report.demand(!bad, &format!("{at}.{name}"), || "is no base64".into());
    }
}

fn is_base64(text: &str) -> bool {
    let body = text.trim_end_matches('=');
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"+/".contains(&b);
    text.len().is_multiple_of(4) && text.len() - body.len() <= 2 && body.bytes().all(plain)
}

/// An absolute path that does not lead out of where it begins.
pub fn is_path(path: &str) -> bool {
    path.starts_with('/')
        && !path.split('/').any(|part| part == "..")
        && !path.chars().any(char::is_control)
}
