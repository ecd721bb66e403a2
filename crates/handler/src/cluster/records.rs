//! The owner records of a cluster: objects, changed by compare-and-swap on what they say.

use super::Shared;
use api::conditions::moment;
use api::owner::{Ended, OwnerRecord, Status};
use channel::gateway::{Answer, Service};
use channel::identity::SpiffeId;
use handover::handler::{Qemu, local};
use handover::ledger::{Request, Response};
use handover::record::{InstanceId, Record, Refused, Swap, VmId};
use jiff::Timestamp;
use kube::api::{Patch, PatchParams};
use kube::{Api, ResourceExt};
use reconcile::events::why;
use serde_json::{Value, json};
use std::time::Duration;

/// Tries of a swap that others always outrun.
const TRIES: u32 = 10;
/// Ends of QEMUs are looked for this often.
const LOOK: Duration = Duration::from_millis(200);

/// The record of one VM, for its launcher: it may ask about no other.
pub struct Door {
    /// The handler.
    pub shared: Shared,
    /// The record's namespace.
    pub namespace: String,
    /// The record's name.
    pub name: String,
    /// The launcher's pod.
    pub pod: String,
    /// The VM, as its launcher knows it.
    pub vm: VmId,
}

/// Nobody asks here yet: hosts of a cluster share their records.
pub struct Closed;

fn closed() -> Value {
    let why = "records of a cluster are asked for through its API".into();
    serde_json::to_value(Response::Failed { why }).unwrap_or_default()
}

impl Service for Closed {
    fn peer<'a>(&'a self, _: &'a SpiffeId, _: Value) -> Answer<'a> {
        Box::pin(async { closed() })
    }

    fn local(&self, _: Value) -> Answer<'_> {
        Box::pin(async { closed() })
    }
}

impl Service for Door {
    fn peer<'a>(&'a self, _: &'a SpiffeId, _: Value) -> Answer<'a> {
        Box::pin(async { closed() })
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
}

impl Door {
    async fn answer(&self, request: Request) -> Response {
        let asked = match &request {
            Request::Read { vm } | Request::Swap { vm, .. } => Some(vm),
            Request::Watch { .. } => None,
        };
        if asked.is_some_and(|vm| *vm != self.vm) {
            let why = format!("this launcher's VM is {}", self.vm);
            return Response::Failed { why };
        }
        match request {
            Request::Read { .. } => match self.read().await {
                Ok((_, record)) => Response::Record { record },
                Err(why) => Response::Failed { why },
            },
            Request::Swap { change, .. } => match self.swap(&change).await {
                Ok(Ok(record)) => Response::Done { record },
                Ok(Err(refused)) => Response::Refused { refused },
                Err(why) => Response::Failed { why },
            },
            Request::Watch { instance, pid, start_time } => {
                match self.shared.watch.add(&instance, pid, start_time) {
                    Ok(()) => Response::Watching,
                    Err(error) => Response::Failed { why: error.to_string() },
                }
            }
        }
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

    /// Swaps; an error is an unknown outcome.
    async fn swap(&self, change: &Swap) -> Result<Result<Record, Refused>, String> {
        for _ in 0..TRIES {
            let (object, current) = self.read().await?;
            let before = object.status.clone().unwrap_or_default();
            let qemu = |instance: &InstanceId| known(&self.shared, &before, instance);
            let next = match local(&self.vm, current.as_ref(), qemu, change) {
                Ok(next) => next,
                Err(refused) => return Ok(Err(refused)),
            };
            if current.as_ref() == Some(&next) {
                return Ok(Ok(next));
            }
            let mut after = before.with(&next);
            if matches!(change, Swap::Start { .. } | Swap::Adopt { .. }) {
                after.node = Some(self.shared.config.node.clone());
                after.pod = Some(self.pod.clone());
            }
            let patch = Patch::<OwnerRecord>::Json(exchange(&object, &before, &after)?);
            match self.api().patch_status(&self.name, &PatchParams::default(), &patch).await {
                Ok(_) => return Ok(Ok(next)),
                // A test that failed: another was faster.
                Err(kube::Error::Api(status)) if [409, 422].contains(&status.code) => {}
                Err(error) => return Err(why(&error)),
            }
        }
        Err("others change the record all the time".into())
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
    let ended = status.ended.as_ref().is_some_and(|ended| ended.instance == instance.0);
    match shared.watch.qemu_of(instance) {
        Qemu::Unknown if ended => Qemu::Ended,
        known => known,
    }
}

/// Writes down which owners of this node have ended. Never ends by itself.
pub async fn report(shared: Shared) {
    loop {
        tokio::time::sleep(LOOK).await;
        for record in shared.owners.state() {
            let Some(status) = &record.status else { continue };
            if status.is_over() || status.node.as_deref() != Some(&*shared.config.node) {
                continue;
            }
            let instance = InstanceId(status.owner.clone());
            if shared.watch.qemu_of(&instance) == Qemu::Ended
                && let Err(error) = write_end(&shared, &record, status).await
            {
                tracing::warn!("the end of {instance} cannot be written down: {}", why(&error));
            }
        }
    }
}

async fn write_end(shared: &Shared, record: &OwnerRecord, status: &Status) -> kube::Result<()> {
    let namespace = record.namespace().unwrap_or_default();
    let records: Api<OwnerRecord> = Api::namespaced(shared.client.clone(), &namespace);
    let ended = Ended {
        instance: status.owner.clone(),
        node: Some(shared.config.node.clone()),
        at: Some(moment(Timestamp::now())),
    };
    let steps = json!([
        {"op": "test", "path": "/status/epoch", "value": status.epoch},
        {"op": "test", "path": "/status/owner", "value": status.owner},
        {"op": "add", "path": "/status/ended", "value": ended},
    ]);
    let patch = serde_json::from_value(steps).map_err(kube::Error::SerdeError)?;
    let patch = Patch::<OwnerRecord>::Json(patch);
    match records.patch_status(&record.name_any(), &PatchParams::default(), &patch).await {
        Err(kube::Error::Api(status)) if [404, 409, 422].contains(&status.code) => Ok(()),
        other => other.map(|_| ()),
    }
}
