//! A VM in one word. Pure.

use super::plan::{Snapshot, Wish};
use api::conditions::{self, types};
use api::datavolume;
use api::vm::{Printable, RunStrategy, Status};
use api::vmi::Phase;

/// The VM in one word: the first that fits, in KubeVirt's order.
pub fn printable(snapshot: &Snapshot, wish: &Wish, status: &Status) -> Printable {
    let vmi = snapshot.vmi.as_deref();
    let found = vmi.and_then(|vmi| vmi.status.as_ref());
    let phase = found.map(|s| s.phase).unwrap_or_default();
    let starting =
        matches!(phase, Phase::Pending | Phase::Scheduling | Phase::Scheduled | Phase::Unset);
    let because = |reason: &str| {
        found.is_some_and(|s| {
            let why = s.conditions.iter().filter_map(|c| c.reason.as_deref());
            why.chain(s.reason.as_deref()).any(|r| r == reason)
        })
    };
    let volumes: Vec<datavolume::Phase> = snapshot
        .volumes
        .iter()
        .filter_map(|(_, volume)| volume.as_ref())
        .map(|volume| volume.status.as_ref().map(|s| s.phase).unwrap_or_default())
        .collect();
    let any = |phases: &[datavolume::Phase]| volumes.iter().any(|phase| phases.contains(phase));
    use datavolume::Phase as Disk;
    match vmi {
        Some(vmi) => match () {
            () if vmi.metadata.deletion_timestamp.is_some() && !phase.is_final() => {
                Printable::Stopping
            }
            () if phase.is_final() && matches!(wish, Wish::Stop(_)) => Printable::Stopping,
            () if found.and_then(|s| s.migration_state.as_ref()).is_some_and(|s| !s.is_over()) => {
                Printable::Migrating
            }
            () if found.is_some_and(|s| conditions::is(&s.conditions, types::PAUSED)) => {
                Printable::Paused
            }
            () if phase == Phase::Running => Printable::Running,
            () if phase == Phase::Unknown => Printable::Unknown,
            () if phase == Phase::WaitingForSync => Printable::WaitingForReceiver,
            () if because("ErrorPvcNotFound") => Printable::ErrorPvcNotFound,
            () if starting && any(&[Disk::Failed]) => Printable::DataVolumeError,
            () if because("Unschedulable") => Printable::ErrorUnschedulable,
            () if starting && volumes.iter().any(|phase| *phase != Disk::Succeeded) => {
                match any(&[Disk::WaitForFirstConsumer]) {
                    true => Printable::WaitingForVolumeBinding,
                    false => Printable::Provisioning,
                }
            }
            () if because("ErrImagePull") => Printable::ErrImagePull,
            () if because("ImagePullBackOff") => Printable::ImagePullBackOff,
            () if starting => Printable::Starting,
            () => Printable::Stopped,
        },
        None if matches!(wish, Wish::StartAt(_)) => Printable::CrashLoopBackOff,
        None if any(&[Disk::Failed]) => Printable::DataVolumeError,
        None if matches!(wish, Wish::Start { .. }) => Printable::Starting,
        None if any(&[
            Disk::ImportInProgress,
            Disk::ImportScheduled,
            Disk::CloneInProgress,
            Disk::CloneScheduled,
        ]) =>
        {
            Printable::Provisioning
        }
        None if status.run_strategy == Some(RunStrategy::WaitAsReceiver) => {
            Printable::WaitingForReceiver
        }
        None => Printable::Stopped,
    }
}
