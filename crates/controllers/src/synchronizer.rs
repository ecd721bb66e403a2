//! The synchronizer on a cluster that `godwit deploy` was applied to: it comes and goes with its feature
//! gate, and its Service has the port that the settings name.

use api::kubevirt::{SYNCHRONIZATION_PORT, Spec};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Service;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use serde_json::{Value, json};

/// The name of its Deployment and of its Service, as KubeVirt's.
pub const NAME: &str = "virt-synchronization-controller";

/// Has the cluster's synchronizer be as the settings want it. An embedded cluster has no such objects.
///
/// # Errors
/// What the API answers.
pub async fn follow(client: &Client, settings: &Spec) -> kube::Result<()> {
    let deployments: Api<Deployment> = Api::namespaced(client.clone(), api::NAMESPACE);
    let services: Api<Service> = Api::namespaced(client.clone(), api::NAMESPACE);
    let deployment = match deployments.get_opt(NAME).await {
        // An embedded cluster's API may not even know the kind.
        Ok(None) => return Ok(()),
        Err(kube::Error::Api(status)) if status.code == 404 => return Ok(()),
        found => found?,
    };
    let params = PatchParams::default();
    if let Some(patch) = deployment.and_then(|deployment| scale(&deployment, settings)) {
        deployments.patch(NAME, &params, &Patch::Strategic(patch)).await?;
    }
    let service = services.get_opt(NAME).await?;
    if let Some(patch) = service.and_then(|service| move_port(&service, settings)) {
        services.patch(NAME, &params, &Patch::Merge(patch)).await?;
    }
    Ok(())
}

/// How the Deployment is to be changed: there is one pod, or none.
fn scale(deployment: &Deployment, settings: &Spec) -> Option<Value> {
    let wanted = i32::from(settings.synchronizer().is_some());
    let has = deployment.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1);
    (has != wanted).then(|| json!({"spec": {"replicas": wanted}}))
}

/// How the Service is to be changed: its port is the one at which the synchronizer listens.
fn move_port(service: &Service, settings: &Spec) -> Option<Value> {
    let wanted = i32::from(settings.synchronizer()?.unwrap_or(SYNCHRONIZATION_PORT));
    let mut ports = service.spec.as_ref()?.ports.clone()?;
    let first = ports.first_mut().filter(|first| first.port != wanted)?;
    first.port = wanted;
    first.target_port = None;
    Some(json!({"spec": {"ports": ports}}))
}

#[cfg(test)]
mod test {
    use super::*;

    fn made<T: serde::de::DeserializeOwned>(value: Value) -> T {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn a_synchronizer_is_there_as_long_as_its_gate_is_open_and_found_at_its_port() {
        let mut settings = Spec::default();
        let of = |replicas: i32| {
            made::<Deployment>(json!({
                "spec": {"replicas": replicas, "selector": {}, "template": {}},
            }))
        };
        let service: Service = made(json!({"spec": {"ports": [{"name": "link", "port": 9185}]}}));
        assert_eq!((scale(&of(1), &settings), move_port(&service, &settings)), (None, None));
        assert_eq!(scale(&of(0), &settings), Some(json!({"spec": {"replicas": 1}})));
        settings.synchronization_port = Some("9300".into());
        let moved = move_port(&service, &settings).unwrap();
        assert_eq!(moved["spec"]["ports"], json!([{"name": "link", "port": 9300}]));
        let closed = &mut settings.configuration.developer_configuration.disabled_feature_gates;
        closed.push(api::kubevirt::DECENTRALIZED.into());
        assert_eq!(scale(&of(1), &settings), Some(json!({"spec": {"replicas": 0}})));
        assert_eq!(move_port(&service, &settings), None);
    }
}
