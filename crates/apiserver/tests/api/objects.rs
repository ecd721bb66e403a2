//! Create, read, update, patch, list.

use crate::world::{World, config_map, pod};
use serde_json::{Value, json};

const MAPS: &str = "/api/v1/namespaces/default/configmaps";

#[tokio::test]
async fn what_was_acknowledged_is_there_after_a_restart() {
    let world = World::new().await;
    let made = world.create(MAPS, config_map("a", json!({"k": "v"}))).await.unwrap();
    let Some(world) = world.restart().await else { return };
    let found = world.get(&format!("{MAPS}/a")).await.unwrap();
    assert_eq!(found, made);
}

#[tokio::test]
async fn an_update_of_an_older_revision_is_refused_and_one_that_changes_nothing_is_none() {
    let world = World::new().await;
    let first = world.create(MAPS, config_map("a", json!({"k": "1"}))).await.unwrap();
    let path = format!("{MAPS}/a");
    let mut second = first.clone();
    second["data"]["k"] = "2".into();
    let second = world.put(&path, &second).await.unwrap();
    assert_ne!(second["metadata"]["resourceVersion"], first["metadata"]["resourceVersion"]);
    let refused = world.put(&path, &first).await.unwrap_err();
    assert_eq!((refused.code, refused.reason), (409, "Conflict"));
    assert!(refused.message.contains("the object has been modified; please apply your changes"));
    assert_eq!(world.put(&path, &second).await.unwrap(), second);
    let mut other = second.clone();
    other["metadata"]["uid"] = "another".into();
    assert_eq!(world.put(&path, &other).await.unwrap_err().code, 409);
    let mut elsewhere = second;
    elsewhere["metadata"]["name"] = "b".into();
    assert_eq!(world.put(&path, &elsewhere).await.unwrap_err().code, 400);
}

#[tokio::test]
async fn what_a_revision_holds_stays_as_it_is() {
    const REVISIONS: &str = "/apis/apps/v1/namespaces/default/controllerrevisions";
    let world = World::new().await;
    let revision = json!({
        "apiVersion": "apps/v1", "kind": "ControllerRevision", "metadata": {"name": "a"},
        "data": {"spec": {"any": ["thing"]}}, "revision": 1,
    });
    let made = world.create(REVISIONS, revision.clone()).await.unwrap();
    assert_eq!(made["data"], revision["data"]);
    let path = format!("{REVISIONS}/a");
    let mut other = made.clone();
    other["data"]["spec"]["any"] = json!([]);
    let refused = world.put(&path, &other).await.unwrap_err();
    assert_eq!(refused.code, 422, "{refused}");
    assert!(refused.message.contains("field is immutable"), "{refused}");
    let mut next = made;
    next["revision"] = 2.into();
    assert_eq!(world.put(&path, &next).await.unwrap()["revision"], 2);
}

#[tokio::test]
async fn counters_that_many_raise_at_once_lose_nothing() {
    let world = World::new().await;
    world.create(MAPS, config_map("n", json!({"n": "0"}))).await.unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..20 {
        let own = world.user("admin", &["system:masters"]);
        tasks.spawn(async move {
            loop {
                let path = format!("{MAPS}/n");
                let get = own.send(http::Method::GET, &path, "application/json", None);
                let mut object = get.await.unwrap();
                let n: u32 = object["data"]["n"].as_str().unwrap().parse().unwrap();
                object["data"]["n"] = (n + 1).to_string().into();
                let put = own.send(http::Method::PUT, &path, "application/json", Some(&object));
                match put.await {
                    Ok(_) => return,
                    Err(failure) => assert_eq!(failure.code, 409, "{failure}"),
                }
            }
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    assert_eq!(world.get(&format!("{MAPS}/n")).await.unwrap()["data"]["n"], "20");
}

#[tokio::test]
async fn what_is_wrong_is_refused_with_where_and_why() {
    let world = World::new().await;
    let cases: [(Value, u16, &str); 9] = [
        (
            config_map("Upper", json!({})),
            422,
            "metadata.name: Invalid value: \"Upper\": a lowercase RFC 1123",
        ),
        (
            json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}}),
            400,
            "cannot be handled as a ConfigMap",
        ),
        (
            json!({"apiVersion": "v2", "kind": "ConfigMap", "metadata": {"name": "a"}}),
            400,
            "cannot be handled as a ConfigMap: no kind",
        ),
        (
            json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {}}),
            422,
            "name or generateName is required",
        ),
        (
            config_map("a", json!({"k": 7})),
            400,
            "ConfigMap in version \"v1\" cannot be handled as a ConfigMap: ",
        ),
        (config_map("a", json!({"a/b": "v"})), 422, "a valid config key must consist of"),
        (json!([]), 400, "object"),
        (
            json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a", "namespace": "b"}}),
            400,
            "does not match the namespace sent",
        ),
        (
            json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a", "labels": {"a b": "c"}}}),
            422,
            "metadata.labels",
        ),
    ];
    for (object, code, why) in cases {
        let refused = world.create(MAPS, object.clone()).await.unwrap_err();
        assert_eq!(refused.code, code, "{object}: {refused}");
        assert!(refused.message.contains(why), "{object}: {refused}");
    }
    if world.has(27, "field validation") {
        let strict = format!("{MAPS}?fieldValidation=Strict");
        let mut strange = config_map("a", json!({}));
        strange["spec"] = json!({"x": 1});
        let refused = world.create(&strict, strange.clone()).await.unwrap_err();
        assert!(
            refused.message.contains("strict decoding error: unknown field \"spec\""),
            "{refused}"
        );
        let made = world.create(&format!("{MAPS}?fieldValidation=Ignore"), strange).await.unwrap();
        assert!(made.get("spec").is_none());
    } else {
        world.create(MAPS, config_map("a", json!({}))).await.unwrap();
    }
    let again = world.create(MAPS, config_map("a", json!({}))).await.unwrap_err();
    assert_eq!(
        (again.reason, &*again.message),
        ("AlreadyExists", "configmaps \"a\" already exists")
    );
    let nowhere =
        world.create("/api/v1/namespaces/none/configmaps", config_map("a", json!({}))).await;
    assert_eq!(nowhere.unwrap_err().message, "namespaces \"none\" not found");
}

#[tokio::test]
async fn a_dry_run_changes_nothing_and_shows_what_would_be() {
    let world = World::new().await;
    let shown =
        world.create(&format!("{MAPS}?dryRun=All"), config_map("a", json!({}))).await.unwrap();
    assert!(shown["metadata"]["uid"].is_string());
    assert_eq!(world.get(&format!("{MAPS}/a")).await.unwrap_err().code, 404);
    world.create(MAPS, config_map("a", json!({}))).await.unwrap();
    world.delete(&format!("{MAPS}/a"), json!({"dryRun": ["All"]})).await.unwrap();
    world.get(&format!("{MAPS}/a")).await.unwrap();
}

#[tokio::test]
async fn a_list_in_parts_is_of_one_moment() {
    let world = World::new().await;
    let namespace = world.namespace("parts").await;
    let maps = format!("{namespace}/configmaps");
    for n in 0..10 {
        world.create(&maps, config_map(&format!("m{n}"), json!({}))).await.unwrap();
    }
    let first = world
        .get(&format!("{maps}?limit=4&fieldSelector=metadata.name!=kube-root-ca.crt"))
        .await
        .unwrap();
    assert_eq!(first["items"].as_array().unwrap().len(), 4);
    // What comes and goes meanwhile is not seen.
    world.create(&maps, config_map("m55", json!({}))).await.unwrap();
    world.delete(&format!("{maps}/m7"), json!({})).await.unwrap();
    let mut names: Vec<String> = Vec::new();
    let mut page = first;
    loop {
        assert_eq!(page["metadata"]["resourceVersion"], page["metadata"]["resourceVersion"]);
        let items = page["items"].as_array().unwrap().iter();
        names.extend(items.map(|i| i["metadata"]["name"].as_str().unwrap().to_owned()));
        let Some(next) = page["metadata"]["continue"].as_str() else { break };
        let path =
            format!("{maps}?limit=4&continue={next}&fieldSelector=metadata.name!=kube-root-ca.crt");
        page = world.get(&path).await.unwrap();
    }
    let wanted: Vec<String> = (0..10).map(|n| format!("m{n}")).collect();
    assert_eq!(names, wanted);
}

#[tokio::test]
async fn patches_of_every_kind_do_what_their_standards_say() {
    let world = World::new().await;
    let path = "/api/v1/namespaces/default/pods/p";
    let mut it = pod("p");
    it["metadata"]["labels"] = json!({"a": "1", "b": "2"});
    world.create("/api/v1/namespaces/default/pods", it).await.unwrap();
    let json_patch = json!([
        {"op": "test", "path": "/metadata/labels/a", "value": "1"},
        {"op": "remove", "path": "/metadata/labels/b"},
    ]);
    let patched = world.patch(path, "application/json-patch+json", json_patch).await.unwrap();
    assert_eq!(patched["metadata"]["labels"], json!({"a": "1"}));
    let failing = json!([{"op": "test", "path": "/metadata/labels/a", "value": "9"}]);
    assert_eq!(
        world.patch(path, "application/json-patch+json", failing).await.unwrap_err().code,
        422
    );
    let merge = json!({"metadata": {"labels": {"a": null, "c": "3"}}});
    let patched = world.patch(path, "application/merge-patch+json", merge).await.unwrap();
    assert_eq!(patched["metadata"]["labels"], json!({"c": "3"}));
    // A strategic patch finds the container by its name; a merge patch replaces the list.
    let strategic = json!({"spec": {"containers": [{"name": "c", "image": "a:2"}]}});
    let patched =
        world.patch(path, "application/strategic-merge-patch+json", strategic).await.unwrap();
    assert_eq!(patched["spec"]["containers"][0]["image"], "a:2");
    assert_eq!(patched["spec"]["containers"][0]["imagePullPolicy"], "IfNotPresent");
    let unknown = world.patch(path, "application/x-patch", json!({})).await.unwrap_err();
    assert_eq!(unknown.code, 415);
    let missing = world
        .patch("/api/v1/namespaces/default/pods/none", "application/merge-patch+json", json!({}))
        .await;
    assert_eq!(missing.unwrap_err().code, 404);
}

#[tokio::test]
async fn a_quota_is_never_exceeded_however_many_create_at_once() {
    let world = World::new().await;
    let namespace = world.namespace("limited").await;
    let quota = json!({
        "apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "q"},
        // One is the CA's.
        "spec": {"hard": {"configmaps": "6", "requests.cpu": "1"}},
    });
    world.create(&format!("{namespace}/resourcequotas"), quota).await.unwrap();
    world
        .until(&format!("{namespace}/resourcequotas/q"), |q| {
            q["status"]["used"]["configmaps"] == "1"
        })
        .await;
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..20 {
        let own = world.user("admin", &["system:masters"]);
        let path = format!("{namespace}/configmaps");
        tasks.spawn(async move {
            let object = config_map(&format!("m{n}"), json!({}));
            own.send(http::Method::POST, &path, "application/json", Some(&object)).await
        });
    }
    let mut made = 0;
    while let Some(done) = tasks.join_next().await {
        match done.unwrap() {
            Ok(_) => made += 1,
            Err(failure) if failure.code == 409 => {}
            Err(failure) => assert!(
                failure.message.contains("exceeded quota: q, requested: configmaps=1"),
                "{failure}"
            ),
        }
    }
    assert!(made <= 5, "{made} of 5 were made");
    let silent = world.create(&format!("{namespace}/pods"), pod("p")).await.unwrap_err();
    assert!(silent.message.contains("failed quota: q: must specify requests.cpu"), "{silent}");
    let mut greedy = pod("p");
    greedy["spec"]["containers"][0]["resources"] = json!({"requests": {"cpu": "1500m"}});
    let refused = world.create(&format!("{namespace}/pods"), greedy).await.unwrap_err();
    assert!(
        refused.message.contains(
            "requested: requests.cpu=1500m, used: requests.cpu=0, limited: requests.cpu=1"
        ),
        "{refused}"
    );
}
