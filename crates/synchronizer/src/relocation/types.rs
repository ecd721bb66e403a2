//! The instancetype and the preference of a VM that goes to another cluster. Pure.
//!
//! The guest is the machine that it is: its VM names there what it names here if that says what the guest
//! has, by the same revision of it. Else the VM there has all of it in its template.

use super::offer::MOVE;
use api::instancetype::{KINDS, Matcher, Taken, Types, What, apply, revision, template};
use api::vm::VirtualMachine;
use kube::ResourceExt;
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// How a VM names elsewhere what it takes.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Naming {
    /// By which field it names which.
    pub matchers: Vec<(&'static str, Matcher)>,
    /// The template, without what the instancetype says.
    pub template: Value,
    /// The revisions that hold what it names.
    pub revisions: Vec<Value>,
}

/// How a VM whose VMI has this spec names what it takes in a namespace of another cluster.
///
/// # Errors
/// Why it cannot.
pub fn naming(
    vm: &VirtualMachine,
    machine: &Value,
    taken: &[Taken],
    namespace: &str,
) -> Result<Naming, String> {
    let shape = template(&vm.spec, taken).map_err(|trouble| trouble.message)?;
    let rest = shape.without_instancetype(machine);
    let again = apply(&rest, &BTreeMap::new(), types(taken));
    if !again.is_ok_and(|again| again.spec == *machine) {
        return Err("the guest has something else since it was started".into());
    }
    let mut naming = Naming { template: rest, ..Naming::default() };
    for one in taken {
        let Some(object) = one.object() else { continue };
        let name = one.revision(&vm.name_any());
        naming.revisions.push(revision(namespace, &name, object));
        let matcher = Matcher {
            name: one.wanted.name.clone(),
            kind: Some(one.wanted.kind.name.into()),
            revision_name: Some(name),
        };
        naming.matchers.push((one.wanted.kind.what.field(), matcher));
    }
    Ok(naming)
}

fn types(taken: &[Taken]) -> Types<'_> {
    Types::of(taken.iter().filter_map(|one| Some((one.wanted.kind.what, one.object()?))))
}

/// What a revision's object is. None: it is none that a VM takes.
pub fn what(held: &Value) -> Option<What> {
    KINDS.iter().find(|kind| held["kind"] == kind.name).map(|kind| kind.what)
}

/// A template with all that a VM takes, as revisions hold it.
pub fn machine(template: &Value, revisions: &[Value]) -> Value {
    let held = revisions.iter().map(|revision| &revision["data"]);
    let types = Types::of(held.filter_map(|held| Some((what(held)?, held))));
    // N.B. one that says all of it by itself needs none.
    apply(template, &BTreeMap::new(), types)
        .map_or_else(|_| template.clone(), |applied| applied.spec)
}

/// An instancetype or a preference as another cluster is to have it.
pub fn brought(object: &Value, namespace: Option<&str>, id: &str) -> Value {
    let mut made = json!({
        "apiVersion": object["apiVersion"], "kind": object["kind"],
        "metadata": {"name": object["metadata"]["name"], "labels": {MOVE: id}},
        "spec": object["spec"],
    });
    if let Some(namespace) = namespace {
        made["metadata"]["namespace"] = namespace.into();
    }
    made
}

#[cfg(test)]
mod test {
    use super::*;
    use api::instancetype::wanted;

    #[test]
    fn a_vm_names_elsewhere_what_says_what_its_guest_has_and_nothing_else() {
        let vm: VirtualMachine = serde_json::from_value(json!({
            "metadata": {"name": "web", "namespace": "a"},
            "spec": {
                "runStrategy": "Always", "template": {"spec": {"domain": {"devices": {}}}},
                "instancetype": {"name": "small", "kind": "VirtualMachineInstancetype"},
                "preference": {"name": "plain"},
            },
        }))
        .expect("a VM");
        let object = |kind: &str, name: &str, spec: Value| json!({"kind": kind, "metadata": {"name": name, "uid": "1", "generation": 1}, "spec": spec});
        let small = json!({"cpu": {"guest": 2}, "memory": {"guest": "64Mi"}});
        let plain = json!({"cpu": {"preferredCPUTopology": "cores"}, "preferredSubdomain": "s"});
        let lives = [
            object("VirtualMachineInstancetype", "small", small),
            object("VirtualMachineClusterPreference", "plain", plain),
        ];
        let taken: Vec<Taken> = wanted(&vm.spec, None)
            .into_iter()
            .zip(lives)
            .map(|(one, live)| one.found(None, Some(live)))
            .collect();
        let machine = json!({
            "domain": {
                "cpu": {"sockets": 1, "cores": 2, "threads": 1, "model": "host-model"},
                "memory": {"guest": "64Mi"}, "devices": {},
            },
            "subdomain": "s",
        });
        let naming = |machine: &Value| super::naming(&vm, machine, &taken, "b");
        let named = naming(&machine).expect("it says what the guest has");
        assert_eq!(named.template["domain"]["memory"], json!({}));
        assert_eq!(named.template["domain"]["cpu"], json!({"model": "host-model"}));
        let names: Vec<_> = named.matchers.iter().map(|(field, m)| (*field, &*m.name)).collect();
        assert_eq!(names, [("instancetype", "small"), ("preference", "plain")]);
        let held = &named.revisions[0];
        assert_eq!(held["metadata"]["namespace"], "b");
        assert_eq!(held["metadata"]["name"], "web-small-v1beta1-1-1");
        assert_eq!(super::machine(&named.template, &named.revisions), machine);
        // The guest was started before it was changed, or before its VM named another.
        let mut other = machine.clone();
        other["domain"]["memory"]["guest"] = "128Mi".into();
        assert!(naming(&other).is_err());
        assert_eq!(super::machine(&other, &[]), other);
    }
}
