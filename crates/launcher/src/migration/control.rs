//! The control stream: messages of the handover over a resumable stream.

use super::links::Links;
use channel::resumable::{Config, Limiter, MessageReceiver, Messages, Monitor, Role};
use handover::wire::v1::{decode, encode};
use mover::bucket::SharedBucket;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};

/// A stream that broke says why at once; one that only the peer has closed goes on.
const VERDICT: Duration = Duration::from_millis(500);
/// Messages that may wait for the link.
const QUEUE: usize = 64;

/// A control stream that was begun.
pub struct Control {
    /// To send on.
    pub sent: Sent,
    /// To hear from.
    pub heard: Heard,
    /// How the link does.
    pub monitor: Monitor,
}

enum Item {
    Message(Vec<u8>),
    Close(oneshot::Sender<()>),
}

/// Sends messages, in order, without waiting for the peer.
#[derive(Clone)]
pub struct Sent(mpsc::Sender<Item>);

/// Hears messages.
pub struct Heard {
    receiver: MessageReceiver,
    ended: tokio::task::JoinHandle<Result<channel::resumable::Summary, channel::resumable::Error>>,
}

/// How the streams of a move are carried.
pub fn config(role: Role, reconnect_seconds: f64, bucket: Option<Arc<SharedBucket>>) -> Config {
    let limiter = bucket.map(|bucket| Arc::new(Shared(bucket)) as Arc<dyn Limiter>);
    let reconnect = Duration::from_secs_f64(reconnect_seconds);
    Config { reconnect, limiter, ..Config::new(role) }
}

/// The mover's token bucket, for the memory streams.
struct Shared(Arc<SharedBucket>);

impl Limiter for Shared {
    fn take(&self, n: u64) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        let wait = self.0.book(n);
        Box::pin(async move {
            // N.B. a sleep of nothing lasts until the timer's next millisecond.
            if !wait.is_zero() {
                tokio::time::sleep(wait).await;
            }
        })
    }
}

impl Control {
    /// Begins a control stream over `links`.
    pub fn start(links: Links, reconnect_seconds: f64) -> Self {
        let config = config(links.role(), reconnect_seconds, None);
        let monitor = config.monitor.clone();
        let (messages, ended) = Messages::over(links, config);
        let (mut sender, receiver) = messages.split();
        let (items, mut queued) = mpsc::channel(QUEUE);
        tokio::spawn(async move {
            while let Some(item) = queued.recv().await {
                match item {
                    // A stream that is lost is noticed by whoever listens.
                    Item::Message(bytes) => drop(sender.send(&bytes).await),
                    Item::Close(done) => {
                        let _ = sender.close().await;
                        let _ = done.send(());
                    }
                }
            }
        });
        Self { sent: Sent(items), heard: Heard { receiver, ended }, monitor }
    }
}

impl Sent {
    /// Sends a message. One that cannot be told is an error of ours: it is logged.
    pub async fn send<M: Serialize>(&self, message: &M) {
        match encode(message) {
            // A stream that is lost is noticed by whoever listens.
            Ok(bytes) => drop(self.0.send(Item::Message(bytes)).await),
            Err(error) => tracing::error!(%error, "a control message was not sent"),
        }
    }

    /// Sends no more, once all that was sent has left or `deadline` has passed.
    pub async fn close(self, deadline: Duration) {
        let (done, closed) = oneshot::channel();
        let close = async {
            if self.0.send(Item::Close(done)).await.is_ok() {
                let _ = closed.await;
            }
        };
        // The peer may be gone: then nothing is left to wait for.
        let _ = tokio::time::timeout(deadline, close).await;
    }
}

impl Heard {
    /// The next message; None when the peer closed the stream.
    ///
    /// # Errors
    /// Why there will be none any more, or what cannot be understood.
    pub async fn next<M: DeserializeOwned>(&mut self) -> Result<Option<M>, String> {
        match self.receiver.recv().await {
            Ok(Some(bytes)) => decode::<M>(&bytes).map(Some).map_err(|e| e.to_string()),
            // N.B. the stream itself is well and would be waited for in vain.
            Err(error) if error.kind() == io::ErrorKind::InvalidData => Err(error.to_string()),
            Ok(None) | Err(_) => match tokio::time::timeout(VERDICT, &mut self.ended).await {
                Ok(Ok(Ok(_))) | Err(_) => Ok(None),
                Ok(Ok(Err(error))) => Err(error.to_string()),
                Ok(Err(error)) => Err(error.to_string()),
            },
        }
    }
}
