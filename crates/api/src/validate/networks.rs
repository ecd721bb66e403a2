//! Network cards and networks.

use super::{Report, one_of};
use crate::vmi::{Interface, Spec};
use std::collections::BTreeSet;

pub fn check(report: &mut Report, field: &str, spec: &Spec) {
    let networks = format!("{field}.networks");
    report.unique(&networks, "network", spec.networks.iter().map(|network| &*network.name));
    let interfaces = &spec.domain.devices.interfaces;
    for (index, network) in spec.networks.iter().enumerate() {
        let at = format!("{networks}[{index}]");
        one_of(
            report,
            &at,
            &[("pod", network.pod.is_some()), ("multus", network.multus.is_some())],
        );
        if let Some(multus) = &network.multus {
            let name = &multus.network_name;
            let bridge = name.rsplit('/').next().unwrap_or_default();
            let plain = bridge.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
            report.demand(
                (1..16).contains(&bridge.len()) && plain,
                &format!("{at}.multus.networkName"),
                || format!("'{name}' must be the name of a Linux bridge of the nodes"),
            );
        }
        let used = interfaces.iter().any(|interface| interface.name == network.name);
        report.demand(used, &format!("{at}.name"), || {
            format!("no interface is named '{}'", network.name)
        });
    }
    let pods = spec.networks.iter().filter(|network| network.pod.is_some()).count();
    report.demand(pods <= 1, &networks, || "there is one pod network only".into());
    let at = format!("{field}.domain.devices.interfaces");
    report.unique(&at, "interface", interfaces.iter().map(|interface| &*interface.name));
    let mut addresses = BTreeSet::new();
    for (index, interface) in interfaces.iter().enumerate() {
        let at = format!("{at}[{index}]");
        self::interface(report, &at, spec, interface);
        if let Some(mac) = &interface.mac_address {
            report.demand(is_mac(mac), &format!("{at}.macAddress"), || {
                format!("'{mac}' is no unicast MAC address: say 02:00:00:00:00:01")
            });
            let new = addresses.insert(mac.to_lowercase().replace('-', ":"));
            report.demand(new, &format!("{at}.macAddress"), || {
                format!("another interface has the MAC address {mac}")
            });
        }
    }
}

fn interface(report: &mut Report, at: &str, spec: &Spec, interface: &Interface) {
    let network = spec.networks.iter().find(|network| network.name == interface.name);
    report.demand(network.is_some(), &format!("{at}.name"), || {
        format!("no network is named '{}'", interface.name)
    });
    let (masquerade, bridge) = (interface.masquerade.is_some(), interface.bridge.is_some());
    if masquerade && bridge {
        report.fault(at, "say one only: masquerade or bridge");
    }
    if let Some(network) = network {
        let pod = network.pod.is_some();
        report.demand(!masquerade || pod, &format!("{at}.masquerade"), || {
            "masquerade is for the pod network: use bridge".into()
        });
        report.demand(!bridge || !pod, &format!("{at}.bridge"), || {
            "the pod network cannot be bridged, since its address would not move along: use \
             masquerade"
                .into()
        });
    }
    let model = interface.model.as_deref().unwrap_or("virtio");
    report.demand(model == "virtio", &format!("{at}.model"), || {
        format!("'{model}' is not built: say virtio")
    });
    let mut names = BTreeSet::new();
    for (index, port) in interface.ports.iter().enumerate() {
        let at = format!("{at}.ports[{index}]");
        report.demand(port.port > 0, &format!("{at}.port"), || "must be 1 to 65535".into());
        let protocol = port.protocol.as_deref().unwrap_or("TCP");
        report.demand(["TCP", "UDP"].contains(&protocol), &format!("{at}.protocol"), || {
            format!("'{protocol}' is not known: say TCP or UDP")
        });
        if let Some(name) = port.name.as_deref().filter(|name| !name.is_empty()) {
            report.demand(names.insert(name), &format!("{at}.name"), || {
                format!("another port is named '{name}'")
            });
        }
    }
}

fn is_mac(text: &str) -> bool {
    let parts: Vec<&str> = text.split([':', '-']).collect();
    let byte = |part: &&str| {
        u8::from_str_radix(part, 16).ok().filter(|_| part.len() == 2 && !part.starts_with('+'))
    };
    let bytes: Vec<u8> = parts.iter().filter_map(byte).collect();
    parts.len() == 6 && bytes.len() == 6 && bytes[0] & 1 == 0
}
