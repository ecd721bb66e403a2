//! All that is served at one moment.

use crate::builtin;
use crate::resource::{Column, Resource, Scale};
use crate::schema::Schema;
use crate::status::Cause;
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Group, version and plural.
type Place = (Box<str>, Box<str>, Box<str>);

/// Resources by group, version and plural. It never changes: another takes its place.
#[derive(Debug, Clone, Default)]
pub struct Catalog {
    by_path: BTreeMap<Place, Arc<Resource>>,
}

impl Catalog {
    /// Of the built-in resources and those of these CRDs, as far as they are established.
    pub fn new<'a>(builtin: &[Arc<Resource>], crds: impl IntoIterator<Item = &'a Value>) -> Self {
        let mut catalog = Self::default();
        for resource in builtin {
            catalog.add(resource.clone());
        }
        for crd in crds.into_iter().filter(|crd| is_established(crd)) {
            match of_crd(crd) {
                Ok(resources) => resources.into_iter().for_each(|r| catalog.add(Arc::new(r))),
                Err(causes) => {
                    // It was admitted once: by another version of this program.
                    let name = crate::meta::text(crd, "name");
                    tracing::error!(
                        crd = name,
                        ?causes,
                        "a CRD's schema is not understood: it is not served"
                    );
                }
            }
        }
        catalog
    }

    /// The built-in resources alone.
    pub fn of_builtin() -> Self {
        Self::new(&builtin::resources(), [])
    }

    fn add(&mut self, resource: Arc<Resource>) {
        let key = (resource.group.clone(), resource.version.clone(), resource.plural.clone());
        self.by_path.insert(key, resource);
    }

    /// The resource of a path.
    pub fn find(&self, group: &str, version: &str, plural: &str) -> Option<&Arc<Resource>> {
        self.by_path.get(&(group.into(), version.into(), plural.into()))
    }

    /// The resource of a kind.
    pub fn of_kind(&self, group: &str, version: &str, kind: &str) -> Option<&Arc<Resource>> {
        let fits =
            |r: &&Arc<Resource>| &*r.group == group && &*r.version == version && &*r.kind == kind;
        self.by_path.values().find(fits)
    }

    /// All, by group, version and plural.
    pub fn all(&self) -> impl Iterator<Item = &Arc<Resource>> {
        self.by_path.values()
    }

    /// The groups with their versions, the preferred one first. The core group is the first.
    pub fn groups(&self) -> BTreeMap<&str, Vec<&str>> {
        let mut groups: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for resource in self.all() {
            let versions = groups.entry(&resource.group).or_default();
            if !versions.contains(&&*resource.version) {
                versions.push(&resource.version);
            }
        }
        for versions in groups.values_mut() {
            versions.sort_by_key(|version| std::cmp::Reverse(rank(version)));
        }
        groups
    }

    /// The resources of a group and version.
    pub fn of_version<'a>(
        &'a self,
        group: &'a str,
        version: &'a str,
    ) -> impl Iterator<Item = &'a Arc<Resource>> {
        self.all().filter(move |r| &*r.group == group && &*r.version == version)
    }
}

/// How stable and how new a version is: `v2` before `v1` before `v2beta1` before `v1alpha1`
/// before anything else.
pub fn rank(version: &str) -> (u8, u64, u64) {
    let parse = || {
        let rest = version.strip_prefix('v')?;
        let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        let (major, rest) = rest.split_at(digits);
        let major: u64 = major.parse().ok()?;
        if rest.is_empty() {
            return Some((3, major, 0));
        }
        let (stage, minor) = match rest.strip_prefix("beta") {
            Some(minor) => (2, minor),
            None => (1, rest.strip_prefix("alpha")?),
        };
        Some((stage, major, minor.parse().ok()?))
    };
    parse().unwrap_or_default()
}

/// Whether a CRD's resources are served.
pub fn is_established(crd: &Value) -> bool {
    let conditions = crd["status"]["conditions"].as_array();
    conditions
        .is_some_and(|all| all.iter().any(|c| c["type"] == "Established" && c["status"] == "True"))
}

fn boxed(value: &Value) -> Box<str> {
    value.as_str().unwrap_or_default().into()
}

fn list(value: &Value) -> Vec<Box<str>> {
    value.as_array().into_iter().flatten().map(boxed).collect()
}

/// The resources of a CRD: one for each served version.
///
/// # Errors
/// What is wrong with its schemas.
pub fn of_crd(crd: &Value) -> Result<Vec<Resource>, Vec<Cause>> {
    let (spec, names) = (&crd["spec"], &crd["spec"]["names"]);
    let versions = spec["versions"].as_array().map(Vec::as_slice).unwrap_or_default();
    let storage = versions.iter().find(|v| v["storage"] == true);
    let storage = storage.map(|v| boxed(&v["name"])).unwrap_or_default();
    let mut resources = Vec::new();
    let mut causes = Vec::new();
    for (n, version) in versions.iter().enumerate() {
        let schema = match Schema::parse(&version["schema"]["openAPIV3Schema"]) {
            Ok(schema) => Arc::new(schema),
            Err(wrong) => {
                let at = format!("spec.versions[{n}].schema.openAPIV3Schema");
                causes.extend(wrong.into_iter().map(|c| within(&at, c)));
                continue;
            }
        };
        if version["served"] != true {
            continue;
        }
        let subresources = &version["subresources"];
        let scale = &subresources["scale"];
        let deprecated = version["deprecated"] == true;
        resources.push(Resource {
            group: boxed(&spec["group"]),
            version: boxed(&version["name"]),
            kind: boxed(&names["kind"]),
            list_kind: boxed(&names["listKind"]),
            plural: boxed(&names["plural"]),
            singular: boxed(&names["singular"]),
            short_names: list(&names["shortNames"]),
            categories: list(&names["categories"]),
            namespaced: spec["scope"] == "Namespaced",
            stored: true,
            status: subresources["status"].is_object(),
            subresources: Vec::new(),
            scale: scale.is_object().then(|| Scale {
                spec: boxed(&scale["specReplicasPath"]),
                status: boxed(&scale["statusReplicasPath"]),
                selector: scale["labelSelectorPath"].as_str().map(Into::into),
            }),
            schema,
            columns: columns(version),
            selectable: selectable(version),
            deprecated: deprecated.then(|| deprecation(crd, version)),
            crd: Some(crate::meta::text(crd, "name").into()),
            storage_version: storage.clone(),
        });
    }
    match causes.is_empty() {
        true => Ok(resources),
        false => Err(causes),
    }
}

fn within(at: &str, cause: Cause) -> Cause {
    let field = match (&*cause.field, cause.field.starts_with('[')) {
        ("", _) => at.to_owned(),
        (field, true) => format!("{at}{field}"),
        (field, false) => format!("{at}.{field}"),
    };
    Cause { field, ..cause }
}

fn columns(version: &Value) -> Vec<Column> {
    let given = version["additionalPrinterColumns"].as_array();
    let column = |c: &Value| Column {
        name: boxed(&c["name"]),
        kind: boxed(&c["type"]),
        format: boxed(&c["format"]),
        description: boxed(&c["description"]),
        priority: c["priority"].as_i64().and_then(|p| i32::try_from(p).ok()).unwrap_or(0),
        path: boxed(&c["jsonPath"]),
    };
    match given.filter(|given| !given.is_empty()) {
        Some(given) => given.iter().map(column).collect(),
        None => vec![Column {
            name: "Age".into(),
            kind: "date".into(),
            format: "".into(),
            description: "CreationTimestamp is a timestamp representing the server time when this \
                          object was created."
                .into(),
            priority: 0,
            path: ".metadata.creationTimestamp".into(),
        }],
    }
}

fn selectable(version: &Value) -> Vec<Box<str>> {
    let fields = version["selectableFields"].as_array().into_iter().flatten();
    let paths = fields.filter_map(|field| field["jsonPath"].as_str());
    paths.map(|path| path.trim_start_matches('.').into()).collect()
}

fn deprecation(crd: &Value, version: &Value) -> Box<str> {
    match version["deprecationWarning"].as_str() {
        Some(warning) => warning.into(),
        None => {
            let (group, name) = (boxed(&crd["spec"]["group"]), boxed(&version["name"]));
            let kind = boxed(&crd["spec"]["names"]["kind"]);
            format!("{group}/{name} {kind} is deprecated").into()
        }
    }
}
