//! Objects that a VM names: they go along with it, or must be there.

use super::offer::{MOVE, Offer};
use crate::world::World;
use kube::Api;
use kube::api::{ApiResource, DeleteParams, DynamicObject, ListParams, PostParams};
use kube::{Client, ResourceExt};
use reconcile::events::why;
use serde_json::Value;

/// A kind of such objects.
pub struct Kind {
    /// Its name.
    pub name: &'static str,
    group: &'static str,
    version: &'static str,
    plural: &'static str,
    /// What its objects say.
    says: &'static [&'static str],
    other: Other,
}

/// What becomes of a VM where another object of that name is there.
#[derive(PartialEq)]
enum Other {
    /// It gets that one.
    Kept,
    /// It does not come.
    Refused,
    /// The same, and none is made: it is for the whole cluster.
    OfCluster,
}

const fn core(name: &'static str, plural: &'static str) -> Kind {
    let says = &["data", "binaryData"];
    Kind { name, group: "", version: "v1", plural, says, other: Other::Kept }
}

const fn taken(name: &'static str, plural: &'static str, other: Other) -> Kind {
    use api::instancetype::{GROUP, VERSION};
    Kind { name, group: GROUP, version: VERSION, plural, says: &["spec"], other }
}

static KINDS: [Kind; 6] = [
    core("Secret", "secrets"),
    core("ConfigMap", "configmaps"),
    taken("VirtualMachineInstancetype", "virtualmachineinstancetypes", Other::Refused),
    taken("VirtualMachinePreference", "virtualmachinepreferences", Other::Refused),
    taken(
        "VirtualMachineClusterInstancetype",
        "virtualmachineclusterinstancetypes",
        Other::OfCluster,
    ),
    taken("VirtualMachineClusterPreference", "virtualmachineclusterpreferences", Other::OfCluster),
];

impl Kind {
    /// That of a name.
    pub fn named(name: &str) -> Option<&'static Kind> {
        KINDS.iter().find(|kind| kind.name == name)
    }

    /// Those of which objects are made.
    pub fn made() -> impl Iterator<Item = &'static Kind> {
        KINDS.iter().filter(|kind| kind.other != Other::OfCluster)
    }

    /// The API of its objects.
    pub fn api(&self, client: Client, namespace: &str) -> Api<DynamicObject> {
        let version = match self.group {
            "" => self.version.to_owned(),
            group => format!("{group}/{}", self.version),
        };
        let resource = ApiResource {
            group: self.group.into(),
            version: self.version.into(),
            api_version: version,
            kind: self.name.into(),
            plural: self.plural.into(),
        };
        match self.other {
            Other::OfCluster => Api::all_with(client, &resource),
            _ => Api::namespaced_with(client, namespace, &resource),
        }
    }

    /// Whether two of its objects say the same.
    fn is_same(&self, object: &Value, there: &DynamicObject) -> bool {
        self.says.iter().all(|field| {
            object.get(*field).unwrap_or(&Value::Null)
                == there.data.get(*field).unwrap_or(&Value::Null)
        })
    }
}

/// Makes an object that a VM names; or tries only whether it could. What is there already is let be.
/// Returns what is worth knowing.
///
/// # Errors
/// Why the VM cannot come.
pub async fn bring(
    world: &World,
    object: &Value,
    offer: &Offer,
    id: &str,
    try_only: bool,
) -> Result<Option<String>, String> {
    let text = |field: &str| object["metadata"][field].as_str().unwrap_or_default();
    let kind = object["kind"].as_str().unwrap_or_default();
    let kind = Kind::named(kind).ok_or_else(|| format!("no {kind} comes along with a VM"))?;
    let (namespace, name) = (text("namespace"), text("name"));
    let cluster = world.cluster();
    let of_cluster = kind.other == Other::OfCluster;
    let called = match of_cluster {
        true => format!("{} {name}", kind.name),
        false => format!("{} {namespace}/{name}", kind.name),
    };
    if !of_cluster && namespace != offer.namespace {
        return Err(format!("{called} is not of the VM's namespace"));
    }
    let api = kind.api(world.client.clone(), namespace);
    if let Some(there) = api.get_opt(name).await.map_err(|error| why(&error))? {
        let own = there.labels().get(MOVE).is_some_and(|of| of == id);
        return match (own || kind.is_same(object, &there), &kind.other) {
            (true, _) => Ok(None),
            (false, Other::Kept) => {
                Ok(Some(format!("{called} is there already, and is another: it is kept")))
            }
            (false, _) => Err(format!(
                "{called} of cluster {cluster} says something else than the VM's own: make them \
                 alike, or give one another name"
            )),
        };
    }
    if of_cluster {
        return Err(format!("cluster {cluster} has no {called}: make it there as it is here"));
    }
    let made: DynamicObject =
        serde_json::from_value(object.clone()).map_err(|error| error.to_string())?;
    let params = PostParams { dry_run: try_only, ..PostParams::default() };
    match api.create(&params, &made).await {
        Err(kube::Error::Api(status)) if status.reason == "AlreadyExists" => Ok(None),
        other => other.map(|_| None).map_err(|error| format!("{called}: {}", why(&error))),
    }
}

/// Takes away what was made for a move.
///
/// # Errors
/// Those of the API, for people.
pub async fn take_away(world: &World, namespace: &str, id: &str) -> Result<(), String> {
    let made = ListParams::default().labels(&format!("{MOVE}={id}"));
    for kind in Kind::made() {
        let api = kind.api(world.client.clone(), namespace);
        for object in api.list(&made).await.map_err(|error| why(&error))? {
            let _ = api.delete(&object.name_any(), &DeleteParams::default()).await;
        }
    }
    Ok(())
}
