//! Who may write what controllers and handlers rely on.

use super::{Denied, kind};
use api::keys;
use apiserver::auth::{MASTERS, User};
use apiserver::extension::Review;
use apiserver::request::Verb;
use serde_json::Value;

/// Users that are parts of Godwit.
pub const OWN: [&str; 4] = [
    "system:serviceaccount:kubevirt:godwit-controller",
    "system:serviceaccount:kubevirt:godwit-handler",
    "system:serviceaccount:kubevirt:godwit-api",
    "system:serviceaccount:kubevirt:godwit-synchronizer",
];
/// Handlers, by their nodes.
const HANDLER: &str = "system:godwit:handler:";
/// What a token says of the node that its pod is on.
const ON_NODE: &str = "authentication.kubernetes.io/node-name";
/// Parts of Kubernetes that clear away.
const CLEANERS: [&str; 2] = ["generic-garbage-collector", "namespace-controller"];

/// Labels of a VMI by which it is found: whoever sets them decides who acts on it.
const RESERVED: [&str; 3] = [keys::NODE, keys::CREATED_BY, keys::TARGET_NODE];

enum Writer<'a> {
    /// Godwit, anywhere.
    Own,
    /// Godwit, at a node.
    Handler(&'a str),
    /// Kubernetes.
    Cleaner,
    /// A person who may do everything.
    Master,
    Other,
}

fn writer(user: &User) -> Writer<'_> {
    let name = &*user.name;
    let claimed = user.extra.get(ON_NODE).and_then(|all| all.first());
    if let Some(node) = name.strip_prefix(HANDLER).filter(|node| !node.is_empty()) {
        return Writer::Handler(node);
    }
    match (name, claimed) {
        ("system:serviceaccount:kubevirt:godwit-handler", Some(node)) => Writer::Handler(node),
        (name, _) if OWN.contains(&name) => Writer::Own,
        (name, _) if is_cleaner(name) => Writer::Cleaner,
        _ if user.is_in(MASTERS) => Writer::Master,
        _ => Writer::Other,
    }
}

fn is_cleaner(name: &str) -> bool {
    let part = name
        .strip_prefix("system:serviceaccount:kube-system:")
        .or_else(|| name.strip_prefix("system:"));
    part.is_some_and(|part| CLEANERS.contains(&part))
}

/// Whether a user is one of Godwit's own controllers, or may do everything.
pub fn is_own(user: &User) -> bool {
    matches!(writer(user), Writer::Own | Writer::Master)
}

/// Judges by who writes. Returns warnings.
pub fn judge(review: &Review<'_>, object: Option<&Value>) -> Result<Vec<String>, Denied> {
    match kind(review.group, review.resource) {
        Some("VirtualMachineInstance") => instance(review, object),
        Some("OwnerRecord") => owner(review, object),
        _ => Ok(Vec::new()),
    }
}

fn instance(review: &Review<'_>, object: Option<&Value>) -> Result<Vec<String>, Denied> {
    let writer = writer(review.user);
    if let Writer::Handler(node) = writer {
        return match review.old.is_some_and(|old| is_on(old, node)) {
            true => Ok(Vec::new()),
            false => Err(Denied::to_user(format!(
                "the handler of node '{node}' may change only instances on its node"
            ))),
        };
    }
    let Some(object) = object else { return Ok(Vec::new()) };
    let label = |of: Option<&Value>, name: &str| of.map(|o| o["metadata"]["labels"][name].clone());
    let changed = RESERVED.into_iter().find(|name| {
        label(Some(object), name).unwrap_or_default() != label(review.old, name).unwrap_or_default()
    });
    let what = match (changed, review.old) {
        (Some(name), _) => format!("label {name}"),
        (None, Some(old)) if old["spec"] != object["spec"] => "spec".into(),
        _ => return Ok(Vec::new()),
    };
    match writer {
        Writer::Own => Ok(Vec::new()),
        Writer::Master => {
            Ok(vec![format!("{what}: this is Godwit's to set; the guest that runs may not follow")])
        }
        _ => Err(Denied::to_user(format!(
            "only Godwit sets the {what} of an instance: change its VirtualMachine, and restart it"
        ))),
    }
}

/// Whether a VMI is on a node, on its way there, or about to have left it.
fn is_on(vmi: &Value, node: &str) -> bool {
    let (labels, status) = (&vmi["metadata"]["labels"], &vmi["status"]);
    let moves = &status["migrationState"];
    let over = moves["completed"] == true || moves["failed"] == true;
    // N.B. nodes of two clusters may have one name: those at the other end are none of ours.
    let leaves = moves["sourceNode"] == node && moves["sourceState"].is_null();
    let comes = moves["targetNode"] == node && moves["targetState"].is_null();
    let takes_part = !over && (leaves || comes);
    labels[keys::NODE] == node || status["nodeName"] == node || takes_part
}

fn owner(review: &Review<'_>, object: Option<&Value>) -> Result<Vec<String>, Denied> {
    let same = |field: &str| {
        object.zip(review.old).is_some_and(|(new, old)| new.get(field) == old.get(field))
    };
    match writer(review.user) {
        Writer::Own | Writer::Handler(_) => Ok(Vec::new()),
        Writer::Cleaner if review.verb == Verb::Delete || (same("spec") && same("status")) => {
            Ok(Vec::new())
        }
        Writer::Master => Ok(vec![
            "owner records are Godwit's to write: a wrong one lets two guests run on one disk"
                .into(),
        ]),
        _ => Err(Denied::to_user(
            "owner records say who may run a VM, and only Godwit writes them: delete the VM to be \
             rid of its record",
        )),
    }
}
