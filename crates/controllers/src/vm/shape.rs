//! A VM's template with all that it takes from its instancetype and its preference. Pure.

use super::plan::{Action, Plan, Snapshot, Wish};
use api::conditions::{Condition, types};
use api::instancetype::{Expanded, Found, Trouble, What, revision, template};
use api::vm::Status;
use kube::{Resource, ResourceExt};
use serde_json::json;

/// The template with all that the VM takes, or why it cannot have that.
pub(super) type Shape = Result<Expanded, Trouble>;

/// The template with all that the VM takes.
pub(super) fn shape(snapshot: &Snapshot) -> Shape {
    template(&snapshot.vm.spec, &snapshot.taken)
}

/// Pins what the VM takes: it starts from nothing that is not. Whether anything was not.
pub(super) fn pin(snapshot: &Snapshot, status: &mut Status, plan: &mut Plan) -> bool {
    let vm = &snapshot.vm;
    let (namespace, name) = (vm.namespace().unwrap_or_default(), vm.name_any());
    for what in What::ALL {
        let taken = snapshot.taken.iter().find(|taken| taken.wanted.kind.what == what);
        // N.B. of one that is missing nothing is known: what is said of it is what was.
        match taken {
            Some(taken) if taken.object().is_some() => {
                *what.pinned_mut(status) = Some(taken.pinned(&name));
            }
            Some(_) => {}
            None => *what.pinned_mut(status) = None,
        }
        let Some((taken, Found::Live(object))) = taken.map(|taken| (taken, &taken.found)) else {
            continue;
        };
        let mut made = revision(&namespace, &taken.revision(&name), object);
        made["metadata"]["ownerReferences"] = json!([vm.controller_owner_ref(&())]);
        plan.actions.push(Action::Pin(made));
    }
    plan.actions.iter().any(|action| matches!(action, Action::Pin(_)))
}

/// A wish as far as it can be followed: a VM that cannot have what it takes does not start.
pub(super) fn as_it_can(wish: Wish, shape: &Shape) -> Wish {
    match wish {
        Wish::Start { .. } if shape.is_err() => Wish::Nothing,
        other => other,
    }
}

/// What is told of a VM that cannot have what it takes.
pub(super) fn condition(trouble: &Trouble) -> Condition {
    Condition::new(types::FAILURE, true, trouble.reason, &trouble.message)
}

/// Tells it once.
pub(super) fn tell(trouble: &Trouble, before: &Status, plan: &mut Plan) {
    let told = before.conditions.iter().any(|condition| {
        condition.kind == types::FAILURE && condition.message.as_ref() == Some(&trouble.message)
    });
    if !told {
        let Trouble { reason, message } = trouble.clone();
        plan.actions.push(Action::Say { warning: true, reason, message });
    }
}
