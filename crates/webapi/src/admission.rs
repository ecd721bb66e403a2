//! Whether and how what is written is kept: pure. The same rules serve this process and webhooks.

pub(crate) mod clones;
mod defaults;
mod migration;
mod writers;

use api::datavolume::FromClaim;
use api::instancetype::{self, Taken};
use api::kubevirt;
use api::migration::VirtualMachineInstanceMigration;
use api::validate::{self, Report};
use api::vmi::VirtualMachineInstance;
use apiserver::extension::Review;
use apiserver::meta;
use apiserver::request::Verb;
use apiserver::status::{Cause, Failure, Subject};
use serde_json::Value;
use std::sync::Arc;

pub use writers::OWN;

/// What a judgement needs to know besides the object.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// The cluster's settings.
    pub cluster: Arc<kubevirt::Spec>,
    /// Of a new migration: the VMI that it names.
    pub vmi: Option<VirtualMachineInstance>,
    /// Of a new migration: all of that VMI.
    pub migrations: Vec<VirtualMachineInstanceMigration>,
    /// Of a VM: what there is of what it takes.
    pub taken: Vec<Taken>,
    /// The claims that it clones though it may not.
    pub forbidden: Vec<FromClaim>,
}

/// Why something is not kept.
#[derive(Debug, Clone, PartialEq)]
pub struct Denied {
    /// 403: not by this user. 422: not like this.
    pub code: u16,
    /// Of a 422: all that is wrong, each with its field.
    pub causes: Vec<Cause>,
    /// All of it on one line.
    pub message: String,
}

impl Denied {
    fn to_user(message: impl Into<String>) -> Self {
        Self { code: 403, causes: Vec::new(), message: message.into() }
    }

    fn invalid(report: &Report) -> Self {
        let cause = |cause: &validate::Cause| Cause {
            reason: "FieldValueInvalid",
            message: cause.message.clone(),
            field: cause.field.clone(),
        };
        let causes = report.causes.iter().map(cause).collect();
        Self { code: 422, causes, message: report.message() }
    }

    /// As clients are told.
    pub fn failure(&self, review: &Review<'_>, object: Option<&Value>) -> Failure {
        let name = object.or(review.old).map(|o| meta::text(o, "name")).unwrap_or_default();
        let group = review.group;
        if self.code == 403 {
            let what = Subject { group, kind: review.resource, name };
            return Failure::forbidden(what, &self.message);
        }
        let kind = kind(group, review.resource).unwrap_or(review.resource);
        Failure::invalid(Subject { group, kind, name }, &self.causes)
    }
}

/// What is judged: groups, resources and their kinds.
pub const KINDS: [(&str, &str, &str); 11] = [
    (api::KUBEVIRT, "virtualmachines", "VirtualMachine"),
    (api::KUBEVIRT, "virtualmachineinstances", "VirtualMachineInstance"),
    (api::KUBEVIRT, "virtualmachineinstancemigrations", "VirtualMachineInstanceMigration"),
    (api::KUBEVIRT, "kubevirts", "KubeVirt"),
    ("migrations.kubevirt.io", "migrationpolicies", "MigrationPolicy"),
    (api::CDI, "datavolumes", "DataVolume"),
    ("godwit.dev", "ownerrecords", "OwnerRecord"),
    (instancetype::GROUP, "virtualmachineinstancetypes", "VirtualMachineInstancetype"),
    (
        instancetype::GROUP,
        "virtualmachineclusterinstancetypes",
        "VirtualMachineClusterInstancetype",
    ),
    (instancetype::GROUP, "virtualmachinepreferences", "VirtualMachinePreference"),
    (instancetype::GROUP, "virtualmachineclusterpreferences", "VirtualMachineClusterPreference"),
];

/// The kind of a resource that is judged; None of others.
pub fn kind(group: &str, resource: &str) -> Option<&'static str> {
    KINDS.iter().find(|(g, r, _)| (*g, *r) == (group, resource)).map(|(.., kind)| *kind)
}

/// Fills in what a new object does not say. It may be of any shape: it is judged only afterwards.
pub fn fill_in(review: &Review<'_>, object: &mut Value, cluster: &kubevirt::Spec) {
    if review.verb != Verb::Create || !review.subresource.is_empty() {
        return;
    }
    match kind(review.group, review.resource) {
        Some("VirtualMachineInstance") => defaults::instance(object, cluster),
        Some("VirtualMachineInstanceMigration") => migration::fill_in(object),
        _ => {}
    }
}

/// Judges an object as it would be kept; None: it is deleted. Returns warnings.
///
/// # Errors
/// Why it is not kept.
pub fn judge(
    review: &Review<'_>,
    object: Option<&Value>,
    facts: &Facts,
) -> Result<Vec<String>, Denied> {
    let mut warnings = writers::judge(review, object)?;
    let Some(object) = object.filter(|_| review.subresource.is_empty()) else {
        return Ok(warnings);
    };
    if let Some(denied) = clones::denied(review, &facts.forbidden) {
        return Err(denied);
    }
    let mut report = content(review, object, facts);
    if let Some(old) = review.old {
        if old["spec"] == object["spec"] {
            report = Report::default();
        } else {
            // What was wrong before, such as when a feature gate has closed meanwhile, must not
            // keep a VM from being stopped.
            let before = content(review, old, facts);
            report.causes.retain(|cause| !before.causes.contains(cause));
        }
        successor(&mut report, review, object, old);
    }
    if !report.causes.is_empty() {
        return Err(Denied::invalid(&report));
    }
    warnings.extend(report.warnings);
    Ok(warnings)
}

/// What is wrong with an object by itself.
fn content(review: &Review<'_>, object: &Value, facts: &Facts) -> Report {
    match kind(review.group, review.resource) {
        Some("VirtualMachine") => validate::virtual_machine(object, &facts.cluster, &facts.taken),
        Some("VirtualMachineInstancetype" | "VirtualMachineClusterInstancetype") => {
            validate::instancetype(object, &facts.cluster)
        }
        Some("VirtualMachinePreference" | "VirtualMachineClusterPreference") => {
            validate::preference(object, &facts.cluster)
        }
        Some("VirtualMachineInstance") => validate::instance(object, &facts.cluster),
        Some("DataVolume") => validate::data_volume(object),
        Some("KubeVirt") => validate::settings(object),
        Some("MigrationPolicy") => validate::policy(object),
        Some("VirtualMachineInstanceMigration") if review.old.is_none() => {
            migration::create(review, object, facts)
        }
        _ => Report::default(),
    }
}

/// What is wrong with an object as the successor of another.
fn successor(report: &mut Report, review: &Review<'_>, new: &Value, old: &Value) {
    let kind = kind(review.group, review.resource);
    let stays = match kind {
        Some("DataVolume") => "create another DataVolume, since this one's disk is made already",
        Some("VirtualMachineInstanceMigration") => "create another migration",
        _ => return,
    };
    report.demand(new["spec"] == old["spec"], "spec", || format!("cannot be changed: {stays}"));
    if kind == Some("VirtualMachineInstanceMigration") {
        migration::update(report, new, old);
    }
}
