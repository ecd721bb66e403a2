//! What objects use of a namespace's quotas: pure.

use crate::quantity::Quantity;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// Amounts by the names of resources, such as `requests.cpu`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Usage(pub BTreeMap<String, Quantity>);

/// What pods can be limited in, beside extended resources.
const COMPUTE: [&str; 3] = ["cpu", "memory", "ephemeral-storage"];

impl Usage {
    fn add(&mut self, name: &str, amount: Quantity) {
        let sum = self.0.get(name).copied().unwrap_or(Quantity::ZERO).plus(amount);
        self.0.insert(name.into(), sum);
    }

    /// The amounts of a map of quantities.
    fn of_map(map: &Value) -> Self {
        let all = map.as_object().into_iter().flatten();
        Self(all.filter_map(|(name, value)| Some((name.clone(), Quantity::of(value)?))).collect())
    }

    /// What a quota's status says is used.
    pub fn of_status(quota: &Value) -> Self {
        Self::of_map(&quota["status"]["used"])
    }

    /// The sum.
    #[must_use]
    pub fn plus(&self, more: &Self) -> Self {
        let mut sum = self.clone();
        more.0.iter().for_each(|(name, amount)| sum.add(name, *amount));
        sum
    }

    /// The difference.
    #[must_use]
    pub fn minus(&self, less: &Self) -> Self {
        let mut rest = self.clone();
        for (name, amount) in &less.0 {
            rest.add(name, Quantity::ZERO.minus(*amount));
        }
        rest
    }

    /// Only what a quota limits.
    #[must_use]
    pub fn limited_by(mut self, quota: &Value) -> Self {
        let hard = quota["spec"]["hard"].as_object();
        self.0.retain(|name, _| hard.is_some_and(|hard| hard.contains_key(name)));
        self
    }

    /// More of anything is used.
    pub fn is_above_zero(&self) -> bool {
        self.0.values().any(|amount| *amount > Quantity::ZERO)
    }

    fn to_json(&self) -> Value {
        let all = self.0.iter().map(|(name, amount)| (name.clone(), amount.to_string().into()));
        Value::Object(all.collect::<Map<_, _>>())
    }

    /// A quota of which this is used.
    pub fn into_status(self, quota: &Value) -> Value {
        let hard = quota["spec"]["hard"].clone();
        let names: Vec<_> =
            hard.as_object().into_iter().flatten().map(|(n, _)| n.clone()).collect();
        let mut used = self.limited_by(quota);
        for name in names {
            used.0.entry(name).or_insert(Quantity::ZERO);
        }
        let mut next = quota.clone();
        next["status"] = json!({"hard": hard, "used": used.to_json()});
        next
    }
}

/// The names of which too much would be used.
#[derive(Debug, Clone, PartialEq)]
pub struct Beyond(BTreeMap<String, Quantity>);

impl Beyond {
    /// As Kubernetes tells it.
    pub fn told(&self, more: &Usage, used: &Usage) -> String {
        let list = |amounts: &BTreeMap<String, Quantity>| {
            let all = self.0.keys().map(|name| {
                let amount = amounts.get(name).copied().unwrap_or(Quantity::ZERO);
                format!("{name}={amount}")
            });
            all.collect::<Vec<_>>().join(",")
        };
        format!("requested: {}, used: {}, limited: {}", list(&more.0), list(&used.0), list(&self.0))
    }
}

/// What a quota does not allow of what would be used, if more of it is asked for.
pub fn beyond(quota: &Value, next: &Usage, more: &Usage) -> Option<Beyond> {
    let hard = Usage::of_map(&quota["spec"]["hard"]).0;
    let asked = |name: &String| more.0.get(name).is_some_and(|m| *m > Quantity::ZERO);
    let over = hard
        .into_iter()
        .filter(|(name, most)| asked(name) && next.0.get(name).is_some_and(|amount| amount > most));
    let over: BTreeMap<_, _> = over.collect();
    (!over.is_empty()).then_some(Beyond(over))
}

/// What an object uses. `key` is its resource's.
pub fn usage(key: &str, object: &Value) -> Usage {
    let mut usage = Usage::default();
    if key == "pods" && has_ended(object) {
        return usage;
    }
    let one = Quantity::whole(1);
    let counted =
        if key.contains('.') || key == "pods" { key.to_owned() } else { format!("{key}.") };
    usage.add(&format!("count/{}", counted.trim_end_matches('.')), one);
    match key {
        "pods" => pod(object, &mut usage),
        "persistentvolumeclaims" => claim(object, &mut usage),
        "services" => {
            usage.add("services", one);
            let kind = object["spec"]["type"].as_str().unwrap_or_default();
            if matches!(kind, "NodePort" | "LoadBalancer") {
                let ports = object["spec"]["ports"].as_array().map_or(0, Vec::len);
                usage.add("services.nodeports", Quantity::whole(ports as i64));
            }
            if kind == "LoadBalancer" {
                usage.add("services.loadbalancers", one);
            }
        }
        "configmaps" | "secrets" | "replicationcontrollers" => usage.add(key, one),
        _ => {}
    }
    usage
}

fn has_ended(pod: &Value) -> bool {
    matches!(pod["status"]["phase"].as_str(), Some("Failed" | "Succeeded"))
}

fn claim(claim: &Value, usage: &mut Usage) {
    let asked = Quantity::of(&claim["spec"]["resources"]["requests"]["storage"]);
    let asked = asked.unwrap_or(Quantity::ZERO);
    usage.add("persistentvolumeclaims", Quantity::whole(1));
    usage.add("requests.storage", asked);
    if let Some(class) = claim["spec"]["storageClassName"].as_str().filter(|c| !c.is_empty()) {
        let class = format!("{class}.storageclass.storage.k8s.io");
        usage.add(&format!("{class}/requests.storage"), asked);
        usage.add(&format!("{class}/persistentvolumeclaims"), Quantity::whole(1));
    }
}

fn pod(pod: &Value, usage: &mut Usage) {
    usage.add("pods", Quantity::whole(1));
    for (kind, plain) in [("requests", true), ("limits", false)] {
        for (name, amount) in pod_resources(pod, kind) {
            match COMPUTE.contains(&&*name) {
                true => {
                    usage.add(&format!("{kind}.{name}"), amount);
                    if plain {
                        usage.add(&name, amount);
                    }
                }
                // Of extended resources only requests can be limited.
                false if plain => usage.add(&format!("requests.{name}"), amount),
                false => {}
            }
        }
    }
}

/// What a pod needs at any moment: that of all its containers, or of one that runs before them.
pub fn pod_resources(pod: &Value, kind: &str) -> BTreeMap<String, Quantity> {
    let of = |container: &Value| Usage::of_map(&container["resources"][kind]);
    let list = |name: &str| pod["spec"][name].as_array().map(Vec::as_slice).unwrap_or_default();
    let mut sum = Usage::default();
    for container in list("containers") {
        sum = sum.plus(&of(container));
    }
    // Those that go on running count with the rest, and with those behind them.
    let (mut sidecars, mut peak) = (Usage::default(), Usage::default());
    for container in list("initContainers") {
        let own = of(container);
        let at_once = match container["restartPolicy"] == "Always" {
            true => {
                sidecars = sidecars.plus(&own);
                sidecars.clone()
            }
            false => sidecars.plus(&own),
        };
        for (name, amount) in at_once.0 {
            let most = peak.0.get(&name).copied().unwrap_or(Quantity::ZERO).max(amount);
            peak.0.insert(name, most);
        }
    }
    sum = sum.plus(&sidecars);
    for (name, amount) in peak.0 {
        let most = sum.0.get(&name).copied().unwrap_or(Quantity::ZERO).max(amount);
        sum.0.insert(name, most);
    }
    if kind == "requests" {
        sum = sum.plus(&Usage::of_map(&pod["spec"]["overhead"]));
    }
    sum.0
}

/// Whether a quota is about an object of a resource.
pub fn is_in_scope(quota: &Value, key: &str, object: &Value) -> bool {
    let spec = &quota["spec"];
    let scopes = spec["scopes"].as_array().into_iter().flatten().filter_map(Value::as_str);
    let plain = scopes.map(|scope| (scope, "Exists", Vec::new()));
    let expressions = spec["scopeSelector"]["matchExpressions"].as_array().into_iter().flatten();
    let selected = expressions.map(|e| {
        let values = e["values"].as_array().into_iter().flatten().filter_map(Value::as_str);
        (
            e["scopeName"].as_str().unwrap_or_default(),
            e["operator"].as_str().unwrap_or("Exists"),
            values.collect::<Vec<_>>(),
        )
    });
    let all: Vec<_> = plain.chain(selected).collect();
    if all.is_empty() {
        return true;
    }
    key == "pods"
        && all.into_iter().all(|(scope, operator, values)| pod_is(object, scope, operator, &values))
}

fn pod_is(pod: &Value, scope: &str, operator: &str, values: &[&str]) -> bool {
    let has_deadline = pod["spec"]["activeDeadlineSeconds"].as_i64().is_some_and(|s| s >= 0);
    let best_effort =
        || pod_resources(pod, "requests").is_empty() && pod_resources(pod, "limits").is_empty();
    match scope {
        "Terminating" => has_deadline,
        "NotTerminating" => !has_deadline,
        "BestEffort" => best_effort(),
        "NotBestEffort" => !best_effort(),
        "PriorityClass" => {
            let class = pod["spec"]["priorityClassName"].as_str().filter(|c| !c.is_empty());
            match operator {
                "In" => class.is_some_and(|class| values.contains(&class)),
                "NotIn" => class.is_none_or(|class| !values.contains(&class)),
                "DoesNotExist" => class.is_none(),
                _ => class.is_some(),
            }
        }
        _ => false,
    }
}

/// What a pod has to say where a quota limits it, container by container; None if nothing.
pub fn missing(quota: &Value, key: &str, pod: &Value) -> Option<String> {
    if key != "pods" {
        return None;
    }
    let hard = quota["spec"]["hard"].as_object()?;
    let mut lacking: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for name in hard.keys() {
        let (kind, resource) = match name.split_once('.') {
            Some((kind @ ("requests" | "limits"), resource)) => (kind, resource),
            _ => ("requests", name.as_str()),
        };
        if !COMPUTE.contains(&resource) || resource == "ephemeral-storage" {
            continue;
        }
        let containers = ["initContainers", "containers"].into_iter();
        let containers = containers.flat_map(|l| pod["spec"][l].as_array().into_iter().flatten());
        for container in containers {
            if container["resources"][kind].get(resource).is_none() {
                let container = container["name"].as_str().unwrap_or_default();
                lacking.entry(name).or_default().push(container);
            }
        }
    }
    let told: Vec<_> = lacking
        .into_iter()
        .map(|(name, containers)| format!("{name} for: {}", containers.join(",")))
        .collect();
    (!told.is_empty()).then(|| told.join("; "))
}
