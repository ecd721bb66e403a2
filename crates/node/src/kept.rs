//! All objects of a kind, kept up to date by a watch; and a bell that rings when one changes.

use futures_util::StreamExt;
use k8s_openapi::api::core::v1::ObjectReference;
use kube::runtime::reflector::{self, Store};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Resource};
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
        let (store, writer) = reflector::store();
        let changes = reflector::reflector(writer, watcher(api, config)).default_backoff();
        let bell = Arc::clone(&self.bell);
        self.watches.spawn(async move {
            let mut changes = std::pin::pin!(changes);
            while let Some(change) = changes.next().await {
                match change {
                    Ok(_) => bell.notify_one(),
                    Err(error) => {
                        tracing::warn!(kind = %K::kind(&()), "the watch is begun again: {error}");
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
