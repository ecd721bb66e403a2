//! Who asks, and whether they may.

pub mod bootstrap;
pub mod node;
pub mod pki;
pub mod rbac;
pub mod review;
pub mod token;

use crate::request::{Path, Verb};
use rustls::pki_types::CertificateDer;
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// All who have proven who they are are in this group.
pub const AUTHENTICATED: &str = "system:authenticated";
/// They may do everything.
pub const MASTERS: &str = "system:masters";

/// Who asks.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct User {
    /// Such as `system:serviceaccount:default:robot`.
    pub name: String,
    /// Empty if there is none.
    pub uid: String,
    /// Such as `system:masters`.
    pub groups: Vec<String>,
    /// What else is known.
    pub extra: BTreeMap<String, Vec<String>>,
}

impl User {
    /// A user of a name, in these groups and in that of all who are known.
    pub fn new(name: &str, groups: &[&str]) -> Self {
        let mut groups: Vec<String> = groups.iter().map(|g| (*g).to_owned()).collect();
        if !groups.iter().any(|g| g == AUTHENTICATED) {
            groups.push(AUTHENTICATED.into());
        }
        Self { name: name.into(), groups, ..Self::default() }
    }

    /// Who has proven nothing.
    pub fn anonymous() -> Self {
        Self {
            name: "system:anonymous".into(),
            groups: vec!["system:unauthenticated".into()],
            ..Self::default()
        }
    }

    /// The subject of a certificate that was verified: its common name and, as groups, its
    /// organisations.
    pub fn of_certificate(der: &CertificateDer<'_>) -> Option<Self> {
        let (_, certificate) = x509_parser::parse_x509_certificate(der).ok()?;
        let subject = certificate.subject();
        let name = subject.iter_common_name().next()?.as_str().ok()?;
        let groups: Vec<&str> =
            subject.iter_organization().filter_map(|o| o.as_str().ok()).collect();
        (!name.is_empty()).then(|| Self::new(name, &groups))
    }

    /// Whether it is in a group.
    pub fn is_in(&self, group: &str) -> bool {
        self.groups.iter().any(|g| g == group)
    }

    /// As `userInfo` of a review has it.
    pub fn from_json(info: &Value) -> Self {
        let text = |field: &str| info[field].as_str().unwrap_or_default().to_owned();
        let list = |value: &Value| -> Vec<String> {
            let all = value.as_array().into_iter().flatten();
            all.filter_map(Value::as_str).map(str::to_owned).collect()
        };
        let extra = info["extra"].as_object().into_iter().flatten();
        Self {
            name: text("username"),
            uid: text("uid"),
            groups: list(&info["groups"]),
            extra: extra.map(|(key, all)| (key.clone(), list(all))).collect(),
        }
    }

    /// As reviews have it.
    pub fn to_json(&self) -> Value {
        let mut user = json!({"username": self.name, "groups": self.groups});
        if !self.uid.is_empty() {
            user["uid"] = self.uid.as_str().into();
        }
        if !self.extra.is_empty() {
            user["extra"] = json!(self.extra);
        }
        user
    }
}

/// What a user would do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Attributes {
    /// Such as `list`.
    pub verb: String,
    /// Empty for the core group.
    pub group: String,
    /// Such as `v1`.
    pub version: String,
    /// Empty for what is no resource.
    pub resource: String,
    /// Empty for the object itself.
    pub subresource: String,
    /// Empty for all, or none.
    pub namespace: String,
    /// Empty for all.
    pub name: String,
    /// Of what is no resource.
    pub path: String,
}

impl Attributes {
    /// What a request to a resource would do.
    pub fn of(verb: Verb, path: &Path, query: &[(String, String)]) -> Self {
        // A list or watch of one name is judged by that name.
        let selector = query.iter().find(|(n, _)| n == "fieldSelector").map(|(_, v)| &**v);
        let named =
            selector.and_then(|s| s.strip_prefix("metadata.name=")).filter(|n| !n.contains(','));
        let name = match (&*path.name, named) {
            ("", Some(named)) => named.to_owned(),
            (name, _) => name.to_owned(),
        };
        Self {
            verb: verb.name().into(),
            group: path.group.clone(),
            version: path.version.clone(),
            resource: path.resource.clone(),
            subresource: path.subresource.clone(),
            namespace: path.namespace.clone(),
            name,
            path: String::new(),
        }
    }
}
