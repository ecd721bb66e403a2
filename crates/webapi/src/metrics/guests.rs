//! What handlers have measured of guests.

use super::line;
use crate::{Measured, Sample};
use std::collections::BTreeMap;
use std::fmt::Write;

/// What is shown: the metric without its prefix, and what it says. What ends in `_total` only grows.
const KNOWN: [(&str, &str); 22] = [
    ("cpu_usage_seconds_total", "CPU time of QEMU, in seconds."),
    ("cpu_user_usage_seconds_total", "CPU time of QEMU in user mode, in seconds."),
    ("cpu_system_usage_seconds_total", "CPU time of QEMU in the host's kernel, in seconds."),
    ("memory_resident_bytes", "The host's memory that QEMU has."),
    ("vcpu_seconds_total", "CPU time of each vCPU, in seconds."),
    ("vcpu_delay_seconds_total", "Time that each vCPU waited for a CPU of the host, in seconds."),
    ("storage_iops_read_total", "Reads of each disk."),
    ("storage_iops_write_total", "Writes of each disk."),
    ("storage_read_traffic_bytes_total", "Bytes read from each disk."),
    ("storage_write_traffic_bytes_total", "Bytes written to each disk."),
    ("storage_read_times_seconds_total", "Time that reads took, in seconds."),
    ("storage_write_times_seconds_total", "Time that writes took, in seconds."),
    ("storage_flush_requests_total", "Flushes of each disk."),
    ("storage_flush_times_seconds_total", "Time that flushes took, in seconds."),
    ("network_receive_bytes_total", "Bytes that the guest received."),
    ("network_receive_packets_total", "Packets that the guest received."),
    ("network_receive_errors_total", "Errors while packets went to the guest."),
    ("network_receive_packets_dropped_total", "Packets to the guest that were dropped."),
    ("network_transmit_bytes_total", "Bytes that the guest sent."),
    ("network_transmit_packets_total", "Packets that the guest sent."),
    ("network_transmit_errors_total", "Errors while packets came from the guest."),
    ("network_transmit_packets_dropped_total", "Packets from the guest that were dropped."),
];
const PREFIX: &str = "kubevirt_vmi_";

/// Writes them, in Prometheus' text format. What is not known is of another version, and left out.
pub fn measured(text: &mut String, measured: &Measured) {
    let up = "kubevirt_virt_handler_up";
    let _ = writeln!(text, "# HELP {up} Handlers that answer.\n# TYPE {up} gauge");
    line(text, up, [], f64::from(measured.handlers));
    let mut all = BTreeMap::<&str, Vec<&Sample>>::new();
    for sample in &measured.samples {
        all.entry(&sample.name).or_default().push(sample);
    }
    for (name, help) in KNOWN {
        let name = format!("{PREFIX}{name}");
        let Some(samples) = all.get(&*name) else { continue };
        let kind = if name.ends_with("_total") { "counter" } else { "gauge" };
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for sample in samples {
            let labels = sample.labels.iter().filter(|(name, _)| is_label(name));
            line(text, &name, labels.map(|(name, value)| (&**name, &**value)), sample.value);
        }
    }
}

fn is_label(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_')
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn what_is_measured_is_shown_by_its_kind_and_nothing_else_is() {
        let sample = |name: &str, label: &str| Sample {
            name: name.into(),
            labels: BTreeMap::from([(label.into(), "a\"\n".into())]),
            value: 2.5,
        };
        let samples = vec![
            sample("kubevirt_vmi_cpu_usage_seconds_total", "name"),
            sample("kubevirt_vmi_memory_resident_bytes", "x} 1\nevil"),
            sample("evil 1\n", "name"),
        ];
        let mut text = String::new();
        measured(&mut text, &Measured { handlers: 1, samples });
        let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with("# HELP")).collect();
        assert_eq!(
            lines,
            [
                "# TYPE kubevirt_virt_handler_up gauge",
                "kubevirt_virt_handler_up 1",
                "# TYPE kubevirt_vmi_cpu_usage_seconds_total counter",
                "kubevirt_vmi_cpu_usage_seconds_total{name=\"a\\\"\\n\"} 2.5",
                "# TYPE kubevirt_vmi_memory_resident_bytes gauge",
                "kubevirt_vmi_memory_resident_bytes 2.5",
            ]
        );
    }
}
