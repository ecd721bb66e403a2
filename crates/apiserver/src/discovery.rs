//! What is served, told to clients.

use crate::catalog::Catalog;
use crate::resource::{Resource, Subresource};
use serde_json::{Value, json};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

const ALL: [&str; 8] =
    ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"];

fn verbs(resource: &Resource) -> &'static [&'static str] {
    if resource.stored { &ALL } else { &ALL[..1] }
}

/// The core group's versions.
pub fn core_versions(server: &str) -> Value {
    json!({
        "kind": "APIVersions", "versions": ["v1"],
        "serverAddressByClientCIDRs": [{"clientCIDR": "0.0.0.0/0", "serverAddress": server}],
    })
}

/// All groups but the core one.
pub fn groups(catalog: &Catalog) -> Value {
    let groups: Vec<_> = ordered(catalog)
        .into_iter()
        .filter(|(name, _)| !name.is_empty())
        .map(|(name, versions)| group_object(name, &versions))
        .collect();
    json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
}

/// One group.
pub fn group(catalog: &Catalog, name: &str) -> Option<Value> {
    let versions = catalog.groups().remove(name)?;
    let mut group = group_object(name, &versions);
    group["kind"] = "APIGroup".into();
    group["apiVersion"] = "v1".into();
    Some(group)
}

/// Kubernetes' own groups first.
fn ordered(catalog: &Catalog) -> Vec<(&str, Vec<&str>)> {
    let mut groups: Vec<_> = catalog.groups().into_iter().collect();
    let own = |name: &str| !name.contains('.') || name.ends_with(".k8s.io");
    groups.sort_by_key(|(name, _)| (!own(name), *name));
    groups
}

fn group_object(name: &str, versions: &[&str]) -> Value {
    let version = |v: &&str| json!({"groupVersion": format!("{name}/{v}"), "version": v});
    json!({
        "name": name,
        "versions": versions.iter().map(version).collect::<Vec<_>>(),
        "preferredVersion": versions.first().map(version),
    })
}

/// The resources of a group and version.
pub fn resources(catalog: &Catalog, group: &str, version: &str) -> Option<Value> {
    let mut all = Vec::new();
    for resource in catalog.of_version(group, version) {
        all.push(entry(resource));
        all.extend(parts(resource));
    }
    let name = if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") };
    (!all.is_empty()).then(|| {
        json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": name, "resources": all})
    })
}

fn entry(resource: &Resource) -> Value {
    let mut entry = json!({
        "name": *resource.plural, "singularName": *resource.singular,
        "namespaced": resource.namespaced, "kind": *resource.kind, "verbs": verbs(resource),
    });
    if !resource.short_names.is_empty() {
        entry["shortNames"] = resource.short_names.iter().map(|s| &**s).collect();
    }
    if !resource.categories.is_empty() {
        entry["categories"] = resource.categories.iter().map(|s| &**s).collect();
    }
    if resource.stored {
        entry["storageVersionHash"] =
            hash(&(&resource.group, &resource.storage_version, &resource.kind)).into();
    }
    entry
}

fn parts(resource: &Resource) -> Vec<Value> {
    let mut all = Vec::new();
    let part = |name: &str| {
        json!({
            "name": format!("{}/{name}", resource.plural), "singularName": "",
            "namespaced": resource.namespaced, "kind": *resource.kind, "verbs": ["get", "patch", "update"],
        })
    };
    if resource.status {
        all.push(part("status"));
    }
    if resource.scale.is_some() {
        let mut scale = part("scale");
        scale["group"] = "autoscaling".into();
        scale["version"] = "v1".into();
        scale["kind"] = "Scale".into();
        all.push(scale);
    }
    for Subresource { name, kind: (group, version, kind), verbs } in &resource.subresources {
        let mut entry = part(name);
        entry["kind"] = (**kind).into();
        entry["verbs"] = verbs.iter().map(|v| &**v).collect();
        if !group.is_empty() {
            entry["group"] = (**group).into();
            entry["version"] = (**version).into();
        }
        all.push(entry);
    }
    all
}

/// `apidiscovery.k8s.io/v2`: the core group, or all others, in one document.
pub fn aggregated(catalog: &Catalog, core: bool) -> Value {
    let groups = ordered(catalog).into_iter().filter(|(name, _)| name.is_empty() == core);
    let items: Vec<_> = groups
        .map(|(name, versions)| {
            let versions: Vec<_> = versions
                .iter()
                .map(|version| {
                    let resources: Vec<_> =
                        catalog.of_version(name, version).map(aggregated_entry).collect();
                    json!({"version": version, "resources": resources, "freshness": "Current"})
                })
                .collect();
            json!({"metadata": {"name": name, "creationTimestamp": null}, "versions": versions})
        })
        .collect();
    json!({
        "kind": "APIGroupDiscoveryList", "apiVersion": "apidiscovery.k8s.io/v2", "metadata": {},
        "items": items,
    })
}

fn aggregated_entry(resource: &Arc<Resource>) -> Value {
    let kind = |group: &str, version: &str, kind: &str| json!({"group": group, "version": version, "kind": kind});
    let mut entry = json!({
        "resource": *resource.plural,
        "responseKind": kind(&resource.group, &resource.version, &resource.kind),
        "scope": if resource.namespaced { "Namespaced" } else { "Cluster" },
        "singularResource": *resource.singular, "verbs": verbs(resource),
    });
    if !resource.short_names.is_empty() {
        entry["shortNames"] = resource.short_names.iter().map(|s| &**s).collect();
    }
    if !resource.categories.is_empty() {
        entry["categories"] = resource.categories.iter().map(|s| &**s).collect();
    }
    let parts: Vec<_> = parts(resource)
        .into_iter()
        .map(|part| {
            let name = part["name"].as_str().unwrap_or_default();
            let text = |field: &str, absent: &str| part[field].as_str().unwrap_or(absent).to_owned();
            json!({
                "subresource": name.split_once('/').map(|(_, sub)| sub).unwrap_or_default(),
                "responseKind": kind(
                    &text("group", &resource.group), &text("version", &resource.version), &text("kind", ""),
                ),
                "verbs": part["verbs"],
            })
        })
        .collect();
    if !parts.is_empty() {
        entry["subresources"] = parts.into();
    }
    entry
}

/// A short text that changes with what it is of.
pub fn hash(of: &impl Hash) -> String {
    let mut hasher = DefaultHasher::new();
    of.hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}
