//! What is to be done about a DataVolume. Pure.
//!
//! ```text
//! Pending -> WaitForFirstConsumer -> ImportScheduled -> ImportInProgress -> Succeeded
//!    claim        a node was chosen        pod            it runs             it is done
//! ```
//!
//! That a disk is complete is written on its claim before it is said anywhere else, and nothing is
//! imported to a claim on which it is.

use super::Waits;
use super::claim::{self, Terms};
use super::clone::Origin;
use super::pod::{self, Seen};
use super::show::{Stage, show, tell};
use api::datavolume::{DataVolume, Phase, Status};
use api::import::{Progress, UPLOAD, Upload, upload_secret};
use api::keys;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use kube::ResourceExt;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// The node for whose sake a claim is to get a volume.
const SELECTED_NODE: &str = "volume.kubernetes.io/selected-node";
/// How often the progress of an import is asked for.
pub const OFTEN: Duration = Duration::from_secs(1);
/// How often something is looked at of which no watch tells.
pub const SELDOM: Duration = Duration::from_secs(3);
/// Pauses between importers that their nodes give up double, from the first to the last.
const FIRST_PAUSE: i64 = 10;
const LAST_PAUSE: i64 = 300;

/// A DataVolume and what there is of it.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// It.
    pub volume: Arc<DataVolume>,
    /// The claim of its name.
    pub claim: Option<Arc<PersistentVolumeClaim>>,
    /// The pods that it owns.
    pub pods: Vec<Arc<Pod>>,
    /// The claim that it is made of.
    pub origin: Option<Origin>,
    /// What its importer said last.
    pub progress: Option<Progress>,
    /// What claims can be made of.
    pub terms: Arc<Terms>,
    /// Now.
    pub now: Timestamp,
    /// Where its upload goes, if its importer has said so.
    pub offer: Option<Upload>,
}

/// What is to be done, in this order.
#[derive(Debug, Default)]
pub struct Plan {
    /// Each is done once the one before is.
    pub actions: Vec<Action>,
    /// After which pause to look again though nothing has changed.
    pub again: Option<Duration>,
}

/// One thing to be done.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Make the claim.
    CreateClaim(Box<PersistentVolumeClaim>),
    /// Write on the claim, as it was seen, that its disk is complete.
    MarkClaim(Option<String>),
    /// Make the Secret of this name with the token of its upload or clone.
    CreateSecret(String),
    /// Make the pod that lends the claim that is cloned.
    CreateLender(Box<Pod>),
    /// Give that pod the token.
    GiveToken(Arc<Pod>),
    /// Say where its upload goes.
    Offer(String),
    /// Make the importer's pod.
    CreatePod(Box<Pod>),
    /// Delete exactly this pod.
    DeletePod {
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
        /// It.
        uid: String,
    },
    /// Change the status.
    PatchStatus(Value),
    /// Tell people.
    Say {
        /// Something is wrong.
        warning: bool,
        /// In one word.
        reason: String,
        /// What.
        message: String,
    },
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Action::CreateClaim(claim) => write!(f, "create claim {}", claim.name_any()),
            Action::MarkClaim(_) => f.write_str("mark the claim as complete"),
            Action::CreateSecret(name) => write!(f, "create Secret {name}"),
            Action::CreateLender(pod) => write!(f, "create pod {}", pod.name_any()),
            Action::GiveToken(pod) => write!(f, "create the Secret of pod {}", pod.name_any()),
            Action::Offer(_) => f.write_str("say where the upload goes"),
            Action::CreatePod(pod) => write!(f, "create pod {}", pod.name_any()),
            Action::DeletePod { name, .. } => write!(f, "delete pod {name}"),
            Action::PatchStatus(_) => f.write_str("write the DataVolume's status"),
            Action::Say { .. } => f.write_str("tell of it"),
        }
    }
}

/// What is to be done.
pub fn plan(snapshot: &Snapshot) -> Plan {
    let mut plan = Plan::default();
    if snapshot.volume.metadata.deletion_timestamp.is_some() {
        // All that is its own goes with it.
        return plan;
    }
    let old = snapshot.volume.status.clone().unwrap_or_default();
    let mut status = old.clone();
    let stage = match Way::of(&snapshot.volume) {
        Some(way) => snapshot.advance(way, &mut status, &mut plan),
        None => Stage::waits(Phase::Failed, not_built()),
    };
    let is_over = matches!(stage.phase, Phase::Succeeded | Phase::Failed);
    if is_over {
        plan.again = None;
    }
    let telling = tell(&snapshot.volume, &old, &stage);
    show(snapshot, &stage, &mut status);
    if snapshot.volume.status.as_ref() != Some(&status) {
        // N.B. before it is told, so that it is told once; and before a pod goes that could be
        // taken for one that is missing.
        let status = serde_json::to_value(&status).unwrap_or_default();
        plan.actions.push(Action::PatchStatus(status));
    }
    plan.actions.extend(telling);
    if is_over {
        let lender = snapshot.origin.iter().flat_map(|origin| &origin.lender);
        plan.actions.extend(snapshot.pods.iter().chain(lender).filter_map(|pod| delete(pod)));
    }
    plan
}

fn not_built() -> Waits {
    let message = "its source is not one that is built: make the DataVolume anew with one of blank, \
                   http, registry, pvc and upload";
    Waits::wrong("SourceNotSupported", message.into())
}

/// Deletes a pod, unless it goes already.
pub fn delete(pod: &Pod) -> Option<Action> {
    let leaves = pod.metadata.deletion_timestamp.is_some();
    let (namespace, uid) = (pod.namespace().unwrap_or_default(), pod.uid().unwrap_or_default());
    (!leaves).then(|| Action::DeletePod { namespace, name: pod.name_any(), uid })
}

/// The words of how its content comes.
#[derive(Debug, Clone, Copy)]
pub struct Way {
    scheduled: Phase,
    under_way: Phase,
    /// As events have it.
    pub word: &'static str,
}

impl Way {
    /// None for a source that is not built.
    pub fn of(volume: &DataVolume) -> Option<Self> {
        let source = volume.spec.source.as_ref()?;
        let import = source.blank.is_some() || source.http.is_some() || source.registry.is_some();
        let (scheduled, under_way, word) = match () {
            () if source.pvc.is_some() => (Phase::CloneScheduled, Phase::CloneInProgress, "Clone"),
            () if source.upload.is_some() => (Phase::UploadScheduled, Phase::UploadReady, "Upload"),
            () if import => (Phase::ImportScheduled, Phase::ImportInProgress, "Import"),
            () => return None,
        };
        Some(Self { scheduled, under_way, word })
    }
}

impl Snapshot {
    fn name(&self) -> String {
        self.volume.name_any()
    }

    /// Whether a person uploads its image.
    fn is_uploaded(&self) -> bool {
        self.volume.spec.source.as_ref().is_some_and(|source| source.upload.is_some())
    }

    /// Whether an upload can begin; where it goes is said on the DataVolume.
    fn offers(&self, plan: &mut Plan) -> bool {
        let Some(offer) = &self.offer else { return false };
        let text = serde_json::to_string(offer).unwrap_or_default();
        if self.volume.annotations().get(UPLOAD) != Some(&text) {
            plan.actions.push(Action::Offer(text));
        }
        true
    }

    /// The claim that is cloned, if it is there.
    fn cloned(&self) -> Option<&PersistentVolumeClaim> {
        self.origin.as_ref()?.claim.as_deref()
    }

    /// The next step of its life.
    fn advance(&self, way: Way, status: &mut Status, plan: &mut Plan) -> Stage {
        if status.phase == Phase::Failed {
            return Stage::waits(Phase::Failed, Waits::last(status));
        }
        if self.is_complete(status) {
            if let Some(claim) = self.claim.as_ref().filter(|c| self.owns(c) && !is_marked(c)) {
                plan.actions.push(Action::MarkClaim(claim.resource_version()));
            }
            return Stage::complete();
        }
        let Some(claim) = &self.claim else { return self.make_claim(plan) };
        if let Err(stage) = self.judge(claim) {
            plan.again = Some(SELDOM);
            return stage;
        }
        let cut_off = |pod: &Pod| self.origin.as_ref().is_some_and(|it| it.is_cut_off(pod));
        match self.pods.first() {
            None => self.begin(way, claim, status, plan),
            Some(pod) if !pod::fills(pod, claim) => {
                plan.actions.extend(delete(pod));
                let message = "its importer's pod is for a claim that is gone, and is made anew";
                Stage::waits(Phase::Pending, Waits::new("ClaimDeleted", message.into()))
            }
            Some(pod) if cut_off(pod) => {
                plan.actions.extend(delete(pod));
                let message =
                    "the pod that lent what is cloned is gone, and the clone begins again";
                let why = Waits::new("CloneSourceLost", message.into());
                Stage::waits(way.at_least_scheduled(status), why)
            }
            Some(pod) => self.follow(way, claim, pod, status, plan),
        }
    }

    /// Whether its disk has been complete at any time: then it never becomes anything else.
    fn is_complete(&self, status: &Status) -> bool {
        let filled = |claim: &Arc<PersistentVolumeClaim>| match self.owns(claim) {
            true => is_marked(claim),
            false => {
                claim.annotations().get(keys::POPULATED_FOR) == Some(&self.name())
                    || self.volume.annotations().contains_key(keys::PRE_POPULATED)
            }
        };
        status.phase == Phase::Succeeded || self.claim.as_ref().is_some_and(filled)
    }

    fn owns(&self, claim: &PersistentVolumeClaim) -> bool {
        let uid = self.volume.uid().unwrap_or_default();
        claim.owner_references().iter().any(|owner| owner.uid == uid)
    }

    fn make_claim(&self, plan: &mut Plan) -> Stage {
        plan.again = Some(SELDOM);
        if let Some(origin) = self.origin.as_ref().filter(|origin| origin.claim.is_none()) {
            return Stage::waits(Phase::Pending, origin.missing());
        }
        match claim::build(&self.volume, &self.terms, self.cloned()) {
            Ok(claim) => {
                plan.actions.push(Action::CreateClaim(Box::new(claim)));
                Stage::waits(Phase::Pending, Waits::new("Pending", "its claim is made".into()))
            }
            Err(why) => Stage::waits(Phase::Pending, why),
        }
    }

    /// Whether the claim can be filled at all.
    fn judge(&self, claim: &PersistentVolumeClaim) -> Result<(), Stage> {
        let name = self.name();
        if !self.owns(claim) {
            let message = format!(
                "there is a claim {name} that DataVolume {name} has not made: delete the claim, use \
                 another name, or annotate the claim with {}={name} if its disk is complete",
                keys::POPULATED_FOR
            );
            return Err(Stage::waits(Phase::Pending, Waits::wrong("ErrClaimNotValid", message)));
        }
        if claim.metadata.deletion_timestamp.is_some() {
            let message = format!("claim {name} is deleted, and is made anew once it is gone");
            return Err(Stage::waits(Phase::Pending, Waits::new("ClaimDeleted", message)));
        }
        if claim.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Lost") {
            let message = format!(
                "claim {name} has lost its volume and with it the disk: delete the DataVolume, and \
                 make it anew"
            );
            return Err(Stage::waits(Phase::Failed, Waits::wrong("ErrClaimLost", message)));
        }
        Ok(())
    }

    /// Makes the importer's pod, when it is time.
    fn begin(
        &self,
        way: Way,
        claim: &PersistentVolumeClaim,
        status: &mut Status,
        plan: &mut Plan,
    ) -> Stage {
        if self.waits_for_consumer(claim) {
            let message = format!("claim {} waits for the first pod that uses it", self.name());
            let why = Waits::new("WaitForFirstConsumer", message);
            return Stage::waits(Phase::WaitForFirstConsumer, why);
        }
        if self.is_uploaded() {
            plan.actions.push(Action::CreateSecret(upload_secret(&self.name())));
        }
        if let Some(origin) = &self.origin
            && let Err(why) = origin.borrow(self, status, plan)
        {
            return Stage::waits(way.at_least_scheduled(status), why);
        }
        let invalid = |why| Stage::waits(Phase::Failed, Waits::wrong("SourceNotValid", why));
        let order = match pod::order(&self.volume, claim, &self.terms, self.origin.as_ref()) {
            Ok(order) => order,
            Err(why) => return invalid(why),
        };
        match pod::build(&self.volume, claim, &order, self.origin.as_ref()) {
            Ok(pod) => plan.actions.push(Action::CreatePod(Box::new(pod))),
            Err(why) => return invalid(format!("its importer's pod cannot be made: {why}")),
        }
        // Until it is seen.
        plan.again = Some(OFTEN);
        let why = Waits::new("ContainerCreating", "its importer's pod is made".into());
        Stage::waits(way.at_least_scheduled(status), why)
    }

    /// Whether a pod that uses the claim has to come first. Our own comes when a person asked for it.
    fn waits_for_consumer(&self, claim: &PersistentVolumeClaim) -> bool {
        let asked = |annotations: &BTreeMap<String, String>| {
            annotations.get(keys::IMMEDIATE).is_some_and(|asked| asked != "false")
        };
        let spec = claim.spec.as_ref();
        let class = spec.and_then(|spec| self.terms.class(spec.storage_class_name.as_deref()?));
        let waits = class.is_some_and(|class| {
            class.volume_binding_mode.as_deref() == Some("WaitForFirstConsumer")
        });
        let bound = spec.and_then(|spec| spec.volume_name.as_ref()).is_some_and(|n| !n.is_empty());
        waits
            && !bound
            && !claim.annotations().contains_key(SELECTED_NODE)
            && !asked(self.volume.annotations())
            && !asked(claim.annotations())
    }

    /// Follows the importer's pod.
    fn follow(
        &self,
        way: Way,
        claim: &PersistentVolumeClaim,
        found: &Pod,
        status: &mut Status,
        plan: &mut Plan,
    ) -> Stage {
        let count = status.restart_count.unwrap_or(0).max(pod::restarts(found));
        status.restart_count = Some(count);
        let begun = way.at_least_scheduled(status);
        match pod::see(found) {
            Seen::Done => {
                plan.actions.push(Action::MarkClaim(claim.resource_version()));
                Stage::complete()
            }
            Seen::Runs => {
                plan.again = Some(OFTEN);
                self.measure(claim, status);
                match self.is_uploaded() && !self.offers(plan) && begun != way.under_way {
                    true => Stage::waits(begun, Waits::new("UploadStarts", String::new())),
                    false => Stage::runs(way.under_way, self.progress.as_ref()),
                }
            }
            Seen::Restarts(reason, message) => {
                Stage::waits(way.under_way, Waits::wrong(&reason, message))
            }
            Seen::Waits(None) => {
                Stage::waits(begun, Waits::new("ContainerCreating", String::new()))
            }
            Seen::Waits(Some((reason, message))) => {
                Stage::waits(begun, Waits::wrong(&reason, message))
            }
            Seen::Lost(reason, message) => {
                plan.again = Some(SELDOM);
                if self.now >= due(found, count)
                    && let Some(delete) = delete(found)
                {
                    status.restart_count = Some(count + 1);
                    plan.actions.push(delete);
                }
                Stage::waits(begun, Waits::wrong(&reason, message))
            }
        }
    }

    /// Takes over how far the importer is. It never goes back: what is begun again goes on.
    fn measure(&self, claim: &PersistentVolumeClaim, status: &mut Status) {
        let before = status.progress.as_deref().and_then(|text| text.strip_suffix('%'));
        let before = before.and_then(|text| text.replace('.', "").parse::<u64>().ok());
        let order = pod::order(&self.volume, claim, &self.terms, self.origin.as_ref()).ok();
        let now = order.and_then(|order| self.progress.as_ref()?.share(&order.source));
        if let Some(share) = now.max(before) {
            status.progress = Some(format!("{}.{:02}%", share / 100, share % 100));
        }
    }
}

impl Way {
    /// Once it has begun it is under way, whatever becomes of its pod.
    fn at_least_scheduled(self, status: &Status) -> Phase {
        if status.phase == self.under_way { self.under_way } else { self.scheduled }
    }
}

/// When a pod that its node has given up is replaced.
pub fn due(pod: &Pod, count: u32) -> Timestamp {
    let made = pod.creation_timestamp().map_or(Timestamp::UNIX_EPOCH, |made| made.0);
    let pause = FIRST_PAUSE.saturating_mul(1 << count.min(10)).min(LAST_PAUSE);
    made + SignedDuration::from_secs(pause)
}

/// Whether a pod may be made for a claim, as the API itself shows it.
///
/// N.B. a watch may be late: it may show that an importer is gone, and not yet that it was done. A
/// claim is marked before its importer goes.
pub fn may_fill(pod: &Pod, claim: &PersistentVolumeClaim) -> bool {
    pod::fills(pod, claim) && !is_marked(claim)
}

fn is_marked(claim: &PersistentVolumeClaim) -> bool {
    claim.annotations().get(keys::POD_PHASE).is_some_and(|phase| phase == "Succeeded")
}
