//! `x-kubernetes-validations`: rules in CEL.

use super::{Kind, Schema};
use crate::status::Cause;
use kube_cel::{CompiledSchema, compile_schema};
use serde_json::Value;
use std::sync::Arc;

thread_local! {
    // Registering its functions costs more than most rules do.
    static VALIDATOR: kube_cel::Validator = kube_cel::Validator::new();
}

/// The rules of a schema and its parts, compiled.
#[derive(Debug, Clone)]
pub struct Rules(Arc<CompiledSchema>);

impl Rules {
    /// Of the schema of a whole object; None if it has none.
    pub fn compile(schema: &Schema) -> Option<Self> {
        has_rules(schema).then(|| Self(Arc::new(compile_schema(&schema.to_openapi()))))
    }

    /// What rules an object breaks, by itself and as a successor.
    pub fn validate(&self, new: &Value, old: Option<&Value>) -> Vec<Cause> {
        let broken = VALIDATOR.with(|v| v.validate_compiled(&self.0, new, old));
        let broken = broken.err().map(|all| all.into_vec()).unwrap_or_default();
        broken.into_iter().map(|error| cause(error, new)).collect()
    }
}

fn cause(error: kube_cel::ValidationError, object: &Value) -> Cause {
    let field = error.field_path.trim_start_matches('.').to_owned();
    let reason = match error.reason.as_deref() {
        Some("FieldValueRequired") => "FieldValueRequired",
        Some("FieldValueForbidden") => "FieldValueForbidden",
        Some("FieldValueDuplicate") => "FieldValueDuplicate",
        _ => "FieldValueInvalid",
    };
    let message = match reason {
        "FieldValueRequired" => format!("Required value: {}", error.message),
        "FieldValueForbidden" => format!("Forbidden: {}", error.message),
        "FieldValueDuplicate" => format!("Duplicate value: {}", error.message),
        _ => format!("Invalid value: {}: {}", shown(object, &field), error.message),
    };
    Cause { reason, message, field }
}

/// A value as Kubernetes shows it in such a message: scalars as they are, the rest by its type.
fn shown(object: &Value, field: &str) -> String {
    let mut value = object;
    for step in field.split(['.', '[', ']']).filter(|s| !s.is_empty()) {
        value = match value {
            Value::Array(all) => {
                step.parse::<usize>().ok().and_then(|n| all.get(n)).unwrap_or(&Value::Null)
            }
            value => &value[step],
        };
    }
    match value {
        Value::Object(_) => "\"object\"".into(),
        Value::Array(_) => "\"array\"".into(),
        other => other.to_string(),
    }
}

fn has_rules(schema: &Schema) -> bool {
    !schema.rules.is_empty() || schema.parts().any(|part| has_rules(part))
}

/// Finds the rules that are none.
pub(super) fn check(schema: &Schema, at: &str, causes: &mut Vec<Cause>) {
    if has_rules(schema) {
        walk(&compile_schema(&schema.to_openapi()), at, causes);
        kinds(schema, at, causes);
    }
}

fn walk(schema: &CompiledSchema, at: &str, causes: &mut Vec<Cause>) {
    for (n, rule) in schema.validations.iter().enumerate() {
        if let Err(error) = rule {
            let mut why = error.to_string();
            if let Some(source) = std::error::Error::source(error) {
                why.push_str(": ");
                why.push_str(&source.to_string());
            }
            causes.push(Cause {
                reason: "FieldValueInvalid",
                message: format!("Invalid value: compilation failed: {why}"),
                field: join(at, &format!("x-kubernetes-validations[{n}].rule")),
            });
        }
    }
    for (name, part) in &schema.properties {
        walk(part, &join(at, &format!("properties[{name}]")), causes);
    }
    for (name, part) in
        [("items", &schema.items), ("additionalProperties", &schema.additional_properties)]
    {
        if let Some(part) = part {
            walk(part, &join(at, name), causes);
        }
    }
}

/// A rule needs an expression.
fn kinds(schema: &Schema, at: &str, causes: &mut Vec<Cause>) {
    for (n, rule) in schema.rules.iter().enumerate() {
        if rule["rule"].as_str().is_none_or(|rule| rule.trim().is_empty()) {
            causes.push(Cause {
                reason: "FieldValueRequired",
                message: "Required value: rule is not specified".into(),
                field: join(at, &format!("x-kubernetes-validations[{n}].rule")),
            });
        }
    }
    if schema.kind == Some(Kind::Object) {
        for (name, part) in &schema.properties {
            kinds(part, &join(at, &format!("properties[{name}]")), causes);
        }
    }
}

fn join(at: &str, step: &str) -> String {
    if at.is_empty() { step.to_owned() } else { format!("{at}.{step}") }
}
