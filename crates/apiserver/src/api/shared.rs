//! What all requests share: the objects, and what is made of them: what is served, and who may do
//! what.

use super::Logs;
use crate::auth::rbac::{self, Decision, Rule, Rules};
use crate::auth::{Attributes, MASTERS, User, node, review, token};
use crate::body::Answer;
use crate::catalog::Catalog;
use crate::derived::Derived;
use crate::extension::Extension;
use crate::handler::Call;
use crate::request::Path;
use crate::resource::Resource;
use crate::status::Failure;
use crate::store::{Key, Query, Store};
use crate::{kinds, meta};
use jiff::Timestamp;
use serde_json::Value;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

pub(super) const CRDS: &str = "customresourcedefinitions.apiextensions.k8s.io";
pub(super) const RBAC: [&str; 4] = [
    "roles.rbac.authorization.k8s.io",
    "clusterroles.rbac.authorization.k8s.io",
    "rolebindings.rbac.authorization.k8s.io",
    "clusterrolebindings.rbac.authorization.k8s.io",
];

/// What all requests share.
pub struct Shared {
    pub(super) store: Store,
    pub(super) keys: token::Keys,
    pub(super) logs: Option<Box<dyn Logs>>,
    pub(super) address: String,
    pub(super) builtin: Vec<Arc<Resource>>,
    pub(super) catalog: Derived<Catalog>,
    pub(super) rules: Derived<Rules>,
    pub(super) extension: OnceLock<Arc<dyn Extension>>,
    pub(super) requests: AtomicU64,
    pub(super) began: std::time::Instant,
}

impl node::Pods for Shared {
    fn on(&self, node: &str) -> Vec<Value> {
        let all = self.all("pods").into_iter();
        all.filter(|pod| pod["spec"]["nodeName"] == node).map(|pod| (*pod).clone()).collect()
    }

    fn claim(&self, namespace: &str, name: &str) -> Option<Value> {
        self.look_up("persistentvolumeclaims", namespace, name)
    }
}

impl Shared {
    /// What is added to it.
    pub fn extension(&self) -> Option<&Arc<dyn Extension>> {
        self.extension.get()
    }

    pub(super) fn extends(&self, path: &Path) -> bool {
        let has = |e: &Arc<dyn Extension>| e.resources(&path.group, &path.version).is_some();
        self.extension.get().is_some_and(has)
    }

    pub(super) fn look_up(&self, resource: &str, namespace: &str, name: &str) -> Option<Value> {
        self.store.get(&Key::new(resource, namespace, name)).map(|o| (*o.body).clone())
    }

    fn all(&self, resource: &str) -> Vec<Arc<Value>> {
        let query = Query { resource, namespace: None, at: None, after: None, limit: usize::MAX };
        // Of the present, which is never too old.
        let list = self.store.list(&query).map(|list| list.objects).unwrap_or_default();
        list.into_iter().map(|(_, object)| object.body).collect()
    }

    /// All that is served now.
    pub(super) fn catalog(&self) -> Arc<Catalog> {
        self.catalog.load(&self.store, || {
            let crds = self.all(CRDS);
            Catalog::new(&self.builtin, crds.iter().map(|crd| &**crd))
        })
    }

    /// Who may do what.
    fn rules(&self) -> Arc<Rules> {
        self.rules.load(&self.store, || {
            let [roles, cluster_roles, bindings, cluster_bindings] = RBAC.map(|key| self.all(key));
            let roles = roles.iter().chain(&cluster_roles).map(|role| &**role);
            let bindings = bindings.iter().chain(&cluster_bindings).map(|binding| &**binding);
            Rules::new(roles, bindings)
        })
    }

    /// Whether somebody may do something.
    pub fn judge(&self, user: &User, what: &Attributes) -> Decision {
        match node::authorize(user, what, self) {
            Some(decision) => decision,
            None => self.rules().authorize(user, what),
        }
    }

    pub(super) fn permit(&self, user: &User, what: &Attributes) -> Result<(), Failure> {
        let decision = self.judge(user, what);
        if decision.allowed {
            return Ok(());
        }
        Err(rbac::denied(user, what, &decision.reason))
    }

    /// What depends on who writes: nodes write only their own, and nobody gives what they do not
    /// have.
    ///
    /// # Errors
    /// 403.
    pub fn admit_by_user(
        &self,
        call: &Call,
        new: Option<&Value>,
        old: Option<&Value>,
    ) -> Result<(), Failure> {
        let key = call.resource.key();
        let object = new.or(old);
        let name = object.map(|o| meta::text(o, "name")).unwrap_or_default();
        if let Some(node) = node::name_of(&call.user)
            && let Some(why) = node::restrict(node, &key, object)
        {
            return Err(Failure::forbidden(call.subject(name), &why));
        }
        let (true, Some(new)) = (RBAC.contains(&&*key), new) else { return Ok(()) };
        match self.beyond(call, &key, new, old) {
            Some(why) => Err(Failure::forbidden(call.subject(name), &why)),
            None => Ok(()),
        }
    }

    fn beyond(&self, call: &Call, key: &str, new: &Value, old: Option<&Value>) -> Option<String> {
        let user = &call.user;
        let rules = self.rules();
        let may = |verb: &str, resource: &str, name: &str| {
            let what = Attributes {
                verb: verb.into(),
                group: "rbac.authorization.k8s.io".into(),
                resource: resource.into(),
                namespace: call.namespace.to_string(),
                name: name.into(),
                ..Attributes::default()
            };
            user.is_in(MASTERS) || self.judge(user, &what).allowed
        };
        let name = meta::text(new, "name");
        if key.contains("bindings.") {
            let role = &new["roleRef"];
            let (kind, named) = (role["kind"].as_str()?, role["name"].as_str()?);
            let cluster = kind == "ClusterRole";
            let plural = if cluster { "clusterroles" } else { "roles" };
            if old.is_some_and(|old| old["subjects"] == new["subjects"])
                || may("bind", plural, named)
            {
                return None;
            }
            let granted = rules.of_role(cluster, &call.namespace, named).unwrap_or_default();
            return rules.beyond(user, &call.namespace, granted);
        }
        if old.is_some_and(|old| {
            old["rules"] == new["rules"] && old["aggregationRule"] == new["aggregationRule"]
        }) {
            return None;
        }
        if may("escalate", &call.resource.plural, name) {
            return None;
        }
        let mut granted: Vec<Rule> =
            new["rules"].as_array().into_iter().flatten().map(Rule::of).collect();
        if new["aggregationRule"].is_object() {
            // It may come to be anything.
            let all = || vec!["*".to_owned()];
            granted.push(Rule { verbs: all(), groups: all(), resources: all(), ..Rule::default() });
            granted.push(Rule { verbs: all(), paths: all(), ..Rule::default() });
        }
        rules.beyond(user, &call.namespace, &granted)
    }

    /// Names and conditions of a CRD, with its write.
    ///
    /// # Errors
    /// None yet: names that are taken are told by a condition.
    pub fn admit_crd(&self, crd: &mut Value, _old: Option<&Value>) -> Result<(), Failure> {
        let others: Vec<Value> = self.all(CRDS).iter().map(|crd| (**crd).clone()).collect();
        let taken = kinds::names_taken(crd, &others);
        kinds::crd_conditions(crd, &taken, Timestamp::now());
        Ok(())
    }

    /// A container's log.
    ///
    /// # Errors
    /// 501 when there are none.
    pub async fn logs(&self, pod: &Value, query: &[(String, String)]) -> Result<Answer, Failure> {
        match &self.logs {
            Some(logs) => logs.read(pod, query).await,
            None => Err(Failure::not_implemented("this server runs no pods and has no logs")),
        }
    }

    /// A token of an account.
    ///
    /// # Errors
    /// As [`token::Keys::issue`].
    pub fn issue_token(
        &self,
        account: &Value,
        request: &Value,
        now: Timestamp,
    ) -> Result<Value, Failure> {
        self.keys.issue(account, request, &|r, ns, n| self.look_up(r, ns, n), now)
    }

    /// The answer to a question.
    ///
    /// # Errors
    /// 400 when it asks nothing.
    pub fn review(&self, call: &Call, question: &Value, _now: Timestamp) -> Result<Value, Failure> {
        match &*call.resource.kind {
            "TokenReview" => {
                let own = [self.keys.audience()];
                let asked = question["spec"]["audiences"].as_array();
                let asked: Vec<&str> =
                    asked.into_iter().flatten().filter_map(Value::as_str).collect();
                let audiences = if asked.is_empty() { &own[..] } else { &asked };
                let sent = question["spec"]["token"].as_str().unwrap_or_default();
                if sent.is_empty() {
                    let text = "token is required for TokenReview in authentication";
                    return Err(Failure::bad_request(text));
                }
                let found = self.keys.verify(sent, audiences, &|r, ns, n| self.look_up(r, ns, n));
                Ok(review::token(question, found.as_ref(), audiences))
            }
            "SelfSubjectReview" => Ok(review::who(question, &call.user)),
            "SelfSubjectRulesReview" => Ok(review::rules(question, &call.user, &self.rules())),
            _ => review::access(question, &call.user, &|user, what| self.judge(user, what)),
        }
    }

    pub(super) fn metrics(&self) -> String {
        format!(
            "# TYPE apiserver_request_total counter\napiserver_request_total {}\n\
             # TYPE process_uptime_seconds gauge\nprocess_uptime_seconds {}\n\
             # TYPE apiserver_storage_revision gauge\napiserver_storage_revision {}\n",
            self.requests.load(Ordering::Relaxed),
            self.began.elapsed().as_secs(),
            self.store.revision(),
        )
    }
}
