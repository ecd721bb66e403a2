//! Where a target's streams come in: each is checked and led to its place.

use super::Moving;
use crate::vm::Handle;
use channel::client::Incoming;
use channel::identity::SpiffeId;
use channel::preface::{Refusal, Stream, code};
use channel::tokens::Tokens;
use mover::receiver::Receiver;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::sync::mpsc;

/// A gateway hands a preface over at once.
const PREFACE: Duration = Duration::from_secs(5);
/// The confirmation comes from the source's launcher, a round trip away.
const CONFIRMATION: Duration = Duration::from_secs(15);

/// What one move to here admits.
#[derive(Debug)]
pub struct Gate {
    /// The attempt.
    pub migration: String,
    /// The only host that may connect.
    pub peer: SpiffeId,
    tokens: Mutex<Tokens>,
    /// Control and memory streams, by the stream.
    places: Mutex<BTreeMap<Stream, mpsc::Sender<UnixStream>>>,
    disks: Mutex<Option<Arc<Receiver>>>,
    /// Wakes the move when the user wants it to end.
    pub cancel: tokio::sync::Notify,
}

impl Gate {
    /// A gate for a move from `peer`.
    pub fn new(migration: &str, peer: SpiffeId) -> Arc<Self> {
        Arc::new(Self {
            migration: migration.to_owned(),
            peer,
            tokens: Mutex::default(),
            places: Mutex::default(),
            disks: Mutex::default(),
            cancel: tokio::sync::Notify::new(),
        })
    }

    /// Admits a stream: returns its first token and where it comes in.
    pub fn admit(&self, stream: Stream) -> (channel::tokens::Token, mpsc::Receiver<UnixStream>) {
        let (place, admitted) = mpsc::channel(4);
        lock(&self.places).insert(stream, place);
        (lock(&self.tokens).issue(stream), admitted)
    }

    /// Admits a disk stream to `receiver`; returns its first token.
    pub fn admit_disk(&self, n: u16, receiver: &Arc<Receiver>) -> channel::tokens::Token {
        *lock(&self.disks) = Some(receiver.clone());
        lock(&self.tokens).issue(Stream::Disk(n))
    }

    /// Admits nothing any more.
    pub fn close(&self) {
        lock(&self.places).clear();
        *lock(&self.disks) = None;
        *lock(&self.tokens) = Tokens::new();
    }

    async fn enter(&self, incoming: Incoming) -> Result<(), String> {
        let stream = incoming.preface().stream;
        let judged = self.judge(&incoming);
        let successor = match judged {
            Ok(successor) => successor,
            Err(refusal) => {
                let text = refusal.to_string();
                incoming.refuse(refusal).await;
                return Err(text);
            }
        };
        let disks = lock(&self.disks).clone();
        if let (Stream::Disk(n), Some(receiver)) = (stream, disks) {
            // N.B. before the source is told that this connection stands: it
            // sends again only what can no longer come late on the old one.
            let detached = tokio::task::spawn_blocking(move || receiver.detach(n)).await;
            detached.map_err(|e| e.to_string())?;
        }
        let accepted = incoming.accept(&successor, CONFIRMATION).await;
        let accepted = accepted.map_err(|e| e.to_string())?;
        if !lock(&self.tokens).confirm(stream, &successor) {
            return Err("a later connection has taken its place".into());
        }
        self.lead(stream, accepted).await
    }

    fn judge(&self, incoming: &Incoming) -> Result<channel::tokens::Token, Refusal> {
        let preface = incoming.preface();
        if *incoming.peer() != self.peer {
            let text = format!("this move comes from {}, not from {}", self.peer, incoming.peer());
            return Err(Refusal::new("wrong-peer", text));
        }
        if preface.migration != self.migration {
            return Err(Refusal::new(code::STREAM_UNKNOWN, "another move is expected here"));
        }
        lock(&self.tokens).offer(preface.stream, &preface.token)
    }

    async fn lead(&self, stream: Stream, connection: UnixStream) -> Result<(), String> {
        if let Stream::Disk(n) = stream {
            let receiver = lock(&self.disks).clone().ok_or("the disks have all arrived")?;
            let connection = super::links::blocking(connection).map_err(|e| e.to_string())?;
            return receiver.attach(n, connection).map_err(|e| e.to_string());
        }
        let place = lock(&self.places).get(&stream).cloned().ok_or("nobody waits for it")?;
        place.send(connection).await.map_err(|_| "nobody waits for it any more".to_owned())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes the streams that come in, for as long as the launcher lives.
///
/// # Errors
/// When the socket cannot be made.
pub fn serve(launcher: &Handle) -> Result<tokio::task::JoinHandle<()>, channel::socket::Error> {
    let listener = channel::client::listen(&launcher.folder)?;
    let launcher = launcher.clone();
    Ok(tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(receive(launcher.clone(), stream));
        }
    }))
}

async fn receive(launcher: Handle, stream: UnixStream) {
    let incoming = match Incoming::read(stream, PREFACE).await {
        Ok(incoming) => incoming,
        Err(error) => return tracing::warn!(%error, "a stream was not understood"),
    };
    let gate = match &launcher.vm.lock().await.moving {
        Some(Moving::Here(gate) | Moving::Compared(gate)) => Some(gate.clone()),
        _ => None,
    };
    let Some(gate) = gate else {
        let refusal = Refusal::new(code::STREAM_UNKNOWN, "no move to here is expected");
        return incoming.refuse(refusal).await;
    };
    let stream = incoming.preface().stream;
    if let Err(why) = gate.enter(incoming).await {
        tracing::info!(?stream, %why, "a stream was not admitted");
    }
}
