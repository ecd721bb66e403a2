//! A relay before the gateway of a cluster's node: a long link, or one that is cut.

use crate::cluster::Cluster;
use anyhow::{Context, Result};
use channel::relay::DelayRelay;
use serde_json::{Value, json};
use std::time::Duration;

/// A way to a gateway. The gateway's handler says where it really is once a minute: what has begun by
/// then goes on.
pub struct Detour {
    /// What is on the way.
    pub relay: DelayRelay,
    node: String,
    /// Where the gateway really is.
    gateway: String,
}

impl Detour {
    /// Puts a round trip of this length before a node's gateway.
    ///
    /// # Errors
    /// When the cluster does not say where that is.
    pub async fn to(cluster: &Cluster, node: &str, rtt: Duration) -> Result<Self> {
        let node = format!("/api/v1/nodes/{node}");
        let has = |node: &Value| node["metadata"]["annotations"]["godwit.dev/gateway"].is_string();
        let found = cluster.until(&node, has).await?;
        let gateway = found["metadata"]["annotations"]["godwit.dev/gateway"].as_str();
        let gateway = gateway.context("no gateway")?.to_owned();
        let near = "127.0.0.1:0".parse()?;
        let relay = DelayRelay::start(near, gateway.parse()?, rtt / 2, None).await?;
        say(cluster, &node, &relay.local_addr().to_string()).await?;
        Ok(Self { relay, node, gateway })
    }

    /// Ends it. N.B. the next one would be put before this one, which is gone.
    ///
    /// # Errors
    /// Those of the cluster.
    pub async fn end(self, cluster: &Cluster) -> Result<()> {
        say(cluster, &self.node, &self.gateway).await
    }
}

/// Says where a node's gateway is.
async fn say(cluster: &Cluster, node: &str, address: &str) -> Result<()> {
    let patch = json!({"metadata": {"annotations": {"godwit.dev/gateway": address}}});
    cluster.send("PATCH", node, Some(patch)).await.map(|_| ())
}
