//! The owner records of a cluster: objects, changed by compare-and-swap on what they say.

use super::Shared;
use super::guests::get;
use api::conditions::moment;
use api::migration::End;
use api::owner::{Ended, Ledger, OwnerRecord, Status};
use api::vmi::VirtualMachineInstance;
use channel::gateway::{Answer, Service};
use channel::identity::SpiffeId;
use handover::handler::{Qemu, is_too_late, local, too_late};
use handover::ledger::{Request, Response};
use handover::record::{AttemptId, HostId, InstanceId, Record, State, Swap, VmId};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Patch, PatchParams};
use kube::{Api, ResourceExt};
use reconcile::events::why;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use synchronizer::link;
use synchronizer::records::{Judged, OfVm as Object};
use synchronizer::wire::Ask;

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

    /// What the other end's host would be asked is asked of the record at the other end, which also goes
    /// when that host is gone. Which one that is says the own record.
    ///
    /// N.B. nothing else is asked: a launcher has no say in this handler's name.
    fn instead_of<'a>(&'a self, _: &'a SpiffeId, request: &'a Value) -> Option<Answer<'a>> {
        Some(Box::pin(async move {
            let response = match serde_json::from_value(request.clone()) {
                Ok(Request::Swap { vm, change }) if vm == self.record.vm => {
                    self.record.ask_other_end(change).await
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
            Request::Read { .. } => match record.object().read().await {
                Ok((_, record)) => Response::Record { record },
                Err(why) => Response::Failed { why },
            },
            Request::Swap { change, .. } => self.swap(&change).await,
            Request::Watch { instance, process } => {
                match record.shared.watch.add(&instance, &process) {
                    Ok(()) => Response::Watching,
                    Err(error) => Response::Failed { why: error.to_string() },
                }
            }
        }
    }

    async fn swap(&self, asked: &Swap) -> Response {
        let change = match self.record.as_recorded(asked).await {
            Ok(change) => change,
            Err(why) => return Response::Failed { why },
        };
        // N.B. an heir that gives back must not have been told of meanwhile.
        let whole = matches!(change, Swap::Relinquish { .. });
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
        let judge = |status: &Status, current: Option<&Record>| {
            let qemu = |instance: &InstanceId| known(&self.record.shared, status, instance);
            let told = status.told.clone().map(InstanceId);
            if is_too_late(told.as_ref(), &change) {
                return Judged::refused(status, too_late(current));
            }
            match local(&self.record.vm, current, qemu, &change) {
                Ok(next) => {
                    let mut after = status.with(&next);
                    settle(&mut after);
                    Judged { answer: Ok(next), after, whole }
                }
                Err(refused) => Judged::refused(status, refused),
            }
        };
        let mut answer = self.record.object().carry_out(judge).await;
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

/// The attempt that a question to the other end's record is about.
fn attempt_of(change: &Swap) -> Option<&AttemptId> {
    match change {
        Swap::Abort { attempt, .. } | Swap::Relinquish { attempt, .. } => Some(attempt),
        _ => None,
    }
}

impl OfVm {
    /// What this record is called in the record at the other end, `other`.
    fn name_for(&self, other: &HostId) -> HostId {
        let cluster = self.shared.config.id().cluster().to_owned();
        match Ledger::parse(other) {
            None => Ledger::shared(&cluster),
            Some(_) => {
                Ledger { cluster, namespace: self.namespace.clone(), name: self.name.clone() }.id()
            }
        }
    }

    /// Which record is at the other end of an attempt: for one that this record knows, or that its VMI
    /// is about to make.
    async fn other_end(&self, attempt: &AttemptId) -> Result<HostId, String> {
        let record = get(&self.shared.owners, &(self.namespace.clone(), self.name.clone()));
        let of = record.and_then(|record| record.status.as_ref()?.of.clone());
        if let Some(of) = of.filter(|of| of.attempt == attempt.0) {
            return Ok(HostId(of.peer));
        }
        let vmis: Api<VirtualMachineInstance> =
            Api::namespaced(self.shared.client.clone(), &self.namespace);
        let vmi = vmis.get(&self.name).await.map_err(|error| {
            format!("{}/{} cannot be read: {}", self.namespace, self.name, why(&error))
        })?;
        let state = vmi.status.and_then(|status| status.migration_state).unwrap_or_default();
        if state.attempt() != Some(&attempt.0) {
            return Err(format!("{}/{} does not move by {attempt}", self.namespace, self.name));
        }
        let of = |end: &End| {
            let end = end.clone();
            Some(Ledger {
                cluster: end.cluster?,
                namespace: end.domain_namespace?,
                name: end.domain_name?,
            })
        };
        match state.other_end() {
            None => Ok(Ledger::shared(self.shared.config.id().cluster())),
            Some(end) => of(end).map(|ledger| ledger.id()).ok_or_else(|| {
                format!("{}/{} does not say where it moves", self.namespace, self.name)
            }),
        }
    }

    /// A launcher's swap, with the names that records have for each other: launchers know hosts.
    async fn as_recorded(&self, swap: &Swap) -> Result<Swap, String> {
        let mut swap = swap.clone();
        match &mut swap {
            Swap::Arm { to: of, .. } | Swap::Expect { from: of, .. } => {
                of.peer = self.other_end(&of.attempt).await?;
            }
            Swap::Relinquish { attempt, peer, .. } => *peer = self.other_end(attempt).await?,
            _ => {}
        }
        Ok(swap)
    }

    /// Asks the record at the other end of a move, in this one's name.
    async fn ask_other_end(&self, mut change: Swap) -> Response {
        let failed = |why: String| Response::Failed { why };
        let Some(attempt) = attempt_of(&change).cloned() else {
            return failed("another record may not be asked this".into());
        };
        let other = match self.other_end(&attempt).await {
            Ok(other) => other,
            Err(why) => return failed(why),
        };
        let own = self.name_for(&other);
        if let Swap::Relinquish { peer, .. } = &mut change {
            peer.clone_from(&own);
        }
        let Some(Ledger { cluster, namespace, name }) = Ledger::parse(&other) else {
            return self.swap_of(&own, &change).await;
        };
        if cluster != self.shared.config.id().cluster() {
            let ask = Ask::Owner { asker: own, namespace, name, change };
            let settings = self.shared.cluster();
            let status = settings.as_ref().and_then(|settings| settings.status.as_ref());
            let address = status.and_then(|status| status.synchronization_addresses.first());
            let credentials = &self.shared.config.credentials;
            let told = link::ask(credentials, address.map(String::as_str), &cluster, ask).await;
            return told.unwrap_or_else(failed);
        }
        let vm = VmId(api::owner::vm_id(&namespace, &name));
        Self { shared: self.shared.clone(), namespace, name, vm }.swap_of(&own, &change).await
    }

    /// Answers who speaks for the record `asker`.
    pub async fn swap_of(&self, asker: &HostId, change: &Swap) -> Response {
        self.object().swap_of(asker, change, |instance| self.shared.watch.qemu_of(instance)).await
    }

    fn object(&self) -> Object {
        Object {
            client: self.shared.client.clone(),
            namespace: self.namespace.clone(),
            name: self.name.clone(),
        }
    }
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
    // Another VMI's heir, or owner, is looked after there.
    let own = match &*status.state {
        "armed" | "committed" => status.other_ledger().is_none(),
        state => state == "expected",
    };
    let heir = status.of.as_ref().filter(|_| own);
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
