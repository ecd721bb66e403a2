//! Volumes, claims and classes.

use super::{
    Kind, WITH_STATUS, default, forbidden, immutable, invalid, list, part, quantities, required,
    text, unsupported,
};
use crate::meta;
use crate::quantity;
use crate::status::Cause;
use serde_json::{Value, json};
use std::cmp::Ordering;

const MODES: [&str; 4] = ["ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"];

pub(super) static VOLUME: Kind = Kind {
    default: |volume| {
        if volume["spec"].is_object() {
            default(&mut volume["spec"], "persistentVolumeReclaimPolicy", "Retain");
            default(&mut volume["spec"], "volumeMode", "Filesystem");
        }
    },
    prepare_create: |volume| volume["status"] = json!({"phase": "Pending"}),
    validate: validate_volume,
    validate_update: |new, old| {
        let sources = |volume: &Value| {
            let spec = volume["spec"].as_object().cloned().unwrap_or_default();
            spec.into_iter().filter(|(name, _)| is_source(name)).collect::<Vec<_>>()
        };
        let mut causes = Vec::new();
        if sources(new) != sources(old) {
            causes.push(forbidden(
                "spec.persistentvolumesource",
                "spec.persistentvolumesource is immutable after creation",
            ));
        }
        causes.extend(immutable(
            "spec.volumeMode",
            &new["spec"]["volumeMode"],
            &old["spec"]["volumeMode"],
        ));
        causes
    },
    ..WITH_STATUS
};

/// Fields of a volume's spec that say where it is.
fn is_source(field: &str) -> bool {
    const OTHERS: [&str; 9] = [
        "capacity",
        "accessModes",
        "claimRef",
        "persistentVolumeReclaimPolicy",
        "storageClassName",
        "mountOptions",
        "volumeMode",
        "nodeAffinity",
        "volumeAttributesClassName",
    ];
    !OTHERS.contains(&field)
}

fn validate_volume(volume: &Value) -> Vec<Cause> {
    let spec = &volume["spec"];
    let mut causes = modes(spec);
    if spec["capacity"]["storage"].is_null() {
        causes.push(required("spec.capacity", ""));
    }
    causes.extend(quantities("spec.capacity", &spec["capacity"]));
    let fields = spec.as_object().into_iter().flatten();
    match fields.filter(|(name, _)| is_source(name)).count() {
        0 => causes.push(required("spec", "must specify a volume type")),
        1 => {}
        _ => causes.push(forbidden("spec", "may not specify more than 1 volume type")),
    }
    if spec["local"].is_object() && spec["nodeAffinity"].is_null() {
        causes.push(required("spec.nodeAffinity", "Local volume requires node affinity"));
    }
    let policies = ["Delete", "Recycle", "Retain"];
    if !policies.contains(&text(spec, "persistentVolumeReclaimPolicy")) {
        causes.push(unsupported(
            "spec.persistentVolumeReclaimPolicy",
            &spec["persistentVolumeReclaimPolicy"],
            &policies,
        ));
    }
    causes
}

fn modes(spec: &Value) -> Vec<Cause> {
    let mut causes = Vec::new();
    if list(spec, "accessModes").is_empty() {
        causes.push(required("spec.accessModes", "at least 1 access mode is required"));
    }
    for (n, mode) in list(spec, "accessModes").iter().enumerate() {
        if !mode.as_str().is_some_and(|mode| MODES.contains(&mode)) {
            causes.push(unsupported(format!("spec.accessModes[{n}]"), mode, &MODES));
        }
    }
    let kinds = ["Block", "Filesystem"];
    if spec["volumeMode"].as_str().is_some_and(|m| !kinds.contains(&m)) {
        causes.push(unsupported("spec.volumeMode", &spec["volumeMode"], &kinds));
    }
    causes
}

pub(super) static CLAIM: Kind = Kind {
    default: |claim| {
        if claim["spec"].is_object() {
            default(&mut claim["spec"], "volumeMode", "Filesystem");
        }
    },
    prepare_create: |claim| claim["status"] = json!({"phase": "Pending"}),
    validate: |claim| {
        let spec = &claim["spec"];
        let mut causes = modes(spec);
        let asked = &spec["resources"]["requests"]["storage"];
        if asked.is_null() {
            causes.push(required("spec.resources[storage]", ""));
        } else if quantity::compare(asked, &json!(0)) == Some(Ordering::Equal) {
            causes.push(invalid("spec.resources[storage]", asked, "must be greater than zero"));
        }
        causes.extend(quantities("spec.resources.requests", &spec["resources"]["requests"]));
        causes
    },
    validate_update: update_claim,
    ..WITH_STATUS
};

fn update_claim(new: &Value, old: &Value) -> Vec<Cause> {
    let (spec, before) = (&new["spec"], &old["spec"]);
    let mut like_old = spec.clone();
    // It is named when the claim is bound.
    if text(before, "volumeName").is_empty() {
        meta::take_field(&mut like_old, before, "volumeName");
    }
    // A class may be given to a claim that has none yet.
    if before["storageClassName"].is_null() {
        meta::take_field(&mut like_old, before, "storageClassName");
    }
    let mut causes = Vec::new();
    let asked = |spec: &Value| spec["resources"]["requests"]["storage"].clone();
    match quantity::compare(&asked(spec), &asked(before)) {
        Some(Ordering::Less) => {
            let had = &old["status"]["capacity"]["storage"];
            // What never was can be taken back.
            if had.is_null() || quantity::compare(&asked(spec), had) != Some(Ordering::Greater) {
                causes.push(forbidden(
                    "spec.resources.requests.storage",
                    "field can not be less than status.capacity",
                ));
            }
        }
        Some(_) => {}
        None => causes.push(invalid(
            "spec.resources.requests.storage",
            &asked(spec),
            "must be a quantity",
        )),
    }
    part(part(&mut like_old, "resources"), "requests")["storage"] = asked(before);
    if like_old != *before {
        causes.push(forbidden(
            "spec",
            "spec is immutable after creation except resources.requests and volumeAttributesClassName for bound claims",
        ));
    }
    causes
}

pub(super) static CLASS: Kind = Kind {
    default: |class| {
        default(class, "reclaimPolicy", "Delete");
        default(class, "volumeBindingMode", "Immediate");
    },
    validate: |class| {
        let mut causes = Vec::new();
        if text(class, "provisioner").is_empty() {
            causes.push(required("provisioner", ""));
        }
        for (field, all) in [
            ("reclaimPolicy", ["Delete", "Retain"]),
            ("volumeBindingMode", ["Immediate", "WaitForFirstConsumer"]),
        ] {
            if !all.contains(&text(class, field)) {
                causes.push(unsupported(field, &class[field], &all));
            }
        }
        causes
    },
    validate_update: |new, old| {
        let mut causes = Vec::new();
        if new["parameters"] != old["parameters"] {
            causes.push(forbidden("parameters", "updates to parameters are forbidden."));
        }
        if new["provisioner"] != old["provisioner"] {
            causes.push(forbidden("provisioner", "updates to provisioner are forbidden."));
        }
        if new["reclaimPolicy"] != old["reclaimPolicy"] {
            causes.push(forbidden("reclaimPolicy", "updates to reclaimPolicy are forbidden."));
        }
        causes.extend(immutable(
            "volumeBindingMode",
            &new["volumeBindingMode"],
            &old["volumeBindingMode"],
        ));
        causes
    },
    ..super::PLAIN
};
