//! What synchronizers say to each other: one question and one answer on each connection, each a JSON
//! message with its length before it ([`channel::wire`]), of at most 1 MiB.
//!
//! Each carries its version in its name, as the handlers' questions do.

use crate::relocation::Offer;
use api::migration::{Half, Side};
use channel::identity::{Credentials, Role, SpiffeId, Trust};
use channel::tcp::{DEAD_PEER, tune};
use channel::{tls, wire, with_source};
use handover::ledger::Response;
use handover::record::{HostId, Swap};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::client::TlsStream;

/// For a TCP connection and a TLS handshake, together.
const CONNECT: Duration = Duration::from_secs(5);
/// For an answer, beyond what the question lets the other wait for news.
const ANSWER: Duration = Duration::from_secs(10);
/// News of a half are waited for so long at a time.
pub const NEWS: Duration = Duration::from_secs(15);

/// A question.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "ask")]
pub enum Ask {
    /// This is my half; what is yours? The answer comes once it is another than `seen`.
    #[serde(rename = "tell/1")]
    Tell {
        /// By which both sides know the migration.
        migration: String,
        /// Which side the asker is.
        side: Side,
        /// What it has to say.
        half: Box<Half>,
        /// The [`fingerprint`] of what it has heard last; 0: nothing.
        seen: u64,
    },
    /// Change an owner record, as far as the one at a move's other end may.
    #[serde(rename = "owner/1")]
    Owner {
        /// The record in whose name it is asked: one of the asking cluster.
        asker: HostId,
        /// The record's namespace.
        namespace: String,
        /// The record's name.
        name: String,
        /// How.
        change: Swap,
    },
    /// These are my CAs, and here I am found; and you? For linked clusters alone.
    #[serde(rename = "trust/1")]
    Trust {
        /// The certificates, PEM.
        bundle: String,
        /// `host:port`.
        address: String,
    },
    /// I was invited: these are my CAs, and here I am found. The only question of who is not believed yet.
    #[serde(rename = "join/1")]
    Join {
        /// Which invitation.
        invitation: String,
        /// What only who was invited knows.
        secret: String,
        /// The certificates, PEM.
        bundle: String,
        /// `host:port`.
        address: String,
    },
    /// Take this VM, with what it brings; or tell what stands in its way. For linked clusters alone.
    #[serde(rename = "offer/1")]
    Offer {
        /// The move's uid.
        id: String,
        /// The VM.
        offer: Box<Offer>,
        /// Make nothing.
        check: bool,
    },
    /// A move is over.
    #[serde(rename = "settle/1")]
    Settle {
        /// Its uid.
        id: String,
        /// The VM's namespace here.
        namespace: String,
        /// The VM's name here.
        name: String,
        /// The guest is here.
        succeeded: bool,
    },
    /// The way to the gateway of a node. After the answer its bytes follow.
    #[serde(rename = "passage/1")]
    Passage {
        /// The node's cluster.
        cluster: String,
        /// The node.
        node: String,
    },
    /// A handler's question to another cluster's synchronizer, asked of its own.
    #[serde(rename = "forward/1")]
    Forward {
        /// The other cluster.
        cluster: String,
        /// What is asked there.
        question: Box<Ask>,
    },
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "answer")]
pub enum Told {
    /// My half, or that there is no news.
    #[serde(rename = "half/1")]
    Half {
        /// None: it is what was seen.
        half: Option<Box<Half>>,
    },
    /// There is no migration here that has that id, and is the other side of yours.
    #[serde(rename = "unknown/1")]
    Unknown {
        /// What was looked for, for people.
        why: String,
    },
    /// My CAs, and where I am found.
    #[serde(rename = "trust/1")]
    Trust {
        /// The certificates, PEM.
        bundle: String,
        /// `host:port`.
        address: String,
    },
    /// What becomes of a VM that was offered.
    #[serde(rename = "offered/1")]
    Offered {
        /// All that stands in its way.
        faults: Vec<String>,
        /// What does not, and is worth knowing.
        warnings: Vec<String>,
        /// All is there: where its guest is to be sent.
        address: Option<String>,
        /// Not all is: what is waited for.
        waits: Option<String>,
        /// Where it would be run.
        #[serde(default)]
        spot: Option<Spot>,
        /// What the clock says there.
        #[serde(default)]
        now: Option<Timestamp>,
        /// What is spoken there.
        #[serde(default)]
        protocol: u32,
    },
    /// What became of a move that is over.
    #[serde(rename = "settled/1")]
    Settled {
        /// What is still to be done; None: nothing.
        waits: Option<String>,
    },
    /// What the record answers.
    #[serde(rename = "owner/1")]
    Owner {
        /// Its answer.
        response: Response,
    },
    /// The way is open.
    #[serde(rename = "open/1")]
    Open,
    /// It may not be asked that.
    #[serde(rename = "refused/1")]
    Refused {
        /// Why not.
        why: String,
    },
}

/// Where a guest would be run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Spot {
    /// The node.
    pub node: String,
    /// Its gateway.
    pub gateway: String,
    /// Whose that is.
    pub id: SpiffeId,
}

/// What tells one half from another, whenever they were said: equal halves have equal fingerprints, in
/// every build.
pub fn fingerprint(half: &Half) -> u64 {
    let content = Half { sequence: 0, ..half.clone() };
    let text = serde_json::to_vec(&content).unwrap_or_default();
    xxhash_rust::xxh3::xxh3_64(&text).max(1)
}

/// Asks the synchronizer of `cluster` at `address`, which does not believe this cluster yet.
///
/// # Errors
/// Why there is no answer, for people.
pub async fn ask_as_guest(
    trust: Trust,
    address: &str,
    cluster: &str,
    ask: &Ask,
) -> Result<Told, String> {
    let visited = timeout(CONNECT, async {
        let visited = tls::visit(trust, Role::Synchronizer, cluster, dial(address).await?).await;
        visited.map_err(|error| failed(address, "it is not believed", &with_source(&error)))
    });
    let visited = visited.await.map_err(|_| format!("{address}: no connection in {CONNECT:?}"))?;
    exchange(&mut visited?, address, ask).await
}

/// Asks the synchronizer at `address`: that of `cluster`, or of any cluster that is believed. Returns who
/// answered, and what.
///
/// # Errors
/// Why there is no answer, for people.
pub async fn ask(
    credentials: &Credentials,
    address: &str,
    cluster: Option<&str>,
    ask: &Ask,
) -> Result<(SpiffeId, Told), String> {
    let (mut stream, peer) = connect(credentials, address, cluster).await?;
    Ok((peer, exchange(&mut stream, address, ask).await?))
}

/// Connects to the synchronizer at `address`, as [`ask`] does.
///
/// # Errors
/// Why that cannot be done, for people.
pub async fn connect(
    credentials: &Credentials,
    address: &str,
    cluster: Option<&str>,
) -> Result<(TlsStream<TcpStream>, SpiffeId), String> {
    let client = tls::Client::new(credentials.identity.clone(), credentials.trust.clone());
    let connected = timeout(CONNECT, async {
        let connected = client.connect_to(Role::Synchronizer, cluster, dial(address).await?).await;
        connected.map_err(|error| {
            failed(address, "it is not believed, or does not believe us", &with_source(&error))
        })
    });
    connected.await.map_err(|_| format!("{address}: no connection in {CONNECT:?}"))?
}

fn failed(address: &str, what: &str, error: &dyn std::fmt::Display) -> String {
    format!("{address}: {what}: {error}")
}

async fn dial(address: &str) -> Result<TcpStream, String> {
    let no_way = |error| failed(address, "no connection", &error);
    let tcp = TcpStream::connect(address).await.map_err(no_way)?;
    tune(&tcp, DEAD_PEER).map_err(no_way)?;
    Ok(tcp)
}

/// One question and one answer.
///
/// # Errors
/// Why there is no answer, for people.
pub async fn exchange(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    address: &str,
    ask: &Ask,
) -> Result<Told, String> {
    let asked = async {
        wire::write(stream, ask).await?;
        wire::read(stream).await
    };
    let told = timeout(NEWS + ANSWER, asked).await;
    let told = told.map_err(|_| format!("{address}: no answer in {:?}", NEWS + ANSWER))?;
    told.map_err(|error| failed(address, "no answer", &with_source(&tls::Error::from_io(error))))
}
