//! What Kubernetes' admission plugins do: fill in what depends on other objects, refuse what they
//! forbid, and count what is limited.
//!
//! What a decision was based on becomes a precondition of the write, so that it still holds when
//! the object is stored.

mod claims;
mod pods;
mod quotas;

use super::{Call, Handler};
use crate::extension::{Extension, Review};
use crate::meta;
use crate::request::Verb;
use crate::resource::Resource;
use crate::status::Failure;
use crate::store::{Change, Expect, Key, Object, To};
use serde_json::{Value, json};
use std::sync::Arc;

/// Namespaces that are never deleted.
const IMMORTAL: [&str; 3] = ["default", "kube-system", "kube-public"];

impl Handler {
    /// Fills in what a new object does not say.
    ///
    /// # Errors
    /// 403 when it may not be made.
    pub(super) fn admit_new(&self, call: &Call, object: &mut Value) -> Result<(), Failure> {
        match &*call.resource.key() {
            "pods" => pods::fill_in(self, call, object)?,
            "persistentvolumeclaims" => claims::fill_in(self, object),
            "customresourcedefinitions.apiextensions.k8s.io" => {
                meta::add_finalizer(object, "customresourcecleanup.apiextensions.k8s.io");
            }
            "persistentvolumes" => meta::add_finalizer(object, "kubernetes.io/pv-protection"),
            "validatingwebhookconfigurations.admissionregistration.k8s.io"
            | "mutatingwebhookconfigurations.admissionregistration.k8s.io" => {
                refuse_webhooks(object)?
            }
            "apiservices.apiregistration.k8s.io" => refuse_foreign_service(object)?,
            _ => {}
        }
        Ok(())
    }

    /// Judges a change and returns what must hold, or change with it.
    ///
    /// # Errors
    /// 403 when it is forbidden, 404 when its namespace does not exist.
    pub(super) fn admit_change(
        &self,
        call: &Call,
        new: &mut Value,
        old: Option<&Value>,
    ) -> Result<Vec<Change>, Failure> {
        self.shared.admit_by_user(call, Some(new), old)?;
        let mut changes = Vec::new();
        if old.is_none() {
            changes.extend(self.namespace_is_open(call, new)?);
        }
        match &*call.resource.key() {
            "persistentvolumeclaims" => claims::admit(self, new, old)?,
            "customresourcedefinitions.apiextensions.k8s.io" => self.shared.admit_crd(new, old)?,
            _ => {}
        }
        if call.subresource.is_empty() && call.resource.namespaced {
            changes.extend(quotas::charge(self, call, new, old)?);
        }
        Ok(changes)
    }

    /// Has the extension fill in what an object does not say.
    ///
    /// # Errors
    /// The extension's.
    pub(super) async fn extend_new(
        &self,
        call: &Call,
        object: &mut Value,
        old: Option<&Value>,
    ) -> Result<(), Failure> {
        match self.extension_of(call) {
            Some(extension) => extension.fill_in(review(call, old), object).await,
            None => Ok(()),
        }
    }

    /// Has the extension judge an object. Returns warnings.
    ///
    /// # Errors
    /// The extension's.
    pub(super) async fn extend_judgement(
        &self,
        call: &Call,
        object: Option<&Value>,
        old: Option<&Value>,
    ) -> Result<Vec<String>, Failure> {
        match self.extension_of(call) {
            Some(extension) => extension.judge(review(call, old), object).await,
            None => Ok(Vec::new()),
        }
    }

    /// The extension, where it judges what a request writes.
    fn extension_of(&self, call: &Call) -> Option<&Arc<dyn Extension>> {
        let (group, resource) = (&*call.resource.group, &*call.resource.plural);
        self.shared.extension().filter(|e| e.admits(group, resource, &call.subresource))
    }

    /// Judges a delete.
    ///
    /// # Errors
    /// 403 when it is forbidden.
    pub(super) fn admit_delete(&self, call: &Call, object: &Value) -> Result<(), Failure> {
        let name = meta::text(object, "name");
        if &*call.resource.key() == "namespaces" && IMMORTAL.contains(&name) {
            return Err(Failure::forbidden(
                call.subject(name),
                "this namespace may not be deleted",
            ));
        }
        self.shared.admit_by_user(call, None, Some(object))
    }

    /// A namespace in which something is created must be there until it is.
    fn namespace_is_open(&self, call: &Call, object: &Value) -> Result<Option<Change>, Failure> {
        if !call.resource.namespaced {
            return Ok(None);
        }
        let key = Key::new("namespaces", "", &call.namespace);
        let what = crate::status::Subject { group: "", kind: "namespaces", name: &call.namespace };
        let namespace = self.store.get(&key).ok_or_else(|| Failure::not_found(what))?;
        // Its content is cleared away, and that is told by events.
        let terminating = meta::is_terminating(&namespace.body);
        if terminating && &*call.resource.plural != "events" {
            let name = meta::text(object, "name");
            let why = format!(
                "unable to create new content in namespace {} because it is being terminated",
                call.namespace
            );
            let mut failure = Failure::forbidden(call.subject(name), &why);
            failure.details["causes"] = json!([{
                "reason": "NamespaceTerminating",
                "message": format!("namespace {} is being terminated", call.namespace),
                "field": "metadata.namespace",
            }]);
            return Err(failure);
        }
        Ok(Some(still(key, &namespace)))
    }

    /// An object of the core group or another, by its storage key.
    pub(super) fn look_up(&self, resource: &str, namespace: &str, name: &str) -> Option<Object> {
        self.store.get(&Key::new(resource, namespace, name))
    }

    /// All objects of a resource that has no namespaces.
    pub(super) fn all(&self, resource: &str) -> Vec<Object> {
        self.in_namespace(resource, "")
    }
}

/// The precondition that an object is as it was seen.
fn still(key: Key, object: &Object) -> Change {
    Change { key, expect: Expect::At(object.revision), to: To::Same }
}

fn refuse_webhooks(object: &Value) -> Result<(), Failure> {
    match object["webhooks"].as_array().is_some_and(|hooks| !hooks.is_empty()) {
        true => Err(Failure::not_implemented(
            "this server calls no admission webhooks; Godwit's own checks are built in",
        )),
        false => Ok(()),
    }
}

fn refuse_foreign_service(object: &Value) -> Result<(), Failure> {
    match object["spec"]["service"].is_null() {
        false => Err(Failure::not_implemented(
            "this server aggregates no other API servers; Godwit's own APIs are built in",
        )),
        true => Ok(()),
    }
}

/// Whether a resource counts for `count/` quotas: all do that are kept.
pub(super) fn counted(resource: &Resource) -> bool {
    resource.stored
}

/// A write, as an extension sees it: what was there makes it an update.
fn review<'a>(call: &'a Call, old: Option<&'a Value>) -> Review<'a> {
    let verb = match (call.verb, old) {
        (Verb::Delete | Verb::DeleteCollection, _) => Verb::Delete,
        (_, None) => Verb::Create,
        (_, Some(_)) => Verb::Update,
    };
    Review {
        verb,
        group: &call.resource.group,
        resource: &call.resource.plural,
        subresource: &call.subresource,
        namespace: &call.namespace,
        name: &call.name,
        dry_run: call.options.dry_run,
        user: &call.user,
        old,
    }
}
