//! The source's disks on their way: rounds over bitmaps and streams.
//!
//! ```text
//! begin bitmaps -> push what the target lacks -> safe
//!   -> swap, push, safe -> swap, push, safe ...      the guest runs
//!   -> guest stops -> swap, push, safe               the last delta
//! ```

use super::bitmaps::{Bitmaps, Node, since_name};
use super::history::History;
use super::offer::Holds;
use mover::disk::Disk;
use mover::extent::ExtentSet;
use mover::rounds::{Next, Policy, Round, Rounds};
use mover::sender::{Mode, Sender};
use mover::work::Outstanding;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Why the disks cannot be brought over.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The bitmaps fail.
    #[error(transparent)]
    Bitmaps(#[from] super::bitmaps::Error),
    /// The streams fail.
    #[error(transparent)]
    Streams(#[from] mover::sender::Error),
    /// The guest writes faster than the link carries.
    #[error(
        "the guest writes its disks faster than the link carries ({dirty} of {rate} MiB/s){advice}; \
         allow a longer pause, more bandwidth or throttling"
    )]
    Outrun {
        /// What the guest writes, MiB/s.
        dirty: u64,
        /// What the link carries, MiB/s.
        rate: u64,
        /// What was tried.
        advice: &'static str,
    },
    /// No byte became safe for too long.
    #[error("no progress for {0:?}: the link or a disk hangs")]
    Stalled(Duration),
}

/// What outlives a failed attempt, so that the next goes on from it.
#[derive(Debug)]
pub struct Carried {
    /// Which copy.
    pub copy: String,
    /// What the target lacks of it, by the VM's disks, not counting what the bitmaps record.
    pub outstanding: Vec<Outstanding>,
    /// They go on recording.
    pub bitmaps: Bitmaps,
}

/// The disks that a move copies, at the source.
#[derive(Debug)]
pub struct Disks {
    /// Their numbers on the streams: those of the VM's disks. N.B. all lists here are of the disks
    /// that are copied, in this order.
    ids: Vec<u16>,
    names: Vec<String>,
    bitmaps: Bitmaps,
    sender: Arc<Sender>,
    rounds: Rounds,
    swapped: Instant,
    /// What was written since this QEMU began, where a way back needs it.
    changed: Option<Vec<ExtentSet>>,
    /// Pushed so far, so that a failure to push loses nothing.
    unpushed: Vec<ExtentSet>,
    /// Rounds so far.
    pub count: u32,
    /// Bytes per second that the guest dirtied in the last round.
    pub dirty_rate: f64,
}

/// Longest a single round may take without any byte becoming safe.
const CHECK: Duration = Duration::from_millis(500);

impl Disks {
    /// Begins: from here on every write of the guest to the disks that are copied is recorded;
    /// `copied` are their numbers and names.
    ///
    /// # Errors
    /// [`Error::Bitmaps`].
    pub async fn begin(
        copied: Vec<(u16, String)>,
        mut bitmaps: Bitmaps,
        resumed: bool,
        sender: Arc<Sender>,
        history: &History,
    ) -> Result<Self, (Error, Bitmaps)> {
        let begun = if resumed { Ok(()) } else { bitmaps.begin().await };
        let changed = match (begun, history.own) {
            (Err(error), _) => Err(error),
            (Ok(()), None) => Ok(None),
            (Ok(()), Some(epoch)) => bitmaps.look(&since_name(epoch)).await.map(Some),
        };
        let changed = match changed {
            Ok(changed) => changed,
            Err(error) => return Err((error.into(), bitmaps)),
        };
        let (ids, names): (Vec<_>, Vec<_>) = copied.into_iter().unzip();
        Ok(Self {
            unpushed: vec![ExtentSet::new(); names.len()],
            ids,
            names,
            bitmaps,
            sender,
            rounds: Rounds::default(),
            swapped: Instant::now(),
            changed,
            count: 0,
            dirty_rate: 0.0,
        })
    }

    /// Sends what the target lacks, judging by what it holds.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn seed(
        &mut self,
        holds: &[Holds],
        copy: &str,
        carried: Option<&[Outstanding]>,
        history: &History,
        stall: Duration,
    ) -> Result<(), Error> {
        for (i, disk) in self.ids.iter().copied().enumerate() {
            let hold = holds.get(usize::from(disk)).unwrap_or(&Holds::Anything);
            let carried = carried.and_then(|carried| carried.get(usize::from(disk)));
            let whole = ExtentSet::whole(self.bitmaps.nodes()[i].size);
            let since = match (hold, &self.changed) {
                (Holds::Left(epoch), Some(changed)) => {
                    history.since(*epoch, &self.names[i], &changed[i])
                }
                _ => None,
            };
            match (hold, carried, since) {
                (Holds::Zeros, ..) => drop(self.sender.push(disk, Mode::Blank, &whole)?),
                (Holds::Copy(held), Some(carried), _) if held == copy => {
                    self.sender.push(disk, Mode::Over, &carried.copy)?;
                    self.sender.push(disk, Mode::Compare, &carried.compare)?;
                }
                (_, _, Some(since)) => drop(self.sender.push(disk, Mode::Over, &since)?),
                _ => drop(self.sender.push(disk, Mode::Compare, &whole)?),
            }
        }
        self.wait(stall).await
    }

    /// Waits until all that was pushed is safe; gives up when nothing moves.
    ///
    /// # Errors
    /// [`Error::Streams`], [`Error::Stalled`].
    pub async fn wait(&self, stall: Duration) -> Result<(), Error> {
        let (mut left, mut since) = (self.sender.left(), Instant::now());
        loop {
            let sender = self.sender.clone();
            let waited = tokio::task::spawn_blocking(move || sender.wait(CHECK)).await;
            match waited {
                Ok(Err(mover::sender::Error::Deadline(_))) => {}
                Ok(done) => return Ok(done?),
                Err(_) => return Err(mover::sender::Error::Stopped.into()),
            }
            let now = self.sender.left();
            if now != left {
                (left, since) = (now, Instant::now());
            } else if since.elapsed() > stall {
                return Err(Error::Stalled(stall));
            }
        }
    }

    /// One round: what was written since the last is sent. Returns what to do next.
    ///
    /// # Errors
    /// [`Error`]; [`Error::Outrun`] when the guest cannot be caught.
    pub async fn round(
        &mut self,
        policy: &Policy,
        rate: f64,
        stall: Duration,
    ) -> Result<Next, Error> {
        let took = self.swapped.elapsed();
        let dirtied = self.swap().await?;
        let round = Round { dirtied, took, rate };
        self.dirty_rate = round.dirty_rate();
        let next = self.rounds.next(policy, &round);
        if next == Next::Outrun {
            let advice = match self.rounds.throttle() {
                Some(_) => " even though its writes were throttled",
                None => "",
            };
            let mib = |bytes: f64| (bytes / f64::from(1 << 20)) as u64;
            return Err(Error::Outrun { dirty: mib(self.dirty_rate), rate: mib(rate), advice });
        }
        self.wait(stall).await?;
        Ok(next)
    }

    /// The last delta, once the guest stands still.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn last(&mut self, stall: Duration) -> Result<(), Error> {
        self.swap().await?;
        self.wait(stall).await
    }

    /// Swaps the bitmaps and pushes what the old ones held. Returns its bytes.
    async fn swap(&mut self) -> Result<u64, Error> {
        let written = self.bitmaps.swap().await?;
        self.swapped = Instant::now();
        self.count += 1;
        let bytes = written.iter().map(ExtentSet::bytes).sum();
        if let Some(changed) = &mut self.changed {
            for (all, new) in changed.iter_mut().zip(&written) {
                all.union_with(new);
            }
        }
        for (all, new) in self.unpushed.iter_mut().zip(&written) {
            all.union_with(new);
        }
        for (i, extents) in written.iter().enumerate() {
            self.sender.push(self.ids[i], Mode::Over, extents)?;
            self.unpushed[i] = ExtentSet::new();
        }
        self.bitmaps.tidy().await?;
        Ok(bytes)
    }

    /// The streams' totals.
    pub fn counters(&self) -> mover::counters::Counters {
        self.sender.counters()
    }

    /// What has to be known for a way back, by disk.
    pub fn history(&self, history: &History) -> History {
        let sizes = self.names.iter().cloned().zip(self.bitmaps.nodes().iter().map(|n| n.size));
        let empty = Vec::new();
        let changed = self.changed.as_ref().unwrap_or(&empty);
        let recorded = self.names.iter().cloned().zip(changed.iter().cloned());
        let recorded: BTreeMap<_, _> = recorded.collect();
        history.handed_on(&recorded, &sizes.collect())
    }

    /// Ends the streams; returns what the next attempt needs.
    pub async fn carry(self, copy: &str) -> Carried {
        let Self { ids, bitmaps, sender, unpushed, .. } = self;
        let stopped = tokio::task::spawn_blocking(move || stop(sender)).await;
        let mut outstanding = stopped.unwrap_or_default();
        let all = ids.iter().map(|id| usize::from(*id) + 1).max().unwrap_or(0);
        outstanding.resize_with(all.max(outstanding.len()), Outstanding::default);
        for (id, extents) in ids.iter().zip(&unpushed) {
            outstanding[usize::from(*id)].copy.union_with(extents);
        }
        Carried { copy: copy.to_owned(), outstanding, bitmaps }
    }
}

/// Bytes that the guest has written since the last swap.
///
/// # Errors
/// QEMU's refusal.
pub async fn recorded(qemu: &crate::qemu::Qemu) -> Result<u64, qmp::Error> {
    super::bitmaps::recorded(&qemu.qmp).await
}

/// Ends the streams. Another holder of the sender only looks at its counters.
fn stop(sender: Arc<Sender>) -> Vec<Outstanding> {
    sender.finish()
}

/// The nodes of disks, as QEMU has them. The guest may be shown less than a disk has.
pub fn nodes<'a>(disks: impl Iterator<Item = (&'a str, Option<u64>, &'a Arc<Disk>)>) -> Vec<Node> {
    disks
        .map(|(name, shown, disk)| Node {
            name: crate::qemu::bitmap_node(name),
            size: shown.unwrap_or(disk.size()),
        })
        .collect()
}
