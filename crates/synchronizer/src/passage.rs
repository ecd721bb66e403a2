//! Streams between nodes of two clusters that do not reach each other: through both synchronizers.
//!
//! ```text
//! source's handler ==TLS==> own synchronizer ==TLS==> other synchronizer --TCP--> target's gateway
//!        +------------------------ TLS, from gateway to gateway -------------------------+
//! ```
//!
//! Synchronizers pass on what they cannot read, and know nothing of what passes. A cluster is let through to
//! the nodes to which its guests come, or, if it is linked, to any.

use crate::wire::{self, Ask, Told};
use crate::world::World;
use api::kubevirt::{self, KubeVirt};
use api::migration::Side;
use channel::identity::{Credentials, Role, SpiffeId};
use channel::passage::{Opening, Stream, join};
use channel::tcp::{DEAD_PEER, tune};
use kube::runtime::reflector::Store;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::timeout;

/// A gateway answers within this time.
const CONNECT: Duration = Duration::from_secs(5);

/// The way to a node of another cluster, as this cluster's handlers take it.
#[derive(Clone)]
pub struct Opener {
    /// The handler's.
    pub credentials: watch::Receiver<Credentials>,
    /// The settings, which say where the own synchronizer is found: it may move.
    pub settings: Store<KubeVirt>,
    /// The node's cluster.
    pub cluster: String,
    /// The node.
    pub node: String,
}

impl channel::passage::Opener for Opener {
    fn open(&self) -> Opening<'_> {
        let Self { credentials, settings, cluster, node } = self;
        Box::pin(async move {
            let credentials = credentials.borrow().clone();
            let own = credentials.identity.id().cluster().to_owned();
            let settings = kubevirt::foremost(settings.state());
            let status = settings.as_ref().and_then(|settings| settings.status.as_ref());
            let address = status.and_then(|status| status.synchronization_addresses.first());
            let address = address.ok_or("this cluster has no synchronizer")?;
            open(&credentials, address, &own, cluster, node).await
        })
    }
}

/// Asks the synchronizer of `asked` at `address` for the way to a node.
async fn open(
    credentials: &Credentials,
    address: &str,
    asked: &str,
    cluster: &str,
    node: &str,
) -> Result<Box<dyn Stream>, String> {
    let ask = Ask::Passage { cluster: cluster.into(), node: node.into() };
    let (mut stream, _) = wire::connect(credentials, address, Some(asked)).await?;
    match wire::exchange(&mut stream, address, &ask).await? {
        Told::Open => Ok(Box::new(stream)),
        Told::Refused { why } => Err(why),
        _ => Err(format!("{address}: it answers what was not asked")),
    }
}

/// Lets somebody through, for as long as that takes.
pub async fn serve(
    world: &World,
    mut near: impl AsyncRead + AsyncWrite + Unpin,
    peer: &SpiffeId,
    (cluster, node): (&str, &str),
) -> Result<(), String> {
    let own = world.cluster();
    let far = match peer.role() {
        Role::Handler if peer.cluster() == own => through(world, cluster, node).await,
        Role::Synchronizer if cluster == own => to_node(world, peer.cluster(), node).await,
        role => Err(format!("a {role} may not ask for that way here")),
    };
    let told = match &far {
        Ok(_) => Told::Open,
        Err(why) => Told::Refused { why: why.clone() },
    };
    let sent = timeout(CONNECT, channel::wire::write(&mut near, &told)).await;
    let sent = sent.map_err(|_| format!("{peer} does not take its answer"))?;
    sent.map_err(|error| error.to_string())?;
    // A stream that is cut is seen by whoever uses it.
    drop(join(near, far.map_err(|why| format!("{peer}: {why}"))?).await);
    Ok(())
}

/// To the other cluster's synchronizer, and on.
async fn through(world: &World, cluster: &str, node: &str) -> Result<Box<dyn Stream>, String> {
    let mut last = format!("nobody here knows where cluster {cluster} is found");
    let credentials = world.credentials.borrow().clone();
    for address in world.addresses(cluster) {
        match open(&credentials, &address, cluster, cluster, node).await {
            Ok(stream) => return Ok(stream),
            Err(why) => last = why,
        }
    }
    Err(last)
}

/// To the gateway of a node of this cluster.
async fn to_node(world: &World, from: &str, node: &str) -> Result<Box<dyn Stream>, String> {
    let comes = world.migrations.state().iter().any(|migration| {
        let peer = migration.status.as_ref().and_then(|status| status.peer.as_ref()?.half.as_ref());
        let half = || world.half(migration).filter(|(side, _)| *side == Side::Target);
        !migration.is_over()
            && peer.is_some_and(|peer| peer.cluster == from)
            && half().is_some_and(|(_, half)| half.node.as_deref() == Some(node))
    });
    if !comes && world.link(from).is_none() {
        return Err(format!("no guest of cluster {from} comes to node {node}"));
    }
    let gateway = world.gateway(node);
    let gateway =
        gateway.ok_or_else(|| format!("node {node} does not say where its gateway is"))?;
    let failed = |why: String| format!("the gateway of node {node} at {gateway}: {why}");
    let tcp = timeout(CONNECT, TcpStream::connect(&gateway)).await;
    let tcp = tcp.map_err(|_| failed("no connection in time".into()))?;
    let tcp = tcp.map_err(|error| failed(error.to_string()))?;
    tune(&tcp, DEAD_PEER).map_err(|error| failed(error.to_string()))?;
    Ok(Box::new(tcp))
}
