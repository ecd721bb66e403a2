//! Roles as processes of their own: whichever dies, guests go on; and certificates are renewed
//! while they are in use.

use crate::PROGRAM;
use anyhow::{Context, Result, ensure};
use e2e::cluster::{Cluster, SOON};
use e2e::guest;
use e2e::registry::Registry;
use e2e::vms::{SETTINGS, VMS, holds, is_alive, kill, shows, signal, vm};
use rustix::process::Signal;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

const OWNER: &str = "/apis/godwit.dev/v1alpha1/namespaces/default/ownerrecords/web";
const BUNDLE: &str = "/api/v1/namespaces/kubevirt/configmaps/kubevirt-ca";
const EXTERNAL: &str = "/api/v1/namespaces/kubevirt/configmaps/kubevirt-external-ca";
const PARTS: &str = "/api/v1/namespaces/kubevirt/pods";
const LEASE: &str = "/apis/coordination.k8s.io/v1/namespaces/kubevirt/leases/virt-controller";
const UP: [&str; 3] = ["--separate", "--storage", "1Gi"];

/// A VM whose root is an image's disk.
fn of_image(name: &str, strategy: &str, image: &str) -> Value {
    vm(name, strategy, vec![json!({"name": "root", "containerDisk": {"image": image}})], vec![])
}

async fn epoch(cluster: &Cluster) -> Result<i64> {
    let record = cluster.send("GET", OWNER, None).await?;
    record["status"]["epoch"].as_i64().context("no epoch")
}

/// A role that stands still is not ready, and the settings' conditions say so, whichever it is.
async fn ready_is_who_works(cluster: &Cluster) -> Result<()> {
    let said = |settings: &Value, all: [bool; 3]| {
        ["Available", "Progressing", "Degraded"].map(|kind| holds(settings, kind)) == all
    };
    let whole = |settings: &Value| said(settings, [true, false, false]);
    for (role, pod) in
        [("controller", "virt-controller"), ("handler-local-1", "virt-handler-local-1")]
    {
        let pod = format!("{PARTS}/{pod}");
        cluster.until(&pod, |pod| holds(pod, "Ready")).await?;
        let settings = cluster.until(SETTINGS, whole).await?;
        ensure!(settings["status"]["phase"] == "Deployed", "{settings}");
        let process = cluster.until_role(role, None)?;
        signal(process, Signal::STOP)?;
        let stands = async {
            cluster.until(&pod, |pod| !holds(pod, "Ready")).await?;
            cluster.until(SETTINGS, |settings| said(settings, [false, false, true])).await
        };
        let stands = stands.await;
        signal(process, Signal::CONT)?;
        let stands = stands?;
        let conditions = stands["status"]["conditions"].to_string();
        ensure!(conditions.contains("ComponentsNotReady") && conditions.contains("not ready: any"));
        cluster.until(&pod, |pod| holds(pod, "Ready")).await?;
        cluster.until(SETTINGS, whole).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_goes_on_whichever_role_is_killed() -> Result<()> {
    let registry = Registry::start()?;
    let image = registry.push("guest", "disk/guest.raw", &guest::image("disk.raw")?)?;
    let mut cluster = Cluster::new(PROGRAM, &UP).await?;
    cluster.create(VMS, of_image("web", "Always", &image)).await?;
    let web = format!("{VMS}/web");
    cluster.until(&web, shows("Running")).await?;
    let guest = cluster.qemus()?;
    ensure!(guest.len() == 1 && epoch(&cluster).await? == 1, "{guest:?}");

    let controller = cluster.until_role("controller", None)?;
    kill(controller)?;
    cluster.until_role("controller", Some(controller))?;
    // The next one does its work, without waiting for the lease of the last to run out.
    cluster.create(VMS, of_image("next", "Halted", &image)).await?;
    cluster.until(&format!("{VMS}/next"), shows("Stopped")).await?;
    let lease = cluster.send("GET", LEASE, None).await?;
    ensure!(lease["spec"]["leaseTransitions"] == 0, "{lease}");

    let handler = cluster.until_role("handler-local-1", None)?;
    kill(handler)?;
    cluster.until_role("handler-local-1", Some(handler))?;
    cluster.does_soon(&["vm", "pause", "web"])?;
    cluster.does(&["vm", "unpause", "web"])?;

    ready_is_who_works(&cluster).await?;

    let before = cluster.roles()?;
    let record: Value = serde_json::from_slice(&std::fs::read(cluster.path("cluster.json"))?)?;
    let main = i32::try_from(record["pid"].as_i64().context("no pid")?)?;
    kill(main)?;
    let began = Instant::now();
    while before.values().chain([&main]).any(|pid| is_alive(*pid)) {
        ensure!(began.elapsed() < SOON, "roles outlive the process that started them");
        std::thread::sleep(Duration::from_millis(20));
    }
    cluster.up(&UP)?;
    cluster.client = e2e::cluster::client(cluster.dir(), "local").await?;
    ensure!(cluster.until_role("controller", None)? != before["controller"]);
    cluster.does_soon(&["vm", "pause", "web"])?;
    cluster.does(&["vm", "unpause", "web"])?;
    ensure!(cluster.qemus()? == guest, "the guest is not the one that it was");
    ensure!(epoch(&cluster).await? == 1, "somebody else has taken it");

    cluster.does(&["vm", "stop", "web"])?;
    cluster.until(&web, shows("Stopped")).await?;
    ensure!(cluster.qemus()?.is_empty(), "a guest that was stopped runs");
    cluster.does(&["vm", "start", "web"])?;
    cluster.until(&web, shows("Running")).await?;
    ensure!(epoch(&cluster).await? == 2 && cluster.qemus()?.len() == 1);

    let last = cluster.roles()?;
    ensure!(last.len() == 3, "{last:?}");
    ensure!(cluster.godwit(&["down"])?.status.success());
    ensure!(!last.values().any(|pid| is_alive(*pid)), "a role outlives its cluster");
    Ok(())
}

/// The certificates of a PEM text.
fn certificates(pem: &str) -> BTreeSet<String> {
    pem.split_inclusive("-----END CERTIFICATE-----").map(|one| one.trim().to_owned()).collect()
}

/// Renews all certificates again and again while they are in use.
async fn renews(more: &[&str]) -> Result<()> {
    let registry = Registry::start()?;
    let image = registry.push("guest", "disk/guest.raw", &guest::image("disk.raw")?)?;
    let cluster = Cluster::new(PROGRAM, &[&["--storage", "1Gi"], more].concat()).await?;
    cluster.create(VMS, of_image("web", "Always", &image)).await?;
    cluster.until(&format!("{VMS}/web"), shows("Running")).await?;
    let mut console = cluster.terminal("web")?;
    let others = json!({"data": {"ca-bundle": "another cluster's"}});
    cluster.send("PATCH", EXTERNAL, Some(others)).await?;
    let terms = json!({"spec": {"certificateRotateStrategy": {"selfSigned": {
        "ca": {"duration": "20s", "renewBefore": "8s"},
        "server": {"duration": "10s", "renewBefore": "4s"},
    }}}});
    cluster.send("PATCH", SETTINGS, Some(terms)).await?;

    let mut seen = BTreeSet::new();
    let began = Instant::now();
    // The first lasts a week; of those that follow, three have ended when the sixth is there.
    while seen.len() < 6 {
        ensure!(began.elapsed() < SOON * 3, "CAs are not renewed: {}", seen.len());
        let bundle = cluster.send("GET", BUNDLE, None).await?;
        let bundle = certificates(bundle["data"]["ca-bundle"].as_str().context("a bundle")?);
        ensure!(bundle.len() <= 4, "ended CAs are believed");
        seen.extend(bundle);
        cluster.does(&["vm", "pause", "web"])?;
        cluster.does(&["vm", "unpause", "web"])?;
        std::thread::sleep(Duration::from_millis(200));
    }
    ensure!(console.run("echo still he''re")?.trim() == "still here");
    let external = cluster.send("GET", EXTERNAL, None).await?;
    // What is there is taken, and no other cluster's CA is not believed.
    ensure!(external["data"]["ca-bundle"] == "", "{external}");
    let bundle = cluster.send("GET", BUNDLE, None).await?;
    ensure!(!bundle["data"]["ca-bundle"].to_string().contains("another"), "{bundle}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_are_renewed_while_a_console_is_open() -> Result<()> {
    renews(&[]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn roles_of_their_own_take_renewed_certificates_while_a_console_is_open() -> Result<()> {
    renews(&["--separate"]).await
}
