//! The API role's way in: what persons do to a guest, and its console.
//!
//! Over mTLS, one request for each connection: a line of JSON, answered by a line; after the answer
//! to a console's request its bytes follow, both ways, and after that to a measurement or a forecast one
//! more line.

use super::measure::{self, Sample};
use super::moves::{self, Outlook, Plan};
use super::{Error, Shared, doors, guests};
use api::conditions::{self, types};
use channel::identity::{Credentials, Role, SpiffeId};
use channel::tls;
use kube::ResourceExt;
use kube::runtime::reflector::ObjectRef;
use launcher::client::Client as Launcher;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};

/// For a handshake, and for a request.
const PATIENCE: Duration = Duration::from_secs(10);
/// A request is a line of this many bytes at most.
const LINE: u64 = 16 << 10;
/// What guests have used is a line of this many bytes at most.
const SAMPLES: u64 = 16 << 20;
/// Whoever collects metrics waits for 10 s, most often.
const MEASURED: Duration = Duration::from_secs(6);
/// A guest and a link are watched for a second each; a slow link takes longer.
const FORECAST: Duration = Duration::from_secs(25);
/// What was done to a guest is shown by its VMI; it is answered then at the latest.
const SHOWN: Duration = Duration::from_secs(5);
/// Connections at once: more wait.
const CONNECTIONS: usize = 256;

/// What can be done to a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Act {
    /// Let it stand still.
    Pause,
    /// Let it go on.
    Unpause,
    /// Begin it anew.
    Reset,
    /// Ask it to begin anew: as if its power button was pressed.
    SoftReboot,
    /// Speak with it.
    Console,
    /// Tell what all guests of the node have used.
    Measure,
    /// Tell what a move of it would take.
    Forecast,
    /// Nothing: only answer.
    Answer,
}

/// A request.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ask {
    /// What.
    pub act: Act,
    /// The VMI's.
    #[serde(default)]
    pub namespace: String,
    /// The VMI's.
    #[serde(default)]
    pub name: String,
    /// Of a forecast: the move.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plan: Option<Plan>,
}

/// An answer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Told {
    /// HTTP's.
    pub code: u16,
    /// For people, unless it is done.
    #[serde(default)]
    pub message: String,
}

/// A way in that is open.
pub struct Served {
    /// Where.
    pub address: SocketAddr,
    listener: TcpListener,
    tls: tls::Server,
    credentials: watch::Receiver<Credentials>,
}

impl Served {
    /// Opens it.
    ///
    /// # Errors
    /// [`Error::Listen`], [`Error::Tls`].
    pub async fn open(shared: &Shared) -> Result<Self, Error> {
        let config = &shared.config;
        let listen = SocketAddr::new(config.listen.ip(), 0);
        let failed = |source| Error::Listen { node: config.node.clone(), address: listen, source };
        let listener = TcpListener::bind(listen).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let mut credentials = config.credentials.clone();
        let tls = server(&credentials.borrow_and_update()).map_err(Error::Tls)?;
        Ok(Self { address, listener, tls, credentials })
    }

    /// Takes new credentials, if there are any. Connections that stand go on.
    fn renew(&mut self) {
        if !self.credentials.has_changed().unwrap_or(false) {
            return;
        }
        match server(&self.credentials.borrow_and_update()) {
            Ok(tls) => self.tls = tls,
            Err(error) => {
                tracing::warn!("new credentials cannot be used: {}", launcher::chain(&error));
            }
        }
    }

    /// Serves. Never ends by itself.
    pub async fn run(mut self, shared: Shared) {
        let room = Arc::new(Semaphore::new(CONNECTIONS));
        loop {
            let Ok(place) = room.clone().acquire_owned().await else { return };
            let Ok((stream, from)) = self.listener.accept().await else {
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            };
            self.renew();
            let (shared, tls) = (shared.clone(), self.tls.clone());
            tokio::spawn(async move {
                if let Err(error) = serve(&shared, &tls, stream).await {
                    tracing::debug!(%from, %error, "a request to the handler ended");
                }
                drop(place);
            });
        }
    }
}

fn server(credentials: &Credentials) -> Result<tls::Server, tls::Error> {
    let roles = [Role::Api, Role::Synchronizer];
    tls::Server::new(&credentials.identity, credentials.trust.clone(), &roles)
}

/// Whether somebody may ask that. N.B. other clusters are believed, too, in what they say they are: but
/// guests of this one are not theirs.
fn may(own: &SpiffeId, peer: &SpiffeId, ask: &Ask) -> Result<(), Told> {
    let of_cluster = peer.cluster() == own.cluster();
    match peer.role() {
        Role::Api if of_cluster => Ok(()),
        Role::Synchronizer if of_cluster && ask.act == Act::Forecast => Ok(()),
        _ => Err(told(403, format!("{peer} may not ask that of {own}"))),
    }
}

async fn serve(shared: &Shared, tls: &tls::Server, stream: TcpStream) -> Result<(), String> {
    let shaken = tokio::time::timeout(PATIENCE, tls.accept(stream)).await;
    let (stream, peer) =
        shaken.map_err(|_| "no handshake in time")?.map_err(|e| launcher::chain(&e))?;
    let mut stream = BufReader::new(stream);
    let asked = tokio::time::timeout(PATIENCE, read_line::<Ask>(&mut stream, LINE)).await;
    let ask = asked.map_err(|_| "no request in time")??;
    if let Err(told) = may(&shared.config.id(), &peer, &ask) {
        write_line(&mut stream, &told).await?;
        let _ = stream.shutdown().await;
        return Ok(());
    }
    if ask.act == Act::Measure {
        let samples = measure::all(shared).await;
        write_line(&mut stream, &Told { code: 200, message: String::new() }).await?;
        write_line(&mut stream, &samples).await?;
        let _ = stream.shutdown().await;
        return Ok(());
    }
    if let Some(plan) = ask.plan.as_ref().filter(|_| ask.act == Act::Forecast) {
        let looked = match find(shared, &ask).await {
            Ok((_, launcher)) => {
                moves::look(shared, &launcher, plan).await.map_err(|why| told(503, why))
            }
            Err(told) => Err(told),
        };
        match looked {
            Ok(outlook) => {
                write_line(&mut stream, &told(200, "")).await?;
                write_line(&mut stream, &outlook).await?;
            }
            Err(told) => write_line(&mut stream, &told).await?,
        }
        let _ = stream.shutdown().await;
        return Ok(());
    }
    if ask.act == Act::Answer {
        write_line(&mut stream, &Told { code: 200, message: String::new() }).await?;
        let _ = stream.shutdown().await;
        return Ok(());
    }
    let (told, console) = match carry_out(shared, &ask).await {
        Ok(console) => (Told { code: 200, message: String::new() }, console),
        Err(told) => (told, None),
    };
    write_line(&mut stream, &told).await?;
    if let Some(mut console) = console {
        tokio::io::copy_bidirectional(&mut stream, &mut console)
            .await
            .map_err(|error| error.to_string())?;
    }
    let _ = stream.shutdown().await;
    Ok(())
}

fn told(code: u16, message: impl Into<String>) -> Told {
    Told { code, message: message.into() }
}

/// The launcher of the guest that is meant, and its pod's folder.
async fn find(shared: &Shared, ask: &Ask) -> Result<(PathBuf, Launcher), Told> {
    let key = (ask.namespace.clone(), ask.name.clone());
    let of = |pod: &Arc<k8s_openapi::api::core::v1::Pod>| guests::owner(pod).as_ref() == Some(&key);
    let mut pods: Vec<_> = shared.pods.state().into_iter().filter(of).collect();
    // N.B. of a guest that has just moved on this node there are two launchers: the owner's is asked first.
    let record = guests::get(&shared.owners, &key);
    let owner = record.and_then(|record| record.status.as_ref()?.pod.clone());
    pods.sort_by_key(|pod| Some(pod.name_any()) != owner);
    let none = || {
        told(404, format!("no guest of VMI {}/{} is on node {}", key.0, key.1, shared.config.node))
    };
    let vm = api::owner::vm_id(&key.0, &key.1);
    for pod in pods {
        let folder = doors::folder(&shared.config.pods(), &pod);
        let launcher = Launcher::new(&folder, &vm);
        if guests::launches(&pod) && launcher.status().await.is_ok() {
            return Ok((folder, launcher));
        }
    }
    Err(none())
}

/// Lets a guest stand still or go on. Its VMI says so when this is answered, so that whoever was answered
/// can ask for the opposite at once.
async fn stand(
    shared: &Shared,
    ask: &Ask,
    launcher: &Launcher,
) -> Result<launcher::status::Status, launcher::client::Error> {
    let paused = ask.act == Act::Pause;
    let done = if paused { launcher.pause().await? } else { launcher.resume().await? };
    let key = ObjectRef::new(&ask.name).within(&ask.namespace);
    let is_shown = || {
        let vmi = shared.vmis.get(&key);
        let status = vmi.as_ref().and_then(|vmi| vmi.status.as_ref());
        status.is_none_or(|s| conditions::is(&s.conditions, types::PAUSED) == paused)
    };
    let began = tokio::time::Instant::now();
    // The guest does as it was told in any case: that the API is slow is no failure.
    while !is_shown() && began.elapsed() < SHOWN {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(done)
}

async fn carry_out(shared: &Shared, ask: &Ask) -> Result<Option<tokio::net::UnixStream>, Told> {
    let (folder, launcher) = find(shared, ask).await?;
    let done = match ask.act {
        Act::Console => {
            let vm = api::owner::vm_id(&ask.namespace, &ask.name);
            let sockets = folder.join("vms").join(&vm);
            let socket = channel::socket::connect_beneath(&sockets, "console.sock");
            let stream = socket.await.map_err(|error| told(500, launcher::chain(&error)))?;
            return Ok(Some(stream));
        }
        Act::Pause | Act::Unpause => stand(shared, ask, &launcher).await,
        Act::Reset => launcher.reset().await,
        Act::Measure | Act::Answer => return Err(told(400, "this is asked of the handler")),
        Act::Forecast => return Err(told(400, "a forecast is that of a plan")),
        Act::SoftReboot => {
            return Err(told(501, "soft reboots are not built: use reset, or restart the VM"));
        }
    };
    done.map(|_| None)
        .map_err(|error| told(if error.is_conflict() { 409 } else { 500 }, launcher::chain(&error)))
}

async fn read_line<T: serde::de::DeserializeOwned>(
    stream: &mut (impl AsyncRead + AsyncBufReadExt + Unpin),
    most: u64,
) -> Result<T, String> {
    let mut line = String::new();
    let read = (&mut *stream).take(most).read_line(&mut line).await;
    read.map_err(|error| error.to_string())?;
    serde_json::from_str(&line).map_err(|error| format!("it makes no sense: {error}"))
}

async fn write_line(
    stream: &mut (impl AsyncWrite + Unpin),
    value: &impl Serialize,
) -> Result<(), String> {
    let mut line = serde_json::to_vec(value).map_err(|error| error.to_string())?;
    line.push(b'\n');
    stream.write_all(&line).await.map_err(|error| error.to_string())?;
    stream.flush().await.map_err(|error| error.to_string())
}

/// Asks a handler. After a console's request the stream is the console.
///
/// # Errors
/// What the handler said, or 503 when it cannot be reached.
pub async fn ask(
    client: &tls::Client,
    address: &str,
    handler: &SpiffeId,
    ask: &Ask,
) -> Result<impl AsyncBufReadExt + AsyncRead + AsyncWrite + Send + Unpin + use<>, Told> {
    let unreachable = |why: String| {
        told(503, format!("the handler of the guest's node cannot be reached at {address}: {why}"))
    };
    let work = async {
        let stream = TcpStream::connect(address).await.map_err(|e| e.to_string())?;
        let stream = client.connect(handler, stream).await.map_err(|e| launcher::chain(&e))?;
        let mut stream = BufReader::new(stream);
        write_line(&mut stream, ask).await?;
        let told: Told = read_line(&mut stream, LINE).await?;
        Ok::<_, String>((stream, told))
    };
    let (stream, answer) = tokio::time::timeout(PATIENCE * 2, work)
        .await
        .map_err(|_| unreachable("no answer in time".into()))?
        .map_err(unreachable)?;
    if answer.code == 200 { Ok(stream) } else { Err(answer) }
}

/// Asks a handler what its guests have used.
///
/// # Errors
/// What the handler said, or 503 when it cannot be reached or does not tell.
pub async fn measure(
    client: &tls::Client,
    address: &str,
    handler: &SpiffeId,
) -> Result<Vec<Sample>, Told> {
    let all = Ask { act: Act::Measure, namespace: String::new(), name: String::new(), plan: None };
    ask_line(client, address, handler, &all, MEASURED).await
}

/// Asks a handler what a move of a guest would take.
///
/// # Errors
/// What the handler said, or 503 when it cannot be reached or does not tell.
pub async fn forecast(
    client: &tls::Client,
    address: &str,
    handler: &SpiffeId,
    of: &Ask,
) -> Result<Outlook, Told> {
    ask_line(client, address, handler, of, FORECAST).await
}

/// Asks a handler for what is one more line after its answer.
async fn ask_line<T: serde::de::DeserializeOwned>(
    client: &tls::Client,
    address: &str,
    handler: &SpiffeId,
    of: &Ask,
    patience: Duration,
) -> Result<T, Told> {
    let work = async {
        let mut stream = ask(client, address, handler, of).await?;
        let wrong = |why| told(503, format!("the handler at {address} does not measure: {why}"));
        read_line(&mut stream, SAMPLES).await.map_err(wrong)
    };
    let late = |_| told(503, format!("the handler at {address} does not measure in time"));
    tokio::time::timeout(patience, work).await.map_err(late)?
}
