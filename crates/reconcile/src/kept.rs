//! All objects of a kind, kept up to date by a watch; and a bell that rings when one changes.

use crate::events::rooted;
use futures_util::StreamExt;
use k8s_openapi::api::core::v1::ObjectReference;
use kube::runtime::reflector::{self, Store};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use std::fmt::Debug;
use std::sync::Arc;
use tokio::sync::Notify;
use tokio::task::JoinSet;

/// Watches, and ends with what it runs in.
#[derive(Default)]
pub struct Keeper {
    /// Rings on every change of what is kept.
    pub bell: Arc<Notify>,
    watches: JoinSet<()>,
}

impl Keeper {
    /// Keeps all objects that an API and a configuration select. Failures are tried again with
    /// growing pauses, and said in the log.
    pub fn keep<K>(&mut self, api: Api<K>, config: watcher::Config) -> Store<K>
    where
        K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
    {
        let bell = Arc::clone(&self.bell);
        self.keep_and(api, config, move |_| bell.notify_one())
    }

    /// The same, and calls for every object that was changed or removed, after it was.
    ///
    /// Who managed which field is not kept: nobody asks, and it is most of many objects.
    pub fn keep_and<K>(
        &mut self,
        api: Api<K>,
        config: watcher::Config,
        changed: impl Fn(&K) + Send + 'static,
    ) -> Store<K>
    where
        K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
    {
        let (store, writer) = reflector::store();
        let watch = watcher(api, config).modify(|object| object.managed_fields_mut().clear());
        let changes = reflector::reflector(writer, watch).default_backoff();
        let all: Store<K> = store.clone();
        self.watches.spawn(async move {
            let mut changes = std::pin::pin!(changes);
            let mut before = Vec::new();
            while let Some(change) = changes.next().await {
                match change {
                    Ok(
                        watcher::Event::Apply(object)
                        | watcher::Event::InitApply(object)
                        | watcher::Event::Delete(object),
                    ) => changed(&object),
                    // What a new list lacks was removed meanwhile, and nobody says so.
                    Ok(watcher::Event::Init) => before = all.state(),
                    Ok(watcher::Event::InitDone) => {
                        std::mem::take(&mut before).iter().for_each(|object| changed(object));
                    }
                    Err(error) => {
                        let why = rooted(&error);
                        tracing::warn!(kind = %K::kind(&()), "the watch is begun again: {why}");
                    }
                }
            }
        });
        store
    }
}

/// Waits until a first list of each kind is there.
#[macro_export]
#[doc(hidden)]
macro_rules! ready {
    ($($store:expr),+ $(,)?) => {
        $(
            // Its writer lives as long as the keeper does.
            if $store.wait_until_ready().await.is_err() {
                return;
            }
        )+
    };
}

/// A reference to an object, as events carry it.
pub fn reference<K: Resource<DynamicType = ()>>(object: &K) -> ObjectReference {
    object.object_ref(&())
}
