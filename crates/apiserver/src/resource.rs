//! What is served: one table of resources, built-in ones and those of CRDs.

use crate::schema::Schema;
use std::sync::Arc;

/// One resource in one version.
#[derive(Debug, Clone)]
pub struct Resource {
    /// Empty for the core group.
    pub group: Box<str>,
    /// Such as `v1`.
    pub version: Box<str>,
    /// Such as `VirtualMachine`.
    pub kind: Box<str>,
    /// Such as `VirtualMachineList`.
    pub list_kind: Box<str>,
    /// As in its path, such as `virtualmachines`.
    pub plural: Box<str>,
    /// Such as `virtualmachine`.
    pub singular: Box<str>,
    /// Such as `vm`.
    pub short_names: Vec<Box<str>>,
    /// Such as `all`.
    pub categories: Vec<Box<str>>,
    /// Its objects are in namespaces.
    pub namespaced: bool,
    /// Objects are kept; else it is only asked, such as a `subjectaccessreview`.
    pub stored: bool,
    /// It has `status`.
    pub status: bool,
    /// Further subresources, such as `binding`.
    pub subresources: Vec<Subresource>,
    /// `scale`: paths of spec.replicas, status.replicas and the selector.
    pub scale: Option<Scale>,
    /// What it looks like.
    pub schema: Arc<Schema>,
    /// Of its table, behind the name and before the age.
    pub columns: Vec<Column>,
    /// Fields that can be selected by, beside `metadata.name` and `metadata.namespace`,
    /// such as `spec.nodeName`.
    pub selectable: Vec<Box<str>>,
    /// Not to be served for ever: the warning that is sent with each answer.
    pub deprecated: Option<Box<str>>,
    /// Of a CRD, which has this name.
    pub crd: Option<Box<str>>,
    /// The version in which objects are kept.
    pub storage_version: Box<str>,
}

/// A subresource that is neither `status` nor `scale`.
#[derive(Debug, Clone)]
pub struct Subresource {
    /// Such as `eviction`.
    pub name: Box<str>,
    /// Group, version and kind of its body.
    pub kind: (Box<str>, Box<str>, Box<str>),
    /// Such as `create`.
    pub verbs: Vec<Box<str>>,
}

/// `subresources.scale` of a CRD.
#[derive(Debug, Clone)]
pub struct Scale {
    /// `specReplicasPath`.
    pub spec: Box<str>,
    /// `statusReplicasPath`.
    pub status: Box<str>,
    /// `labelSelectorPath`.
    pub selector: Option<Box<str>>,
}

/// One column of a table.
#[derive(Debug, Clone)]
pub struct Column {
    /// Such as `Node`.
    pub name: Box<str>,
    /// `string`, `integer`, `number`, `boolean` or `date`.
    pub kind: Box<str>,
    /// Such as `int32`.
    pub format: Box<str>,
    /// For people.
    pub description: Box<str>,
    /// Above 0: only shown with `-o wide`.
    pub priority: i32,
    /// A JSONPath without its outer braces, such as `.spec.nodeName`; for a built-in kind
    /// whose cell is computed, empty.
    pub path: Box<str>,
}

impl Resource {
    /// The name under which it is kept and under which rules name it: plural and group, such as
    /// `pods` and `virtualmachines.kubevirt.io`.
    pub fn key(&self) -> String {
        match &*self.group {
            "" => self.plural.to_string(),
            group => format!("{}.{group}", self.plural),
        }
    }

    /// As in `apiVersion`.
    pub fn api_version(&self) -> String {
        match &*self.group {
            "" => self.version.to_string(),
            group => format!("{group}/{}", self.version),
        }
    }
}

impl Resource {
    /// Under which objects are kept. Events are the same in both of their groups.
    pub fn storage_key(&self) -> String {
        self.key()
    }

    /// Whether a stored object is served as it is.
    pub fn serves_as_stored(&self, stored: &serde_json::Value) -> bool {
        stored["apiVersion"] == self.api_version()
    }

    /// A stored object in this version. Versions of a CRD differ in their name alone
    /// (`conversion.strategy: None`).
    pub fn to_served(&self, stored: &serde_json::Value) -> serde_json::Value {
        let mut object = stored.clone();
        if let Some(root) = object.as_object_mut() {
            root.insert("apiVersion".into(), self.api_version().into());
        }
        self.schema.prune(&mut object);
        self.schema.fill_in(&mut object);
        object
    }

    /// An object as it is kept.
    pub fn to_stored(&self, mut object: serde_json::Value) -> serde_json::Value {
        let version = match &*self.group {
            "" => self.storage_version.to_string(),
            group => format!("{group}/{}", self.storage_version),
        };
        if let Some(root) = object.as_object_mut() {
            root.insert("apiVersion".into(), version.into());
        }
        object
    }
}
