//! One of several that does the work: whoever holds a Lease.
//!
//! ```text
//! look at the lease -> evaluate (pure) -> Take: write it, on the condition that it is as it was seen
//!                                      -> Wait: look again
//! ```
//!
//! Clocks of two machines are never compared, as in client-go: a lease is free when it has not
//! changed for its whole duration while we looked.

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use std::time::{Duration, Instant};

/// A lease that is not renewed for so long is free.
const DURATION: Duration = Duration::from_secs(15);
/// Whoever could not renew it for so long stops, well before another begins.
const DEADLINE: Duration = Duration::from_secs(10);
/// How often it is looked at, by whoever has it and by whoever wants it.
const LOOK: Duration = Duration::from_secs(2);

/// A lease, and since when it has been seen as it is.
#[derive(Debug, Clone, PartialEq)]
pub struct Seen {
    /// The lease.
    pub lease: Lease,
    /// Since when.
    pub since: Instant,
}

impl Seen {
    /// What is known after one more look: what has not changed was seen before.
    pub fn again(before: Option<Self>, found: Option<Lease>, now: Instant) -> Option<Self> {
        let lease = found?;
        let same = before.filter(|before| before.lease.spec == lease.spec);
        Some(Self { since: same.map_or(now, |before| before.since), lease })
    }
}

/// Whether somebody has a lease, and renews it.
pub fn is_held(lease: Option<&Seen>, now: Instant) -> bool {
    // Nobody's identity is empty.
    matches!(evaluate(lease, "", now), Step::Wait(_))
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// It is ours already, or free: write it.
    Take,
    /// It is another's: look again after this.
    Wait(Duration),
}

/// What is to be done about a lease; None: there is none.
pub fn evaluate(lease: Option<&Seen>, identity: &str, now: Instant) -> Step {
    let Some(Seen { lease, since }) = lease else { return Step::Take };
    let spec = lease.spec.clone().unwrap_or_default();
    let holder = spec.holder_identity.unwrap_or_default();
    let seconds = spec.lease_duration_seconds.and_then(|s| u64::try_from(s).ok());
    let free_at = *since + seconds.map_or(DURATION, Duration::from_secs);
    match free_at.checked_duration_since(now).filter(|left| !left.is_zero()) {
        Some(left) if !holder.is_empty() && holder != identity => Step::Wait(left.min(LOOK)),
        _ => Step::Take,
    }
}

/// The lease as its holder writes it; no holder gives it back.
fn written(lease: Option<&Lease>, name: &str, holder: Option<&str>, now: Timestamp) -> Lease {
    let old = lease.and_then(|lease| lease.spec.clone()).unwrap_or_default();
    let stays = old.holder_identity.as_deref() == holder;
    let passes = lease.is_some() && !stays && holder.is_some();
    let transitions = old.lease_transitions.unwrap_or_default();
    let spec = LeaseSpec {
        holder_identity: Some(holder.unwrap_or_default().into()),
        lease_duration_seconds: i32::try_from(DURATION.as_secs()).ok(),
        acquire_time: old.acquire_time.filter(|_| stays).or(Some(MicroTime(now))),
        renew_time: Some(MicroTime(now)),
        lease_transitions: Some(transitions + i32::from(passes)),
        ..old
    };
    let metadata = match lease {
        Some(lease) => lease.metadata.clone(),
        None => ObjectMeta { name: Some(name.into()), ..ObjectMeta::default() },
    };
    Lease { metadata, spec: Some(spec) }
}

/// Who wants which lease.
#[derive(Debug, Clone)]
pub struct Candidate {
    api: Api<Lease>,
    name: String,
    identity: String,
}

impl Candidate {
    /// For a lease of a namespace. No two processes may have the same identity at the same time.
    pub fn new(client: Client, namespace: &str, name: &str, identity: &str) -> Self {
        let api = Api::namespaced(client, namespace);
        Self { api, name: name.into(), identity: identity.into() }
    }

    /// Does the work whenever it holds the lease. The work is dropped when the lease may be lost,
    /// and begun again later. Ends when `end` does, and gives the lease back.
    pub async fn run<W>(&self, work: impl Fn() -> W, end: impl Future<Output = ()>)
    where
        W: Future<Output = ()>,
    {
        let working = async {
            loop {
                let lease = self.take().await;
                tracing::info!(lease = self.name, identity = self.identity, "it is ours");
                tokio::select! {
                    () = work() => tracing::warn!(lease = self.name, "the work has ended"),
                    () = self.keep(lease) => tracing::warn!(lease = self.name, "it is lost"),
                }
            }
        };
        tokio::select! {
            () = working => {}
            () = end => {}
        }
        self.give_back().await;
    }

    /// Waits until it has the lease.
    async fn take(&self) -> Lease {
        let mut seen = None;
        loop {
            let found = match self.api.get_opt(&self.name).await {
                Ok(found) => found,
                Err(error) => {
                    tracing::warn!("lease {} cannot be read: {}", self.name, crate::why(&error));
                    tokio::time::sleep(LOOK).await;
                    continue;
                }
            };
            seen = Seen::again(seen, found, Instant::now());
            match evaluate(seen.as_ref(), &self.identity, Instant::now()) {
                Step::Wait(pause) => tokio::time::sleep(pause).await,
                Step::Take => match self.write(seen.as_ref().map(|seen| &seen.lease)).await {
                    Ok(lease) => return lease,
                    Err(error) => {
                        tracing::info!("lease {} is not ours: {}", self.name, crate::why(&error));
                        tokio::time::sleep(LOOK).await;
                    }
                },
            }
        }
    }

    /// Renews it until that fails for too long, or another has it.
    async fn keep(&self, mut lease: Lease) {
        let mut renewed = Instant::now();
        loop {
            let left = DEADLINE.saturating_sub(renewed.elapsed());
            tokio::time::sleep(left.min(LOOK)).await;
            let left = DEADLINE.saturating_sub(renewed.elapsed());
            // N.B. from before the write: it holds from when it was sent, not from its answer.
            let sent = Instant::now();
            let error = match tokio::time::timeout(left, self.write(Some(&lease))).await {
                Ok(Ok(written)) => {
                    (lease, renewed) = (written, sent);
                    continue;
                }
                Ok(Err(error)) => error,
                Err(_) => return,
            };
            tracing::warn!("lease {} is not renewed: {}", self.name, crate::why(&error));
            // A write whose answer was lost, or a person's.
            let left = DEADLINE.saturating_sub(renewed.elapsed());
            match tokio::time::timeout(left, self.api.get_opt(&self.name)).await {
                Ok(Ok(Some(found))) if self.is_holder(&found) => lease = found,
                Ok(Err(_)) => {}
                Ok(Ok(_)) | Err(_) => return,
            }
        }
    }

    fn is_holder(&self, lease: &Lease) -> bool {
        let holder = lease.spec.as_ref().and_then(|spec| spec.holder_identity.as_deref());
        holder == Some(&*self.identity)
    }

    /// Writes it as ours; fails if it is not as it was seen.
    async fn write(&self, lease: Option<&Lease>) -> kube::Result<Lease> {
        let new = written(lease, &self.name, Some(&self.identity), Timestamp::now());
        match lease {
            None => self.api.create(&PostParams::default(), &new).await,
            Some(_) => self.api.replace(&self.name, &PostParams::default(), &new).await,
        }
    }

    /// So that another need not wait until it is free.
    async fn give_back(&self) {
        let work = async {
            let Some(found) = self.api.get_opt(&self.name).await? else { return Ok(()) };
            if self.is_holder(&found) {
                let free = written(Some(&found), &self.name, None, Timestamp::now());
                self.api.replace(&self.name, &PostParams::default(), &free).await?;
            }
            kube::Result::Ok(())
        };
        match tokio::time::timeout(LOOK, work).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::warn!("lease {} is not given back: {}", self.name, crate::why(&error));
            }
            Err(_) => tracing::warn!("lease {} is not given back in time", self.name),
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    fn held_by(holder: &str) -> Lease {
        written(None, "l", Some(holder), Timestamp::UNIX_EPOCH)
    }

    #[test]
    fn a_lease_is_taken_only_when_its_holder_has_been_silent_for_its_whole_duration() {
        let now = Instant::now();
        let seen = Seen::again(None, Some(held_by("other")), now);
        let at = |after| evaluate(seen.as_ref(), "me", now + after);
        assert_eq!(evaluate(None, "me", now), Step::Take);
        assert_eq!(at(Duration::ZERO), Step::Wait(LOOK));
        assert_eq!(at(DURATION - Duration::from_secs(1)), Step::Wait(Duration::from_secs(1)));
        assert_eq!(at(DURATION), Step::Take);
        assert_eq!(evaluate(seen.as_ref(), "other", now), Step::Take);

        // Any sign of life begins it anew; none does not.
        let later = now + DURATION;
        let silent = Seen::again(seen.clone(), Some(held_by("other")), later);
        assert_eq!(evaluate(silent.as_ref(), "me", later), Step::Take);
        let renewed = written(
            Some(&held_by("other")),
            "l",
            Some("other"),
            Timestamp::from_second(1).unwrap(),
        );
        let alive = Seen::again(seen, Some(renewed), later);
        assert_eq!(evaluate(alive.as_ref(), "me", later), Step::Wait(LOOK));

        // One that is given back is free at once.
        let free = written(Some(&held_by("other")), "l", None, Timestamp::UNIX_EPOCH);
        let free = Seen::again(None, Some(free), now);
        assert_eq!(evaluate(free.as_ref(), "me", now), Step::Take);
        let transitions = |lease: &Lease| lease.spec.as_ref().unwrap().lease_transitions;
        let taken = written(Some(&held_by("other")), "l", Some("me"), Timestamp::UNIX_EPOCH);
        assert_eq!(transitions(&taken), transitions(&held_by("other")).map(|n| n + 1));
    }
}
