//! What Godwit's own parts may do in a cluster, whoever's it is.

use api::instancetype::{self, Kind};
use serde_json::{Value, json};
use webapi::registration::registered;

/// The controllers' role, and their account.
pub const CONTROLLER: &str = "controller";
/// The handlers' role, and their account.
pub const HANDLER: &str = "handler";
/// The API role's.
pub const API: &str = "api";
/// The synchronizer's.
pub const SYNCHRONIZER: &str = "synchronizer";

const GROUP: &str = "rbac.authorization.k8s.io";
const READ: [&str; 3] = ["get", "list", "watch"];

fn rule(groups: &[&str], resources: &[&str], verbs: &[&str]) -> Value {
    json!({"apiGroups": groups, "resources": resources, "verbs": verbs})
}

/// The resources of kinds of instancetypes and preferences.
fn types(kinds: impl IntoIterator<Item = &'static Kind>) -> Vec<&'static str> {
    kinds.into_iter().map(|kind| kind.plural).collect()
}

fn role(part: &str, rules: Vec<Value>) -> Value {
    json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole",
        "metadata": {"name": format!("godwit:{part}")}, "rules": rules,
    })
}

/// What controllers may do.
pub fn controller() -> Value {
    let own = ["kubevirt.io", "cdi.kubevirt.io", "godwit.dev", "migrations.kubevirt.io"];
    role(
        CONTROLLER,
        vec![
            rule(&own, &["*"], &["*"]),
            rule(&[instancetype::GROUP], &types(&instancetype::KINDS), &READ),
            // What a VM takes is pinned.
            rule(&["apps"], &["controllerrevisions"], &["get", "list", "watch", "create"]),
            rule(&[""], &["pods", "persistentvolumeclaims"], &["*"]),
            rule(&[""], &["pods/log"], &["get"]),
            rule(&[""], &["pods/eviction"], &["create"]),
            rule(&[""], &["events"], &["create", "patch"]),
            rule(&[""], &["nodes", "namespaces"], &READ),
            rule(
                &[""],
                &["secrets", "configmaps", "services"],
                &["get", "create", "patch", "delete"],
            ),
            rule(&["storage.k8s.io"], &["storageclasses"], &READ),
            // What a move would meet, before it begins.
            rule(&[""], &["persistentvolumes", "resourcequotas"], &["list"]),
        ],
    )
}

/// What handlers may do.
pub fn handler() -> Value {
    role(
        HANDLER,
        vec![
            rule(&["kubevirt.io"], &["virtualmachineinstances", "kubevirts"], &READ),
            rule(
                &["kubevirt.io"],
                &["virtualmachineinstances/status", "virtualmachineinstancemigrations/status"],
                &["patch"],
            ),
            rule(&["kubevirt.io"], &["virtualmachineinstancemigrations"], &["list"]),
            rule(&["godwit.dev"], &["ownerrecords"], &READ),
            rule(&["godwit.dev"], &["ownerrecords/status"], &["patch"]),
            rule(&[""], &["pods", "persistentvolumeclaims"], &READ),
            rule(&[""], &["persistentvolumeclaims"], &["patch"]),
            rule(&[""], &["nodes"], &["get", "patch"]),
            rule(&[""], &["events"], &["create", "patch"]),
            rule(&[""], &["secrets", "configmaps"], &["get"]),
        ],
    )
}

/// What the synchronizer may do.
pub fn synchronizer() -> Value {
    role(
        SYNCHRONIZER,
        vec![
            rule(
                &["kubevirt.io"],
                &["virtualmachineinstances", "virtualmachineinstancemigrations", "kubevirts"],
                &READ,
            ),
            rule(
                &["kubevirt.io"],
                &["virtualmachineinstancemigrations/status", "kubevirts/status"],
                &["patch"],
            ),
            rule(&["godwit.dev"], &["ownerrecords"], &READ),
            rule(&["godwit.dev"], &["ownerrecords/status"], &["patch"]),
            // VMs that go to other clusters and come from them, with all that they name.
            rule(
                &["kubevirt.io"],
                &["virtualmachines", "virtualmachineinstancemigrations"],
                &["get", "list", "create", "patch", "delete"],
            ),
            rule(&[""], &["secrets", "configmaps"], &["get", "list", "create", "delete"]),
            rule(&[instancetype::GROUP], &types(&instancetype::KINDS), &["get"]),
            rule(
                &[instancetype::GROUP],
                &types(instancetype::KINDS.iter().filter(|kind| kind.namespaced)),
                &["list", "create", "delete"],
            ),
            rule(&["apps"], &["controllerrevisions"], &["get", "create"]),
            // Where a guest that comes would find its place.
            rule(
                &[""],
                &["persistentvolumeclaims", "persistentvolumes", "pods", "resourcequotas"],
                &["list"],
            ),
            rule(&["migrations.kubevirt.io"], &["migrationpolicies"], &["list"]),
            rule(&["storage.k8s.io"], &["storageclasses"], &READ),
            rule(&["godwit.dev"], &["virtualmachinemoves"], &["get", "list", "watch", "patch"]),
            rule(&["godwit.dev"], &["virtualmachinemoves/status"], &["patch"]),
            // Those that were invited join.
            rule(&["godwit.dev"], &["clusterlinks"], &["get", "list", "watch", "create", "patch"]),
            rule(&["godwit.dev"], &["clusterlinks/status"], &["patch"]),
            rule(&[""], &["nodes", "namespaces"], &READ),
        ],
    )
}

/// What the API role may do where the API server is not ours.
pub fn api() -> Value {
    let vms = ["virtualmachines", "virtualmachineinstances"];
    let statuses = ["virtualmachines/status", "virtualmachineinstances/status"];
    let moves = ["virtualmachineinstancemigrations"];
    let mut rules = vec![
        rule(&["kubevirt.io"], &vms, &["get", "list", "patch"]),
        rule(&["kubevirt.io"], &statuses, &["patch"]),
        rule(&["kubevirt.io"], &moves, &["list", "create"]),
        rule(&["kubevirt.io"], &["kubevirts"], &["list"]),
        // What VMs take.
        rule(&[instancetype::GROUP], &types(&instancetype::KINDS), &["get"]),
        rule(&["apps"], &["controllerrevisions"], &["get"]),
        rule(&["migrations.kubevirt.io"], &["migrationpolicies"], &["list"]),
        rule(&["godwit.dev"], &["ownerrecords"], &["get"]),
        rule(&[""], &["nodes"], &["get", "list"]),
        rule(&[""], &["pods"], &["get", "list"]),
        // What a move would meet, before it is made.
        rule(
            &[""],
            &["namespaces", "persistentvolumeclaims", "persistentvolumes", "resourcequotas"],
            &["list"],
        ),
        rule(&["storage.k8s.io"], &["storageclasses"], &["list"]),
        rule(&["authorization.k8s.io"], &["subjectaccessreviews"], &["create"]),
        rule(&["authentication.k8s.io"], &["tokenreviews"], &["create"]),
    ];
    for (group, plural, name) in registered() {
        let mut own = rule(&[group], &[&plural], &["get", "patch"]);
        own["resourceNames"] = json!([name]);
        // What is created has no name yet that a rule could go by.
        rules.extend([own, rule(&[group], &[&plural], &["create"])]);
    }
    role(API, rules)
}

/// A part's account, as a subject.
pub fn account(part: &str) -> Value {
    json!({
        "kind": "ServiceAccount", "namespace": api::NAMESPACE, "name": format!("godwit-{part}"),
    })
}

/// A group, as a subject.
pub fn group(name: &str) -> Value {
    json!({"kind": "Group", "apiGroup": GROUP, "name": name})
}

/// Gives a subject a part's role.
pub fn bind(part: &str, subject: Value) -> Value {
    let name = format!("godwit:{part}");
    json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
        "metadata": {"name": name}, "subjects": [subject],
        "roleRef": {"apiGroup": GROUP, "kind": "ClusterRole", "name": name},
    })
}

/// Lets the API role read who speaks for the cluster's users: a role that every cluster has.
pub fn asks_who_aggregates() -> Value {
    json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding",
        "metadata": {"name": "godwit:api", "namespace": "kube-system"},
        "subjects": [account(API)],
        "roleRef": {
            "apiGroup": GROUP, "kind": "Role",
            "name": "extension-apiserver-authentication-reader",
        },
    })
}

/// Lets controllers agree on the one that writes, and hear of other clusters' CAs.
pub fn leads() -> Value {
    json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role",
        "metadata": {"name": "godwit:controller", "namespace": api::NAMESPACE},
        "rules": [
            rule(&["coordination.k8s.io"], &["leases"], &["get", "create", "update", "patch"]),
            rule(&[""], &["configmaps"], &["list", "watch"]),
            // The synchronizer comes and goes with its feature gate, and its port with the settings.
            rule(&["apps"], &["deployments"], &["get", "patch"]),
        ],
    })
}

/// Lets handlers and the synchronizer hear whom to believe, and where the latter is found.
pub fn believes() -> Value {
    json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role",
        "metadata": {"name": "godwit:believes", "namespace": api::NAMESPACE},
        "rules": [
            rule(&[""], &["configmaps"], &READ),
            rule(&[""], &["services"], &READ),
        ],
    })
}

/// Gives that to the synchronizer and to handlers.
pub fn bind_believes(handlers: Value) -> Value {
    json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding",
        "metadata": {"name": "godwit:believes", "namespace": api::NAMESPACE},
        "subjects": [handlers, account(SYNCHRONIZER)],
        "roleRef": {"apiGroup": GROUP, "kind": "Role", "name": "godwit:believes"},
    })
}

/// Gives that to controllers.
pub fn bind_leads() -> Value {
    json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding",
        "metadata": {"name": "godwit:controller", "namespace": api::NAMESPACE},
        "subjects": [account(CONTROLLER)],
        "roleRef": {"apiGroup": GROUP, "kind": "Role", "name": "godwit:controller"},
    })
}
