//! What is wrong with an object: all of it at once, each with its field. Pure.
//!
//! Fields that Godwit does not act on are warned of, and those without which a guest would not be
//! what its owner expects are refused: see [`unsupported`].

mod datavolume;
mod disks;
mod instancetype;
mod machine;
mod networks;
pub mod unsupported;

use crate::eviction::Strategy;
use crate::instancetype::Taken;
use crate::migration::{Options, Selectors};
use crate::quantity;
use crate::support::{self, Misfit};
use crate::vm::{RunStrategy, Spec as VmSpec};
use crate::vmi::Spec as VmiSpec;
use crate::{duration, kubevirt};
use serde_json::Value;
use std::collections::BTreeSet;

pub use datavolume::data_volume;
pub use instancetype::{instancetype, preference};

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cause {
    /// Where: `spec.template.spec.domain.cpu.cores`.
    pub field: String,
    /// What, and what would be right.
    pub message: String,
}

/// What was found in an object.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// What is wrong.
    pub causes: Vec<Cause>,
    /// What has no effect.
    pub warnings: Vec<String>,
}

impl Report {
    /// Notes what is wrong.
    pub fn fault(&mut self, field: impl Into<String>, message: impl Into<String>) {
        self.causes.push(Cause { field: field.into(), message: message.into() });
    }

    /// Notes what is wrong unless it holds.
    pub fn demand(&mut self, holds: bool, field: &str, message: impl FnOnce() -> String) {
        if !holds {
            self.fault(field, message());
        }
    }

    /// Notes what cannot be read of what is at a field: in serde's words, without those that only
    /// programmers understand.
    pub fn misfit(&mut self, field: &str, misfit: &Misfit) {
        let mut why = misfit.why.clone();
        for (word, plain) in [
            ("unknown variant", "unknown value"),
            ("expected one of", "say one of"),
            ("expected u32", "expected a whole number from 0 on"),
            ("expected u16", "expected a whole number from 0 to 65535"),
        ] {
            why = why.replace(word, plain);
        }
        self.fault(misfit.field(field), why.replace('`', "'"));
    }

    /// Notes names that are empty or there twice.
    fn unique<'a>(&mut self, field: &str, what: &str, names: impl Iterator<Item = &'a str>) {
        let mut seen = BTreeSet::new();
        for (index, name) in names.enumerate() {
            let at = format!("{field}[{index}].name");
            self.demand(!name.is_empty(), &at, || format!("a {what} needs a name"));
            self.demand(seen.insert(name), &at, || format!("another {what} is named '{name}'"));
        }
    }

    /// All that is wrong on one line, as Kubernetes says it.
    pub fn message(&self) -> String {
        let all: Vec<String> =
            self.causes.iter().map(|c| format!("{}: {}", c.field, c.message)).collect();
        all.join("; ")
    }
}

/// Names that are there, of a choice of which exactly one is to be.
fn present<'a>(choices: &[(&'a str, bool)]) -> Vec<&'a str> {
    choices.iter().filter(|(_, there)| *there).map(|(name, _)| *name).collect()
}

/// Notes unless exactly one of the choices is there.
fn one_of(report: &mut Report, field: &str, choices: &[(&str, bool)]) {
    let found = present(choices);
    let all = || choices.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
    match found.len() {
        1 => {}
        0 => report.fault(field, format!("say one of: {}", all())),
        _ => report.fault(field, format!("say one only, not {}", found.join(" and "))),
    }
}

/// A name as Kubernetes has them for pods' labels: 1 to 63 of a-z, 0-9, '-'.
pub fn is_label(name: &str) -> bool {
    let bytes = name.as_bytes();
    (1..=63).contains(&bytes.len())
        && bytes.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-')
        && !name.starts_with('-')
        && !name.ends_with('-')
}

/// A whole VM, with what there is of what it takes.
pub fn virtual_machine(object: &Value, cluster: &kubevirt::Spec, taken: &[Taken]) -> Report {
    let mut report = Report::default();
    check_name(&mut report, object);
    let (spec, unknown) = match support::parse::<VmSpec>(&object["spec"]) {
        Ok(parsed) => parsed,
        Err(why) => {
            report.misfit("spec", &why);
            return report;
        }
    };
    unsupported::judge(&mut report, "spec", &object["spec"], &unknown);
    strategy(&mut report, object, &spec, cluster);
    let volumes = instancetype::template(&mut report, object, &spec, cluster, taken);
    let named = |name: &str| {
        volumes.as_ref().is_none_or(|spec| {
            spec.volumes.iter().any(|v| v.data_volume.as_ref().is_some_and(|d| d.name == name))
        })
    };
    let field = "spec.dataVolumeTemplates";
    let name = |t: &crate::vm::DataVolumeTemplate| t.metadata.name.clone().unwrap_or_default();
    let names: Vec<String> = spec.data_volume_templates.iter().map(name).collect();
    report.unique(field, "dataVolumeTemplate", names.iter().map(String::as_str));
    for (index, template) in spec.data_volume_templates.iter().enumerate() {
        let at = format!("{field}[{index}]");
        report.demand(named(&names[index]), &format!("{at}.metadata.name"), || {
            format!(
                "no volume of the template uses dataVolume '{}': add one, or remove the \
                 dataVolumeTemplate",
                names[index]
            )
        });
        datavolume::spec(&mut report, &format!("{at}.spec"), &template.spec);
    }
    report
}

fn check_name(report: &mut Report, object: &Value) {
    let name = object["metadata"]["name"].as_str().unwrap_or_default();
    report.demand(name.len() <= 63, "metadata.name", || {
        "a VM's name is also a label of its pod: at most 63 characters".into()
    });
}

fn strategy(report: &mut Report, object: &Value, spec: &VmSpec, cluster: &kubevirt::Spec) {
    match (spec.running, spec.run_strategy) {
        (Some(_), Some(_)) => {
            report.fault(
                "spec.running",
                "running and runStrategy exclude each other: keep runStrategy",
            );
        }
        (None, None) => report.fault(
            "spec.runStrategy",
            "say one of: Always, Halted, Manual, RerunOnFailure, Once, WaitAsReceiver",
        ),
        _ => {}
    }
    let receives = spec.run_strategy == Some(RunStrategy::WaitAsReceiver);
    report.demand(
        !receives || cluster.gate("DecentralizedLiveMigration"),
        "spec.runStrategy",
        || {
            "WaitAsReceiver needs the feature gate DecentralizedLiveMigration, which is closed"
                .into()
        },
    );
    let known = matches!(
        &*spec.update_volumes_strategy.clone().unwrap_or_default(),
        "" | "Migration" | "Replacement"
    );
    report.demand(known, "spec.updateVolumesStrategy", || "say Migration or Replacement".into());
    report.demand(object["spec"]["template"].is_object(), "spec.template", || {
        "a VM needs a template for its VMI".into()
    });
}

/// A whole VMI.
pub fn instance(object: &Value, cluster: &kubevirt::Spec) -> Report {
    let mut report = Report::default();
    check_name(&mut report, object);
    spec_of(&mut report, "spec", &object["spec"], cluster);
    report
}

/// The spec of a VMI that is at a field.
fn spec_of(
    report: &mut Report,
    field: &str,
    spec: &Value,
    cluster: &kubevirt::Spec,
) -> Option<VmiSpec> {
    let (parsed, unknown) = match support::parse::<VmiSpec>(spec) {
        Ok(parsed) => parsed,
        Err(why) => {
            report.misfit(field, &why);
            return None;
        }
    };
    unsupported::judge(report, field, spec, &unknown);
    machine::check(report, field, &parsed);
    disks::check(report, field, spec, &parsed, cluster);
    networks::check(report, field, &parsed);
    Some(parsed)
}

/// The settings of a cluster.
pub fn settings(object: &Value) -> Report {
    let mut report = Report::default();
    match support::parse::<kubevirt::Spec>(&object["spec"]) {
        Ok((spec, unknown)) => {
            unsupported::warn(&mut report, "spec", &unknown);
            certificates(&mut report, &spec);
            leaving(&mut report, &spec);
            let field = "spec.configuration.migrations";
            migrations(&mut report, field, &spec.configuration.migrations);
            let plain = object["spec"]["configuration"]["migrations"]["disableTLS"] == true;
            report.demand(!plain, &format!("{field}.disableTLS"), || {
                "must not be true: what moves is always encrypted, and both sides prove who they are"
                    .into()
            });
            let developer = &spec.configuration.developer_configuration;
            for gate in developer.feature_gates.iter().chain(&developer.disabled_feature_gates) {
                if !kubevirt::KNOWN_GATES.contains(&&**gate) {
                    report.warnings.push(format!(
                        "spec.configuration.developerConfiguration: feature gate {gate} is not known \
                         here and has no effect"
                    ));
                }
            }
        }
        Err(why) => report.misfit("spec", &why),
    }
    report
}

/// How guests leave their nodes and their launchers.
fn leaving(report: &mut Report, spec: &kubevirt::Spec) {
    let names = Strategy::NAMES;
    let strategy = spec.configuration.eviction_strategy.as_deref();
    let known = strategy.is_none_or(|name| names.contains(&name));
    report.demand(known, "spec.configuration.evictionStrategy", || {
        format!("is not known: say one of {}", names.join(", "))
    });
    let field = "spec.workloadUpdateStrategy";
    let update = &spec.workload_update_strategy;
    let methods = [kubevirt::LIVE_MIGRATE, kubevirt::EVICT];
    for method in &update.workload_update_methods {
        let known = methods.contains(&&**method);
        report.demand(known, &format!("{field}.workloadUpdateMethods"), || {
            format!("'{method}' is not known: say {}", methods.join(", "))
        });
    }
    let interval = update.batch_eviction_interval.as_deref();
    let fits = interval.is_none_or(|text| duration::parse(text).is_some());
    report.demand(fits, &format!("{field}.batchEvictionInterval"), || {
        "is no duration: say 1m, or 90s".into()
    });
}

/// The terms of certificates, as KubeVirt's operator checks them.
fn certificates(report: &mut Report, spec: &kubevirt::Spec) {
    let field = "spec.certificateRotateStrategy.selfSigned";
    let asked = &spec.certificate_rotate_strategy.self_signed;
    for (name, one) in [("ca", &asked.ca), ("server", &asked.server)] {
        for (what, text) in [("duration", &one.duration), ("renewBefore", &one.renew_before)] {
            let fits = text.as_deref().is_none_or(|text| duration::parse(text).is_some());
            report.demand(fits, &format!("{field}.{name}.{what}"), || {
                "is no duration: say 168h, or 30m".into()
            });
        }
        let late = one.duration().zip(one.renew_before()).is_some_and(|(all, end)| end >= all);
        report.demand(!late, &format!("{field}.{name}.renewBefore"), || {
            format!("must be less than {name}.duration")
        });
    }
    let (ca, server) = (asked.ca.duration(), asked.server.duration());
    let outlives = ca.zip(server).is_some_and(|(ca, server)| server > ca);
    report.demand(!outlives, &format!("{field}.server.duration"), || {
        "must not be longer than ca.duration".into()
    });
}

/// A migration policy.
pub fn policy(object: &Value) -> Report {
    let mut report = Report::default();
    // N.B. each for itself: what is flattened hides what nobody knows.
    let mut options = object["spec"].clone();
    let selectors = options.as_object_mut().and_then(|spec| spec.remove("selectors"));
    match support::parse::<Options>(&options) {
        Ok((parsed, unknown)) => {
            unsupported::warn(&mut report, "spec", &unknown);
            migrations(&mut report, "spec", &parsed);
        }
        Err(why) => report.misfit("spec", &why),
    }
    match support::parse::<Option<Selectors>>(&selectors.unwrap_or_default()) {
        Ok((Some(selectors), unknown)) => {
            unsupported::warn(&mut report, "spec.selectors", &unknown);
            if selectors == Selectors::default() {
                report.warnings.push("spec.selectors: nothing is selected by them".into());
            }
        }
        Ok((None, _)) => {
            report.warnings.push("spec.selectors: without any it is never used".into())
        }
        Err(why) => report.misfit("spec.selectors", &why),
    }
    report
}

/// How migrations are to be made.
fn migrations(report: &mut Report, field: &str, options: &Options) {
    /// As KubeVirt has it.
    const LONGEST_PAUSE_MS: i64 = 2_000_000;
    let numbers = [
        ("completionTimeoutPerGiB", options.completion_timeout_per_gib),
        ("progressTimeout", options.progress_timeout),
    ];
    for (name, number) in numbers {
        let negative = number.is_some_and(|number| number < 0);
        report.demand(!negative, &format!("{field}.{name}"), || "must not be negative".into());
    }
    let pause = options.max_downtime_ms.is_none_or(|ms| (1..=LONGEST_PAUSE_MS).contains(&ms));
    report.demand(pause, &format!("{field}.maxDowntimeMs"), || {
        format!("must be 1 to {LONGEST_PAUSE_MS}")
    });
    let bandwidth = options.bandwidth_per_migration.as_ref();
    let rate = bandwidth.is_none_or(|rate| quantity::bytes(&rate.0).is_some_and(|b| b >= 0));
    report.demand(rate, &format!("{field}.bandwidthPerMigration"), || {
        "must be bytes per second, and not negative: 64Mi".into()
    });
    let limits = [
        ("parallelMigrationsPerCluster", options.parallel_migrations_per_cluster),
        ("parallelOutboundMigrationsPerNode", options.parallel_outbound_migrations_per_node),
    ];
    for (name, limit) in limits {
        let none = limit == Some(0);
        report.demand(!none, &format!("{field}.{name}"), || "must be 1 at least".into());
    }
}
