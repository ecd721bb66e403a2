//! Migrations: one at a time, of a VMI that runs and can move.

use super::{Facts, writers};
use api::conditions::{Condition, Is, types};
use api::keys;
use api::migration::{Side, Spec};
use api::support;
use api::validate::{Report, unsupported};
use apiserver::extension::Review;
use apiserver::meta;
use kube::ResourceExt;
use serde_json::{Value, json};

/// The feature gate of migrations between two VMIs.
const GATE: &str = "DecentralizedLiveMigration";
/// How urgent a migration can be.
const PRIORITIES: [&str; 3] = ["system-critical", "user-triggered", "system-maintenance"];

pub fn fill_in(object: &mut Value) {
    meta::add_finalizer(object, keys::MIGRATION_FINALIZER);
    let Some(name) = object["spec"]["vmiName"].as_str().map(str::to_owned) else { return };
    let mut labels = meta::map(object, "labels").cloned().unwrap_or_default();
    labels.insert(keys::MIGRATES.into(), name.into());
    meta::set(object, "labels", json!(labels));
}

pub fn create(review: &Review<'_>, object: &Value, facts: &Facts) -> Report {
    let mut report = Report::default();
    let spec = match support::parse::<Spec>(&object["spec"]) {
        Ok((spec, unknown)) => {
            unsupported::warn(&mut report, "spec", &unknown);
            spec
        }
        Err(why) => {
            report.misfit("spec", &why);
            return report;
        }
    };
    let name = &spec.vmi_name;
    if name.is_empty() {
        report.fault("spec.vmiName", "name the virtual machine instance that is to move");
        return report;
    }
    halves(&spec, facts, &mut report);
    if let Some(why) = hindrance(name, &spec, facts) {
        report.fault("spec.vmiName", why);
    }
    if let Some(priority) = spec.priority.as_deref().filter(|priority| !priority.is_empty()) {
        report.demand(PRIORITIES.contains(&priority), "spec.priority", || {
            format!("must be one of {}", PRIORITIES.join(", "))
        });
        report.demand(writers::is_own(review.user), "spec.priority", || {
            "is Godwit's to set: leave it out".into()
        });
    }
    report
}

/// What one between two VMIs must say.
fn halves(spec: &Spec, facts: &Facts, report: &mut Report) {
    let fields =
        [("spec.sendTo", spec.send_to.is_some()), ("spec.receive", spec.receive.is_some())];
    for (field, _) in fields.iter().filter(|(_, is_there)| *is_there) {
        report.demand(facts.cluster.gate(GATE), field, || {
            format!("needs the feature gate {GATE}, which is closed")
        });
    }
    if let (Some(to), Some(from)) = (&spec.send_to, &spec.receive) {
        report.demand(to.migration_id == from.migration_id, "spec.receive.migrationID", || {
            "must be that of sendTo: one that does both stays in its cluster".into()
        });
    }
    if let Some(to) = &spec.send_to {
        let port = to.connect_url.rsplit_once(':').filter(|(host, _)| !host.is_empty());
        let is_address = port.is_some_and(|(_, port)| port.parse::<u16>().is_ok_and(|p| p > 0));
        report.demand(is_address, "spec.sendTo.connectURL", || {
            "must be host:port, as the other cluster's KubeVirt object says in \
             status.synchronizationAddresses"
                .into()
        });
    }
    if let Some((side, id)) = spec.half() {
        let field = if side == Side::Source { "spec.sendTo" } else { "spec.receive" };
        report.demand(!id.is_empty(), &format!("{field}.migrationID"), || {
            "choose an id that both sides say, and no other migration does".into()
        });
    }
}

/// Why a VMI cannot move now.
fn hindrance(name: &str, spec: &Spec, facts: &Facts) -> Option<String> {
    let Some(vmi) = &facts.vmi else {
        return Some(format!("there is no virtual machine instance '{name}' in this namespace"));
    };
    let status = vmi.status.clone().unwrap_or_default();
    if status.phase.is_final() {
        return Some(format!("'{name}' has ended ({}), and cannot move", status.phase.name()));
    }
    let side = spec.half().map(|(side, _)| side);
    let waits = vmi.annotations().contains_key(keys::RECEIVES);
    match (side, waits) {
        (Some(Side::Target), false) => {
            return Some(format!(
                "'{name}' does not wait for a guest: its virtual machine's runStrategy must be \
                 WaitAsReceiver, and it must not run"
            ));
        }
        (Some(Side::Source) | None, true) => {
            return Some(format!("'{name}' waits for a guest itself"));
        }
        _ => {}
    }
    let other = facts.migrations.iter().find(|m| m.spec.vmi_name == name && !m.is_over());
    if let Some(other) = other {
        return Some(format!(
            "'{name}' is moved already by migration '{}': wait for its end, or delete it",
            other.name_any()
        ));
    }
    let stays = |c: &&Condition| c.kind == types::LIVE_MIGRATABLE && c.status == Is::False;
    // Disks always go along to another VMI.
    let disks = |c: &&Condition| c.reason.as_deref() == Some("DisksNotLiveMigratable");
    let condition = status.conditions.iter().find(stays);
    let condition = condition.filter(|condition| side.is_none() || !disks(condition))?;
    Some(format!(
        "'{name}' cannot be migrated live: {} ({})",
        condition.message.as_deref().unwrap_or("its handler does not say why"),
        condition.reason.as_deref().unwrap_or("no reason")
    ))
}

pub fn update(report: &mut Report, new: &Value, old: &Value) {
    let label = |object: &Value| object["metadata"]["labels"][keys::MIGRATES].clone();
    let over = matches!(old["status"]["phase"].as_str(), Some("Succeeded" | "Failed"));
    report.demand(
        over || label(new) == label(old),
        &format!("metadata.labels[{}]", keys::MIGRATES),
        || "cannot be changed while the migration is under way".into(),
    );
}
