//! Clusters that are linked: what that lets them do with each other, and what not.

use crate::PROGRAM;
use crate::across::{MAPS, UP, World, believe, bundle, storage};
use crate::types::{came_along, differs, takes};
use anyhow::{Context, Result, ensure};
use api::migration::{Half, Side};
use channel::identity::{Ca, Credentials, Role, SpiffeId, Trust};
use channel::tls;
use e2e::cluster::{Cluster, link, unlink};
use e2e::guest;
use e2e::registry::Registry;
use e2e::vms::{
    MOVES, Oracle, SETTINGS, VMIS, VMS, holds, import, is_running, migration, shows, vm,
};
use handler::cluster::moves::Plan;
use handler::cluster::serve::{self, Act};
use handover::record::Swap;
use serde_json::{Value, json};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;
use synchronizer::join::Token;
use synchronizer::wire::{self, Ask, Told};
use tokio::task::JoinHandle;

/// Two clusters are linked by one command, and a VM goes with all that it needs by another, and back;
/// whatever stands in its way is told at once, and one that failed leaves nothing.
#[tokio::test(flavor = "multi_thread")]
async fn one_command_links_clusters_and_another_takes_a_vm_there_with_all_that_it_needs()
-> Result<()> {
    let registry = Registry::start()?;
    let image = registry.push("guest", "disk/guest.raw", &guest::image("disk.raw")?)?;
    let east = Cluster::named("east", PROGRAM, &UP, &[]).await?;
    let west = Cluster::named("west", PROGRAM, &UP, &[]).await?;
    let kept = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "files"},
        "data": {"a": "b"}});
    east.create("/api/v1/namespaces/default/configmaps", kept).await?;
    let volumes = vec![
        json!({"name": "root", "dataVolume": {"name": "web-root"}}),
        json!({"name": "files", "configMap": {"name": "files"}}),
    ];
    let template = import("web-root", &image, storage());
    takes(&east, vm("web", "Always", volumes, vec![template])).await?;
    let web = format!("{VMS}/web");
    let mut console = east.terminal("web")?;
    Oracle::begin(&mut console)?;
    drop(console);

    // All that stands in its way, on both sides, at once.
    let told = east.refuses(&["migrate", "vm/web", "--to", "west", "--dry-run"])?;
    ensure!(told.contains("no link to a cluster west"), "{told}");
    link(&east, &west)?;
    let wrong = [
        "migrate",
        "vm/web",
        "--to",
        "west",
        "--dry-run",
        "--to-namespace",
        "none",
        "--storage-class",
        "nonesuch",
    ];
    let told = east.refuses(&wrong)?;
    ensure!(told.contains("no namespace none") && told.contains("class nonesuch"), "{told}");
    differs(&east, &west).await?;
    let told = east.does(&["migrate", "vm/web", "--to", "west", "--dry-run"])?;
    ensure!(told.contains("nothing speaks against it"), "{told}");
    let none = |vms: &Value| vms["items"].as_array().is_some_and(Vec::is_empty);
    west.until(VMS, none).await?;

    east.does(&["migrate", "vm/web", "--to", "west"])?;
    west.until(&web, is_running).await?;
    east.until(&web, shows("Stopped")).await?;
    west.until("/api/v1/namespaces/default/configmaps/files", |map| map["data"]["a"] == "b")
        .await?;
    came_along(&west).await?;
    let mut console = west.console("web")?;
    Oracle::again(&mut console).check()?;
    drop(console);
    // One that is there already, and has not left for where it comes from, is another.
    let told = west.does(&["migrate", "vm/web", "--to", "east", "--dry-run"])?;
    ensure!(told.contains("nothing speaks against it"), "{told}");
    west.does(&["migrate", "vm/web", "--to", "east"])?;
    let back = east.until(&web, is_running).await?;
    ensure!(back["spec"]["runStrategy"] == "Always", "{back}");
    let mut console = east.console("web")?;
    Oracle::again(&mut console).check()?;
    drop(console);

    // Those who are not linked any more do not believe each other; what was under way is cut.
    let slow = json!({"spec": {"configuration": {"migrations": {"bandwidthPerMigration": "4Mi"}}}});
    east.send("PATCH", SETTINGS, Some(slow)).await?;
    east.does(&["migrate", "vm/web", "--to", "west", "--no-wait"])?;
    let all_are = |phase: &'static str| {
        move |moves: &Value| {
            let all = moves["items"].as_array().cloned().unwrap_or_default();
            all.iter().any(|one| one["status"]["phase"] == phase)
        }
    };
    east.until(MOVES, all_are("Running")).await?;
    unlink(&east, &west)?;
    let forgotten = |map: &Value| {
        let bundle = map["data"]["ca-bundle"].as_str().unwrap_or_default();
        bundle.matches("BEGIN CERTIFICATE").count() == 1
    };
    west.until(&format!("{MAPS}/kubevirt-ca"), forgotten).await?;
    east.until(&format!("{MAPS}/kubevirt-ca"), forgotten).await?;
    let told = east.refuses(&["migrate", "vm/web", "--to", "west", "--dry-run"])?;
    ensure!(told.contains("no link"), "{told}");
    east.until(MOVES, all_are("Failed")).await?;
    west.until(MOVES, all_are("Failed")).await?;
    let moves = VMS.replace("kubevirt.io/v1", "godwit.dev/v1alpha1");
    let moves = moves.replace("virtualmachines", "virtualmachinemoves");
    east.until(&moves, all_are("Failed")).await?;
    west.until_qemus(0)?;
    let mut console = east.console("web")?;
    Oracle::again(&mut console).check()?;
    Ok(())
}

/// Whatever stands in the way at the other side is told before anything is made.
#[tokio::test(flavor = "multi_thread")]
async fn each_thing_in_the_way_of_a_move_to_another_cluster_is_told_alone() -> Result<()> {
    let registry = Registry::start()?;
    let image = registry.push("guest", "disk/guest.raw", &guest::image("disk.raw")?)?;
    let world = World::new().await?;
    let World { east, west, .. } = &world;
    link(east, west)?;
    let dongle = json!({"status": {
        "capacity": {"example.com/dongle": "1"}, "allocatable": {"example.com/dongle": "1"},
    }});
    east.send("PATCH", "/api/v1/nodes/east-1/status", Some(dongle.clone())).await?;
    let root = vec![json!({"name": "root", "dataVolume": {"name": "web-root"}})];
    let mut web = vm("web", "Always", root, vec![import("web-root", &image, storage())]);
    let domain = &mut web["spec"]["template"]["spec"]["domain"];
    let mac = "02:00:00:00:00:77";
    domain["resources"] = json!({"requests": {"example.com/dongle": "1"}});
    domain["devices"]["interfaces"] =
        json!([{"name": "default", "masquerade": {}, "macAddress": mac}]);
    web["spec"]["template"]["spec"]["networks"] = json!([{"name": "default", "pod": {}}]);
    east.create(VMS, web).await?;
    east.until(&format!("{VMS}/web"), is_running).await?;
    let faults = || -> Result<Vec<String>> {
        let run = east.tries(&["migrate", "vm/web", "--to", "west", "--dry-run", "-o", "json"])?;
        let told: Value = serde_json::from_slice(&run.stdout)
            .with_context(|| String::from_utf8_lossy(&run.stderr).into_owned())?;
        Ok(serde_json::from_value(told["faults"].clone())?)
    };
    let only = |what: &str| -> Result<()> {
        let found = faults()?;
        ensure!(found.len() == 1 && found[0].contains(what), "{what}: {found:?}");
        Ok(())
    };
    only("example.com/dongle")?;
    west.send("PATCH", "/api/v1/nodes/west-1/status", Some(dongle)).await?;
    ensure!(faults()?.is_empty(), "{:?}", faults()?);

    let node = "/api/v1/nodes/west-1";
    let set = async |path: &str, patch: Value| west.send("PATCH", path, Some(patch)).await;
    // Each is put there, told, and taken away again.
    let space = "/api/v1/namespaces/default";
    let obstacles = [
        (
            space,
            json!({"metadata": {"annotations": {"godwit.dev/peers": "north"}}}),
            json!({"metadata": {"annotations": {"godwit.dev/peers": null}}}),
            "takes nothing",
        ),
        (
            node,
            json!({"spec": {"unschedulable": true}}),
            json!({"spec": {"unschedulable": null}}),
            "unschedulable",
        ),
        (
            node,
            json!({"metadata": {"labels": {"machine-type.node.kubevirt.io/pc-q35-7.2": null}}}),
            json!({"metadata": {"labels": {"machine-type.node.kubevirt.io/pc-q35-7.2": "true"}}}),
            "machine-type",
        ),
        (
            node,
            json!({"metadata": {"annotations": {"godwit.dev/gateway": "127.0.0.1:1"}}}),
            json!({"metadata": {"annotations": {"godwit.dev/gateway": null}}}),
            "127.0.0.1:1",
        ),
    ];
    for (path, put, take, what) in obstacles {
        let before = west.send("GET", path, None).await?;
        set(path, put).await?;
        only(what)?;
        set(path, take).await?;
        if what == "127.0.0.1:1" {
            only("does not say where its gateway is")?;
            let gateway = &before["metadata"]["annotations"]["godwit.dev/gateway"];
            let back = json!({"metadata": {"annotations": {"godwit.dev/gateway": gateway}}});
            set(path, back).await?;
        }
    }
    let quotas = format!("{space}/resourcequotas");
    let quota = json!({"metadata": {"name": "small"}, "spec": {"hard": {"pods": "0"}}});
    west.create(&quotas, quota).await?;
    west.until(&format!("{quotas}/small"), |q| q["status"]["hard"]["pods"] == "0").await?;
    only("quota small")?;
    west.send("DELETE", &format!("{quotas}/small"), None).await?;
    let mut other = vm("other", "Always", vec![], vec![]);
    let spec = &mut other["spec"]["template"]["spec"];
    spec["nodeSelector"] = json!({"is": "nowhere"});
    spec["domain"]["devices"]["interfaces"] =
        json!([{"name": "default", "masquerade": {}, "macAddress": mac}]);
    spec["networks"] = json!([{"name": "default", "pod": {}}]);
    west.create(VMS, other).await?;
    west.until(&format!("{VMIS}/other"), |_| true).await?;
    only(mac)?;
    west.send("DELETE", &format!("{VMS}/other"), None).await?;
    west.until(VMIS, |all| all["items"].as_array().is_some_and(Vec::is_empty)).await?;
    west.create(VMS, vm("web", "Halted", vec![], vec![])).await?;
    only("another VM default/web")?;
    west.send("DELETE", &format!("{VMS}/web"), None).await?;
    west.until(VMS, |all| all["items"].as_array().is_some_and(Vec::is_empty)).await?;

    let told = east.does(&["migrate", "vm/web", "--to", "west", "--dry-run"])?;
    for word in ["nothing speaks against it", "to copy", "there and back", "takes", "pause"] {
        ensure!(told.contains(word), "{word}: {told}");
    }
    Ok(())
}

/// One machine at an edge is brought up to date: its guest is elsewhere meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn a_clusters_only_node_is_replaced_while_its_guest_runs_elsewhere() -> Result<()> {
    let registry = Registry::start()?;
    let image = registry.push("guest", "disk/guest.raw", &guest::image("disk.raw")?)?;
    let mut east = Cluster::named("east", PROGRAM, &UP, &[]).await?;
    let west = Cluster::named("west", PROGRAM, &UP, &[]).await?;
    for cluster in [&east, &west] {
        let is_found = |s: &Value| s["status"]["synchronizationAddresses"][0].is_string();
        cluster.until(SETTINGS, is_found).await?;
    }
    link(&east, &west)?;
    let root = vec![json!({"name": "root", "dataVolume": {"name": "web-root"}})];
    east.create(VMS, vm("web", "Always", root, vec![import("web-root", &image, storage())]))
        .await?;
    let web = format!("{VMS}/web");
    east.until(&web, is_running).await?;
    let mut console = east.terminal("web")?;
    Oracle::begin(&mut console)?;
    drop(console);
    east.does(&["migrate", "vm/web", "--to", "west"])?;
    west.until(&web, is_running).await?;
    let there = west.until_qemus(1)?;
    let before = Oracle::again(&mut west.console("web")?).check()?;

    east.come_back_as(env!("CARGO_BIN_EXE_godwit-another-build"), &UP).await?;
    ensure!(west.qemus()? == there, "the guest did not stay");
    let ready = |link: &Value| holds(link, "Ready");
    west.until("/apis/godwit.dev/v1alpha1/clusterlinks/east", ready).await?;
    east.until(&web, shows("Stopped")).await?;
    ensure!(east.qemus()?.is_empty(), "it began a second one");
    west.does(&["migrate", "vm/web", "--to", "east"])?;
    east.until(&web, is_running).await?;
    west.until_qemus(0)?;
    let after = Oracle::again(&mut east.console("web")?).check()?;
    ensure!(after > before, "the oracle began anew");
    let moves = east.send("GET", MOVES, None).await?;
    let back = moves["items"]
        .as_array()
        .and_then(|all| all.iter().find(|one| one["spec"].get("receive").is_some()));
    ensure!(back.is_some_and(|back| back["status"]["phase"] == "Succeeded"), "{moves}");
    Ok(())
}

/// Its address may change under way, its pod comes and goes with the feature gate: the link follows.
#[tokio::test(flavor = "multi_thread")]
async fn a_synchronizer_is_where_the_settings_want_it_and_its_peers_find_it() -> Result<()> {
    let with_network = [&UP[..], &["--migration-network", "moves=127.91.0.0/24"]].concat();
    let east = Cluster::named("east", PROGRAM, &with_network, &[]).await?;
    let west = Cluster::named("west", PROGRAM, &UP, &[]).await?;
    let at = |begin: String| {
        move |settings: &Value| {
            let found = settings["status"]["synchronizationAddresses"][0].as_str();
            found.is_some_and(|found| found.starts_with(&begin))
        }
    };
    for cluster in [&east, &west] {
        cluster.until(SETTINGS, at("127.0.0.1:".into())).await?;
    }
    link(&east, &west)?;
    let known = async |address: Value| -> Result<()> {
        let ends = |link: &Value| link["spec"]["addresses"][0] == address && holds(link, "Ready");
        west.until("/apis/godwit.dev/v1alpha1/clusterlinks/east", ends).await.map(|_| ())
    };
    let moves = json!({"spec": {"configuration": {"migrations": {"network": "moves"}}}});
    east.send("PATCH", SETTINGS, Some(moves)).await?;
    let there = east.until(SETTINGS, at("127.91.0.254:".into())).await?;
    known(there["status"]["synchronizationAddresses"][0].clone()).await?;
    let free = std::net::TcpListener::bind("127.91.0.254:0")?.local_addr()?.port();
    let port = json!({"spec": {"synchronizationPort": free.to_string()}});
    east.send("PATCH", SETTINGS, Some(port)).await?;
    east.until(SETTINGS, at(format!("127.91.0.254:{free}"))).await?;
    known(format!("127.91.0.254:{free}").into()).await?;

    let gates = |closed: Value| {
        json!({"spec": {"configuration": {"developerConfiguration": {
            "featureGates": [], "disabledFeatureGates": closed,
        }}}})
    };
    let pods = "/api/v1/namespaces/kubevirt/pods";
    let role = |pods: &Value| {
        let all = pods["items"].as_array().cloned().unwrap_or_default();
        all.into_iter().find(|pod| {
            pod["metadata"]["labels"]["kubevirt.io"] == "virt-synchronization-controller"
        })
    };
    east.until(pods, |all| role(all).is_some_and(|pod| holds(&pod, "Ready"))).await?;
    east.send("PATCH", SETTINGS, Some(gates(json!(["DecentralizedLiveMigration"])))).await?;
    east.until(pods, |all| role(all).is_none()).await?;
    let none =
        |s: &Value| s["status"]["synchronizationAddresses"].as_array().is_none_or(Vec::is_empty);
    east.until(SETTINGS, none).await?;
    let lost = |link: &Value| !holds(link, "Ready");
    west.until("/apis/godwit.dev/v1alpha1/clusterlinks/east", lost).await?;
    east.send("PATCH", SETTINGS, Some(gates(json!([])))).await?;
    east.until(pods, |all| role(all).is_some_and(|pod| holds(&pod, "Ready"))).await?;
    known(format!("127.91.0.254:{free}").into()).await
}

/// Nobody holds both: one invites, the other joins, once.
#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_joins_by_a_token_that_is_good_once_and_not_for_long() -> Result<()> {
    let east = Cluster::named("east", PROGRAM, &UP, &[]).await?;
    let west = Cluster::named("west", PROGRAM, &UP, &[]).await?;
    for cluster in [&east, &west] {
        let is_found = |s: &Value| s["status"]["synchronizationAddresses"][0].is_string();
        cluster.until(SETTINGS, is_found).await?;
    }
    let token = east.does(&["cluster", "invite"])?;
    let token = token.trim();
    east.refuses(&["cluster", "join", token])?;
    west.refuses(&["cluster", "join", &token[..token.len() / 2]])?;
    let link = "/apis/godwit.dev/v1alpha1/clusterlinks";
    ensure!(west.send("GET", link, None).await?["items"] == json!([]));

    // One that knows the invitation and not its secret; and one whose time is over.
    let read = Token::read(token).map_err(anyhow::Error::msg)?;
    let guess = |secret: &str| Ask::Join {
        invitation: read.invitation.clone(),
        secret: secret.into(),
        bundle: read.bundle.clone(),
        address: "127.0.0.1:1".into(),
    };
    let ask = async |ask: Ask| -> Result<Told> {
        let mut trust = Trust::new();
        trust.add_pem(&read.bundle)?;
        let asked = wire::ask_as_guest(trust, &read.addresses[0], "east", &ask).await;
        asked.map_err(anyhow::Error::msg)
    };
    let refused = |told: &Told| matches!(told, Told::Refused { .. });
    ensure!(refused(&ask(guess(&"0".repeat(64))).await?));
    ensure!(refused(&ask(guess("")).await?));
    let other = Ask::Settle {
        id: "i".into(),
        namespace: "default".into(),
        name: "web".into(),
        succeeded: true,
    };
    ensure!(refused(&ask(other).await?), "a guest asked something else");
    let secret =
        format!("/api/v1/namespaces/kubevirt/secrets/cluster-invitation-{}", read.invitation);
    let over = json!({"metadata": {"annotations": {"godwit.dev/until": "2026-01-01T00:00:00Z"}}});
    let kept = east.send("GET", &secret, None).await?;
    east.send("PATCH", &secret, Some(over)).await?;
    ensure!(refused(&ask(guess(&read.secret)).await?), "it was over");
    let again = json!({"metadata": {"annotations": kept["metadata"]["annotations"]}});
    east.send("PATCH", &secret, Some(again)).await?;
    ensure!(east.send("GET", link, None).await?["items"] == json!([]));

    let told = west.does(&["cluster", "join", token])?;
    ensure!(told.contains("are linked"), "{told}");
    let ready = |link: &Value| holds(link, "Ready");
    for (cluster, other) in [(&east, "west"), (&west, "east")] {
        cluster.until(&format!("{link}/{other}"), ready).await?;
    }
    ensure!(east.send("GET", &secret, None).await.is_err(), "it is there still");
    ensure!(refused(&ask(guess(&read.secret)).await?), "it was used twice");
    Ok(())
}

/// A cluster speaks for itself alone: whatever else it asks of another is refused, and changes nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_that_is_believed_may_not_speak_for_another_nor_reach_beyond_its_own()
-> Result<()> {
    let separate = [&UP[..], &["--separate"]].concat();
    let east = Cluster::named("east", PROGRAM, &separate, &[]).await?;
    let west = Cluster::named("west", PROGRAM, &separate, &[]).await?;
    let (of_east, of_west) = (bundle(&east).await?, bundle(&west).await?);
    believe(&east, &of_west).await?;
    believe(&west, &of_east).await?;
    let has = |s: &Value| s["status"]["synchronizationAddresses"][0].is_string();
    let settings = east.until(SETTINGS, has).await?;
    let address = settings["status"]["synchronizationAddresses"][0].as_str().context("a text")?;
    let of_role = |role: &str| -> Result<Credentials> {
        Ok(Credentials::load(&west.path(&format!("roles/{role}/identity")))?)
    };
    let ask = async |role: &str, ask: Ask| -> Result<Told> {
        // Processes read new credentials now and then.
        let began = std::time::Instant::now();
        loop {
            match wire::ask(&of_role(role)?, address, Some("east"), &ask).await {
                Ok((_, told)) => return Ok(told),
                Err(_) if began.elapsed().as_secs() < 30 => {
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                }
                Err(why) => anyhow::bail!(why),
            }
        }
    };
    let refused = |told: &Told| matches!(told, Told::Refused { .. } | Told::Unknown { .. });
    let abort = || Swap::Abort { epoch: 1, attempt: "a".into() };
    let owner = |asker: &str| Ask::Owner {
        asker: asker.into(),
        namespace: "default".into(),
        name: "web".into(),
        change: abort(),
    };
    // In another's name, and in none.
    for asker in ["spiffe://east/default/web", "spiffe://north/default/web", "spiffe://west"] {
        let told = ask("synchronizer", owner(asker)).await?;
        ensure!(refused(&told), "{asker}: {told:?}");
    }
    let half = Half { cluster: "east".into(), migration: "m".into(), ..Half::default() };
    let tell = |half: &Half| Ask::Tell {
        migration: "known".into(),
        side: Side::Source,
        half: Box::new(half.clone()),
        seen: 0,
    };
    let told = ask("synchronizer", tell(&half)).await?;
    ensure!(refused(&told), "of a migration that nobody has: {told:?}");
    // One that waits is not bound to who is not what he says.
    let blank = json!({"metadata": {"name": "web-root"},
        "spec": {"source": {"blank": {}}, "storage": storage()}});
    let root = json!({"name": "root", "dataVolume": {"name": "web-root"}});
    east.create(VMS, vm("web", "WaitAsReceiver", vec![root], vec![blank])).await?;
    let waits = |vmi: &Value| vmi["status"]["phase"] == "WaitingForSync";
    east.until(&format!("{VMIS}/web"), waits).await?;
    let mut receive = migration("known", "web");
    receive["spec"]["receive"] = json!({"migrationID": "known"});
    east.create(MOVES, receive).await?;
    let path = format!("{MOVES}/known");
    east.until(&path, |m| m["status"]["phase"] == "WaitingForSync").await?;
    let told = ask("synchronizer", tell(&half)).await?;
    ensure!(refused(&told), "in another's name: {told:?}");
    // A namespace that has nothing to do with it.
    let apart = json!({"metadata": {"annotations": {"godwit.dev/peers": "north, south"}}});
    let default = "/api/v1/namespaces/default";
    east.send("PATCH", default, Some(apart)).await?;
    let own = Half { cluster: "west".into(), ..half.clone() };
    let began = std::time::Instant::now();
    loop {
        let told = ask("synchronizer", tell(&own)).await?;
        if refused(&told) {
            break;
        }
        ensure!(began.elapsed().as_secs() < 30, "{told:?}");
    }
    let found = east.send("GET", &path, None).await?;
    ensure!(found["status"]["phase"] == "WaitingForSync", "{found}");
    // Those who are believed, and not linked, bring nothing; and a handler asks only its own cluster.
    let offer = Ask::Offer { id: "i".into(), offer: Box::default(), check: false };
    ensure!(refused(&ask("synchronizer", offer).await?));
    let trust = Ask::Trust { bundle: of_west.clone(), address: address.into() };
    ensure!(refused(&ask("synchronizer", trust).await?));
    let question = Box::new(owner("spiffe://west/default/web"));
    let forward = Ask::Forward { cluster: "west".into(), question };
    ensure!(refused(&ask("handler-west-1", forward.clone()).await?));
    ensure!(refused(&ask("synchronizer", forward).await?));
    // What its API role is called in its own cluster is nothing in another.
    let node = east.send("GET", "/api/v1/nodes/east-1", None).await?;
    let door = node["metadata"]["annotations"]["godwit.dev/handler"].as_str().context("a door")?;
    let ca = Ca::load(&west.path("ca/1"))?;
    let trust = of_role("synchronizer")?.trust;
    let handler = SpiffeId::new("east", Role::Handler, "east-1")?;
    for role in [Role::Api, Role::Synchronizer] {
        let id = SpiffeId::new("west", role, "api")?;
        let client = tls::Client::new(ca.issue(&id, Duration::from_secs(60))?, trust.clone());
        for act in [Act::Pause, Act::Console, Act::Measure, Act::Forecast] {
            let (namespace, name) = ("default".into(), "web".into());
            let plan = (act == Act::Forecast).then(Plan::default);
            let asked = serve::Ask { act, namespace, name, plan };
            let told = serve::ask(&client, door, &handler, &asked).await;
            let code = told.err().map(|told| told.code);
            ensure!(code == Some(403), "{id} was let do {act:?}: {code:?}");
        }
    }
    Ok(())
}

/// A port before a gateway that lets everybody through but one.
async fn a_wall(gateway: SocketAddr, but: IpAddr) -> Result<(SocketAddr, JoinHandle<()>)> {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let task = tokio::spawn(async move {
        while let Ok((mut near, from)) = listener.accept().await {
            if from.ip() == but {
                continue;
            }
            tokio::spawn(async move {
                if let Ok(mut far) = tokio::net::TcpStream::connect(gateway).await {
                    let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
                }
            });
        }
    });
    Ok((address, task))
}

/// Where only the synchronizers reach each other, they pass on what goes from node to node.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_goes_through_both_synchronizers_where_its_node_reaches_no_other() -> Result<()> {
    let registry = Registry::start()?;
    let image = registry.push("guest", "disk/guest.raw", &guest::image("disk.raw")?)?;
    // Its gateway dials from there.
    let with_network = [&UP[..], &["--migration-network", "moves=127.92.0.0/24"]].concat();
    let east = Cluster::named("east", PROGRAM, &with_network, &[]).await?;
    let west = Cluster::named("west", PROGRAM, &UP, &[]).await?;
    let moves = json!({"spec": {"configuration": {"migrations": {"network": "moves"}}}});
    east.until(SETTINGS, |_| true).await?;
    east.send("PATCH", SETTINGS, Some(moves)).await?;
    for (cluster, at) in [(&east, "127.92.0.254:"), (&west, "127.0.0.1:")] {
        let is_found = |s: &Value| {
            let found = s["status"]["synchronizationAddresses"][0].as_str();
            found.is_some_and(|found| found.starts_with(at))
        };
        cluster.until(SETTINGS, is_found).await?;
    }
    link(&east, &west)?;
    let root = vec![json!({"name": "root", "dataVolume": {"name": "web-root"}})];
    east.create(VMS, vm("web", "Always", root, vec![import("web-root", &image, storage())]))
        .await?;
    let web = format!("{VMS}/web");
    east.until(&web, is_running).await?;
    Oracle::begin(&mut east.terminal("web")?)?;

    let node = "/api/v1/nodes/west-1";
    let has = |node: &Value| node["metadata"]["annotations"]["godwit.dev/gateway"].is_string();
    let found = west.until(node, has).await?;
    let gateway = found["metadata"]["annotations"]["godwit.dev/gateway"].as_str().context("one")?;
    let (wall, task) = a_wall(gateway.parse()?, "127.92.0.1".parse()?).await?;
    let behind = json!({"metadata": {"annotations": {"godwit.dev/gateway": wall.to_string()}}});
    west.send("PATCH", node, Some(behind)).await?;
    let run = east.tries(&["migrate", "vm/web", "--to", "west", "--dry-run"])?;
    let said = String::from_utf8_lossy(&run.stderr).into_owned();
    ensure!(
        run.status.success() && said.contains("through both clusters' synchronizers"),
        "{said}"
    );
    let run = east.tries(&["migrate", "vm/web", "--to", "west", "--verify"])?;
    let said = String::from_utf8_lossy(&run.stderr).into_owned();
    ensure!(run.status.success() && said.contains("disks verified"), "{said}");
    west.until(&web, is_running).await?;
    Oracle::again(&mut west.console("web")?).check()?;
    let events = east.send("GET", "/api/v1/namespaces/default/events", None).await?;
    ensure!(events.to_string().contains("Relayed"), "nobody was told: {events}");
    task.abort();
    Ok(())
}
