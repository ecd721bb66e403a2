//! What the API does with VMs besides keeping them: admission of their kinds, what can be done to
//! them (`subresources.kubevirt.io`), and the roles that people have.
//!
//! ```text
//! write of a VM -> admission: fill_in (defaults) -> judge (who, what) -> the API keeps it
//! PUT .../start -> subresources -> a request in the VM's status, or a change of its spec
//! PUT .../pause -> subresources -> Guests, at the node on which it runs
//! ```
//!
//! Admission and the decisions of subresources are pure; [`WebApi`] reads what they need and writes
//! what they decide, as a client of the API with rights of its own. It is an extension of an
//! embedded API; other API servers reach it through [`server`], and know of it by [`registration`].

mod access;
pub mod admission;
mod aggregator;
mod eviction;
pub mod metrics;
pub mod registration;
mod roles;
pub mod server;
mod settings;
mod subresources;
mod webhooks;

use admission::Facts;
use api::datavolume::FromClaim;
use api::instancetype::Taken;
use api::keys;
use api::migration::VirtualMachineInstanceMigration;
use api::vmi::VirtualMachineInstance;
use apiserver::auth::User;
use apiserver::body::Answer;
use apiserver::extension::{Extension, Later, Request, Review};
use apiserver::local::failure_of;
use apiserver::status::Failure;
use k8s_openapi::api::core::v1::Node;
use kube::api::ListParams;
use kube::{Api, Client};
use reconcile::taken::taken;
use serde_json::Value;
use settings::Settings;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::io::{AsyncRead, AsyncWrite};

pub use roles::{bindings, roles};

/// What can be done to a guest that runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Act {
    /// It stands still.
    Pause,
    /// It goes on.
    Unpause,
    /// As if its reset button were pressed.
    Reset,
    /// It is asked to start anew.
    SoftReboot,
}

/// A guest's serial console.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// A number that was measured, and of what it is.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// The metric, by KubeVirt's name.
    pub name: String,
    /// The labels.
    pub labels: BTreeMap<String, String>,
    /// The value.
    pub value: f64,
}

/// What was measured.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Measured {
    /// Handlers that have answered.
    pub handlers: u32,
    /// What they said of their guests.
    pub samples: Vec<Sample>,
}

/// The way to guests, at the nodes on which they run.
pub trait Guests: Send + Sync {
    /// Does something to the guest of a VMI.
    fn act<'a>(
        &'a self,
        node: &'a str,
        namespace: &'a str,
        name: &'a str,
        what: Act,
    ) -> Later<'a, ()>;

    /// Opens the console of a VMI's guest.
    fn console<'a>(
        &'a self,
        node: &'a str,
        namespace: &'a str,
        name: &'a str,
    ) -> Later<'a, Box<dyn Stream>>;

    /// Measures what a move of a guest would take: as the guest's node tells it.
    fn forecast<'a>(&'a self, plan: Plan<'a>) -> Later<'a, Value>;

    /// Measures what all guests have used. Who does not answer is left out.
    fn measure(&self) -> Later<'_, Measured>;
}

/// A move that may be made.
#[derive(Debug, Clone, Copy)]
pub struct Plan<'a> {
    /// The node that runs the guest.
    pub source: &'a str,
    /// The VMI's.
    pub namespace: &'a str,
    /// The VMI's.
    pub name: &'a str,
    /// The node to which it would go.
    pub node: &'a str,
    /// Whether all its disks go to other storage.
    pub all: bool,
    /// How.
    pub options: &'a api::migration::Options,
}

/// What is added to the API.
pub struct WebApi {
    client: Client,
    guests: Arc<dyn Guests>,
    settings: Settings,
    transitions: Mutex<metrics::Transitions>,
    consoles: subresources::Consoles,
}

impl WebApi {
    /// With a client that may read what admission needs (settings, VMIs, migrations) and write what
    /// subresources decide; its user is one of [`admission::OWN`] or in `system:masters`.
    pub fn new(client: Client, guests: Arc<dyn Guests>) -> Self {
        let settings = Settings::new(client.clone());
        Self {
            client,
            guests,
            settings,
            transitions: Mutex::default(),
            consoles: subresources::Consoles::default(),
        }
    }

    /// Whether all guests are to leave a node.
    async fn is_drained(&self, node: &str) -> Result<bool, Failure> {
        let nodes: Api<Node> = Api::all(self.client.clone());
        let node = nodes.get_opt(node).await.map_err(failure)?;
        let cluster = self.settings.get().await?;
        Ok(node.is_some_and(|node| api::eviction::is_drained(&node, &cluster)))
    }

    async fn facts(&self, review: &Review<'_>, object: Option<&Value>) -> Result<Facts, Failure> {
        let mut facts = Facts { cluster: self.settings.get().await?, ..Facts::default() };
        let asks = review.resource == "virtualmachineinstancemigrations" && review.old.is_none();
        if let Some(name) = object.and_then(|o| o["spec"]["vmiName"].as_str()).filter(|_| asks)
            && is_name(name)
        {
            let vmis: Api<VirtualMachineInstance> =
                Api::namespaced(self.client.clone(), review.namespace);
            facts.vmi = vmis.get_opt(name).await.map_err(failure)?;
            let migrations: Api<VirtualMachineInstanceMigration> =
                Api::namespaced(self.client.clone(), review.namespace);
            // Each has this label: it is filled in.
            let own = ListParams::default().labels(&format!("{}={name}", keys::MIGRATES));
            facts.migrations = migrations.list(&own).await.map_err(failure)?.items;
        }
        let is_judged = |vm: &&Value| {
            review.resource == "virtualmachines"
                && review.subresource.is_empty()
                && review.old.is_none_or(|old| old["spec"] != vm["spec"])
        };
        if let Some(vm) = object.filter(is_judged) {
            facts.taken = self.taken(review.namespace, vm).await?;
        }
        let askers = admission::clones::askers(review, object);
        for source in admission::clones::foreign(review, object) {
            if !self.may_clone(&askers, &source).await? {
                facts.forbidden.push(source);
            }
        }
        Ok(facts)
    }

    /// What a VM takes from its instancetype and its preference, and what there is of it.
    async fn taken(&self, namespace: &str, vm: &Value) -> Result<Vec<Taken>, Failure> {
        // One that cannot be read is refused for that.
        let Ok((spec, _)) = api::support::parse(&vm["spec"]) else { return Ok(Vec::new()) };
        let status = serde_json::from_value(vm["status"].clone()).unwrap_or_default();
        taken(&self.client, namespace, &spec, Some(&status)).await.map_err(failure)
    }

    /// Whether one of some users may clone a claim.
    async fn may_clone(&self, askers: &[User], source: &FromClaim) -> Result<bool, Failure> {
        for what in admission::clones::permissions(source) {
            for user in askers {
                if access::refusal(&self.client, user, &what).await?.is_none() {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }
}

impl Extension for WebApi {
    fn admits(&self, group: &str, resource: &str, subresource: &str) -> bool {
        admission::kind(group, resource).is_some()
            || (group, resource, subresource) == eviction::JUDGED
    }

    fn fill_in<'a>(&'a self, review: Review<'a>, object: &'a mut Value) -> Later<'a, ()> {
        Box::pin(async move {
            admission::fill_in(&review, object, &*self.settings.get().await?);
            Ok(())
        })
    }

    fn judge<'a>(
        &'a self,
        review: Review<'a>,
        object: Option<&'a Value>,
    ) -> Later<'a, Vec<String>> {
        Box::pin(async move {
            if (review.group, review.resource, review.subresource) == eviction::JUDGED {
                return self.evict(&review, object).await.map(|()| Vec::new());
            }
            let facts = self.facts(&review, object).await?;
            admission::judge(&review, object, &facts)
                .map_err(|denied| denied.failure(&review, object))
        })
    }

    fn groups(&self) -> Vec<(&'static str, Vec<&'static str>)> {
        vec![(api::SUBRESOURCES, subresources::VERSIONS.to_vec())]
    }

    fn resources(&self, group: &str, version: &str) -> Option<Vec<Value>> {
        subresources::resources(group, version)
    }

    fn metrics(&self) -> Later<'_, String> {
        Box::pin(async move {
            let all = ListParams::default();
            let vms = Api::all(self.client.clone()).list(&all).await.map_err(failure)?;
            let vmis = Api::all(self.client.clone()).list(&all).await.map_err(failure)?;
            let migrations = Api::all(self.client.clone()).list(&all).await.map_err(failure)?;
            let measured = self.guests.measure().await?;
            let mut text = metrics::text(&vms.items, &vmis.items, &migrations.items);
            metrics::measured(&mut text, &measured);
            let mut transitions = self.transitions.lock().unwrap_or_else(PoisonError::into_inner);
            transitions.observe(&vmis.items, &migrations.items);
            transitions.write(&mut text);
            Ok(text)
        })
    }

    fn serve(&self, request: Request) -> Later<'_, Answer> {
        Box::pin(subresources::serve(self, request))
    }
}

/// The API's failure, as it came back.
fn failure(error: kube::Error) -> Failure {
    match error {
        kube::Error::Api(status) => {
            failure_of(status.code, &serde_json::to_value(&status).unwrap_or_default())
        }
        other => Failure::internal(format!("the API does not answer: {other}")),
    }
}

/// Whether a text can be the name of an object: other texts would lead elsewhere in a path.
fn is_name(text: &str) -> bool {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.';
    (1..=253).contains(&text.len()) && text.bytes().all(plain) && !text.starts_with('.')
}
