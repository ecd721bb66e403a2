//! Network cards on Linux bridges of the node: each by a tap device of its own.
//!
//! The taps of a pod are written down in its folder before they are made, and go with it.

use api::vmi::{Interface, Spec};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;
use tokio::process::Command;

/// The names of a pod's taps, one a line.
const TAPS: &str = "taps";
/// `ip` answers at once.
const PATIENCE: Duration = Duration::from_secs(10);

/// The bridge of an interface, if it has one.
fn bridge<'a>(spec: &'a Spec, interface: &Interface) -> Option<&'a str> {
    interface.bridge.as_ref()?;
    let network = spec.networks.iter().find(|network| network.name == interface.name)?;
    let name = &network.multus.as_ref()?.network_name;
    // A network's namespace means nothing to a node.
    name.rsplit('/').next()
}

/// The tap of a card of the pod with this folder, by a name that no other of the node has:
/// interfaces' names have at most 15 bytes.
pub fn tap(folder: &Path, interface: &Interface) -> String {
    let pod = folder.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let name = format!("{pod} {}", interface.name);
    let hash = uuid::Uuid::new_v5(&uuid::Uuid::NAMESPACE_OID, name.as_bytes()).simple().to_string();
    format!("gw{}", &hash[..12])
}

/// Makes the taps of a VMI whose pod has this folder. What is there already is let be.
///
/// # Errors
/// For people.
pub async fn prepare(spec: &Spec, folder: &Path) -> Result<BTreeMap<String, String>, String> {
    let mut taps = BTreeMap::new();
    for interface in &spec.domain.devices.interfaces {
        let Some(bridge) = bridge(spec, interface) else { continue };
        let tap = tap(folder, interface);
        if !Path::new("/sys/class/net").join(bridge).join("bridge").exists() {
            return Err(format!(
                "network {}: this node has no Linux bridge {bridge}; make it (`ip link add {bridge} \
                 type bridge`), or name another",
                interface.name
            ));
        }
        if !Path::new("/sys/class/net").join(&tap).exists() {
            let noted = std::fs::File::options().create(true).append(true).open(folder.join(TAPS));
            noted.and_then(|mut file| writeln!(file, "{tap}")).map_err(|e| e.to_string())?;
            ip(&["tuntap", "add", "dev", &tap, "mode", "tap"]).await?;
        }
        ip(&["link", "set", "dev", &tap, "master", bridge, "up"]).await?;
        taps.insert(interface.name.clone(), tap);
    }
    Ok(taps)
}

/// Removes the taps of a pod that is gone.
pub async fn remove(folder: &Path) {
    let names = std::fs::read_to_string(folder.join(TAPS)).unwrap_or_default();
    for tap in names.lines().filter(|name| name.starts_with("gw")) {
        if Path::new("/sys/class/net").join(tap).exists()
            && let Err(why) = ip(&["link", "del", "dev", tap]).await
        {
            tracing::warn!(tap, why, "a tap cannot be removed");
        }
    }
}

async fn ip(arguments: &[&str]) -> Result<(), String> {
    let run = Command::new("ip").args(arguments).stdin(Stdio::null()).kill_on_drop(true).output();
    let what = arguments.join(" ");
    match tokio::time::timeout(PATIENCE, run).await {
        Ok(Ok(output)) if output.status.success() => Ok(()),
        Ok(Ok(output)) => Err(format!(
            "`ip {what}` failed: {}; bridges need root",
            String::from_utf8_lossy(&output.stderr).trim()
        )),
        Ok(Err(error)) => Err(format!("`ip {what}` cannot be run: {error}; install iproute2")),
        Err(_) => Err(format!("`ip {what}` does not end")),
    }
}
