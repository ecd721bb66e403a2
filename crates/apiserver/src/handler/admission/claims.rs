//! Claims: their class, and whether they may grow.

use super::super::Handler;
use crate::meta;
use crate::status::{Failure, Subject};
use serde_json::{Value, json};

const CLASSES: &str = "storageclasses.storage.k8s.io";
const DEFAULT: &str = "storageclass.kubernetes.io/is-default-class";

/// Protects a claim while pods use it, and gives it the default class if it names none.
pub(super) fn fill_in(handler: &Handler, claim: &mut Value) {
    meta::add_finalizer(claim, "kubernetes.io/pvc-protection");
    let named = !claim["spec"]["storageClassName"].is_null()
        || meta::map(claim, "annotations")
            .is_some_and(|a| a.contains_key("volume.beta.kubernetes.io/storage-class"));
    if named || !claim["spec"].is_object() {
        return;
    }
    let is_default = |class: &Value| {
        meta::map(class, "annotations").and_then(|a| a.get(DEFAULT)) == Some(&json!("true"))
    };
    let classes = handler.all(CLASSES);
    let defaults = classes.iter().filter(|class| is_default(&class.body));
    // Of several, the youngest; of those of one second, the first by name.
    let chosen = defaults.max_by(|one, other| {
        let age = |class: &Value| meta::text(class, "creationTimestamp").to_owned();
        let names = || meta::text(&other.body, "name").cmp(meta::text(&one.body, "name"));
        age(&one.body).cmp(&age(&other.body)).then_with(names)
    });
    if let Some(class) = chosen {
        claim["spec"]["storageClassName"] = meta::text(&class.body, "name").into();
    }
}

/// A claim grows only where its class lets it.
///
/// # Errors
/// 403 when it does not.
pub(super) fn admit(handler: &Handler, new: &Value, old: Option<&Value>) -> Result<(), Failure> {
    let Some(old) = old else { return Ok(()) };
    let asked = |claim: &Value| claim["spec"]["resources"]["requests"]["storage"].clone();
    let grows =
        crate::quantity::compare(&asked(new), &asked(old)) == Some(std::cmp::Ordering::Greater);
    if !grows {
        return Ok(());
    }
    let what = Subject { group: "", kind: "persistentvolumeclaims", name: meta::text(new, "name") };
    if old["status"]["phase"] != "Bound" {
        return Err(Failure::forbidden(
            what,
            "Only bound persistent volume claims can be expanded",
        ));
    }
    let class = new["spec"]["storageClassName"].as_str().unwrap_or_default();
    let class = handler.look_up(CLASSES, "", class);
    match class.is_some_and(|class| class.body["allowVolumeExpansion"] == true) {
        true => Ok(()),
        false => Err(Failure::forbidden(
            what,
            "only dynamically provisioned pvc can be resized and the storageclass that provisions \
             the pvc must support resize",
        )),
    }
}
