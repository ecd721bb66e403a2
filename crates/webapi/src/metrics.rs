//! Metrics of VMs, by KubeVirt's names where it has them. Pure.
//!
//! What objects there are, what handlers have measured, and how long the phases of VMIs took.

mod guests;
mod moves;
mod transitions;

use api::migration::VirtualMachineInstanceMigration;
use api::vm::VirtualMachine;
use api::vmi::VirtualMachineInstance;
use kube::ResourceExt;
use std::collections::BTreeMap;
use std::fmt::Write;

pub use guests::measured;
pub use transitions::Transitions;

/// A sample's labels and values.
type Samples = BTreeMap<Vec<(&'static str, String)>, f64>;

/// One metric.
struct Metric {
    name: &'static str,
    help: &'static str,
    samples: Samples,
}

/// All of them, in Prometheus' text format.
pub fn text(
    vms: &[VirtualMachine],
    vmis: &[VirtualMachineInstance],
    migrations: &[VirtualMachineInstanceMigration],
) -> String {
    let mut text = String::new();
    for metric in [number(vms), info(vms), phases(vmis), instances(vmis), memory(vmis)] {
        write(&mut text, &metric);
    }
    for metric in moves::metrics(migrations) {
        write(&mut text, &metric);
    }
    text
}

fn namespace(object: &impl ResourceExt) -> String {
    object.namespace().unwrap_or_default()
}

fn number(vms: &[VirtualMachine]) -> Metric {
    let mut samples = Samples::new();
    for vm in vms {
        *samples.entry(vec![("namespace", namespace(vm))]).or_default() += 1.0;
    }
    Metric { name: "kubevirt_number_of_vms", help: "VMs in each namespace.", samples }
}

fn info(vms: &[VirtualMachine]) -> Metric {
    let one = |vm: &VirtualMachine| {
        let status = vm.status.as_ref().map(|s| s.printable_status).unwrap_or_default();
        let labels = vec![
            ("name", vm.name_any()),
            ("namespace", namespace(vm)),
            ("status", format!("{status:?}").to_lowercase()),
        ];
        (labels, 1.0)
    };
    let samples = vms.iter().map(one).collect();
    Metric { name: "kubevirt_vm_info", help: "What each VM is.", samples }
}

fn node(vmi: &VirtualMachineInstance) -> String {
    vmi.status.as_ref().and_then(|status| status.node_name.clone()).unwrap_or_default()
}

fn phase(vmi: &VirtualMachineInstance) -> String {
    vmi.status.as_ref().map(|s| s.phase).unwrap_or_default().name().to_lowercase()
}

fn phases(vmis: &[VirtualMachineInstance]) -> Metric {
    let mut samples = Samples::new();
    for vmi in vmis {
        let labels = vec![("node", node(vmi)), ("phase", phase(vmi))];
        *samples.entry(labels).or_default() += 1.0;
    }
    Metric { name: "kubevirt_vmi_phase_count", help: "VMIs in each phase, by node.", samples }
}

fn instances(vmis: &[VirtualMachineInstance]) -> Metric {
    let one = |vmi: &VirtualMachineInstance| {
        let labels = vec![
            ("name", vmi.name_any()),
            ("namespace", namespace(vmi)),
            ("node", node(vmi)),
            ("phase", phase(vmi)),
        ];
        (labels, 1.0)
    };
    let samples = vmis.iter().map(one).collect();
    Metric { name: "kubevirt_vmi_info", help: "What each VMI is.", samples }
}

fn memory(vmis: &[VirtualMachineInstance]) -> Metric {
    let one = |vmi: &VirtualMachineInstance| {
        let memory = vmi.status.as_ref()?.memory.as_ref()?.guest_current.as_ref()?;
        let labels = vec![("name", vmi.name_any()), ("namespace", namespace(vmi))];
        // Sizes of guests are far below what a double counts exactly.
        Some((labels, api::quantity::bytes(&memory.0)? as f64))
    };
    let samples = vmis.iter().filter_map(one).collect();
    Metric { name: "kubevirt_vmi_memory_domain_bytes", help: "Memory of each guest.", samples }
}

fn write(text: &mut String, metric: &Metric) {
    let Metric { name, help, samples } = metric;
    // A string takes all that is written to it.
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} gauge");
    for (labels, value) in samples {
        line(text, name, labels.iter().map(|(name, value)| (*name, &**value)), *value);
    }
}

/// One sample.
fn line<'a>(
    text: &mut String,
    name: &str,
    labels: impl IntoIterator<Item = (&'a str, &'a str)>,
    value: f64,
) {
    let labels = labels.into_iter().map(|(name, value)| format!("{name}=\"{}\"", escape(value)));
    let labels: Vec<String> = labels.collect();
    let labels = match labels.is_empty() {
        true => String::new(),
        false => format!("{{{}}}", labels.join(",")),
    };
    let _ = writeln!(text, "{name}{labels} {value}");
}

fn escape(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn vms_are_counted_by_namespace_and_phase() {
        let vm = |name: &str| -> VirtualMachine {
            serde_json::from_value(serde_json::json!({
                "metadata": {"name": name, "namespace": "a"}, "spec": {},
                "status": {"printableStatus": "Running"},
            }))
            .unwrap()
        };
        let text = text(&[vm("one"), vm("t\"wo")], &[], &[]);
        for line in [
            "kubevirt_number_of_vms{namespace=\"a\"} 2",
            "kubevirt_vm_info{name=\"t\\\"wo\",namespace=\"a\",status=\"running\"} 1",
            "kubevirt_vmi_migrations_in_running_phase 0",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in {text}");
        }
    }
}
