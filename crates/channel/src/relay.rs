//! A long, narrow or broken link, for tests and benchmarks: a TCP relay that delays,
//! limits and cuts what passes.
//!
//! The delay is that of a pipe, not of a window: what is read at once is delivered at
//! once, later. The relay itself holds up to 256 MiB under way in each direction, and so
//! limits no sender that the link would not.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

/// Bytes and pieces under way in one direction.
const UNDER_WAY: usize = 256 << 20;
const PARCELS: usize = 64 << 10;
const READ: usize = 256 << 10;
/// What a limited link lets pass in one burst, as a router's queue does.
const BURST: Duration = Duration::from_millis(5);

/// A running relay; dropping it ends it, and every connection through it.
#[derive(Debug)]
pub struct DelayRelay {
    address: SocketAddr,
    link: Arc<Link>,
    _tasks: JoinSet<()>,
}

#[derive(Debug)]
struct Link {
    delay: Duration,
    /// Bytes per second, for each connection and direction.
    rate: Option<u64>,
    cut: watch::Sender<bool>,
    /// Bytes to deliver before the link is cut.
    budget: Mutex<Option<u64>>,
}

impl DelayRelay {
    /// Relays connections to `listen` on to `to`. Each direction takes `one_way_delay`
    /// and, for each connection, at most `rate` bytes per second.
    pub async fn start(
        listen: SocketAddr,
        to: SocketAddr,
        one_way_delay: Duration,
        rate: Option<u64>,
    ) -> io::Result<Self> {
        let listener = TcpListener::bind(listen).await?;
        let address = listener.local_addr()?;
        let link = Arc::new(Link {
            delay: one_way_delay,
            rate: rate.map(|r| r.max(1)),
            cut: watch::Sender::new(false),
            budget: Mutex::new(None),
        });
        let mut tasks = JoinSet::new();
        tasks.spawn(serve(link.clone(), listener, to));
        Ok(Self { address, link, _tasks: tasks })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Cuts every connection, with what is under way, and takes no others.
    pub fn cut(&self) {
        self.link.cut.send_replace(true);
    }

    /// Takes connections again.
    pub fn restore(&self) {
        *self.link.budget.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.link.cut.send_replace(false);
    }

    /// Cuts as [`DelayRelay::cut`] does once `bytes` more were delivered, in all
    /// connections and both directions together.
    pub fn cut_after(&self, bytes: u64) {
        *self.link.budget.lock().unwrap_or_else(PoisonError::into_inner) = Some(bytes);
    }

    /// Waits until it is cut.
    pub async fn is_cut(&self) {
        // The sender lives as long as this.
        let _ = self.link.cut.subscribe().wait_for(|cut| *cut).await;
    }
}

impl Link {
    /// How many of `n` bytes may be delivered.
    fn spend(&self, n: usize) -> usize {
        let mut budget = self.budget.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(left) = budget.as_mut() else { return n };
        let granted = usize::try_from(*left).unwrap_or(usize::MAX).min(n);
        *left -= granted as u64;
        granted
    }

    fn is_spent(&self) -> bool {
        *self.budget.lock().unwrap_or_else(PoisonError::into_inner) == Some(0)
    }
}

async fn serve(link: Arc<Link>, listener: TcpListener, to: SocketAddr) {
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        match listener.accept().await {
            // Accepted and dropped: the caller sees a cut, as on a real link.
            Ok(_) if *link.cut.borrow() => {}
            Ok((tcp, _)) => {
                connections.spawn(relay(link.clone(), tcp, to));
            }
            Err(error) => {
                tracing::warn!(%error, "the relay cannot accept a connection");
                tokio::time::sleep(BURST).await;
            }
        }
    }
}

async fn relay(link: Arc<Link>, near: TcpStream, to: SocketAddr) {
    let mut cut = link.cut.subscribe();
    let carried = async {
        let far = TcpStream::connect(to).await?;
        near.set_nodelay(true)?;
        far.set_nodelay(true)?;
        let (near_reader, near_writer) = near.into_split();
        let (far_reader, far_writer) = far.into_split();
        tokio::try_join!(
            one_way(&link, near_reader, far_writer),
            one_way(&link, far_reader, near_writer),
        )?;
        io::Result::Ok(())
    };
    tokio::select! {
        ended = carried => if let Err(error) = ended {
            tracing::debug!(%error, "a relayed connection ended");
        },
        _ = cut.wait_for(|cut| *cut) => {}
    }
}

/// Bytes under way; none is the end.
type Parcel = (Instant, Option<(Bytes, OwnedSemaphorePermit)>);

async fn one_way(link: &Link, from: OwnedReadHalf, to: OwnedWriteHalf) -> io::Result<()> {
    let (sender, receiver) = mpsc::channel(PARCELS);
    tokio::try_join!(take_in(link, from, sender), deliver(link, to, receiver))?;
    Ok(())
}

async fn take_in(
    link: &Link,
    mut from: OwnedReadHalf,
    under_way: mpsc::Sender<Parcel>,
) -> io::Result<()> {
    let room = Arc::new(Semaphore::new(UNDER_WAY));
    let mut buffer = BytesMut::new();
    let mut free = Instant::now();
    // A limited link is read in small pieces, so that its rate is even.
    let piece = link.rate.map_or(READ, |rate| READ.min((rate / 200).max(1) as usize));
    loop {
        buffer.reserve(piece);
        let n = from.read_buf(&mut bytes::BufMut::limit(&mut buffer, piece)).await?;
        let now = Instant::now();
        if let Some(rate) = link.rate {
            free = free.max(now) + Duration::from_secs_f64(n as f64 / rate as f64);
        }
        let due = link.delay + free.max(now).saturating_duration_since(now);
        let parcel = if n == 0 {
            None
        } else {
            let permit = room.clone().acquire_many_owned(n as u32).await;
            Some((buffer.split().freeze(), permit.map_err(io::Error::other)?))
        };
        let ended = parcel.is_none();
        if under_way.send((now + due, parcel)).await.is_err() || ended {
            return Ok(());
        }
        if link.rate.is_some() {
            sleep_until(free - BURST.min(free.saturating_duration_since(now))).await;
        }
    }
}

async fn deliver(
    link: &Link,
    mut to: OwnedWriteHalf,
    mut under_way: mpsc::Receiver<Parcel>,
) -> io::Result<()> {
    while let Some((due, parcel)) = under_way.recv().await {
        if due > Instant::now() {
            sleep_until(due).await;
        }
        let Some((bytes, _permit)) = parcel else { break };
        let granted = link.spend(bytes.len());
        to.write_all(&bytes[..granted]).await?;
        if link.is_spent() {
            link.cut.send_replace(true);
        }
    }
    to.shutdown().await
}
