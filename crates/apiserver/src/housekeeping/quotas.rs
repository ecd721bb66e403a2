//! What quotas say is used, counted anew; and what disruption budgets allow.

use super::{all, kept, whenever};
use crate::api::Api;
use crate::local::Local;
use crate::quota::{self, Usage};
use crate::selector::Labels;
use crate::{kinds, meta};
use serde_json::{Value, json};

const BUDGETS: &str = "poddisruptionbudgets.policy";

pub(super) async fn run(api: Api, account: Local) {
    let act = async || {
        count(&api, &account).await?;
        budgets(&api, &account).await
    };
    let watched = [
        "resourcequotas",
        "pods",
        "persistentvolumeclaims",
        "configmaps",
        "secrets",
        "services",
        BUDGETS,
    ];
    whenever(&api, "quotas", &watched, act).await;
}

async fn count(api: &Api, account: &Local) -> Result<(), crate::status::Failure> {
    let quotas = all(api, "resourcequotas");
    if quotas.is_empty() {
        return Ok(());
    }
    let kept = kept(api);
    for quota in quotas {
        let namespace = meta::text(&quota, "namespace");
        let mut used = Usage::default();
        for key in kept.keys().filter(|key| *key != "resourcequotas") {
            let own = all(api, key);
            let own = own.iter().filter(|o| meta::text(o, "namespace") == namespace);
            for object in own.filter(|o| quota::is_in_scope(&quota, key, o)) {
                used = used.plus(&quota::usage(key, object));
            }
        }
        let next = used.into_status(&quota);
        if next["status"] != quota["status"] {
            let path = format!(
                "/api/v1/namespaces/{namespace}/resourcequotas/{}/status",
                meta::text(&quota, "name")
            );
            // Of the revision that was counted: what was booked meanwhile is not lost.
            let revision = meta::text(&quota, "resourceVersion");
            let patch =
                json!({"metadata": {"resourceVersion": revision}, "status": next["status"]});
            account.merge(&path, &patch).await?;
        }
    }
    Ok(())
}

async fn budgets(api: &Api, account: &Local) -> Result<(), crate::status::Failure> {
    let pods = all(api, "pods");
    for budget in all(api, BUDGETS) {
        let namespace = meta::text(&budget, "namespace");
        let selector =
            Labels::from_object(&budget["spec"]["selector"]).ok().flatten().unwrap_or_default();
        let own: Vec<&Value> = pods
            .iter()
            .map(|pod| &**pod)
            .filter(|pod| {
                meta::text(pod, "namespace") == namespace
                    && selector.matches(meta::map(pod, "labels"))
            })
            .collect();
        let status = kinds::budget_status(&budget, &own);
        let known = status.as_object().into_iter().flatten();
        if known.into_iter().any(|(field, value)| budget["status"][field] != *value) {
            let path = format!(
                "/apis/policy/v1/namespaces/{namespace}/poddisruptionbudgets/{}/status",
                meta::text(&budget, "name")
            );
            account.merge(&path, &json!({"status": status})).await?;
        }
    }
    Ok(())
}
