//! Start, stop and restart: what is asked for, of which run strategy, becomes a change of the spec
//! or requests in the status that the VM's reconciler follows.

use super::{Options, TRIES, Target, accepted};
use crate::failure;
use api::vm::{Action, Request, RunStrategy, VirtualMachine};
use api::vmi::VirtualMachineInstance;
use apiserver::body::Answer;
use apiserver::status::Failure;
use kube::ResourceExt;
use kube::api::Patch;
use serde_json::json;
use std::collections::BTreeMap;
use std::time::Duration;

/// What is to be written, in this order.
#[derive(Debug, Clone, PartialEq)]
struct Change {
    /// How long the VMI's guest may take to shut down.
    grace: Option<i64>,
    /// All that is asked for then.
    requests: Vec<Request>,
    /// The VM's new strategy.
    strategy: Option<RunStrategy>,
}

/// What becomes of a request; Err: why nothing can.
type Decision = Result<Change, String>;

const NOT_RUNNING: &str = "VM is not running";

fn asked(vm: &VirtualMachine) -> Vec<Request> {
    vm.status.as_ref().map(|status| status.state_change_requests.clone()).unwrap_or_default()
}

fn is_final(vmi: &VirtualMachineInstance) -> bool {
    vmi.status.as_ref().is_some_and(|status| status.phase.is_final())
}

fn start_request(paused: bool) -> Request {
    let data = paused.then(|| BTreeMap::from([("paused".to_owned(), "true".to_owned())]));
    Request { action: Action::Start, data, uid: None }
}

fn decide_start(
    vm: &VirtualMachine,
    vmi: Option<&VirtualMachineInstance>,
    paused: bool,
) -> Decision {
    if vm.metadata.deletion_timestamp.is_some() {
        return Err("VM is being deleted".into());
    }
    if vmi.is_some_and(|vmi| !is_final(vmi) && vmi.metadata.deletion_timestamp.is_none()) {
        return Err("VM is already running".into());
    }
    let strategy = vm.spec.strategy();
    if strategy == RunStrategy::WaitAsReceiver {
        return Err("VM waits for its guest from elsewhere, and is not started here".into());
    }
    // A start that was asked for before would say how this one begins.
    let mut requests = asked(vm);
    requests.retain(|request| request.action != Action::Start);
    let halted = strategy == RunStrategy::Halted;
    if paused || !halted {
        requests.push(start_request(paused));
    }
    Ok(Change { grace: None, requests, strategy: halted.then_some(RunStrategy::Always) })
}

fn decide_stop(
    vm: &VirtualMachine,
    vmi: Option<&VirtualMachineInstance>,
    grace: Option<i64>,
) -> Decision {
    let vmi = vmi.filter(|vmi| !is_final(vmi));
    let grace = grace.filter(|_| vmi.is_some());
    match (vm.spec.strategy(), vmi) {
        (RunStrategy::Halted | RunStrategy::Manual, None) => Err(NOT_RUNNING.into()),
        (RunStrategy::Halted, Some(vmi)) => {
            let before = vmi.spec.0["terminationGracePeriodSeconds"].as_i64().unwrap_or(i64::MAX);
            match grace.is_some_and(|grace| grace < before) {
                true => Ok(Change { grace, requests: asked(vm), strategy: None }),
                false => Err("VM is being stopped already: only a shorter grace period changes \
                              that"
                    .into()),
            }
        }
        // It takes the place of whatever was asked for before.
        (RunStrategy::Manual, Some(vmi)) => {
            Ok(Change { grace, requests: vec![stop_request(vmi)], strategy: None })
        }
        // The others would start it again.
        _ => Ok(Change { grace, requests: Vec::new(), strategy: Some(RunStrategy::Halted) }),
    }
}

fn stop_request(vmi: &VirtualMachineInstance) -> Request {
    Request { action: Action::Stop, data: None, uid: vmi.uid() }
}

fn decide_restart(
    vm: &VirtualMachine,
    vmi: Option<&VirtualMachineInstance>,
    grace: Option<i64>,
) -> Decision {
    if vm.metadata.deletion_timestamp.is_some() {
        return Err("VM is being deleted".into());
    }
    let strategy = vm.spec.strategy();
    if matches!(strategy, RunStrategy::Halted | RunStrategy::WaitAsReceiver) {
        return Err(format!("run strategy {strategy:?} does not support restarts: start the VM"));
    }
    let vmi = vmi.ok_or(NOT_RUNNING)?;
    // Two who ask at once ask for the same.
    let requests = vec![stop_request(vmi), start_request(false)];
    Ok(Change { grace: grace.filter(|_| !is_final(vmi)), requests, strategy: None })
}

pub async fn start(target: &Target<'_>, options: &Options) -> Result<Answer, Failure> {
    change(target, options, |vm, vmi| decide_start(vm, vmi, options.paused)).await
}

pub async fn stop(target: &Target<'_>, options: &Options) -> Result<Answer, Failure> {
    change(target, options, |vm, vmi| decide_stop(vm, vmi, options.grace_period)).await
}

pub async fn restart(target: &Target<'_>, options: &Options) -> Result<Answer, Failure> {
    change(target, options, |vm, vmi| decide_restart(vm, vmi, options.grace_period_seconds)).await
}

/// Decides on what is there now, and writes that unless it has changed meanwhile; then anew.
async fn change(
    target: &Target<'_>,
    options: &Options,
    decide: impl Fn(&VirtualMachine, Option<&VirtualMachineInstance>) -> Decision,
) -> Result<Answer, Failure> {
    for pause in 0..TRIES {
        let vm = target.vm().await?;
        let vmi = target.vmis().get_opt(target.name).await.map_err(failure)?;
        let change = decide(&vm, vmi.as_ref()).map_err(|why| target.conflict(&why))?;
        match write(target, options, &vm, vmi.as_ref(), change).await {
            Ok(()) => return Ok(accepted()),
            Err(failure) if failure.code == 409 => {
                tokio::time::sleep(Duration::from_millis(pause)).await;
            }
            Err(failure) => return Err(failure),
        }
    }
    Err(target.conflict("others change it all the time: try again"))
}

async fn write(
    target: &Target<'_>,
    options: &Options,
    vm: &VirtualMachine,
    vmi: Option<&VirtualMachineInstance>,
    change: Change,
) -> Result<(), Failure> {
    let (params, name) = (options.patch(), target.name);
    if let Some((grace, vmi)) = change.grace.zip(vmi) {
        let patch = json!({
            "metadata": {"resourceVersion": vmi.resource_version()},
            "spec": {"terminationGracePeriodSeconds": grace},
        });
        target.vmis().patch(name, &params, &Patch::Merge(&patch)).await.map_err(failure)?;
    }
    let mut version = vm.resource_version();
    // Before the strategy: whoever follows that must know how to start.
    if change.requests != asked(vm) {
        let patch = json!({
            "metadata": {"resourceVersion": version},
            "status": {"stateChangeRequests": change.requests},
        });
        let patch = Patch::Merge(&patch);
        let written = target.vms().patch_status(name, &params, &patch).await.map_err(failure)?;
        version = written.resource_version();
    }
    if let Some(strategy) = change.strategy {
        let spec = match vm.spec.run_strategy {
            Some(_) => json!({"runStrategy": strategy}),
            None => json!({"running": strategy != RunStrategy::Halted}),
        };
        let patch = json!({"metadata": {"resourceVersion": version}, "spec": spec});
        target.vms().patch(name, &params, &Patch::Merge(&patch)).await.map_err(failure)?;
    }
    Ok(())
}
