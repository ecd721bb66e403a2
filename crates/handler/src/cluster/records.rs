//! The owner records of a cluster: objects, changed by compare-and-swap on what they say.

use super::Shared;
use api::conditions::moment;
use api::owner::{Ended, OwnerRecord, Status};
use channel::gateway::{Answer, Service};
use channel::identity::SpiffeId;
use handover::handler::{Qemu, local, peer};
use handover::ledger::{Request, Response};
use handover::record::{HostId, InstanceId, Record, Refused, State, Swap, VmId};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Patch, PatchParams};
use kube::{Api, ResourceExt};
use reconcile::events::why;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// Tries of a swap that others always outrun.
const TRIES: u32 = 10;
/// Ends of QEMUs are looked for this often.
const LOOK: Duration = Duration::from_millis(200);

/// The record of one VM, for its launcher: it may ask about no other.
pub struct Door {
    /// The VM's record.
    pub record: OfVm,
    /// The launcher's pod.
    pub pod: Arc<Pod>,
}

/// The owner record of one VM.
#[derive(Clone)]
pub struct OfVm {
    /// The handler.
    pub shared: Shared,
    /// The record's namespace.
    pub namespace: String,
    /// The record's name.
    pub name: String,
    /// The VM, as launchers know it.
    pub vm: VmId,
}

fn failed(why: impl Into<String>) -> Value {
    serde_json::to_value(Response::Failed { why: why.into() }).unwrap_or_default()
}

impl Service for Door {
    fn peer<'a>(&'a self, _: &'a SpiffeId, _: Value) -> Answer<'a> {
        Box::pin(async { failed("nobody but its launcher asks here") })
    }

    fn local(&self, request: Value) -> Answer<'_> {
        Box::pin(async move {
            let response = match serde_json::from_value(request) {
                Ok(request) => self.answer(request).await,
                Err(error) => Response::Failed { why: error.to_string() },
            };
            serde_json::to_value(response).unwrap_or_default()
        })
    }

    /// Hosts of a cluster share their records: what the other's would be asked is asked here, which
    /// also goes when the other is gone.
    ///
    /// N.B. nothing else is asked of it: a launcher has no say in this handler's name.
    fn instead_of<'a>(&'a self, peer: &'a SpiffeId, request: &'a Value) -> Option<Answer<'a>> {
        let own = self.record.shared.config.id();
        if peer.cluster() != own.cluster() {
            return Some(Box::pin(async { failed("other clusters are not reached yet") }));
        }
        Some(Box::pin(async move {
            let response = match serde_json::from_value(request.clone()) {
                Ok(Request::Swap { vm, change }) if vm == self.record.vm => {
                    self.record.swap_of_peer(&own, &change).await
                }
                Ok(_) => Response::Failed { why: "a launcher asks about its own VM alone".into() },
                Err(error) => Response::Failed { why: error.to_string() },
            };
            serde_json::to_value(response).unwrap_or_default()
        }))
    }
}

impl Door {
    async fn answer(&self, request: Request) -> Response {
        let record = &self.record;
        let asked = match &request {
            Request::Read { vm } | Request::Swap { vm, .. } => Some(vm),
            Request::Watch { .. } => None,
        };
        if asked.is_some_and(|vm| *vm != record.vm) {
            let why = format!("this launcher's VM is {}", record.vm);
            return Response::Failed { why };
        }
        match request {
            Request::Read { .. } => match record.read().await {
                Ok((_, record)) => Response::Record { record },
                Err(why) => Response::Failed { why },
            },
            Request::Swap { change, .. } => self.swap(&change).await,
            Request::Watch { instance, pid, start_time } => {
                match record.shared.watch.add(&instance, pid, start_time) {
                    Ok(()) => Response::Watching,
                    Err(error) => Response::Failed { why: error.to_string() },
                }
            }
        }
    }

    async fn swap(&self, asked: &Swap) -> Response {
        let change = of_cluster(asked, &self.record.shared.config.id());
        let judge = |status: &Status, current: Option<&Record>| {
            let qemu = |instance: &InstanceId| known(&self.record.shared, status, instance);
            local(&self.record.vm, current, qemu, &change)
        };
        // Who runs the guest from now on is this launcher.
        let takes =
            matches!(change, Swap::Start { .. } | Swap::Adopt { .. } | Swap::HandBack { .. });
        let settle = |status: &mut Status| {
            if takes {
                status.node = Some(self.record.shared.config.node.clone());
                status.pod = Some(self.pod.name_any());
                status.volumes = volumes(&self.pod);
            }
        };
        let mut answer = self.record.exchange(judge, settle).await;
        // The launcher knows the other host by its own name.
        if let (Response::Done { record }, Swap::Arm { to, .. }) = (&mut answer, asked)
            && let State::Armed(of) = &mut record.state
        {
            of.peer.clone_from(&to.peer);
        }
        answer
    }
}

/// The claims that are a pod's disks, by the VM's volumes.
pub fn volumes(pod: &Pod) -> BTreeMap<String, String> {
    let all = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
    let claims = all.filter_map(|volume| {
        let claim = volume.persistent_volume_claim.as_ref()?;
        Some((volume.name.clone(), claim.claim_name.clone()))
    });
    claims.collect()
}

/// A swap as the cluster's records have it: all its hosts are one to them, since they share them.
fn of_cluster(swap: &Swap, own: &SpiffeId) -> Swap {
    let mut swap = swap.clone();
    match &mut swap {
        Swap::Arm { to: of, .. } | Swap::Expect { from: of, .. } => {
            of.peer = ledger(&of.peer, own);
        }
        Swap::Relinquish { peer, .. } => *peer = ledger(peer, own),
        _ => {}
    }
    swap
}

/// Whose records a host's are: its own cluster's, or its own.
fn ledger(host: &HostId, own: &SpiffeId) -> HostId {
    let id: Result<SpiffeId, _> = host.0.parse();
    match id {
        Ok(id) if id.cluster() == own.cluster() => HostId(format!("spiffe://{}", own.cluster())),
        _ => host.clone(),
    }
}

impl OfVm {
    /// Answers a host's handler that has proven who it is.
    pub async fn swap_of_peer(&self, asker: &SpiffeId, change: &Swap) -> Response {
        let own = self.shared.config.id();
        let change = of_cluster(change, &own);
        let asker = ledger(&HostId(asker.to_string()), &own);
        let judge = |status: &Status, current: Option<&Record>| {
            let qemu = |instance: &InstanceId| match known(&self.shared, status, instance) {
                // Another node's handler may know better: none that may live is taken for dead.
                Qemu::Unknown => Qemu::Alive,
                known => known,
            };
            peer(&self.vm, current, &asker, qemu, &change)
        };
        self.exchange(judge, |_| {}).await
    }

    fn api(&self) -> Api<OwnerRecord> {
        Api::namespaced(self.shared.client.clone(), &self.namespace)
    }

    async fn read(&self) -> Result<(OwnerRecord, Option<Record>), String> {
        let object = self.api().get(&self.name).await.map_err(|error| {
            format!("owner record {}/{} cannot be read: {}", self.namespace, self.name, why(&error))
        })?;
        let record = object.status.clone().unwrap_or_default().record(&self.vm)?;
        Ok((object, record))
    }

    /// Reads, judges and swaps, until nobody was faster.
    async fn exchange(
        &self,
        judge: impl Fn(&Status, Option<&Record>) -> Result<Record, Refused>,
        settle: impl Fn(&mut Status),
    ) -> Response {
        let failed = |why: String| Response::Failed { why };
        for _ in 0..TRIES {
            let (object, current) = match self.read().await {
                Ok(read) => read,
                Err(why) => return failed(why),
            };
            let before = object.status.clone().unwrap_or_default();
            let next = match judge(&before, current.as_ref()) {
                Ok(next) => next,
                Err(refused) => return Response::Refused { refused },
            };
            let mut after = before.with(&next);
            settle(&mut after);
            if before == after {
                return Response::Done { record: next };
            }
            let patch = match exchange(&object, &before, &after) {
                Ok(patch) => Patch::<OwnerRecord>::Json(patch),
                Err(why) => return failed(why),
            };
            match self.api().patch_status(&self.name, &PatchParams::default(), &patch).await {
                Ok(_) => return Response::Done { record: next },
                // A test that failed: another was faster.
                Err(kube::Error::Api(status)) if [409, 422].contains(&status.code) => {}
                Err(error) => return failed(why(&error)),
            }
        }
        failed("others change the record all the time".into())
    }
}

/// The swap, on exactly what was read.
fn exchange(
    object: &OwnerRecord,
    before: &Status,
    after: &Status,
) -> Result<json_patch::Patch, String> {
    let test = |path: &str, value: Value| json!({"op": "test", "path": path, "value": value});
    let mut steps = match object.status {
        // N.B. without a status there is nothing else to test.
        None => vec![test("/metadata/resourceVersion", json!(object.resource_version()))],
        Some(_) => vec![
            test("/status/epoch", json!(before.epoch)),
            test("/status/owner", json!(before.owner)),
            test("/status/state", json!(before.state)),
        ],
    };
    if let Some(of) = &before.of {
        steps.push(test("/status/move/attempt", json!(of.attempt)));
    }
    steps.push(json!({"op": "add", "path": "/status", "value": after}));
    serde_json::from_value(Value::Array(steps)).map_err(|error| error.to_string())
}

/// What is known of an instance's QEMU: here, or as another node has written it down.
fn known(shared: &Shared, status: &Status, instance: &InstanceId) -> Qemu {
    match shared.watch.qemu_of(instance) {
        Qemu::Unknown if status.has_ended(&instance.0) => Qemu::Ended,
        known => known,
    }
}

/// Writes down which owners and heirs of this node have ended. Never ends by itself.
pub async fn report(shared: Shared) {
    loop {
        tokio::time::sleep(LOOK).await;
        for record in shared.owners.state() {
            let Some(status) = &record.status else { continue };
            // Of a move that is not over either side may be here.
            let here = status.node.as_deref() == Some(&*shared.config.node);
            if !here && status.state == "idle" {
                continue;
            }
            for (field, instance) in unended(status) {
                if shared.watch.qemu_of(&instance) == Qemu::Ended
                    && let Err(error) = write_end(&shared, &record, status, field, &instance).await
                {
                    tracing::warn!("the end of {instance} cannot be written down: {}", why(&error));
                }
            }
        }
    }
}

/// Those who may run a VM, or may yet, and of whom nobody has said that they have ended; and where
/// that is said.
fn unended(status: &Status) -> Vec<(&'static str, InstanceId)> {
    let heir = status.of.as_ref().filter(|_| ["armed", "committed"].contains(&&*status.state));
    let heir = heir.map(|of| ("heirEnded", of.heir.clone()));
    let owner = Some(("ended", status.owner.clone())).filter(|(_, owner)| !owner.is_empty());
    let all = owner.into_iter().chain(heir).filter(|(_, instance)| !status.has_ended(instance));
    all.map(|(field, instance)| (field, InstanceId(instance))).collect()
}

async fn write_end(
    shared: &Shared,
    record: &OwnerRecord,
    status: &Status,
    field: &str,
    instance: &InstanceId,
) -> kube::Result<()> {
    let namespace = record.namespace().unwrap_or_default();
    let records: Api<OwnerRecord> = Api::namespaced(shared.client.clone(), &namespace);
    let ended = Ended {
        instance: instance.0.clone(),
        node: Some(shared.config.node.clone()),
        at: Some(moment(Timestamp::now())),
    };
    let steps = json!([
        {"op": "test", "path": "/status/epoch", "value": status.epoch},
        {"op": "test", "path": "/status/owner", "value": status.owner},
        {"op": "add", "path": format!("/status/{field}"), "value": ended},
    ]);
    let patch = serde_json::from_value(steps).map_err(kube::Error::SerdeError)?;
    let patch = Patch::<OwnerRecord>::Json(patch);
    match records.patch_status(&record.name_any(), &PatchParams::default(), &patch).await {
        Err(kube::Error::Api(status)) if [404, 409, 422].contains(&status.code) => Ok(()),
        other => other.map(|_| ()),
    }
}
