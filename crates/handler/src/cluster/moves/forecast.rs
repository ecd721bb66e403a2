//! What a move of a guest of this node would take.

use super::super::Shared;
use super::source::{gateway_of, policy};
use super::way;
use api::migration::Options;
use channel::identity::{Role, SpiffeId};
use launcher::client::Client as Launcher;
use launcher::forecast::{Forecast, Measured, Way, forecast};
use serde::{Deserialize, Serialize};

/// Of which move.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// The node to which the guest would go.
    pub node: String,
    /// That node's gateway, where it is another cluster's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub elsewhere: Option<Elsewhere>,
    /// Only find out whether the gateway can be reached: in a moment, and without the guest.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub only_reach: bool,
    /// Whether all disks go to other storage, those too that both nodes can use.
    pub all: bool,
    /// How it would be moved.
    pub options: Options,
}

/// Another cluster's gateway.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Elsewhere {
    /// `host:port`.
    pub address: String,
    /// Whose it is.
    pub id: SpiffeId,
}

/// What was measured, and what it would take.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Outlook {
    /// The guest.
    pub guest: Measured,
    /// The way to the node.
    pub way: Way,
    /// The move.
    pub forecast: Forecast,
    /// Why the way goes through both clusters' synchronizers, where it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub through: Option<String>,
}

/// Measures the guest and the way, for a second or two.
///
/// # Errors
/// What cannot be measured, for people.
pub async fn look(shared: &Shared, launcher: &Launcher, plan: &Plan) -> Result<Outlook, String> {
    let gateway = shared.moves.gateway.get().ok_or("the gateway is not open yet")?;
    let mut through = None;
    let (address, id) = match &plan.elsewhere {
        Some(Elsewhere { address, id }) => {
            let found = way::find(shared, gateway, address, id).await?;
            through = found.through;
            (found.address, id.clone())
        }
        None => {
            let id = SpiffeId::new(shared.config.id().cluster(), Role::Handler, &plan.node);
            (gateway_of(shared, &plan.node).await?, id.map_err(|error| error.to_string())?)
        }
    };
    if plan.only_reach {
        return Ok(Outlook { through, ..Outlook::default() });
    }
    // N.B. one after the other: each would slow the other down.
    let guest = launcher.measure().await.map_err(|error| launcher::chain(&error))?;
    let link = gateway.probe(&address, &id).await.map_err(|error| launcher::chain(&error))?;
    let way = Way { rtt_ms: link.rtt.as_secs_f64() * 1e3, rates: link.rates };
    let forecast = forecast(&guest, &way, &policy(Some(&plan.options)), plan.all);
    Ok(Outlook { guest, way, forecast, through })
}
