//! The end of a move, at the source.

use super::Shell;
use crate::migration::disks::Disks;
use crate::migration::marks::Mark;
use crate::migration::memory;
use crate::migration::offer::Holds;
use crate::migration::status::Outcome;
use crate::status::Phase;
use handover::Failure;
use handover::source::State;
use handover::wire::v1::FromSource;
use mover::disk::Disk;
use std::collections::BTreeMap;
use std::time::Duration;

/// Messages already given to the control stream get this long to leave.
const LAST_WORDS: Duration = Duration::from_secs(2);

impl Shell {
    /// The guest lives elsewhere: its QEMU here ends.
    pub(super) async fn end_qemu(&mut self) {
        if let Some(disks) = self.take_disks().await {
            let history = disks.history(&self.guest.history);
            if let Ok(body) = serde_json::to_value(&history) {
                self.say(&FromSource::History(body)).await;
            }
        }
        let mut vm = self.launcher.vm.lock().await;
        vm.guest = None;
        drop(vm);
        self.guest.qemu.process.kill().await;
    }

    pub(super) fn mark_superseded(&self) {
        let mut left = BTreeMap::new();
        let holds = self.prepared.iter().flat_map(|prepared| &prepared.disks);
        let copied = self.guest.qemu.spec.disks.iter().zip(holds);
        for (disk, _) in copied.filter(|(_, held)| **held != Holds::Shared) {
            let marked = Disk::source(&disk.path).map_err(crate::migration::marks::Error::from);
            let marked = marked.and_then(|opened| {
                let mark = Mark::Superseded {
                    vm: self.launcher.config.vm.clone(),
                    epoch: self.guest.epoch,
                    heir: self.core.parties.to.heir.0.clone(),
                    left_as: opened.identity()?,
                };
                self.launcher.marks.set(&opened, &mark)?;
                left.insert(disk.name.clone(), mark);
                Ok(())
            });
            if let Err(error) = marked {
                // The owner record still keeps the VM from being started here.
                tracing::error!(%error, disk = %disk.path.display(), "a disk could not be marked");
            }
        }
        self.launcher.show(|status| status.left = left);
    }

    /// Ends the disks' driver and takes the disks from it.
    async fn take_disks(&mut self) -> Option<Disks> {
        if let Some(sender) = &self.sender {
            let sender = sender.clone();
            // A panic there has been printed.
            let _ = tokio::task::spawn_blocking(move || drop(sender.finish())).await;
        }
        self.orders = None;
        self.disks.take()?.await.ok()
    }

    /// Puts back what the attempt changed, keeps what the next one needs, and
    /// says how it ended.
    pub(super) async fn close(mut self) {
        let outcome = self.outcome();
        self.over.send_replace(true);
        if let Some(memory) = self.memory.take() {
            memory.abort();
        }
        if let Some(pumps) = self.pumps.take() {
            pumps.abort();
        }
        let alive = self.guest.qemu.process.exit().is_none();
        if alive && self.disrupted && self.core.state != State::Released {
            let deadline = Duration::from_secs_f64(self.request.policy.answer_seconds);
            if let Err(why) = memory::bring_back(&self.guest.qemu, deadline, false).await {
                tracing::error!(%why, "the guest cannot be resumed");
            }
        }
        if alive {
            self.throttle(None).await;
            if let Err(error) = memory::reset(&self.guest.qemu).await {
                tracing::warn!(%error, "QEMU's migration settings could not be put back");
            }
        }
        let carried = match self.take_disks().await {
            Some(disks) => Some(disks.carry(&self.copy).await),
            None => self.carried.take(),
        };
        let keep = alive && matches!(&outcome, Outcome::Failed { .. });
        let carried = match carried {
            Some(carried) if keep => Some(carried),
            Some(carried) => {
                if alive && let Err(error) = carried.bitmaps.end().await {
                    tracing::warn!(%error, "a dirty bitmap could not be removed");
                }
                None
            }
            None => None,
        };
        let outcome = match outcome {
            Outcome::Failed { reason, .. } => {
                Outcome::Failed { reason, resumable: carried.is_some() }
            }
            other => other,
        };
        if let Some(control) = self.control.take() {
            control.close(LAST_WORDS).await;
        }
        self.show_end(outcome);
        let mut vm = self.launcher.vm.lock().await;
        vm.moving = None;
        vm.carried = carried;
        match (&self.core.state, alive) {
            (State::Released, _) => {
                vm.guest = None;
                vm.left = Some(self.guest.qemu.spec.clone());
                let reason = format!("it went to {}", self.core.parties.to.peer);
                self.launcher.show_guest(Phase::Left, None);
                self.launcher.show_phase(Phase::Left, Some(reason));
            }
            (_, false) => {
                vm.guest = None;
                self.launcher.show_guest(Phase::Stopped, None);
                let reason = "QEMU ended while the guest was being moved".to_owned();
                self.launcher.show_phase(Phase::Stopped, Some(reason));
            }
            (_, true) => {}
        }
    }

    fn outcome(&self) -> Outcome {
        match &self.core.state {
            State::Released => Outcome::Succeeded,
            State::Ended { failure: Failure::Cancelled } => Outcome::Cancelled,
            State::Ended { failure } => {
                Outcome::Failed { reason: failure.to_string(), resumable: false }
            }
            _ => Outcome::Failed { reason: "the launcher is ending".into(), resumable: false },
        }
    }
}
