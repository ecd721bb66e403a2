//! What an object of a resource may look like: Kubernetes' structural schemas, for custom
//! resources and built-in ones alike.
//!
//! Source: `apiextensions.k8s.io/v1` `JSONSchemaProps` and its `x-kubernetes-*` extensions;
//! the built-in kinds' schemas are those that Kubernetes publishes.

mod builtin;
mod openapi;
mod parse;
mod rules;
mod validate;
mod walk;

pub use builtin::{builtin, metadata};
pub use rules::Rules;

use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::Arc;

/// The schema of one value. Parts are shared: that of `metadata` exists once.
#[derive(Debug, Clone, Default)]
pub struct Schema {
    /// None: any type, or [`Schema::int_or_string`].
    pub kind: Option<Kind>,
    /// Null is a value of it; else null counts as absent.
    pub nullable: bool,
    /// `x-kubernetes-int-or-string`.
    pub int_or_string: bool,
    /// `x-kubernetes-preserve-unknown-fields`.
    pub preserve_unknown: bool,
    /// `x-kubernetes-embedded-resource`: it has apiVersion, kind and metadata of its own.
    pub embedded: bool,
    /// What it is when absent.
    pub default: Option<Value>,
    /// Fields of an object.
    pub properties: BTreeMap<Box<str>, Arc<Schema>>,
    /// Fields of an object beside those.
    pub additional: Additional,
    /// Elements of an array.
    pub items: Option<Arc<Schema>>,
    /// What an array's elements are to those who share it.
    pub list: List,
    /// `x-kubernetes-map-type: atomic`: an object that has one owner.
    pub atomic: bool,
    /// How a strategic merge patch changes it.
    pub strategy: Strategy,
    /// What a value must be.
    pub checks: Checks,
    /// `x-kubernetes-validations`, as they were given.
    pub rules: Vec<Value>,
    /// Those of it and its parts, compiled; only of a whole object's schema.
    pub compiled: Option<Rules>,
    /// For people.
    pub description: Option<Box<str>>,
}

/// JSON types, an integer being one of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `object`.
    Object,
    /// `array`.
    Array,
    /// `string`.
    String,
    /// `integer`.
    Integer,
    /// `number`.
    Number,
    /// `boolean`.
    Boolean,
}

/// Fields that are not in [`Schema::properties`].
#[derive(Debug, Clone, Default)]
pub enum Additional {
    /// There are none: they are pruned.
    #[default]
    None,
    /// Whatever they are.
    Any,
    /// A map of these.
    Of(Arc<Schema>),
}

/// `x-kubernetes-list-type`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum List {
    /// One owner owns all of it.
    #[default]
    Atomic,
    /// Scalars, each of which has owners.
    Set,
    /// Objects told apart by these fields, each of which has owners.
    Map(Vec<Box<str>>),
}

/// `x-kubernetes-patch-strategy` and `-merge-key`, which the built-in kinds have.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Strategy {
    /// A list is merged, not replaced: by this key, or as a set when it is empty.
    pub merge: Option<Box<str>>,
    /// An object keeps only the fields that the patch names.
    pub retain_keys: bool,
}

/// Bounds on a value; an absent one is none.
#[derive(Debug, Clone, Default)]
pub struct Checks {
    /// Fields that must be there.
    pub required: Vec<Box<str>>,
    /// All that it may be.
    pub one_of_values: Option<Vec<Value>>,
    /// `format`, such as `int32` or `date-time`.
    pub format: Option<Box<str>>,
    /// A regular expression.
    pub pattern: Option<Box<str>>,
    /// `minimum`, and whether it is exclusive.
    pub minimum: Option<(f64, bool)>,
    /// `maximum`, and whether it is exclusive.
    pub maximum: Option<(f64, bool)>,
    /// `multipleOf`.
    pub multiple_of: Option<f64>,
    /// Characters of a string, at least and at most.
    pub length: (Option<u64>, Option<u64>),
    /// Elements of an array, at least and at most.
    pub items: (Option<u64>, Option<u64>),
    /// Fields of an object, at least and at most.
    pub properties: (Option<u64>, Option<u64>),
    /// `uniqueItems`.
    pub unique: bool,
    /// `allOf`.
    pub all_of: Vec<Arc<Schema>>,
    /// `anyOf`.
    pub any_of: Vec<Arc<Schema>>,
    /// `oneOf`.
    pub one_of: Vec<Arc<Schema>>,
    /// `not`.
    pub not: Option<Arc<Schema>>,
}
