//! A disk that a pod reads for a clone elsewhere: `images::peer` says how.

use super::door::{Door, Room};
use super::place;
use anyhow::{Context, Result, bail};
use api::import::{LEND, Lent};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use images::peer::SIZE;
use std::convert::Infallible;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

/// As long as it lends, no VM that has the disk can start: nobody wants it any more by then.
const IDLE: Duration = Duration::from_secs(600);
/// Pieces that are read ahead.
const AHEAD: usize = 4;

/// Lends the disk that the environment names, until nobody has wanted it for long.
///
/// # Errors
/// When it cannot be read, or nobody wants it.
pub async fn run() -> Result<()> {
    let path = std::env::var(LEND).with_context(|| format!("{LEND} does not name a disk"))?;
    let disk = Arc::new(images::Lent::open(&place(Path::new(&path)))?);
    let door = Door::open().await?;
    let lent =
        Lent { lent: format!("{}/v1/disk", door.url), certificate: door.certificate.clone() };
    let told = serde_json::to_string(&lent)?;
    let (asked, mut wanted) = watch::channel(());
    let room = Arc::new(Library { disk, asked });
    let idle = async { while let Ok(Ok(())) = timeout(IDLE, wanted.changed()).await {} };
    tokio::select! {
        () = door.serve(&told, room) => Ok(()),
        () = idle => bail!("nobody has fetched the disk for {} minutes", IDLE.as_secs() / 60),
    }
}

struct Library {
    disk: Arc<images::Lent>,
    /// Is told whenever something is wanted of it.
    asked: watch::Sender<()>,
}

type Answer = Response<UnsyncBoxBody<Bytes, Cut>>;

/// The disk could not be read to its end: the node's log says why.
#[derive(Debug, thiserror::Error)]
#[error("the disk cannot be read")]
struct Cut;

impl Room for Library {
    type Body = UnsyncBoxBody<Bytes, Cut>;

    async fn answer(&self, request: Request<Incoming>) -> Answer {
        self.asked.send_replace(());
        if request.uri().path() != "/v1/disk" {
            return Self::say(StatusCode::NOT_FOUND, "the disk is at /v1/disk");
        }
        let from = request.uri().query().and_then(|query| query.strip_prefix("from="));
        let Ok(from) = from.unwrap_or("0").parse() else {
            return Self::say(StatusCode::BAD_REQUEST, "say from=NUMBER");
        };
        let mut answer = match *request.method() {
            Method::HEAD => Self::say(StatusCode::OK, ""),
            Method::GET => Response::new(self.read(from)),
            _ => return Self::say(StatusCode::METHOD_NOT_ALLOWED, "say HEAD or GET"),
        };
        answer.headers_mut().insert(SIZE, self.disk.size().into());
        answer
    }

    fn say(code: StatusCode, text: &'static str) -> Answer {
        let body = Full::from(text).map_err(|never: Infallible| match never {});
        let mut answer = Response::new(body.boxed_unsync());
        *answer.status_mut() = code;
        answer
    }
}

impl Library {
    /// Reads the disk from an offset on, as fast as that is taken.
    fn read(&self, from: u64) -> UnsyncBoxBody<Bytes, Cut> {
        let (ahead, pieces) = mpsc::channel(AHEAD);
        let (disk, asked) = (Arc::clone(&self.disk), self.asked.clone());
        tokio::task::spawn_blocking(move || {
            let read = disk.send(from, |piece| {
                asked.send_replace(());
                // N.B. whoever takes nothing and stays is ended by `IDLE`.
                ahead.blocking_send(Ok(Frame::data(piece))).is_ok()
            });
            if let Err(error) = read {
                tracing::warn!("{}", launcher::chain(&error));
                // Nobody may be there to hear it.
                let _ = ahead.blocking_send(Err(Cut));
            }
        });
        let stream = futures_util::stream::unfold(pieces, |mut pieces| async {
            Some((pieces.recv().await?, pieces))
        });
        StreamBody::new(stream).boxed_unsync()
    }
}
