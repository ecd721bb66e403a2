//! Evictions of launchers' pods: a guest leaves its node as its VMI wants it, and until it has left
//! its pod stays.
//!
//! ```text
//! POST pods/.../eviction -> role: what the pod is to the guest -> judge -> 429, and it is marked
//!                                                                        (status.evacuationNodeName)
//!                                                                     -> 429: not now
//!                                                                     -> the pod may go
//! ```

use crate::subresources::TRIES;
use crate::{WebApi, failure, is_name};
use api::conditions::Is;
use api::eviction::Strategy;
use api::migration::VirtualMachineInstanceMigration as Migration;
use api::owner::{self, OwnerRecord};
use api::vmi::{Phase, VirtualMachineInstance};
use api::{keys, kubevirt};
use apiserver::extension::Review;
use apiserver::status::Failure;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{ListParams, Patch, PatchParams};
use kube::{Api, ResourceExt};
use serde_json::{Value, json};
use std::sync::Arc;

/// What is judged: a group, a resource and a subresource.
pub const JUDGED: (&str, &str, &str) = ("", "pods", "eviction");
/// Who asks for evictions in whose place others are to come: as their evictions say it.
const DESCHEDULER: (&str, &str) = ("requested-by", "sigs.k8s.io/descheduler");

/// What a judgement needs to know besides the pod.
#[derive(Debug)]
struct Facts {
    cluster: Arc<kubevirt::Spec>,
    vmi: VirtualMachineInstance,
    record: owner::Status,
    /// Of the pod's own migration, where it was made for one: whether it is under way.
    arrives: bool,
}

/// What a launcher's pod is to its guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    /// It runs the guest, or is to begin it.
    Owner,
    /// The guest is on its way to it.
    Heir,
    /// The guest has left it, but its part of the move is not over.
    Leaver,
    /// It will never run the guest again.
    Spent,
}

/// What becomes of an eviction.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// The pod may go.
    Go,
    /// It stays for now.
    Stay(String),
    /// It stays until its guest has left this node.
    Leave(String),
}

fn role(pod: &Pod, facts: &Facts) -> Role {
    let record = &facts.record;
    if record.pod == pod.metadata.name && !record.is_over() {
        return Role::Owner;
    }
    let migration = pod.labels().get(keys::MIGRATION);
    // N.B. a migration that is said to have failed may not be decided yet.
    let open = migration.is_some_and(|attempt| record.may_come_by(attempt));
    if migration.is_some() && (facts.arrives || open) {
        return Role::Heir;
    }
    let state = facts.vmi.status.as_ref().and_then(|status| status.migration_state.as_ref());
    if state.is_some_and(|state| !state.is_over() && state.source_pod == pod.metadata.name) {
        return Role::Leaver;
    }
    match migration.is_none() && record.is_over() {
        true => Role::Owner,
        false => Role::Spent,
    }
}

/// Whether a pod may go. Whoever may is of no use to its guest, or its VMI wants it so.
fn judge(pod: &Pod, facts: &Facts) -> Verdict {
    let vmi = &facts.vmi;
    let status = vmi.status.clone().unwrap_or_default();
    let strategy = Strategy::of(&vmi.parse().unwrap_or_default(), &facts.cluster);
    if strategy == Strategy::None || status.phase.is_final() {
        return Verdict::Go;
    }
    let shown = shown(vmi);
    match role(pod, facts) {
        Role::Spent => return Verdict::Go,
        Role::Heir => {
            return Verdict::Stay(format!("VMI {shown} is about to move here: wait until it has"));
        }
        Role::Leaver => {
            return Verdict::Stay(format!("VMI {shown} is about to have left: wait until it has"));
        }
        Role::Owner => {}
    }
    if vmi.metadata.deletion_timestamp.is_some() {
        return Verdict::Stay(format!("VMI {shown} is shutting down: wait until it has"));
    }
    let runs = status.phase == Phase::Running;
    let can = status.live_migratable();
    let moves = strategy == Strategy::External || can.is_some_and(|c| c.status == Is::True);
    if !moves && strategy == Strategy::LiveMigrateIfPossible {
        return Verdict::Go;
    }
    if let Some(stays) = can.filter(|_| !moves) {
        let why = stays.message.as_deref().unwrap_or("its handler does not say why");
        let reason = stays.reason.as_deref().unwrap_or("no reason");
        return Verdict::Stay(format!(
            "VMI {shown} is configured with an eviction strategy but is not live-migratable: {why} \
             ({reason}). Stop it, or have its evictionStrategy be LiveMigrateIfPossible"
        ));
    }
    let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone());
    match node.filter(|node| runs && moves && status.node_name.as_ref() == Some(node)) {
        Some(node) => Verdict::Leave(node),
        None => Verdict::Stay(format!(
            "VMI {shown} has not begun to run here, and cannot move yet: wait until it has"
        )),
    }
}

fn shown(vmi: &VirtualMachineInstance) -> String {
    format!("\"{}/{}\"", vmi.namespace().unwrap_or_default(), vmi.name_any())
}

/// A pod that may have something to do with a guest.
fn launches(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    pod.labels().get(keys::APP).is_some_and(|of| of == keys::LAUNCHER)
        && !pod.labels().contains_key(keys::BINDS)
        && pod.metadata.deletion_timestamp.is_none()
        && !matches!(phase, Some("Succeeded" | "Failed"))
}

/// Who asks for an eviction, where that matters: as migrations are told.
fn source(eviction: &Value) -> Option<&'static str> {
    let (key, name) = DESCHEDULER;
    (eviction["metadata"]["annotations"][key] == name).then_some("descheduler")
}

impl WebApi {
    /// Lets a pod go, or not.
    ///
    /// # Errors
    /// 429: it stays, and why.
    pub(crate) async fn evict(
        &self,
        review: &Review<'_>,
        eviction: Option<&Value>,
    ) -> Result<(), Failure> {
        if !is_name(review.namespace) || !is_name(review.name) {
            return Ok(());
        }
        for _ in 0..TRIES {
            let pods: Api<Pod> = Api::namespaced(self.client.clone(), review.namespace);
            let pod = pods.get_opt(review.name).await.map_err(failure)?;
            let Some(pod) = pod.filter(launches) else { return Ok(()) };
            let Some(facts) = self.facts_of(&pod, review.namespace).await? else { return Ok(()) };
            let node = match judge(&pod, &facts) {
                Verdict::Go => return Ok(()),
                Verdict::Stay(why) => return Err(Failure::too_many_requests(why)),
                Verdict::Leave(node) => node,
            };
            let begun = format!("Eviction triggered evacuation of VMI {}", shown(&facts.vmi));
            let source = eviction.and_then(source);
            match self.mark(&facts.vmi, &node, source, review.dry_run).await {
                Ok(true) => return Err(Failure::too_many_requests(begun)),
                Ok(false) => {
                    let goes_on = format!("Evacuation in progress: {begun}");
                    return Err(Failure::too_many_requests(goes_on));
                }
                // What was read is not what is: it is judged anew.
                Err(kube::Error::Api(status)) if status.code == 409 => {}
                Err(error) => return Err(failure(error)),
            }
        }
        Err(Failure::too_many_requests(format!(
            "what is known of pod {} changes too fast: try again",
            review.name
        )))
    }

    /// None: nobody knows its VMI any more.
    async fn facts_of(&self, pod: &Pod, namespace: &str) -> Result<Option<Facts>, Failure> {
        let Some(name) = pod.annotations().get(keys::DOMAIN).filter(|name| is_name(name)) else {
            return Ok(None);
        };
        let vmis: Api<VirtualMachineInstance> = Api::namespaced(self.client.clone(), namespace);
        let vmi = vmis.get_opt(name).await.map_err(failure)?;
        let own = |vmi: &VirtualMachineInstance| {
            vmi.metadata.uid.as_ref() == pod.labels().get(keys::CREATED_BY)
        };
        let Some(vmi) = vmi.filter(own) else { return Ok(None) };
        let arrives = match pod.labels().get(keys::MIGRATION) {
            Some(uid) => self.is_under_way(namespace, name, uid).await?,
            None => false,
        };
        // N.B. who owns the guest is read last: a move that is over has been written down.
        let records: Api<OwnerRecord> = Api::namespaced(self.client.clone(), namespace);
        let record = records.get_opt(name).await.map_err(failure)?;
        let record = record.and_then(|record| record.status).unwrap_or_default();
        let cluster = self.settings.get().await?;
        Ok(Some(Facts { cluster, vmi, record, arrives }))
    }

    async fn is_under_way(&self, namespace: &str, vmi: &str, uid: &str) -> Result<bool, Failure> {
        let migrations: Api<Migration> = Api::namespaced(self.client.clone(), namespace);
        let own = ListParams::default().labels(&format!("{}={vmi}", keys::MIGRATES));
        let all = migrations.list(&own).await.map_err(failure)?;
        Ok(all.items.iter().any(|m| m.uid().as_deref() == Some(uid) && !m.is_over()))
    }

    /// Says that a VMI is to leave a node, and who wants it so. False: it was said already.
    async fn mark(
        &self,
        vmi: &VirtualMachineInstance,
        node: &str,
        source: Option<&str>,
        dry_run: bool,
    ) -> kube::Result<bool> {
        let namespace = vmi.namespace().unwrap_or_default();
        let vmis: Api<VirtualMachineInstance> = Api::namespaced(self.client.clone(), &namespace);
        let params = PatchParams { dry_run, ..PatchParams::default() };
        let name = vmi.name_any();
        let mut version = vmi.resource_version();
        if vmi.annotations().get(keys::EVICTION_SOURCE).map(String::as_str) != source {
            let patch = json!({"metadata": {
                "resourceVersion": version, "annotations": {keys::EVICTION_SOURCE: source},
            }});
            version = vmis.patch(&name, &params, &Patch::Merge(&patch)).await?.resource_version();
        }
        let marked = vmi.status.as_ref().and_then(|status| status.evacuation_node_name.as_deref());
        if marked == Some(node) {
            return Ok(false);
        }
        let patch = json!({
            "metadata": {"resourceVersion": version}, "status": {"evacuationNodeName": node},
        });
        vmis.patch_status(&name, &params, &Patch::Merge(&patch)).await?;
        Ok(true)
    }
}

#[cfg(test)]
mod test;
