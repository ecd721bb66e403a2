//! What the source's handler asks of the target's: before anything moves, and when all has.

use super::super::{Shared, doors, guests};
use super::{Arranged, annotate};
use api::keys;
use api::migration::State;
use api::vmi::VirtualMachineInstance;
use channel::gateway::{Answer, Service};
use channel::identity::SpiffeId;
use handover::ledger::Response;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Patch, PatchParams};
use kube::{Api, ResourceExt};
use launcher::client::Client as Launcher;
use launcher::migration::PrepareRequest;
use launcher::migration::policy::Policy;
use launcher::migration::ticket::{Peer, Ticket};
use launcher::migration::verify::{BeginRequest, JudgeRequest, VerifyReport, VerifyTicket};
use launcher::status::Phase as Does;
use reconcile::events::why;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::sync::Arc;

/// A comparison begins within this time after a guest has come from another VMI.
const COMPARABLE: SignedDuration = SignedDuration::from_mins(10);

/// A question of another handler, about a guest that it sends or has sent.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Ask {
    /// The VMI's.
    pub namespace: String,
    /// The VMI's.
    pub name: String,
    /// The migration's uid.
    pub migration: String,
    /// The target's pod.
    pub pod: String,
    /// Where the guest comes from.
    pub from: Peer,
    /// What is asked.
    #[serde(flatten)]
    pub what: What,
}

/// What is asked.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "ask")]
pub enum What {
    /// Have a pod's launcher expect a guest.
    #[serde(rename = "prepare/1")]
    Prepare {
        /// How it is moved.
        policy: Policy,
    },
    /// Have it compare the disks that a guest has left with those on which it runs.
    #[serde(rename = "compare/1")]
    Compare,
    /// Have it judge what differs.
    #[serde(rename = "judge/1")]
    Judge(JudgeRequest),
}

/// Its answer.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "answer")]
pub enum Told {
    /// The launcher waits for the guest.
    #[serde(rename = "prepared/1")]
    Prepared {
        /// For the source's launcher.
        ticket: Box<Ticket>,
    },
    /// The launcher waits for what the disks hold that the guest left.
    #[serde(rename = "comparing/1")]
    Comparing {
        /// For the source's launcher.
        ticket: Box<VerifyTicket>,
    },
    /// What differs was judged.
    #[serde(rename = "judged/1")]
    Judged {
        /// So.
        report: VerifyReport,
    },
    /// It does not yet: ask again.
    #[serde(rename = "not-yet/1")]
    NotYet {
        /// Why.
        why: String,
    },
    /// It never will.
    #[serde(rename = "refused/1")]
    Refused {
        /// Why.
        why: String,
    },
}

/// Answers other handlers: those of the cluster, and of others from which guests come.
pub struct Cluster(pub Shared);

impl Service for Cluster {
    fn peer<'a>(&'a self, peer: &'a SpiffeId, request: Value) -> Answer<'a> {
        Box::pin(async move {
            let told = match serde_json::from_value(request) {
                Ok(ask) => answer(&self.0, peer, ask).await,
                Err(error) => Told::Refused { why: format!("it makes no sense: {error}") },
            };
            serde_json::to_value(told).unwrap_or_default()
        })
    }

    fn local(&self, _: Value) -> Answer<'_> {
        let why = "launchers of a cluster ask through their own doors".into();
        Box::pin(async move { serde_json::to_value(Response::Failed { why }).unwrap_or_default() })
    }

    /// The pod to which a migration goes: its launcher's VM may have another pod here.
    fn folder(&self, vm: &str, migration: &str) -> Option<PathBuf> {
        let is = |pod: &Arc<Pod>| {
            let of = guests::owner(pod);
            guests::launches(pod)
                && pod.labels().get(keys::MIGRATION).is_some_and(|uid| uid == migration)
                && of.is_some_and(|(namespace, name)| api::owner::vm_id(&namespace, &name) == vm)
        };
        let pod = self.0.pods.state().into_iter().find(is)?;
        Some(doors::folder(&self.0.config.pods(), &pod))
    }
}

/// A target's pod on this node, and what is known of the move to it.
struct Here {
    pod: Arc<Pod>,
    launcher: Launcher,
    /// What the VMI says.
    state: State,
}

async fn answer(shared: &Shared, peer: &SpiffeId, ask: Ask) -> Told {
    let here = match find(shared, peer, &ask).await {
        Ok(here) => here,
        Err(why) => return why,
    };
    let migration = ask.migration.clone();
    match ask.what.clone() {
        What::Prepare { policy } => prepare(shared, ask, here, policy).await,
        What::Compare if !is_comparable(&here.state) => Told::Refused {
            why: "the move is over for long: its disks are not compared any more".into(),
        },
        What::Compare => {
            let begin = BeginRequest { migration, from: ask.from };
            match here.launcher.verify_begin(&begin).await {
                Ok(ticket) => Told::Comparing { ticket: Box::new(ticket) },
                // It has something to do for the move itself.
                Err(error) => Told::NotYet { why: launcher::chain(&error) },
            }
        }
        What::Judge(request) => match here.launcher.verify_judge(&request).await {
            Ok(report) => Told::Judged { report },
            Err(error) => Told::Refused { why: launcher::chain(&error) },
        },
    }
}

/// Whether who has sent the guest may still learn what its disks hold.
fn is_comparable(state: &State) -> bool {
    let ended = state.end_timestamp.as_deref().and_then(|at| at.parse::<Timestamp>().ok());
    let late = ended.is_none_or(|at| Timestamp::now().duration_since(at) > COMPARABLE);
    !state.is_over() || !late
}

/// Finds the target, if the cluster wants that guest there from who asks.
async fn find(shared: &Shared, peer: &SpiffeId, ask: &Ask) -> Result<Here, Told> {
    let Ask { namespace, name, migration, pod, from, .. } = ask;
    if from.id != *peer {
        return Err(Told::Refused { why: format!("{peer} may not send a guest here") });
    }
    let key = (namespace.clone(), name.clone());
    let is = |found: &Arc<Pod>| {
        guests::owner(found).as_ref() == Some(&key)
            && found.name_any() == *pod
            && found.labels().get(keys::MIGRATION) == Some(migration)
    };
    let Some(found) = shared.pods.state().into_iter().find(is) else {
        let why = format!("node {} has not seen pod {pod}", shared.config.node);
        return Err(Told::NotYet { why });
    };
    let state = is_wanted(shared, peer, &key, migration, pod).await?;
    let folder = doors::folder(&shared.config.pods(), &found);
    let launcher = Launcher::new(&folder, &api::owner::vm_id(namespace, name));
    Ok(Here { pod: found, launcher, state })
}

async fn prepare(shared: &Shared, ask: Ask, here: Here, policy: Policy) -> Told {
    let refused = |why: String| Told::Refused { why };
    let not_yet = |why: String| Told::NotYet { why };
    let Here { pod: found, launcher, state } = here;
    let Ask { namespace, name, migration, from, pod, .. } = ask;
    if state.is_over() {
        return refused(format!("the move of {namespace}/{name} to pod {pod} is over"));
    }
    let key = (namespace, name);
    let uid = found.uid().unwrap_or_default();
    let arranged = match shared.moves.memory().arranged.get(&uid).cloned() {
        Some(Ok(arranged)) => arranged,
        Some(Err(why)) => return not_yet(why),
        None => {
            shared.queue.ring(key.clone());
            return not_yet(format!(
                "what the guest needs on node {} is prepared",
                shared.config.node
            ));
        }
    };
    let Arranged { vm: spec, copied, left } = arranged;
    match launcher.status().await {
        Ok(status) if status.phase == Does::Receiving => {
            // Of an attempt whose source's handler did not hear the answer.
            let _ = launcher.cancel().await;
            return not_yet("its launcher clears an earlier attempt away".into());
        }
        Ok(_) => {}
        Err(error) => return not_yet(launcher::chain(&error)),
    }
    // N.B. before the first byte is written: what is half a disk is known as such.
    for claim in copied {
        let note = format!("a copy of {} by migration {migration}", spec.name);
        let notes = [(keys::INCOMPLETE, Some(&*note)), (keys::LEFT_AS, None)];
        match annotate(shared, &key.0, &claim, notes).await {
            // It would go with the first pod that has it.
            Ok(marked) if marked.metadata.deletion_timestamp.is_some() => {
                return refused(format!("claim {claim} is being deleted: try again"));
            }
            Ok(_) => {}
            Err(error) => {
                return not_yet(format!("claim {claim} cannot be marked: {}", why(&error)));
            }
        }
    }
    let known_as = state.source_state.as_ref().map(|end| {
        let text = |text: &Option<String>| text.clone().unwrap_or_default();
        api::owner::vm_id(&text(&end.domain_namespace), &text(&end.domain_name))
    });
    let is_other = known_as.is_some();
    match launcher.prepare(&PrepareRequest { migration, from, spec, known_as, left, policy }).await
    {
        Ok(_) if is_other && let Err(why) = tell_ready(shared, &key, state).await => not_yet(why),
        Ok(ticket) => Told::Prepared { ticket: Box::new(ticket) },
        Err(error) if error.is_conflict() => not_yet(launcher::chain(&error)),
        Err(error) => refused(launcher::chain(&error)),
    }
}

/// Tells that the target waits for a guest that comes from another VMI: nobody else writes it here.
async fn tell_ready(shared: &Shared, key: &guests::Key, mut state: State) -> Result<(), String> {
    let gateway = shared.moves.gateway.get().map(|gateway| gateway.local_addr());
    state.target_node_address = gateway.map(|address| address.ip().to_string());
    let vmis: Api<VirtualMachineInstance> = Api::namespaced(shared.client.clone(), &key.0);
    let patch = Patch::Merge(json!({"status": {"migrationState": state}}));
    let told = vmis.patch_status(&key.1, &PatchParams::default(), &patch).await;
    told.map(|_| ()).map_err(|error| why(&error))
}

/// Whether the cluster wants that guest to come from that node to that pod; what the VMI says of it.
async fn is_wanted(
    shared: &Shared,
    peer: &SpiffeId,
    (namespace, name): &guests::Key,
    migration: &str,
    pod: &str,
) -> Result<State, Told> {
    let vmis: Api<VirtualMachineInstance> = Api::namespaced(shared.client.clone(), namespace);
    let vmi = vmis.get(name).await.map_err(|error| Told::NotYet {
        why: format!("{namespace}/{name} cannot be read: {}", why(&error)),
    })?;
    let state = vmi.status.and_then(|status| status.migration_state).unwrap_or_default();
    let own = shared.config.id().cluster().to_owned();
    let from = match &state.source_state {
        None => (Some(&own), state.source_node.as_ref()),
        Some(end) => (end.cluster.as_ref(), end.node.as_ref()),
    };
    let is_from = from.0.is_some_and(|cluster| cluster == peer.cluster())
        && from.1.is_some_and(|node| node == peer.instance());
    let wanted = state.migration_uid.as_deref() == Some(migration)
        && state.target_pod.as_deref() == Some(pod)
        && is_from;
    match wanted {
        true => Ok(state),
        false => Err(Told::Refused {
            why: format!("{namespace}/{name} is not to move from {peer} to pod {pod}"),
        }),
    }
}
