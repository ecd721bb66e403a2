//! A claim stays while pods use it, a volume while it is bound.

use super::{all, whenever};
use crate::api::Api;
use crate::local::Local;
use crate::meta;
use serde_json::{Value, json};

const CLAIM: &str = "kubernetes.io/pvc-protection";
const VOLUME: &str = "kubernetes.io/pv-protection";

fn uses(pod: &Value, claim: &Value) -> bool {
    let ended = matches!(pod["status"]["phase"].as_str(), Some("Succeeded" | "Failed"));
    let volumes = pod["spec"]["volumes"].as_array().into_iter().flatten();
    !ended
        && meta::text(pod, "namespace") == meta::text(claim, "namespace")
        && volumes
            .into_iter()
            .any(|v| v["persistentVolumeClaim"]["claimName"] == meta::text(claim, "name"))
}

fn without(object: &Value, name: &str) -> Value {
    let left: Vec<_> = meta::finalizers(object).into_iter().filter(|f| *f != name).collect();
    json!({"metadata": {"finalizers": left, "resourceVersion": meta::text(object, "resourceVersion")}})
}

pub(super) async fn run(api: Api, account: Local) {
    let act = async || {
        let leaves = |object: &Value, name: &str| {
            meta::is_terminating(object) && meta::finalizers(object).contains(&name)
        };
        let pods = all(&api, "pods");
        for claim in all(&api, "persistentvolumeclaims") {
            if leaves(&claim, CLAIM) && !pods.iter().any(|pod| uses(pod, &claim)) {
                let (namespace, name) =
                    (meta::text(&claim, "namespace"), meta::text(&claim, "name"));
                let path = format!("/api/v1/namespaces/{namespace}/persistentvolumeclaims/{name}");
                account.merge(&path, &without(&claim, CLAIM)).await?;
            }
        }
        for volume in all(&api, "persistentvolumes") {
            if leaves(&volume, VOLUME) && volume["status"]["phase"] != "Bound" {
                let path = format!("/api/v1/persistentvolumes/{}", meta::text(&volume, "name"));
                account.merge(&path, &without(&volume, VOLUME)).await?;
            }
        }
        Ok(())
    };
    whenever(&api, "protection", &["pods", "persistentvolumeclaims", "persistentvolumes"], act)
        .await;
}
