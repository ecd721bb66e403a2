//! Whether Godwit's own roles are ready, as KubeVirt's operator tells it in the settings' status:
//! what their pods say, and nothing else.

use api::conditions::{self, Condition};
use api::kubevirt::Status;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;

/// The label of a role's pods: which role it is.
pub const LABEL: &str = "kubevirt.io";
/// The roles without which no guest can be begun or moved.
pub const ROLES: [&str; 3] = ["virt-api", "virt-controller", "virt-handler"];
/// The phase from when all were ready for the first time.
const DEPLOYED: &str = "Deployed";
/// The phase until then.
const DEPLOYING: &str = "Deploying";

/// Whether a pod is ready.
fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let ready = conditions.filter(|c| c.type_ == "Ready").any(|c| c.status == "True");
    ready && pod.metadata.deletion_timestamp.is_none()
}

/// What a status becomes by what the pods of roles say: its phase, and the conditions `Available`
/// (of every role somebody is ready), `Progressing` (not all were ready so far) and `Degraded` (they
/// were, and now a pod is not).
pub fn judge(old: &Status, pods: &[impl AsRef<Pod>], now: Timestamp) -> Status {
    let pods = || pods.iter().map(AsRef::as_ref);
    let of = |pod: &Pod, role: &str| pod.labels().get(LABEL).is_some_and(|own| own == role);
    let serves = |role: &str| pods().any(|pod| of(pod, role) && is_ready(pod));
    let missing: Vec<_> = ROLES.into_iter().filter(|role| !serves(role)).collect();
    let mut lacking: Vec<_> = missing.iter().map(|role| format!("any {role}")).collect();
    lacking
        .extend(pods().filter(|pod| !is_ready(pod)).map(|pod| format!("pod {}", pod.name_any())));
    lacking.sort();

    let deployed = old.phase == DEPLOYED || lacking.is_empty();
    let (reason, message) = match (lacking.is_empty(), deployed) {
        (true, _) => ("AllComponentsReady", "All components are ready.".to_owned()),
        (false, true) => ("ComponentsNotReady", format!("not ready: {}", lacking.join(", "))),
        (false, false) => ("DeploymentInProgress", format!("not ready: {}", lacking.join(", "))),
    };
    let new = [
        ("Available", missing.is_empty()),
        ("Progressing", !deployed),
        ("Degraded", deployed && !lacking.is_empty()),
    ];
    let new = new.map(|(kind, holds)| Condition::new(kind, holds, reason, &message)).to_vec();
    Status {
        phase: if deployed { DEPLOYED } else { DEPLOYING }.into(),
        conditions: conditions::merge(&old.conditions, new, &[], now),
        ..old.clone()
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use serde_json::json;
    use std::sync::Arc;

    fn pod(role: &str, name: &str, ready: &str) -> Arc<Pod> {
        let pod = json!({
            "metadata": {"name": name, "labels": {LABEL: role}},
            "status": {"conditions": [{"type": "Ready", "status": ready}]},
        });
        Arc::new(serde_json::from_value(pod).unwrap())
    }

    /// Available, Progressing, Degraded.
    fn said(status: &Status) -> [bool; 3] {
        ["Available", "Progressing", "Degraded"]
            .map(|kind| conditions::is(&status.conditions, kind))
    }

    #[test]
    fn conditions_say_what_the_pods_say() {
        let now = Timestamp::UNIX_EPOCH;
        let api = pod("virt-api", "api", "True");
        let controller = |ready| pod("virt-controller", "controller", ready);
        let handler = |node, ready| pod("virt-handler", node, ready);
        let none = judge(&Status::default(), &[] as &[Arc<Pod>], now);
        assert_eq!((said(&none), &*none.phase), ([false, true, false], DEPLOYING));

        let starts = [api.clone(), controller("True"), handler("one", "False")];
        let starts = judge(&none, &starts, now);
        assert_eq!((said(&starts), &*starts.phase), ([false, true, false], DEPLOYING));

        let all = [api.clone(), controller("True"), handler("one", "True")];
        let all = judge(&starts, &all, now);
        assert_eq!((said(&all), &*all.phase), ([true, false, false], DEPLOYED));

        let one =
            [api.clone(), controller("True"), handler("one", "True"), handler("two", "False")];
        let one = judge(&all, &one, now);
        assert_eq!((said(&one), &*one.phase), ([true, false, true], DEPLOYED));
        let message = one.conditions[0].message.as_deref();
        assert_eq!(message, Some("not ready: pod two"));

        let no_controller = [api, controller("False"), handler("one", "True")];
        let no_controller = judge(&all, &no_controller, now);
        assert_eq!((said(&no_controller), &*no_controller.phase), ([false, false, true], DEPLOYED));
    }
}
