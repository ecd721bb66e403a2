//! A serial port's two ends: QEMU writes to the launcher, the launcher to any
//! number of clients, with what was said before they came.
//!
//! The guest never waits for a client: one that reads too slowly is dropped.

use std::collections::VecDeque;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{broadcast, mpsc};

/// What a new client is shown of the past.
const SCROLLBACK: usize = 64 << 10;
/// Chunks that a client may lag behind before it is dropped.
const LAG: usize = 1024;
/// Clients of one port at a time.
const MAX_CLIENTS: usize = 16;

/// A serial port.
#[derive(Debug)]
pub struct Console {
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    scrollback: Mutex<VecDeque<u8>>,
    said: broadcast::Sender<Arc<[u8]>>,
    typed: mpsc::Sender<Vec<u8>>,
}

impl Console {
    /// Opens a port: QEMU connects to `<name>.qemu`, clients to `<name>.sock`,
    /// both in `folder`.
    ///
    /// # Errors
    /// When a socket cannot be made there.
    pub fn open(folder: &Path, name: &str) -> io::Result<Self> {
        let qemu = channel::socket::bind_beneath(folder, &crate::qemu::serial_socket(name))?;
        let clients = channel::socket::bind_beneath(folder, &format!("{name}.sock"))?;
        let (said, _) = broadcast::channel(LAG);
        let (typed, input) = mpsc::channel(64);
        let scrollback = Mutex::new(VecDeque::new());
        let shared = Arc::new(Shared { scrollback, said, typed });
        let tasks = vec![
            tokio::spawn(serve_qemu(qemu, shared.clone(), input)),
            tokio::spawn(serve_clients(clients, shared)),
        ];
        Ok(Self { tasks })
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

async fn serve_qemu(
    listener: UnixListener,
    shared: Arc<Shared>,
    mut input: mpsc::Receiver<Vec<u8>>,
) {
    // One QEMU after another: a second attempt has a new one.
    while let Ok((stream, _)) = listener.accept().await {
        let (mut from, mut to) = stream.into_split();
        let hear = async {
            let mut buffer = vec![0; 4096];
            while let Ok(n @ 1..) = from.read(&mut buffer).await {
                shared.hear(&buffer[..n]);
            }
        };
        // N.B. beside the reading: a guest that takes no input must not block its own output.
        let speak = async {
            while let Some(bytes) = input.recv().await {
                if to.write_all(&bytes).await.is_err() {
                    break;
                }
            }
        };
        tokio::select! { () = hear => {}, () = speak => {} }
    }
}

impl Shared {
    fn hear(&self, bytes: &[u8]) {
        let mut scrollback = self.scrollback.lock().unwrap_or_else(PoisonError::into_inner);
        scrollback.extend(bytes);
        let excess = scrollback.len().saturating_sub(SCROLLBACK);
        scrollback.drain(..excess);
        // N.B. under the lock, so that a client that comes now misses nothing and hears nothing twice.
        let _ = self.said.send(bytes.into());
    }

    fn join(&self) -> (Vec<u8>, broadcast::Receiver<Arc<[u8]>>) {
        let scrollback = self.scrollback.lock().unwrap_or_else(PoisonError::into_inner);
        (scrollback.iter().copied().collect(), self.said.subscribe())
    }
}

async fn serve_clients(listener: UnixListener, shared: Arc<Shared>) {
    let mut clients = tokio::task::JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        while clients.try_join_next().is_some() {}
        if clients.len() < MAX_CLIENTS {
            clients.spawn(serve_client(stream, shared.clone()));
        }
    }
}

async fn serve_client(stream: UnixStream, shared: Arc<Shared>) {
    let (past, mut said) = shared.join();
    let (mut from, mut to) = stream.into_split();
    if to.write_all(&past).await.is_err() {
        return;
    }
    let mut buffer = vec![0; 1024];
    loop {
        tokio::select! {
            heard = said.recv() => {
                // Lagged or closed: this client's time is over.
                let Ok(bytes) = heard else { return };
                if to.write_all(&bytes).await.is_err() {
                    return;
                }
            }
            read = from.read(&mut buffer) => match read {
                Ok(n @ 1..) => {
                    if shared.typed.send(buffer[..n].to_vec()).await.is_err() {
                        return;
                    }
                }
                // A client may close its writing half and go on listening.
                Ok(0) => return listen_only(said, to).await,
                _ => return,
            }
        }
    }
}

async fn listen_only(
    mut said: broadcast::Receiver<Arc<[u8]>>,
    mut to: tokio::net::unix::OwnedWriteHalf,
) {
    while let Ok(bytes) = said.recv().await {
        if to.write_all(&bytes).await.is_err() {
            return;
        }
    }
}
