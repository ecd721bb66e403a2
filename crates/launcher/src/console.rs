//! A serial port's two ends: QEMU writes to the launcher, the launcher to any
//! number of clients, with what was said before they came.
//!
//! ```text
//!                  ring: the last 64 KiB, by offset since the port was opened
//! QEMU --bytes--> [start .......................... end] --> client at its own offset
//!      <-input--------------------------------------------- any client
//! ```
//!
//! The guest never waits for a client: one that reads too slowly is dropped.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, watch};
use tokio::task::{AbortHandle, JoinHandle, JoinSet};

/// What a new client is shown of the past, and how far a client may lag behind.
const SCROLLBACK: usize = 64 << 10;
/// A client that takes nothing for so long is dropped.
const STALL: Duration = Duration::from_secs(10);
/// QEMU delivers single bytes; what comes within this time goes to a client at once.
const GATHER: Duration = Duration::from_millis(2);
/// Clients of one port at a time; one more takes the place of the oldest.
const MAX_CLIENTS: usize = 16;
/// Pieces of input that wait for the guest to take them.
const TYPED: usize = 16;

/// A serial port; closed when dropped.
#[derive(Debug)]
pub struct Console {
    tasks: [JoinHandle<()>; 2],
}

impl Console {
    /// Opens a port: QEMU connects to `<name>.qemu`, clients to `<name>.sock`,
    /// both in `folder`.
    ///
    /// # Errors
    /// When a socket cannot be made there.
    pub fn open(folder: &Path, name: &str) -> Result<Self, channel::socket::Error> {
        let qemu = channel::socket::bind_beneath(folder, &crate::qemu::serial_socket(name))?;
        let clients = channel::socket::bind_beneath(folder, &format!("{name}.sock"))?;
        let (typed, input) = mpsc::channel(TYPED);
        let port = Arc::new(Port { ring: Mutex::default(), end: watch::Sender::new(0), typed });
        Ok(Self {
            tasks: [
                tokio::spawn(serve_qemu(qemu, port.clone(), input)),
                tokio::spawn(serve_clients(clients, port)),
            ],
        })
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// What was said last.
#[derive(Debug, Default)]
struct Ring {
    bytes: VecDeque<u8>,
    /// Offset of the first of `bytes` since the port was opened.
    start: u64,
}

impl Ring {
    /// Returns the new end.
    fn push(&mut self, bytes: &[u8]) -> u64 {
        self.bytes.extend(bytes);
        let excess = self.bytes.len().saturating_sub(SCROLLBACK);
        self.bytes.drain(..excess);
        self.start += excess as u64;
        self.start + self.bytes.len() as u64
    }

    fn all(&self) -> (u64, Vec<u8>) {
        (self.start, self.bytes.iter().copied().collect())
    }

    /// All from `offset` on; None when some of it is gone.
    fn from(&self, offset: u64) -> Option<Vec<u8>> {
        let skip = usize::try_from(offset.checked_sub(self.start)?).ok()?;
        Some(self.bytes.iter().skip(skip).copied().collect())
    }
}

/// What QEMU's side and the clients share.
#[derive(Debug)]
struct Port {
    ring: Mutex<Ring>,
    /// Where the ring ends.
    end: watch::Sender<u64>,
    typed: mpsc::Sender<Vec<u8>>,
}

impl Port {
    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn hear(&self, mut qemu: OwnedReadHalf) {
        let mut buffer = vec![0; 4096];
        while let Ok(n @ 1..) = qemu.read(&mut buffer).await {
            let end = self.ring().push(&buffer[..n]);
            self.end.send_replace(end);
        }
    }

    /// Shows a client all that is in the ring and all that comes.
    async fn show(&self, mut client: OwnedWriteHalf) {
        let mut end = self.end.subscribe();
        let (mut at, past) = self.ring().all();
        let mut unseen = Some(past);
        while let Some(bytes) = unseen {
            at += bytes.len() as u64;
            match tokio::time::timeout(STALL, client.write_all(&bytes)).await {
                Ok(Ok(())) => {}
                _ => return,
            }
            if end.wait_for(|end| *end > at).await.is_err() {
                return;
            }
            tokio::time::sleep(GATHER).await;
            unseen = self.ring().from(at);
        }
    }

    /// Until the client has no more to say; false: it is gone.
    async fn listen(&self, mut client: OwnedReadHalf) -> bool {
        let mut buffer = [0; 1024];
        loop {
            match client.read(&mut buffer).await {
                Ok(0) => return true,
                Ok(n) if self.typed.send(buffer[..n].to_vec()).await.is_ok() => {}
                _ => return false,
            }
        }
    }
}

async fn serve_qemu(listener: UnixListener, port: Arc<Port>, mut input: mpsc::Receiver<Vec<u8>>) {
    // One QEMU after another: a second attempt has a new one.
    while let Ok((stream, _)) = listener.accept().await {
        let (from, mut to) = stream.into_split();
        // What was typed while nobody was there is lost, as on any serial line.
        while input.try_recv().is_ok() {}
        // N.B. beside the hearing: a guest that takes no input must not block its own output.
        let speak = async {
            while let Some(bytes) = input.recv().await {
                if to.write_all(&bytes).await.is_err() {
                    break;
                }
            }
        };
        tokio::select! { () = port.hear(from) => {}, () = speak => {} }
    }
}

async fn serve_clients(listener: UnixListener, port: Arc<Port>) {
    let mut clients = JoinSet::new();
    let mut by_age: VecDeque<AbortHandle> = VecDeque::new();
    while let Ok((stream, _)) = listener.accept().await {
        while clients.try_join_next().is_some() {}
        by_age.retain(|client| !client.is_finished());
        if by_age.len() >= MAX_CLIENTS
            && let Some(oldest) = by_age.pop_front()
        {
            oldest.abort();
        }
        by_age.push_back(clients.spawn(serve_client(stream, port.clone())));
    }
}

async fn serve_client(stream: UnixStream, port: Arc<Port>) {
    let (from, to) = stream.into_split();
    let show = port.show(to);
    tokio::pin!(show);
    tokio::select! {
        () = &mut show => {}
        // A client may end its own speech and go on listening.
        more = port.listen(from) => if more { show.await }
    }
}
