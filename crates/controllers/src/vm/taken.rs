//! What there is of what a VM takes, and the revisions that hold it.

use crate::world::{LOOK, SEEN, TypeStores, World, get, key};
use api::instancetype::{Kind, Taken, What, wanted};
use api::vm::VirtualMachine;
use k8s_openapi::api::apps::v1::ControllerRevision;
use kube::api::PostParams;
use kube::runtime::reflector::{ObjectRef, Store};
use kube::{Api, Resource};
use serde::Serialize;
use serde_json::Value;
use std::time::Instant;

/// What a VM takes.
pub fn taken(world: &World, vm: &VirtualMachine) -> Vec<Taken> {
    let (namespace, _) = key(vm);
    let found = wanted(&vm.spec, vm.status.as_ref()).into_iter().map(|one| {
        let held = one.revision.as_ref().and_then(|revision| {
            get(&world.types.revisions, &(namespace.clone(), revision.clone()))?.data.clone()
        });
        let live = object(&world.types, one.kind, &namespace, &one.name);
        one.found(held.map(|data| data.0), live)
    });
    found.collect()
}

/// An instancetype or a preference.
fn object(types: &TypeStores, kind: &Kind, namespace: &str, name: &str) -> Option<Value> {
    match (kind.what, kind.namespaced) {
        (What::Instancetype, true) => kept(&types.instancetypes, name, Some(namespace)),
        (What::Instancetype, false) => kept(&types.cluster_instancetypes, name, None),
        (What::Preference, true) => kept(&types.preferences, name, Some(namespace)),
        (What::Preference, false) => kept(&types.cluster_preferences, name, None),
    }
}

fn kept<K>(store: &Store<K>, name: &str, namespace: Option<&str>) -> Option<Value>
where
    K: Resource<DynamicType = ()> + Clone + Serialize + 'static,
{
    let mut place = ObjectRef::new(name);
    place.namespace = namespace.map(str::to_owned);
    serde_json::to_value(&*store.get(&place)?).ok()
}

/// Makes a revision, and waits until it is seen: whoever looks again would take it for one that was dropped.
pub async fn pin(world: &World, namespace: &str, object: &Value) -> kube::Result<()> {
    let revision: ControllerRevision = super::made(object)?;
    let revisions: Api<ControllerRevision> = world.api(namespace);
    match revisions.create(&PostParams::default(), &revision).await {
        Err(kube::Error::Api(status)) if status.reason == "AlreadyExists" => {}
        other => {
            other?;
        }
    }
    let until = Instant::now() + SEEN;
    let key = (namespace.to_owned(), revision.metadata.name.unwrap_or_default());
    while get(&world.types.revisions, &key).is_none() && Instant::now() < until {
        tokio::time::sleep(LOOK).await;
    }
    Ok(())
}
