//! Embedded clusters as their users have them: `godwit up`, and pods that are processes.

use crate::PROGRAM;
use anyhow::{Context, Result, bail, ensure};
use e2e::cluster::{self, Cluster, SOON};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::time::{Duration, Instant};

const PODS: &str = "/api/v1/namespaces/default/pods";
const CLAIMS: &str = "/api/v1/namespaces/default/persistentvolumeclaims";
const IMAGE: &str = "example.org/shell";
const UP: [&str; 6] = ["--nodes", "2", "--storage", "1Gi", "--image", "example.org/shell=/bin/sh"];

fn pod(name: &str, spec: Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec})
}

fn shell(script: &str) -> Value {
    json!({"name": "c", "image": IMAGE, "args": ["-c", script]})
}

fn is_ready(pod: &Value) -> bool {
    let conditions = pod["status"]["conditions"].as_array();
    conditions.is_some_and(|all| all.iter().any(|c| c["type"] == "Ready" && c["status"] == "True"))
}

/// What a container waits for.
fn waits(pod: &Value) -> &str {
    pod["status"]["containerStatuses"][0]["state"]["waiting"]["reason"].as_str().unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_outlives_the_cluster_that_is_killed_and_ends_with_the_one_that_is_ended()
-> Result<()> {
    let mut cluster = Cluster::new(PROGRAM, &UP).await?;
    let claim = json!({
        "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "data"},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Mi"}}},
    });
    cluster.create(CLAIMS, claim).await?;
    let map = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "m"}, "data": {"k": "v"}});
    cluster.create("/api/v1/namespaces/default/configmaps", map).await?;
    let script = "cat $GODWIT_ROOT/m/k; echo; ls $GODWIT_ROOT/var/run/secrets/kubernetes.io/serviceaccount; \
                  trap 'exit 0' TERM; while true; do echo tick >> $GODWIT_ROOT/data/ticks; sleep 0.1; done";
    let mut container = shell(script);
    container["volumeMounts"] = json!([
        {"name": "data", "mountPath": "/data"}, {"name": "m", "mountPath": "/m"},
    ]);
    let volumes = json!([
        {"name": "data", "persistentVolumeClaim": {"claimName": "data"}},
        {"name": "m", "configMap": {"name": "m"}},
    ]);
    let object = pod("p", json!({"containers": [container], "volumes": volumes}));
    cluster.create(PODS, object).await?;
    let path = format!("{PODS}/p");
    let first = cluster.until(&path, is_ready).await?;
    let began = Instant::now();
    while cluster.log("p", "").await? != "v\nca.crt\nnamespace\ntoken\n" {
        ensure!(began.elapsed() < SOON, "it says {}", cluster.log("p", "").await?);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    // What changes of a ConfigMap is seen.
    let changed = json!({"data": {"k": "w"}});
    cluster.send("PATCH", "/api/v1/namespaces/default/configmaps/m", Some(changed)).await?;
    let uid = first["metadata"]["uid"].as_str().context("a uid")?;
    let node = first["spec"]["nodeName"].as_str().context("a node")?;
    let seen = cluster.path(&format!("machine/nodes/{node}/pods/{uid}/containers/c/root/m/k"));
    let began = Instant::now();
    while std::fs::read_to_string(&seen)? != "w" {
        ensure!(began.elapsed() < SOON, "the pod does not see the change");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let volume = cluster.send("GET", &format!("{CLAIMS}/data"), None).await?;
    let volume = volume["spec"]["volumeName"].as_str().context("it is bound")?.to_owned();
    let volume = cluster.send("GET", &format!("/api/v1/persistentvolumes/{volume}"), None).await?;
    let folder = PathBuf::from(volume["spec"]["local"]["path"].as_str().context("a path")?);
    let ticks = || std::fs::read_to_string(folder.join("ticks")).unwrap_or_default().len();

    cluster.kill()?;
    let before = ticks();
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(ticks() > before, "the pod ended with the cluster that was killed");
    cluster.up(&UP)?;
    // An older connection is no use.
    cluster.client = cluster::client(cluster.dir(), "local").await?;
    let id = |pod: &Value| pod["status"]["containerStatuses"][0]["containerID"].clone();
    let again = cluster.until(&path, is_ready).await?;
    assert_eq!(id(&again), id(&first), "it was started anew");

    cluster.send("DELETE", &path, None).await?;
    cluster.until_gone(&path).await?;
    assert_eq!(cluster.processes()?, Vec::<i32>::new(), "something of the pod is left");
    assert!(ticks() > 0, "the claim's data went with the pod");
    cluster.send("DELETE", &format!("{CLAIMS}/data"), None).await?;
    let name = volume["metadata"]["name"].as_str().context("a name")?;
    cluster.until_gone(&format!("/api/v1/persistentvolumes/{name}")).await?;
    assert!(!folder.exists(), "the data of a claim that is gone is left");

    // A hook is run before a pod ends, and holds up nobody who wants it gone at once.
    let mut hooked = shell("trap exit TERM; while true; do sleep 0.1; done");
    let hook = json!(["sh", "-c", "touch $GODWIT_ROOT/hooked; sleep 1000"]);
    hooked["lifecycle"] = json!({"preStop": {"exec": {"command": hook}}});
    let spec = json!({"containers": [hooked], "terminationGracePeriodSeconds": 1000});
    cluster.create(PODS, pod("h", spec)).await?;
    let path = format!("{PODS}/h");
    let running = cluster.until(&path, is_ready).await?;
    let (uid, node) = (&running["metadata"]["uid"], &running["spec"]["nodeName"]);
    let (uid, node) = (uid.as_str().context("a uid")?, node.as_str().context("a node")?);
    let file = format!("machine/nodes/{node}/pods/{uid}/containers/c/root/hooked");
    cluster.send("DELETE", &path, None).await?;
    let began = Instant::now();
    while !cluster.path(&file).exists() {
        ensure!(began.elapsed() < SOON, "the hook is not run");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    cluster.send("DELETE", &path, Some(json!({"gracePeriodSeconds": 0}))).await?;
    let began = Instant::now();
    while !cluster.processes()?.is_empty() {
        ensure!(began.elapsed() < SOON, "the hook holds the pod up");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }

    // What does not hear of its end is ended all the same.
    let stubborn = shell("trap '' TERM; sleep 1000 & while true; do sleep 0.1; done");
    cluster.create(PODS, pod("q", json!({"containers": [stubborn]}))).await?;
    cluster.until(&format!("{PODS}/q"), is_ready).await?;
    // A container whose supervisor is killed goes with it, and is started anew.
    let supervisors = |pid: &i32| {
        let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&command).contains("pod-process")
    };
    let before = cluster.processes()?;
    for pid in before.iter().copied().filter(supervisors) {
        let pid = rustix::process::Pid::from_raw(pid).context("a process")?;
        rustix::process::kill_process(pid, rustix::process::Signal::KILL)?;
    }
    let lost = |p: &Value| {
        let last = &p["status"]["containerStatuses"][0]["lastState"]["terminated"];
        is_ready(p) && last["reason"] == "ContainerStatusUnknown"
    };
    cluster.until(&format!("{PODS}/q"), lost).await?;
    let after = cluster.processes()?;
    assert!(!after.iter().any(|pid| before.contains(pid)), "{before:?}, {after:?}");
    let restarts = |p: &Value| p["status"]["containerStatuses"][0]["restartCount"].as_i64();
    for crashes in [true, false] {
        assert!(!cluster.processes()?.is_empty());
        let before = restarts(&cluster.send("GET", &format!("{PODS}/q"), None).await?);
        if crashes {
            cluster.kill()?;
        }
        assert!(cluster.godwit(&["down"])?.status.success());
        assert_eq!(cluster.processes()?, Vec::<i32>::new(), "something is left after its end");
        cluster.up(&UP)?;
        cluster.client = cluster::client(cluster.dir(), "local").await?;
        // What was told last is what is read first.
        let again = |p: &Value| is_ready(p) && restarts(p) > before;
        cluster.until(&format!("{PODS}/q"), again).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_becomes_of_a_pod_is_told_as_a_kubelet_tells_it() -> Result<()> {
    let cluster = Cluster::new(PROGRAM, &UP).await?;
    let make = async |name: &str, spec: Value| cluster.create(PODS, pod(name, spec)).await;
    let side = "trap 'echo ends; exit 0' TERM; while true; do sleep 0.1; done";
    let mut sidecar = shell(side);
    (sidecar["name"], sidecar["restartPolicy"]) = ("side".into(), "Always".into());
    let mut first = shell("echo first");
    first["name"] = "first".into();
    let said = shell("echo main; echo said > $GODWIT_ROOT/dev/termination-log");
    make(
        "done",
        json!({
            "restartPolicy": "Never", "initContainers": [first, sidecar], "containers": [said],
        }),
    )
    .await?;
    make("crash", json!({"containers": [shell("echo run; exit 3")]})).await?;
    make("strange", json!({"containers": [{"name": "c", "image": "nginx:1"}]})).await?;
    let mut lacking = shell("true");
    lacking["envFrom"] = json!([{"configMapRef": {"name": "none"}}]);
    make("lacking", json!({"containers": [lacking]})).await?;
    let mut large = shell("true");
    large["resources"] = json!({"requests": {"cpu": "1000"}});
    make("large", json!({"containers": [large]})).await?;
    let mut probed =
        shell("sleep 1; touch $GODWIT_ROOT/ok; sleep 2; rm $GODWIT_ROOT/ok; sleep 1000");
    let probe = json!({"exec": {"command": ["sh", "-c", "test -e $GODWIT_ROOT/ok"]}, "periodSeconds": 1, "failureThreshold": 3});
    (probed["startupProbe"], probed["livenessProbe"]) = (probe.clone(), probe);
    make("probed", json!({"containers": [probed], "terminationGracePeriodSeconds": 1})).await?;

    let done =
        cluster.until(&format!("{PODS}/done"), |p| p["status"]["phase"] == "Succeeded").await?;
    let status = &done["status"];
    assert_eq!(status["containerStatuses"][0]["state"]["terminated"]["message"], "said\n");
    let side = &status["initContainerStatuses"][1];
    assert_eq!(
        (&side["restartCount"], &side["state"]["terminated"]["exitCode"]),
        (&json!(0), &json!(0))
    );
    assert_eq!(cluster.log("done", "container=side").await?, "ends\n");

    let path = format!("{PODS}/crash");
    let crash = cluster.until(&path, |p| waits(p) == "CrashLoopBackOff").await?;
    let last = &crash["status"]["containerStatuses"][0]["lastState"]["terminated"];
    assert_eq!((&last["exitCode"], &last["reason"]), (&json!(3), &json!("Error")));
    assert_eq!(cluster.log("crash", "previous=true").await?, "run\n");

    let strange = cluster.until(&format!("{PODS}/strange"), |p| waits(p) == "ErrImagePull").await?;
    let told = strange["status"]["containerStatuses"][0]["state"]["waiting"]["message"].to_string();
    assert!(told.contains(IMAGE), "{told}");
    cluster.until(&format!("{PODS}/lacking"), |p| waits(p) == "CreateContainerConfigError").await?;
    let why = |pod: &Value| pod["status"]["conditions"][0]["message"].as_str().map(str::to_owned);
    let large = cluster.until(&format!("{PODS}/large"), |p| why(p).is_some()).await?;
    assert_eq!(why(&large).unwrap(), "0/2 nodes are available: 2 Insufficient cpu.");
    // It passes its startup probe, and fails the other later.
    let again = |p: &Value| p["status"]["containerStatuses"][0]["restartCount"].as_i64() >= Some(1);
    cluster.until(&format!("{PODS}/probed"), again).await?;
    let told = |events: &Value| events.to_string().contains("Liveness probe failed");
    let events = cluster.until("/api/v1/namespaces/default/events", told).await?.to_string();
    assert!(!events.contains("Startup probe failed"), "{events}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn claims_are_served_within_their_pools_and_grow() -> Result<()> {
    let cluster = Cluster::new(PROGRAM, &UP).await?;
    let claim = |name: &str, class: &str, size: &str| {
        let block = class.ends_with("-block");
        json!({
            "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name},
            "spec": {
                "storageClassName": class, "accessModes": [if class.starts_with("shared") { "ReadWriteMany" } else { "ReadWriteOnce" }],
                "volumeMode": if block { "Block" } else { "Filesystem" },
                "resources": {"requests": {"storage": size}},
            },
        })
    };
    cluster.create(CLAIMS, claim("s", "shared-block", "600Mi")).await?;
    cluster.until(&format!("{CLAIMS}/s"), |claim| claim["status"]["phase"] == "Bound").await?;
    for (name, class) in
        [("t", "shared"), ("l", "local-block"), ("m", "local-block"), ("n", "scratch")]
    {
        cluster.create(CLAIMS, claim(name, class, "600Mi")).await?;
    }
    let events = "/api/v1/namespaces/default/events";
    let told = |text: &'static str| move |events: &Value| events.to_string().contains(text);
    cluster.until(events, told("the shared pool has 444596224 left")).await?;
    // Each node has room for one of the three.
    for name in ["l", "m", "n"] {
        let mut container = shell("trap exit TERM; while true; do sleep 0.1; done");
        let field = if name == "n" { "volumeMounts" } else { "volumeDevices" };
        let place = if name == "n" { "mountPath" } else { "devicePath" };
        container[field] = json!([{"name": "v", place: "/disk"}]);
        let volumes = json!([{"name": "v", "persistentVolumeClaim": {"claimName": name}}]);
        let spec = json!({"containers": [container], "volumes": volumes});
        cluster.create(PODS, pod(name, spec)).await?;
    }
    let all = |holds: fn(&Value) -> bool| {
        move |pods: &Value| pods["items"].as_array().unwrap().iter().filter(|p| holds(p)).count()
    };
    let placed = |pods: &Value| all(is_ready)(pods) == 2;
    let pods = cluster.until(PODS, placed).await?;
    let nodes: std::collections::BTreeSet<String> = pods["items"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|p| Some(p["spec"]["nodeName"].as_str()?.into()))
        .collect();
    assert_eq!(nodes.len(), 2, "{pods}");
    cluster
        .until(PODS, |pods| pods.to_string().contains("2 node(s) did not have enough free storage"))
        .await?;
    // A smaller shared claim fits, and a larger one grows as far as there is room.
    let grow = json!({"spec": {"resources": {"requests": {"storage": "900Mi"}}}});
    cluster.send("PATCH", &format!("{CLAIMS}/s"), Some(grow)).await?;
    let grown = cluster
        .until(&format!("{CLAIMS}/s"), |c| c["status"]["capacity"]["storage"] == "900Mi")
        .await?;
    let volume = grown["spec"]["volumeName"].as_str().context("a volume")?;
    let volume = cluster.send("GET", &format!("/api/v1/persistentvolumes/{volume}"), None).await?;
    let disk = volume["spec"]["hostPath"]["path"].as_str().context("a path")?;
    assert_eq!(std::fs::metadata(disk)?.len(), 900 << 20);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn kubectl_reads_logs_and_empties_a_node() -> Result<()> {
    let cluster = Cluster::new(PROGRAM, &UP).await?;
    let run = |arguments: &[&str]| match cluster.kubectl(arguments) {
        Some((true, said)) => Ok(said),
        Some((false, said)) => bail!("kubectl {arguments:?}: {said}"),
        None => Ok("NOT RUN".into()),
    };
    if run(&["get", "nodes"])? == "NOT RUN" {
        eprintln!("NOT RUN: there is no kubectl of 1.27 or later");
        return Ok(());
    }
    let script = "i=0; trap exit TERM; while [ $i -lt 50 ]; do i=$((i+1)); echo line $i; sleep 0.02; done; exit 0";
    let image = format!("--image={IMAGE}");
    run(&["run", "lines", &image, "--restart=Never", "--command", "--", "sh", "-c", script])?;
    let ready = ["wait", "--for=jsonpath={.status.phase}=Running", "pod/lines", "--timeout=30s"];
    run(&ready)?;
    let all: String = (1..=50).map(|n| format!("line {n}\n")).collect();
    assert_eq!(run(&["logs", "-f", "lines"])?, all);
    assert_eq!(run(&["logs", "--tail=1", "lines"])?, "line 50\n");
    let stays = "trap exit TERM; while true; do sleep 0.1; done";
    for n in 0..4 {
        run(&[
            "run",
            &format!("p{n}"),
            &image,
            "--labels=app=p",
            "--command",
            "--",
            "sh",
            "-c",
            stays,
        ])?;
    }
    run(&["wait", "--for=condition=Ready", "pod", "-l", "app=p", "--timeout=30s"])?;
    let on = |node: &str| {
        run(&[
            "get",
            "pods",
            "-l",
            "app=p",
            "-o",
            "name",
            "--field-selector",
            &format!("spec.nodeName={node}"),
        ])
    };
    let stay = on("local-2")?;
    assert!(!stay.is_empty() && !on("local-1")?.is_empty(), "the pods are on one node");
    run(&["drain", "local-1", "--force", "--timeout=30s"])?;
    assert_eq!((on("local-1")?, on("local-2")?), (String::new(), stay));
    assert!(run(&["get", "node", "local-1"])?.contains("Ready,SchedulingDisabled"));
    run(&["run", "last", &image, "--command", "--", "sh", "-c", stays])?;
    run(&["wait", "--for=condition=Ready", "pod/last", "--timeout=30s"])?;
    assert!(run(&["get", "pod", "last", "-o", "wide"])?.contains("local-2"));
    let exec = cluster.kubectl(&["exec", "last", "--", "ls"]).context("it was there before")?;
    assert!(!exec.0 && exec.1.contains("pods/exec is not served"), "{}", exec.1);
    run(&["uncordon", "local-1"])?;
    assert!(
        run(&["describe", "pod", "last"])?
            .contains("Successfully assigned default/last to local-2")
    );
    assert!(run(&["events", "--for", "pod/last"])?.contains("Started container last"));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_is_said_at_once() -> Result<()> {
    let cluster = Cluster::new(PROGRAM, &UP).await?;
    let fails = |arguments: &[&str], why: &str| -> Result<()> {
        let done = cluster.godwit(arguments)?;
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        ensure!(!done.status.success() && said.contains(why), "{arguments:?}: {said}");
        Ok(())
    };
    fails(&["up"], "cluster local runs already")?;
    let record: Value = serde_json::from_slice(&std::fs::read(cluster.path("cluster.json"))?)?;
    let port =
        record["address"].as_str().and_then(|a| a.rsplit_once(':')).context("a port")?.1.to_owned();
    fails(&["up", "--name", "other", "--port", &port], "another program may have the port")?;
    fails(&["up", "--name", "other", "--storage", "much"], "is no size")?;
    fails(&["up", "--name", "other", "--image", "x"], "is not NAME=PROGRAM")?;
    fails(&["up", "--name", "other", "--image", "x=/none"], "is no program")?;
    fails(&["up", "--name", "Other"], "is no name of a cluster")?;
    Ok(())
}
