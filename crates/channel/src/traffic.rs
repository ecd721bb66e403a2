//! Bytes as they pass through a TCP socket, under TLS: in all, and for each migration.

use std::collections::BTreeMap;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::{Context, Poll};

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Migrations that are remembered; beyond, the one that ended longest ago is forgotten.
const REMEMBERED: usize = 1024;

/// Bytes on the wire, TLS and TCP payload included.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bytes {
    /// Sent to the peer.
    pub sent: u64,
    /// Received from the peer.
    pub received: u64,
}

/// What a gateway has done since it started.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// All bytes on the wire, handshakes and refused connections included.
    pub total: Bytes,
    /// Bytes of each migration, by its name.
    pub migrations: BTreeMap<String, Bytes>,
    /// Streams that were relayed.
    pub relayed: u64,
    /// Connections that were refused, or failed before they were relayed.
    pub refused: u64,
    /// Connections that stand now, whatever their state.
    pub open: u64,
}

#[derive(Debug, Default)]
struct Count {
    sent: AtomicU64,
    received: AtomicU64,
}

impl Count {
    fn add(&self, bytes: Bytes) {
        self.sent.fetch_add(bytes.sent, Ordering::Relaxed);
        self.received.fetch_add(bytes.received, Ordering::Relaxed);
    }

    fn get(&self) -> Bytes {
        Bytes {
            sent: self.sent.load(Ordering::Relaxed),
            received: self.received.load(Ordering::Relaxed),
        }
    }
}

/// The counters of one gateway.
#[derive(Debug, Default)]
pub(crate) struct Traffic {
    total: Count,
    relayed: AtomicU64,
    refused: AtomicU64,
    open: AtomicU64,
    migrations: Mutex<Migrations>,
}

#[derive(Debug, Default)]
struct Migrations {
    /// With the order in which they were last begun.
    counts: BTreeMap<String, (u64, Arc<Count>)>,
    begun: u64,
}

impl Traffic {
    /// Begins to count a connection.
    pub(crate) fn connection(self: &Arc<Self>) -> Arc<Connection> {
        self.open.fetch_add(1, Ordering::Relaxed);
        let own = Count::default();
        Arc::new(Connection { traffic: self.clone(), own, migration: OnceLock::new() })
    }

    pub(crate) fn count_refused(&self) {
        self.refused.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn snapshot(&self) -> Counters {
        let migrations = self.migrations.lock().unwrap_or_else(PoisonError::into_inner);
        Counters {
            total: self.total.get(),
            migrations: migrations.counts.iter().map(|(k, c)| (k.clone(), c.1.get())).collect(),
            relayed: self.relayed.load(Ordering::Relaxed),
            refused: self.refused.load(Ordering::Relaxed),
            open: self.open.load(Ordering::Relaxed),
        }
    }

    fn migration(&self, name: &str) -> Arc<Count> {
        let mut migrations = self.migrations.lock().unwrap_or_else(PoisonError::into_inner);
        migrations.begun += 1;
        let begun = migrations.begun;
        let counts = &mut migrations.counts;
        if !counts.contains_key(name) && counts.len() >= REMEMBERED {
            // Whose count nobody else holds has no connection any more.
            let ended = counts.iter().filter(|(_, (_, count))| Arc::strong_count(count) == 1);
            let oldest = ended.min_by_key(|(_, (begun, _))| *begun).map(|(name, _)| name.clone());
            if let Some(oldest) = oldest {
                counts.remove(&oldest);
            }
        }
        let entry = counts.entry(name.into()).or_default();
        entry.0 = begun;
        entry.1.clone()
    }
}

/// The count of one connection, until it ends.
#[derive(Debug)]
pub(crate) struct Connection {
    traffic: Arc<Traffic>,
    own: Count,
    migration: OnceLock<Arc<Count>>,
}

impl Connection {
    /// Counts it as a migration's from here on, and what has passed so far.
    pub(crate) fn relays(&self, migration: &str) {
        self.traffic.relayed.fetch_add(1, Ordering::Relaxed);
        let count = self.traffic.migration(migration);
        count.add(self.own.get());
        // A connection has one preface, so this is the first time.
        let _ = self.migration.set(count);
    }

    fn add(&self, bytes: Bytes) {
        self.traffic.total.add(bytes);
        match self.migration.get() {
            Some(migration) => migration.add(bytes),
            None => self.own.add(bytes),
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.traffic.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A socket whose bytes are counted.
#[derive(Debug)]
pub(crate) struct Counted<S> {
    pub(crate) io: S,
    pub(crate) connection: Arc<Connection>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Counted<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let result = Pin::new(&mut self.io).poll_read(cx, buf);
        let received = (buf.filled().len() - before) as u64;
        self.connection.add(Bytes { sent: 0, received });
        result
    }
}

impl<S: AsyncWrite + Unpin> Counted<S> {
    fn sent(&self, result: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if let Poll::Ready(Ok(n)) = &result {
            self.connection.add(Bytes { sent: *n as u64, received: 0 });
        }
        result
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Counted<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.io).poll_write(cx, buf);
        self.sent(result)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.io).poll_write_vectored(cx, bufs);
        self.sent(result)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
