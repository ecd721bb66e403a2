//! DataVolume: its claim, the pod that fills it, and the one that lends what it is a clone of.

mod claim;
mod clone;
#[cfg(test)]
mod laws;
mod plan;
mod pod;
mod show;

use crate::AT_ONCE;
use crate::vm::ignore_gone;
use crate::world::{Key, World, get, key, label, mounts, refusal};
use api::datavolume::{DataVolume, Phase};
use api::keys;
use api::vmi::VirtualMachineInstance;
use claim::Terms;
use clone::{Origin, lender_name};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod, Secret};
use kube::api::{
    DeleteParams, ListParams, LogParams, Patch, PatchParams, PostParams, Preconditions,
};
use kube::{Resource, ResourceExt};
use plan::{Action, Snapshot};
use reconcile::events::{Kind, why};
use reconcile::kept::reference;
use reconcile::queue::Next;
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;

/// Lines of an importer's log that are read for the last one that tells its progress.
const LINES: i64 = 5;
/// Bytes of it, at most: a line has a certificate.
const BYTES: i64 = 64 << 10;
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
    queue.run(AT_ONCE, move |key| reconcile(world.clone(), key)).await;
}

async fn reconcile(world: World, key: Key) -> Next {
    let (world, key) = (&world, &key);
    let volume = get(&world.volumes, key);
    if let Err(error) = release(world, key, volume.as_deref()).await {
        tracing::warn!("cannot delete a pod that lent to {}/{}: {}", key.0, key.1, why(&error));
        return Next::Failed;
    }
    let Some(volume) = volume else { return Next::Rest };
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
        origin: origin(world, &volume).await,
        terms: Arc::new(terms),
        now: Timestamp::now(),
        pods,
        progress,
        offer,
        volume,
    }
}

/// Deletes what lends to DataVolumes of a key that are gone: no object of another namespace could
/// own it.
async fn release(world: &World, key: &Key, volume: Option<&DataVolume>) -> kube::Result<()> {
    let owner = format!("{}/{}", key.0, key.1);
    let uid = volume.filter(|v| v.metadata.deletion_timestamp.is_none()).and_then(|v| v.uid());
    let stray = |pod: &Arc<Pod>| {
        label(&**pod, keys::APP) == Some(keys::LENDER)
            && pod.annotations().get(keys::LENDS_TO) == Some(&owner)
            && label(&**pod, keys::LENDS_TO_UID) != uid.as_deref()
    };
    for pod in world.pods.state().into_iter().filter(stray) {
        if let Some(Action::DeletePod { namespace, name, uid }) = plan::delete(&pod) {
            delete(world, &namespace, &name, &uid).await?;
        }
    }
    Ok(())
}

/// The claim that a DataVolume is a clone of.
async fn origin(world: &World, volume: &DataVolume) -> Option<Origin> {
    let source = volume.spec.source.as_ref()?.pvc.clone()?;
    let own = volume.namespace().unwrap_or_default();
    let namespace = source.namespace_in(&own).to_owned();
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
    let lender = get(&world.pods, &(namespace.clone(), lender_name(volume)));
    let lent = match &lender {
        Some(pod) if pod::see(pod) == pod::Seen::Runs => said(world, pod).await,
        _ => None,
    };
    Some(Origin {
        users: users(world, &namespace, &source.name),
        lender,
        lent,
        name: source.name,
        unfinished: filling.is_some(),
        namespace,
        claim,
    })
}

/// Whether a VMI writes to a claim, or is about to.
fn uses(vmi: &VirtualMachineInstance, claim: &str) -> bool {
    let ended = vmi.status.as_ref().is_some_and(|status| status.phase.is_final());
    let volumes = vmi.parse().map(|spec| spec.volumes).unwrap_or_default();
    let mut moves = vmi.status.iter().flat_map(|status| &status.migrated_volumes);
    let moves = moves.any(|moved| {
        [&moved.source, &moved.destination].iter().any(|side| side.claim_name == claim)
    });
    !ended && (moves || volumes.iter().any(|volume| volume.claim() == Some(claim)))
}

/// Who writes to a claim, or is about to.
fn users(world: &World, namespace: &str, claim: &str) -> Vec<String> {
    let here = |object: Option<String>| object.as_deref() == Some(namespace);
    let vmis = world.vmis.state().into_iter();
    let vmis = vmis.filter(|vmi| here(vmi.namespace()) && uses(vmi, claim));
    let vmis = vmis.map(|vmi| format!("VirtualMachineInstance {}", vmi.name_any()));
    let pods = world.pods.state().into_iter().filter(|pod| {
        here(pod.namespace())
            && label(&**pod, keys::APP) == Some(keys::LAUNCHER)
            && mounts(pod, claim)
    });
    vmis.chain(pods.map(|pod| format!("pod {}", pod.name_any()))).collect()
}

/// Whether a VMI uses a claim, as the API itself shows it.
///
/// N.B. a watch may be late. A VMI's pod is made only when the API shows no lender, and a lender is
/// read only when the API shows no VMI: whichever was written later sees the other.
async fn is_used(world: &World, namespace: &str, claim: &str) -> kube::Result<bool> {
    let vmis = world.api::<VirtualMachineInstance>(namespace).list(&ListParams::default()).await?;
    Ok(vmis.iter().any(|vmi| uses(vmi, claim)))
}

/// What of a kind an importer said last: how far it is, or where an upload goes.
async fn said<T: serde::de::DeserializeOwned>(world: &World, pod: &Pod) -> Option<T> {
    let pods = world.api::<Pod>(&pod.namespace().unwrap_or_default());
    let end =
        LogParams { tail_lines: Some(LINES), limit_bytes: Some(BYTES), ..LogParams::default() };
    let name = pod.name_any();
    let log = tokio::time::timeout(PATIENCE, pods.logs(&name, &end)).await.ok()?.ok()?;
    log.lines().rev().find_map(|line| serde_json::from_str(line).ok())
}

async fn act(world: &World, volume: &DataVolume, action: &Action) -> kube::Result<()> {
    let (namespace, name) = key(volume);
    let claims = world.api::<PersistentVolumeClaim>(&namespace);
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
        Action::CreateSecret(secret) => {
            let token = [(); 2].map(|()| uuid::Uuid::new_v4().simple().to_string()).concat();
            let owner = volume.controller_owner_ref(&());
            create_secret(world, &namespace, secret, json!(owner), &token).await?;
        }
        Action::CreateLender(pod) => match world.create_pod(pod).await {
            Err(kube::Error::Api(status)) if status.reason == "AlreadyExists" => {}
            made => give_token(world, volume, &made?).await?,
        },
        Action::GiveToken(pod) => give_token(world, volume, pod).await?,
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
            if let Some(source) = volume.spec.source.as_ref().and_then(|s| s.pvc.as_ref())
                && is_used(world, source.namespace_in(&namespace), &source.name).await?
            {
                return Err(refusal(
                    409,
                    "Conflict",
                    "the claim that is cloned is about to be used",
                ));
            }
            ignore_there(world.create_pod(pod).await)?;
        }
        Action::DeletePod { namespace, name, uid } => {
            delete(world, namespace, name, uid).await?;
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

/// Deletes exactly this pod.
async fn delete(world: &World, namespace: &str, name: &str, uid: &str) -> kube::Result<()> {
    let only = Preconditions { uid: Some(uid.to_owned()), resource_version: None };
    let exactly = DeleteParams { preconditions: Some(only), ..DeleteParams::default() };
    ignore_gone(world.api::<Pod>(namespace).delete(name, &exactly).await)
}

/// Makes a Secret with a token.
async fn create_secret(
    world: &World,
    namespace: &str,
    name: &str,
    owner: serde_json::Value,
    token: &str,
) -> kube::Result<()> {
    let secret = json!({
        "apiVersion": "v1", "kind": "Secret",
        "metadata": {"name": name, "ownerReferences": [owner]}, "stringData": {"token": token},
    });
    let secret: Secret = serde_json::from_value(secret).map_err(kube::Error::SerdeError)?;
    ignore_there(world.api::<Secret>(namespace).create(&PostParams::default(), &secret).await)
}

/// Gives a lender the token of its clone: in a Secret of its namespace, which goes with it.
async fn give_token(world: &World, volume: &DataVolume, lender: &Pod) -> kube::Result<()> {
    let secrets = world.api::<Secret>(&volume.namespace().unwrap_or_default());
    let name = api::import::clone_secret(&volume.name_any());
    let token = secrets.get(&name).await?.data.unwrap_or_default().remove("token");
    let Some(token) = token.and_then(|token| String::from_utf8(token.0).ok()) else {
        let message = format!("Secret {name} has no token: delete it, and it is made anew");
        return Err(refusal(422, "Invalid", &message));
    };
    let owner = json!(lender.owner_ref(&()));
    let namespace = lender.namespace().unwrap_or_default();
    create_secret(world, &namespace, &lender.name_any(), owner, &token).await
}

/// What is there need not be made: the watch shows whose it is.
fn ignore_there<T>(made: kube::Result<T>) -> kube::Result<()> {
    match made {
        Err(kube::Error::Api(status)) if status.reason == "AlreadyExists" => Ok(()),
        other => other.map(|_| ()),
    }
}
