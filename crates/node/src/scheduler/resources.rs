//! What pods ask for and nodes have.

use crate::agent::MIRROR;
use apiserver::quantity::Quantity;
use k8s_openapi::api::core::v1::{Container, Node, Pod};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity as Text;
use kube::ResourceExt;
use std::collections::BTreeMap;

/// Amounts by name: of `cpu` in thousandths, of all else in whole units.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resources(pub BTreeMap<String, i64>);

impl Resources {
    /// Of a map of quantities. What is none counts as nothing: the API refuses it.
    pub fn of(map: Option<&BTreeMap<String, Text>>) -> Self {
        let amount = |name: &str, text: &str| {
            let quantity = Quantity::parse(text).unwrap_or(Quantity::ZERO);
            if name == "cpu" { quantity.millis() } else { quantity.units() }
        };
        let all = map.into_iter().flatten();
        Self(all.map(|(name, text)| (name.clone(), amount(name, &text.0))).collect())
    }

    /// An amount, 0 for one that is not named.
    pub fn get(&self, name: &str) -> i64 {
        self.0.get(name).copied().unwrap_or(0)
    }

    /// Adds to each.
    pub fn add(&mut self, other: &Self) {
        for (name, amount) in &other.0 {
            let sum = self.0.entry(name.clone()).or_default();
            *sum = sum.saturating_add(*amount);
        }
    }

    /// The larger of each.
    fn raise(&mut self, other: &Self) {
        for (name, amount) in &other.0 {
            let most = self.0.entry(name.clone()).or_default();
            *most = (*most).max(*amount);
        }
    }

    /// What a pod needs of its node, itself counted as one of `pods`.
    ///
    /// Source: Kubernetes' `PodRequests`. Init containers run one after the other, beside the
    /// sidecars (init containers that are restarted always) that stand before them.
    pub fn of_pod(pod: &Pod) -> Self {
        let Some(spec) = &pod.spec else { return Self::default() };
        let (mut sidecars, mut start) = (Self::default(), Self::default());
        for container in spec.init_containers.iter().flatten() {
            let mut beside = sidecars.clone();
            beside.add(&requests(container));
            start.raise(&beside);
            if is_sidecar(container) {
                sidecars = beside;
            }
        }
        let mut all = sidecars;
        for container in &spec.containers {
            all.add(&requests(container));
        }
        all.raise(&start);
        all.add(&Self::of(spec.overhead.as_ref()));
        all.0.insert("pods".into(), 1);
        all
    }

    /// What a pod is likely to take: one that asks for nothing takes something all the same, and
    /// such pods are to be spread too; but for records of what runs elsewhere.
    ///
    /// Source: kube-scheduler's `DefaultMilliCPURequest` and `DefaultMemoryRequest`.
    pub fn guess(pod: &Pod) -> Self {
        let mut all = Self::of_pod(pod);
        if pod.annotations().contains_key(MIRROR) {
            return all;
        }
        for (name, least) in [("cpu", 100), ("memory", 200 << 20)] {
            let amount = all.0.entry(name.into()).or_default();
            if *amount == 0 {
                *amount = least;
            }
        }
        all
    }

    /// What a node gives to pods.
    pub fn of_node(node: &Node) -> Self {
        Self::of(node.status.as_ref().and_then(|status| status.allocatable.as_ref()))
    }

    /// Why something does not fit into what is left of `self`, when `used` is taken.
    pub fn lacks(&self, used: &Self, wanted: &Self) -> Vec<String> {
        let short = |(name, amount): (&String, &i64)| {
            let left = self.get(name).saturating_sub(used.get(name));
            let lacks = *amount > 0 && *amount > left;
            lacks.then(|| match &**name {
                "pods" => "Too many pods".to_owned(),
                name => format!("Insufficient {name}"),
            })
        };
        wanted.0.iter().filter_map(short).collect()
    }
}

fn requests(container: &Container) -> Resources {
    Resources::of(container.resources.as_ref().and_then(|r| r.requests.as_ref()))
}

/// An init container that is never waited for, and restarted always.
pub fn is_sidecar(container: &Container) -> bool {
    container.restart_policy.as_deref() == Some("Always")
}
