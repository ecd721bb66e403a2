//! DataVolumes.

use super::{Report, one_of, unsupported};
use crate::datavolume::{Http, Registry, Spec, requested};
use crate::support;
use serde_json::Value;

/// A whole DataVolume.
pub fn data_volume(object: &Value) -> Report {
    let mut report = Report::default();
    spec(&mut report, "spec", &object["spec"]);
    report
}

/// The spec of a DataVolume that is at a field.
pub fn spec(report: &mut Report, field: &str, raw: &Value) {
    let (spec, unknown) = match support::parse::<Spec>(raw) {
        Ok(parsed) => parsed,
        Err(why) => return report.misfit(field, &why),
    };
    unsupported::judge(report, field, raw, &unknown);
    one_of(report, field, &[("storage", spec.storage.is_some()), ("pvc", spec.pvc.is_some())]);
    let content = spec.content_type.as_deref().unwrap_or("kubevirt");
    report.demand(content == "kubevirt", &format!("{field}.contentType"), || {
        format!("'{content}' is not built: say kubevirt, which is a disk")
    });
    let sources = raw["source"].as_object().map_or(0, serde_json::Map::len);
    report.demand(sources > 0 || !raw["sourceRef"].is_null(), &format!("{field}.source"), || {
        "say one of: blank, http, registry, pvc, upload".into()
    });
    report.demand(sources <= 1, &format!("{field}.source"), || "say one source only".into());
    let source = spec.source.clone().unwrap_or_default();
    if let Some(http) = &source.http {
        self::http(report, &format!("{field}.source.http"), http);
    }
    if let Some(registry) = &source.registry {
        self::registry(report, &format!("{field}.source.registry"), registry);
    }
    if let Some(claim) = &source.pvc {
        let at = format!("{field}.source.pvc");
        report.demand(!claim.name.is_empty(), &format!("{at}.name"), || "name the claim".into());
    }
    size(report, field, &spec);
}

fn size(report: &mut Report, field: &str, spec: &Spec) {
    let (form, claim) = match (&spec.storage, &spec.pvc) {
        (Some(claim), _) => ("storage", claim),
        (None, Some(claim)) => ("pvc", claim),
        (None, None) => return,
    };
    let at = format!("{field}.{form}.resources.requests.storage");
    // A clone can have the size of what it is made of.
    let cloned = form == "storage" && spec.source.as_ref().is_some_and(|s| s.pvc.is_some());
    match requested(claim) {
        None => report.demand(cloned, &at, || "say how large the disk is, like 2Gi".into()),
        Some(size) => {
            let bytes = crate::quantity::bytes(&size.0);
            report.demand(bytes.is_some_and(|b| (1..1 << 62).contains(&b)), &at, || {
                format!("'{}' is no size: say 2Gi", size.0)
            });
        }
    }
    let modes = claim.access_modes.as_deref().unwrap_or_default();
    report.demand(
        form == "storage" || !modes.is_empty(),
        &format!("{field}.pvc.accessModes"),
        || {
            "say who may use it at once, like [ReadWriteOnce]; or use storage, which finds out"
                .into()
        },
    );
    let known = ["ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"];
    for (index, mode) in modes.iter().enumerate() {
        report.demand(
            known.contains(&&**mode),
            &format!("{field}.{form}.accessModes[{index}]"),
            || format!("'{mode}' is not known: say one of {}", known.join(", ")),
        );
    }
    let mode = claim.volume_mode.as_deref().unwrap_or("Filesystem");
    report.demand(
        ["Filesystem", "Block"].contains(&mode),
        &format!("{field}.{form}.volumeMode"),
        || format!("'{mode}' is not known: say Filesystem or Block"),
    );
}

fn http(report: &mut Report, at: &str, http: &Http) {
    let (scheme, rest) = http.url.split_once("://").unwrap_or_default();
    let host = rest.split('/').next().unwrap_or_default();
    report.demand(
        ["http", "https"].contains(&scheme) && !host.is_empty(),
        &format!("{at}.url"),
        || format!("'{}' is no http:// or https:// address", http.url),
    );
    let Some(checksum) = &http.checksum else { return };
    let (kind, digits) = checksum.split_once(':').unwrap_or_default();
    let length = match kind {
        "md5" => 32,
        "sha1" => 40,
        "sha256" => 64,
        "sha512" => 128,
        _ => 0,
    };
    let hex = digits.bytes().all(|b| b.is_ascii_hexdigit());
    report.demand(length > 0 && hex && digits.len() == length, &format!("{at}.checksum"), || {
        format!("'{checksum}' must be md5:, sha1:, sha256: or sha512: and its hex digits")
    });
}

fn registry(report: &mut Report, at: &str, registry: &Registry) {
    let url = registry.url.as_deref().unwrap_or_default();
    let name = url.strip_prefix("docker://").unwrap_or_default();
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"._-/:@".contains(&b);
    report.demand(!name.is_empty() && name.bytes().all(plain), &format!("{at}.url"), || {
        format!("'{url}' is no image: say docker://HOST/NAME:TAG")
    });
    let method = registry.pull_method.as_deref().unwrap_or("pod");
    report.demand(["pod", "node"].contains(&method), &format!("{at}.pullMethod"), || {
        format!("'{method}' is not known: say pod or node")
    });
}
