//! Start, stop, restart and the rest, of each run strategy.

use crate::world::{MOVES, SUB, VMIS, VMS, World, own, user};
use http::Method;
use serde_json::{Value, json};
use webapi::Act;

/// Does something to a VM. Its spec's strategy, what is asked for in its status, and the answer.
async fn done(world: &World, name: &str, what: &str, body: &Value) -> (Value, Value, u16) {
    let path = format!("{SUB}/virtualmachines/{name}/{what}");
    let reply = world.put(&user("editor"), &path, body).await;
    let vm = world.get(&format!("{VMS}/{name}")).await;
    (vm["spec"]["runStrategy"].clone(), vm["status"]["stateChangeRequests"].clone(), reply.code)
}

#[tokio::test]
async fn a_start_is_what_the_strategy_makes_of_it() {
    let world = World::new().await;
    let paused = json!({"paused": true});
    let start = json!([{"action": "Start"}]);
    let standing = json!([{"action": "Start", "data": {"paused": "true"}}]);
    for (strategy, body, after, requests) in [
        ("Halted", json!({}), "Always", Value::Null),
        ("Halted", paused.clone(), "Always", standing.clone()),
        ("Manual", json!({}), "Manual", start.clone()),
        ("Manual", paused.clone(), "Manual", standing.clone()),
        ("RerunOnFailure", json!({}), "RerunOnFailure", start.clone()),
        ("Once", json!({}), "Once", start.clone()),
        ("Always", json!({}), "Always", start.clone()),
    ] {
        let name = format!("{}-{}", strategy.to_lowercase(), body["paused"] == true);
        world.machine(&name, strategy).await;
        let mut dry = body.clone();
        dry["dryRun"] = json!(["All"]);
        let tried = done(&world, &name, "start", &dry).await;
        assert_eq!(tried, (strategy.into(), Value::Null, 202), "{name} dry");
        let found = done(&world, &name, "start", &body).await;
        assert_eq!(found, (after.into(), requests, 202), "{name}");
        // What runs is not started again; what has ended is.
        world.instance(&name, "Running").await;
        let (.., code) = done(&world, &name, "start", &body).await;
        assert_eq!(code, 409, "{name} runs");
        let over = json!({"status": {"phase": "Failed"}});
        world.merge(&own(), &format!("{VMIS}/{name}/status"), &over).await;
        let (.., code) = done(&world, &name, "start", &body).await;
        assert_eq!(code, 202, "{name} has failed");
    }
    // The older form stays one.
    let old = json!({"spec": {"runStrategy": null, "running": false}});
    world.machine("old", "Halted").await;
    assert_eq!(world.merge(&user("editor"), &format!("{VMS}/old"), &old).await.code, 200);
    assert_eq!(done(&world, "old", "start", &Value::Null).await.2, 202);
    let vm = world.get(&format!("{VMS}/old")).await;
    assert_eq!((&vm["spec"]["running"], &vm["spec"]["runStrategy"]), (&json!(true), &Value::Null));
}

#[tokio::test]
async fn a_stop_is_what_the_strategy_makes_of_it_and_takes_the_place_of_a_start() {
    let world = World::new().await;
    for (strategy, after, without) in [
        ("Always", "Halted", 202),
        ("RerunOnFailure", "Halted", 202),
        ("Once", "Halted", 202),
        ("Manual", "Manual", 409),
        ("Halted", "Halted", 409),
    ] {
        let idle = format!("{}-idle", strategy.to_lowercase());
        world.machine(&idle, strategy).await;
        assert_eq!(done(&world, &idle, "stop", &json!({})).await.2, without, "{idle}");
        let name = strategy.to_lowercase();
        world.machine(&name, strategy).await;
        let vmi = world.instance(&name, "Running").await;
        let asked = json!({"status": {"stateChangeRequests": [{"action": "Start"}]}});
        world.merge(&own(), &format!("{VMS}/{name}/status"), &asked).await;
        let (now, requests, code) = done(&world, &name, "stop", &json!({"gracePeriod": 7})).await;
        assert_eq!((now, code), (after.into(), 202), "{name}");
        let expected = match strategy {
            "Manual" => json!([{"action": "Stop", "uid": vmi["metadata"]["uid"]}]),
            "Halted" => json!([{"action": "Start"}]),
            _ => json!([]),
        };
        assert_eq!(requests, expected, "{name}");
        let vmi = world.get(&format!("{VMIS}/{name}")).await;
        assert_eq!(vmi["spec"]["terminationGracePeriodSeconds"], 7, "{name}");
    }
    // One that stops already can only stop sooner.
    assert_eq!(done(&world, "halted", "stop", &json!({})).await.2, 409);
    assert_eq!(done(&world, "halted", "stop", &json!({"gracePeriod": 30})).await.2, 409);
}

#[tokio::test]
async fn a_restart_is_a_stop_and_a_start_of_what_there_is() {
    let world = World::new().await;
    for strategy in ["Always", "RerunOnFailure", "Once", "Manual", "Halted"] {
        let name = strategy.to_lowercase();
        world.machine(&name, strategy).await;
        assert_eq!(done(&world, &name, "restart", &json!({})).await.2, 409, "{name}");
        let vmi = world.instance(&name, "Running").await;
        let found = done(&world, &name, "restart", &json!({"gracePeriodSeconds": 0})).await;
        if strategy == "Halted" {
            assert_eq!(found.2, 409);
            continue;
        }
        let uid = &vmi["metadata"]["uid"];
        let both = json!([{"action": "Stop", "uid": uid}, {"action": "Start"}]);
        assert_eq!(found, (strategy.into(), both, 202), "{name}");
        let vmi = world.get(&format!("{VMIS}/{name}")).await;
        assert_eq!(vmi["spec"]["terminationGracePeriodSeconds"], 0, "{name}");
    }
}

#[tokio::test]
async fn of_many_who_ask_at_once_none_is_overwritten() {
    let world = World::new().await;
    world.machine("vm", "Manual").await;
    let vmi = world.instance("vm", "Running").await;
    let restart = format!("{SUB}/virtualmachines/vm/restart");
    let editor = user("editor");
    // Others write the status all the while.
    let noise = async {
        for n in 0..20 {
            let status = json!({"status": {"observedGeneration": n}});
            assert_eq!(world.merge(&own(), &format!("{VMS}/vm/status"), &status).await.code, 200);
        }
    };
    let body = json!({});
    let (a, b, c, ()) = tokio::join!(
        world.put(&editor, &restart, &body),
        world.put(&editor, &restart, &body),
        world.put(&editor, &restart, &body),
        noise
    );
    assert_eq!((a.code, b.code, c.code), (202, 202, 202), "{} {} {}", a.body, b.body, c.body);
    let vm = world.get(&format!("{VMS}/vm")).await;
    let both = json!([{"action": "Stop", "uid": vmi["metadata"]["uid"]}, {"action": "Start"}]);
    assert_eq!(vm["status"]["stateChangeRequests"], both);
    assert_eq!(vm["status"]["observedGeneration"], 19);
}

#[tokio::test]
async fn a_guest_that_runs_is_paused_and_goes_on_at_its_node() {
    let world = World::new().await;
    world.instance("runs", "Running").await;
    world.instance("waits", "Scheduling").await;
    let put = async |name: &str, what: &str, body: Value| {
        let path = format!("{SUB}/virtualmachineinstances/{name}/{what}");
        world.put(&user("editor"), &path, &body).await.code
    };
    assert_eq!(put("nobody", "pause", json!({})).await, 404);
    assert_eq!(put("waits", "pause", json!({})).await, 409);
    assert_eq!(put("runs", "unpause", json!({})).await, 409);
    assert_eq!(put("runs", "pause", json!({"dryRun": ["All"]})).await, 202);
    assert!(world.guests.acts.lock().unwrap().is_empty());
    for what in ["pause", "reset", "softreboot"] {
        assert_eq!(put("runs", what, json!({})).await, 202, "{what}");
    }
    let paused = json!({"status": {"conditions": [{"type": "Paused", "status": "True"}]}});
    world.merge(&own(), &format!("{VMIS}/runs/status"), &paused).await;
    assert_eq!(put("runs", "pause", json!({})).await, 409);
    assert_eq!(put("runs", "softreboot", json!({})).await, 409);
    assert_eq!(put("runs", "unpause", json!({})).await, 202);
    let acts: Vec<Act> = world.guests.acts.lock().unwrap().iter().map(|(.., act)| *act).collect();
    assert_eq!(acts, [Act::Pause, Act::Reset, Act::SoftReboot, Act::Unpause]);
    assert!(
        world
            .guests
            .acts
            .lock()
            .unwrap()
            .iter()
            .all(|(node, name, _)| node == "n1" && name == "runs")
    );
}

#[tokio::test]
async fn a_move_is_asked_for_and_an_evacuation_is_called_off() {
    let (world, mover) = (World::new().await, user("mover"));
    world.machine("vm", "Always").await;
    let put = async |resource: &str, what: &str, body: Value| {
        world.put(&mover, &format!("{SUB}/{resource}/vm/{what}"), &body).await.code
    };
    assert_eq!(put("virtualmachines", "migrate", json!({})).await, 404);
    world.instance("vm", "Scheduled").await;
    assert_eq!(put("virtualmachines", "migrate", json!({})).await, 409);
    let status = json!({"status": {"phase": "Running", "evacuationNodeName": "n1"}});
    world.merge(&own(), &format!("{VMIS}/vm/status"), &status).await;
    let body = json!({"addedNodeSelector": {"zone": "b"}, "dryRun": ["All"]});
    assert_eq!(put("virtualmachines", "migrate", body).await, 202);
    assert_eq!(world.get(MOVES).await["items"], json!([]));
    let body = json!({"addedNodeSelector": {"zone": "b"}});
    assert_eq!(put("virtualmachines", "migrate", body).await, 202);
    let made = world.get(MOVES).await["items"][0].clone();
    assert!(made["metadata"]["name"].as_str().unwrap().starts_with("kubevirt-migrate-vm-"));
    assert_eq!(made["spec"], json!({"vmiName": "vm", "addedNodeSelector": {"zone": "b"}}));
    assert_eq!(put("virtualmachines", "migrate", json!({})).await, 422);

    let cancel = "evacuate/cancel";
    let other = json!({"evacuationNodeName": "n2"});
    assert_eq!(put("virtualmachineinstances", cancel, other).await, 409);
    let dry = json!({"dryRun": ["All"]});
    assert_eq!(put("virtualmachineinstances", cancel, dry).await, 200);
    let node =
        async || world.get(&format!("{VMIS}/vm")).await["status"]["evacuationNodeName"].clone();
    assert_eq!(node().await, "n1");
    let body = json!({"evacuationNodeName": "n1"});
    assert_eq!(put("virtualmachines", cancel, body.clone()).await, 200);
    assert_eq!(node().await, Value::Null);
    assert_eq!(put("virtualmachines", cancel, body).await, 200);
}

#[tokio::test]
async fn what_cannot_be_understood_is_told_and_what_is_not_served_is_404_or_405() {
    let (world, editor) = (World::new().await, user("owner"));
    world.machine("vm", "Halted").await;
    let start = format!("{SUB}/virtualmachines/vm/start");
    let json = "application/json";
    for body in ["{", "[]", r#"{"paused": "yes"}"#, r#"{"dryRun": ["Some"]}"#] {
        let reply = world.send(&editor, Method::PUT, &start, json, body.into()).await;
        assert_eq!(reply.code, 400, "{body}: {}", reply.body);
        assert!(reply.message().contains(r#""paused": true"#), "{}", reply.message());
    }
    let large = format!("{{\"x\": \"{}\"}}", "x".repeat(100_000));
    assert_eq!(world.send(&editor, Method::PUT, &start, json, large).await.code, 413);
    let stop = format!("{SUB}/virtualmachines/vm/stop");
    let negative = r#"{"gracePeriod": -1}"#.to_owned();
    assert_eq!(world.send(&editor, Method::PUT, &stop, json, negative).await.code, 400);
    let admin = crate::world::admin();
    for (method, path, code) in [
        (Method::PUT, "virtualmachines/nobody/start", 404),
        (Method::PUT, "virtualmachines/vm/dance", 404),
        (Method::PUT, "virtualmachines/vm%2Fstatus/start", 404),
        (Method::GET, "virtualmachines/vm/start", 405),
        (Method::POST, "virtualmachines/vm/start", 405),
        (Method::PUT, "virtualmachines/vm/expand-spec", 405),
    ] {
        let reply = world.send(&admin, method, &format!("{SUB}/{path}"), json, String::new()).await;
        assert_eq!(reply.code, code, "{path}: {}", reply.body);
    }
    for version in ["v1", "v1alpha3"] {
        let listed = world.get(&format!("/apis/subresources.kubevirt.io/{version}")).await;
        assert!(listed.to_string().contains("virtualmachines/start"), "{listed}");
        let path = format!(
            "/apis/subresources.kubevirt.io/{version}/namespaces/default/virtualmachines/vm/expand-spec"
        );
        let vm = world.get(&path).await;
        assert_eq!(vm["spec"], world.get(&format!("{VMS}/vm")).await["spec"]);
    }
}
