//! Subresources other than `status`: each does one thing to one object.

use super::{Call, Handler, respond};
use crate::body::Answer;
use crate::request::Verb;
use crate::status::Failure;
use crate::store::{Change, Expect, Object, To, WriteError};
use crate::{decode, deletion, kinds, meta};
use http::StatusCode;
use jiff::Timestamp;
use serde_json::{Value, json};
use std::sync::Arc;

impl Handler {
    /// Does what a subresource is for.
    ///
    /// # Errors
    /// 404 when the resource has no such, 405 when it does not do that.
    pub(super) async fn subresource(&self, call: &Call) -> Result<Answer, Failure> {
        let resource = &call.resource;
        if &*call.subresource == "scale" && resource.scale.is_some() {
            return self.scale(call).await;
        }
        let known = resource.subresources.iter().find(|s| s.name == call.subresource);
        let known = known.ok_or_else(|| match (&*resource.key(), &*call.subresource) {
            (
                "pods",
                what @ ("exec" | "attach" | "portforward" | "proxy" | "ephemeralcontainers"),
            ) => Failure::not_implemented(format!(
                "pods/{what} is not served: pods of this cluster are processes of its machine; \
                     use them there"
            )),
            _ => Failure::no_such_path(),
        })?;
        let (key, creates) = (resource.key(), call.verb == Verb::Create);
        match (&*key, &*known.name) {
            ("pods", "binding") if creates => self.bind(call).await,
            ("pods", "eviction") if creates => self.evict(call).await,
            ("pods", "log") if call.verb == Verb::Get => self.log(call).await,
            ("serviceaccounts", "token") if creates => self.issue_token(call).await,
            ("namespaces", "finalize") if call.verb == Verb::Update => self.finalize(call).await,
            _ => Err(Failure::no_such_verb()),
        }
    }

    /// Puts a pod on a node.
    async fn bind(&self, call: &Call) -> Result<Answer, Failure> {
        let binding = decode::object(call.media.as_deref(), &call.body)?.value;
        self.rewrite(call, |pod, now| kinds::bind(pod, &binding, now)).await?;
        Ok(crate::body::json(StatusCode::CREATED, &success()))
    }

    /// Ends a pod, if the extension and its budgets allow it.
    async fn evict(&self, call: &Call) -> Result<Answer, Failure> {
        let eviction = decode::object(call.media.as_deref(), &call.body)?.value;
        let options = &eviction["deleteOptions"];
        let mut call = call.clone();
        let dry = options["dryRun"].as_array().into_iter().flatten();
        call.options.dry_run |= super::is_dry_run(dry)?;
        let key = call.key(&call.name);
        let pod =
            self.store.get(&key).ok_or_else(|| Failure::not_found(call.subject(&call.name)))?;
        self.extend_judgement(&call, Some(&eviction), None).await?;
        let budgets = self.in_namespace("poddisruptionbudgets.policy", &call.namespace);
        let allowed = kinds::evict(&pod.body, &budgets)?;
        let mut delete = call.clone();
        delete.subresource = "".into();
        delete.body = match options.is_null() {
            false => options.to_string().into(),
            true => bytes::Bytes::new(),
        };
        delete.media = None;
        if let (Some(budget), false) = (allowed, call.options.dry_run) {
            self.charge(budget).await?;
        }
        self.delete(&delete).await?;
        Ok(crate::body::json(StatusCode::CREATED, &success()))
    }

    /// Books a disruption on its budget, unless another did so meanwhile.
    async fn charge(&self, (budget, next): (Object, Value)) -> Result<(), Failure> {
        let key = crate::store::Key::new(
            "poddisruptionbudgets.policy",
            meta::text(&budget.body, "namespace"),
            meta::text(&budget.body, "name"),
        );
        let change = Change { key, expect: Expect::At(budget.revision), to: To::Body(next) };
        match self.store.write(vec![change]).await {
            Ok(_) => Ok(()),
            Err(WriteError::Conflict { .. }) => {
                Err(Failure::too_many_requests("another eviction was faster; try again"))
            }
            Err(error) => Err(super::write::refused(&error)),
        }
    }

    /// Objects of one namespace.
    pub(super) fn in_namespace(&self, resource: &str, namespace: &str) -> Vec<Object> {
        let query = crate::store::Query {
            resource,
            namespace: Some(namespace),
            at: None,
            after: None,
            limit: usize::MAX,
        };
        // Of the present, which is never too old.
        let list = self.store.list(&query).map(|list| list.objects).unwrap_or_default();
        list.into_iter().map(|(_, object)| object).collect()
    }

    /// A container's log.
    async fn log(&self, call: &Call) -> Result<Answer, Failure> {
        let key = call.key(&call.name);
        let pod =
            self.store.get(&key).ok_or_else(|| Failure::not_found(call.subject(&call.name)))?;
        self.shared.logs(&pod.body, &call.options.query).await
    }

    /// A token for a service account.
    async fn issue_token(&self, call: &Call) -> Result<Answer, Failure> {
        let request = decode::object(call.media.as_deref(), &call.body)?.value;
        let key = call.key(&call.name);
        let account =
            self.store.get(&key).ok_or_else(|| Failure::not_found(call.subject(&call.name)))?;
        let token = self.shared.issue_token(&account.body, &request, Timestamp::now())?;
        respond::write(call, StatusCode::CREATED, &token)
    }

    /// Says that what is in a namespace is gone.
    async fn finalize(&self, call: &Call) -> Result<Answer, Failure> {
        let wanted = decode::object(call.media.as_deref(), &call.body)?.value;
        let object = self
            .rewrite(call, |namespace, _| {
                let mut next = namespace.clone();
                next["spec"]["finalizers"] = wanted["spec"]["finalizers"].clone();
                Ok(next)
            })
            .await?;
        respond::one(call, StatusCode::OK, &object)
    }

    /// Reads or writes the number of replicas.
    async fn scale(&self, call: &Call) -> Result<Answer, Failure> {
        let Some(scale) = &call.resource.scale else { return Err(Failure::no_such_path()) };
        match call.verb {
            Verb::Get => {
                let key = call.key(&call.name);
                let found = self.store.get(&key);
                let found = found.ok_or_else(|| Failure::not_found(call.subject(&call.name)))?;
                respond::write(call, StatusCode::OK, &crate::scale::of(&found.body, scale))
            }
            Verb::Update | Verb::Patch => {
                let object = self
                    .rewrite(call, |object, _| {
                        let now = crate::scale::of(object, scale);
                        let wanted = match call.verb {
                            Verb::Update => {
                                decode::object(call.media.as_deref(), &call.body)?.value
                            }
                            _ => {
                                let media = call.media.as_deref().unwrap_or_default();
                                let patch = crate::patch::Patch::parse(media, &call.body)?;
                                patch.apply_to(&now, &crate::schema::Schema::default())?
                            }
                        };
                        crate::scale::set(object, scale, &wanted)
                    })
                    .await?;
                respond::write(call, StatusCode::OK, &crate::scale::of(&object, scale))
            }
            _ => Err(Failure::no_such_verb()),
        }
    }

    /// Writes what `make` makes of an object; again when another was faster.
    async fn rewrite(
        &self,
        call: &Call,
        make: impl Fn(&Value, Timestamp) -> Result<Value, Failure>,
    ) -> Result<Arc<Value>, Failure> {
        let key = call.key(&call.name);
        loop {
            let found = self.store.get(&key);
            let found = found.ok_or_else(|| Failure::not_found(call.subject(&call.name)))?;
            let next = make(&found.body, Timestamp::now())?;
            if call.options.dry_run || next == *found.body {
                return Ok(Arc::new(next));
            }
            let over = deletion::is_over(&next, call.grace());
            let to = if over { To::Nothing(next) } else { To::Body(next) };
            let change = Change { key: key.clone(), expect: Expect::At(found.revision), to };
            match self.store.write(vec![change]).await {
                // There is one for each change.
                Ok(objects) => {
                    return Ok(objects.into_iter().next().map(|o| o.body).unwrap_or_default());
                }
                // Each turn is another's success.
                Err(WriteError::Conflict { .. }) => {}
                Err(error) => return Err(super::write::refused(&error)),
            }
        }
    }

    /// Answers a question that is asked by a create, such as whether somebody may do something.
    pub(super) async fn ask(&self, call: &Call) -> Result<Answer, Failure> {
        if call.verb != Verb::Create {
            return Err(Failure::no_such_verb());
        }
        let mut question = decode::object(call.media.as_deref(), &call.body)?;
        let target = call.target();
        target.address(&mut question.value)?;
        target.complete(&mut question.value, &question.duplicates, call.options.unknown)?;
        let answer = self.shared.review(call, &question.value, Timestamp::now())?;
        respond::write(call, StatusCode::CREATED, &answer)
    }
}

fn success() -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201})
}
