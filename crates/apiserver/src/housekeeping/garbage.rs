//! The garbage collector: what only vanished owners own goes after them.
//!
//! Source: Kubernetes' `pkg/controller/garbagecollector`.

use super::{all, kept, path_of, whenever};
use crate::api::Api;
use crate::local::Local;
use crate::meta;
use crate::resource::Resource;
use crate::status::Failure;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

const FOREGROUND: &str = "foregroundDeletion";
const ORPHAN: &str = "orphan";

/// An object as the collector sees it.
#[derive(Debug, Clone)]
struct Node {
    resource: Arc<Resource>,
    object: Arc<Value>,
}

impl Node {
    fn uid(&self) -> &str {
        meta::text(&self.object, "uid")
    }

    fn path(&self) -> String {
        path_of(
            &self.resource,
            meta::text(&self.object, "namespace"),
            meta::text(&self.object, "name"),
        )
    }

    fn owners(&self) -> &[Value] {
        let owners = self.object["metadata"]["ownerReferences"].as_array();
        owners.map(Vec::as_slice).unwrap_or_default()
    }

    /// Whether an owner is this object: by uid, and not of another namespace.
    fn is_owner(&self, owner: &Value, of: &Node) -> bool {
        let place = meta::text(&self.object, "namespace");
        owner["uid"] == self.uid()
            && owner["name"] == meta::text(&self.object, "name")
            && owner["kind"] == *self.resource.kind
            && (place.is_empty() || place == meta::text(&of.object, "namespace"))
    }

    fn waits_for_dependents(&self) -> bool {
        meta::is_terminating(&self.object) && meta::finalizers(&self.object).contains(&FOREGROUND)
    }
}

/// What is to be done with an object.
#[derive(Debug, PartialEq)]
enum Action {
    /// Delete it, its dependents by this policy.
    Delete(&'static str),
    /// Give it these owners alone.
    Owners(Vec<Value>),
    /// Take this finalizer from it.
    Release(&'static str),
}

/// What is to be done, by path, with the uid and revision that it is planned for.
fn plan(nodes: &[Node]) -> Vec<(String, Arc<Value>, Action)> {
    let by_uid: BTreeMap<&str, &Node> = nodes.iter().map(|node| (node.uid(), node)).collect();
    let mut dependents: BTreeMap<&str, Vec<&Node>> = BTreeMap::new();
    for node in nodes {
        for owner in node.owners() {
            if let Some(uid) = owner["uid"].as_str() {
                dependents.entry(uid).or_default().push(node);
            }
        }
    }
    let mut actions = Vec::new();
    let mut act = |node: &Node, action| actions.push((node.path(), node.object.clone(), action));
    for node in nodes {
        let own = dependents.get(node.uid()).map(Vec::as_slice).unwrap_or_default();
        let orphans =
            meta::is_terminating(&node.object) && meta::finalizers(&node.object).contains(&ORPHAN);
        if orphans {
            for dependent in own {
                let left = dependent.owners().iter().filter(|o| o["uid"] != node.uid());
                act(dependent, Action::Owners(left.cloned().collect()));
            }
            if own.is_empty() {
                act(node, Action::Release(ORPHAN));
            }
        } else if node.waits_for_dependents() {
            let blocks = |dependent: &&&Node| {
                let owner = dependent.owners().iter().find(|o| o["uid"] == node.uid());
                owner.is_some_and(|o| o["blockOwnerDeletion"] == true)
            };
            if own.iter().filter(blocks).count() == 0 {
                act(node, Action::Release(FOREGROUND));
            }
        }
        if let Some(action) = without_owners(node, &by_uid, own) {
            act(node, action);
        }
    }
    actions
}

/// What becomes of an object of which owners are gone or going.
fn without_owners(node: &Node, by_uid: &BTreeMap<&str, &Node>, own: &[&Node]) -> Option<Action> {
    if node.owners().is_empty() || meta::is_terminating(&node.object) {
        return None;
    }
    let (mut solid, mut waiting) = (Vec::new(), Vec::new());
    for owner in node.owners() {
        let found = owner["uid"].as_str().and_then(|uid| by_uid.get(uid));
        match found.filter(|found| found.is_owner(owner, node)) {
            Some(found) if found.waits_for_dependents() => waiting.push(owner.clone()),
            Some(_) => solid.push(owner.clone()),
            None => {}
        }
    }
    if !solid.is_empty() {
        return (solid.len() < node.owners().len()).then_some(Action::Owners(solid));
    }
    // Dependents of what is waited for are waited for too.
    Some(Action::Delete(match !waiting.is_empty() && !own.is_empty() {
        true => "Foreground",
        false => "Background",
    }))
}

pub(super) async fn run(api: Api, account: Local) {
    loop {
        let kept = kept(&api);
        let watched: Vec<&str> = kept.keys().map(String::as_str).collect();
        let resources: BTreeSet<&String> = kept.keys().collect();
        let act = async || collect(&api, &account).await;
        let changed = async {
            // CRDs that come and go change what is watched.
            loop {
                tokio::time::sleep(std::time::Duration::from_secs(1)).await;
                if !super::kept(&api).keys().collect::<BTreeSet<_>>().eq(&resources) {
                    return;
                }
            }
        };
        tokio::select! {
            () = whenever(&api, "garbage", &watched, act) => {}
            () = changed => {}
        }
    }
}

async fn collect(api: &Api, account: &Local) -> Result<(), Failure> {
    let mut nodes = Vec::new();
    for (key, resource) in kept(api) {
        let objects = all(api, &key).into_iter();
        nodes.extend(objects.map(|object| Node { resource: resource.clone(), object }));
    }
    let mut failed = None;
    for (path, object, action) in plan(&nodes) {
        let (uid, revision) = (meta::text(&object, "uid"), meta::text(&object, "resourceVersion"));
        let done = match action {
            Action::Delete(policy) => {
                let options = json!({
                    "kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": policy,
                    "preconditions": {"uid": uid, "resourceVersion": revision},
                });
                account.delete(&path, &options).await
            }
            Action::Owners(owners) => {
                let owners = if owners.is_empty() { Value::Null } else { owners.into() };
                let patch = json!({"metadata": {"uid": uid, "resourceVersion": revision, "ownerReferences": owners}});
                account.merge(&path, &patch).await.map(|_| ())
            }
            Action::Release(finalizer) => {
                let left: Vec<_> =
                    meta::finalizers(&object).into_iter().filter(|f| *f != finalizer).collect();
                let patch = json!({"metadata": {"uid": uid, "resourceVersion": revision, "finalizers": left}});
                account.merge(&path, &patch).await.map(|_| ())
            }
        };
        // What has changed meanwhile is looked at again.
        if let Err(failure) = done
            && failure.code != 404
            && failure.code != 409
        {
            failed = Some(failure);
        }
    }
    failed.map_or(Ok(()), Err)
}
