//! Moves of guests between nodes, and between pods of one node.
//!
//! ```text
//! controller: VMI's migrationState --> source's handler --prepare--> target's handler --> launcher
//!                                             |  <-------ticket---------+
//!                                             +--send--> source's launcher ===> target's launcher
//! source's handler: how far it is, how it failed, that the guest has left
//! target's handler: that the guest is here
//! ```
//!
//! What a move does is between the two launchers. Handlers begin it, tell of it, and take nothing
//! for granted: who runs the guest says the owner record.

mod forecast;
mod mobility;
mod prepare;
mod source;
mod there;
mod verify;
mod way;

pub use forecast::{Elsewhere, Outlook, Plan, look};
pub use prepare::Cluster;

use super::guests::{Guest, Key, SOON, get};
use super::{Shared, records, translate};
use api::conditions::moment;
use api::keys;
use api::migration::{End, State};
use api::vmi::{Phase, VirtualMachineInstance};
use channel::gateway::Gateway;
use channel::identity::SpiffeId;
use channel::passage::Passage;
use handover::ledger::Response;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use kube::api::{Patch, PatchParams};
use kube::{Api, ResourceExt};
use launcher::migration::marks::Mark;
use launcher::migration::status::Outcome;
use launcher::spec::VmSpec;
use launcher::status::{Phase as Does, Status as Found};
use reconcile::events::Kind;
use reconcile::queue::Next;
use serde_json::json;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use synchronizer::records::OfVm as Object;

/// What a handler remembers of moves: it can do without.
#[derive(Default)]
pub struct Moves {
    /// The way to other handlers, once it is open.
    pub gateway: OnceLock<Arc<Gateway>>,
    memory: Mutex<Memory>,
    /// Ways through synchronizers, by the gateways to which they lead.
    passages: tokio::sync::Mutex<HashMap<SpiffeId, Arc<Passage>>>,
}

#[derive(Default)]
struct Memory {
    /// By the target's pod: how the guest is to be run there, or why it cannot be yet.
    arranged: HashMap<String, Result<Arranged, String>>,
    /// By the migration.
    known: HashMap<String, Known>,
}

/// How a guest is to be run at a target.
#[derive(Debug, Clone)]
struct Arranged {
    vm: VmSpec,
    /// The claims to which disks are copied.
    copied: Vec<String>,
    /// Which of them the VM has left, and how, by the disks' names.
    left: BTreeMap<String, Mark>,
}

/// What is known of one migration.
struct Known {
    /// When it was first seen here.
    since: Instant,
    /// Its name.
    name: Option<String>,
    /// When its progress was last told, and what was.
    told: Option<(Instant, serde_json::Value)>,
    /// Whole GiB that it moves, once that is known.
    size: Option<i64>,
    /// How far the comparison of its disks is, where one has begun.
    check: Option<verify::Check>,
}

impl Default for Known {
    fn default() -> Self {
        Self { since: Instant::now(), name: None, told: None, size: None, check: None }
    }
}

impl Moves {
    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long a migration has been known here.
    fn age(&self, migration: &str) -> Duration {
        self.memory().known.entry(migration.to_owned()).or_default().since.elapsed()
    }

    /// Notes how far the comparison of its disks is.
    fn note(&self, migration: &str, check: verify::Check) {
        self.memory().known.entry(migration.to_owned()).or_default().check = Some(check);
    }

    fn forget(&self, migration: &str) {
        self.memory().known.remove(migration);
    }

    /// Forgets pods that are gone.
    pub fn keep(&self, is_there: impl Fn(&str) -> bool) {
        self.memory().arranged.retain(|pod, _| is_there(pod));
    }
}

/// A VMI of which a pod is here and which is on another node: as the API has it.
///
/// # Errors
/// Those of the API.
pub async fn elsewhere(
    shared: &Shared,
    (namespace, name): &Key,
) -> kube::Result<Option<Arc<VirtualMachineInstance>>> {
    let vmis: Api<VirtualMachineInstance> = Api::namespaced(shared.client.clone(), namespace);
    Ok(vmis.get_opt(name).await?.map(Arc::new))
}

/// Writes, or removes, what is to be known of a claim: annotations of it. Returns it as it is then.
async fn annotate<const N: usize>(
    shared: &Shared,
    namespace: &str,
    claim: &str,
    notes: [(&str, Option<&str>); N],
) -> kube::Result<PersistentVolumeClaim> {
    let claims: Api<PersistentVolumeClaim> = Api::namespaced(shared.client.clone(), namespace);
    let notes: BTreeMap<_, _> = notes.into();
    let patch = Patch::Merge(json!({"metadata": {"annotations": notes}}));
    claims.patch(claim, &PatchParams::default(), &patch).await
}

/// Whether a guest that is in a pod of a node is not said to be there yet.
pub fn is_new_here(vmi: &VirtualMachineInstance, node: &str, pod: &Pod) -> bool {
    let Some(status) = &vmi.status else { return false };
    let comes = status.migration_state.as_ref().is_some_and(|state| {
        !state.is_over()
            && state.target_pod == pod.metadata.name
            && state.target_node_domain_ready_timestamp.is_none()
    });
    comes || status.node_name.as_deref().is_some_and(|named| named != node)
}

/// Where a guest went, for people.
fn place(end: &End) -> String {
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    let (cluster, namespace) = (text(&end.cluster), text(&end.domain_namespace));
    format!("{namespace}/{} of cluster {cluster}", text(&end.domain_name))
}

impl Guest<'_> {
    /// The migration that is under way between these pods, as the VMI has it.
    fn moves(&self) -> Option<State> {
        self.status().migration_state.filter(|state| !state.is_over())
    }

    /// The guest has come to this pod: the VMI is here from now on.
    pub(super) async fn arrive(&self, found: &Found) -> kube::Result<Next> {
        if found.phase == Does::Receiving {
            // It is this pod's already, and is about to run.
            return Ok(Next::After(SOON));
        }
        let mut status = self.status();
        let node = self.shared.config.node.clone();
        if let Ok(Some(vm)) = self.launcher.spec().await {
            self.describe(&mut status, &vm);
        }
        status.node_name = Some(node.clone());
        status.evacuation_node_name = None;
        let own = |state: &&mut State| state.target_pod == self.pod.metadata.name;
        if let Some(state) = status.migration_state.as_mut().filter(own) {
            let now = moment(Timestamp::now());
            state.target_node_domain_detected = Some(true);
            state.target_node_domain_ready_timestamp = Some(now.clone());
            if state.source_state.is_some() {
                // Its source is another VMI's, and says so there.
                (state.completed, state.end_timestamp) = (Some(true), Some(now));
            }
        }
        if status.phase == Phase::WaitingForSync {
            status.enter(Phase::Running, Timestamp::now());
        }
        // N.B. all of them, before anything else: the VMI may name them already, and nobody comes here
        // again once it is said to be here.
        for claim in records::volumes(&self.pod).into_values() {
            let none = [keys::INCOMPLETE, keys::SUPERSEDED, keys::LEFT_AS].map(|key| (key, None));
            annotate(self.shared, &self.key.0, &claim, none).await?;
        }
        self.write(status).await?;
        let message = format!("The VirtualMachineInstance migrated to node {node}.");
        self.say(Kind::Normal, "Migrated", &message).await;
        // The controller labels it, and so it comes to this handler's own.
        Ok(Next::Rest)
    }

    /// A pod of the VMI's that does not run its guest: the guest is on its way to it, or has left.
    pub(super) async fn move_along(&self, found: &Found) -> kube::Result<Next> {
        match found.phase {
            Does::Empty if self.pod.labels().contains_key(keys::MIGRATION) => {
                match self.given_up(found) {
                    Some((state, why)) => self.give_up(state, why).await,
                    None => self.expect().await,
                }
            }
            Does::Left => self.has_left(found).await,
            Does::Receiving if self.moves().is_some_and(|s| s.abort_requested == Some(true)) => {
                // From another VMI: its source may not hear of it.
                if self.moves().is_some_and(|state| state.source_state.is_some()) {
                    let _ = self.launcher.cancel().await;
                }
                Ok(Next::Rest)
            }
            _ => Ok(Next::Rest),
        }
    }

    /// Why the launcher here does not wait any more for a guest that was to come from another VMI, whose
    /// source may not tell it here.
    fn given_up(&self, found: &Found) -> Option<(State, String)> {
        let state = self.moves().filter(|state| state.source_state.is_some())?;
        let of = found.migration.as_ref()?;
        let own = state.target_pod == self.pod.metadata.name
            && state.migration_uid.as_ref() == Some(&of.migration);
        let why = match of.outcome.as_ref().filter(|_| own)? {
            Outcome::Failed { reason, .. } => reason.clone(),
            Outcome::Cancelled => "it was cancelled".into(),
            Outcome::Succeeded | Outcome::InDoubt { .. } => return None,
        };
        Some((state, why))
    }

    async fn give_up(&self, mut state: State, why: String) -> kube::Result<Next> {
        (state.failed, state.completed) = (Some(true), Some(true));
        state.end_timestamp = Some(moment(Timestamp::now()));
        state.failure_reason = Some(why);
        let mut status = self.status();
        status.migration_state = Some(state);
        self.write(status).await?;
        Ok(Next::Rest)
    }

    /// Prepares what the guest needs here, before its source's handler asks for it.
    async fn expect(&self) -> kube::Result<Next> {
        let uid = self.pod.uid().unwrap_or_default();
        if matches!(self.shared.moves.memory().arranged.get(&uid), Some(Ok(_))) {
            return Ok(Next::Rest);
        }
        let Some(cluster) = self.shared.cluster() else {
            return Ok(Next::After(SOON));
        };
        let arranged = self.arrange(&cluster).await;
        let next = if arranged.is_ok() { Next::Rest } else { Next::Failed };
        if let Err(refusal) = &arranged {
            self.say(Kind::Warning, refusal.reason, &refusal.message).await;
        }
        let arranged = arranged
            .map(|(_, vm)| Arranged {
                vm: translate::arriving(vm),
                copied: self.copied_claims().into_values().collect(),
                left: self.left_before(),
            })
            .map_err(|refusal| format!("{}: {}", refusal.reason, refusal.message));
        self.shared.moves.memory().arranged.insert(uid, arranged);
        Ok(next)
    }

    /// The guest has left this pod, and all that is to be kept of it is written down.
    pub(super) async fn has_left(&self, found: &Found) -> kube::Result<Next> {
        let mut status = self.status();
        let own =
            |state: &&mut State| state.source_pod == self.pod.metadata.name && !state.is_over();
        let Some(state) = status.migration_state.as_mut().filter(own) else {
            return Ok(Next::Rest);
        };
        let there = state.target_state.clone();
        if state.target_node_domain_ready_timestamp.is_none() && there.is_none() {
            // The target's handler says it, or will.
            return Ok(Next::After(SOON));
        }
        let migration = state.attempt().unwrap_or_default().to_owned();
        if let Some(next) = self.verify(state, &migration).await? {
            return Ok(next);
        }
        self.mark_left(found).await?;
        state.completed = Some(true);
        state.end_timestamp = Some(moment(Timestamp::now()));
        if let Some(end) = there {
            self.supersede(&end).await?;
            self.tell_arrival(&migration).await;
            status.enter(Phase::Succeeded, Timestamp::now());
            let to = place(&end);
            let message = format!("The VirtualMachineInstance has left for {to}.");
            self.say(Kind::Normal, "Migrated", &message).await;
        }
        self.tell_end(&migration).await;
        self.write(status).await?;
        self.shared.moves.forget(&migration);
        Ok(Next::Rest)
    }

    /// Writes down that the guest is where it has left for. What cannot be written here is found out by
    /// asking the record there.
    async fn tell_arrival(&self, attempt: &str) {
        let (namespace, name) = self.key.clone();
        let record = Object { client: self.shared.client.clone(), namespace, name };
        if let Response::Failed { why } = record.arrived(attempt).await {
            tracing::warn!("that {} has arrived is not written down: {why}", self.vm);
        }
    }

    /// Marks the claims of a guest that has left for another VMI: what they hold is old from now on.
    async fn supersede(&self, to: &End) -> kube::Result<()> {
        let note = format!("{} left it at {} for {}", self.vm, moment(Timestamp::now()), place(to));
        for claim in records::volumes(&self.pod).into_values() {
            annotate(self.shared, &self.key.0, &claim, [(keys::SUPERSEDED, Some(&note))]).await?;
        }
        Ok(())
    }

    /// Writes down how the guest left its disks. N.B. a device does not tell whether it was written
    /// since, and what else may use a claim is not ours: then hashes are compared.
    async fn mark_left(&self, found: &Found) -> kube::Result<()> {
        let claims = self.claims_by_disk();
        for (disk, mark) in found.left.iter().filter(|(_, mark)| mark.is_dated()) {
            let (Some(claim), Ok(note)) = (claims.get(disk), serde_json::to_string(mark)) else {
                continue;
            };
            annotate(self.shared, &self.key.0, claim, [(keys::LEFT_AS, Some(&note))]).await?;
        }
        Ok(())
    }

    /// How the guest has left the disks to which it comes, by their names.
    fn left_before(&self) -> BTreeMap<String, Mark> {
        let mark = |(disk, claim): (String, String)| {
            let found = get(&self.shared.claims, &(self.key.0.clone(), claim))?;
            let note = found.annotations().get(keys::LEFT_AS)?;
            Some((disk, serde_json::from_str(note).ok()?))
        };
        self.claims_by_disk().into_iter().filter_map(mark).collect()
    }

    /// The claims of this pod's disks.
    fn claims_by_disk(&self) -> BTreeMap<String, String> {
        let spec = self.vmi.parse().unwrap_or_default();
        translate::claims(&spec, &records::volumes(&self.pod))
    }
}
