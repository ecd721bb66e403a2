//! QEMU's connections: which is which, and what their end means.

use crate::side::{Side, firmware, within};
use channel::resumable::{Config, Role};
use channel::socket::{bind_beneath, connect_beneath};
use launcher::migration::links::Links;
use launcher::migration::memory::{INCOMING, OUTGOING, Pumps, finish};
use qmp::commands::MigrationStatus;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

const MULTIFD: u8 = 2;
const ROUNDS: usize = 12;

#[tokio::test]
async fn before_8_0_the_first_connection_is_taken_for_the_main_one() {
    let spec = firmware(json!({}));
    let (source, target) = tokio::join!(Side::source(&spec), Side::target(&spec, MULTIFD));
    let listener = bind_beneath(source.path(), OUTGOING).unwrap();
    let mut relays = JoinSet::new();
    let relaying = async {
        // QEMU opens the main one first.
        let mut opened = Vec::new();
        for _ in 0..=MULTIFD {
            opened.push(listener.accept().await.unwrap().0);
        }
        opened.rotate_left(1);
        for mut theirs in opened {
            let mut ours = connect_beneath(target.path(), INCOMING).await.unwrap();
            // A cut is what an old QEMU makes of it.
            relays.spawn(async move { copy_bidirectional(&mut theirs, &mut ours).await });
        }
    };
    if target.version() >= (8, 0) {
        within(async { tokio::join!(source.send(MULTIFD), relaying) }).await;
        return source.load(&target).await;
    }
    // It takes the main one for one of the others, and then waits for ever.
    let refused = async { tokio::join!(relaying, target.says("received packet magic")) };
    let sending = async {
        let _ = source.try_send(MULTIFD).await;
        std::future::pending().await
    };
    tokio::select! {
        _ = refused => {}
        () = sending => {}
    }
}

#[tokio::test]
async fn our_streams_reach_the_target_in_order_however_they_come() {
    let spec = firmware(json!({}));
    let (source, target) = tokio::join!(Side::source(&spec), Side::target(&spec, MULTIFD));
    let mut wires = Wires::between(&source, &target);
    let admitting = async {
        for n in (1..wires.far.len()).rev() {
            wires.admit(n).await;
        }
        // The others are there, and wait for the main one.
        assert_ne!(target.status().await, Some(MigrationStatus::Active));
        target.stays(target.status().await).await;
        wires.admit(0).await;
    };
    within(async { tokio::join!(admitting, source.send(MULTIFD)) }).await;
    source.load(&target).await;
    target.run().await;
}

/// Before 8.2 a stream that breaks while the rest is sent can stop QEMU for good: one of its
/// threads waits, with the big lock held, for a thread of another stream that has gone. About one
/// in four did. Nothing releases it, `yank` neither, and the guest is lost.
#[tokio::test]
async fn a_source_is_spared_to_see_its_streams_break() {
    let spec = firmware(json!({}));
    let source = Side::source(&spec).await;
    for _ in 0..ROUNDS {
        let target = Side::target(&spec, MULTIFD).await;
        let mut wires = Wires::between(&source, &target);
        for n in 0..wires.far.len() {
            wires.admit(n).await;
        }
        source.send(MULTIFD).await;
        target.kill().await;
        wires.cut().await;
        finish(&source.qemu).await.unwrap();
        source.bring_back().await;
    }
}

/// The product's streams between two sides.
struct Wires {
    outgoing: Pumps,
    incoming: Pumps,
    far: Vec<(mpsc::Sender<UnixStream>, Option<UnixStream>)>,
    near: Vec<mpsc::Sender<UnixStream>>,
}

impl Wires {
    /// The target's side hears of none yet.
    fn between(source: &Side, target: &Side) -> Self {
        let (mut near, mut far, mut here, mut there) = (vec![], vec![], vec![], vec![]);
        for _ in 0..=MULTIFD {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let (dialled, links) = mpsc::channel(1);
            dialled.try_send(ours).unwrap();
            near.push(dialled);
            here.push((Links::Accept(links), Config::new(Role::Dialing)));
            let (admitted, links) = mpsc::channel(1);
            far.push((admitted, Some(theirs)));
            there.push((Links::Accept(links), Config::new(Role::Dialing)));
        }
        let (mut outgoing, mut incoming) = (Pumps::default(), Pumps::default());
        outgoing.outgoing(source.path(), here).unwrap();
        incoming.incoming(target.path(), there, None);
        Self { outgoing, incoming, far, near }
    }

    async fn admit(&mut self, n: usize) {
        let (door, link) = &mut self.far[n];
        door.send(link.take().unwrap()).await.unwrap();
    }

    /// Cuts all, for good.
    async fn cut(mut self) {
        self.incoming.end();
        drop((self.near, self.far));
        within(self.outgoing.failed()).await;
    }
}

#[tokio::test]
async fn a_source_says_completed_before_its_target_has_everything() {
    let spec = firmware(json!({}));
    let (source, target) = tokio::join!(Side::source(&spec), Side::target(&spec, 0));
    let listener = bind_beneath(source.path(), OUTGOING).unwrap();
    let (valve, open) = watch::channel(true);
    let link = tokio::spawn({
        let to = connect_beneath(target.path(), INCOMING).await.unwrap();
        async move { link(listener.accept().await.unwrap().0, to, open).await }
    });
    source.send(0).await;
    valve.send_replace(false);
    finish(&source.qemu).await.unwrap();
    source.reaches(MigrationStatus::Completed).await;
    // N.B. what is still on its way has to arrive: Loaded is what the target says.
    target.stays(Some(MigrationStatus::Active)).await;
    valve.send_replace(true);
    target.loaded().await.unwrap();
    target.run().await;
    link.abort();
}

/// A link that takes all that comes, and delivers it while its valve is open.
async fn link(mut from: UnixStream, mut to: UnixStream, mut open: watch::Receiver<bool>) {
    // More than is left once the guest stands.
    let (take, mut taken) = mpsc::channel::<Vec<u8>>(1 << 10);
    let taking = async {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(n @ 1..) = from.read(&mut buffer).await {
            take.send(buffer[..n].into()).await.unwrap();
        }
        drop(take);
    };
    let delivering = async {
        while let Some(bytes) = taken.recv().await {
            open.wait_for(|open| *open).await.unwrap();
            to.write_all(&bytes).await.unwrap();
        }
    };
    tokio::join!(taking, delivering);
}
