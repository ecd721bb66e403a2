//! The disks that a guest has left are compared with those on which it runs now, where that is asked for.
//!
//! It is done before the pod that the guest left goes, and the move is told to be over only then: nobody
//! else can read the disk that was left, and nobody has written to it.

use super::super::Shared;
use super::super::guests::{Guest, Key, SOON};
use super::prepare::{Told, What};
use super::there::There;
use api::keys;
use api::migration::State;
use kube::ResourceExt;
use launcher::client::Client as Launcher;
use launcher::migration::status::Verified;
use launcher::migration::verify::{
    Differing, JudgeRequest, SendRequest, VerifyReport, VerifyTicket,
};
use mover::extent::ExtentSet;
use reconcile::events::Kind;
use reconcile::queue::Next;
use serde_json::json;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// The target's launcher is done with the move itself within this time.
const READY: Duration = Duration::from_secs(30);
/// Extents that are judged at once: what is asked of a gateway is bounded.
const AT_ONCE: usize = 4096;

/// How far a comparison is.
#[derive(Debug, Clone)]
pub enum Check {
    /// Disks are compared.
    UnderWay,
    /// What was found.
    Over(Verified),
}

impl Guest<'_> {
    /// Has the disks compared, if that is wanted. None: nothing is in the way of the move's end.
    pub(super) async fn verify(
        &self,
        state: &State,
        migration: &str,
    ) -> kube::Result<Option<Next>> {
        let known = self.shared.moves.memory().known.get(migration).and_then(|k| k.check.clone());
        match known {
            // Whoever ends it rings.
            Some(Check::UnderWay) => return Ok(Some(Next::Rest)),
            Some(Check::Over(found)) => {
                self.tell_verified(state, migration, &found).await;
                return Ok(None);
            }
            None => {}
        }
        let wanted = self.migration(state).await?;
        let wanted = wanted.and_then(|found| found.annotations().get(keys::VERIFY).cloned());
        if wanted.is_none_or(|wanted| wanted != "true") {
            return Ok(None);
        }
        self.shared.moves.note(migration, Check::UnderWay);
        let comparison = Comparison {
            shared: self.shared.clone(),
            key: self.key.clone(),
            launcher: self.launcher.clone(),
            state: state.clone(),
        };
        let (shared, key) = (self.shared.clone(), self.key.clone());
        let migration = migration.to_owned();
        tokio::spawn(async move {
            let found = match comparison.run().await {
                Ok(report) => Verified::from(report),
                Err(why) => Verified::Unknown { why },
            };
            shared.moves.note(&migration, Check::Over(found));
            shared.queue.ring(key);
        });
        Ok(Some(Next::Rest))
    }

    async fn tell_verified(&self, state: &State, migration: &str, found: &Verified) {
        if let Some(name) = self.migration_name(state, migration).await {
            self.tell_progress(&name, &json!({"verified": found})).await;
        }
        let kind = match found {
            Verified::Verified { .. } => Kind::Normal,
            Verified::Differ { .. } | Verified::Unknown { .. } => Kind::Warning,
        };
        self.say(kind, "Verified", &found.to_string()).await;
    }
}

/// One comparison.
struct Comparison {
    shared: Shared,
    key: Key,
    /// That which the guest has left.
    launcher: Launcher,
    state: State,
}

impl Comparison {
    async fn run(&self) -> Result<VerifyReport, String> {
        let there = There::find(&self.shared, &self.key, &self.state).await?;
        let mut ticket = self.begin(&there).await?;
        if let Some(address) = there.detour() {
            ticket = ticket.at(address.to_owned());
        }
        let request = SendRequest { ticket, paths: BTreeMap::new() };
        let sent = self.launcher.verify_send(&request).await;
        let found = match sent {
            Ok(differing) => judge_all(&there, parts(differing)).await,
            Err(error) => Err(launcher::chain(&error)),
        };
        // N.B. also after a failure: it ends the comparison there.
        let over = judge(&there, JudgeRequest::default()).await;
        found.and_then(|report| over.map(|_| report))
    }

    async fn begin(&self, there: &There) -> Result<VerifyTicket, String> {
        let began = Instant::now();
        loop {
            match there.ask(What::Compare).await? {
                Told::Comparing { ticket } => return Ok(*ticket),
                Told::Refused { why } => return Err(why),
                Told::NotYet { why } if began.elapsed() > READY => return Err(why),
                Told::NotYet { .. } => tokio::time::sleep(SOON).await,
                Told::Prepared { .. } | Told::Judged { .. } => return Err(unasked()),
            }
        }
    }
}

async fn judge_all(there: &There, parts: Vec<Differing>) -> Result<VerifyReport, String> {
    let mut report = VerifyReport::default();
    for part in parts {
        report.add(judge(there, JudgeRequest { differing: vec![part], more: true }).await?);
    }
    Ok(report)
}

async fn judge(there: &There, request: JudgeRequest) -> Result<VerifyReport, String> {
    match there.ask(What::Judge(request)).await? {
        Told::Judged { report } => Ok(report),
        Told::Refused { why } | Told::NotYet { why } => Err(why),
        Told::Prepared { .. } | Told::Comparing { .. } => Err(unasked()),
    }
}

fn unasked() -> String {
    "the other node answers what was not asked".into()
}

/// What differs, in parts that can be asked about: bytes are counted as compared in the first of each disk.
fn parts(differing: Vec<Differing>) -> Vec<Differing> {
    let mut parts = Vec::new();
    for mut disk in differing {
        let extents: Vec<_> = disk.extents.iter().collect();
        let (first, rest) = extents.split_at(extents.len().min(AT_ONCE));
        disk.extents = first.iter().copied().collect();
        let more = rest.chunks(AT_ONCE).map(|chunk| Differing {
            compared: 0,
            extents: chunk.iter().copied().collect::<ExtentSet>(),
            ..disk.clone()
        });
        let more: Vec<_> = more.collect();
        parts.push(disk);
        parts.extend(more);
    }
    parts
}

#[cfg(test)]
mod test {
    use super::*;
    use mover::extent::Extent;

    #[test]
    fn parts_say_what_the_whole_says_and_each_can_be_asked_about() {
        let spread = |n: u64| (0..n).map(|i| Extent::new(i * 8192, 4096)).collect::<ExtentSet>();
        let disk = |name: &str, n| Differing {
            disk: name.into(),
            epoch: 3,
            compared: 1 << 30,
            extents: spread(n),
        };
        let whole = vec![disk("full", 10_000), disk("same", 0)];
        let parts = parts(whole);
        assert_eq!(parts.iter().map(|part| part.compared).sum::<u64>(), 2 << 30);
        assert!(parts.iter().all(|part| part.extents.extents() <= AT_ONCE && part.epoch == 3));
        let mut all = ExtentSet::new();
        parts.iter().for_each(|part| all.union_with(&part.extents));
        assert_eq!(all, spread(10_000));
    }
}
