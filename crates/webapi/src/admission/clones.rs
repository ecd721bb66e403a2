//! Who may clone a claim of another namespace.
//!
//! As CDI has it: who may `create` `datavolumes/source` there, or pods, which could read the claim as
//! well. For the disks of a VM the VM's service account will do, too, as KubeVirt has it: who may
//! make VMs could run as it.

use super::writers::OWN;
use super::{Denied, kind};
use api::CDI;
use api::datavolume::FromClaim;
use apiserver::auth::{AUTHENTICATED, Attributes, User};
use apiserver::extension::Review;
use apiserver::request::Verb;
use serde_json::Value;

const ACCOUNTS: &str = "system:serviceaccounts";

/// The claims of other namespaces that an object clones, and did not before.
pub fn foreign(review: &Review<'_>, object: Option<&Value>) -> Vec<FromClaim> {
    let asked = matches!(review.verb, Verb::Create | Verb::Update | Verb::Patch);
    let own = OWN.contains(&&*review.user.name);
    let Some(object) = object.filter(|_| asked && !own && review.subresource.is_empty()) else {
        return Vec::new();
    };
    let before: Vec<FromClaim> =
        review.old.map(|old| sources(review, old)).into_iter().flatten().collect();
    let mut all = sources(review, object);
    all.retain(|source| source.namespace_in(review.namespace) != review.namespace);
    all.retain(|source| !before.contains(source));
    all
}

/// The claims that an object clones. What is no DataVolume is judged elsewhere.
fn sources(review: &Review<'_>, object: &Value) -> Vec<FromClaim> {
    let specs: Vec<&Value> = match kind(review.group, review.resource) {
        Some("DataVolume") => vec![&object["spec"]],
        Some("VirtualMachine") => {
            let templates = object["spec"]["dataVolumeTemplates"].as_array();
            templates.into_iter().flatten().map(|template| &template["spec"]).collect()
        }
        _ => Vec::new(),
    };
    let claims = specs.into_iter().map(|spec| &spec["source"]["pvc"]);
    claims.filter_map(|claim| serde_json::from_value(claim.clone()).ok()).collect()
}

/// For whose sake it may be: who writes, and the account of the VM.
pub fn askers(review: &Review<'_>, object: Option<&Value>) -> Vec<User> {
    let mut all = vec![review.user.clone()];
    if kind(review.group, review.resource) == Some("VirtualMachine") {
        let volumes = object.and_then(|o| o["spec"]["template"]["spec"]["volumes"].as_array());
        let named = volumes
            .into_iter()
            .flatten()
            .find_map(|volume| volume["serviceAccount"]["serviceAccountName"].as_str());
        let namespace = review.namespace;
        let name = format!("system:serviceaccount:{namespace}:{}", named.unwrap_or("default"));
        let groups = [ACCOUNTS, &format!("{ACCOUNTS}:{namespace}"), AUTHENTICATED];
        all.push(User::new(&name, &groups));
    }
    all
}

/// What lets clone a claim: each alone.
pub fn permissions(source: &FromClaim) -> [Attributes; 2] {
    let create = |group: &str, resource: &str, subresource: &str| Attributes {
        verb: "create".into(),
        group: group.into(),
        resource: resource.into(),
        subresource: subresource.into(),
        namespace: source.namespace.clone(),
        name: source.name.clone(),
        ..Attributes::default()
    };
    [create(CDI, "datavolumes", "source"), create("", "pods", "")]
}

/// Why they may not be cloned.
pub fn denied(review: &Review<'_>, sources: &[FromClaim]) -> Option<Denied> {
    let first = sources.first()?;
    Some(Denied::to_user(format!(
        "User {:?} has insufficient permissions in clone source namespace {}: to clone claim {} it \
         takes the right to create datavolumes/source of {CDI}, or pods, there",
        review.user.name, first.namespace, first.name
    )))
}

#[cfg(test)]
mod test {
    use super::*;
    use serde_json::json;

    #[test]
    fn only_claims_of_other_namespaces_that_are_new_are_asked_for() {
        let user = User::new("editor", &[]);
        let claim = |namespace: &str, name: &str| FromClaim {
            namespace: namespace.into(),
            name: name.into(),
        };
        let vm = |claims: &[(&str, &str)]| {
            let template = |(namespace, name): &(&str, &str)| json!({"spec": {"source": {"pvc": {"namespace": namespace, "name": name}}}});
            let templates: Vec<Value> = claims.iter().map(template).collect();
            json!({"spec": {"dataVolumeTemplates": templates}})
        };
        let old = vm(&[("a", "old")]);
        let new = vm(&[("a", "old"), ("a", "new"), ("own", "x"), ("", "y"), ("b", "old")]);
        let mut review = Review {
            verb: Verb::Update,
            group: api::KUBEVIRT,
            resource: "virtualmachines",
            subresource: "",
            namespace: "own",
            name: "",
            dry_run: false,
            user: &user,
            old: Some(&old),
        };
        assert_eq!(foreign(&review, Some(&new)), [claim("a", "new"), claim("b", "old")]);
        let askers = askers(&review, Some(&new));
        assert_eq!(askers[1].name, "system:serviceaccount:own:default");
        review.subresource = "status";
        assert_eq!(foreign(&review, Some(&new)), []);
        let odd = json!({"spec": {"source": {"pvc": 7}, "dataVolumeTemplates": {"a": 1}}});
        review.subresource = "";
        assert_eq!(foreign(&review, Some(&odd)), []);
    }
}
