//! DataVolume: its claim, and the pod that fills it.

mod claim;
#[cfg(test)]
mod laws;
mod plan;
mod pod;
mod show;

use crate::AT_ONCE;
use crate::vm::ignore_gone;
use crate::world::{Key, World, get, key, label};
use api::datavolume::{DataVolume, Phase};
use api::keys;
use claim::Terms;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod, Secret};
use kube::api::{DeleteParams, LogParams, Patch, PatchParams, PostParams, Preconditions};
use kube::{Resource, ResourceExt};
use plan::{Action, Origin, Snapshot};
use reconcile::events::{Kind, why};
use reconcile::kept::reference;
use reconcile::queue::Next;
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;

/// Lines of an importer's log that are read for the last one that tells its progress.
const LINES: i64 = 5;
/// A log that takes longer is not waited for.
const PATIENCE: Duration = Duration::from_secs(2);

/// Why a DataVolume waits.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Waits {
    /// In one word.
    reason: String,
    /// For people.
    message: String,
    /// Somebody has to do something.
    warning: bool,
}

impl Waits {
    /// For what comes by itself.
    fn new(reason: &str, message: String) -> Self {
        Self { reason: reason.into(), message, warning: false }
    }

    /// For somebody.
    fn wrong(reason: &str, message: String) -> Self {
        Self { warning: true, ..Self::new(reason, message) }
    }
}

/// Runs the reconciler. Never ends by itself.
pub async fn run(world: World) {
    let queue = world.volume_queue.clone();
    queue
        .run(AT_ONCE, move |key| {
            let world = world.clone();
            async move { reconcile(&world, &key).await }
        })
        .await;
}

async fn reconcile(world: &World, key: &Key) -> Next {
    let Some(volume) = get(&world.volumes, key) else { return Next::Rest };
    let snapshot = look(world, key, volume).await;
    let plan = plan::plan(&snapshot);
    for action in &plan.actions {
        if let Err(error) = act(world, &snapshot.volume, action).await {
            // Another was faster, or the watch is late: what changed rings again.
            if matches!(&error, kube::Error::Api(status) if status.code == 409) {
                return Next::After(Duration::from_millis(100));
            }
            let text = why(&error);
            tracing::warn!(volume = %format!("{}/{}", key.0, key.1), "cannot {action}: {text}");
            let message = format!("cannot {action}: {text}");
            let about = reference(&*snapshot.volume);
            world.events.say(&about, Kind::Warning, "FailedUpdate", &message).await;
            return Next::Failed;
        }
    }
    match plan.again {
        Some(pause) => Next::After(pause),
        None => Next::Rest,
    }
}

async fn look(world: &World, key: &Key, volume: Arc<DataVolume>) -> Snapshot {
    let pods = world.pods_of(&volume.uid().unwrap_or_default());
    let progress = match pods.first().filter(|pod| pod::see(pod) == pod::Seen::Runs) {
        Some(pod) => said(world, pod).await,
        None => None,
    };
    let offer = match pods
        .first()
        .filter(|_| volume.spec.source.as_ref().is_some_and(|s| s.upload.is_some()))
    {
        Some(pod) => said(world, pod).await,
        None => None,
    };
    let terms = Terms {
        classes: world.classes.state(),
        profiles: world.profiles.state(),
        config: world.imports.state().into_iter().min_by_key(|config| config.name_any()),
    };
    Snapshot {
        claim: get(&world.claims, key),
        origin: origin(world, &volume),
        terms: Arc::new(terms),
        now: Timestamp::now(),
        pods,
        progress,
        offer,
        volume,
    }
}

/// The claim that a DataVolume is a clone of.
fn origin(world: &World, volume: &DataVolume) -> Option<Origin> {
    let source = volume.spec.source.as_ref()?.pvc.clone()?;
    let namespace = match source.namespace.is_empty() {
        true => volume.namespace().unwrap_or_default(),
        false => source.namespace,
    };
    let key = (namespace.clone(), source.name.clone());
    let claim = get(&world.claims, &key);
    let filling = get(&world.volumes, &key).filter(|filling| {
        let uid = filling.uid().unwrap_or_default();
        let phase = filling.status.as_ref().map(|status| status.phase).unwrap_or_default();
        let owns = |claim: &Arc<PersistentVolumeClaim>| {
            claim.owner_references().iter().any(|owner| owner.uid == uid)
        };
        phase != Phase::Succeeded && claim.as_ref().is_some_and(owns)
    });
    Some(Origin {
        users: users(world, &namespace, &source.name),
        name: source.name,
        unfinished: filling.is_some(),
        namespace,
        claim,
    })
}

/// The VMIs that write to a claim, or are about to.
fn users(world: &World, namespace: &str, claim: &str) -> Vec<String> {
    let here = |object: Option<String>| object.as_deref() == Some(namespace);
    let vmis = world.vmis.state().into_iter().filter(|vmi| {
        let ended = vmi.status.as_ref().is_some_and(|status| status.phase.is_final());
        let volumes = vmi.parse().map(|spec| spec.volumes).unwrap_or_default();
        here(vmi.namespace()) && !ended && volumes.iter().any(|v| v.claim() == Some(claim))
    });
    let vmis = vmis.map(|vmi| format!("VirtualMachineInstance {}", vmi.name_any()));
    let pods = world.pods.state().into_iter().filter(|pod| {
        let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
        let volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
        let mut claims = volumes.filter_map(|volume| volume.persistent_volume_claim.as_ref());
        here(pod.namespace())
            && label(&**pod, keys::APP) == Some(keys::LAUNCHER)
            && !matches!(phase, Some("Succeeded" | "Failed"))
            && claims.any(|used| used.claim_name == claim)
    });
    vmis.chain(pods.map(|pod| format!("pod {}", pod.name_any()))).collect()
}

/// What of a kind an importer said last: how far it is, or where an upload goes.
async fn said<T: serde::de::DeserializeOwned>(world: &World, pod: &Pod) -> Option<T> {
    let pods = world.api::<Pod>(&pod.namespace().unwrap_or_default());
    let end = LogParams { tail_lines: Some(LINES), ..LogParams::default() };
    let name = pod.name_any();
    let log = tokio::time::timeout(PATIENCE, pods.logs(&name, &end)).await.ok()?.ok()?;
    log.lines().rev().find_map(|line| serde_json::from_str(line).ok())
}

async fn act(world: &World, volume: &DataVolume, action: &Action) -> kube::Result<()> {
    let (namespace, name) = key(volume);
    let claims = world.api::<PersistentVolumeClaim>(&namespace);
    let pods = world.api::<Pod>(&namespace);
    match action {
        Action::CreateClaim(claim) => {
            ignore_there(claims.create(&PostParams::default(), claim).await)?;
        }
        Action::MarkClaim(version) => {
            let mark = json!({"metadata": {
                "resourceVersion": version, "annotations": {keys::POD_PHASE: "Succeeded"},
            }});
            let patch = Patch::Merge(&mark);
            ignore_gone(claims.patch(&name, &PatchParams::default(), &patch).await)?;
        }
        Action::CreateSecret => {
            let token = [(); 2].map(|()| uuid::Uuid::new_v4().simple().to_string()).concat();
            let secret = json!({
                "apiVersion": "v1", "kind": "Secret",
                "metadata": {
                    "name": api::import::upload_secret(&name),
                    "ownerReferences": [volume.controller_owner_ref(&())],
                },
                "stringData": {"token": token},
            });
            let secret: Secret = serde_json::from_value(secret).map_err(kube::Error::SerdeError)?;
            ignore_there(
                world.api::<Secret>(&namespace).create(&PostParams::default(), &secret).await,
            )?;
        }
        Action::Offer(text) => {
            let volumes = world.api::<DataVolume>(&namespace);
            let patch = json!({"metadata": {"annotations": {api::import::UPLOAD: text}}});
            let patch = Patch::Merge(&patch);
            ignore_gone(volumes.patch(&name, &PatchParams::default(), &patch).await)?;
        }
        Action::CreatePod(pod) => {
            let live = claims.get_opt(&name).await?;
            if !live.is_some_and(|claim| plan::may_fill(pod, &claim)) {
                return Ok(());
            }
            ignore_there(pods.create(&PostParams::default(), pod).await)?;
        }
        Action::DeletePod { name, uid } => {
            let exactly = DeleteParams {
                preconditions: Some(Preconditions {
                    uid: Some(uid.clone()),
                    resource_version: None,
                }),
                ..DeleteParams::default()
            };
            ignore_gone(pods.delete(name, &exactly).await)?;
        }
        Action::PatchStatus(status) => {
            let volumes = world.api::<DataVolume>(&namespace);
            // N.B. on the condition that what was judged is what is there.
            let read = json!({"resourceVersion": volume.resource_version()});
            let patch = json!({"metadata": read, "status": status});
            let patch = Patch::Merge(&patch);
            ignore_gone(volumes.patch_status(&name, &PatchParams::default(), &patch).await)?;
        }
        Action::Say { warning, reason, message } => {
            let kind = if *warning { Kind::Warning } else { Kind::Normal };
            world.events.say(&reference(volume), kind, reason, message).await;
        }
    }
    Ok(())
}

/// What is there need not be made: the watch shows whose it is.
fn ignore_there<T>(made: kube::Result<T>) -> kube::Result<()> {
    match made {
        Err(kube::Error::Api(status)) if status.reason == "AlreadyExists" => Ok(()),
        other => other.map(|_| ()),
    }
}
