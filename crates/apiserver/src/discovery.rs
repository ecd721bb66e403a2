//! What is served, told to clients.

use crate::body::{self, Answer};
use crate::catalog::Catalog;
use crate::extension::Extension;
use crate::resource::{Resource, Subresource};
use http::StatusCode;
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

/// What is served: the kinds of a catalog, and the groups of an extension.
#[derive(Clone, Copy)]
pub struct Served<'a> {
    /// The kinds.
    pub catalog: &'a Catalog,
    /// What is added to them.
    pub extension: Option<&'a dyn Extension>,
}

impl<'a> Served<'a> {
    /// The groups and their versions, the preferred one first: Kubernetes' own groups first.
    fn all(&self) -> Vec<(&'a str, Vec<&'a str>)> {
        let mut groups = self.catalog.groups();
        if let Some(extension) = self.extension {
            groups.extend(extension.groups());
        }
        let mut groups: Vec<_> = groups.into_iter().collect();
        let own = |name: &str| !name.contains('.') || name.ends_with(".k8s.io");
        groups.sort_by_key(|(name, _)| (!own(name), *name));
        groups
    }

    /// All groups but the core one.
    pub fn groups(&self) -> Value {
        let groups = self.all().into_iter().filter(|(name, _)| !name.is_empty());
        let groups: Vec<_> = groups.map(|(name, versions)| group_object(name, &versions)).collect();
        json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
    }

    /// One group.
    pub fn group(&self, name: &str) -> Option<Value> {
        let (_, versions) = self.all().into_iter().find(|(own, _)| *own == name)?;
        let mut group = group_object(name, &versions);
        group["kind"] = "APIGroup".into();
        group["apiVersion"] = "v1".into();
        Some(group)
    }

    /// The resources of a group and version.
    pub fn resources(&self, group: &str, version: &str) -> Option<Value> {
        let mut all = Vec::new();
        for resource in self.catalog.of_version(group, version) {
            all.push(entry(resource));
            all.extend(parts(resource));
        }
        let added = self.extension.and_then(|extension| extension.resources(group, version));
        all.extend(added.into_iter().flatten());
        let name = if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") };
        (!all.is_empty()).then(|| {
            json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": name, "resources": all})
        })
    }

    /// `apidiscovery.k8s.io/v2`: the core group, or all others, in one document.
    pub fn aggregated(&self, core: bool) -> Answer {
        let version = |name: &str, version: &str| {
            let kept = self.catalog.of_version(name, version).map(aggregated_entry);
            let added = self.extension.and_then(|extension| extension.resources(name, version));
            let resources: Vec<_> = kept.chain(added.iter().flat_map(|all| bare(all))).collect();
            json!({"version": version, "resources": resources, "freshness": "Current"})
        };
        let groups = self.all().into_iter().filter(|(name, _)| name.is_empty() == core);
        let items = groups.map(|(name, versions)| {
            let versions: Vec<_> = versions.into_iter().map(|v| version(name, v)).collect();
            json!({"metadata": {"name": name, "creationTimestamp": null}, "versions": versions})
        });
        let page = json!({
            "kind": "APIGroupDiscoveryList", "apiVersion": "apidiscovery.k8s.io/v2",
            "metadata": {}, "items": items.collect::<Vec<_>>(),
        });
        let media = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList";
        body::answer(StatusCode::OK, media, page.to_string())
    }
}

/// What an extension serves, as the document of all has it: subresources beneath resources that are
/// nothing by themselves, as the API server makes them of other servers' lists.
///
/// Source: k8s.io/apiserver's `ConvertGroupVersionIntoToDiscovery`.
fn bare(all: &[Value]) -> Vec<Value> {
    let mut resources: Vec<Value> = Vec::new();
    for one in all {
        let name = one["name"].as_str().unwrap_or_default();
        let (name, part) = name.split_once('/').unwrap_or((name, ""));
        let scope = if one["namespaced"] == true { "Namespaced" } else { "Cluster" };
        let at = resources.iter().position(|r| r["resource"] == name).unwrap_or_else(|| {
            resources.push(json!({"resource": name, "scope": scope, "verbs": []}));
            resources.len() - 1
        });
        let resource = &mut resources[at];
        match part {
            "" => resource["verbs"] = one["verbs"].clone(),
            part => {
                let part = json!({"subresource": part, "verbs": one["verbs"]});
                match resource["subresources"].as_array_mut() {
                    Some(parts) => parts.push(part),
                    None => resource["subresources"] = json!([part]),
                }
            }
        }
    }
    resources
}

fn group_object(name: &str, versions: &[&str]) -> Value {
    let version = |v: &&str| json!({"groupVersion": format!("{name}/{v}"), "version": v});
    json!({
        "name": name,
        "versions": versions.iter().map(version).collect::<Vec<_>>(),
        "preferredVersion": versions.first().map(version),
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
