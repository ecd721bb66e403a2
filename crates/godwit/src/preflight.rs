//! `godwit migrate --dry-run`: what a move would meet, and what it would take.

use crate::view::{Output, bytes};
use crate::vms::{Cluster, plain};
use anyhow::{Context, Result};
use controllers::migration::preflight::Fault;
use handler::cluster::moves::Outlook;
use launcher::forecast::Band;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::process::ExitCode;

/// What was found, as the API tells it.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Report {
    node: Option<String>,
    policy: Option<String>,
    faults: Vec<Fault>,
    outlook: Option<Outlook>,
}

/// Asks what a move would meet, and shows it. A move that would fail is an exit code.
///
/// # Errors
/// When it cannot be found out.
pub async fn run(
    cluster: &Cluster,
    vm: &str,
    node: Option<&str>,
    class: Option<&str>,
    output: Output,
) -> Result<ExitCode> {
    let mut body = json!({});
    if let Some(node) = node {
        body["addedNodeSelector"] = json!({"kubernetes.io/hostname": node});
    }
    if let Some(class) = class {
        body["storageClass"] = class.into();
    }
    let namespace = &cluster.namespace;
    let path = format!(
        "/apis/subresources.kubevirt.io/v1/namespaces/{namespace}/virtualmachines/{vm}/preflight"
    );
    let request = http::Request::put(path).body(serde_json::to_vec(&body)?)?;
    let told: Value = cluster.client.request(request).await.map_err(plain)?;
    let report: Report =
        serde_json::from_value(told.clone()).context("the API answers something else")?;
    match output {
        Output::Json => println!("{told}"),
        Output::Text => print(vm, class, &report),
    }
    Ok(if report.faults.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn print(vm: &str, class: Option<&str>, report: &Report) {
    let to = match (&report.node, class) {
        (Some(node), Some(class)) => format!("to disks of class {class}, on node {node}"),
        (Some(node), None) => format!("to node {node}"),
        (None, _) => "nowhere".into(),
    };
    let policy = report.policy.as_ref().map_or(String::new(), |name| format!(", by policy {name}"));
    println!("{vm} would go {to}{policy}");
    report.outlook.iter().for_each(show);
    match report.faults.as_slice() {
        [] => println!("  nothing speaks against it"),
        faults => {
            println!("it would fail:");
            for Fault { reason, message } in faults {
                println!("  {reason}: {message}");
            }
        }
    }
}

/// Shows what a move would take.
pub fn show(outlook: &Outlook) {
    lines(outlook).into_iter().for_each(|(name, text)| println!("  {name:<8}{text}"));
    outlook.forecast.doubts.iter().for_each(|doubt| println!("  doubt   {doubt}"));
}

fn lines(outlook: &Outlook) -> Vec<(&'static str, String)> {
    let Outlook { guest, way, forecast, .. } = outlook;
    let written: u64 = guest.disks.iter().map(|disk| disk.dirty_rate).sum();
    let dirtied = guest.memory_dirty_rate;
    let mut lines = vec![
        ("disks", format!("{} to copy, {}/s written", bytes(forecast.disk), bytes(written))),
        ("memory", format!("{} to send, {}/s dirtied", bytes(forecast.memory), bytes(dirtied))),
    ];
    let rate = |band: Band| {
        let [low, likely, high] = [band.low, band.likely, band.high].map(|rate| bytes(rate as u64));
        format!("{likely}/s ({low} to {high}), limited by {}", forecast.limit)
    };
    lines.push(("link", format!("{:.1} ms there and back, {}", way.rtt_ms, rate(forecast.rate))));
    if let Some(Band { low, likely, high }) = forecast.seconds {
        lines.push((
            "takes",
            format!("{likely:.1} s ({low:.1} to {high:.1}) from its first byte on"),
        ));
    }
    if let Some(Band { low, likely, high }) = forecast.downtime_ms {
        lines.push(("pause", format!("{likely:.0} ms ({low:.0} to {high:.0})")));
    }
    lines
}
