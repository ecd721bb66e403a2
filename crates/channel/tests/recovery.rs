//! Gateways are killed and links cut while two launchers talk: both only stall.

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use channel::client::Redial;
use channel::preface::Stream;
use channel::relay::DelayRelay;
use channel::resumable::{Config, Error, Monitor, Role, State, Summary, run};
use common::{Host, PATIENCE, Target, pair, preface};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex, split};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;

type Carried = JoinHandle<Result<Summary, Error>>;

/// Two launchers' ends of one stream, as `resumable` carries it through both gateways.
struct Talk {
    source: DuplexStream,
    target: DuplexStream,
    monitor: Monitor,
    carried: (Carried, Carried),
    _door: JoinHandle<()>,
}

fn config(role: Role) -> Config {
    let backoff = (Duration::from_millis(5), Duration::from_millis(50));
    Config { buffer: 1 << 20, backoff, ..Config::new(role) }
}

fn talk(source: &Host, target: &Host, address: &str) -> Talk {
    let launcher = Arc::new(Target::of(target, "web"));
    let token = launcher.issue(Stream::Memory(0));
    let (sender, links) = mpsc::channel(1);
    let door = tokio::spawn(async move {
        loop {
            let (_, _, stream) = launcher.next().await;
            if sender.send(stream).await.is_err() {
                return;
            }
        }
    });
    let preface = preface("web", Stream::Memory(0), &token);
    let redial = Redial::new(source.client(), address, target.id(), preface);
    let (source, near) = duplex(64 << 10);
    let (target, far) = duplex(64 << 10);
    let dialing = config(Role::Dialing);
    let monitor = dialing.monitor.clone();
    let carried = (
        tokio::spawn(run(near, redial, dialing)),
        tokio::spawn(run(far, links, config(Role::Accepting))),
    );
    Talk { source, target, monitor, carried, _door: door }
}

/// Numbers both ways, checked as they arrive; returns when all have.
async fn numbers_pass(talk: Talk, count: u64) -> (Summary, Summary) {
    let (source_reader, source_writer) = split(talk.source);
    let (target_reader, target_writer) = split(talk.target);
    let users = async {
        tokio::join!(
            send(source_writer, count),
            send(target_writer, count),
            check(source_reader, count),
            check(target_reader, count),
        )
    };
    timeout(PATIENCE, users).await.expect("in time");
    let (a, b) = tokio::join!(talk.carried.0, talk.carried.1);
    (a.expect("no panic").expect("ends well"), b.expect("no panic").expect("ends well"))
}

async fn send(mut writer: impl AsyncWriteExt + Unpin, count: u64) {
    for batch in (0..count).collect::<Vec<_>>().chunks(4096) {
        let bytes: Vec<u8> = batch.iter().flat_map(|n| n.to_be_bytes()).collect();
        writer.write_all(&bytes).await.expect("the stream takes numbers");
    }
    writer.shutdown().await.expect("a half-close");
}

async fn check(mut reader: impl AsyncReadExt + Unpin, count: u64) {
    for expected in 0..count {
        assert_eq!(reader.read_u64().await.expect("a number"), expected);
    }
    assert!(reader.read_u8().await.is_err(), "the stream goes on");
}

/// Waits until the stream has carried so many bytes from the source.
async fn carried(monitor: &Monitor, bytes: u64) {
    let moved = async {
        while monitor.sent() < bytes {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(PATIENCE, moved).await.expect("in time");
}

const COUNT: u64 = 1 << 19;
const BYTES: u64 = COUNT * 8;

#[tokio::test]
async fn gateways_that_are_killed_and_restarted_cost_no_byte() {
    let (mut source, mut target) = pair();
    let talk = talk(&source, &target, &target.address());
    let monitor = talk.monitor.clone();
    let chaos = async {
        for (n, host) in [(1, &mut target), (2, &mut source)] {
            carried(&monitor, BYTES * n / 4).await;
            host.kill().await;
            let mut state = monitor.state();
            timeout(PATIENCE, state.wait_for(|s| *s == State::Reconnecting))
                .await
                .expect("in time")
                .expect("the stream lives");
            host.restart();
        }
    };
    let (summaries, ()) = tokio::join!(numbers_pass(talk, COUNT), chaos);
    let (a, b) = summaries;
    assert_eq!((a.sent, a.received, b.sent, b.received), (BYTES, BYTES, BYTES, BYTES));
    assert_eq!(a.reconnects, 2);
    assert!(a.resent <= 2 << 20, "more was sent again than is buffered: {a:?}");
}

#[tokio::test]
async fn a_link_cut_at_any_place_costs_no_byte() {
    let (source, target) = pair();
    let listen = "127.0.0.4:0".parse().expect("an address");
    let relay = DelayRelay::start(listen, target.listen, Duration::from_millis(2), None).await;
    let relay = relay.expect("the relay listens");
    let talk = talk(&source, &target, &relay.local_addr().to_string());
    let chaos = async {
        // Within the handshake, within the preface, and later.
        for bytes in [100, 1_900, 2_600, 3_100, 50_000, 2_000_000] {
            relay.cut_after(bytes);
            timeout(PATIENCE, relay.is_cut()).await.expect("in time");
            relay.restore();
        }
    };
    let (summaries, ()) = tokio::join!(numbers_pass(talk, COUNT), chaos);
    assert_eq!((summaries.0.sent, summaries.1.sent), (BYTES, BYTES));
    let counters = [source.gateway().counters(), target.gateway().counters()];
    let migrations: Vec<BTreeMap<_, _>> = counters.into_iter().map(|c| c.migrations).collect();
    assert!(migrations[0]["m1"].sent >= BYTES && migrations[0]["m1"].received >= BYTES);
    assert!(migrations[1]["m1"].received >= BYTES);
}

#[tokio::test]
async fn a_long_link_is_measured_and_not_taken_for_a_dead_one() {
    let (source, target) = pair();
    let listen = "127.0.0.4:0".parse().expect("an address");
    let delay = Duration::from_millis(50);
    let relay = DelayRelay::start(listen, target.listen, delay, None).await.expect("listens");
    let talk = talk(&source, &target, &relay.local_addr().to_string());
    let monitor = talk.monitor.clone();
    let (a, b) = numbers_pass(talk, 1 << 16).await;
    assert_eq!((a.reconnects, b.reconnects), (0, 0));
    let rtt = monitor.rtt().expect("measured");
    assert!(rtt >= 2 * delay, "{rtt:?}");
}
