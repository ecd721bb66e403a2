//! What people may do, as KubeVirt and CDI grant it of what is served here.

use api::instancetype::{self, Kind};
use api::{CDI, KUBEVIRT, SUBRESOURCES};
use serde_json::{Value, json};

const ALL: [&str; 8] =
    ["get", "delete", "create", "update", "patch", "list", "watch", "deletecollection"];
const READ: [&str; 3] = ["get", "list", "watch"];
const KINDS: [&str; 2] = ["virtualmachines", "virtualmachineinstances"];
const MIGRATIONS: &str = "virtualmachineinstancemigrations";
const POLICIES: (&str, &str) = ("migrations.kubevirt.io", "migrationpolicies");
/// What everybody may who is known: to read the instancetypes and preferences that are for all.
const VIEW: &str = "instancetype.kubevirt.io:view";
const DEFAULT: &str = "kubevirt.io:default";
const MOVING: [&str; 4] = [
    "virtualmachines/migrate",
    "virtualmachines/preflight",
    "virtualmachines/evacuate/cancel",
    "virtualmachineinstances/evacuate/cancel",
];

fn rule(group: &str, resources: &[&str], verbs: &[&str]) -> Value {
    json!({"apiGroups": [group], "resources": resources, "verbs": verbs})
}

fn named(kind: &str, name: &str) -> Value {
    json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": kind,
        "metadata": {"name": name, "labels": {"kubevirt.io": ""}},
    })
}

fn role(name: &str, rules: Vec<Value>) -> Value {
    let mut role = named("ClusterRole", name);
    role["rules"] = rules.into();
    role
}

/// A part of Kubernetes' own role of this name.
fn part(prefix: &str, of: &str, rules: Vec<Value>) -> Value {
    let mut role = role(&format!("{prefix}:{of}"), rules);
    let label = format!("rbac.authorization.k8s.io/aggregate-to-{of}");
    role["metadata"]["labels"][label] = "true".into();
    role
}

/// What is done to VMs, but for moving them: that is for who has `kubevirt.io:migrate`.
fn operating() -> Vec<Value> {
    let reads = ["virtualmachineinstances/console", "virtualmachines/expand-spec"];
    let writes = [
        "virtualmachines/start",
        "virtualmachines/stop",
        "virtualmachines/restart",
        "virtualmachineinstances/pause",
        "virtualmachineinstances/unpause",
        "virtualmachineinstances/softreboot",
        "virtualmachineinstances/reset",
    ];
    vec![rule(SUBRESOURCES, &reads, &["get"]), rule(SUBRESOURCES, &writes, &["update"])]
}

/// Instancetypes and preferences, of which kinds it may be.
fn types(which: impl Fn(&Kind) -> bool, verbs: &[&str]) -> Value {
    let kinds = instancetype::KINDS.iter().filter(|kind| which(kind));
    let plurals: Vec<&str> = kinds.map(|kind| kind.plural).collect();
    rule(instancetype::GROUP, &plurals, verbs)
}

fn kubevirt() -> Vec<Value> {
    let settings = || rule(KUBEVIRT, &["kubevirts"], &["get", "list"]);
    let policies = || rule(POLICIES.0, &[POLICIES.1], &READ);
    let admin = [
        operating(),
        vec![rule(KUBEVIRT, &KINDS, &ALL), rule(KUBEVIRT, &[MIGRATIONS], &READ), policies()],
        vec![types(|_| true, &ALL)],
    ];
    // All but deletes of whole collections.
    let most = &ALL[..7];
    let edit = [
        operating(),
        vec![
            rule(KUBEVIRT, &KINDS, most),
            rule(KUBEVIRT, &[MIGRATIONS], &READ),
            settings(),
            policies(),
            types(|_| true, most),
        ],
    ];
    let view = vec![
        settings(),
        rule(SUBRESOURCES, &["virtualmachines/expand-spec"], &["get"]),
        rule(KUBEVIRT, &[KINDS[0], KINDS[1], MIGRATIONS], &READ),
        policies(),
        types(|_| true, &READ),
    ];
    vec![
        part("kubevirt.io", "admin", admin.concat()),
        part("kubevirt.io", "edit", edit.concat()),
        part("kubevirt.io", "view", view),
    ]
}

fn cdi() -> Vec<Value> {
    let source = || rule(CDI, &["datavolumes/source"], &["create"]);
    let write = || vec![rule(CDI, &["datavolumes"], &["*"]), source()];
    let read = rule(CDI, &["cdiconfigs", "datavolumes", "storageprofiles"], &READ);
    vec![
        part(CDI, "admin", write()),
        part(CDI, "edit", write()),
        part(CDI, "view", vec![read, source()]),
    ]
}

/// The cluster roles.
pub fn roles() -> Vec<Value> {
    let mut default = role(
        DEFAULT,
        vec![
            rule(KUBEVIRT, &["kubevirts"], &["get", "list"]),
            rule(SUBRESOURCES, &["version"], &["get", "list"]),
        ],
    );
    default["metadata"]["labels"]["kubernetes.io/bootstrapping"] = "rbac-defaults".into();
    let migrate = role(
        "kubevirt.io:migrate",
        vec![rule(SUBRESOURCES, &MOVING, &["update"]), rule(KUBEVIRT, &[MIGRATIONS], &ALL)],
    );
    let view = role(VIEW, vec![types(|kind| !kind.namespaced, &READ)]);
    let mut all = vec![default, migrate, view];
    all.extend(kubevirt());
    all.extend(cdi());
    all
}

/// Their bindings: what everybody may who is known.
pub fn bindings() -> Vec<Value> {
    let group = "rbac.authorization.k8s.io";
    let bound = |name: &str| {
        let mut binding = named("ClusterRoleBinding", name);
        binding["roleRef"] = json!({"apiGroup": group, "kind": "ClusterRole", "name": name});
        binding["subjects"] =
            json!([{"apiGroup": group, "kind": "Group", "name": "system:authenticated"}]);
        binding
    };
    vec![bound(DEFAULT), bound(VIEW)]
}
