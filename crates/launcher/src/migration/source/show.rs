//! What the source shows of a move.

use super::Shell;
use crate::migration::progress::{DiskProgress, MemoryProgress, Outlook};
use crate::migration::status::{Outcome, Predicted};
use crate::migration::{disks, memory};
use channel::resumable::Monitor;
use handover::source::State;
use mover::counters::Limit;
use std::time::Duration;

impl Shell {
    pub(super) fn show_phase(&self) {
        let (phase, waiting) = (self.core.phase(), self.core.waiting());
        self.launcher.show(|status| {
            if let Some(migration) = &mut status.migration {
                migration.enter(phase, waiting, &self.request.policy);
            }
        });
    }

    pub(super) async fn show_progress(&mut self) {
        let Some(sender) = &self.sender else { return };
        let counters = sender.counters();
        let (per_disk, left) = (sender.per_disk(), sender.left());
        self.meter.sample(self.begun.elapsed(), counters);
        let (rate, limit) = self.meter.rate();
        let running = matches!(self.core.state, State::Seeding | State::Arming | State::Converging);
        let recorded = match running {
            true => disks::recorded(&self.guest.qemu).await.unwrap_or(0),
            false => 0,
        };
        let memory = match &self.core.state {
            State::Converging | State::Paused | State::Loading => self.memory_progress().await,
            _ => None,
        };
        let dirty_rate = self.dirty_rate(recorded);
        let total_memory = self.guest.qemu.spec.memory_mib << 20;
        // What the link has carried while it had to: a stream that mostly waits tells nothing.
        let link = self.disk_rate().max(memory.as_ref().map_or(0.0, |m| m.rate));
        let outlook = Outlook {
            disk_left: left,
            disk_rate: link,
            disk_dirty_rate: dirty_rate,
            memory_left: memory.as_ref().map_or(total_memory, |m| m.left),
            memory_rate: link,
            memory_dirty_rate: memory.as_ref().map_or(0.0, |m| m.dirty_rate),
            buffered: self.memory_monitors.iter().map(Monitor::buffered).sum(),
            rtt: self.rtt(),
            fixed: FIXED,
        };
        let limit = match limit {
            Some(_) if rate > 0.0 && dirty_rate >= rate => Some(Limit::GuestDirtyRate),
            limit => limit,
        };
        let names = self.guest.qemu.spec.disks.iter().zip(per_disk);
        let disks = names.map(|(disk, (total, left))| DiskProgress {
            name: disk.name.clone(),
            size: total.max(disk.size.unwrap_or(0)),
            total,
            left,
        });
        let disks: Vec<_> = disks.collect();
        let passed = self.begun.elapsed().as_secs_f64();
        let first = outlook.eta().zip(outlook.downtime(recorded));
        let resumes = self.resumes();
        let first =
            first.map(|(left, downtime_ms)| Predicted { seconds: passed + left, downtime_ms });
        self.launcher.show(|status| {
            let Some(migration) = &mut status.migration else { return };
            migration.predicted = migration.predicted.or(first);
            let progress = &mut migration.progress;
            progress.disks = disks;
            progress.count(&counters, resumes);
            progress.bytes_left = left;
            progress.rate = rate as u64;
            progress.dirty_rate = dirty_rate as u64;
            progress.eta_seconds = outlook.eta();
            progress.predicted_downtime_ms = outlook.downtime(recorded);
            progress.limit = limit;
            if let Some(memory) = memory {
                progress.memory = Some(memory.shown());
            }
        });
    }

    /// How often streams but those of disks have gone on after a break.
    fn resumes(&self) -> u64 {
        self.monitor.iter().chain(&self.memory_monitors).map(Monitor::reconnects).sum()
    }

    fn dirty_rate(&mut self, recorded: u64) -> f64 {
        let now = self.begun.elapsed();
        let (at, before) = std::mem::replace(&mut self.recorded, (now, recorded));
        let span = now.saturating_sub(at).as_secs_f64();
        // A swap between two looks makes the record smaller: keep what was known.
        if span > 0.0 && recorded >= before {
            self.dirtied = (recorded - before) as f64 / span;
        }
        self.dirtied
    }

    async fn memory_progress(&self) -> Option<Memory> {
        let ram = memory::look(&self.guest.qemu).await.ok()?.ram?;
        Some(Memory {
            total: ram.total,
            left: ram.remaining,
            sent: ram.transferred,
            rate: ram.mbps * 1e6 / 8.0,
            dirty_rate: (ram.dirty_pages_rate * ram.page_size) as f64,
        })
    }

    pub(super) fn show_end(&self, outcome: Outcome) {
        let paused = self.resumed.or_else(|| self.paused.map(|at| at.elapsed()));
        // N.B. what was shown while it moved may lack the last delta.
        let counters = self.sender.as_ref().map(|sender| sender.counters());
        let resumes = self.resumes();
        self.launcher.show(|status| {
            let Some(migration) = &mut status.migration else { return };
            migration.phase = self.core.phase().to_owned();
            migration.waiting = None;
            migration.failpoint = None;
            migration.progress.throttle = None;
            if let Some(counters) = counters {
                migration.progress.count(&counters, resumes);
            }
            migration.paused_ms = paused.map(|p| p.as_secs_f64() * 1e3);
            migration.took_seconds = Some(self.begun.elapsed().as_secs_f64());
            if outcome == Outcome::Succeeded {
                migration.progress.bytes_left = 0;
                migration.progress.disks.iter_mut().for_each(|disk| disk.left = 0);
            }
            migration.outcome = Some(outcome);
        });
    }
}

/// Stopping the guest, sending and loading its devices, and two swaps of owner
/// records: measured under TCG on one machine, see docs/benchmarks.md.
pub(crate) const FIXED: Duration = Duration::from_millis(25);

struct Memory {
    total: u64,
    left: u64,
    sent: u64,
    rate: f64,
    dirty_rate: f64,
}

impl Memory {
    fn shown(&self) -> MemoryProgress {
        MemoryProgress {
            total: self.total,
            left: self.left,
            sent: self.sent,
            rate: self.rate as u64,
            dirty_rate: self.dirty_rate as u64,
        }
    }
}
