//! On which nodes a guest finds the processor that it has. Pure.

use crate::keys;
use crate::kubevirt::Configuration;
use crate::vmi::VirtualMachineInstance;
use std::collections::BTreeMap;

type Labels = BTreeMap<String, String>;

/// What the target's node must have for a guest of a VMI: its machine type, as it got it, and its
/// processor. `source`: the labels of the node on which the guest is.
pub fn wanted_for(
    vmi: &VirtualMachineInstance,
    settings: &Configuration,
    source: Option<&Labels>,
) -> Labels {
    let spec = vmi.parse().unwrap_or_default();
    let model = spec.domain.cpu.model.or_else(|| settings.cpu_model.clone());
    let none = Labels::new();
    let emulated = settings.developer_configuration.use_emulation;
    let mut wanted = wanted(model.as_deref(), emulated, source.unwrap_or(&none));
    let machine = vmi.status.as_ref().and_then(|status| status.machine.as_ref());
    // All have the short names, and take them for different machines.
    if let Some(machine) = machine.filter(|machine| machine.kind.contains('-')) {
        wanted.insert(format!("{}{}", keys::MACHINE, machine.kind), "true".into());
    }
    wanted
}

/// What the target's node must have, by the guest's model, whether that is emulated, and the labels
/// of the node on which the guest is.
fn wanted(model: Option<&str>, is_emulated: bool, source: &Labels) -> Labels {
    if is_emulated {
        // QEMU emulates all that it has a name for, whatever the node's processor is.
        return Labels::new();
    }
    let alike = |prefix: &str| {
        let of = source.iter().filter(|(name, _)| name.starts_with(prefix));
        of.map(|(name, value)| (name.clone(), value.clone())).collect::<Labels>()
    };
    match model {
        // The guest has what its node has.
        None | Some("host-model" | "host-passthrough") => {
            let mut wanted = alike("cpu-vendor.node.kubevirt.io/");
            wanted.extend(alike("cpu-feature.node.kubevirt.io/"));
            wanted
        }
        Some(model) => {
            Labels::from([(format!("cpu-model.node.kubevirt.io/{model}"), "true".into())])
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    fn node(features: &[&str]) -> Labels {
        let label = |name: &&str| (format!("cpu-feature.node.kubevirt.io/{name}"), "true".into());
        let mut labels: Labels = features.iter().map(label).collect();
        for other in ["cpu-vendor.node.kubevirt.io/Intel", "cpu-model.node.kubevirt.io/Haswell"] {
            labels.insert(other.into(), "true".into());
        }
        // Which is nobody else's.
        labels.insert("kubernetes.io/hostname".into(), features.join("-"));
        labels
    }

    fn fits(wanted: &Labels, node: &Labels) -> bool {
        wanted.iter().all(|(name, value)| node.get(name) == Some(value))
    }

    #[test]
    fn a_guest_with_its_nodes_processor_goes_where_nothing_of_it_is_lacking() {
        let (small, large) = (node(&["sse2"]), node(&["sse2", "avx"]));
        for model in [None, Some("host-model"), Some("host-passthrough")] {
            let of_small = wanted(model, false, &small);
            assert!(fits(&of_small, &large), "to a node that has more");
            assert!(fits(&of_small, &small), "and back");
            let of_large = wanted(model, false, &large);
            assert!(!fits(&of_large, &small), "not where it would miss something");
        }
        let mut other = large.clone();
        other.remove("cpu-vendor.node.kubevirt.io/Intel");
        assert!(!fits(&wanted(None, false, &small), &other), "not to another vendor's");
    }

    #[test]
    fn a_named_model_goes_where_it_is_known_and_an_emulated_one_anywhere() {
        let node = node(&["sse2"]);
        assert!(fits(&wanted(Some("Haswell"), false, &Labels::new()), &node));
        assert!(!fits(&wanted(Some("Cascadelake"), false, &node), &node));
        assert!(wanted(Some("Cascadelake"), true, &node).is_empty());
    }
}
