//! Role based access control.
//!
//! Source: Kubernetes' `plugin/pkg/auth/authorizer/rbac` and `pkg/registry/rbac/validation`.

use super::{Attributes, MASTERS, User};
use crate::meta;
use crate::status::{Failure, Subject};
use serde_json::Value;
use std::collections::BTreeMap;

/// A rule of a role.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rule {
    /// Or `*`.
    pub verbs: Vec<String>,
    /// Or `*`.
    pub groups: Vec<String>,
    /// `pods`, `pods/log`, `*/scale` or `*`.
    pub resources: Vec<String>,
    /// Empty: all.
    pub names: Vec<String>,
    /// Such as `/healthz` and `/apis/*`.
    pub paths: Vec<String>,
}

impl Rule {
    /// Of a rule in a role.
    pub fn of(rule: &Value) -> Self {
        let list = |field: &str| {
            let all = rule[field].as_array().into_iter().flatten();
            all.filter_map(Value::as_str).map(str::to_owned).collect()
        };
        Self {
            verbs: list("verbs"),
            groups: list("apiGroups"),
            resources: list("resources"),
            names: list("resourceNames"),
            paths: list("nonResourceURLs"),
        }
    }

    fn allows(&self, what: &Attributes) -> bool {
        let verb = has(&self.verbs, &what.verb);
        if what.resource.is_empty() {
            return verb && self.paths.iter().any(|path| covers_path(path, &what.path));
        }
        verb && has(&self.groups, &what.group)
            && self.resources.iter().any(|r| covers_resource(r, &what.resource, &what.subresource))
            && (self.names.is_empty() || self.names.contains(&what.name))
    }

    /// All single requests that it allows, each as a rule of its own.
    fn split(&self) -> Vec<Self> {
        let mut all = Vec::new();
        let one = |text: &String| vec![text.clone()];
        for verb in &self.verbs {
            for path in &self.paths {
                all.push(Self { verbs: one(verb), paths: one(path), ..Self::default() });
            }
            for group in &self.groups {
                for resource in &self.resources {
                    let single = Self {
                        verbs: one(verb),
                        groups: one(group),
                        resources: one(resource),
                        ..Self::default()
                    };
                    match self.names.is_empty() {
                        true => all.push(single),
                        false => all.extend(
                            self.names.iter().map(|n| Self { names: one(n), ..single.clone() }),
                        ),
                    }
                }
            }
        }
        all
    }

    /// Whether it allows all that a single rule does.
    fn covers(&self, single: &Self) -> bool {
        let in_list = |own: &[String], of: &[String]| of.iter().all(|o| has(own, o));
        if !single.paths.is_empty() {
            let paths = |wanted: &String| self.paths.iter().any(|own| covers_path(own, wanted));
            return in_list(&self.verbs, &single.verbs) && single.paths.iter().all(paths);
        }
        let resource = |wanted: &String| {
            let (resource, sub) = wanted.split_once('/').unwrap_or((wanted, ""));
            self.resources.iter().any(|own| own == wanted || covers_resource(own, resource, sub))
        };
        in_list(&self.verbs, &single.verbs)
            && in_list(&self.groups, &single.groups)
            && single.resources.iter().all(resource)
            && (self.names.is_empty()
                || (!single.names.is_empty()
                    && single.names.iter().all(|n| self.names.contains(n))))
    }

    fn shown(&self) -> String {
        let field = |name: &str, list: &[String]| match list.is_empty() {
            true => None,
            false => Some(format!("{name}:{list:?}")),
        };
        let parts = [
            field("APIGroups", &self.groups),
            field("Resources", &self.resources),
            field("ResourceNames", &self.names),
            field("NonResourceURLs", &self.paths),
            field("Verbs", &self.verbs),
        ];
        format!("{{{}}}", parts.into_iter().flatten().collect::<Vec<_>>().join(", "))
    }
}

fn has(list: &[String], wanted: &str) -> bool {
    list.iter().any(|own| own == "*" || own == wanted)
}

fn covers_path(own: &str, wanted: &str) -> bool {
    own == "*"
        || own == wanted
        || own.strip_suffix('*').is_some_and(|prefix| wanted.starts_with(prefix))
}

fn covers_resource(own: &str, resource: &str, subresource: &str) -> bool {
    if own == "*" {
        return true;
    }
    match own.split_once('/') {
        None => subresource.is_empty() && own == resource,
        Some(("*", sub)) => !subresource.is_empty() && sub == subresource,
        Some((of, sub)) => of == resource && sub == subresource,
    }
}

/// Whether a request is allowed, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// It is.
    pub allowed: bool,
    /// For people; empty where there is nothing to say.
    pub reason: String,
}

#[derive(Debug, Clone)]
struct Binding {
    name: String,
    subjects: Vec<Value>,
    role: (bool, String),
}

/// All roles and bindings.
#[derive(Debug, Clone, Default)]
pub struct Rules {
    roles: BTreeMap<(String, String), Vec<Rule>>,
    bindings: BTreeMap<String, Vec<Binding>>,
}

impl Rules {
    /// Of roles and bindings, of namespaces and of the cluster.
    pub fn new<'a>(
        roles: impl IntoIterator<Item = &'a Value>,
        bindings: impl IntoIterator<Item = &'a Value>,
    ) -> Self {
        let mut rules = Self::default();
        for role in roles {
            let key =
                (meta::text(role, "namespace").to_owned(), meta::text(role, "name").to_owned());
            let all = role["rules"].as_array().into_iter().flatten().map(Rule::of);
            rules.roles.insert(key, all.collect());
        }
        for binding in bindings {
            let role = &binding["roleRef"];
            let entry = Binding {
                name: meta::text(binding, "name").to_owned(),
                subjects: binding["subjects"].as_array().cloned().unwrap_or_default(),
                role: (
                    role["kind"] == "ClusterRole",
                    role["name"].as_str().unwrap_or_default().to_owned(),
                ),
            };
            let namespace = meta::text(binding, "namespace").to_owned();
            rules.bindings.entry(namespace).or_default().push(entry);
        }
        rules
    }

    /// The rules of a role.
    pub fn of_role(&self, cluster: bool, namespace: &str, name: &str) -> Option<&[Rule]> {
        let namespace = if cluster { "" } else { namespace };
        self.roles.get(&(namespace.to_owned(), name.to_owned())).map(Vec::as_slice)
    }

    /// Every rule that a user has in a namespace, or of the cluster, with its binding.
    fn of_user<'a>(
        &'a self,
        user: &'a User,
        namespace: &'a str,
    ) -> impl Iterator<Item = (&'a str, &'a Binding, &'a Rule)> {
        let places = [Some(""), (!namespace.is_empty()).then_some(namespace)];
        places.into_iter().flatten().flat_map(move |place| {
            let bindings = self.bindings.get(place).into_iter().flatten();
            let own = bindings
                .filter(move |b| b.subjects.iter().any(|subject| is_subject(subject, user, place)));
            own.flat_map(move |binding| {
                let (cluster, name) = &binding.role;
                let rules = self.of_role(*cluster, place, name).unwrap_or_default();
                rules.iter().map(move |rule| (place, binding, rule))
            })
        })
    }

    /// Whether a user may do something.
    pub fn authorize(&self, user: &User, what: &Attributes) -> Decision {
        if user.is_in(MASTERS) {
            return Decision { allowed: true, reason: String::new() };
        }
        let found = self.of_user(user, &what.namespace).find(|(_, _, rule)| rule.allows(what));
        match found {
            Some((place, binding, _)) => {
                let (kind, named) = match place {
                    "" => ("ClusterRoleBinding", format!("{:?}", binding.name)),
                    place => ("RoleBinding", format!("{:?}", format!("{}/{place}", binding.name))),
                };
                let role = if binding.role.0 { "ClusterRole" } else { "Role" };
                let reason = format!(
                    "RBAC: allowed by {kind} {named} of {role} {:?} to {}",
                    binding.role.1,
                    self.subject_text(binding, user, place)
                );
                Decision { allowed: true, reason }
            }
            None => Decision { allowed: false, reason: self.missing(user, &what.namespace) },
        }
    }

    fn subject_text(&self, binding: &Binding, user: &User, place: &str) -> String {
        let subject = binding.subjects.iter().find(|subject| is_subject(subject, user, place));
        let subject = subject.cloned().unwrap_or_default();
        let text = |field: &str| subject[field].as_str().unwrap_or_default().to_owned();
        match subject["namespace"].as_str().filter(|n| !n.is_empty()) {
            Some(namespace) => {
                format!("{} {:?}", text("kind"), format!("{}/{namespace}", text("name")))
            }
            None => format!("{} {:?}", text("kind"), text("name")),
        }
    }

    /// Roles that the user is bound to and that do not exist.
    fn missing(&self, user: &User, namespace: &str) -> String {
        let mut missing = Vec::new();
        for place in ["", namespace] {
            for binding in self.bindings.get(place).into_iter().flatten() {
                let (cluster, name) = &binding.role;
                let bound = binding.subjects.iter().any(|s| is_subject(s, user, place));
                if bound && self.of_role(*cluster, place, name).is_none() {
                    let kind = if *cluster { "clusterrole" } else { "role" };
                    missing.push(format!("{kind}.rbac.authorization.k8s.io {name:?} not found"));
                }
            }
            if namespace.is_empty() {
                break;
            }
        }
        match &missing[..] {
            [] => String::new(),
            [one] => format!("RBAC: {one}"),
            several => format!("RBAC: [{}]", several.join(", ")),
        }
    }

    /// Every rule that a user has.
    pub fn rules_of<'a>(&'a self, user: &'a User, namespace: &'a str) -> Vec<&'a Rule> {
        self.of_user(user, namespace).map(|(_, _, rule)| rule).collect()
    }

    /// What of these rules a user could not do, for people; None if nothing.
    pub fn beyond(&self, user: &User, namespace: &str, wanted: &[Rule]) -> Option<String> {
        if user.is_in(MASTERS) {
            return None;
        }
        let own = self.rules_of(user, namespace);
        let single = wanted.iter().flat_map(Rule::split);
        let beyond: Vec<_> =
            single.filter(|single| !own.iter().any(|rule| rule.covers(single))).collect();
        (!beyond.is_empty()).then(|| {
            let lines: Vec<_> = beyond.iter().map(Rule::shown).collect();
            format!(
                "user {:?} (groups={:?}) is attempting to grant RBAC permissions not currently held:\n{}",
                user.name,
                user.groups,
                lines.join("\n")
            )
        })
    }
}

fn is_subject(subject: &Value, user: &User, place: &str) -> bool {
    let name = subject["name"].as_str().unwrap_or_default();
    match subject["kind"].as_str().unwrap_or_default() {
        "User" => name == user.name,
        "Group" => user.is_in(name),
        "ServiceAccount" => {
            let namespace =
                subject["namespace"].as_str().filter(|n| !n.is_empty()).unwrap_or(place);
            !namespace.is_empty()
                && user.name == format!("system:serviceaccount:{namespace}:{name}")
        }
        _ => false,
    }
}

/// 403: a user may not do this.
pub fn denied(user: &User, what: &Attributes, reason: &str) -> Failure {
    let why = refusal(user, what, reason);
    if what.resource.is_empty() {
        let subject = Subject { group: "", kind: "", name: &what.path };
        let message = format!("forbidden: {why}");
        return Failure { message, ..Failure::forbidden(subject, &why) };
    }
    let subject = Subject { group: &what.group, kind: &what.resource, name: &what.name };
    Failure::forbidden(subject, &why)
}

/// The text of a refusal, as Kubernetes has it.
fn refusal(user: &User, what: &Attributes, reason: &str) -> String {
    let who = &user.name;
    let mut text = if what.resource.is_empty() {
        format!("User {who:?} cannot {} path {:?}", what.verb, what.path)
    } else {
        let resource = match &*what.subresource {
            "" => what.resource.clone(),
            sub => format!("{}/{sub}", what.resource),
        };
        let place = match &*what.namespace {
            "" => "at the cluster scope".to_owned(),
            namespace => format!("in the namespace {namespace:?}"),
        };
        format!(
            "User {who:?} cannot {} resource {resource:?} in API group {:?} {place}",
            what.verb, what.group
        )
    };
    if !reason.is_empty() {
        text.push_str(": ");
        text.push_str(reason);
    }
    text
}
