//! A claim that is cloned, and the pod that lends it. Pure.
//!
//! ```text
//! namespace and node of the source            namespace and node of the target
//! claim --(read only)-- lender ====TLS====> importer -- claim
//!                          |  address, certificate  ^
//!                          +---log--> controller ---+ order
//! ```
//!
//! No pod can have both claims: they may be of two namespaces or on two nodes. The lender tells its
//! address and certificate, which the importer is told; both are given one token by Secrets of
//! their own namespaces. N.B. whether anybody may clone a claim of another namespace is judged when
//! the DataVolume is written: see `webapi::admission`.

#[cfg(test)]
mod laws;

use super::Waits;
use super::plan::{Action, OFTEN, Plan, SELDOM, Snapshot, delete, due};
use super::pod::{self, BORROWS, Seen};
use crate::vmi::is_block;
use crate::world::claims_of;
use api::datavolume::{DataVolume, Status};
use api::import::{LEND, Lent, clone_secret};
use api::keys;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use kube::ResourceExt;
use serde_json::json;
use std::sync::Arc;

/// Where the claim is.
const FOLDER: &str = "/source";
const DISK: &str = "/source/disk.img";
const DEVICE: &str = "/dev/source";

/// A claim that is cloned.
#[derive(Debug, Clone, Default)]
pub struct Origin {
    /// Where.
    pub namespace: String,
    /// Which.
    pub name: String,
    /// It, if it is there.
    pub claim: Option<Arc<PersistentVolumeClaim>>,
    /// A DataVolume still fills it.
    pub unfinished: bool,
    /// Who writes to it.
    pub users: Vec<String>,
    /// The pod that lends it.
    pub lender: Option<Arc<Pod>>,
    /// Where it is lent, if that pod has said so.
    pub lent: Option<Lent>,
}

impl Origin {
    /// Why it cannot be cloned: there is none.
    pub fn missing(&self) -> Waits {
        let message = format!(
            "there is no claim {} in namespace {} to be cloned: make it, or correct spec.source.pvc",
            self.name, self.namespace
        );
        Waits::wrong("CloneSourceNotFound", message)
    }

    /// Why it cannot be cloned now.
    fn waits(&self) -> Option<Waits> {
        let Some(claim) = &self.claim else { return Some(self.missing()) };
        let name = format!("{}/{}", self.namespace, self.name);
        let bound = claim.status.as_ref().and_then(|status| status.phase.as_deref());
        if self.unfinished || bound != Some("Bound") {
            let message = format!("claim {name} is not complete yet");
            return Some(Waits::new("CloneSourceNotReady", message));
        }
        (!self.users.is_empty()).then(|| {
            let users = self.users.join(", ");
            let message = format!("claim {name} is cloned once these no longer use it: {users}");
            Waits::wrong("CloneSourceInUse", message)
        })
    }

    /// Has it lent. The error is why it is not lent yet.
    pub fn borrow(
        &self,
        snapshot: &Snapshot,
        status: &mut Status,
        plan: &mut Plan,
    ) -> Result<(), Waits> {
        plan.again = Some(SELDOM);
        if let Some(why) = self.waits() {
            // Who wants to write goes first.
            plan.actions.extend(self.lender.iter().filter_map(|lender| delete(lender)));
            return Err(why);
        }
        let starts = || {
            let message = format!("claim {}/{} is about to be lent", self.namespace, self.name);
            Waits::new("CloneSourceStarts", message)
        };
        let (Some(lender), Some(claim)) = (&self.lender, &self.claim) else {
            plan.actions.extend(self.begin(&snapshot.volume));
            return Err(starts());
        };
        if lender.metadata.deletion_timestamp.is_some()
            || !claims_of(lender).any(|used| used == claim.name_any())
        {
            plan.actions.extend(delete(lender));
            return Err(starts());
        }
        match pod::see(lender) {
            Seen::Runs if self.lent.is_some() => Ok(()),
            Seen::Runs => {
                plan.again = Some(OFTEN);
                Err(starts())
            }
            Seen::Waits(why) => {
                // Whoever made the pod may have ended before this.
                let token = Action::GiveToken(Arc::clone(lender));
                plan.actions.extend([self::secret(&snapshot.volume), token]);
                Err(why.map_or_else(starts, |(reason, message)| Waits::new(&reason, message)))
            }
            Seen::Done => Err(self.give_up(lender, snapshot, status, plan, starts())),
            Seen::Restarts(reason, message) | Seen::Lost(reason, message) => {
                let why = Waits::wrong(&reason, message);
                Err(self.give_up(lender, snapshot, status, plan, why))
            }
        }
    }

    /// Makes the lender.
    fn begin(&self, volume: &DataVolume) -> Vec<Action> {
        let secret = self::secret(volume);
        let pod = self.claim.as_ref().and_then(|claim| build(volume, claim).ok());
        let lender = pod.map(|pod| Action::CreateLender(Box::new(pod)));
        std::iter::once(secret).chain(lender).collect()
    }

    /// Replaces a lender that has ended, after a pause.
    fn give_up(
        &self,
        lender: &Pod,
        snapshot: &Snapshot,
        status: &mut Status,
        plan: &mut Plan,
        why: Waits,
    ) -> Waits {
        let count = status.restart_count.unwrap_or(0);
        if snapshot.now >= due(lender, count)
            && let Some(delete) = delete(lender)
        {
            status.restart_count = Some(count + 1);
            plan.actions.push(delete);
        }
        why
    }

    /// Whether an importer waits for a lender that no longer lends.
    pub fn is_cut_off(&self, importer: &Pod) -> bool {
        let Some(uid) = importer.annotations().get(BORROWS) else { return false };
        let lends = |lender: &Arc<Pod>| {
            lender.uid().as_ref() == Some(uid)
                && lender.metadata.deletion_timestamp.is_none()
                && matches!(pod::see(lender), Seen::Runs | Seen::Waits(_))
        };
        !self.lender.as_ref().is_some_and(lends) && pod::see(importer) != Seen::Done
    }
}

/// Makes the Secret with the token that both are given.
fn secret(volume: &DataVolume) -> Action {
    Action::CreateSecret(clone_secret(&volume.name_any()))
}

/// The name of the lender of a DataVolume's source.
pub fn lender_name(volume: &DataVolume) -> String {
    format!("clone-source-{}", volume.uid().unwrap_or_default())
}

/// The pod that lends a claim.
fn build(volume: &DataVolume, claim: &PersistentVolumeClaim) -> serde_json::Result<Pod> {
    let name = lender_name(volume);
    let owner = format!("{}/{}", volume.namespace().unwrap_or_default(), volume.name_any());
    let used = json!({"claimName": claim.name_any(), "readOnly": true});
    let (mounts, devices, path) = match is_block(claim) {
        true => (json!([]), json!([{"name": "source", "devicePath": DEVICE}]), DEVICE),
        false => {
            let mount = json!({"name": "source", "mountPath": FOLDER, "readOnly": true});
            (json!([mount]), json!([]), DISK)
        }
    };
    let mut environment = vec![json!({"name": LEND, "value": path})];
    environment.extend(pod::listens(&name));
    serde_json::from_value(json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": name, "namespace": claim.namespace(),
            "annotations": {keys::LENDS_TO: owner},
            "labels": {
                keys::APP: keys::LENDER, keys::LENDS_TO_UID: volume.uid(),
                "app": "containerized-data-importer",
            },
        },
        "spec": {
            // Another one has another certificate, which its importer has to be told.
            "restartPolicy": "Never",
            "automountServiceAccountToken": false,
            "enableServiceLinks": false,
            "terminationGracePeriodSeconds": 5,
            "volumes": [{"name": "source", "persistentVolumeClaim": used}],
            "containers": [{
                "name": "lender", "command": ["godwit", "lend"],
                "env": environment,
                "resources": {"requests": {"cpu": "100m", "memory": "64Mi"}},
                "volumeMounts": mounts, "volumeDevices": devices,
            }],
        },
    }))
}
