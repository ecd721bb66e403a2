//! What would become of a move, before it is made.

use super::{Options, Target};
use crate::{Plan, failure};
use apiserver::body::{self, Answer};
use apiserver::status::Failure;
use controllers::migration::preflight::{Disks, Fault, Lately, check, gather};
use http::StatusCode;
use serde_json::json;

/// Checks all that would make it fail; measures the guest and the way, and tells what it would take.
pub async fn look(target: &Target<'_>, options: &Options) -> Result<Answer, Failure> {
    target.vm().await?;
    let vmi = target.vmi().await?;
    let source = vmi.status.as_ref().and_then(|status| status.node_name.clone());
    let class = options.storage_class.clone();
    let all = class.is_some();
    let disks = class.map_or(Disks::Follow, Disks::Class);
    let settings = target.web.settings.get().await?.configuration.clone();
    let selector = options.added_node_selector.clone();
    // A person asks: all of it is of now.
    let (client, now) = (&target.web.client, Lately::default());
    let facts = gather(client, &now, vmi, selector, disks, settings).await.map_err(failure)?;
    let mut found = check(&facts);
    let mut outlook = None;
    if let (Some(to), Some(source)) = (&found.node, source) {
        let plan = Plan {
            source: &source,
            namespace: target.namespace,
            name: target.name,
            node: to,
            all,
            options: &found.options,
        };
        match target.web.guests.forecast(plan).await {
            Ok(told) => outlook = Some(told),
            Err(Failure { message, .. }) => {
                found.faults.push(Fault { reason: "NotMeasured".into(), message });
            }
        }
    }
    let found = json!({
        "node": found.node, "policy": found.policy, "options": found.options,
        "faults": found.faults, "outlook": outlook,
    });
    Ok(body::json(StatusCode::OK, &found))
}
