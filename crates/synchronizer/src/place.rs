//! Where a synchronizer listens.

use crate::{Config, PORT};
use std::net::SocketAddr;
use tokio::net::TcpListener;

/// Where it listens.
pub struct Place {
    pub listener: TcpListener,
    /// Where others find it.
    pub address: String,
}

/// Takes the port that settings name, or the usual one; where that may be another, the one that it had
/// last, or any that is free.
///
/// # Errors
/// For people.
pub async fn take(config: &Config, named: Option<u16>) -> Result<Place, String> {
    let remembered = config.remembered.as_ref().filter(|_| named.is_none());
    let last = remembered.and_then(|file| std::fs::read_to_string(file).ok()?.trim().parse().ok());
    let usual = named.unwrap_or(PORT);
    let mut ports: Vec<u16> = last.into_iter().collect();
    ports.push(usual);
    ports.extend(remembered.map(|_| 0));
    let mut wrong = String::new();
    for port in ports {
        let at = SocketAddr::new(config.address, port);
        match TcpListener::bind(at).await {
            Ok(listener) => {
                let bound = listener.local_addr().map_err(|error| error.to_string())?;
                if let Some(file) = remembered
                    && let Err(error) = std::fs::write(file, bound.port().to_string())
                {
                    tracing::warn!(file = %file.display(), %error, "its port is not remembered");
                }
                let address = config.advertise.clone().unwrap_or_else(|| bound.to_string());
                return Ok(Place { listener, address });
            }
            Err(error) => wrong = format!("{at}: {error}"),
        }
    }
    Err(wrong)
}
