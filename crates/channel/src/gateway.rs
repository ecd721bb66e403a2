//! The one port of a host through which all its migration streams pass.
//!
//! ```text
//!  launcher --Dial--> gateway.sock | gateway |==TLS==> | gateway | vms/<vm>/streams.sock --> launcher
//!                                     source host          target host
//! ```
//!
//! A gateway keeps no state of any migration: it proves who the other gateway is, reads
//! the preface, connects the stream to the launcher that the preface names, and copies.
//! The launcher checks the token. A restarted gateway is therefore a cut link, no more.

mod dial;
mod incoming;
mod local;
mod probe;

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::io::BufReader;
use tokio::net::{TcpListener, TcpSocket, TcpStream, UnixListener};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use crate::client::DialError;
use crate::identity::{Identity, Role, SpiffeId, Trust};
use crate::tcp;
pub use crate::traffic::{Bytes, Counters};
use crate::traffic::{Connection, Counted, Traffic};
use crate::wire::GATEWAY_SOCKET;
use crate::{socket, tls};
pub use probe::Link;

/// TLS takes so much at once before it makes the writer wait.
const TLS_BUFFER: usize = 512 << 10;
/// Read from the socket at once: TLS by itself reads 4 KiB, which costs a call each.
const TCP_BUFFER: usize = 128 << 10;

/// An address that was left is given up once nobody has come for so long: longer than a launcher waits
/// for a link that was cut.
const RETIRED: Duration = Duration::from_secs(60);
/// How often that is looked at.
const LOOK: Duration = Duration::from_secs(1);

/// What is under TLS.
type Wire = BufReader<Counted<TcpStream>>;

fn wired(io: TcpStream, connection: Arc<Connection>) -> Wire {
    BufReader::with_capacity(TCP_BUFFER, Counted { io, connection })
}

/// What a [`Service`] answers, later.
pub type Answer<'a> = Pin<Box<dyn Future<Output = Value> + Send + 'a>>;

/// Answers requests that are not streams: the handler, behind the gateway.
pub trait Service: Send + Sync + 'static {
    /// Answers another host's handler. `peer` is proven; what it may ask is for the
    /// service to judge.
    fn peer<'a>(&'a self, peer: &'a SpiffeId, request: Value) -> Answer<'a>;

    /// Answers a process of this host and user.
    fn local(&self, request: Value) -> Answer<'_>;

    /// Answers in the place of a peer that a process of this host asks, where this service knows
    /// what the peer does: hosts of one cluster share their records. None: the peer is asked.
    fn instead_of<'a>(&'a self, _peer: &'a SpiffeId, _request: &'a Value) -> Option<Answer<'a>> {
        None
    }

    /// The folder below which the launcher of a VM is that takes part in a migration. None: the
    /// host's.
    fn folder(&self, _vm: &str, _migration: &str) -> Option<PathBuf> {
        None
    }
}

/// How a gateway is started.
pub struct Config {
    /// The migration address. Port 0 picks a free one; an unspecified address (`0.0.0.0`)
    /// is refused, since it would listen on every network of the host.
    pub listen: SocketAddr,
    /// The host's folder: `gateway.sock` is made in it, `vms/<vm>/streams.sock` looked up.
    pub host_dir: PathBuf,
    /// Who this gateway is; its role is handler.
    pub identity: Identity,
    /// Whose gateways may connect, and may be connected to.
    pub trust: Trust,
    /// Answers what is not a stream.
    pub service: Arc<dyn Service>,
    /// Bounds of time and number.
    pub limits: Limits,
}

/// Bounds of time and number; the default is right for production.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Streams and requests from other hosts at the same time; as many again locally.
    pub connections: usize,
    /// Connections from other hosts that have not said yet what they are.
    pub handshakes: usize,
    /// For a TCP connection, for a TLS handshake, and for a preface, each.
    pub handshake: Duration,
    /// For a launcher's or a service's answer.
    pub answer: Duration,
    /// A peer that acknowledges nothing for so long is dead.
    pub dead_peer: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 1024,
            handshakes: 64,
            handshake: Duration::from_secs(5),
            answer: Duration::from_secs(10),
            dead_peer: tcp::DEAD_PEER,
        }
    }
}

/// Why a gateway does not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `0.0.0.0` or `::`.
    #[error("{0} would listen on every network of this host; give the migration network's address")]
    Unspecified(SocketAddr),
    /// Credentials of another role.
    #[error("a gateway needs the credentials of a handler, not those of {0}")]
    NotAHandler(SpiffeId),
    /// The port cannot be had.
    #[error("cannot listen on {address}; is the address one of this host's, and the port free?")]
    Listen {
        /// Which.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The local socket cannot be had.
    #[error("the gateway's local socket cannot be made")]
    Socket(#[source] socket::Error),
    /// The credentials do not work.
    #[error("the gateway's credentials cannot be used")]
    Tls(#[source] tls::Error),
}

/// A running gateway. Dropping it cuts everything that it relays.
#[derive(Debug)]
pub struct Gateway {
    shared: Arc<Shared>,
    tasks: Mutex<JoinSet<()>>,
    /// Says to the listener that takes what is new that another does from now on.
    retire: Mutex<watch::Sender<bool>>,
}

/// A door of [`Gateway::open_door`].
#[derive(Debug)]
pub struct Door {
    _tasks: JoinSet<()>,
}

/// What all connections share.
struct Shared {
    /// Where it listens; connections to others come from there, too.
    listen: RwLock<SocketAddr>,
    host_dir: PathBuf,
    limits: Limits,
    service: Arc<dyn Service>,
    traffic: Arc<Traffic>,
    credentials: RwLock<(tls::Server, tls::Client)>,
    incoming: Arc<Semaphore>,
    local: Arc<Semaphore>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gateway").field("listen", &self.listen()).finish_non_exhaustive()
    }
}

impl Gateway {
    /// Listens, and serves until it is shut down or dropped. Needs a tokio runtime.
    pub fn start(config: Config) -> Result<Self, Error> {
        let Config { listen, host_dir, identity, trust, service, limits } = config;
        if listen.ip().is_unspecified() {
            return Err(Error::Unspecified(listen));
        }
        let credentials = RwLock::new(credentials(identity, trust)?);
        let at = |source| Error::Listen { address: listen, source };
        let tcp = bind(listen).map_err(at)?;
        let address = tcp.local_addr().map_err(at)?;
        let unix = socket::bind_beneath(&host_dir, GATEWAY_SOCKET).map_err(Error::Socket)?;
        let shared = Arc::new(Shared {
            listen: RwLock::new(address),
            host_dir,
            service,
            traffic: Arc::default(),
            credentials,
            incoming: Arc::new(Semaphore::new(limits.connections)),
            local: Arc::new(Semaphore::new(limits.connections)),
            limits,
        });
        let (retire, retired) = watch::channel(false);
        let mut tasks = JoinSet::new();
        tasks.spawn(serve_peers(shared.clone(), tcp, retired));
        tasks.spawn(serve_local(shared.clone(), shared.service.clone(), unix));
        tracing::info!(%address, "gateway listens");
        Ok(Self { shared, tasks: Mutex::new(tasks), retire: Mutex::new(retire) })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.shared.listen()
    }

    /// Listens elsewhere from now on; returns where. What stands goes on, and may come again where it
    /// was: that address is given up once nobody has been there for a minute.
    ///
    /// # Errors
    /// [`Error`]; then it listens where it did.
    pub fn relocate(&self, listen: SocketAddr) -> Result<SocketAddr, Error> {
        if listen.ip().is_unspecified() {
            return Err(Error::Unspecified(listen));
        }
        let at = |source| Error::Listen { address: listen, source };
        let tcp = bind(listen).map_err(at)?;
        let address = tcp.local_addr().map_err(at)?;
        let (retire, retired) = watch::channel(false);
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        tasks.spawn(serve_peers(self.shared.clone(), tcp, retired));
        let mut current = self.retire.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut *current, retire).send_replace(true);
        *self.shared.listen.write().unwrap_or_else(PoisonError::into_inner) = address;
        tracing::info!(%address, "gateway listens there now");
        Ok(address)
    }

    /// What it has done since it started.
    pub fn counters(&self) -> Counters {
        self.shared.traffic.snapshot()
    }

    /// Takes new credentials for connections from now on; those that stand go on.
    pub fn renew(&self, identity: Identity, trust: Trust) -> Result<(), Error> {
        let new = credentials(identity, trust)?;
        *self.shared.credentials.write().unwrap_or_else(PoisonError::into_inner) = new;
        Ok(())
    }

    /// Opens a door of its own for one launcher: a socket in `folder`, whose requests `service`
    /// answers, and through which it reaches other hosts. Shut when it is dropped.
    pub fn open_door(&self, folder: &Path, service: Arc<dyn Service>) -> Result<Door, Error> {
        let unix = socket::bind_beneath(folder, GATEWAY_SOCKET).map_err(Error::Socket)?;
        let mut tasks = JoinSet::new();
        tasks.spawn(serve_local(self.shared.clone(), service, unix));
        Ok(Door { _tasks: tasks })
    }

    /// Asks the service behind another gateway, in this one's own name.
    ///
    /// # Errors
    /// [`DialError`].
    pub async fn ask(
        &self,
        address: &str,
        expect: &SpiffeId,
        request: &Value,
    ) -> Result<Value, DialError> {
        Ok(dial::ask(&self.shared, address, expect, request).await?)
    }

    /// Measures the link to another gateway, with up to 64 MiB and for about a second.
    ///
    /// # Errors
    /// [`DialError`].
    pub async fn probe(&self, address: &str, expect: &SpiffeId) -> Result<Link, DialError> {
        Ok(probe::probe(&self.shared, address, expect).await?)
    }

    /// Finds out whether another gateway can be reached, and believes this one; returns how long it takes
    /// to answer.
    ///
    /// # Errors
    /// [`DialError`].
    pub async fn reach(&self, address: &str, expect: &SpiffeId) -> Result<Duration, DialError> {
        Ok(probe::open(&self.shared, address, expect).await?.1)
    }

    /// Stops listening and cuts what is relayed. Its port is free afterwards.
    pub async fn shutdown(self) {
        let mut tasks = self.tasks.into_inner().unwrap_or_else(PoisonError::into_inner);
        tasks.shutdown().await;
    }
}

impl Shared {
    fn listen(&self) -> SocketAddr {
        *self.listen.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn server(&self) -> tls::Server {
        self.credentials.read().unwrap_or_else(PoisonError::into_inner).0.clone()
    }

    fn client(&self) -> tls::Client {
        self.credentials.read().unwrap_or_else(PoisonError::into_inner).1.clone()
    }
}

fn credentials(identity: Identity, trust: Trust) -> Result<(tls::Server, tls::Client), Error> {
    if identity.id().role() != Role::Handler {
        return Err(Error::NotAHandler(identity.id().clone()));
    }
    let server =
        tls::Server::new(&identity, trust.clone(), &[Role::Handler]).map_err(Error::Tls)?;
    Ok((server, tls::Client::new(identity, trust)))
}

fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // A gateway that is restarted takes its port again although old connections linger.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(1024)
}

/// Takes connections, once it is `retired` until nobody comes any more.
async fn serve_peers(
    shared: Arc<Shared>,
    listener: TcpListener,
    mut retired: watch::Receiver<bool>,
) {
    let mut connections = JoinSet::new();
    let mut quiet = Instant::now();
    let handshakes = Arc::new(Semaphore::new(shared.limits.handshakes));
    loop {
        while connections.try_join_next().is_some() {}
        // Whoever comes while all are taken waits in the listener's queue.
        let Ok(handshake) = handshakes.clone().acquire_owned().await else { return };
        let is_retired = *retired.borrow_and_update();
        if !connections.is_empty() {
            quiet = Instant::now();
        } else if is_retired && quiet.elapsed() > RETIRED {
            return;
        }
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((tcp, from)) => {
                    connections.spawn(incoming::serve(shared.clone(), tcp, from, handshake));
                }
                Err(error) => pause_after(&error).await,
            },
            Ok(()) = retired.changed() => quiet = Instant::now(),
            () = tokio::time::sleep(LOOK), if is_retired => {}
        }
    }
}

async fn serve_local(shared: Arc<Shared>, service: Arc<dyn Service>, listener: UnixListener) {
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok(permit) = shared.local.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((unix, _)) => {
                connections.spawn(local::serve(shared.clone(), service.clone(), unix, permit));
            }
            Err(error) => pause_after(&error).await,
        }
    }
}

/// `accept` fails when descriptors run out: some may be free again soon.
async fn pause_after(error: &io::Error) {
    tracing::warn!(%error, "cannot accept a connection; trying again");
    tokio::time::sleep(Duration::from_millis(50)).await;
}
