//! Who may do what.

use crate::world::{
    MOVES, OWNERS, SUB, VMIS, VMS, VOLUMES, World, admin, migration, own, user, vm, volume,
};
use apiserver::auth::User;
use http::Method;
use serde_json::{Value, json};

#[tokio::test]
async fn who_views_does_not_start_who_edits_does_not_move_and_who_moves_does_nothing_else() {
    let world = World::new().await;
    let (viewer, editor, owner, mover) =
        (user("viewer"), user("editor"), user("owner"), user("mover"));
    world.machine("vm", "Halted").await;
    world.instance("runs", "Running").await;
    world.machine("runs", "Always").await;
    let code = async |who: &User, method: Method, path: &str| {
        world.ask(who, method, path, "application/json", Some(&json!({}))).await.code
    };
    assert_eq!(code(&viewer, Method::GET, &format!("{VMS}/vm")).await, 200);
    assert_eq!(
        code(&viewer, Method::GET, &format!("{SUB}/virtualmachines/vm/expand-spec")).await,
        200
    );
    for (path, other) in [("start", 202), ("stop", 409)] {
        let path = format!("{SUB}/virtualmachines/vm/{path}");
        assert_eq!(code(&viewer, Method::PUT, &path).await, 403, "{path}");
        assert_eq!(code(&mover, Method::PUT, &path).await, 403, "{path}");
        assert!([other, 202].contains(&code(&editor, Method::PUT, &path).await), "{path}");
    }
    let pause = format!("{SUB}/virtualmachineinstances/runs/pause");
    assert_eq!(code(&viewer, Method::PUT, &pause).await, 403);
    let console = format!("{SUB}/virtualmachineinstances/runs/console");
    assert_eq!(code(&viewer, Method::GET, &console).await, 403);
    assert_eq!(code(&editor, Method::GET, &console).await, 400);
    let migrate = format!("{SUB}/virtualmachines/runs/migrate");
    for who in [&viewer, &editor, &owner] {
        assert_eq!(code(who, Method::PUT, &migrate).await, 403, "{}", who.name);
        assert_eq!(world.post(who, MOVES, &migration("m", "runs")).await.code, 403);
        assert_eq!(code(who, Method::GET, MOVES).await, 200);
    }
    assert_eq!(code(&mover, Method::PUT, &migrate).await, 202);
    let nobody = User::anonymous();
    let version = "/apis/subresources.kubevirt.io/v1/version";
    assert_eq!(code(&nobody, Method::GET, version).await, 403);
    let version = world.ask(&user("anybody"), Method::GET, version, "", None).await;
    assert!(version.body["gitVersion"].is_string(), "{}", version.body);
}

#[tokio::test]
async fn an_instance_is_changed_by_godwit_alone_and_by_the_handler_of_its_node() {
    let world = World::new().await;
    world.instance("a", "Running").await;
    let path = format!("{VMIS}/a");
    let (spec, label) = (
        json!({"spec": {"terminationGracePeriodSeconds": 1}}),
        json!({"metadata": {"labels": {"kubevirt.io/nodeName": "n2"}}}),
    );
    let plain = json!({"metadata": {"labels": {"team": "x"}, "annotations": {"a": "b"}}});
    assert_eq!(world.merge(&user("editor"), &path, &plain).await.code, 200);
    for patch in [&spec, &label] {
        let reply = world.merge(&user("editor"), &path, patch).await;
        assert_eq!(reply.code, 403, "{}", reply.body);
        assert!(reply.message().contains("restart"), "{}", reply.message());
    }
    let mut marked = crate::world::vmi();
    marked["metadata"] = json!({"name": "b", "labels": {"kubevirt.io/nodeName": "n1"}});
    assert_eq!(world.post(&user("editor"), VMIS, &marked).await.code, 403);
    // An administrator is told; Godwit is not.
    let reply = world.merge(&admin(), &path, &spec).await;
    assert!(reply.code == 200 && reply.warnings().join("").contains("spec"), "{}", reply.body);
    let spec = json!({"spec": {"terminationGracePeriodSeconds": 2}});
    let reply = world.merge(&own(), &path, &spec).await;
    assert_eq!((reply.code, reply.warnings()), (200, vec![]));
    // Nothing that is wrong, even so.
    let wrong = json!({"spec": {"terminationGracePeriodSeconds": -2}});
    assert_eq!(world.merge(&own(), &path, &wrong).await.code, 422);

    let handler =
        |node: &str| User::new(&format!("system:godwit:handler:{node}"), &["system:masters"]);
    let status = json!({"status": {"reason": "seen"}});
    let other = json!({"metadata": {"annotations": {"a": "c"}}});
    for (path, patch) in [(&format!("{path}/status"), &status), (&path, &other)] {
        let reply = world.merge(&handler("n2"), path, patch).await;
        assert_eq!(reply.code, 403, "{}", reply.body);
        assert!(reply.message().contains("'n2'"), "{}", reply.message());
        assert_eq!(world.merge(&handler("n1"), path, patch).await.code, 200);
    }
}

#[tokio::test]
async fn owner_records_are_written_by_godwit_alone_and_cleared_away_by_kubernetes() {
    let world = World::new().await;
    let record = json!({
        "apiVersion": "godwit.dev/v1alpha1", "kind": "OwnerRecord",
        "metadata": {"name": "a"}, "spec": {"vm": "default.a"},
    });
    let role = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole",
        "metadata": {
            "name": "too-much",
            "labels": {"rbac.authorization.k8s.io/aggregate-to-edit": "true"},
        },
        "rules": [{"apiGroups": ["godwit.dev"], "resources": ["*"], "verbs": ["*"]}],
    });
    world.create(&admin(), "/apis/rbac.authorization.k8s.io/v1/clusterroles", &role).await;
    let may = "/apis/rbac.authorization.k8s.io/v1/clusterroles/edit";
    world.until(may, |role| role.to_string().contains("godwit.dev")).await;
    let editor = user("editor");
    assert_eq!(world.post(&editor, OWNERS, &record).await.code, 403);
    world.create(&own(), OWNERS, &record).await;
    let (path, status) = (format!("{OWNERS}/a"), format!("{OWNERS}/a/status"));
    let taken = json!({"status": {"owner": "me", "epoch": 9, "state": "idle"}});
    let reply = world.merge(&editor, &status, &taken).await;
    assert_eq!(reply.code, 403, "{}", reply.body);
    assert!(reply.message().contains("only Godwit writes them"), "{}", reply.message());
    let reply = world.ask(&editor, Method::DELETE, &path, "", None).await;
    assert_eq!(reply.code, 403, "{}", reply.body);
    let handler = User::new("system:godwit:handler:n1", &["system:masters"]);
    let reply = world.merge(&handler, &status, &taken).await;
    assert_eq!((reply.code, reply.warnings()), (200, vec![]), "{}", reply.body);
    let mut again = taken.clone();
    again["status"]["epoch"] = 10.into();
    let reply = world.merge(&admin(), &status, &again).await;
    assert!(reply.warnings().join("").contains("two guests"), "{}", reply.body);
    let cleaner = User::new("system:generic-garbage-collector", &["system:masters"]);
    assert_eq!(world.merge(&cleaner, &status, &taken).await.code, 403);
    let reply = world.ask(&cleaner, Method::DELETE, &path, "", None).await;
    assert_eq!(reply.code, 200, "{}", reply.body);
}

#[tokio::test]
async fn what_is_deleted_goes_whatever_its_spec_says_now() {
    let world = World::new().await;
    let mut held: Value = vm();
    held["metadata"]["finalizers"] = json!(["example.com/hold"]);
    world.create(&user("editor"), VMS, &held).await;
    let path = format!("{VMS}/vm");
    world.ask(&user("editor"), Method::DELETE, &path, "", None).await;
    let start =
        world.put(&user("editor"), &format!("{SUB}/virtualmachines/vm/start"), &json!({})).await;
    assert_eq!(start.code, 409, "{}", start.body);
    let free = json!({"metadata": {"finalizers": null}});
    assert_eq!(world.merge(&user("editor"), &path, &free).await.code, 200);
    assert_eq!(world.get(&path).await["code"], 404);
}

#[tokio::test]
async fn a_claim_of_another_namespace_is_cloned_by_who_could_read_it_there() {
    let world = World::new().await;
    let rbac = "/apis/rbac.authorization.k8s.io/v1";
    let clone = |name: &str| {
        let mut volume = volume();
        volume["metadata"]["name"] = name.into();
        volume["spec"]["source"] = json!({"pvc": {"namespace": "images", "name": "golden"}});
        volume
    };
    let mut machine = vm();
    machine["spec"]["dataVolumeTemplates"][0]["spec"] = clone("disk")["spec"].take();
    let namespace =
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "images"}});
    world.create(&admin(), "/api/v1/namespaces", &namespace).await;
    let editor = user("editor");
    for (path, object) in [(VOLUMES, &clone("a")), (VMS, &machine)] {
        let reply = world.post(&editor, path, object).await;
        assert_eq!(reply.code, 403, "{path}: {}", reply.body);
        let said = reply.message();
        assert!(said.contains("namespace images") && said.contains("datavolumes/source"), "{said}");
    }
    // A machine that is there does not get a disk from there either.
    world.create(&editor, VMS, &vm()).await;
    let more = json!({"spec": {"dataVolumeTemplates": machine["spec"]["dataVolumeTemplates"]}});
    assert_eq!(world.merge(&editor, &format!("{VMS}/vm"), &more).await.code, 403);
    // Godwit makes what a machine asks for that was judged.
    world.create(&own(), VOLUMES, &clone("own")).await;
    let grant = async |name: &str, group: &str, resource: &str, subject: Value| {
        let role = json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role",
            "metadata": {"name": name},
            "rules": [{"apiGroups": [group], "resources": [resource], "verbs": ["create"]}],
        });
        world.create(&admin(), &format!("{rbac}/namespaces/images/roles"), &role).await;
        let binding = json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding",
            "metadata": {"name": name}, "subjects": [subject],
            "roleRef": {
                "apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name,
            },
        });
        world.create(&admin(), &format!("{rbac}/namespaces/images/rolebindings"), &binding).await;
    };
    let accepted = async |who: &User, path: &str, object: &Value| {
        let until = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while world.post(who, path, object).await.code != 201 {
            assert!(std::time::Instant::now() < until, "{path} is never accepted");
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    // A machine's account will do for its disks, and for nothing else.
    let account = json!({"kind": "ServiceAccount", "namespace": "default", "name": "default"});
    grant("machines", "cdi.kubevirt.io", "datavolumes/source", account).await;
    machine["metadata"]["name"] = "other".into();
    accepted(&editor, VMS, &machine).await;
    assert_eq!(world.post(&editor, VOLUMES, &clone("a")).await.code, 403);
    let subject = json!({
        "kind": "User", "name": "editor", "apiGroup": "rbac.authorization.k8s.io",
    });
    grant("pods", "", "pods", subject).await;
    accepted(&editor, VOLUMES, &clone("a")).await;
}
