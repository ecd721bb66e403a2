//! Tells other sides of migrations what there is to say, and hears them: one task for each migration.

use crate::wire::{self, Ask, NEWS, Told, fingerprint};
use crate::world::World;
use api::migration::{Half, Side, VirtualMachineInstanceMigration as Migration};
use kube::ResourceExt;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::task::{AbortHandle, JoinSet};

/// Pauses after failures double from the first to the last.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LAST_PAUSE: Duration = Duration::from_secs(5);
/// How a migration ended is told for so long to an other side that does not answer: it has deadlines of its own.
const FAREWELL: Duration = Duration::from_secs(600);
/// A target whose source comes by itself need not call it.
const QUIET: Duration = Duration::from_secs(2 * NEWS.as_secs() + 5);

/// Looks after all migrations between two VMIs. Never ends by itself.
pub async fn run(world: Arc<World>) {
    let mut changes = world.changes.clone();
    let mut tasks = JoinSet::new();
    let mut tellers: HashMap<String, AbortHandle> = HashMap::new();
    loop {
        while tasks.try_join_next().is_some() {}
        let all = world.migrations.state();
        let halves: Vec<_> = all.iter().filter(|m| m.spec.half().is_some()).collect();
        let is_there = |uid: &str| halves.iter().any(|m| m.uid().as_deref() == Some(uid));
        tellers.retain(|uid, teller| {
            let stays = is_there(uid);
            if !stays {
                teller.abort();
            }
            stays
        });
        world.keep(is_there);
        for migration in halves {
            let uid = migration.uid().unwrap_or_default();
            let world = Arc::clone(&world);
            tellers
                .entry(uid.clone())
                .or_insert_with(|| tasks.spawn(async move { teller(&world, &uid).await }));
        }
        // Its sender lives as long as the watches do.
        if changes.changed().await.is_err() {
            return;
        }
    }
}

/// What became of one question.
enum Next {
    /// The other side has heard that it is over.
    Over,
    /// Ask again at once.
    Again,
    /// Something is wrong: ask again later.
    Later(String),
}

/// Tells one migration's other side. Ends once that knows how it ended.
async fn teller(world: &World, uid: &str) {
    let mut changes = world.changes.clone();
    let mut pause = FIRST_PAUSE;
    let mut turn = 0;
    let mut over: Option<Instant> = None;
    let mut heard = None;
    loop {
        changes.borrow_and_update();
        let Some(migration) = world.migration(uid) else { return };
        if migration.is_over() && over.get_or_insert_with(Instant::now).elapsed() > FAREWELL {
            return;
        }
        let Some((side, half)) = world.half(&migration) else { return };
        let other = migration.status.as_ref().and_then(|s| s.peer.as_ref()?.half.as_ref());
        let is_revoked = other.is_some_and(|other| !world.believes(&other.cluster));
        world.revoke(&migration, is_revoked).await;
        let is_called = side == Side::Target && world.silence(uid).is_some_and(|s| s < QUIET);
        let addresses = addresses(&migration, side);
        if addresses.is_empty() || is_called {
            // Whoever waits for its other side has not been called yet; and whom to believe may change.
            let mut credentials = world.credentials.clone();
            let changed = async {
                tokio::select! {
                    _ = changes.changed() => {}
                    _ = credentials.changed() => {}
                }
            };
            drop(tokio::time::timeout(QUIET, changed).await);
            continue;
        }
        let address = addresses[turn % addresses.len()].clone();
        let next = tokio::select! {
            next = tell(world, &migration, &half, &address, &mut heard) => next,
            // What is told must be new.
            () = renewed(world, uid, &half) => Next::Again,
            // Nor is anybody waited for who is not believed any more.
            () = distrusted(world, other) => Next::Again,
        };
        match next {
            Next::Over => return,
            Next::Again => pause = FIRST_PAUSE,
            Next::Later(why) => {
                turn += 1;
                world.trouble(&migration, &why).await;
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LAST_PAUSE);
            }
        }
    }
}

/// Returns once the other side's cluster is not believed any more.
async fn distrusted(world: &World, other: Option<&Half>) {
    let Some(other) = other.filter(|other| world.believes(&other.cluster)) else {
        return std::future::pending().await;
    };
    let mut credentials = world.credentials.clone();
    while world.believes(&other.cluster) {
        if credentials.changed().await.is_err() {
            return;
        }
    }
}

/// Where the other side may be found.
fn addresses(migration: &Migration, side: Side) -> Vec<String> {
    let half = migration.status.as_ref().and_then(|status| status.peer.as_ref()?.half.as_ref());
    let told = half.and_then(|half| half.address.clone());
    let named = migration.spec.send_to.as_ref().map(|to| to.connect_url.clone());
    let mut all: Vec<String> = told.into_iter().collect();
    // N.B. not only where it was when the migration was made.
    all.extend(named.filter(|named| side == Side::Source && !all.contains(named)));
    all
}

/// Returns once there is something else to say.
async fn renewed(world: &World, uid: &str, said: &Half) {
    let mut changes = world.changes.clone();
    loop {
        let now = world.migration(uid).and_then(|migration| world.half(&migration));
        if now.is_none_or(|(_, now)| fingerprint(&now) != fingerprint(said)) {
            return;
        }
        if changes.changed().await.is_err() {
            return;
        }
    }
}

/// Tells it, and hears what is new to `heard`: the fingerprint of what was heard last.
async fn tell(
    world: &World,
    migration: &Migration,
    half: &Half,
    address: &str,
    heard: &mut Option<u64>,
) -> Next {
    let Some((side, id)) = migration.spec.half() else { return Next::Over };

    let known = migration.status.as_ref().and_then(|status| status.peer.as_ref()?.half.as_ref());
    let credentials = world.credentials.borrow().clone();
    let is_over = migration.is_over();
    // N.B. in one that is over nothing is written down any more.
    let seen = heard.filter(|_| is_over).or(known.map(fingerprint)).unwrap_or_default();
    let ask = Ask::Tell { migration: id.to_owned(), side, half: Box::new(half.clone()), seen };
    let cluster = known.map(|known| known.cluster.as_str());
    // N.B. one that has not begun may find another side.
    let cluster = cluster.filter(|_| migration.phase() > api::migration::Phase::Pending);
    let (peer, told) = match wire::ask(&credentials, address, cluster, &ask).await {
        Ok(answer) => answer,
        Err(why) => return Next::Later(why),
    };
    match told {
        Told::Half { half: Some(other) } => {
            *heard = Some(fingerprint(&other));
            if let Err(why) = world.hear(migration, peer.cluster(), &other).await {
                return Next::Later(why);
            }
            // Whoever asks again too soon would be answered what it has heard.
            match is_over && other.phase.is_final() {
                true => Next::Over,
                false => after_news(world, migration, &other).await,
            }
        }
        Told::Half { half: None } if is_over => Next::Over,
        Told::Half { half: None } => Next::Again,
        Told::Unknown { .. } if is_over => Next::Over,
        Told::Unknown { why } | Told::Refused { why } => Next::Later(why),
        _ => Next::Later("it answers what was not asked".into()),
    }
}

/// Waits until the watch shows what was heard.
async fn after_news(world: &World, migration: &Migration, other: &Half) -> Next {
    let mut changes = world.changes.clone();
    let uid = migration.uid().unwrap_or_default();
    let wanted = fingerprint(other);
    let seen = async {
        loop {
            let now = world.migration(&uid);
            let heard =
                now.as_ref().and_then(|now| now.status.as_ref()?.peer.as_ref()?.half.as_ref());
            if now.is_none() || heard.map(fingerprint) == Some(wanted) || migration.is_over() {
                return;
            }
            if changes.changed().await.is_err() {
                return;
            }
        }
    };
    match tokio::time::timeout(LAST_PAUSE, seen).await {
        Ok(()) => Next::Again,
        Err(_) => Next::Later("what it said could not be written down".into()),
    }
}
