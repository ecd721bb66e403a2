//! Character devices: where the guest's serial lines end.

use super::block::reason;
use super::error::Error;
use rustix::net::{SendFlags, send};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, PoisonError};

/// The longest path of a Unix socket, in bytes.
const LONGEST_PATH: usize = 107;

/// What a character device is connected to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Backend {
    /// Nothing.
    Null,
    /// A socket that the stub creates; clients come one at a time.
    Listen(String),
    /// A socket of somebody else.
    Connect(String),
    /// A file that is appended to.
    File(String),
}

/// A character device. Clones are handles.
#[derive(Debug, Clone, Default)]
pub struct Chardev {
    end: Arc<Mutex<End>>,
}

#[derive(Debug, Default)]
enum End {
    /// Nobody hears: what the guest says is lost, as with a real port.
    #[default]
    Deaf,
    Peer(UnixStream),
    File(File),
}

/// Takes what the peer sends to the guest.
pub type Sink = Box<dyn Fn(&[u8]) + Send>;

impl Chardev {
    /// Opens a device; `sink` hears its peer.
    ///
    /// # Errors
    /// As QEMU, when the socket cannot be made or reached.
    pub fn open(backend: &Backend, sink: Sink) -> Result<Self, Error> {
        let device = Self::default();
        match backend {
            Backend::Null => {}
            Backend::File(path) => {
                let file = OpenOptions::new().create(true).append(true).open(path);
                let fail = |e| Error::generic(format!("Unable to open '{path}': {}", reason(&e)));
                device.set(End::File(file.map_err(fail)?));
            }
            Backend::Listen(path) => {
                let listener = listen(path)?;
                let device = device.clone();
                std::thread::spawn(move || {
                    while let Ok((peer, _)) = listener.accept() {
                        device.serve(&peer, &sink);
                    }
                });
            }
            Backend::Connect(path) => {
                let peer = connect(path)?;
                // N.B. before the guest's first byte.
                device.set_peer(&peer);
                let device = device.clone();
                std::thread::spawn(move || device.serve(&peer, &sink));
            }
        }
        Ok(device)
    }

    fn set(&self, end: End) {
        *self.end.lock().unwrap_or_else(PoisonError::into_inner) = end;
    }

    fn set_peer(&self, peer: &UnixStream) {
        self.set(peer.try_clone().map_or(End::Deaf, End::Peer));
    }

    /// Hears one peer until it leaves.
    fn serve(&self, mut peer: &UnixStream, sink: &Sink) {
        self.set_peer(peer);
        let mut buffer = [0; 4096];
        while let Ok(n @ 1..) = peer.read(&mut buffer) {
            sink(&buffer[..n]);
        }
        self.set(End::Deaf);
    }

    /// Says as much of `bytes` as the peer takes at once; tells how much that was.
    pub fn say(&self, bytes: &[u8]) -> usize {
        let mut end = self.end.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *end {
            End::Deaf => bytes.len(),
            // A disk that is full loses the guest's words, not the guest.
            End::File(file) => file.write_all(bytes).map_or(bytes.len(), |()| bytes.len()),
            End::Peer(peer) => match send(&*peer, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)
            {
                Ok(n) => n,
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => 0,
                Err(_) => bytes.len(),
            },
        }
    }
}

/// Makes a listening socket, in place of an old one.
///
/// # Errors
/// As QEMU.
pub fn listen(path: &str) -> Result<UnixListener, Error> {
    too_long(path)?;
    let _ = std::fs::remove_file(path);
    let fail =
        |e: io::Error| Error::generic(format!("Failed to bind socket to {path}: {}", reason(&e)));
    UnixListener::bind(path).map_err(fail)
}

/// Connects to a socket.
///
/// # Errors
/// As QEMU.
pub fn connect(path: &str) -> Result<UnixStream, Error> {
    too_long(path)?;
    let fail =
        |e: io::Error| Error::generic(format!("Failed to connect to '{path}': {}", reason(&e)));
    UnixStream::connect(path).map_err(fail)
}

fn too_long(path: &str) -> Result<(), Error> {
    match path.len() <= LONGEST_PATH {
        true => Ok(()),
        false => Err(Error::generic(format!("UNIX socket path '{path}' is too long"))),
    }
}
