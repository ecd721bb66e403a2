//! Answers other clusters' synchronizers, and the own cluster's handlers.

use crate::records::OfVm;
use crate::relocation;
use crate::wire::{self, Ask, NEWS, Told, fingerprint};
use crate::world::World;
use crate::{join, links, passage};
use api::migration::{Half, Side, VirtualMachineInstanceMigration as Migration};
use api::owner::Ledger;
use channel::identity::{Role, SpiffeId};
use channel::tcp::{DEAD_PEER, tune};
use channel::{tls, with_source};
use handover::handler::Qemu;
use handover::record::{HostId, Swap};
use kube::ResourceExt;
use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

/// Connections at the same time.
const MOST: usize = 1024;
/// For a handshake, and for a question.
const PATIENCE: Duration = Duration::from_secs(5);
/// `accept` fails when descriptors run out: some may be free again soon.
const PAUSE: Duration = Duration::from_millis(50);

/// Answers. Never ends by itself.
pub async fn run(world: Arc<World>, listener: TcpListener) {
    let places = Arc::new(Semaphore::new(MOST));
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((tcp, from)) => {
                let world = Arc::clone(&world);
                connections.spawn(async move {
                    if let Err(why) = serve(&world, tcp).await {
                        tracing::warn!(%from, "connection refused: {why}");
                    }
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection; trying again");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

async fn serve(world: &World, tcp: TcpStream) -> Result<(), String> {
    tune(&tcp, DEAD_PEER).map_err(|error| error.to_string())?;
    let credentials = world.credentials.borrow().clone();
    let roles = [Role::Synchronizer, Role::Handler];
    let server = tls::Server::new(&credentials.identity, credentials.trust, &roles);
    let server = server.map_err(|error| with_source(&error))?;
    let accepted = timeout(PATIENCE, server.accept_any(tcp)).await;
    let accepted = accepted.map_err(|_| "the TLS handshake took too long".to_owned())?;
    let (mut stream, peer) = match accepted {
        Ok(tls::Accepted::Peer(stream, peer)) => (stream, Some(peer)),
        Ok(tls::Accepted::Guest(stream)) => (stream, None),
        // Whoever only looks whether somebody listens.
        Err(tls::Error::Handshake(error)) if error.kind() == ErrorKind::UnexpectedEof => {
            return Ok(());
        }
        Err(error) => return Err(with_source(&error)),
    };
    let asked = timeout(PATIENCE, channel::wire::read(&mut stream)).await;
    let name = peer.as_ref().map_or("somebody unknown".to_owned(), SpiffeId::to_string);
    let asked = asked.map_err(|_| format!("{name}: its question did not come in time"))?;
    if let (Ok(Ask::Passage { cluster, node }), Some(peer)) = (&asked, &peer) {
        return passage::serve(world, stream, peer, (cluster, node)).await;
    }
    let told = match (asked, &peer) {
        (Ok(ask), Some(peer)) => answer(world, peer, ask).await,
        (Ok(Ask::Join { invitation, secret, bundle, address }), None) => {
            match join::admit(world, (&invitation, &secret), &bundle, &address).await {
                Ok(()) => Told::Trust { bundle: links::own(world), address: world.address() },
                Err(why) => Told::Refused { why },
            }
        }
        (Ok(_), None) => Told::Refused { why: "who is not believed may ask to join alone".into() },
        (Err(error), _) => Told::Refused { why: format!("the question makes no sense: {error}") },
    };
    if let Told::Refused { why } = &told {
        tracing::warn!(peer = name, "{why}");
    }
    let sent = timeout(PATIENCE, channel::wire::write(&mut stream, &told)).await;
    if !matches!(sent, Ok(Ok(()))) {
        tracing::debug!(peer = name, "an answer was not delivered");
    }
    Ok(())
}

async fn answer(world: &World, peer: &SpiffeId, ask: Ask) -> Told {
    let refused = |why: String| Told::Refused { why };
    match (peer.role(), ask) {
        (Role::Synchronizer, Ask::Tell { migration, side, half, seen }) => {
            tell(world, peer, &migration, side, &half, seen).await
        }
        (Role::Synchronizer, Ask::Trust { bundle, address }) => {
            match links::hear(world, peer.cluster(), &bundle, &address).await {
                Ok(()) => Told::Trust { bundle: links::own(world), address: world.address() },
                Err(why) => refused(why),
            }
        }
        (Role::Synchronizer, Ask::Offer { .. } | Ask::Settle { .. })
            if world.link(peer.cluster()).is_none() =>
        {
            refused(format!("cluster {} is not linked to {}", world.cluster(), peer.cluster()))
        }
        (Role::Synchronizer, Ask::Offer { id, offer, check }) => {
            relocation::offered(world, peer.cluster(), &id, &offer, check).await
        }
        (Role::Synchronizer, Ask::Settle { id, namespace, name, succeeded }) => {
            let place = (&*namespace, &*name);
            relocation::settle(world, peer.cluster(), &id, place, succeeded).await
        }
        (Role::Synchronizer, Ask::Owner { asker, namespace, name, change }) => {
            owner(world, peer, &asker, namespace, name, &change).await
        }
        (Role::Handler, Ask::Forward { cluster, question })
            if peer.cluster() == world.cluster() =>
        {
            forward(world, &cluster, &question).await
        }
        (role, _) => refused(format!("{peer}: a {role} may not ask that here")),
    }
}

/// Hears the other side's half, and answers with the own one once it is another than was seen.
async fn tell(
    world: &World,
    peer: &SpiffeId,
    id: &str,
    side: Side,
    half: &Half,
    seen: u64,
) -> Told {
    let until = Instant::now() + NEWS;
    let mut changes = world.changes.clone();
    let mut heard = false;
    loop {
        changes.borrow_and_update();
        let found = match find(world, id, side.other(), half) {
            Ok(found) => found,
            Err(why) => return Told::Unknown { why },
        };
        if !heard {
            if let Err(why) = world.hear(&found, peer.cluster(), half).await {
                return Told::Refused { why };
            }
            heard = true;
        }
        let own = world.half(&found).map(|(_, half)| half);
        if let Some(own) = own.filter(|own| fingerprint(own) != seen) {
            return Told::Half { half: Some(Box::new(own)) };
        }
        if tokio::time::timeout_at(until, changes.changed()).await.is_err() {
            return Told::Half { half: None };
        }
    }
}

/// The migration here that is the other side of what a half is of.
fn find(world: &World, id: &str, side: Side, half: &Half) -> Result<Arc<Migration>, String> {
    let mut all = world.migrations.state();
    all.retain(|m| {
        m.spec.half() == Some((side, id)) && m.uid().as_deref() != Some(&half.migration)
    });
    let bound = |m: &&Arc<Migration>| {
        let peer = m.status.as_ref().and_then(|status| status.peer.as_ref()?.half.as_ref());
        peer.is_some_and(|peer| peer.migration == half.migration)
    };
    if let Some(bound) = all.iter().find(bound) {
        return Ok(Arc::clone(bound));
    }
    all.retain(|m| !m.is_over());
    match &all[..] {
        [one] => Ok(Arc::clone(one)),
        [] => {
            Err(format!("cluster {} has no migration of id {id} that could be it", world.cluster()))
        }
        [one, other, ..] => Err(format!(
            "cluster {} has several migrations of id {id}, such as {} and {}: ids are not used twice",
            world.cluster(),
            one.name_any(),
            other.name_any()
        )),
    }
}

/// Changes an owner record for the one at a move's other end.
async fn owner(
    world: &World,
    peer: &SpiffeId,
    asker: &HostId,
    namespace: String,
    name: String,
    change: &Swap,
) -> Told {
    let own = Ledger::parse(asker).is_some_and(|ledger| ledger.cluster == peer.cluster());
    if !own {
        return Told::Refused { why: format!("{peer} may not speak for record {asker}") };
    }
    let record = OfVm { client: world.client.clone(), namespace, name };
    // What handlers know of processes, the record says.
    let response = record.swap_of(asker, change, |_| Qemu::Unknown).await;
    Told::Owner { response }
}

/// Asks another cluster's synchronizer, where its link or migrations say that it is.
pub async fn forward(world: &World, cluster: &str, ask: &Ask) -> Told {
    if !matches!(ask, Ask::Owner { .. }) {
        return Told::Refused { why: "handlers ask about owner records, and nothing else".into() };
    }
    let mut last = format!("nobody here knows where cluster {cluster} is found");
    let credentials = world.credentials.borrow().clone();
    for address in world.addresses(cluster) {
        match wire::ask(&credentials, &address, Some(cluster), ask).await {
            Ok((_, told)) => return told,
            Err(why) => last = why,
        }
    }
    Told::Refused { why: last }
}
