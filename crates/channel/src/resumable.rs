//! A reliable byte stream between two launchers, over links that may be cut.
//!
//! ```text
//! user --- run ===== link 1 ==X            run --- user
//!            \====== link 2 ==============/
//! ```
//!
//! What was sent stays in a bounded buffer until the other side has *delivered* it to its
//! user. On every link both sides first tell how much they have, and the rest is sent
//! again: to both users a cut is a stall, nothing is lost, doubled or reordered. When the buffer is full the user waits. Pings notice a silent link.
//!
//! The side that has role [`Role::Dialing`] makes links, again and again until its
//! deadline; the other waits for them, and a new link replaces the one it has.
//!
//! At the end both sides say `Bye`. A side that has delivered and been told everything,
//! but hears no `Bye`, waits a little ([`Config::linger`]) and then ends well.

mod frame;
mod io;
mod messages;
mod queue;
mod state;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, timeout_at};

use io::{Ended, Shared};
pub use messages::{MAX_MESSAGE, MessageReceiver, MessageSender, Messages};

/// Which side makes the links.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Calls [`Links::next`] again, with a growing pause, after a failure.
    Dialing,
    /// Waits in [`Links::next`], also while it has a link: a new one replaces the old.
    Accepting,
}

/// Where links come from.
pub trait Links: Send {
    /// One connection.
    type Link: AsyncRead + AsyncWrite + Send + Unpin;

    /// A fresh link. Must be cancel safe: it is dropped and called again at any time.
    fn next(&mut self) -> impl Future<Output = Result<Self::Link, LinkError>> + Send;
}

/// Links as they are accepted elsewhere, sent through a queue.
impl<L: AsyncRead + AsyncWrite + Send + Unpin> Links for mpsc::Receiver<L> {
    type Link = L;

    async fn next(&mut self) -> Result<L, LinkError> {
        let closed = || LinkError::Fatal("no more connections are accepted".into());
        self.recv().await.ok_or_else(closed)
    }
}

/// Why there is no link.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LinkError {
    /// The next try may succeed.
    #[error("{0}")]
    Transient(String),
    /// None will.
    #[error("{0}")]
    Fatal(String),
}

/// Shares a rate with others: memory and disks draw from one bucket.
pub trait Limiter: Send + Sync {
    /// Waits until `n` bytes may be sent.
    fn take(&self, n: u64) -> Pin<Box<dyn Future<Output = ()> + Send + '_>>;
}

/// How a stream is carried.
#[derive(Clone)]
pub struct Config {
    /// Which side this is.
    pub role: Role,
    /// Where others see how it goes.
    pub monitor: Monitor,
    /// Limits what is sent for the first time; what is sent again is not counted.
    pub limiter: Option<Arc<dyn Limiter>>,
    /// Bytes buffered each way, at most. To fill a link it takes bandwidth x RTT.
    pub buffer: u64,
    /// How long to be without a link, at the beginning and after each cut.
    pub reconnect: Duration,
    /// Between two pings.
    pub ping: Duration,
    /// A link on which nothing comes for so long is cut.
    pub silence: Duration,
    /// The first and the longest pause between two tries.
    pub backoff: (Duration, Duration),
    /// How long to wait for the peer's last word once everything is delivered.
    pub linger: Duration,
}

impl Config {
    /// The defaults: 16 MiB buffered, a minute without a link, five seconds of silence.
    pub fn new(role: Role) -> Self {
        Self {
            role,
            monitor: Monitor::new(),
            limiter: None,
            buffer: 16 << 20,
            reconnect: Duration::from_secs(60),
            ping: Duration::from_secs(1),
            silence: Duration::from_secs(5),
            backoff: (Duration::from_millis(50), Duration::from_secs(2)),
            linger: Duration::from_secs(5),
        }
    }
}

impl std::fmt::Debug for Config {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { role, buffer, reconnect, .. } = self;
        write!(f, "Config({role:?}, {buffer} bytes, {reconnect:?})")
    }
}

/// Whether there is a link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// Bytes flow.
    Connected,
    /// There is none, or the peer has not spoken on it yet.
    Reconnecting,
    /// There will be none: the stream has failed, for this reason.
    Lost(String),
    /// The stream has ended as it should.
    Ended,
}

/// A stream seen from outside; clones see the same stream.
#[derive(Debug, Clone)]
pub struct Monitor(Arc<Meter>);

#[derive(Debug)]
struct Meter {
    state: watch::Sender<State>,
    /// In microseconds; 0 is unknown.
    rtt: AtomicU64,
    buffered: AtomicU64,
    sent: AtomicU64,
    received: AtomicU64,
    reconnects: AtomicU64,
}

impl Default for Monitor {
    fn default() -> Self {
        Self::new()
    }
}

impl Monitor {
    /// For one stream.
    pub fn new() -> Self {
        Self(Arc::new(Meter {
            state: watch::Sender::new(State::Reconnecting),
            rtt: AtomicU64::new(0),
            buffered: AtomicU64::new(0),
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
            reconnects: AtomicU64::new(0),
        }))
    }

    /// The state, and its changes.
    pub fn state(&self) -> watch::Receiver<State> {
        self.0.state.subscribe()
    }

    /// The last round trip measured, queueing on the way included.
    pub fn rtt(&self) -> Option<Duration> {
        match self.0.rtt.load(Ordering::Relaxed) {
            0 => None,
            micros => Some(Duration::from_micros(micros)),
        }
    }

    /// Bytes taken from the user that the peer's user does not have yet. They count in a
    /// predicted downtime.
    pub fn buffered(&self) -> u64 {
        self.0.buffered.load(Ordering::Relaxed)
    }

    /// Bytes taken from the user.
    pub fn sent(&self) -> u64 {
        self.0.sent.load(Ordering::Relaxed)
    }

    /// Bytes delivered to the user.
    pub fn received(&self) -> u64 {
        self.0.received.load(Ordering::Relaxed)
    }

    /// Links after the first.
    pub fn reconnects(&self) -> u64 {
        self.0.reconnects.load(Ordering::Relaxed)
    }

    fn set(&self, state: State) {
        self.0.state.send_if_modified(|now| {
            let changed = *now != state;
            *now = state;
            changed
        });
    }
}

/// What a stream carried that ended well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Summary {
    /// Bytes from the user here to the user there.
    pub sent: u64,
    /// Bytes the other way.
    pub received: u64,
    /// Bytes that were sent again after a cut.
    pub resent: u64,
    /// Links after the first.
    pub reconnects: u64,
}

/// Why a stream failed. The user's side was dropped when it did.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No link in time.
    #[error("no connection to the peer for {waited:?}: {reason}")]
    Lost {
        /// How long it was tried.
        waited: Duration,
        /// Why the last link ended, or the last try failed.
        reason: String,
    },
    /// No link will be had.
    #[error("the connection to the peer cannot be made again: {0}")]
    Refused(String),
    /// The user here went away before the end.
    #[error("this side's end of the stream failed: {0}")]
    Local(String),
    /// The user there did.
    #[error("the peer's end of the stream failed: {0}")]
    Peer(String),
    /// The peer broke the protocol, or lost its memory.
    #[error("the peer broke the stream's protocol: {0}; were both sides started together?")]
    Protocol(String),
}

/// Carries `local`'s bytes to the peer, and the peer's to `local`, until both have ended.
pub async fn run<S, L>(local: S, links: L, config: Config) -> Result<Summary, Error>
where
    S: AsyncRead + AsyncWrite + Send,
    L: Links,
{
    let shared = Shared::new(&config);
    let (reader, writer) = tokio::io::split(local);
    let user = async {
        tokio::join!(
            io::read_user(&shared, reader),
            io::write_user(&shared, writer),
            io::grant(&shared, config.limiter.as_deref()),
        );
        // The stream ends with its links, not with its user.
        std::future::pending().await
    };
    let carried = tokio::select! {
        carried = carry(&shared, links, &config) => carried,
        carried = user => carried,
    };
    config.monitor.set(match &carried {
        Ok(()) => State::Ended,
        Err(e) => State::Lost(e.to_string()),
    });
    carried.map(|()| shared.summary())
}

/// One link after the other, until the stream ends or a deadline passes.
async fn carry<L: Links>(shared: &Shared, mut links: L, config: &Config) -> Result<(), Error> {
    let mut outage = Outage::begin("there never was a connection".into(), config);
    let mut replacement = None;
    loop {
        let link = match replacement.take() {
            Some(link) => link,
            None => match outage.next_link(shared, &mut links, config).await? {
                Some(link) => link,
                None => return Ok(()),
            },
        };
        let ended = tokio::select! {
            ended = io::session(shared, link, config) => ended,
            link = replacing(&mut links, config) => {
                replacement = Some(link);
                Ended::Broken("a new connection took its place".into())
            }
        };
        config.monitor.set(State::Reconnecting);
        let reason = match ended {
            Ended::Done => return Ok(()),
            Ended::Failed(error) => return Err(error),
            Ended::Broken(reason) => reason,
        };
        tracing::debug!(%reason, "a link was cut");
        if shared.lock().resumed() {
            outage = Outage::begin(reason, config);
        } else {
            // It never spoke: no better than one that could not be had.
            outage.reason = reason;
            outage.pause(config).await;
        }
    }
}

/// The time without a link.
struct Outage {
    since: Instant,
    reason: String,
    pause: Duration,
}

impl Outage {
    fn begin(reason: String, config: &Config) -> Self {
        Self { since: Instant::now(), reason, pause: config.backoff.0 }
    }

    /// A link, or none when none is needed any more.
    async fn next_link<L: Links>(
        &mut self,
        shared: &Shared,
        links: &mut L,
        config: &Config,
    ) -> Result<Option<L::Link>, Error> {
        let complete = shared.lock().complete();
        let patience = if complete { config.linger } else { config.reconnect };
        let deadline = self.since + patience;
        let error = loop {
            // N.B. a timeout does not interrupt what is ready at once.
            if Instant::now() >= deadline {
                break Error::Lost { waited: patience, reason: self.reason.clone() };
            }
            match timeout_at(deadline, links.next()).await {
                Ok(Ok(link)) => return Ok(Some(link)),
                Ok(Err(LinkError::Fatal(text))) => break Error::Refused(text),
                Ok(Err(LinkError::Transient(text))) => {
                    self.reason = text;
                    self.pause(config).await;
                }
                Err(_) => {}
            }
        };
        // Once everything is delivered, the peer may have gone without a last word.
        if complete { Ok(None) } else { Err(error) }
    }

    /// Waits a little, and longer the next time.
    async fn pause(&mut self, config: &Config) {
        sleep(self.pause).await;
        self.pause = (self.pause * 2).min(config.backoff.1);
    }
}

/// The link that an accepting side gets while it has one.
async fn replacing<L: Links>(links: &mut L, config: &Config) -> L::Link {
    if config.role == Role::Dialing {
        return std::future::pending().await;
    }
    loop {
        match links.next().await {
            Ok(link) => return link,
            Err(LinkError::Transient(_)) => sleep(config.backoff.0).await,
            // The link there is may still do.
            Err(LinkError::Fatal(_)) => return std::future::pending().await,
        }
    }
}
