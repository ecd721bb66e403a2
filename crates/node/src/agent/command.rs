//! How a container is started: command, arguments and environment.

use super::images::Image;
use apiserver::quantity::Quantity;
use k8s_openapi::api::core::v1::{
    Container, EnvVar, EnvVarSource, Node, ObjectFieldSelector, Pod, ResourceFieldSelector,
};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Where a pod is.
#[derive(Debug, Clone, Default)]
pub struct Place {
    /// Its own address.
    pub pod_ip: String,
    /// Its node's.
    pub host_ip: String,
}

/// What ConfigMaps or Secrets hold, by name and key; None for one that does not exist.
pub type Contents = BTreeMap<String, Option<BTreeMap<String, Vec<u8>>>>;

/// What an environment is made of.
pub struct Sources<'a> {
    /// The pod.
    pub pod: &'a Pod,
    /// Where it is.
    pub place: &'a Place,
    /// Its node, for limits that are not set.
    pub node: &'a Node,
    /// What its ConfigMaps hold.
    pub config_maps: &'a Contents,
    /// What its Secrets hold.
    pub secrets: &'a Contents,
}

/// Why a container cannot be made: the reason of its waiting, and the text.
pub type Refusal = (&'static str, String);

fn config_error(text: String) -> Refusal {
    ("CreateContainerConfigError", text)
}

/// Replaces `$(NAME)` by what the environment has; `$$` stands for `$`.
pub fn expand(text: &str, environment: &[(String, String)]) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix('$') {
            out.push('$');
            rest = after;
            continue;
        }
        let name = rest.strip_prefix('(').and_then(|inner| inner.split_once(')'));
        match name {
            Some((name, after)) => {
                // The last of a name counts.
                match environment.iter().rev().find(|(key, _)| key == name) {
                    Some((_, value)) => out.push_str(value),
                    None => out.push_str(&format!("$({name})")),
                }
                rest = after;
            }
            None => out.push('$'),
        }
    }
    out.push_str(rest);
    out
}

/// The program and its arguments.
///
/// # Errors
/// When the image has no such program.
pub fn command(
    container: &Container,
    image: &Image,
    environment: &[(String, String)],
) -> Result<(PathBuf, Vec<String>), Refusal> {
    let given = |list: &Option<Vec<String>>| -> Vec<String> {
        list.iter().flatten().map(|text| expand(text, environment)).collect()
    };
    let (command, arguments) = (given(&container.command), given(&container.args));
    let all: Vec<String> = match command.is_empty() {
        true => image.entrypoint.iter().cloned().chain(arguments).collect(),
        false => command.into_iter().chain(arguments).collect(),
    };
    let Some((name, arguments)) = all.split_first() else {
        return Err(("CreateContainerError", "no command specified".into()));
    };
    let program = image.program(name).ok_or_else(|| {
        let known: Vec<&str> = image.programs.keys().map(String::as_str).collect();
        let text = format!(
            "exec: {name:?}: executable file not found; the image has: {}",
            known.join(", ")
        );
        ("CreateContainerError", text)
    })?;
    Ok((program, arguments.to_vec()))
}

/// The value of a pod's field, as the downward API gives it.
pub fn field(selector: &ObjectFieldSelector, pod: &Pod, place: &Place) -> Result<String, String> {
    let meta = &pod.metadata;
    let spec = pod.spec.as_ref();
    let text = |value: Option<&String>| Ok(value.cloned().unwrap_or_default());
    let path = &*selector.field_path;
    let keyed = |list: &str| path.strip_prefix(list)?.strip_prefix("['")?.strip_suffix("']");
    let lines = |map: Option<&BTreeMap<String, String>>| {
        let line = |(key, value): (&String, &String)| format!("{key}={value:?}");
        map.into_iter().flatten().map(line).collect::<Vec<_>>().join("\n")
    };
    if let Some(key) = keyed("metadata.labels") {
        return text(meta.labels.as_ref().and_then(|labels| labels.get(key)));
    }
    if let Some(key) = keyed("metadata.annotations") {
        return text(meta.annotations.as_ref().and_then(|annotations| annotations.get(key)));
    }
    match path {
        "metadata.name" => text(meta.name.as_ref()),
        "metadata.namespace" => text(meta.namespace.as_ref()),
        "metadata.uid" => text(meta.uid.as_ref()),
        "metadata.labels" => Ok(lines(meta.labels.as_ref())),
        "metadata.annotations" => Ok(lines(meta.annotations.as_ref())),
        "spec.nodeName" => text(spec.and_then(|spec| spec.node_name.as_ref())),
        "spec.serviceAccountName" => text(spec.and_then(|spec| spec.service_account_name.as_ref())),
        "status.podIP" | "status.podIPs" => Ok(place.pod_ip.clone()),
        "status.hostIP" | "status.hostIPs" => Ok(place.host_ip.clone()),
        _ => Err(format!("unsupported fieldPath: {path}")),
    }
}

/// The amount of a container's resource, in units of the divisor, rounded up.
pub fn resource(
    selector: &ResourceFieldSelector,
    container: &Container,
    pod: &Pod,
    node: &Node,
) -> Result<String, String> {
    let named = selector.container_name.as_deref().filter(|name| !name.is_empty());
    let mut all = pod.spec.iter().flat_map(|spec| &spec.containers);
    let container = match named {
        Some(name) => all.find(|c| c.name == name).ok_or(format!("container {name} not found"))?,
        None => container,
    };
    let unsupported = || format!("unsupported container resource: {}", selector.resource);
    let (list, name) = selector.resource.split_once('.').ok_or_else(unsupported)?;
    let resources = container.resources.as_ref();
    let amounts = match list {
        "limits" => resources.and_then(|r| r.limits.as_ref()),
        "requests" => resources.and_then(|r| r.requests.as_ref()),
        _ => return Err(unsupported()),
    };
    let allocatable = || node.status.as_ref()?.allocatable.as_ref()?.get(name);
    let found = amounts.and_then(|map| map.get(name));
    // A limit that is not set is what the node has.
    let found = found.or_else(|| (list == "limits").then(allocatable).flatten());
    let parse = |text: &str| Quantity::parse(text).unwrap_or(Quantity::ZERO);
    let amount = found.map_or(Quantity::ZERO, |q| parse(&q.0));
    let divisor = selector.divisor.as_ref().map(|q| parse(&q.0)).filter(|q| q.millis() > 0);
    let (amount, divisor) = (amount.millis(), divisor.map_or(1000, Quantity::millis));
    Ok(amount
        .div_euclid(divisor)
        .saturating_add(i64::from(amount.rem_euclid(divisor) > 0))
        .to_string())
}

impl Sources<'_> {
    /// A container's environment, in order.
    ///
    /// # Errors
    /// What it lacks.
    pub fn environment(&self, container: &Container) -> Result<Vec<(String, String)>, Refusal> {
        let mut all = Vec::new();
        for from in container.env_from.iter().flatten() {
            let prefix = from.prefix.as_deref().unwrap_or_default();
            let map = from.config_map_ref.as_ref().map(|r| ("configmap", &r.name, r.optional));
            let secret = from.secret_ref.as_ref().map(|r| ("secret", &r.name, r.optional));
            let Some((kind, name, optional)) = map.or(secret) else { continue };
            match self.contents(kind, name) {
                Some(contents) => all.extend(contents.iter().map(|(key, value)| {
                    (format!("{prefix}{key}"), String::from_utf8_lossy(value).into_owned())
                })),
                None if optional == Some(true) => {}
                None => return Err(config_error(format!("{kind} \"{name}\" not found"))),
            }
        }
        for variable in container.env.iter().flatten() {
            if let Some(value) = self.value(variable, container, &all)? {
                all.push((variable.name.clone(), value));
            }
        }
        Ok(all)
    }

    fn contents(&self, kind: &str, name: &str) -> Option<&BTreeMap<String, Vec<u8>>> {
        let all = if kind == "secret" { self.secrets } else { self.config_maps };
        all.get(name)?.as_ref()
    }

    fn value(
        &self,
        variable: &EnvVar,
        container: &Container,
        before: &[(String, String)],
    ) -> Result<Option<String>, Refusal> {
        let Some(source) = &variable.value_from else {
            let text = variable.value.as_deref().unwrap_or_default();
            return Ok(Some(expand(text, before)));
        };
        if let Some(selector) = &source.field_ref {
            return field(selector, self.pod, self.place).map(Some).map_err(config_error);
        }
        if let Some(selector) = &source.resource_field_ref {
            let found = resource(selector, container, self.pod, self.node);
            return found.map(Some).map_err(config_error);
        }
        self.keyed(source)
    }

    /// The value of one key of a ConfigMap or Secret.
    fn keyed(&self, source: &EnvVarSource) -> Result<Option<String>, Refusal> {
        let map = source.config_map_key_ref.as_ref();
        let map = map.map(|r| ("configmap", "ConfigMap", &r.name, &r.key, r.optional));
        let secret = source.secret_key_ref.as_ref();
        let secret = secret.map(|r| ("secret", "Secret", &r.name, &r.key, r.optional));
        let Some((kind, title, name, key, optional)) = map.or(secret) else { return Ok(None) };
        let namespace = self.pod.metadata.namespace.as_deref().unwrap_or_default();
        let contents = self.contents(kind, name);
        match contents.and_then(|contents| contents.get(key)) {
            Some(value) => Ok(Some(String::from_utf8_lossy(value).into_owned())),
            None if optional == Some(true) => Ok(None),
            None if contents.is_none() => Err(config_error(format!("{kind} \"{name}\" not found"))),
            None => {
                let text = format!("couldn't find key {key} in {title} {namespace}/{name}");
                Err(config_error(text))
            }
        }
    }
}
