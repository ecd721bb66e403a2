//! `godwit migrate --to CLUSTER`: a VM goes to another cluster, with all that it needs.
//!
//! The cluster does it: whoever closes the terminal stops nothing.

use crate::cli::{Migrate, pairs};
use crate::migrating::{LOOK, follow};
use crate::preflight;
use crate::view::{Output, View};
use crate::vms::{Cluster, plain};
use anyhow::Result;
use api::relocation::{Phase, Spec, Status, VirtualMachineMove};
use kube::api::PostParams;
use kube::{Api, ResourceExt};
use serde_json::json;
use std::process::ExitCode;

/// Moves a VM to another cluster, or tells what would become of that.
///
/// # Errors
/// When it cannot be asked for. A move that fails is an exit code.
pub async fn run(cluster: &Cluster, vm: &str, to: &str, arguments: &Migrate) -> Result<ExitCode> {
    let moves: Api<VirtualMachineMove> =
        Api::namespaced(cluster.client.clone(), &cluster.namespace);
    let spec = Spec {
        vm: vm.to_owned(),
        cluster: to.to_owned(),
        namespace: arguments.to_namespace.clone(),
        name: None,
        storage_class: arguments.storage_class.clone(),
        network_map: pairs(&arguments.network_map, "--network-map", "HERE=THERE")?,
        verify: arguments.verify,
        check_only: arguments.dry_run,
    };
    let mut wanted = VirtualMachineMove::new("", spec);
    wanted.metadata.name = None;
    wanted.metadata.generate_name = Some(format!("{vm}-"));
    let made = moves.create(&PostParams::default(), &wanted).await.map_err(plain)?;
    let name = made.name_any();
    if arguments.no_wait {
        println!("{name}");
        return Ok(ExitCode::SUCCESS);
    }
    let mut shown = Phase::Unset;
    let mut watched = None;
    loop {
        let found = moves.get(&name).await.map_err(plain)?;
        let status = found.status.unwrap_or_default();
        if status.phase != shown && !status.phase.is_final() {
            eprintln!("{vm}: {}", words(status.phase));
            shown = status.phase;
        }
        match (&status.migration, status.phase) {
            (_, Phase::Succeeded | Phase::Failed) => {
                let ended = report(vm, to, &status, arguments);
                if ended != ExitCode::SUCCESS {
                    return Ok(ended);
                }
                return match (watched, &status.migration) {
                    // It was over before it was seen to move.
                    (None, Some(migration)) if arguments.verify => {
                        follow(cluster, migration, View::new(arguments.output)).await
                    }
                    (watched, _) => Ok(watched.unwrap_or(ended)),
                };
            }
            (Some(migration), Phase::Moving) if watched.is_none() => {
                // How it ends is the move's to tell; what its disks are, the migration's.
                let view = View::new(arguments.output);
                watched = Some(follow(cluster, migration, view).await?);
            }
            _ => tokio::time::sleep(LOOK).await,
        }
    }
}

fn words(phase: Phase) -> &'static str {
    match phase {
        Phase::Unset | Phase::Checking => "both clusters look for all that would make it fail",
        Phase::Preparing => "the other cluster makes what the guest needs there",
        Phase::Moving => "the guest moves",
        Phase::Settling => "what was made for the move goes",
        Phase::Succeeded | Phase::Failed => "it is over",
    }
}

/// Tells how it ended.
fn report(vm: &str, to: &str, status: &Status, arguments: &Migrate) -> ExitCode {
    let fine = status.phase == Phase::Succeeded;
    if arguments.output == Output::Json && arguments.dry_run {
        let Status { faults, warnings, outlook, .. } = status;
        println!("{}", json!({"faults": faults, "warnings": warnings, "outlook": outlook}));
    } else {
        for warning in &status.warnings {
            eprintln!("  worth knowing: {warning}");
        }
        match (fine, arguments.dry_run) {
            (true, true) => println!("{vm} can go to cluster {to}: nothing speaks against it"),
            (true, false) => eprintln!("{vm} is cluster {to}'s now"),
            (false, true) => println!("{vm} cannot go to cluster {to}:"),
            (false, false) => eprintln!("{vm} is where it was:"),
        }
        let outlook = status.outlook.clone().and_then(|told| serde_json::from_value(told).ok());
        outlook.iter().for_each(preflight::show);
        for fault in &status.faults {
            match arguments.dry_run {
                true => println!("  {fault}"),
                false => eprintln!("  {fault}"),
            }
        }
    }
    if fine { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
