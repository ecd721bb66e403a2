//! VMs as their users have them: a manifest, a real guest, and what becomes of it.

use crate::PROGRAM;
use anyhow::{Context, Result, ensure};
use e2e::cluster::Cluster;
use e2e::guest;
use e2e::registry::Registry;
use e2e::vms::{OWNERS, PODS, VMIS, VMS, holds, is_running, kill, vm};
use serde_json::{Value, json};
use std::process::Command;
use std::time::Duration;

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_boots_from_an_imported_disk_and_what_its_guest_writes_survives() -> Result<()> {
    let registry = Registry::start()?;
    let image = registry.push("guest", "disk/guest.raw", &guest::image("disk.raw")?)?;
    let cluster = Cluster::new(PROGRAM, &["--storage", "1Gi"]).await?;
    let template = json!({
        "metadata": {"name": "web-root"},
        "spec": {
            "source": {"registry": {"url": format!("docker://{image}")}},
            "storage": {"resources": {"requests": {"storage": "100Mi"}}},
        },
    });
    let root = json!({"name": "root", "dataVolume": {"name": "web-root"}});
    cluster.create(VMS, vm("web", "Always", vec![root], vec![template])).await?;
    let path = format!("{VMS}/web");
    cluster.until(&path, is_running).await?;
    let mut console = cluster.terminal("web")?;
    console.run("echo kept > /data/file; sync")?;
    ensure!(console.run("grep -c ttyS0 /proc/cmdline")?.trim() == "1");
    drop(console);
    is_measured(&cluster).await?;

    cluster.does(&["vm", "stop", "web"])?;
    cluster.until(&path, |vm| vm["status"]["printableStatus"] == "Stopped").await?;
    ensure!(cluster.qemus()?.is_empty(), "a guest that was stopped runs");
    cluster.does(&["vm", "start", "web"])?;
    cluster.until(&path, is_running).await?;
    let mut console = cluster.terminal("web")?;
    ensure!(console.run("cat /data/file")?.trim() == "kept");
    let record = cluster.send("GET", &format!("{OWNERS}/web"), None).await?;
    ensure!(record["status"]["epoch"] == 2, "{record}");

    cluster.does(&["vm", "delete", "web"])?;
    cluster.until_gone(&format!("{OWNERS}/web")).await?;
    ensure!(cluster.qemus()?.is_empty(), "a guest that was deleted runs");
    Ok(())
}

/// The cluster's one page of metrics has what the guest has used.
async fn is_measured(cluster: &Cluster) -> Result<()> {
    let page = cluster.text("/metrics").await?;
    let value = |metric: &str, label: &str| {
        let is = |line: &&str| {
            line.starts_with(&format!("{metric}{{"))
                && line.contains("name=\"web\"")
                && line.contains(label)
        };
        let line = page.lines().find(is).and_then(|line| line.rsplit_once(' '));
        line.and_then(|(_, value)| value.parse::<f64>().ok())
    };
    for (metric, label) in [
        ("kubevirt_vmi_cpu_usage_seconds_total", "namespace=\"default\""),
        ("kubevirt_vmi_vcpu_seconds_total", "id=\"0\""),
        ("kubevirt_vmi_memory_resident_bytes", "node=\""),
        ("kubevirt_vmi_storage_write_traffic_bytes_total", "drive=\"root\""),
    ] {
        ensure!(value(metric, label).is_some_and(|value| value > 0.0), "{metric}: {page}");
    }
    let phases = "kubevirt_vmi_phase_transition_time_seconds_count{phase=\"Running\"";
    ensure!(page.contains(phases) && page.contains("apiserver_request_total"), "{page}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn every_run_strategy_acts_on_a_guest_that_ends() -> Result<()> {
    let registry = Registry::start()?;
    let image = registry.push("guest", "disk/guest.raw", &guest::image("disk.raw")?)?;
    let cluster = Cluster::new(PROGRAM, &["--storage", "1Gi"]).await?;
    let root = json!({"name": "root", "containerDisk": {"image": image}});
    let began = |vmi: &Value| vmi["metadata"]["uid"].as_str().unwrap_or_default().to_owned();
    // Whether a guest that shuts down, and one that is killed, is followed by another.
    for (strategy, after_end, after_crash) in
        [("Always", true, true), ("RerunOnFailure", false, true), ("Once", false, false)]
    {
        for (crash, again) in [(false, after_end), (true, after_crash)] {
            let name = format!("{}-{crash}", strategy.to_lowercase());
            let what = format!("{strategy}, {}", if crash { "killed" } else { "shut down" });
            cluster.create(VMS, vm(&name, strategy, vec![root.clone()], vec![])).await?;
            cluster.until(&format!("{VMS}/{name}"), is_running).await.context(what.clone())?;
            let path = format!("{VMIS}/{name}");
            let first = began(&cluster.send("GET", &path, None).await?);
            match crash {
                true => cluster.qemus()?.into_iter().try_for_each(kill)?,
                false => {
                    let mut console = cluster.terminal(&name)?;
                    // It ends before it could answer.
                    let _ = console.run("poweroff -f");
                }
            }
            if again {
                cluster
                    .until(&path, |vmi| began(vmi) != first && vmi["status"]["phase"] == "Running")
                    .await
                    .context(what)?;
            } else {
                let phase = if crash { "Failed" } else { "Succeeded" };
                cluster
                    .until(&path, |vmi| vmi["status"]["phase"] == phase)
                    .await
                    .context(what.clone())?;
                tokio::time::sleep(Duration::from_secs(1)).await;
                let vmi = cluster.send("GET", &path, None).await?;
                ensure!(began(&vmi) == first, "{what}: it was started again");
            }
            cluster.does(&["vm", "delete", &name])?;
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_cut_off_keeps_its_guest_and_nobody_else_starts_it() -> Result<()> {
    let registry = Registry::start()?;
    let image = registry.push("guest", "disk/guest.raw", &guest::image("disk.raw")?)?;
    let mut cluster = Cluster::new(PROGRAM, &["--nodes", "2", "--storage", "1Gi"]).await?;
    let root = json!({"name": "root", "containerDisk": {"image": image}});
    let mut lonely = vm("lonely", "Always", vec![root], vec![]);
    let far = json!({"kubernetes.io/hostname": "local-2"});
    lonely["spec"]["template"]["spec"]["nodeSelector"] = far;
    cluster.create(VMS, lonely).await?;
    let path = format!("{VMS}/lonely");
    cluster.until(&path, is_running).await?;
    let guest = cluster.qemus()?;
    ensure!(guest.len() == 1, "{guest:?}");

    // The second node's agent and handler are gone; its guest is not.
    ensure!(cluster.godwit(&["down", "--keep-pods"])?.status.success());
    cluster.up(&["--nodes", "1", "--storage", "1Gi"])?;
    cluster.client = e2e::cluster::client(cluster.dir(), "local").await?;
    let anywhere = json!({"spec": {"template": {"spec": {"nodeSelector": null}}}});
    cluster.send("PATCH", &path, Some(anywhere)).await?;
    let pods = cluster.send("GET", PODS, None).await?;
    let pod = pods["items"][0]["metadata"]["name"].as_str().context("a pod")?.to_owned();
    // All that a hurried person or a controller may do: the pod is forced away, the VMI deleted.
    let forced = json!({"gracePeriodSeconds": 0});
    cluster.send("DELETE", &format!("{PODS}/{pod}"), Some(forced)).await?;
    cluster.send("DELETE", &format!("{VMIS}/lonely"), None).await?;
    let doubts = |vmi: &Value| holds(vmi, "InDoubt");
    cluster.until(&format!("{VMIS}/lonely"), doubts).await?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    ensure!(cluster.qemus()? == guest, "another guest runs, or the first does not");

    // The machine is off, and a person says so.
    kill(guest[0])?;
    let taint = json!({"spec": {"taints": [{
        "key": "node.kubernetes.io/out-of-service", "value": "nodeshutdown", "effect": "NoExecute",
    }]}});
    cluster.send("PATCH", "/api/v1/nodes/local-2", Some(taint)).await?;
    let elsewhere =
        |vmi: &Value| vmi["status"]["phase"] == "Running" && vmi["status"]["nodeName"] == "local-1";
    cluster.until(&format!("{VMIS}/lonely"), elsewhere).await?;
    ensure!(cluster.qemus()?.len() == 1);
    let record = cluster.send("GET", &format!("{OWNERS}/lonely"), None).await?;
    ensure!(record["status"]["epoch"] == 2, "{record}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_of_this_machine_becomes_a_disk_that_a_vm_boots_from() -> Result<()> {
    let cluster = Cluster::new(PROGRAM, &["--storage", "1Gi"]).await?;
    let folder = tempfile::tempdir()?;
    let image = folder.path().join("guest.qcow2");
    let raw = guest::image("disk.raw")?;
    let made =
        Command::new("qemu-img").args(["convert", "-O", "qcow2"]).args([&raw, &image]).output()?;
    ensure!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let upload = |name: &str| {
        let mut run = Command::new(PROGRAM);
        run.args(["image", "upload", name, "--size", "100Mi", "--file"]);
        run.arg(&image).arg("--kubeconfig").arg(cluster.path("kubeconfig"));
        run
    };
    let done = upload("uploaded").output()?;
    ensure!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let again = upload("uploaded").output()?;
    ensure!(again.status.success(), "{}", String::from_utf8_lossy(&again.stderr));

    let root = json!({"name": "root", "dataVolume": {"name": "uploaded"}});
    cluster.create(VMS, vm("web", "Always", vec![root], vec![])).await?;
    cluster.until(&format!("{VMS}/web"), is_running).await?;
    cluster.terminal("web")?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn seeds_files_and_cards_are_what_the_guest_sees() -> Result<()> {
    let registry = Registry::start()?;
    let image = registry.push("guest", "disk/guest.raw", &guest::image("disk.raw")?)?;
    let cluster = Cluster::new(PROGRAM, &["--storage", "1Gi"]).await?;
    let map = json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "settings"},
        "data": {"colour": "green"},
    });
    cluster.create("/api/v1/namespaces/default/configmaps", map).await?;
    let volumes = vec![
        json!({"name": "root", "containerDisk": {"image": image}}),
        json!({"name": "seed", "cloudInitNoCloud": {"userData": "#cloud-config\nfrom: a-seed\n"}}),
        json!({"name": "settings", "configMap": {"name": "settings"}}),
        json!({"name": "scratch", "emptyDisk": {"capacity": "16Mi"}}),
    ];
    let mut all = vm("all", "Always", volumes, vec![]);
    let domain = &mut all["spec"]["template"]["spec"]["domain"];
    domain["cpu"] = json!({"sockets": 2, "cores": 1, "threads": 1});
    domain["devices"]["disks"][3] =
        json!({"name": "scratch", "serial": "scratch-1", "disk": {"bus": "scsi"}});
    let mac = "02:00:00:00:00:07";
    domain["devices"]["interfaces"] =
        json!([{"name": "default", "macAddress": mac, "masquerade": {}}]);
    all["spec"]["template"]["spec"]["networks"] = json!([{"name": "default", "pod": {}}]);
    cluster.create(VMS, all).await?;
    cluster.until(&format!("{VMS}/all"), is_running).await?;
    let mut console = cluster.terminal("all")?;
    for (command, shown) in [
        ("nproc", "2"),
        // ISO 9660: names and contents are there as they are.
        ("grep -c 'from: a-seed' /dev/vdb", "1"),
        ("grep -c green /dev/vdc", "1"),
        ("cat /sys/block/sda/size", "32768"),
        ("cat /sys/class/net/*/address | grep -c 02:00:00:00:00:07", "1"),
    ] {
        let printed = console.run(command)?;
        ensure!(printed.trim() == shown, "{command}: {printed:?}, not {shown:?}");
    }
    let vmi = cluster.send("GET", &format!("{VMIS}/all"), None).await?;
    ensure!(vmi["status"]["interfaces"][0]["mac"] == mac, "{vmi}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_of_another_namespace_is_cloned_for_who_may_read_it_there() -> Result<()> {
    const RBAC: &str = "/apis/rbac.authorization.k8s.io/v1/namespaces";
    const CDI: &str = "/apis/cdi.kubevirt.io/v1beta1/namespaces";
    let cluster =
        Cluster::new(PROGRAM, &["--separate", "--nodes", "2", "--storage", "1Gi"]).await?;
    let volume = |name: &str, source: Value, storage: Value| {
        json!({
            "apiVersion": "cdi.kubevirt.io/v1beta1", "kind": "DataVolume",
            "metadata": {
                "name": name,
                "annotations": {"cdi.kubevirt.io/storage.bind.immediate.requested": "true"},
            },
            "spec": {"source": source, "storage": storage},
        })
    };
    let binding = |role: &str| {
        let group = "rbac.authorization.k8s.io";
        json!({
            "apiVersion": format!("{group}/v1"), "kind": "RoleBinding", "metadata": {"name": "dev"},
            "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": role},
            "subjects": [{"apiGroup": group, "kind": "User", "name": "dev"}],
        })
    };
    let succeeded = |volume: &Value| volume["status"]["phase"] == "Succeeded";
    let images = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "images"}});
    cluster.create("/api/v1/namespaces", images).await?;
    let size = json!({"resources": {"requests": {"storage": "32Mi"}}});
    let golden = volume("golden", json!({"blank": {}}), size);
    cluster.create(&format!("{CDI}/images/datavolumes"), golden).await?;
    cluster.until(&format!("{CDI}/images/datavolumes/golden"), succeeded).await?;
    cluster.create(&format!("{RBAC}/default/rolebindings"), binding("edit")).await?;
    let source = json!({"pvc": {"namespace": "images", "name": "golden"}});
    let clone = volume("clone", source, json!({})).to_string().into_bytes();
    let ask = async || {
        let request = http::Request::post(format!("{CDI}/default/datavolumes"))
            .header("Content-Type", "application/json")
            .header("Impersonate-User", "dev");
        cluster.client.request::<Value>(request.body(clone.clone()).unwrap()).await
    };
    let why = format!("{:?}", ask().await);
    ensure!(why.contains("insufficient permissions in clone source namespace images"), "{why}");
    cluster.create(&format!("{RBAC}/images/rolebindings"), binding("view")).await?;
    let began = std::time::Instant::now();
    while let Err(error) = ask().await {
        ensure!(began.elapsed() < Duration::from_secs(20), "it is never let: {error}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    cluster.until(&format!("{CDI}/default/datavolumes/clone"), succeeded).await?;
    Ok(())
}
