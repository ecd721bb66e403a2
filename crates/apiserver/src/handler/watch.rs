//! Watch: changes as they come, filtered for each client.

use super::read::too_old;
use super::respond::{self, Change as Told};
use super::{Call, Handler};
use crate::body::{self, Answer};
use crate::status::Failure;
use crate::store::{Event, Query, Watch};
use bytes::Bytes;
use serde_json::Value;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

/// A client that says nothing of it is cut off within one and two times this.
const TIMEOUT: Duration = Duration::from_secs(1800);
/// Between two bookmarks.
const BOOKMARK: Duration = Duration::from_secs(60);
/// Pieces that wait for a slow client; it holds this watch up and no other.
const QUEUE: usize = 16;

impl Handler {
    /// Changes of objects, in order, one JSON document after another.
    ///
    /// # Errors
    /// 410 when the revision is gone, 400 when the options contradict themselves.
    pub async fn watch(&self, call: Call) -> Result<Answer, Failure> {
        let options = &call.options;
        let initial = match (options.initial_events, options.revision) {
            (Some(true), revision) => {
                self.wait_for(revision).await?;
                true
            }
            (_, None | Some(0)) => options.initial_events != Some(false),
            (_, Some(revision)) => {
                self.wait_for(Some(revision)).await?;
                false
            }
        };
        let key = call.resource.storage_key();
        let (first, from) = match initial {
            true => {
                let query = Query {
                    resource: &key,
                    namespace: call.in_namespace(),
                    at: None,
                    after: None,
                    limit: usize::MAX,
                };
                let list = self.store.list(&query).map_err(|e| too_old(&e))?;
                (list.objects, list.revision)
            }
            false => {
                (Vec::new(), options.revision.filter(|r| *r > 0).unwrap_or(self.store.revision()))
            }
        };
        let watch = self.store.watch(&key, from);
        let (pieces, received) = mpsc::channel(QUEUE);
        let stream = Stream { pieces, headed: false, call };
        match watch {
            Ok(watch) => {
                let first = first.into_iter().map(|(_, object)| object.body).collect();
                let ends = self.ending.clone();
                tokio::spawn(async move {
                    let mut ends = ends;
                    tokio::select! {
                        () = stream.run(first, from, watch) => {}
                        _ = ends.wait_for(|ends| *ends) => {}
                    }
                });
            }
            // Kubernetes tells it within the stream.
            Err(expired) => drop(tokio::spawn(stream.end(too_old(&expired)))),
        }
        Ok(body::stream("application/json", received))
    }
}

struct Stream {
    pieces: mpsc::Sender<Bytes>,
    /// A table's columns were told.
    headed: bool,
    call: Call,
}

/// The client is gone.
struct Gone;

impl Stream {
    async fn run(mut self, first: Vec<Arc<Value>>, at: u64, watch: Watch) {
        let expired = match self.follow(first, at, watch).await {
            Ok(Some(failure)) => failure,
            Ok(None) | Err(Gone) => return,
        };
        self.end(expired).await;
    }

    async fn end(self, failure: Failure) {
        // A client that is gone does not care.
        let _ = self.pieces.send(respond::event_line("ERROR", &failure.to_json())).await;
    }

    /// Until the client's time is over, or it was too slow, which is returned.
    async fn follow(
        &mut self,
        first: Vec<Arc<Value>>,
        at: u64,
        mut watch: Watch,
    ) -> Result<Option<Failure>, Gone> {
        for object in &first {
            if self.call.selects(object) {
                self.tell(Told::Added, object).await?;
            }
        }
        drop(first);
        let (bookmarks, initial) = (self.call.options.bookmarks, self.call.options.initial_events);
        if bookmarks && initial == Some(true) {
            self.bookmark(at, true).await?;
        }
        let until = Instant::now() + self.lasts();
        let mut next_bookmark = Instant::now() + BOOKMARK;
        loop {
            tokio::select! {
                events = watch.next() => match events {
                    Ok(events) => self.pass_on(&events).await?,
                    Err(expired) => return Ok(Some(too_old(&expired))),
                },
                () = sleep_until(next_bookmark), if bookmarks => {
                    self.bookmark(watch.position(), false).await?;
                    next_bookmark = Instant::now() + BOOKMARK;
                }
                () = sleep_until(until) => {
                    if bookmarks {
                        self.bookmark(watch.position(), false).await?;
                    }
                    return Ok(None);
                }
                () = self.pieces.closed() => return Err(Gone),
            }
        }
    }

    fn lasts(&self) -> Duration {
        let spread = f64::from(rand_fraction());
        self.call.options.timeout.unwrap_or(TIMEOUT.mul_f64(1.0 + spread))
    }

    async fn pass_on(&mut self, events: &[Event]) -> Result<(), Gone> {
        for event in events {
            let in_namespace =
                self.call.in_namespace().is_none_or(|ns| ns == &*event.key.namespace);
            if !in_namespace {
                continue;
            }
            let was = event.before.as_ref().is_some_and(|before| self.call.selects(&before.body));
            let is = !event.deleted && self.call.selects(&event.object.body);
            let change = match (was, is) {
                (false, false) => continue,
                (false, true) => Told::Added,
                (true, true) => Told::Modified,
                (true, false) => Told::Deleted,
            };
            match (change, &event.before) {
                // What left the selection is told as it was, at the revision of the change.
                (Told::Deleted, Some(before)) if !event.deleted => {
                    let mut last = (*before.body).clone();
                    crate::meta::set(
                        &mut last,
                        "resourceVersion",
                        event.object.revision.to_string().into(),
                    );
                    self.tell(change, &Arc::new(last)).await?;
                }
                _ => self.tell(change, &event.object.body).await?,
            }
        }
        Ok(())
    }

    async fn tell(&mut self, change: Told, stored: &Arc<Value>) -> Result<(), Gone> {
        let object = self.call.resource.served(stored);
        let piece = respond::event(&self.call, change, &object, !self.headed);
        self.headed = true;
        self.pieces.send(piece).await.map_err(|_| Gone)
    }

    async fn bookmark(&mut self, revision: u64, initial: bool) -> Result<(), Gone> {
        let piece = respond::bookmark(&self.call, revision, initial);
        self.pieces.send(piece).await.map_err(|_| Gone)
    }
}

/// Between 0 and 1, so that not all clients come back at once.
fn rand_fraction() -> f32 {
    f32::from(uuid::Uuid::new_v4().as_bytes()[0]) / 256.0
}
