//! Moves: one that is asked for, and one that is no longer wanted.

use super::{Options, TRIES, Target, VM, accepted};
use crate::failure;
use api::migration::{Spec, VirtualMachineInstanceMigration};
use api::vmi::Phase;
use apiserver::body::{self, Answer};
use apiserver::status::Failure;
use bytes::Bytes;
use http::StatusCode;
use kube::api::{Patch, PostParams};
use kube::{Api, ResourceExt};
use serde_json::json;

/// Begins to move a VM that runs.
pub async fn migrate(target: &Target<'_>, options: &Options) -> Result<Answer, Failure> {
    target.vm().await?;
    let vmi = target.vmi().await?;
    if vmi.status.as_ref().map(|status| status.phase) != Some(Phase::Running) {
        return Err(target.conflict("VM is not running"));
    }
    let spec = Spec {
        vmi_name: target.name.into(),
        added_node_selector: options.added_node_selector.clone(),
        ..Spec::default()
    };
    let mut migration = VirtualMachineInstanceMigration::new("", spec);
    migration.metadata.name = None;
    migration.metadata.generate_name = Some("kubevirt-migrate-vm-".into());
    let migrations: Api<VirtualMachineInstanceMigration> =
        Api::namespaced(target.web.client.clone(), target.namespace);
    let params = PostParams { dry_run: options.is_dry(), ..PostParams::default() };
    migrations.create(&params, &migration).await.map_err(failure)?;
    Ok(accepted())
}

/// Lets a VM stay on its node, which it was to leave.
pub async fn stay(target: &Target<'_>, options: &Options) -> Result<Answer, Failure> {
    if target.resource == VM {
        target.vm().await?;
    }
    for _ in 0..TRIES {
        let vmi = target.vmi().await?;
        let node = vmi.status.as_ref().and_then(|status| status.evacuation_node_name.clone());
        let Some(node) = node.filter(|node| !node.is_empty()) else { break };
        if options.evacuation_node_name.as_ref().is_some_and(|named| *named != node) {
            return Err(target.conflict(&format!("it is to leave node '{node}'")));
        }
        if target.web.is_drained(&node).await? {
            return Err(Failure::bad_request(format!(
                "node '{node}' has the taint by which all its guests are to leave it: remove that first"
            )));
        }
        let patch = json!({
            "metadata": {"resourceVersion": vmi.resource_version()},
            "status": {"evacuationNodeName": null},
        });
        let patch = Patch::Merge(&patch);
        match target.vmis().patch_status(target.name, &options.patch(), &patch).await {
            Ok(_) => break,
            // What was read is not what is: it is decided anew.
            Err(kube::Error::Api(status)) if status.code == 409 => {}
            Err(error) => return Err(failure(error)),
        }
    }
    Ok(body::answer(StatusCode::OK, "application/json", Bytes::new()))
}
