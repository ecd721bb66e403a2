//! Instancetypes, preferences, and VMs that take them: what they say is judged where a template would say
//! it.

use super::{Report, spec_of};
use crate::instancetype::{
    Expanded, Found, Given, KINDS, Taken, Types, What, expand, requirements, wanted,
};
use crate::support;
use crate::vm::{Spec as VmSpec, Status};
use crate::vmi::Spec as VmiSpec;
use crate::{kubevirt, vmi};
use serde_json::{Value, json};
use std::collections::BTreeMap;

const TEMPLATE: &str = "spec.template.spec";

/// The template of a VM, with what it takes.
pub(super) fn template(
    report: &mut Report,
    object: &Value,
    spec: &VmSpec,
    cluster: &kubevirt::Spec,
    taken: &[Taken],
) -> Option<VmiSpec> {
    for what in What::ALL {
        matcher(report, what, spec);
    }
    let template = &spec.template.spec;
    // N.B. first by itself: what is of another type takes nothing.
    if let Err(why) = support::parse::<vmi::Spec>(template) {
        report.misfit(TEMPLATE, &why);
        return None;
    }
    let annotations = spec.template.metadata.clone().unwrap_or_default().annotations;
    let status: Status = serde_json::from_value(object["status"].clone()).unwrap_or_default();
    let mut objects = Vec::new();
    let mut whole = true;
    for one in wanted(spec, Some(&status)) {
        let what = one.kind.what;
        let found = taken.iter().find(|taken| taken.wanted == one);
        if let Some(Taken { found: Found::Missing(why), .. }) = found {
            report.warnings.push(format!(
                "spec.{}: {why}; the virtual machine starts once there is one",
                what.field()
            ));
        }
        let object = found.and_then(Taken::object);
        whole &= object.is_some();
        objects.extend(object.map(|object| (what, object)));
    }
    let least = least();
    let types = match whole {
        true => Types::of(objects.into_iter()),
        // What one says that is not there is not known.
        false => {
            Types { instancetype: spec.instancetype.as_ref().map(|_| &least), preference: None }
        }
    };
    let expanded = expand(template, &annotations.unwrap_or_default(), types);
    report.causes.extend(expanded.faults.clone());
    if whole {
        report.causes.extend(requirements(&expanded, types));
    }
    let mut judged = Report::default();
    let parsed = spec_of(&mut judged, TEMPLATE, &expanded.spec, cluster);
    let field = |given: &Given| (format!("spec.{}", given.what.field()), Some(given.from));
    attribute(&mut judged, &expanded, field);
    report.causes.extend(judged.causes);
    report.warnings.extend(judged.warnings);
    parsed
}

/// How a VM names what it takes.
fn matcher(report: &mut Report, what: What, spec: &VmSpec) {
    let Some(matcher) = what.matcher(spec) else { return };
    let field = format!("spec.{}", what.field());
    report
        .demand(!matcher.name.is_empty(), &format!("{field}.name"), || "must not be empty".into());
    report.demand(matcher.kind(what).is_some(), &format!("{field}.kind"), || {
        let kinds = KINDS.iter().filter(|kind| kind.what == what);
        let kinds: Vec<&str> = kinds.map(|kind| kind.name).collect();
        format!("say one of: {}", kinds.join(", "))
    });
}

/// An instancetype, of the cluster or of a namespace.
pub fn instancetype(object: &Value, cluster: &kubevirt::Spec) -> Report {
    let types = Types { instancetype: Some(&object["spec"]), preference: None };
    by_itself(object, types, cluster)
}

/// A preference, of the cluster or of a namespace.
pub fn preference(object: &Value, cluster: &kubevirt::Spec) -> Report {
    let least = least();
    let types = Types { instancetype: Some(&least), preference: Some(&object["spec"]) };
    by_itself(object, types, cluster)
}

/// What a VM would be refused for that has one of each device, and says nothing else.
fn by_itself(object: &Value, types: Types<'_>, cluster: &kubevirt::Spec) -> Report {
    let mut report = Report::default();
    let name = object["metadata"]["name"].as_str().unwrap_or_default();
    report.demand(name.len() <= 63, "metadata.name", || {
        "a name is also a label of revisions: at most 63 characters".into()
    });
    let any = json!({
        "domain": {"devices": {
            "disks": [{"name": "disk", "disk": {}}, {"name": "cdrom", "cdrom": {}}],
            "interfaces": [{"name": "pod", "masquerade": {}}], "inputs": [{"name": "input"}],
        }},
        "networks": [{"name": "pod", "pod": {}}],
        "volumes": [
            {"name": "disk", "emptyDisk": {"capacity": "1Gi"}},
            {"name": "cdrom", "emptyDisk": {"capacity": "1Gi"}},
        ],
    });
    let expanded = expand(&any, &BTreeMap::new(), types);
    for fault in &expanded.faults {
        let (field, why) = fault.message.split_once(": ").unwrap_or(("", &fault.message));
        report.fault(format!("spec.{field}"), why);
    }
    let mut judged = Report::default();
    spec_of(&mut judged, TEMPLATE, &expanded.spec, cluster);
    judged.causes.retain(|cause| giver(&expanded, &cause.field).is_some());
    judged.warnings.retain(|warning| giver(&expanded, place(warning)).is_some());
    attribute(&mut judged, &expanded, |given| (format!("spec.{}", given.from), None));
    for cause in judged.causes {
        if !report.causes.contains(&cause) {
            report.causes.push(cause);
        }
    }
    judged.warnings.dedup();
    report.warnings = judged.warnings;
    report
}

/// Who says a field of a template.
fn giver<'a>(expanded: &'a Expanded, field: &str) -> Option<&'a Given> {
    expanded.giver(field.strip_prefix(TEMPLATE)?.strip_prefix('.')?)
}

/// The field of which a warning is.
fn place(warning: &str) -> &str {
    warning.split([' ', ':']).next().unwrap_or_default()
}

/// Has a report of a template tell who says what is wrong: the field that says it, and where in it.
fn attribute(
    report: &mut Report,
    expanded: &Expanded,
    to: impl Fn(&Given) -> (String, Option<&'static str>),
) {
    for cause in &mut report.causes {
        let Some((field, within)) = giver(expanded, &cause.field).map(&to) else { continue };
        cause.field = field;
        if let Some(within) = within {
            cause.message = format!("{within}: {}", cause.message);
        }
    }
    for warning in &mut report.warnings {
        let Some((field, within)) = giver(expanded, place(warning)).map(&to) else { continue };
        let within = within.map(|within| format!(": {within}")).unwrap_or_default();
        *warning = format!("{field}{within}{}", &warning[place(warning).len()..]);
    }
}

/// An instancetype that says as little as can be.
fn least() -> Value {
    json!({"cpu": {"guest": 1}, "memory": {"guest": "64Mi"}})
}
