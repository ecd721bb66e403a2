//! Every namespace has the account `default` and the cluster's CA.

use super::{all, whenever};
use crate::api::Api;
use crate::local::Local;
use crate::meta;
use serde_json::{Value, json};

const CA: &str = "kube-root-ca.crt";

/// What a namespace lacks: path and object.
fn plan(
    namespaces: &[&Value],
    has: impl Fn(&str, &str) -> bool,
    authority: &str,
) -> Vec<(String, Value)> {
    let mut missing = Vec::new();
    for namespace in namespaces.iter().filter(|n| !meta::is_terminating(n)) {
        let name = meta::text(namespace, "name");
        let path = format!("/api/v1/namespaces/{name}");
        if !has("serviceaccounts", name) {
            let account = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}});
            missing.push((format!("{path}/serviceaccounts"), account));
        }
        if !has("configmaps", name) {
            let map = json!({
                "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": CA},
                "data": {"ca.crt": authority},
            });
            missing.push((format!("{path}/configmaps"), map));
        }
    }
    missing
}

pub(super) async fn run(api: Api, account: Local, authority: String) {
    let act = async || {
        let namespaces = all(&api, "namespaces");
        let namespaces: Vec<&Value> = namespaces.iter().map(|n| &**n).collect();
        let has = |resource: &str, namespace: &str| {
            let name = if resource == "configmaps" { CA } else { "default" };
            api.store().get(&crate::store::Key::new(resource, namespace, name)).is_some()
        };
        for (path, object) in plan(&namespaces, has, &authority) {
            account.ensure(&path, &object).await?;
        }
        Ok(())
    };
    whenever(&api, "accounts", &["namespaces", "serviceaccounts", "configmaps"], act).await;
}
