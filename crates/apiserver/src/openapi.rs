//! OpenAPI v3 documents, from which kubectl knows what there is and how it looks.

use crate::catalog::Catalog;
use crate::discovery::hash;
use crate::resource::Resource;
use serde_json::{Map, Value, json};

fn path_of(group: &str, version: &str) -> String {
    if group.is_empty() { format!("api/{version}") } else { format!("apis/{group}/{version}") }
}

/// All documents.
pub fn index(catalog: &Catalog) -> Value {
    let mut paths = Map::new();
    for (group, versions) in catalog.groups() {
        for version in versions {
            let path = path_of(group, version);
            // It changes with the schemas, which CRDs bring.
            let schemas: Vec<_> = catalog
                .of_version(group, version)
                .map(|r| format!("{:?}", (&r.kind, r.crd.as_ref().map(|_| &r.schema))))
                .collect();
            let url = format!("/openapi/v3/{path}?hash={}", hash(&schemas));
            paths.insert(path, json!({"serverRelativeURL": url}));
        }
    }
    json!({"paths": paths})
}

/// The document of a group and version.
pub fn document(catalog: &Catalog, group: &str, version: &str) -> Option<Value> {
    let (mut paths, mut schemas) = (Map::new(), Map::new());
    for resource in catalog.of_version(group, version) {
        schemas.insert(definition_name(resource), schema(resource));
        describe(resource, &mut paths);
    }
    (!paths.is_empty()).then(|| {
        json!({
            "openapi": "3.0.0", "info": {"title": "Godwit", "version": crate::VERSION},
            "paths": paths, "components": {"schemas": schemas},
        })
    })
}

/// Such as `io.kubevirt.v1.VirtualMachine`.
fn definition_name(resource: &Resource) -> String {
    let group = match &*resource.group {
        "" => "core.api.k8s.io",
        group => group,
    };
    let mut parts: Vec<_> = group.split('.').collect();
    parts.reverse();
    format!("{}.{}.{}", parts.join("."), resource.version, resource.kind)
}

fn kind(resource: &Resource) -> Value {
    json!({"group": *resource.group, "version": *resource.version, "kind": *resource.kind})
}

fn schema(resource: &Resource) -> Value {
    let mut schema = resource.schema.to_openapi();
    schema["x-kubernetes-group-version-kind"] = json!([kind(resource)]);
    for (field, what) in [
        ("apiVersion", json!({"type": "string"})),
        ("kind", json!({"type": "string"})),
        ("metadata", crate::schema::metadata().to_openapi()),
    ] {
        schema["properties"][field] = what;
    }
    schema
}

fn describe(resource: &Resource, paths: &mut Map<String, Value>) {
    let root = format!("/{}", path_of(&resource.group, &resource.version));
    let base = match resource.namespaced {
        true => format!("{root}/namespaces/{{namespace}}/{}", resource.plural),
        false => format!("{root}/{}", resource.plural),
    };
    let reference = json!({"$ref": format!("#/components/schemas/{}", definition_name(resource))});
    let operation = |action: &str, method: &str| {
        let body = json!({"content": {"application/json": {"schema": reference}}});
        let mut operation = json!({
            "x-kubernetes-action": action, "x-kubernetes-group-version-kind": kind(resource),
            "parameters": parameters(method),
            "responses": {"200": {"description": "OK", "content": {"application/json": {"schema": reference}}}},
        });
        if matches!(method, "post" | "put" | "patch") {
            operation["requestBody"] = body;
        }
        operation
    };
    let mut all = Map::new();
    all.insert("post".into(), operation("post", "post"));
    if !resource.stored {
        paths.insert(base, Value::Object(all));
        return;
    }
    all.insert("get".into(), operation("list", "get"));
    all.insert("delete".into(), operation("deletecollection", "delete"));
    let mut one = Map::new();
    for (method, action) in
        [("get", "get"), ("put", "put"), ("patch", "patch"), ("delete", "delete")]
    {
        one.insert(method.into(), operation(action, method));
    }
    paths.insert(format!("{base}/{{name}}"), Value::Object(one.clone()));
    if resource.status {
        one.remove("delete");
        paths.insert(format!("{base}/{{name}}/status"), Value::Object(one));
    }
    paths.insert(base, Value::Object(all));
}

fn parameters(method: &str) -> Value {
    let names: &[&str] = match method {
        "patch" => &["dryRun", "fieldManager", "fieldValidation", "force", "pretty"],
        "post" | "put" => &["dryRun", "fieldManager", "fieldValidation", "pretty"],
        "delete" => {
            &["dryRun", "gracePeriodSeconds", "orphanDependents", "propagationPolicy", "pretty"]
        }
        _ => &[
            "allowWatchBookmarks",
            "continue",
            "fieldSelector",
            "labelSelector",
            "limit",
            "resourceVersion",
            "resourceVersionMatch",
            "sendInitialEvents",
            "timeoutSeconds",
            "watch",
            "pretty",
        ],
    };
    let parameter = |name: &&str| {
        let kind = match *name {
            "force"
            | "orphanDependents"
            | "allowWatchBookmarks"
            | "watch"
            | "sendInitialEvents" => "boolean",
            "gracePeriodSeconds" | "limit" | "timeoutSeconds" => "integer",
            _ => "string",
        };
        json!({"name": name, "in": "query", "schema": {"type": kind, "uniqueItems": true}})
    };
    names.iter().map(parameter).collect()
}
