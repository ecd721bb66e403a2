//! Instancetypes and preferences: what a VM takes from objects of their own. Pure.
//!
//! ```text
//! spec.instancetype, spec.preference --wanted--> a ControllerRevision, or the object as it is --found-->
//! Taken --expand--> the template with all that it takes
//! ```
//!
//! What a VM takes is pinned when it is first seen: a ControllerRevision of the VM's holds the object as
//! it was, and the VM's status names it. So nothing that is changed later changes a VM.

mod expand;
mod fields;
mod topology;

use crate::vm;
use kube::CustomResource;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

pub use expand::{Expanded, Given, Types, apply, expand, requirements};

/// The group of all four kinds.
pub const GROUP: &str = "instancetype.kubevirt.io";
/// Their version.
pub const VERSION: &str = "v1beta1";
/// Label of a revision: the kind of object that it holds.
pub const OBJECT_KIND: &str = "instancetype.kubevirt.io/object-kind";

/// The instancetypes of a namespace.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, CustomResource)]
#[kube(
    group = "instancetype.kubevirt.io",
    version = "v1beta1",
    kind = "VirtualMachineInstancetype",
    plural = "virtualmachineinstancetypes",
    namespaced,
    schema = "disabled"
)]
#[serde(transparent)]
pub struct InstancetypeSpec(pub Value);

/// The instancetypes of the cluster.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, CustomResource)]
#[kube(
    group = "instancetype.kubevirt.io",
    version = "v1beta1",
    kind = "VirtualMachineClusterInstancetype",
    plural = "virtualmachineclusterinstancetypes",
    schema = "disabled"
)]
#[serde(transparent)]
pub struct ClusterInstancetypeSpec(pub Value);

/// The preferences of a namespace.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, CustomResource)]
#[kube(
    group = "instancetype.kubevirt.io",
    version = "v1beta1",
    kind = "VirtualMachinePreference",
    plural = "virtualmachinepreferences",
    namespaced,
    schema = "disabled"
)]
#[serde(transparent)]
pub struct PreferenceSpec(pub Value);

/// The preferences of the cluster.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, CustomResource)]
#[kube(
    group = "instancetype.kubevirt.io",
    version = "v1beta1",
    kind = "VirtualMachineClusterPreference",
    plural = "virtualmachineclusterpreferences",
    schema = "disabled"
)]
#[serde(transparent)]
pub struct ClusterPreferenceSpec(pub Value);

/// What a VM takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// What the guest has.
    Instancetype,
    /// How it is shown to the guest.
    Preference,
}

impl What {
    /// Both.
    pub const ALL: [What; 2] = [What::Instancetype, What::Preference];

    /// The field of a VM's spec that names it.
    pub fn field(self) -> &'static str {
        match self {
            What::Instancetype => "instancetype",
            What::Preference => "preference",
        }
    }

    /// How a VM names it.
    pub fn matcher(self, spec: &vm::Spec) -> Option<&Matcher> {
        match self {
            What::Instancetype => spec.instancetype.as_ref(),
            What::Preference => spec.preference.as_ref(),
        }
    }

    /// Which one a VM has.
    pub fn pinned(self, status: &vm::Status) -> Option<&Pinned> {
        match self {
            What::Instancetype => status.instancetype_ref.as_ref(),
            What::Preference => status.preference_ref.as_ref(),
        }
    }

    /// The same, to be written.
    pub fn pinned_mut(self, status: &mut vm::Status) -> &mut Option<Pinned> {
        match self {
            What::Instancetype => &mut status.instancetype_ref,
            What::Preference => &mut status.preference_ref,
        }
    }
}

/// One of the four kinds.
#[derive(Debug, PartialEq, Eq)]
pub struct Kind {
    /// Its name.
    pub name: &'static str,
    /// The resource.
    pub plural: &'static str,
    /// What its objects are.
    pub what: What,
    /// Whether they are of a namespace, or of the cluster.
    pub namespaced: bool,
}

/// All four.
pub static KINDS: [Kind; 4] = [
    Kind {
        name: "VirtualMachineClusterInstancetype",
        plural: "virtualmachineclusterinstancetypes",
        what: What::Instancetype,
        namespaced: false,
    },
    Kind {
        name: "VirtualMachineInstancetype",
        plural: "virtualmachineinstancetypes",
        what: What::Instancetype,
        namespaced: true,
    },
    Kind {
        name: "VirtualMachineClusterPreference",
        plural: "virtualmachineclusterpreferences",
        what: What::Preference,
        namespaced: false,
    },
    Kind {
        name: "VirtualMachinePreference",
        plural: "virtualmachinepreferences",
        what: What::Preference,
        namespaced: true,
    },
];

/// How a VM names what it takes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Matcher {
    /// The object's name.
    pub name: String,
    /// The object's kind: the cluster's by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    /// The ControllerRevision that holds it, if a person chose one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revision_name: Option<String>,
}

impl Matcher {
    /// The kind that is named, in any case, and as one or as many, as KubeVirt takes it. None: there is no
    /// such kind.
    pub fn kind(&self, what: What) -> Option<&'static Kind> {
        let named = self.kind.as_deref().unwrap_or_default().to_lowercase();
        let is_named = |kind: &Kind| named == kind.plural || named == kind.name.to_lowercase();
        KINDS.iter().find(|kind| {
            kind.what == what && (is_named(kind) || named.is_empty() && !kind.namespaced)
        })
    }
}

/// Which object a VM has, and the ControllerRevision that holds it as it was.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Pinned {
    /// The object's name.
    pub name: String,
    /// The object's kind.
    pub kind: String,
    /// The revision.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub controller_revision_ref: Option<RevisionRef>,
}

/// A ControllerRevision of a VM's namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RevisionRef {
    /// Its name.
    pub name: String,
}

/// Where what a VM takes is looked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// The kind of object.
    pub kind: &'static Kind,
    /// The object's name.
    pub name: String,
    /// The revision that holds it, if there is to be one.
    pub revision: Option<String>,
    /// A person chose the revision: nothing else will do.
    pub fixed: bool,
}

/// All that a VM takes.
pub fn wanted(spec: &vm::Spec, status: Option<&vm::Status>) -> Vec<Wanted> {
    let one = |what: What| {
        let matcher = what.matcher(spec)?;
        // One of a kind that is none is refused when it is written.
        let kind = matcher.kind(what)?;
        let pinned = status.and_then(|status| what.pinned(status));
        let pinned =
            pinned.filter(|pinned| pinned.name == matcher.name && pinned.kind == kind.name);
        let pinned = pinned.and_then(|pinned| pinned.controller_revision_ref.clone());
        let chosen = matcher.revision_name.clone().filter(|name| !name.is_empty());
        Some(Wanted {
            kind,
            name: matcher.name.clone(),
            fixed: chosen.is_some(),
            revision: chosen.or(pinned.map(|revision| revision.name)),
        })
    };
    What::ALL.into_iter().filter_map(one).collect()
}

/// What there is of what a VM takes.
#[derive(Debug, Clone, PartialEq)]
pub enum Found {
    /// The object as a revision holds it.
    Pinned(Value),
    /// The object as it is: no revision holds it yet, or the one that did was dropped.
    Live(Value),
    /// Nothing, and why.
    Missing(String),
}

/// What a VM takes, and what there is of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Taken {
    /// Where it was looked for.
    pub wanted: Wanted,
    /// What was found.
    pub found: Found,
}

impl Wanted {
    /// What is found, of what its revision holds and of the object as it is.
    pub fn found(self, held: Option<Value>, live: Option<Value>) -> Taken {
        let Self { kind, name, revision, fixed } = &self;
        let revision = revision.as_deref().unwrap_or_default();
        let is_it = |held: &Value| held["kind"] == kind.name && held["metadata"]["name"] == **name;
        let held = held.filter(is_it);
        let found = match (held, live) {
            (Some(held), _) => Found::Pinned(held),
            (None, _) if *fixed => Found::Missing(format!(
                "there is no ControllerRevision {revision} that holds {} {name}: drop \
                 revisionName to take that as it is",
                kind.name
            )),
            (None, Some(live)) => Found::Live(live),
            (None, None) => Found::Missing(format!("there is no {} {name}", kind.name)),
        };
        Taken { wanted: self, found }
    }
}

impl Taken {
    /// The object. None: there is none.
    pub fn object(&self) -> Option<&Value> {
        match &self.found {
            Found::Pinned(object) | Found::Live(object) => Some(object),
            Found::Missing(_) => None,
        }
    }

    /// The revision that holds it, or is to.
    pub fn revision(&self, vm: &str) -> String {
        match (&self.found, &self.wanted.revision) {
            (Found::Live(object), _) => revision_name(vm, object),
            (_, Some(name)) => name.clone(),
            (_, None) => String::new(),
        }
    }

    /// What a VM's status says of it.
    pub fn pinned(&self, vm: &str) -> Pinned {
        Pinned {
            name: self.wanted.name.clone(),
            kind: self.wanted.kind.name.into(),
            controller_revision_ref: Some(RevisionRef { name: self.revision(vm) }),
        }
    }
}

/// Why a VM cannot have what it takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trouble {
    /// In one word, as events have it.
    pub reason: &'static str,
    /// What, and what the user can do.
    pub message: String,
}

/// A VM's template with all that it takes.
///
/// # Errors
/// What is not there, or does not go together.
pub fn template(spec: &vm::Spec, taken: &[Taken]) -> Result<Expanded, Trouble> {
    for one in taken {
        if let Found::Missing(why) = &one.found {
            let reason = match one.wanted.kind.what {
                What::Instancetype => "FailedFindInstancetype",
                What::Preference => "FailedFindPreference",
            };
            return Err(Trouble { reason, message: why.clone() });
        }
    }
    let objects = taken.iter().filter_map(|one| Some((one.wanted.kind.what, one.object()?)));
    let metadata = spec.template.metadata.clone().unwrap_or_default();
    let annotations = metadata.annotations.unwrap_or_default();
    let applied = apply(&spec.template.spec, &annotations, Types::of(objects));
    applied
        .map_err(|report| Trouble { reason: "FailedApplyInstancetype", message: report.message() })
}

/// The name of the revision in which a VM keeps an object, as KubeVirt's.
fn revision_name(vm: &str, object: &Value) -> String {
    let metadata = &object["metadata"];
    let text = |field: &str| metadata[field].as_str().unwrap_or_default();
    let generation = metadata["generation"].as_i64().unwrap_or_default();
    format!("{vm}-{}-{VERSION}-{}-{generation}", text("name"), text("uid"))
}

/// A ControllerRevision that holds an object as it is: without its owner.
pub fn revision(namespace: &str, name: &str, object: &Value) -> Value {
    let metadata = &object["metadata"];
    let of = |field: &str| match &metadata[field] {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    json!({
        "apiVersion": "apps/v1", "kind": "ControllerRevision",
        "metadata": {
            "name": name, "namespace": namespace,
            "labels": {
                OBJECT_KIND: object["kind"], "instancetype.kubevirt.io/object-name": of("name"),
                "instancetype.kubevirt.io/object-uid": of("uid"),
                "instancetype.kubevirt.io/object-generation": of("generation"),
                "instancetype.kubevirt.io/object-version": VERSION,
            },
        },
        "data": {
            "apiVersion": object["apiVersion"], "kind": object["kind"], "spec": object["spec"],
            "metadata": {
                "name": metadata["name"], "namespace": metadata["namespace"],
                "uid": metadata["uid"], "generation": metadata["generation"],
            },
        },
        "revision": 0,
    })
}

#[cfg(test)]
mod test {
    use super::*;

    fn matcher(kind: Option<&str>, revision: Option<&str>) -> Matcher {
        let owned = |text: Option<&str>| text.map(str::to_owned);
        Matcher { name: "u1".into(), kind: owned(kind), revision_name: owned(revision) }
    }

    #[test]
    fn a_kind_is_the_clusters_unless_it_is_named_and_is_taken_however_kubevirt_takes_it() {
        let of = |kind| matcher(kind, None).kind(What::Instancetype).map(|kind| kind.name);
        assert_eq!(of(None), Some("VirtualMachineClusterInstancetype"));
        assert_eq!(of(Some("")), Some("VirtualMachineClusterInstancetype"));
        for one in [
            "VirtualMachineInstancetype",
            "virtualmachineinstancetype",
            "virtualmachineinstancetypes",
        ] {
            assert_eq!(of(Some(one)), Some("VirtualMachineInstancetype"), "{one}");
        }
        assert_eq!(of(Some("VirtualMachinePreference")), None);
    }

    #[test]
    fn a_vm_has_what_was_pinned_until_it_names_another_or_its_revision_is_dropped() {
        let spec = |matcher| vm::Spec { instancetype: Some(matcher), ..vm::Spec::default() };
        let live = json!({
            "kind": "VirtualMachineClusterInstancetype",
            "metadata": {"name": "u1", "uid": "1", "generation": 2},
        });
        let held = json!({
            "kind": "VirtualMachineClusterInstancetype", "metadata": {"name": "u1"},
        });
        let first = wanted(&spec(matcher(None, None)), None).remove(0);
        let first = first.found(None, Some(live.clone()));
        assert_eq!(first.found, Found::Live(live.clone()));
        let status =
            vm::Status { instancetype_ref: Some(first.pinned("web")), ..vm::Status::default() };
        let again = |matcher| wanted(&spec(matcher), Some(&status)).remove(0);
        let pinned = again(matcher(None, None));
        assert_eq!(pinned.revision.as_deref(), Some("web-u1-v1beta1-1-2"));
        let dropped = pinned.clone().found(None, Some(live.clone()));
        assert_eq!(dropped.found, Found::Live(live.clone()));
        let kept = pinned.found(Some(held.clone()), Some(live.clone()));
        assert_eq!(kept.found, Found::Pinned(held));
        // Another kind, and another revision.
        assert_eq!(again(matcher(Some("virtualmachineinstancetype"), None)).revision, None);
        let chosen = again(matcher(None, Some("old")));
        assert_eq!(chosen.revision.as_deref(), Some("old"));
        assert!(matches!(chosen.clone().found(None, Some(live)).found, Found::Missing(_)));
        let other = json!({
            "kind": "VirtualMachineClusterInstancetype", "metadata": {"name": "u2"},
        });
        assert!(matches!(chosen.found(Some(other), None).found, Found::Missing(_)));
    }
}
