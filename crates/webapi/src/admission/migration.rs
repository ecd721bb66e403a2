//! Migrations: one at a time, of a VMI that runs and can move.

use super::{Facts, writers};
use api::conditions::{Condition, Is, types};
use api::keys;
use api::migration::Spec;
use api::support;
use api::validate::{Report, unsupported};
use apiserver::extension::Review;
use apiserver::meta;
use kube::ResourceExt;
use serde_json::{Value, json};

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
            for field in ["sendTo", "receive"] {
                report.demand(object["spec"][field].is_null(), &format!("spec.{field}"), || {
                    "migration to another cluster is not built yet: leave it out".into()
                });
            }
            let refused = |path: &String| path.starts_with("sendTo") || path.starts_with("receive");
            let rest: Vec<String> = unknown.into_iter().filter(|path| !refused(path)).collect();
            unsupported::warn(&mut report, "spec", &rest);
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
    if let Some(why) = hindrance(name, facts) {
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

/// Why a VMI cannot move now.
fn hindrance(name: &str, facts: &Facts) -> Option<String> {
    let Some(vmi) = &facts.vmi else {
        return Some(format!("there is no virtual machine instance '{name}' in this namespace"));
    };
    let status = vmi.status.clone().unwrap_or_default();
    if status.phase.is_final() {
        return Some(format!("'{name}' has ended ({}), and cannot move", status.phase.name()));
    }
    let other = facts.migrations.iter().find(|m| m.spec.vmi_name == name && !m.is_over());
    if let Some(other) = other {
        return Some(format!(
            "'{name}' is moved already by migration '{}': wait for its end, or delete it",
            other.name_any()
        ));
    }
    let stays = |c: &&Condition| c.kind == types::LIVE_MIGRATABLE && c.status == Is::False;
    let condition = status.conditions.iter().find(stays)?;
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
