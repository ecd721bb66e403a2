//! Quotas: what an object uses is booked with the object, in one transaction.
//!
//! Source: Kubernetes' `plugin/pkg/admission/resourcequota` and `pkg/quota/v1/evaluator`.

use super::super::{Call, Handler};
use crate::meta;
use crate::quota::{self, Usage};
use crate::status::Failure;
use crate::store::{Change, Expect, Key, To};
use serde_json::Value;

/// Books what a change uses more than before.
///
/// # Errors
/// 403 when a quota does not allow it, or wants it to say what it uses.
pub(super) fn charge(
    handler: &Handler,
    call: &Call,
    new: &Value,
    old: Option<&Value>,
) -> Result<Vec<Change>, Failure> {
    let key = call.resource.key();
    if key == "resourcequotas" || !super::counted(&call.resource) {
        return Ok(Vec::new());
    }
    let quotas = handler.in_namespace("resourcequotas", &call.namespace);
    let mut changes = Vec::new();
    for found in quotas {
        let quota = &found.body;
        if !quota::is_in_scope(quota, &key, new) {
            continue;
        }
        let (own, name) = (meta::text(quota, "name"), meta::text(new, "name"));
        let refuse = |why: String| Failure::forbidden(call.subject(name), &why);
        if old.is_none()
            && let Some(missing) = quota::missing(quota, &key, new)
        {
            return Err(refuse(format!("failed quota: {own}: must specify {missing}")));
        }
        let before = old.map(|old| quota::usage(&key, old)).unwrap_or_default();
        let more = quota::usage(&key, new).minus(&before).limited_by(quota);
        if !more.is_above_zero() {
            continue;
        }
        let used = Usage::of_status(quota);
        let next = used.plus(&more);
        if let Some(over) = quota::beyond(quota, &next, &more) {
            return Err(refuse(format!("exceeded quota: {own}, {}", over.told(&more, &used))));
        }
        let key = Key::new("resourcequotas", &call.namespace, own);
        let to = To::Body(next.into_status(quota));
        changes.push(Change { key, expect: Expect::At(found.revision), to });
    }
    Ok(changes)
}
