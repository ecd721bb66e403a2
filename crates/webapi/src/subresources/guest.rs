//! What is done to a guest at once, at its node.

use super::{Options, Target, accepted};
use crate::Act;
use api::conditions::{self, types};
use api::vmi::{Phase, VirtualMachineInstance};
use apiserver::body::Answer;
use apiserver::status::Failure;

/// The node of a guest that runs.
pub fn node(target: &Target<'_>, vmi: &VirtualMachineInstance) -> Result<String, Failure> {
    let status = vmi.status.as_ref().filter(|status| status.phase == Phase::Running);
    let status = status.ok_or_else(|| target.conflict("VMI is not running"))?;
    let node = status.node_name.clone().filter(|node| !node.is_empty());
    node.ok_or_else(|| target.conflict("it is not known on which node VMI runs: try again"))
}

/// Why something cannot be done to a guest that runs.
fn hindrance(what: Act, paused: bool) -> Option<&'static str> {
    match (what, paused) {
        (Act::Pause, true) => Some("VMI is already paused"),
        (Act::Unpause, false) => Some("VMI is not paused"),
        (Act::SoftReboot, true) => Some("VMI is paused: unpause it first"),
        _ => None,
    }
}

pub async fn act(target: &Target<'_>, options: &Options, what: Act) -> Result<Answer, Failure> {
    let vmi = target.vmi().await?;
    let node = node(target, &vmi)?;
    let paused = vmi.status.as_ref().is_some_and(|s| conditions::is(&s.conditions, types::PAUSED));
    if let Some(why) = hindrance(what, paused) {
        return Err(target.conflict(why));
    }
    if !options.is_dry() {
        target.web.guests.act(&node, target.namespace, target.name, what).await?;
    }
    Ok(accepted())
}
