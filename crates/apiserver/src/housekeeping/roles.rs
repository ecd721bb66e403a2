//! Cluster roles that gather the rules of others.

use super::{all, whenever};
use crate::api::Api;
use crate::auth::bootstrap;
use crate::local::Local;
use crate::meta;
use serde_json::{Value, json};

const ROLES: &str = "clusterroles.rbac.authorization.k8s.io";

pub(super) async fn run(api: Api, account: Local) {
    let act = async || {
        let roles: Vec<Value> = all(&api, ROLES).iter().map(|r| (**r).clone()).collect();
        for role in &roles {
            let Some(rules) = bootstrap::gathered(role, &roles) else { continue };
            if role["rules"].as_array() != Some(&rules) {
                let name = meta::text(role, "name");
                let path = format!("/apis/rbac.authorization.k8s.io/v1/clusterroles/{name}");
                account.merge(&path, &json!({"rules": rules})).await?;
            }
        }
        Ok(())
    };
    whenever(&api, "roles", &[ROLES], act).await;
}
