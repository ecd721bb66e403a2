//! How long VMIs and migrations took to come to their phases.

use super::line;
use api::conditions::Transition;
use api::migration::VirtualMachineInstanceMigration as Migration;
use api::vmi::VirtualMachineInstance;
use jiff::Timestamp;
use kube::ResourceExt;
use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;

/// Upper ends of buckets, in seconds.
const BUCKETS: [f64; 16] = [
    0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 90.0, 120.0, 180.0, 300.0, 600.0,
    1200.0,
];

type Labels = Vec<(&'static str, String)>;

/// Histograms, of all objects that were there when it was looked. One that came and went between two
/// looks is in none.
#[derive(Debug, Default)]
pub struct Transitions {
    /// How many transitions of each object are counted, by its uid.
    counted: HashMap<String, usize>,
    all: BTreeMap<(&'static str, Labels), Histogram>,
}

#[derive(Debug, Default)]
struct Histogram {
    buckets: [u64; BUCKETS.len()],
    count: u64,
    sum: f64,
}

impl Transitions {
    /// Counts what is new; `vmis` and `migrations` are all that there are.
    pub fn observe(&mut self, vmis: &[VirtualMachineInstance], migrations: &[Migration]) {
        let mut counted = HashMap::new();
        for vmi in vmis {
            let uid = vmi.uid().unwrap_or_default();
            let before = self.counted.get(&uid).copied().unwrap_or_default();
            counted.insert(uid, self.count(vmi, before));
        }
        for migration in migrations {
            let uid = migration.uid().unwrap_or_default();
            let before = self.counted.get(&uid).copied().unwrap_or_default();
            counted.insert(uid, self.count_migration(migration, before));
        }
        self.counted = counted;
    }

    fn count_migration(&mut self, migration: &Migration, before: usize) -> usize {
        let all = migration.status.iter().flat_map(|status| &status.phase_transition_timestamps);
        let all = moments(all, ToString::to_string);
        let created = migration.creation_timestamp();
        for (phase, at) in all.iter().skip(before) {
            let name = "kubevirt_vmi_migration_phase_transition_time_from_creation_seconds";
            let from = created.as_ref().map_or(*at, |created| created.0);
            self.add(name, vec![("phase", phase.clone())], from, *at);
        }
        all.len()
    }

    /// Counts what is new of a VMI. Returns how many of its transitions are counted then.
    fn count(&mut self, vmi: &VirtualMachineInstance, before: usize) -> usize {
        let all = vmi.status.iter().flat_map(|status| &status.phase_transition_timestamps);
        let all = moments(all, |phase| phase.name().to_owned());
        let (created, deleted) =
            (vmi.creation_timestamp(), vmi.metadata.deletion_timestamp.clone());
        for (index, (phase, at)) in all.iter().enumerate().skip(before) {
            let of_phase = || vec![("phase", phase.clone())];
            if let Some(last) = index.checked_sub(1).and_then(|last| all.get(last)) {
                let labels = vec![("phase", phase.clone()), ("last_phase", last.0.clone())];
                self.add("kubevirt_vmi_phase_transition_time_seconds", labels, last.1, *at);
            }
            if let Some(created) = &created {
                let name = "kubevirt_vmi_phase_transition_time_from_creation_seconds";
                self.add(name, of_phase(), created.0, *at);
            }
            if let Some(deleted) = deleted.as_ref().filter(|deleted| deleted.0 <= *at) {
                let name = "kubevirt_vmi_phase_transition_time_from_deletion_seconds";
                self.add(name, of_phase(), deleted.0, *at);
            }
        }
        all.len()
    }

    fn add(&mut self, name: &'static str, labels: Labels, from: Timestamp, to: Timestamp) {
        // A clock that was set back makes no time less than none.
        let seconds = to.duration_since(from).as_secs_f64().max(0.0);
        let histogram = self.all.entry((name, labels)).or_default();
        for (bucket, end) in histogram.buckets.iter_mut().zip(BUCKETS) {
            *bucket += u64::from(seconds <= end);
        }
        histogram.count += 1;
        histogram.sum += seconds;
    }

    /// Writes them, in Prometheus' text format.
    pub fn write(&self, text: &mut String) {
        let mut last = "";
        for ((name, labels), histogram) in &self.all {
            if last != *name {
                let help = "Seconds that it took to come into a phase.";
                let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} histogram");
                last = name;
            }
            let labels: Vec<(&str, &str)> =
                labels.iter().map(|(n, value)| (*n, &**value)).collect();
            let Histogram { buckets, count, sum } = histogram;
            let ends = BUCKETS.iter().map(f64::to_string).chain(["+Inf".to_owned()]);
            for (end, value) in ends.zip(buckets.iter().chain([count])) {
                let labels = labels.iter().copied().chain([("le", &*end)]);
                line(text, &format!("{name}_bucket"), labels, *value as f64);
            }
            line(text, &format!("{name}_sum"), labels.iter().copied(), *sum);
            line(text, &format!("{name}_count"), labels.iter().copied(), *count as f64);
        }
    }
}

/// Phases by their names, and when they were come to.
fn moments<'a, P: 'a>(
    all: impl Iterator<Item = &'a Transition<P>>,
    name: impl Fn(&P) -> String,
) -> Vec<(String, Timestamp)> {
    all.filter_map(|it| Some((name(&it.phase), it.at()?))).collect()
}

#[cfg(test)]
mod test {
    use super::*;
    use serde_json::json;

    fn vmi(uid: &str, transitions: &[(&str, &str)]) -> VirtualMachineInstance {
        let transitions: Vec<_> = transitions
            .iter()
            .map(|(phase, second)| {
                let at = format!("2026-01-01T00:00:{second}Z");
                json!({"phase": phase, "phaseTransitionTimestamp": at})
            })
            .collect();
        serde_json::from_value(json!({
            "metadata": {"name": "a", "uid": uid, "creationTimestamp": "2026-01-01T00:00:00Z"},
            "spec": {}, "status": {"phaseTransitionTimestamps": transitions},
        }))
        .unwrap()
    }

    #[test]
    fn each_transition_counts_once_and_stays_when_its_vmi_is_gone() {
        let mut transitions = Transitions::default();
        let begun = vmi("1", &[("Pending", "00"), ("Scheduling", "03")]);
        let runs = vmi("1", &[("Pending", "00"), ("Scheduling", "03"), ("Running", "13")]);
        let runs = [runs];
        for vmis in [&[][..], &[begun], &runs, &runs, &[]] {
            transitions.observe(vmis, &[]);
        }
        transitions.observe(&[vmi("2", &[("Pending", "01"), ("Scheduling", "02")])], &[]);
        let mut text = String::new();
        transitions.write(&mut text);
        let name = "kubevirt_vmi_phase_transition_time";
        for wanted in [
            format!("{name}_seconds_count{{phase=\"Scheduling\",last_phase=\"Pending\"}} 2"),
            format!("{name}_seconds_sum{{phase=\"Scheduling\",last_phase=\"Pending\"}} 4"),
            format!("{name}_seconds_count{{phase=\"Running\",last_phase=\"Scheduling\"}} 1"),
            format!(
                "{name}_seconds_bucket{{phase=\"Scheduling\",last_phase=\"Pending\",le=\"2\"}} 1"
            ),
            format!(
                "{name}_seconds_bucket{{phase=\"Running\",last_phase=\"Scheduling\",le=\"+Inf\"}} 1"
            ),
            format!("{name}_from_creation_seconds_sum{{phase=\"Running\"}} 13"),
        ] {
            assert!(text.lines().any(|line| line == wanted), "{wanted} is not in {text}");
        }
    }
}
