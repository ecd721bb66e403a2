//! The other end of a move: which node it is, the way to it, and what is asked of its handler.

use super::super::Shared;
use super::super::guests::Key;
use super::prepare::{Ask, Told, What};
use super::source::gateway_of;
use super::way::{self, Way};
use api::migration::State;
use channel::gateway::Gateway;
use channel::identity::{Role, SpiffeId};
use launcher::migration::ticket::Peer;
use std::sync::Arc;

/// The handler of a target's node, as its source's handler has it.
pub struct There {
    gateway: Arc<Gateway>,
    /// Which node of which cluster.
    id: SpiffeId,
    /// What is dialled.
    address: String,
    /// Of another cluster: how its gateway was found.
    pub way: Option<Way>,
    /// The VMI there, and the attempt.
    namespace: String,
    name: String,
    migration: String,
    pod: String,
    /// Who asks.
    from: Peer,
}

impl There {
    /// Finds the way to the target's handler.
    ///
    /// # Errors
    /// Why there is none, for people.
    pub async fn find(shared: &Shared, key: &Key, state: &State) -> Result<Self, String> {
        let gateway = shared.moves.gateway.get().ok_or("the gateway is not open yet")?;
        let name = state.target_node.clone().unwrap_or_default();
        let own = shared.config.id();
        let end = state.target_state.as_ref();
        let cluster = end.and_then(|end| end.cluster.as_deref()).unwrap_or(own.cluster());
        let address = match end {
            None => gateway_of(shared, &name).await?,
            Some(end) => end.gateway.clone().ok_or_else(|| {
                format!("cluster {cluster} does not say where the gateway of its node {name} is")
            })?,
        };
        let id = SpiffeId::new(cluster, Role::Handler, &name).map_err(|e| e.to_string())?;
        let way = match cluster == own.cluster() {
            true => None,
            false => Some(way::find(shared, gateway, &address, &id).await?),
        };
        let named = |named: Option<&Option<String>>, own: &String| {
            named.cloned().flatten().unwrap_or_else(|| own.clone())
        };
        Ok(Self {
            gateway: Arc::clone(gateway),
            address: way.as_ref().map_or(address, |way| way.address.clone()),
            id,
            way,
            namespace: named(end.map(|end| &end.domain_namespace), &key.0),
            name: named(end.map(|end| &end.domain_name), &key.1),
            migration: state.attempt().unwrap_or_default().to_owned(),
            pod: state.target_pod.clone().unwrap_or_default(),
            from: Peer { address: gateway.local_addr().to_string(), id: own.clone() },
        })
    }

    /// Where its gateway is found, if that is otherwise than it says.
    pub fn detour(&self) -> Option<&str> {
        let way = self.way.as_ref().filter(|way| way.through.is_some())?;
        Some(&way.address)
    }

    /// Asks the handler there.
    ///
    /// # Errors
    /// Why there is no answer, for people.
    pub async fn ask(&self, what: What) -> Result<Told, String> {
        let ask = Ask {
            namespace: self.namespace.clone(),
            name: self.name.clone(),
            migration: self.migration.clone(),
            pod: self.pod.clone(),
            from: self.from.clone(),
            what,
        };
        let ask = serde_json::to_value(&ask).map_err(|error| error.to_string())?;
        let told = self.gateway.ask(&self.address, &self.id, &ask).await;
        let told = told.map_err(|error| launcher::chain(&error))?;
        let node = self.id.instance();
        serde_json::from_value(told).map_err(|e| format!("node {node} answers nonsense: {e}"))
    }
}
