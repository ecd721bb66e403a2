//! Where a synchronizer listens.

use crate::{Advertise, Config};
use api::kubevirt::SYNCHRONIZATION_PORT;
use k8s_openapi::api::core::v1::Service;
use std::net::{IpAddr, SocketAddr};
use tokio::net::TcpListener;

/// Where it listens.
pub struct Place {
    pub listener: TcpListener,
    pub bound: SocketAddr,
}

/// What the settings want of a synchronizer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// At this port, if they name one.
    pub port: Option<u16>,
    /// In this network for migrations, if they name one.
    pub network: Option<String>,
}

/// The address at which it listens: in the network for migrations, if it has one there.
fn address(config: &Config, wanted: &Wanted) -> IpAddr {
    let Some(network) = wanted.network.as_ref().filter(|name| !name.is_empty()) else {
        return config.address;
    };
    config.networks.get(network).copied().unwrap_or_else(|| {
        tracing::warn!(
            network,
            "the synchronizer has no address in the migration network: name it where it is run"
        );
        config.address
    })
}

/// Takes the port that settings name, or the usual one; where that may be another, the one that it had
/// last, or any that is free.
///
/// # Errors
/// For people.
pub async fn take(config: &Config, wanted: &Wanted) -> Result<Place, String> {
    let (named, address) = (wanted.port, address(config, wanted));
    let remembered = config.remembered.as_ref().filter(|_| named.is_none());
    let last = remembered.and_then(|file| std::fs::read_to_string(file).ok()?.trim().parse().ok());
    let usual = named.unwrap_or(SYNCHRONIZATION_PORT);
    let mut ports: Vec<u16> = last.into_iter().collect();
    ports.push(usual);
    ports.extend(remembered.map(|_| 0));
    let mut wrong = String::new();
    for port in ports {
        let at = SocketAddr::new(address, port);
        match TcpListener::bind(at).await {
            Ok(listener) => {
                let bound = listener.local_addr().map_err(|error| error.to_string())?;
                if let Some(file) = remembered
                    && let Err(error) = std::fs::write(file, bound.port().to_string())
                {
                    tracing::warn!(file = %file.display(), %error, "its port is not remembered");
                }
                return Ok(Place { listener, bound });
            }
            Err(error) => wrong = format!("{at}: {error}"),
        }
    }
    Err(wrong)
}

/// Where others find a synchronizer that listens at `bound`. Pure.
///
/// # Errors
/// Why that is not known yet, for people.
pub fn advertised(
    how: &Advertise,
    service: Option<&Service>,
    bound: SocketAddr,
) -> Result<String, String> {
    let name = match how {
        Advertise::Here => return Ok(bound.to_string()),
        Advertise::At(address) => return Ok(address.clone()),
        Advertise::Service(name) => name,
    };
    let service = service.ok_or_else(|| format!("there is no Service {name}"))?;
    let spec = service.spec.clone().unwrap_or_default();
    let balanced = service.status.as_ref().and_then(|status| {
        let first = status.load_balancer.as_ref()?.ingress.as_ref()?.first()?;
        first.hostname.clone().or_else(|| first.ip.clone())
    });
    let host = balanced.or(spec.cluster_ip.filter(|ip| !ip.is_empty() && ip != "None"));
    let host = host.ok_or_else(|| format!("Service {name} has no address"))?;
    let port = spec.ports.iter().flatten().next().map_or(i32::from(bound.port()), |one| one.port);
    Ok(if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") })
}

#[cfg(test)]
mod test {
    use super::*;
    use serde_json::{Value, json};

    fn told(service: Value) -> Result<String, String> {
        let service: Service = serde_json::from_value(service).expect("a service");
        let bound = "10.0.0.7:9185".parse().expect("an address");
        advertised(&Advertise::Service("link".into()), Some(&service), bound)
    }

    #[test]
    fn a_service_is_found_at_its_load_balancer_before_its_own_address() {
        let spec = json!({"clusterIP": "10.1.1.1", "ports": [{"port": 9300}]});
        let balanced =
            |one: Value| json!({"spec": spec, "status": {"loadBalancer": {"ingress": [one]}}});
        assert_eq!(told(json!({"spec": spec})).as_deref(), Ok("10.1.1.1:9300"));
        assert_eq!(
            told(balanced(json!({"ip": "2001:db8::1"}))).as_deref(),
            Ok("[2001:db8::1]:9300")
        );
        let named = balanced(json!({"ip": "192.0.2.1", "hostname": "east.example.org"}));
        assert_eq!(told(named).as_deref(), Ok("east.example.org:9300"));
        told(json!({"spec": {"clusterIP": "None"}})).expect_err("it has none");
    }
}
