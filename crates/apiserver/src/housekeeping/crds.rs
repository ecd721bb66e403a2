//! A CRD that is deleted takes its objects with it.

use super::{all, path_of, whenever};
use crate::api::Api;
use crate::local::Local;
use crate::meta;
use serde_json::json;

const CRDS: &str = "customresourcedefinitions.apiextensions.k8s.io";
const CLEANUP: &str = "customresourcecleanup.apiextensions.k8s.io";

pub(super) async fn run(api: Api, account: Local) {
    let act = async || {
        for crd in all(&api, CRDS) {
            let leaves = meta::is_terminating(&crd) && meta::finalizers(&crd).contains(&CLEANUP);
            if leaves {
                clear(&api, &account, &crd).await?;
            }
        }
        Ok(())
    };
    whenever(&api, "CRDs", &[CRDS], act).await;
}

async fn clear(
    api: &Api,
    account: &Local,
    crd: &serde_json::Value,
) -> Result<(), crate::status::Failure> {
    let name = meta::text(crd, "name");
    let catalog = api.catalog();
    let resource = catalog.all().find(|r| r.crd.as_deref() == Some(name)).cloned();
    if let Some(resource) = resource {
        let left = all(api, &resource.storage_key());
        for object in &left {
            let path =
                path_of(&resource, meta::text(object, "namespace"), meta::text(object, "name"));
            account.delete(&path, &json!({})).await?;
        }
        if !all(api, &resource.storage_key()).is_empty() {
            return Err(crate::status::Failure::timeout(format!(
                "objects of {name} have finalizers"
            )));
        }
    }
    let left: Vec<_> = meta::finalizers(crd).into_iter().filter(|f| *f != CLEANUP).collect();
    let patch = json!({"metadata": {"finalizers": left, "resourceVersion": meta::text(crd, "resourceVersion")}});
    let path = format!("/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{name}");
    account.merge(&path, &patch).await.map(|_| ())
}
