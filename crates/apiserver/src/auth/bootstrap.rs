//! The roles and bindings that every cluster has.
//!
//! Source: Kubernetes' `bootstrappolicy`; of its controllers' roles those that run here.

use serde_json::{Value, json};

const READ: [&str; 3] = ["get", "list", "watch"];
const WRITE: [&str; 5] = ["create", "update", "patch", "delete", "deletecollection"];
/// What `view`, `edit` and `admin` are about.
const CORE: [&str; 10] = [
    "configmaps",
    "endpoints",
    "events",
    "limitranges",
    "persistentvolumeclaims",
    "pods",
    "pods/log",
    "resourcequotas",
    "serviceaccounts",
    "services",
];

fn rule(groups: &[&str], resources: &[&str], verbs: &[&str]) -> Value {
    json!({"apiGroups": groups, "resources": resources, "verbs": verbs})
}

fn named(kind: &str, name: &str) -> Value {
    json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": kind,
        "metadata": {
            "name": name,
            "labels": {"kubernetes.io/bootstrapping": "rbac-defaults"},
            "annotations": {"rbac.authorization.kubernetes.io/autoupdate": "true"},
        },
    })
}

fn role(name: &str, rules: Vec<Value>) -> Value {
    let mut role = named("ClusterRole", name);
    role["rules"] = rules.into();
    role
}

/// A role that gathers the rules of others: those that are labelled for it.
fn gathering(name: &str, part_of: Option<&str>) -> Value {
    let label = |of: &str| format!("rbac.authorization.k8s.io/aggregate-to-{of}");
    let mut role = role(name, vec![]);
    role["aggregationRule"] =
        json!({"clusterRoleSelectors": [{"matchLabels": {label(name): "true"}}]});
    if let Some(of) = part_of {
        role["metadata"]["labels"][label(of)] = "true".into();
    }
    role
}

/// Rules that one of the gathering roles has.
fn part(of: &str, rules: Vec<Value>) -> Value {
    let mut role = role(&format!("system:aggregate-to-{of}"), rules);
    let label = format!("rbac.authorization.k8s.io/aggregate-to-{of}");
    role["metadata"]["labels"][label] = "true".into();
    role
}

/// The cluster roles.
pub fn roles() -> Vec<Value> {
    let discovery = [
        "/api",
        "/api/*",
        "/apis",
        "/apis/*",
        "/healthz",
        "/livez",
        "/openapi",
        "/openapi/*",
        "/readyz",
        "/version",
        "/version/",
    ];
    let info = ["/healthz", "/livez", "/readyz", "/version", "/version/"];
    let rbac = "rbac.authorization.k8s.io";
    let mut all = vec![
        role(
            "cluster-admin",
            vec![rule(&["*"], &["*"], &["*"]), json!({"nonResourceURLs": ["*"], "verbs": ["*"]})],
        ),
        role("system:discovery", vec![json!({"nonResourceURLs": discovery, "verbs": ["get"]})]),
        role("system:public-info-viewer", vec![json!({"nonResourceURLs": info, "verbs": ["get"]})]),
        role(
            "system:monitoring",
            vec![
                json!({"nonResourceURLs": ["/metrics", "/healthz", "/healthz/*", "/livez", "/livez/*", "/readyz", "/readyz/*"], "verbs": ["get"]}),
            ],
        ),
        role(
            "system:service-account-issuer-discovery",
            vec![json!({
                "nonResourceURLs": ["/.well-known/openid-configuration", "/.well-known/openid-configuration/", "/openid/v1/jwks", "/openid/v1/jwks/"],
                "verbs": ["get"],
            })],
        ),
        role(
            "system:basic-user",
            vec![
                rule(
                    &["authorization.k8s.io"],
                    &["selfsubjectaccessreviews", "selfsubjectrulesreviews"],
                    &["create"],
                ),
                rule(&["authentication.k8s.io"], &["selfsubjectreviews"], &["create"]),
            ],
        ),
        gathering("admin", None),
        gathering("edit", Some("admin")),
        gathering("view", Some("edit")),
        part(
            "view",
            vec![
                rule(&[""], &CORE, &READ),
                rule(&[""], &["namespaces"], &READ),
                rule(&["policy"], &["poddisruptionbudgets"], &READ),
                rule(&["discovery.k8s.io"], &["endpointslices"], &READ),
            ],
        ),
        part(
            "edit",
            vec![
                rule(&[""], &["pods/eviction", "serviceaccounts/token"], &["create"]),
                rule(&[""], &["secrets"], &READ),
                rule(
                    &[""],
                    &[
                        "configmaps",
                        "events",
                        "persistentvolumeclaims",
                        "pods",
                        "secrets",
                        "serviceaccounts",
                        "services",
                    ],
                    &WRITE,
                ),
                rule(&["policy"], &["poddisruptionbudgets"], &WRITE),
                rule(
                    &["coordination.k8s.io"],
                    &["leases"],
                    &[READ.as_slice(), WRITE.as_slice()].concat(),
                ),
            ],
        ),
        part(
            "admin",
            vec![
                rule(&["authorization.k8s.io"], &["localsubjectaccessreviews"], &["create"]),
                rule(
                    &[rbac],
                    &["roles", "rolebindings"],
                    &[READ.as_slice(), WRITE.as_slice()].concat(),
                ),
            ],
        ),
    ];
    all.extend(components());
    all
}

/// The roles of what runs in a cluster.
fn components() -> Vec<Value> {
    let all = [READ.as_slice(), WRITE.as_slice()].concat();
    let events = || rule(&["", "events.k8s.io"], &["events"], &["create", "patch", "update"]);
    let leases = || {
        rule(
            &["coordination.k8s.io"],
            &["leases"],
            &["create", "get", "list", "update", "patch", "watch"],
        )
    };
    let claims = ["persistentvolumeclaims", "persistentvolumes"];
    vec![
        role(
            "system:kube-scheduler",
            vec![
                events(),
                leases(),
                rule(&[""], &["nodes", "namespaces", "pods", "services"], &READ),
                rule(&[""], &["pods"], &["delete"]),
                rule(&[""], &["pods/binding", "bindings"], &["create"]),
                rule(&[""], &["pods/status"], &["patch", "update"]),
                rule(
                    &[""],
                    &["persistentvolumeclaims"],
                    &["get", "list", "watch", "patch", "update"],
                ),
                rule(&[""], &["persistentvolumes"], &READ),
                rule(&["policy"], &["poddisruptionbudgets"], &READ),
                rule(&["storage.k8s.io"], &["storageclasses", "csinodes", "csidrivers"], &READ),
                rule(&["scheduling.k8s.io"], &["priorityclasses"], &READ),
            ],
        ),
        role(
            "system:controller:persistent-volume-binder",
            vec![
                events(),
                rule(&[""], &claims, &all),
                rule(
                    &[""],
                    &["persistentvolumeclaims/status", "persistentvolumes/status"],
                    &["get", "patch", "update"],
                ),
                rule(&[""], &["nodes", "pods"], &READ),
                rule(&["storage.k8s.io"], &["storageclasses"], &all),
            ],
        ),
        role(
            "system:controller:node-controller",
            vec![
                events(),
                rule(&[""], &["nodes"], &["get", "list", "watch", "patch", "update", "delete"]),
                rule(&[""], &["nodes/status", "pods/status"], &["patch", "update"]),
                rule(&[""], &["pods"], &["get", "list", "watch", "delete"]),
                rule(&["coordination.k8s.io"], &["leases"], &READ),
            ],
        ),
        role(
            "system:controller:generic-garbage-collector",
            vec![
                events(),
                rule(&["*"], &["*"], &["get", "list", "watch", "patch", "update", "delete"]),
            ],
        ),
        role(
            "system:controller:namespace-controller",
            vec![
                rule(&[""], &["namespaces"], &READ),
                rule(&[""], &["namespaces/finalize", "namespaces/status"], &["update", "patch"]),
                rule(&["*"], &["*"], &["delete", "deletecollection", "get", "list"]),
            ],
        ),
        // The other small controllers share one process and one account.
        role(
            "system:kube-controller-manager",
            vec![
                events(),
                leases(),
                rule(
                    &[""],
                    &["configmaps", "serviceaccounts"],
                    &["create", "get", "list", "watch", "update", "patch"],
                ),
                rule(&[""], &["namespaces", "pods", "nodes"], &READ),
                rule(&[""], &["namespaces", "pods"], &["create", "delete"]),
                rule(&[""], &["pods/status", "resourcequotas/status"], &["update", "patch"]),
                rule(&[""], &["resourcequotas"], &READ),
                rule(&[""], &claims, &["get", "list", "watch", "update", "patch"]),
                rule(&["", "events.k8s.io"], &["events"], &["delete", "list", "watch", "get"]),
                rule(&["policy"], &["poddisruptionbudgets"], &READ),
                rule(&["policy"], &["poddisruptionbudgets/status"], &["update", "patch"]),
                rule(
                    &["scheduling.k8s.io"],
                    &["priorityclasses"],
                    &["create", "get", "list", "watch"],
                ),
                rule(
                    &["rbac.authorization.k8s.io"],
                    &["clusterroles"],
                    &["get", "list", "watch", "update", "patch", "escalate"],
                ),
                rule(
                    &["apiextensions.k8s.io"],
                    &["customresourcedefinitions"],
                    &["get", "list", "watch", "update", "patch"],
                ),
                rule(
                    &["apiextensions.k8s.io"],
                    &["customresourcedefinitions/status"],
                    &["update", "patch"],
                ),
                rule(&["*"], &["*"], &["get", "list", "watch", "delete", "deletecollection"]),
            ],
        ),
    ]
}

/// The bindings.
pub fn bindings() -> Vec<Value> {
    let bind = |role: &str, subjects: &[(&str, &str)]| {
        let mut binding = named("ClusterRoleBinding", role);
        let group = "rbac.authorization.k8s.io";
        binding["roleRef"] = json!({"apiGroup": group, "kind": "ClusterRole", "name": role});
        let subject =
            |(kind, name): &(&str, &str)| json!({"apiGroup": group, "kind": kind, "name": name});
        binding["subjects"] = subjects.iter().map(subject).collect();
        binding
    };
    let known = ("Group", "system:authenticated");
    let unknown = ("Group", "system:unauthenticated");
    vec![
        bind("cluster-admin", &[("Group", "system:masters")]),
        bind("system:discovery", &[known]),
        bind("system:basic-user", &[known]),
        bind("system:public-info-viewer", &[known, unknown]),
        bind("system:monitoring", &[("Group", "system:monitoring")]),
        bind("system:service-account-issuer-discovery", &[("Group", "system:serviceaccounts")]),
        bind("system:kube-scheduler", &[("User", "system:kube-scheduler")]),
        bind("system:kube-controller-manager", &[("User", "system:kube-controller-manager")]),
        bind(
            "system:controller:persistent-volume-binder",
            &[("User", "system:persistent-volume-binder")],
        ),
        bind("system:controller:node-controller", &[("User", "system:node-controller")]),
        bind(
            "system:controller:generic-garbage-collector",
            &[("User", "system:generic-garbage-collector")],
        ),
        bind("system:controller:namespace-controller", &[("User", "system:namespace-controller")]),
    ]
}

/// The rules of roles that gather those of others.
pub fn gathered(role: &Value, all: &[Value]) -> Option<Vec<Value>> {
    use crate::selector::Labels;
    let selectors = role["aggregationRule"]["clusterRoleSelectors"].as_array()?;
    let selectors: Vec<Labels> =
        selectors.iter().filter_map(|s| Labels::from_object(s).ok().flatten()).collect();
    let mut parts: Vec<&Value> = all
        .iter()
        .filter(|other| crate::meta::text(other, "name") != crate::meta::text(role, "name"))
        .filter(|other| {
            let labels = crate::meta::map(other, "labels");
            selectors.iter().any(|selector| selector.matches(labels))
        })
        .collect();
    parts.sort_by_key(|part| crate::meta::text(part, "name").to_owned());
    let mut rules: Vec<Value> = Vec::new();
    for rule in parts.iter().flat_map(|part| part["rules"].as_array().into_iter().flatten()) {
        if !rules.contains(rule) {
            rules.push(rule.clone());
        }
    }
    Some(rules)
}
