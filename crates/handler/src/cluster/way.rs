//! Where the gateway listens: on the network that the cluster's settings name for migrations.

use super::Shared;
use channel::gateway::{Error, Gateway};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;
use tokio::process::Command;
use tokio::sync::watch;

/// What could not be done is tried again after this, and an interface's address looked at: else the
/// settings ring.
const AGAIN: Duration = Duration::from_secs(10);
/// `ip` answers at once.
const PATIENCE: Duration = Duration::from_secs(5);

/// Opens the gateway; tells where others reach it, if they can.
///
/// # Errors
/// Those of `open`.
pub async fn open(
    shared: &Shared,
    open: impl Fn(SocketAddr) -> Result<Gateway, Error>,
) -> Result<(Gateway, Option<SocketAddr>), Error> {
    let config = &shared.config;
    let found = place(shared).await;
    // One that nobody reaches is there for the guests of this node all the same.
    let ip = found.as_ref().map_or(config.listen.ip(), |ip| *ip);
    // A move that is under way finds the gateway again where it was.
    let before = last_port(shared, ip).and_then(|port| open(SocketAddr::new(ip, port)).ok());
    let anew = || open(SocketAddr::new(ip, config.listen.port()));
    let gateway = before.map_or_else(anew, Ok)?;
    remember(shared, gateway.local_addr());
    let reached = found.is_ok().then(|| gateway.local_addr());
    Ok((gateway, reached))
}

/// Goes where the settings say, whenever they say something else; tells where others reach it. Never
/// ends by itself.
pub async fn follow(
    shared: Shared,
    gateway: Arc<Gateway>,
    reached: watch::Sender<Option<SocketAddr>>,
) {
    let mut told = String::new();
    loop {
        let now = match place(&shared).await {
            Ok(ip) if ip == gateway.local_addr().ip() => Ok(gateway.local_addr()),
            Ok(ip) => relocate(&shared, &gateway, ip),
            Err(why) => Err(why),
        };
        let why = now.as_ref().err().cloned().unwrap_or_default();
        if !why.is_empty() && why != told {
            let node = &shared.config.node;
            tracing::warn!(node, why, "no guest can move from here or to here");
        }
        told = why;
        reached.send_if_modified(|before| std::mem::replace(before, now.clone().ok()) != now.ok());
        let _ = tokio::time::timeout(AGAIN, shared.settings_bell.notified()).await;
    }
}

fn relocate(shared: &Shared, gateway: &Gateway, ip: IpAddr) -> Result<SocketAddr, String> {
    let before = last_port(shared, ip).map(|port| SocketAddr::new(ip, port));
    let before = before.and_then(|listen| gateway.relocate(listen).ok());
    let anew = || gateway.relocate(SocketAddr::new(ip, shared.config.listen.port()));
    let address = before.map_or_else(anew, Ok).map_err(|error| launcher::chain(&error))?;
    remember(shared, address);
    // Launchers are told where they are reached now.
    shared.pods_bell.notify_one();
    Ok(address)
}

/// The node's address in the network for migrations, or in the cluster's where there is none.
async fn place(shared: &Shared) -> Result<IpAddr, String> {
    let settings = shared.cluster();
    let named = settings.and_then(|s| s.spec.configuration.migrations.network.clone());
    let Some(network) = named.filter(|name| !name.is_empty()) else {
        return Ok(shared.config.listen.ip());
    };
    let own = shared.config.networks.get(&network).ok_or_else(|| {
        format!("this node has no address in migration network {network}: name it where the handler is run")
    })?;
    let why = |why| format!("migration network {network}: {why}");
    address_of(own).await.map_err(why)
}

/// An address, as it is said: by itself, or by the interface that has it.
///
/// # Errors
/// For people.
pub async fn address_of(own: &str) -> Result<IpAddr, String> {
    match own.parse() {
        Ok(ip) => Ok(ip),
        Err(_) => of_interface(own).await.ok_or_else(|| format!("interface {own} has no address")),
    }
}

/// The first address of an interface that reaches further than it.
async fn of_interface(name: &str) -> Option<IpAddr> {
    let ip = Command::new("ip")
        .args(["-json", "address", "show", "scope", "global", "dev", name])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(PATIENCE, ip).await.ok()?.ok()?;
    let found: serde_json::Value = serde_json::from_slice(&output.stdout).ok()?;
    found[0]["addr_info"][0]["local"].as_str()?.parse().ok()
}

/// File in the handler's folder: the port that its gateway had at an address.
fn port_file(shared: &Shared, ip: IpAddr) -> PathBuf {
    shared.config.folder.join(format!("gateway-{ip}.port"))
}

/// The port that the gateway had there before, if any free one will do.
fn last_port(shared: &Shared, ip: IpAddr) -> Option<u16> {
    let port = std::fs::read_to_string(port_file(shared, ip)).ok()?.trim().parse().ok()?;
    (shared.config.listen.port() == 0).then_some(port)
}

fn remember(shared: &Shared, address: SocketAddr) {
    let written = std::fs::write(port_file(shared, address.ip()), address.port().to_string());
    if let Err(error) = written {
        tracing::warn!(%error, "after a restart moves will not find the gateway where it is");
    }
}
