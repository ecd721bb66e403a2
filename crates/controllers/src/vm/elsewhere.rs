//! VMs whose guests come from other VMs or have left for them. Pure.

use super::plan::Snapshot;
use api::keys;
use api::vm::RunStrategy;
use api::vmi::Phase;
use kube::ResourceExt;
use serde_json::{Value, json};

/// Whether the guest is another VM's by now.
pub(super) fn has_left(snapshot: &Snapshot) -> bool {
    let record = snapshot.owner.as_ref().and_then(|owner| owner.status.as_ref());
    record.is_some_and(|record| record.has_left().is_some())
}

/// Whether the guest is known to have come to another VM.
pub(super) fn has_arrived(snapshot: &Snapshot) -> bool {
    let record = snapshot.owner.as_ref().and_then(|owner| owner.status.as_ref());
    record.is_some_and(|record| record.has_arrived().is_some())
}

/// What becomes of a VM's strategy once a guest has come or gone. None: it stays as it is.
pub(super) fn settle(snapshot: &Snapshot) -> Option<Value> {
    let vm = &snapshot.vm;
    let version = vm.resource_version();
    let strategy = vm.spec.strategy();
    let phase =
        snapshot.vmi.as_ref().and_then(|vmi| vmi.status.as_ref()).map(|status| status.phase);
    if strategy == RunStrategy::WaitAsReceiver {
        let restored = vm.annotations().get(keys::RESTORE_STRATEGY);
        let restored = restored.map_or("Always", String::as_str);
        let record = snapshot.owner.as_ref().and_then(|owner| owner.status.as_ref());
        let came = record.is_some_and(|record| record.came_and_ended());
        return (came || phase == Some(Phase::Running)).then(|| {
            json!({
                "metadata": {
                    "resourceVersion": version, "annotations": {keys::RESTORE_STRATEGY: null},
                },
                "spec": {"runStrategy": restored, "running": null},
            })
        });
    }
    // The migration is told of first: it looks at the VMI.
    let over = snapshot.moves.iter().all(|migration| migration.is_over());
    (has_arrived(snapshot) && over && strategy != RunStrategy::Halted).then(|| {
        json!({
            "metadata": {"resourceVersion": version},
            "spec": {"runStrategy": "Halted", "running": null},
        })
    })
}
