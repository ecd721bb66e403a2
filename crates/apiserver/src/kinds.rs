//! What Kubernetes does in code, kind by kind: defaults, what is kept from an update, what is
//! checked beyond the schema. Pure.
//!
//! Source: Kubernetes' `pkg/apis/*/v1/defaults.go`, `pkg/apis/*/validation` and
//! `pkg/registry/*/strategy.go`.

mod crd;
mod misc;
mod pods;
mod storage;

pub use crd::{conditions as crd_conditions, names_taken};
pub use pods::{bind, budget_status, evict};

use crate::status::Cause;
use serde_json::{Map, Value};

/// What is done for one kind.
pub struct Kind {
    /// `metadata.generation` counts changes of what is wanted.
    pub generation: bool,
    /// It may be updated without a revision.
    pub unconditional_update: bool,
    /// An update of what is not there creates it.
    pub create_on_update: bool,
    /// Fills in what is absent.
    pub default: fn(&mut Value),
    /// Makes what was sent a new object.
    pub prepare_create: fn(&mut Value),
    /// Makes what was sent the successor of what is there.
    pub prepare_update: fn(&mut Value, &Value),
    /// The same, where only the status is written.
    pub prepare_status: fn(&mut Value, &Value),
    /// What is wrong with it.
    pub validate: fn(&Value) -> Vec<Cause>,
    /// What is wrong with it as a successor.
    pub validate_update: fn(&Value, &Value) -> Vec<Cause>,
    /// What its author may want to know.
    pub warnings: fn(&Value) -> Vec<String>,
}

impl std::fmt::Debug for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kind").field("generation", &self.generation).finish_non_exhaustive()
    }
}

const PLAIN: Kind = Kind {
    generation: false,
    unconditional_update: true,
    create_on_update: false,
    default: |_| {},
    prepare_create: |_| {},
    prepare_update: |_, _| {},
    prepare_status: |_, _| {},
    validate: |_| Vec::new(),
    validate_update: |_, _| Vec::new(),
    warnings: |_| Vec::new(),
};

/// With a status that is written through its subresource alone.
const WITH_STATUS: Kind = Kind {
    prepare_create: clear_status,
    prepare_update: keep_status,
    prepare_status: keep_spec,
    ..PLAIN
};

static CUSTOM: Kind = Kind { generation: true, unconditional_update: false, ..PLAIN };

/// What is done for custom resources: the rest is in their schemas.
pub fn custom() -> &'static Kind {
    &CUSTOM
}

/// What is done for a built-in resource, by its key.
pub fn kind(key: &str) -> &'static Kind {
    match key {
        "pods" => &pods::POD,
        "nodes" => &misc::NODE,
        "namespaces" => &misc::NAMESPACE,
        "configmaps" => &misc::CONFIG_MAP,
        "secrets" => &misc::SECRET,
        "services" => &misc::SERVICE,
        "endpoints" => &misc::ENDPOINTS,
        "controllerrevisions.apps" => &misc::REVISION,
        "leases.coordination.k8s.io" => &misc::LEASE,
        "persistentvolumes" => &storage::VOLUME,
        "persistentvolumeclaims" => &storage::CLAIM,
        "storageclasses.storage.k8s.io" => &storage::CLASS,
        "resourcequotas" => &misc::QUOTA,
        "poddisruptionbudgets.policy" => &misc::BUDGET,
        "priorityclasses.scheduling.k8s.io" => &misc::PRIORITY_CLASS,
        "roles.rbac.authorization.k8s.io" | "clusterroles.rbac.authorization.k8s.io" => &misc::ROLE,
        "rolebindings.rbac.authorization.k8s.io"
        | "clusterrolebindings.rbac.authorization.k8s.io" => &misc::BINDING,
        "customresourcedefinitions.apiextensions.k8s.io" => &crd::CRD,
        "validatingwebhookconfigurations.admissionregistration.k8s.io"
        | "mutatingwebhookconfigurations.admissionregistration.k8s.io" => &misc::WEBHOOKS,
        "apiservices.apiregistration.k8s.io" | "volumeattachments.storage.k8s.io" => {
            &misc::STATUS_ONLY
        }
        _ => &misc::OTHER,
    }
}

fn clear_status(object: &mut Value) {
    if let Some(root) = object.as_object_mut() {
        root.remove("status");
    }
}

fn keep_status(new: &mut Value, old: &Value) {
    crate::meta::take_field(new, old, "status");
}

fn keep_spec(new: &mut Value, old: &Value) {
    crate::meta::take_field(new, old, "spec");
}

/// Sets a field of an object where it is absent.
fn default(object: &mut Value, field: &str, value: impl Into<Value>) {
    if let Some(map) = object.as_object_mut() {
        map.entry(field).or_insert_with(|| value.into());
    }
}

/// The part of an object, made where it is absent.
fn part<'a>(object: &'a mut Value, field: &str) -> &'a mut Value {
    if !object.is_object() {
        *object = Value::Object(Map::new());
    }
    let part = &mut object[field];
    if part.is_null() {
        *part = Value::Object(Map::new());
    }
    part
}

fn each<'a>(object: &'a mut Value, field: &str) -> impl Iterator<Item = &'a mut Value> {
    object.get_mut(field).and_then(Value::as_array_mut).into_iter().flatten()
}

fn list<'a>(object: &'a Value, field: &str) -> &'a [Value] {
    object[field].as_array().map(Vec::as_slice).unwrap_or_default()
}

fn text<'a>(object: &'a Value, field: &str) -> &'a str {
    object[field].as_str().unwrap_or_default()
}

fn required(field: impl Into<String>, why: &str) -> Cause {
    let message = match why {
        "" => "Required value".to_owned(),
        why => format!("Required value: {why}"),
    };
    Cause { reason: "FieldValueRequired", message, field: field.into() }
}

fn invalid(field: impl Into<String>, value: &Value, why: &str) -> Cause {
    Cause {
        reason: "FieldValueInvalid",
        message: format!("Invalid value: {value}: {why}"),
        field: field.into(),
    }
}

fn forbidden(field: impl Into<String>, why: &str) -> Cause {
    Cause {
        reason: "FieldValueForbidden",
        message: format!("Forbidden: {why}"),
        field: field.into(),
    }
}

fn duplicate(field: impl Into<String>, value: &Value) -> Cause {
    Cause {
        reason: "FieldValueDuplicate",
        message: format!("Duplicate value: {value}"),
        field: field.into(),
    }
}

fn unsupported(field: impl Into<String>, value: &Value, supported: &[&str]) -> Cause {
    let all: Vec<_> = supported.iter().map(|s| format!("{s:?}")).collect();
    Cause {
        reason: "FieldValueNotSupported",
        message: format!("Unsupported value: {value}: supported values: {}", all.join(", ")),
        field: field.into(),
    }
}

const IMMUTABLE: &str = "field is immutable";

fn immutable(field: &str, new: &Value, old: &Value) -> Option<Cause> {
    (new != old).then(|| invalid(field, new, IMMUTABLE))
}

/// Quantities that are none, or less than nothing, in a map of them.
fn quantities(at: &str, map: &Value) -> Vec<Cause> {
    use crate::quantity::Quantity;
    let mut causes = Vec::new();
    for (name, value) in map.as_object().into_iter().flatten() {
        let at = format!("{at}[{name}]");
        match Quantity::of(value) {
            None => causes.push(invalid(
                at,
                value,
                "quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'",
            )),
            Some(quantity) if quantity.is_negative() => {
                causes.push(invalid(at, value, "must be greater than or equal to 0"));
            }
            Some(_) => {}
        }
    }
    causes
}
