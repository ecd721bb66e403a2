//! What a synchronizer asks of the rest of its cluster: the scheduler's rules, and nodes' handlers.

use crate::cluster::Handlers;
use channel::identity::Credentials;
use controllers::migration::preflight::{Disks, Lately, check_arrival, gather};
use handler::cluster::moves::{Elsewhere, Plan};
use kube::Client;
use reconcile::why;
use serde_json::Value;
use synchronizer::ground::{Arrival, Departure, Later, Place};
use tokio::sync::watch;

/// The rest of the cluster.
pub struct Ground {
    client: Client,
    handlers: Handlers,
}

impl Ground {
    /// Asks in the synchronizer's name.
    pub fn new(client: &Client, credentials: &watch::Receiver<Credentials>) -> Self {
        let handlers = Handlers { client: client.clone(), credentials: credentials.clone() };
        Self { client: client.clone(), handlers }
    }

    async fn ask(&self, of: Departure<'_>, only_reach: bool) -> Result<Value, String> {
        let Departure { node, namespace, name, to, gateway, id } = of;
        let elsewhere = Some(Elsewhere { address: gateway.into(), id: id.clone() });
        let plan = Plan { node: to.into(), elsewhere, only_reach, all: true, ..Plan::default() };
        let told = self.handlers.forecast(node, (namespace, name), plan).await;
        told.map_err(|failure| failure.message)
    }
}

impl synchronizer::ground::Ground for Ground {
    fn place(&self, arrival: Arrival) -> Later<'_, Place> {
        Box::pin(async move {
            let Arrival { vmi, claims, selectors, settings } = arrival;
            let (client, now) = (&self.client, Lately::default());
            let facts = gather(client, &now, vmi, selectors, Disks::Named, settings).await;
            let facts = facts.map_err(|error| why(&error))?;
            let found = check_arrival(&facts, &claims);
            let faults = found.faults.into_iter().map(|fault| fault.message).collect();
            Ok(Place { node: found.node, faults })
        })
    }

    fn reach<'a>(&'a self, departure: Departure<'a>) -> Later<'a, Option<String>> {
        Box::pin(async move {
            let told = self.ask(departure, true).await?;
            Ok(told["through"].as_str().map(str::to_owned))
        })
    }

    fn forecast<'a>(&'a self, departure: Departure<'a>) -> Later<'a, Value> {
        Box::pin(self.ask(departure, false))
    }
}
