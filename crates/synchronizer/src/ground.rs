//! What a synchronizer asks of the rest of its cluster, and cannot know itself.

use api::kubevirt::Configuration;
use api::vmi::VirtualMachineInstance;
use channel::identity::SpiffeId;
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use serde_json::Value;
use std::collections::BTreeMap;
use std::pin::Pin;

/// An answer that takes a while.
pub type Later<'a, T> = Pin<Box<dyn Future<Output = Result<T, String>> + Send + 'a>>;

/// A guest that may come from another cluster.
#[derive(Debug, Clone)]
pub struct Arrival {
    /// The VMI that would have it.
    pub vmi: VirtualMachineInstance,
    /// The claims that would be made for it.
    pub claims: Vec<PersistentVolumeClaim>,
    /// What its node must have.
    pub selectors: BTreeMap<String, String>,
    /// The settings.
    pub settings: Configuration,
}

/// Whether there is a place for it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Place {
    /// The node that it would get.
    pub node: Option<String>,
    /// All that stands in its way.
    pub faults: Vec<String>,
}

/// A guest of this cluster that may go to another's gateway.
#[derive(Debug, Clone, Copy)]
pub struct Departure<'a> {
    /// The node that runs it.
    pub node: &'a str,
    /// Its VMI's.
    pub namespace: &'a str,
    /// Its VMI's.
    pub name: &'a str,
    /// The node to which it would go.
    pub to: &'a str,
    /// That node's gateway.
    pub gateway: &'a str,
    /// Whose that is.
    pub id: &'a SpiffeId,
}

/// The rest of a cluster: wired up where all parts are put together.
pub trait Ground: Send + Sync {
    /// Looks for a place for a guest that comes.
    fn place(&self, arrival: Arrival) -> Later<'_, Place>;

    /// Whether a guest's node reaches the gateway, and is believed there. Takes a moment. Returns why the way
    /// goes through both clusters' synchronizers, where it does.
    fn reach<'a>(&'a self, departure: Departure<'a>) -> Later<'a, Option<String>>;

    /// Measures what the guest's move would take, for a second or two: as its node tells it.
    fn forecast<'a>(&'a self, departure: Departure<'a>) -> Later<'a, Value>;
}
