//! Metrics of migrations: how many, and how far each is, as it says itself (`status.progress`).

use super::{Metric, Samples, namespace};
use api::migration::{Phase, VirtualMachineInstanceMigration as Migration};
use jiff::Timestamp;
use kube::ResourceExt;

/// What is said of each migration, and from where.
type Of = (&'static str, &'static str, fn(&Migration) -> Option<f64>);

/// Of those that are under way.
const RUNNING: [Of; 9] = [
    ("kubevirt_vmi_migration_data_total_bytes", "Bytes to be moved, as far as is known.", total),
    ("kubevirt_vmi_migration_data_processed_bytes", "Bytes that are at the target.", processed),
    ("kubevirt_vmi_migration_data_remaining_bytes", "Bytes left to be moved.", remaining),
    (
        "kubevirt_vmi_migration_dirty_memory_rate_bytes",
        "Memory that the guest dirties, per second.",
        |m| progress(m, "/progress/memory/dirty_rate"),
    ),
    (
        "kubevirt_vmi_migration_memory_transfer_rate_bytes",
        "Memory that is sent, per second.",
        |m| progress(m, "/progress/memory/rate"),
    ),
    (
        "godwit_vmi_migration_disk_transfer_rate_bytes",
        "Bytes of disk that become safe, per second.",
        |m| progress(m, "/progress/rate"),
    ),
    (
        "godwit_vmi_migration_dirty_disk_rate_bytes",
        "Bytes of disk that the guest dirties, per second.",
        |m| progress(m, "/progress/dirty_rate"),
    ),
    ("godwit_vmi_migration_eta_seconds", "Until the guest runs at the target.", |m| {
        progress(m, "/progress/eta_seconds")
    }),
    ("godwit_vmi_migration_predicted_downtime_seconds", "The pause, if it began now.", |m| {
        Some(progress(m, "/progress/predicted_downtime_ms")? / 1e3)
    }),
];

/// Of those that are over.
const OVER: [Of; 5] = [
    ("kubevirt_vmi_migration_succeeded", "Whether the migration succeeded.", |m| {
        (m.phase() == Phase::Succeeded).then_some(1.0)
    }),
    ("kubevirt_vmi_migration_failed", "Whether the migration failed.", |m| {
        (m.phase() == Phase::Failed).then_some(1.0)
    }),
    ("kubevirt_vmi_migration_end_time_seconds", "When it ended.", |m| {
        seconds(&state(m)?.end_timestamp)
    }),
    ("godwit_vmi_migration_downtime_seconds", "How long the guest stood still.", |m| {
        Some(progress(m, "/paused_ms")? / 1e3)
    }),
    ("godwit_vmi_migration_bytes_sent_again", "Bytes that a broken link had sent twice.", |m| {
        progress(m, "/progress/bytes_again")
    }),
];

/// Of all.
const ALL: [Of; 1] = [("kubevirt_vmi_migration_start_time_seconds", "When it began.", |m| {
    seconds(&state(m)?.start_timestamp)
})];

/// All of them.
pub fn metrics(migrations: &[Migration]) -> Vec<Metric> {
    let over = |m: &&Migration| m.is_over();
    let runs = |m: &&Migration| !m.is_over();
    let mut all = counts(migrations);
    all.extend(RUNNING.map(|of| one(of, migrations.iter().filter(runs))));
    all.extend(OVER.map(|of| one(of, migrations.iter().filter(over))));
    all.extend(ALL.map(|of| one(of, migrations.iter())));
    all
}

fn one<'a>((name, help, of): Of, migrations: impl Iterator<Item = &'a Migration>) -> Metric {
    let sample = |migration: &Migration| {
        let node = state(migration).and_then(|state| state.source_node.clone());
        let labels = vec![
            ("name", migration.spec.vmi_name.clone()),
            ("namespace", namespace(migration)),
            ("node", node.unwrap_or_default()),
            ("vmim", migration.name_any()),
        ];
        Some((labels, of(migration)?))
    };
    Metric { name, help, samples: migrations.filter_map(sample).collect() }
}

/// How many are in each phase: those of KubeVirt's names, and all.
fn counts(migrations: &[Migration]) -> Vec<Metric> {
    let known = [
        ("kubevirt_vmi_migrations_in_unset_phase", Phase::Unset),
        ("kubevirt_vmi_migrations_in_pending_phase", Phase::Pending),
        ("kubevirt_vmi_migrations_in_scheduling_phase", Phase::Scheduling),
        ("kubevirt_vmi_migrations_in_running_phase", Phase::Running),
    ];
    let count = |phase| migrations.iter().filter(|m| m.phase() == phase).count() as f64;
    let help = "Migrations in this phase.";
    let one =
        |(name, phase)| Metric { name, help, samples: Samples::from([(Vec::new(), count(phase))]) };
    let phases = Phase::ALL.into_iter().filter(|phase| *phase != Phase::Unset);
    let samples = phases.map(|phase| (vec![("phase", phase.to_string())], count(phase)));
    let all = Metric { name: "godwit_vmi_migrations", help, samples: samples.collect() };
    known.into_iter().map(one).chain([all]).collect()
}

fn state(migration: &Migration) -> Option<&api::migration::State> {
    migration.status.as_ref()?.migration_state.as_ref()
}

fn seconds(at: &Option<String>) -> Option<f64> {
    Some(at.as_deref()?.parse::<Timestamp>().ok()?.as_millisecond() as f64 / 1e3)
}

fn progress(migration: &Migration, pointer: &str) -> Option<f64> {
    migration.status.as_ref()?.progress.as_ref()?.pointer(pointer)?.as_f64()
}

/// Bytes of disk and of memory.
fn both(migration: &Migration, disk: &str, memory: &str) -> Option<f64> {
    Some(progress(migration, disk)? + progress(migration, memory).unwrap_or_default())
}

fn total(migration: &Migration) -> Option<f64> {
    both(migration, "/progress/bytes_total", "/progress/memory/total")
}

fn remaining(migration: &Migration) -> Option<f64> {
    both(migration, "/progress/bytes_left", "/progress/memory/left")
}

fn processed(migration: &Migration) -> Option<f64> {
    Some((total(migration)? - remaining(migration)?).max(0.0))
}

#[cfg(test)]
mod test {
    use super::*;
    use serde_json::{Value, json};

    #[test]
    fn a_migration_says_how_far_it_is_while_it_runs_and_how_it_went_afterwards() {
        let mut of = json!({
            "metadata": {"name": "move", "namespace": "a"}, "spec": {"vmiName": "web"},
            "status": {"phase": "Running", "migrationState": {
                "sourceNode": "n", "startTimestamp": "2026-01-01T00:00:00Z",
            }, "progress": {
                "progress": {
                    "bytes_total": 100, "bytes_left": 40, "bytes_again": 3,
                    "memory": {"total": 1000, "left": 300, "rate": 7},
                },
                "paused_ms": 50.0,
            }},
        });
        let labels = "name=\"web\",namespace=\"a\",node=\"n\",vmim=\"move\"";
        let says = |of: &Value, wanted: &[(&str, f64)]| {
            let migration: Migration = serde_json::from_value(of.clone()).unwrap();
            let mut text = String::new();
            metrics(&[migration]).iter().for_each(|metric| super::super::write(&mut text, metric));
            for (name, value) in wanted {
                let line = format!("{name}{{{labels}}} {value}");
                assert!(text.lines().any(|l| l == line), "{line} is not in {text}");
            }
            text
        };
        let text = says(
            &of,
            &[
                ("kubevirt_vmi_migration_data_total_bytes", 1100.0),
                ("kubevirt_vmi_migration_data_processed_bytes", 760.0),
                ("kubevirt_vmi_migration_data_remaining_bytes", 340.0),
                ("kubevirt_vmi_migration_memory_transfer_rate_bytes", 7.0),
                ("kubevirt_vmi_migration_start_time_seconds", 1_767_225_600.0),
            ],
        );
        assert!(text.contains("godwit_vmi_migrations{phase=\"Running\"} 1"), "{text}");
        of["status"]["phase"] = "Succeeded".into();
        let text = says(
            &of,
            &[
                ("kubevirt_vmi_migration_succeeded", 1.0),
                ("godwit_vmi_migration_downtime_seconds", 0.05),
                ("godwit_vmi_migration_bytes_sent_again", 3.0),
            ],
        );
        assert!(!text.contains("data_total_bytes{"), "{text}");
    }
}
