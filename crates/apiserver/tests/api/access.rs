//! Who may do what.

use crate::world::{World, config_map, pod};
use http::Method;
use serde_json::{Value, json};

const JSON: &str = "application/json";
const RBAC: &str = "/apis/rbac.authorization.k8s.io/v1/namespaces/default";

fn role(name: &str, verbs: &[&str], resources: &[&str]) -> Value {
    json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": {"name": name},
        "rules": [{"apiGroups": [""], "resources": resources, "verbs": verbs}],
    })
}

fn binding(name: &str, role: &str, user: &str) -> Value {
    json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding", "metadata": {"name": name},
        "roleRef": {"kind": "Role", "name": role},
        "subjects": [{"kind": "User", "name": user}],
    })
}

#[tokio::test]
async fn nobody_does_what_no_rule_allows_and_a_rule_counts_at_once() {
    let world = World::new().await;
    let bob = world.user("bob", &[]);
    let maps = "/api/v1/namespaces/default/configmaps";
    let refused = bob.send(Method::GET, maps, JSON, None).await.unwrap_err();
    assert_eq!(
        refused.message,
        "configmaps is forbidden: User \"bob\" cannot list resource \"configmaps\" in API group \"\" \
         in the namespace \"default\""
    );
    world
        .create(&format!("{RBAC}/roles"), role("reader", &["get", "list"], &["configmaps"]))
        .await
        .unwrap();
    world.create(&format!("{RBAC}/rolebindings"), binding("b", "reader", "bob")).await.unwrap();
    world.soon(async || bob.send(Method::GET, maps, JSON, None).await.is_ok()).await;
    let map = config_map("a", json!({}));
    assert_eq!(bob.send(Method::POST, maps, JSON, Some(&map)).await.unwrap_err().code, 403);
    let elsewhere =
        bob.send(Method::GET, "/api/v1/namespaces/kube-system/configmaps", JSON, None).await;
    assert_eq!(elsewhere.unwrap_err().code, 403);
    // What there is not is not told to who may not ask.
    let nothing = bob.send(Method::GET, "/api/v1/namespaces/default/nothings", JSON, None).await;
    assert_eq!(nothing.unwrap_err().code, 403);
    world.delete(&format!("{RBAC}/rolebindings/b"), json!({})).await.unwrap();
    let refused =
        async || bob.send(Method::GET, maps, JSON, None).await.is_err_and(|e| e.code == 403);
    world.soon(refused).await;
}

#[tokio::test]
async fn nobody_gives_what_they_do_not_have() {
    let world = World::new().await;
    let all = ["create", "update", "patch", "get", "list"];
    let mut writer = role("writer", &all, &["roles", "rolebindings"]);
    writer["rules"][0]["apiGroups"] = json!(["rbac.authorization.k8s.io"]);
    world.create(&format!("{RBAC}/roles"), writer).await.unwrap();
    world.create(&format!("{RBAC}/rolebindings"), binding("w", "writer", "eve")).await.unwrap();
    world.create(&format!("{RBAC}/roles"), role("secret", &["get"], &["secrets"])).await.unwrap();
    let eve = world.user("eve", &[]);
    let create = |path: String, object: Value| {
        let eve = eve.clone();
        async move { eve.send(Method::POST, &path, JSON, Some(&object)).await }
    };
    world
        .soon(async || eve.send(Method::GET, &format!("{RBAC}/roles"), JSON, None).await.is_ok())
        .await;
    let refused =
        create(format!("{RBAC}/roles"), role("mine", &["get"], &["secrets"])).await.unwrap_err();
    assert!(
        refused.message.contains("is attempting to grant RBAC permissions not currently held"),
        "{refused}"
    );
    let refused =
        create(format!("{RBAC}/rolebindings"), binding("mine", "secret", "eve")).await.unwrap_err();
    assert!(refused.message.contains("not currently held"), "{refused}");
    // What she has she may give.
    let mut own = role("own", &["get"], &["roles"]);
    own["rules"][0]["apiGroups"] = json!(["rbac.authorization.k8s.io"]);
    create(format!("{RBAC}/roles"), own).await.unwrap();
    let mut other = binding("w", "secret", "eve");
    other["roleRef"]["apiGroup"] = "rbac.authorization.k8s.io".into();
    let changed = world.put(&format!("{RBAC}/rolebindings/w"), &other).await.unwrap_err();
    assert!(changed.message.contains("cannot change roleRef"), "{changed}");
}

#[tokio::test]
async fn a_token_is_its_accounts_as_long_as_that_exists() {
    let world = World::new().await;
    let account =
        json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "robot"}});
    let accounts = "/api/v1/namespaces/default/serviceaccounts";
    world.create(accounts, account).await.unwrap();
    let request = json!({
        "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 600},
    });
    let issued = world.create(&format!("{accounts}/robot/token"), request.clone()).await.unwrap();
    let token = issued["status"]["token"].as_str().unwrap().to_owned();
    let review = |token: String| {
        json!({
            "apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": token},
        })
    };
    let reviews = "/apis/authentication.k8s.io/v1/tokenreviews";
    let known = world.create(reviews, review(token.clone())).await.unwrap();
    assert_eq!(known["status"]["user"]["username"], "system:serviceaccount:default:robot");
    let (rest, signature) = token.rsplit_once('.').unwrap();
    let forged = format!("{rest}.{}", signature.chars().rev().collect::<String>());
    let unsigned = format!("eyJhbGciOiJub25lIn0.{}.", token.split('.').nth(1).unwrap());
    for wrong in [forged, unsigned, "x".into()] {
        let answer = world.create(reviews, review(wrong)).await.unwrap();
        assert_ne!(answer["status"]["authenticated"], true);
    }
    assert_eq!(world.create(reviews, review(String::new())).await.unwrap_err().code, 400);
    let mut short = request;
    short["spec"]["expirationSeconds"] = 10.into();
    assert_eq!(
        world.create(&format!("{accounts}/robot/token"), short).await.unwrap_err().code,
        422
    );
    world.delete(&format!("{accounts}/robot"), json!({})).await.unwrap();
    let gone = async || {
        let answer = world.create(reviews, review(token.clone())).await.unwrap();
        answer["status"]["authenticated"] != true
    };
    world.soon(gone).await;
}

#[tokio::test]
async fn a_node_writes_itself_and_its_pods_and_reads_what_they_need() {
    let world = World::new().await;
    let (n1, n2) = (world.unique("n1"), world.unique("n2"));
    let node = world.user(&format!("system:node:{n1}"), &["system:nodes"]);
    let object =
        |name: &str| json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}});
    node.send(Method::POST, "/api/v1/nodes", JSON, Some(&object(&n1))).await.unwrap();
    let other = node.send(Method::POST, "/api/v1/nodes", JSON, Some(&object(&n2))).await;
    assert_eq!(other.unwrap_err().code, 403);
    let secrets = "/api/v1/namespaces/default/secrets";
    for name in ["needed", "other"] {
        let secret = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}});
        world.create(secrets, secret).await.unwrap();
    }
    let mut it = pod("p");
    it["spec"]["nodeName"] = n1.into();
    it["spec"]["volumes"] = json!([{"name": "v", "secret": {"secretName": "needed"}}]);
    world.create("/api/v1/namespaces/default/pods", it).await.unwrap();
    let get = |name: &str| {
        let (node, path) = (node.clone(), format!("{secrets}/{name}"));
        async move { node.send(Method::GET, &path, JSON, None).await }
    };
    world.soon(async || get("needed").await.is_ok()).await;
    assert_eq!(get("other").await.unwrap_err().code, 403);
    assert_eq!(node.send(Method::GET, secrets, JSON, None).await.unwrap_err().code, 403);
    let running = json!({"status": {"phase": "Running"}});
    node.merge("/api/v1/namespaces/default/pods/p/status", &running).await.unwrap();
    let stranger = world.user(&format!("system:node:{n2}"), &["system:nodes"]);
    assert_eq!(
        stranger
            .merge("/api/v1/namespaces/default/pods/p/status", &running)
            .await
            .unwrap_err()
            .code,
        403
    );
}
