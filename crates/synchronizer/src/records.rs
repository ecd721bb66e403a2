//! The owner records of a cluster: objects, changed by compare-and-swap on what they say.

use api::owner::{OwnerRecord, Status};
use handover::handler::{Qemu, peer, told_of};
use handover::ledger::Response;
use handover::record::{HostId, InstanceId, Record, Refused, Swap, VmId, apply};
use kube::api::{Patch, PatchParams};
use kube::{Api, Client, ResourceExt};
use reconcile::events::why;
use serde_json::{Value, json};

/// Tries of a swap that others always outrun.
const TRIES: u32 = 10;

/// The owner record of one VM.
#[derive(Clone)]
pub struct OfVm {
    /// The API.
    pub client: Client,
    /// The record's namespace.
    pub namespace: String,
    /// The record's name.
    pub name: String,
}

impl OfVm {
    /// The VM, as launchers know it.
    pub fn vm(&self) -> VmId {
        VmId(api::owner::vm_id(&self.namespace, &self.name))
    }

    fn api(&self) -> Api<OwnerRecord> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// The object, and what it says.
    ///
    /// # Errors
    /// Why it cannot be read, for people.
    pub async fn read(&self) -> Result<(OwnerRecord, Option<Record>), String> {
        let object = self.api().get(&self.name).await.map_err(|error| {
            format!("owner record {}/{} cannot be read: {}", self.namespace, self.name, why(&error))
        })?;
        let record = object.status.clone().unwrap_or_default().record(&self.vm())?;
        Ok((object, record))
    }

    /// Reads, judges and swaps, until nobody was faster.
    pub async fn exchange(
        &self,
        judge: impl Fn(&Status, Option<&Record>) -> Result<Record, Refused>,
        settle: impl Fn(&mut Status),
    ) -> Response {
        let judge = |before: &Status, current: Option<&Record>| match judge(before, current) {
            Ok(next) => {
                let mut after = before.with(&next);
                settle(&mut after);
                Judged { answer: Ok(next), after, whole: false }
            }
            Err(refused) => Judged::refused(before, refused),
        };
        self.carry_out(judge).await
    }

    /// The same, with all that may come of a judgement.
    pub async fn carry_out(&self, judge: impl Fn(&Status, Option<&Record>) -> Judged) -> Response {
        let failed = |why: String| Response::Failed { why };
        for _ in 0..TRIES {
            let (object, current) = match self.read().await {
                Ok(read) => read,
                Err(why) => return failed(why),
            };
            let before = object.status.clone().unwrap_or_default();
            let Judged { answer, after, whole } = judge(&before, current.as_ref());
            let answer = match answer {
                Ok(record) => Response::Done { record },
                Err(refused) => Response::Refused { refused },
            };
            if before == after {
                return answer;
            }
            let patch = match exchange(&object, &before, &after, whole) {
                Ok(patch) => Patch::<OwnerRecord>::Json(patch),
                Err(why) => return failed(why),
            };
            match self.api().patch_status(&self.name, &PatchParams::default(), &patch).await {
                Ok(_) => return answer,
                // A test that failed: another was faster.
                Err(kube::Error::Api(status)) if [409, 422].contains(&status.code) => {}
                Err(error) => return failed(why(&error)),
            }
        }
        failed("others change the record all the time".into())
    }

    /// Writes down that the heir of an attempt is known to have the guest.
    pub async fn arrived(&self, attempt: &str) -> Response {
        let judge = |_: &Status, current: Option<&Record>| {
            current.cloned().ok_or(Refused { current: None, why: "nobody owned it".into() })
        };
        let settle = |status: &mut Status| {
            if status.of.as_ref().is_some_and(|of| of.attempt == attempt) {
                status.arrived = Some(attempt.to_owned());
            }
        };
        self.exchange(judge, settle).await
    }

    /// Takes a guest back that has left, after the record at the other end has let it go.
    pub async fn take_back(&self, change: &Swap) -> Response {
        let vm = self.vm();
        self.exchange(|_, current| apply(&vm, current, change), |_| {}).await
    }

    /// Answers who speaks for the record `asker`, at a move's other end. `qemu_of` is what is known here
    /// of processes, besides what the record says of them.
    pub async fn swap_of(
        &self,
        asker: &HostId,
        change: &Swap,
        qemu_of: impl Fn(&InstanceId) -> Qemu,
    ) -> Response {
        let vm = self.vm();
        let judge = |status: &Status, current: Option<&Record>| {
            let qemu = |instance: &InstanceId| match qemu_of(instance) {
                Qemu::Unknown if status.has_ended(&instance.0) => Qemu::Ended,
                // Another node's handler may know better: none that may live is taken for dead.
                Qemu::Unknown => Qemu::Alive,
                known => known,
            };
            let answer = peer(&vm, current, asker, qemu, change);
            let told = told_of(current, change).filter(|_| answer.is_err());
            match answer {
                Ok(next) => Judged { after: status.with(&next), answer: Ok(next), whole: false },
                // N.B. whoever is told may end its own guest for good: that is written down first.
                Err(refused) => {
                    let mut judged = Judged::refused(status, refused);
                    if let Some(heir) = told {
                        judged.after.told = Some(heir.to_string());
                        judged.whole = true;
                    }
                    judged
                }
            }
        };
        self.carry_out(judge).await
    }
}

/// What becomes of a question.
pub struct Judged {
    /// What is answered.
    pub answer: Result<Record, Refused>,
    /// What is written before.
    pub after: Status,
    /// Nothing of the object may have changed meanwhile, not even what swaps are not based on.
    pub whole: bool,
}

impl Judged {
    /// No, and all stays as it is.
    pub fn refused(before: &Status, refused: Refused) -> Self {
        Self { answer: Err(refused), after: before.clone(), whole: false }
    }
}

/// The swap, on exactly what was read.
fn exchange(
    object: &OwnerRecord,
    before: &Status,
    after: &Status,
    whole: bool,
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
    if whole {
        steps.push(test("/metadata/resourceVersion", json!(object.resource_version())));
    }
    if let Some(of) = &before.of {
        steps.push(test("/status/move/attempt", json!(of.attempt)));
    }
    steps.push(json!({"op": "add", "path": "/status", "value": after}));
    serde_json::from_value(Value::Array(steps)).map_err(|error| error.to_string())
}
