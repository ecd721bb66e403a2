//! The end of a move, at the target.

use super::{Input, Received, Shell};
use crate::migration::memory;
use crate::migration::status::Outcome;
use crate::qemu::raw_node;
use crate::status::Phase;
use crate::vm::{Guest, Handle, QMP_DEADLINE};
use handover::Failure;
use handover::target::State;
use qmp::commands::{BlockResize, BlockdevReopen};
use std::time::Duration;
use tokio::sync::mpsc;

/// The source tells what changed on older visits right after it heard that the guest runs.
const HISTORY: Duration = Duration::from_secs(5);
/// Messages already given to the control stream get this long to leave.
const LAST_WORDS: Duration = Duration::from_secs(2);

impl Shell {
    pub(super) async fn close(mut self, mut received: mpsc::Receiver<Input>) {
        if let Some(receiver) = self.receiver.take() {
            receiver.end();
        }
        match self.core.state.clone() {
            State::Running => self.settle(&mut received).await,
            State::Discarded { failure } | State::GaveBack { failure } => {
                self.leave(&failure).await;
            }
            // The launcher is ending: its QEMU ends with it.
            _ => {}
        }
        self.control.clone().close(LAST_WORDS).await;
        if let Some(pumps) = self.pumps.take() {
            pumps.abort();
        }
        self.gate.close();
    }

    /// The guest runs here: it is this launcher's now.
    async fn settle(&mut self, received: &mut mpsc::Receiver<Input>) {
        let guest = Guest {
            qemu: self.qemu.clone(),
            instance: self.core.parties.heir.clone(),
            epoch: self.core.parties.epoch + 1,
            history: self.history.clone(),
        };
        {
            let mut vm = self.launcher.vm.lock().await;
            vm.guest = Some(guest.clone());
            let phase = if self.paused { Phase::Paused } else { Phase::Running };
            self.launcher.show_guest(phase, Some(&guest));
            self.show_outcome(self.settled());
        }
        self.launcher.keep_watch(guest.clone());
        for disk in &self.disks {
            if let Err(error) = self.launcher.marks.clear(&disk.disk) {
                // It says "incomplete" of a disk that is not: a restart will ask for --force.
                tracing::error!(%error, "a disk's mark could not be removed");
            }
        }
        if let Err(error) = memory::reset(&self.qemu).await {
            tracing::warn!(%error, "QEMU's migration settings could not be put back");
        }
        self.grow(&guest).await;
        let history = tokio::time::timeout(HISTORY, async {
            loop {
                match received.recv().await {
                    Some(Input::History(history)) => return Some(history),
                    Some(Input::Core(handover::target::Event::PeerLost)) | None => return None,
                    Some(Input::Core(_)) => {}
                }
            }
        });
        let mut vm = self.launcher.vm.lock().await;
        drop(vm.moving.take());
        drop(vm);
        // Without it the next move back to an older host compares hashes.
        if let Ok(Some(history)) = history.await {
            self.history.inherit(history);
            let mut vm = self.launcher.vm.lock().await;
            if let Some(now) = vm.guest.as_mut().filter(|g| g.instance == guest.instance) {
                now.history = self.history.clone();
            }
        }
    }

    fn settled(&self) -> Outcome {
        match self.qemu.process.exit() {
            None => Outcome::Succeeded,
            Some(_) => Outcome::Failed {
                reason: "the guest is this host's, but its QEMU ended when it was to run it; \
                         its disks are whole: start the VM here"
                    .into(),
                resumable: false,
            },
        }
    }

    /// Shows the guest all of a disk that is larger than the source's.
    async fn grow(&self, guest: &Guest) {
        for received in self.disks.iter().filter(|d| d.shown.is_some()) {
            let Some(spec) = self.request.spec.disks.iter().find(|d| d.name == received.name)
            else {
                continue;
            };
            let reopen = BlockdevReopen { options: vec![raw_node(spec)] };
            let resize = BlockResize {
                node_name: Some(spec.name.clone()),
                size: received.disk.size(),
                ..BlockResize::default()
            };
            let grown = async {
                self.qemu.qmp.execute(reopen, QMP_DEADLINE).await?;
                self.qemu.qmp.execute(resize, QMP_DEADLINE).await
            };
            match grown.await {
                Ok(_) => self.shows_all(guest, &spec.name).await,
                Err(error) => {
                    tracing::warn!(%error, disk = spec.name, "the disk keeps its old size until the VM is restarted");
                }
            }
        }
    }

    /// N.B. what the guest is shown is what the next move copies.
    async fn shows_all(&self, guest: &Guest, disk: &str) {
        let mut vm = self.launcher.vm.lock().await;
        if let Some(now) = vm.guest.as_mut().filter(|g| g.instance == guest.instance) {
            let mut disks = now.qemu.spec.disks.iter_mut();
            disks.find(|d| d.name == disk).into_iter().for_each(|d| d.size = None);
        }
    }

    /// The guest never ran here.
    async fn leave(&mut self, failure: &Failure) {
        self.qemu.process.kill().await;
        if *failure == Failure::Cancelled {
            remove_created(&self.launcher, &self.disks);
        }
        release(&self.disks);
        let mut vm = self.launcher.vm.lock().await;
        vm.moving = None;
        let outcome = match failure {
            Failure::Cancelled => Outcome::Cancelled,
            other => Outcome::Failed { reason: other.to_string(), resumable: true },
        };
        self.show_outcome(outcome);
        self.launcher.show(|status| status.phase = Phase::Empty);
    }

    fn show_outcome(&self, outcome: Outcome) {
        self.launcher.show(|status| {
            if let Some(migration) = &mut status.migration {
                migration.phase = self.core.phase().to_owned();
                migration.waiting = None;
                migration.failpoint = None;
                migration.outcome = Some(outcome);
            }
        });
    }
}

/// N.B. before another move may come: it would find the disks in use.
pub(super) fn release(disks: &[Received]) {
    for received in disks.iter().filter(|d| d.copied) {
        if let Err(error) = received.disk.release() {
            tracing::warn!(error = %crate::chain(&error), "a disk stays locked for a while");
        }
    }
}

/// What only this attempt made is worth nothing without it.
pub(super) fn remove_created(launcher: &Handle, disks: &[Received]) {
    for received in disks.iter().filter(|d| d.created) {
        let removed = launcher.marks.clear(&received.disk).map_err(|e| e.to_string());
        let removed = removed
            .and_then(|()| std::fs::remove_file(received.disk.path()).map_err(|e| e.to_string()));
        if let Err(why) = removed {
            tracing::warn!(%why, disk = %received.disk.path().display(), "left behind");
        }
    }
}
