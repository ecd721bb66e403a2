//! What the guests of a node have used, by KubeVirt's names: only what is known here, of which a
//! guest that says nothing hides nothing.

use super::{Shared, doors, guests, network};
use api::vmi::{Spec, VirtualMachineInstance};
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use kube::runtime::reflector::ObjectRef;
use launcher::client::Client as Launcher;
use launcher::usage::Usage;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::timeout;

/// A guest whose QEMU does not answer is left out: the others are wanted now.
const PATIENCE: Duration = Duration::from_secs(2);

/// A number, and of what it is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// The metric.
    pub name: String,
    /// The labels.
    pub labels: BTreeMap<String, String>,
    /// The value.
    pub value: f64,
}

/// Measures all guests that are here.
pub async fn all(shared: &Shared) -> Vec<Sample> {
    let mut tasks = JoinSet::new();
    for pod in shared.pods.state() {
        let Some((namespace, name)) = guests::owner(&pod) else { continue };
        let vmi = shared.vmis.get(&ObjectRef::new(&name).within(&namespace));
        if let Some(vmi) = vmi.filter(|_| guests::launches(&pod)) {
            let shared = shared.clone();
            tasks.spawn(async move {
                timeout(PATIENCE, guest(&shared, &vmi, &pod)).await.ok().flatten()
            });
        }
    }
    tasks.join_all().await.into_iter().flatten().flatten().collect()
}

/// None: there is none in this pod, or its launcher does not tell.
async fn guest(shared: &Shared, vmi: &VirtualMachineInstance, pod: &Pod) -> Option<Vec<Sample>> {
    let folder = doors::folder(&shared.config.pods(), pod);
    let (namespace, name) = guests::key(vmi);
    let launcher = Launcher::new(&folder, &api::owner::vm_id(&namespace, &name));
    let usage = launcher.usage().await.ok()?;
    let vm = launcher.spec().await.ok()??;
    let spec = vmi.parse().ok()?;
    let labels = BTreeMap::from([
        ("node".to_owned(), shared.config.node.clone()),
        ("namespace".to_owned(), namespace),
        ("name".to_owned(), vmi.name_any()),
    ]);
    // A launcher's disks are a VMI's, in their order.
    let volumes = spec.domain.devices.disks.iter().map(|disk| disk.name.clone());
    let drives = vm.disks.into_iter().map(|disk| disk.name).zip(volumes).collect();
    let mut samples = Samples { labels, all: Vec::new() };
    samples.machine(&usage, &drives);
    samples.cards(&spec, &folder);
    Some(samples.all)
}

struct Samples {
    labels: BTreeMap<String, String>,
    all: Vec<Sample>,
}

impl Samples {
    fn add(&mut self, name: &str, more: &[(&str, &str)], value: f64) {
        let mut labels = self.labels.clone();
        labels.extend(more.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        self.all.push(Sample { name: format!("kubevirt_vmi_{name}"), labels, value });
    }

    /// Of QEMU. `drives`: the volumes of a launcher's disks.
    fn machine(&mut self, usage: &Usage, drives: &BTreeMap<String, String>) {
        self.add("cpu_usage_seconds_total", &[], usage.user + usage.system);
        self.add("cpu_user_usage_seconds_total", &[], usage.user);
        self.add("cpu_system_usage_seconds_total", &[], usage.system);
        self.add("memory_resident_bytes", &[], usage.resident as f64);
        for vcpu in &usage.vcpus {
            let id = vcpu.id.to_string();
            self.add("vcpu_seconds_total", &[("id", &id), ("state", "running")], vcpu.used);
            self.add("vcpu_delay_seconds_total", &[("id", &id)], vcpu.delayed);
        }
        for disk in &usage.disks {
            let drive = drives.get(&disk.name).unwrap_or(&disk.name);
            let mut add = |name: &str, value: f64| {
                self.add(&format!("storage_{name}"), &[("drive", drive)], value);
            };
            add("iops_read_total", disk.reads as f64);
            add("iops_write_total", disk.writes as f64);
            add("read_traffic_bytes_total", disk.read_bytes as f64);
            add("write_traffic_bytes_total", disk.write_bytes as f64);
            add("read_times_seconds_total", disk.read_time);
            add("write_times_seconds_total", disk.write_time);
            add("flush_requests_total", disk.flushes as f64);
            add("flush_times_seconds_total", disk.flush_time);
        }
    }

    /// Of the network cards that have taps. What the host receives there, the guest has sent.
    fn cards(&mut self, spec: &Spec, folder: &Path) {
        for interface in &spec.domain.devices.interfaces {
            let counters = Path::new("/sys/class/net")
                .join(network::tap(folder, interface))
                .join("statistics");
            let read = |counter: &str| -> Option<f64> {
                std::fs::read_to_string(counters.join(counter)).ok()?.trim().parse().ok()
            };
            for (host, guest) in [("tx", "receive"), ("rx", "transmit")] {
                for (file, name) in [
                    ("bytes", "bytes_total"),
                    ("packets", "packets_total"),
                    ("errors", "errors_total"),
                    ("dropped", "packets_dropped_total"),
                ] {
                    if let Some(value) = read(&format!("{host}_{file}")) {
                        let name = format!("network_{guest}_{name}");
                        self.add(&name, &[("interface", &interface.name)], value);
                    }
                }
            }
        }
    }
}
