//! A resumable stream loses, doubles and reorders nothing, whatever is cut where.

use std::collections::VecDeque;
use std::future::Future;
use std::time::Duration;

use channel::resumable::{Config, Error, LinkError, Links, Messages, Role, State, Summary, run};
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf, duplex, split};
use tokio::sync::mpsc;
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_secs(60);

/// Where a link is cut: after so many bytes in one direction or the other.
#[derive(Debug, Clone, Copy)]
struct Cut {
    there: u64,
    back: u64,
}

/// Makes links in memory, each cut as planned; after the plan they hold.
struct Dialer {
    accepting: mpsc::Sender<DuplexStream>,
    plan: VecDeque<Cut>,
}

impl Links for Dialer {
    type Link = DuplexStream;

    async fn next(&mut self) -> Result<DuplexStream, LinkError> {
        let (near, near_end) = duplex(8 << 10);
        let (far, far_end) = duplex(8 << 10);
        let closed = |_| LinkError::Fatal("nobody accepts".into());
        self.accepting.send(far).await.map_err(closed)?;
        let cut = self.plan.pop_front().unwrap_or(Cut { there: u64::MAX, back: u64::MAX });
        tokio::spawn(carry_until(near_end, far_end, cut));
        Ok(near)
    }
}

async fn carry_until(near: DuplexStream, far: DuplexStream, cut: Cut) {
    let (near_reader, near_writer) = split(near);
    let (far_reader, far_writer) = split(far);
    // Whichever ends first takes the other with it.
    tokio::select! {
        () = carry(near_reader, far_writer, cut.there) => {}
        () = carry(far_reader, near_writer, cut.back) => {}
    }
}

async fn carry(mut from: ReadHalf<DuplexStream>, mut to: WriteHalf<DuplexStream>, mut budget: u64) {
    let mut buffer = vec![0; 4 << 10];
    while let Ok(n @ 1..) = from.read(&mut buffer).await {
        let n = budget.min(n as u64) as usize;
        if to.write_all(&buffer[..n]).await.is_err() {
            return;
        }
        budget -= n as u64;
        if budget == 0 {
            // What was carried is still there to be read when the link is cut.
            let _ = to.flush().await;
            return;
        }
    }
}

fn config(role: Role, buffer: u64) -> Config {
    Config {
        buffer,
        backoff: (Duration::from_millis(1), Duration::from_millis(5)),
        ping: Duration::from_millis(20),
        ..Config::new(role)
    }
}

type Carried = Result<Summary, Error>;

/// Two users joined by a resumable stream over links that are cut as planned.
fn stream(
    plan: Vec<Cut>,
    buffer: u64,
) -> (DuplexStream, DuplexStream, impl Future<Output = (Carried, Carried)>) {
    let (accepting, links) = mpsc::channel(1);
    let (user_a, a) = duplex(4 << 10);
    let (user_b, b) = duplex(4 << 10);
    let dialer = Dialer { accepting, plan: plan.into() };
    let dialing = tokio::spawn(run(a, dialer, config(Role::Dialing, buffer)));
    let waiting = tokio::spawn(run(b, links, config(Role::Accepting, buffer)));
    let both = async {
        let (a, b) = tokio::join!(dialing, waiting);
        (a.expect("no panic"), b.expect("no panic"))
    };
    (user_a, user_b, both)
}

/// Bytes that tell where they belong.
fn numbered(length: usize, salt: u8) -> Vec<u8> {
    (0..length).map(|i| (i * 31 + (i >> 8) * 7) as u8 ^ salt).collect()
}

/// Writes in pieces, ends, and reads what comes meanwhile to its end.
async fn exchange(user: DuplexStream, bytes: Vec<u8>, piece: usize) -> Vec<u8> {
    let (mut reader, mut writer) = split(user);
    let write = async {
        for piece in bytes.chunks(piece) {
            writer.write_all(piece).await.expect("the stream takes bytes");
        }
        writer.shutdown().await.expect("a half-close");
    };
    let mut got = Vec::new();
    let (_, read) = tokio::join!(write, reader.read_to_end(&mut got));
    read.expect("the stream gives bytes");
    got
}

fn block_on<F: Future>(future: F) -> F::Output {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime
        .expect("a runtime")
        .block_on(async { timeout(PATIENCE, future).await.expect("in time") })
}

fn cuts() -> impl Strategy<Value = Vec<Cut>> {
    let near = 1..200u64;
    let far = 1..40_000u64;
    let at = prop_oneof![near, far, Just(u64::MAX)];
    proptest::collection::vec((at.clone(), at), 0..8)
        .prop_map(|cuts| cuts.into_iter().map(|(there, back)| Cut { there, back }).collect())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..Default::default() })]

    #[test]
    fn nothing_is_lost_doubled_or_reordered_wherever_links_are_cut(
        plan in cuts(),
        lengths in (0..60_000usize, 0..60_000usize),
        pieces in (1..5_000usize, 1..5_000usize),
        buffer in prop_oneof![1..64u64, 1_000..20_000u64, Just(1u64 << 20)],
    ) {
        // A tiny buffer makes a round trip of every few bytes: fewer of them, then.
        let scale = if buffer < 64 { 64 } else { 1 };
        let sent = (numbered(lengths.0 / scale, 1), numbered(lengths.1 / scale, 2));
        let planned = plan.len() as u64;
        let (got, ended) = block_on(async {
            let (a, b, both) = stream(plan, buffer);
            let users = async {
                tokio::join!(
                    exchange(a, sent.0.clone(), pieces.0),
                    exchange(b, sent.1.clone(), pieces.1),
                )
            };
            tokio::join!(users, both)
        });
        prop_assert!(got.1 == sent.0, "the dialing user's bytes differ");
        prop_assert!(got.0 == sent.1, "the accepting user's bytes differ");
        let (a, b) = (ended.0.expect("ends well"), ended.1.expect("ends well"));
        prop_assert_eq!((a.sent, a.received), (b.received, b.sent));
        prop_assert!(a.reconnects <= planned && b.reconnects <= planned);
        prop_assert!(a.resent <= buffer * planned && b.resent <= buffer * planned);
    }
}

#[test]
fn one_side_ends_long_before_the_other() {
    block_on(async {
        let plan =
            vec![Cut { there: 5_000, back: u64::MAX }, Cut { there: u64::MAX, back: 30_000 }];
        let (mut a, mut b, both) = stream(plan, 10_000);
        a.shutdown().await.expect("a half-close");
        assert_eq!(b.read(&mut [0]).await.expect("the end"), 0);
        let sent = numbered(100_000, 3);
        let (got, _) = tokio::join!(
            async {
                let mut got = Vec::new();
                a.read_to_end(&mut got).await.expect("bytes");
                got
            },
            async {
                b.write_all(&sent).await.expect("bytes are taken");
                b.shutdown().await.expect("a half-close");
            }
        );
        assert!(got == sent, "the bytes differ");
        let (a, b) = both.await;
        assert!(a.is_ok() && b.is_ok(), "{a:?} {b:?}");
    });
}

#[test]
fn a_user_that_does_not_read_does_not_stop_the_other_direction() {
    block_on(async {
        let (a, b, both) = stream(Vec::new(), 10_000);
        let (mut a_reader, mut a_writer) = split(a);
        let (mut b_reader, mut b_writer) = split(b);
        // More than every buffer on the way holds: it stands still, as nobody reads it.
        let stuck = tokio::spawn(async move {
            b_writer.write_all(&numbered(200_000, 4)).await.expect("taken in the end");
            b_writer.shutdown().await.expect("a half-close");
        });
        let sent = numbered(500_000, 5);
        let copy = sent.clone();
        let writer = tokio::spawn(async move {
            a_writer.write_all(&copy).await.expect("bytes are taken");
            a_writer.shutdown().await.expect("a half-close");
        });
        let mut got = Vec::new();
        b_reader.read_to_end(&mut got).await.expect("bytes");
        assert!(got == sent, "the bytes differ");
        assert!(!stuck.is_finished());
        let mut rest = Vec::new();
        a_reader.read_to_end(&mut rest).await.expect("bytes");
        assert_eq!(rest.len(), 200_000);
        writer.await.expect("no panic");
        stuck.await.expect("no panic");
        let (a, b) = both.await;
        assert!(a.is_ok() && b.is_ok(), "{a:?} {b:?}");
    });
}

#[test]
fn a_silent_link_is_given_up_and_its_bytes_are_sent_again() {
    /// The first link swallows everything; the second holds.
    struct SilentFirst(Dialer, Vec<DuplexStream>);

    impl Links for SilentFirst {
        type Link = DuplexStream;

        async fn next(&mut self) -> Result<DuplexStream, LinkError> {
            if self.1.is_empty() {
                let (near, silent) = duplex(1 << 20);
                self.1.push(silent);
                return Ok(near);
            }
            self.0.next().await
        }
    }

    block_on(async {
        let (accepting, links) = mpsc::channel(1);
        let dialer = SilentFirst(Dialer { accepting, plan: VecDeque::new() }, Vec::new());
        let impatient =
            Config { silence: Duration::from_millis(100), ..config(Role::Dialing, 1 << 20) };
        let monitor = impatient.monitor.clone();
        let (user_a, a) = duplex(4 << 10);
        let (user_b, b) = duplex(4 << 10);
        let dialing = tokio::spawn(run(a, dialer, impatient));
        let waiting = tokio::spawn(run(b, links, config(Role::Accepting, 1 << 20)));
        let sent = numbered(100_000, 6);
        let (_, got) =
            tokio::join!(exchange(user_a, sent.clone(), 999), exchange(user_b, Vec::new(), 1));
        assert!(got == sent, "the bytes differ");
        dialing.await.expect("no panic").expect("ends well");
        waiting.await.expect("no panic").expect("ends well");
        assert_eq!(*monitor.state().borrow(), State::Ended);
        assert_eq!((monitor.sent(), monitor.buffered()), (100_000, 0));
        assert!(monitor.rtt().is_some());
    });
}

/// Dials nobody.
struct Nowhere(bool);

impl Links for Nowhere {
    type Link = DuplexStream;

    async fn next(&mut self) -> Result<DuplexStream, LinkError> {
        let text = "connection refused".to_owned();
        Err(if self.0 { LinkError::Fatal(text) } else { LinkError::Transient(text) })
    }
}

#[test]
fn a_stream_without_a_link_fails_at_its_deadline_or_at_a_refusal() {
    block_on(async {
        let (_user, a) = duplex(4 << 10);
        let mut config = config(Role::Dialing, 1 << 10);
        config.reconnect = Duration::from_millis(50);
        let monitor = config.monitor.clone();
        let error = run(a, Nowhere(false), config.clone()).await;
        let Err(Error::Lost { reason, .. }) = error else { panic!("{error:?}") };
        assert_eq!(reason, "connection refused");
        assert!(matches!(&*monitor.state().borrow(), State::Lost(_)));
        let (_user, a) = duplex(4 << 10);
        let error = run(a, Nowhere(true), config).await;
        assert!(matches!(error, Err(Error::Refused(_))), "{error:?}");
    });
}

#[test]
fn when_one_user_goes_away_the_other_is_told() {
    block_on(async {
        let (a, mut b, both) = stream(Vec::new(), 1 << 10);
        drop(a);
        assert_eq!(b.read(&mut [0]).await.expect("the end"), 0);
        // Bytes for a user that is gone.
        let written = b.write_all(&numbered(50_000, 7)).await;
        assert!(written.is_err(), "the stream swallowed bytes");
        let ended = both.await;
        assert!(matches!(ended, (Err(Error::Local(_)), Err(Error::Peer(_)))), "{ended:?}");
    });
}

#[test]
fn messages_arrive_whole_and_in_order_over_links_that_are_cut() {
    block_on(async {
        let plan = (1..10).map(|n| Cut { there: 100 * n, back: 90 * n }).collect();
        let (accepting, links) = mpsc::channel(1);
        let dialer = Dialer { accepting, plan };
        let (mut a, dialing) = Messages::over(dialer, config(Role::Dialing, 1 << 12));
        let (mut b, waiting) = Messages::over(links, config(Role::Accepting, 1 << 12));
        for n in 0..200usize {
            a.send(&numbered(n, 1)).await.expect("sent");
            assert_eq!(b.recv().await.expect("received"), Some(numbered(n, 1)));
            b.send(&numbered(n, 2)).await.expect("sent");
            assert_eq!(a.recv().await.expect("received"), Some(numbered(n, 2)));
        }
        assert!(a.send(&vec![0; channel::resumable::MAX_MESSAGE + 1]).await.is_err());
        a.close().await.expect("closed");
        assert_eq!(b.recv().await.expect("the end"), None);
        drop((a, b));
        dialing.await.expect("no panic").expect("ends well");
        waiting.await.expect("no panic").expect("ends well");
    });
}

#[test]
fn a_limiter_is_asked_for_every_byte_once_and_does_not_hold_back_pings() {
    use std::pin::Pin;
    use std::sync::Arc;
    use tokio::sync::Semaphore;

    struct Bucket(Semaphore);

    impl channel::resumable::Limiter for Bucket {
        fn take(&self, n: u64) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
            Box::pin(async move {
                self.0.acquire_many(n as u32).await.expect("open").forget();
            })
        }
    }

    block_on(async {
        let bucket = Arc::new(Bucket(Semaphore::new(0)));
        let (accepting, links) = mpsc::channel(1);
        let plan = [Cut { there: 30_000, back: u64::MAX }].into();
        let limited = Config { limiter: Some(bucket.clone()), ..config(Role::Dialing, 1 << 20) };
        let monitor = limited.monitor.clone();
        let (user_a, a) = duplex(4 << 10);
        let (user_b, b) = duplex(4 << 10);
        let dialing = tokio::spawn(run(a, Dialer { accepting, plan }, limited));
        let waiting = tokio::spawn(run(b, links, config(Role::Accepting, 1 << 20)));
        let sent = numbered(100_000, 8);
        let users = tokio::spawn(async move {
            tokio::join!(
                exchange(user_a, numbered(100_000, 8), 999),
                exchange(user_b, Vec::new(), 1)
            )
            .1
        });
        // Nothing may pass yet, and still the link is measured.
        while monitor.rtt().is_none() || monitor.buffered() < 100_000 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        bucket.0.add_permits(100_000);
        assert!(users.await.expect("no panic") == sent, "the bytes differ");
        let summary = dialing.await.expect("no panic").expect("ends well");
        waiting.await.expect("no panic").expect("ends well");
        assert_eq!((summary.reconnects, bucket.0.available_permits()), (1, 0));
    });
}
