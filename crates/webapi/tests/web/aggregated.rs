//! Requests that another API server passes on, and those of who would like to be taken for it.

use crate::site::{Authority, Site};
use crate::world::{SUB, admin};
use futures_util::{SinkExt, StreamExt};
use http::{Method, Request};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_tungstenite::client_async;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use webapi::Act;

const GROUP: &str = "/apis/subresources.kubevirt.io";
const DISCOVERY: &str = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList";

#[tokio::test]
async fn only_who_the_cluster_names_speaks_for_others() {
    let site = Site::new().await;
    site.world.machine("vm", "Manual").await;
    let start = format!("{SUB}/virtualmachines/vm/start");
    let claims = [("X-Remote-User", "root"), ("X-Remote-Group", "system:masters")];
    let put = async |certificate, headers: &[(&'static str, &str)]| {
        let reply = site.send(certificate, Method::PUT, &start, headers, String::new()).await;
        reply.map(|reply| reply.code)
    };
    assert_eq!(put(None, &claims).await, Some(401));
    // Of that CA, but not of that name; of that name, but of another CA.
    assert_eq!(put(Some(site.aggregators.client("somebody")), &claims).await, Some(401));
    assert_eq!(put(Some(Authority::new().client("front-proxy-client")), &claims).await, None);
    let aggregator = || Some(site.aggregators.client("front-proxy-client"));
    assert_eq!(put(aggregator(), &[]).await, Some(401));
    assert_eq!(put(aggregator(), &[("X-Remote-User", "")]).await, Some(401));
    let vm = site.world.get(&format!("{}/vm", crate::world::VMS)).await;
    assert_eq!(vm["status"]["stateChangeRequests"], Value::Null);
    assert_eq!(put(aggregator(), &claims).await, Some(202));
}

#[tokio::test]
async fn what_is_asked_by_way_of_the_aggregator_is_done_for_who_may() {
    let site = Site::new().await;
    site.world.machine("vm", "Manual").await;
    site.world.instance("runs", "Running").await;
    let start = format!("{SUB}/virtualmachines/vm/start");
    let pause = format!("{SUB}/virtualmachineinstances/runs/pause");
    for path in [&start, &pause] {
        let reply = site.aggregated("viewer", Method::PUT, path).await;
        assert_eq!(reply.code, 403, "{path}: {}", reply.body);
        assert!(reply.message().contains("User \"viewer\" cannot update"), "{}", reply.message());
    }
    assert!(site.world.guests.acts.lock().unwrap().is_empty());
    assert_eq!(site.aggregated("editor", Method::PUT, &start).await.code, 202);
    let vm = site.world.get(&format!("{}/vm", crate::world::VMS)).await;
    assert_eq!(vm["status"]["stateChangeRequests"], json!([{"action": "Start"}]));
    assert_eq!(site.aggregated("editor", Method::PUT, &pause).await.code, 202);
    let acts = site.world.guests.acts.lock().unwrap().clone();
    assert_eq!(acts, [("n1".to_owned(), "runs".to_owned(), Act::Pause)]);
    // Nothing else is passed on, whoever asks.
    for path in ["/apis/kubevirt.io/v1/namespaces/default/virtualmachines", "/api/v1/secrets"] {
        assert_eq!(site.aggregated("editor", Method::GET, path).await.code, 404, "{path}");
    }
    assert_eq!(site.aggregated("editor", Method::GET, &start).await.code, 403);
}

#[tokio::test]
async fn both_versions_are_told_as_an_embedded_api_tells_them() {
    let site = Site::new().await;
    for version in ["v1", "v1alpha3"] {
        let path = format!("{GROUP}/{version}");
        let reply = site.aggregated("anybody", Method::GET, &path).await;
        assert_eq!(reply.code, 200, "{}", reply.body);
        assert_eq!(reply.body, site.world.get(&path).await);
    }
    assert_eq!(site.aggregated("anybody", Method::GET, &format!("{GROUP}/v2")).await.code, 404);
    // The group, as kube-aggregator asks for it and as clients find it in the end.
    let group = site.aggregated("anybody", Method::GET, GROUP).await.body;
    assert_eq!(group["preferredVersion"]["groupVersion"], "subresources.kubevirt.io/v1");
    assert_eq!(group, site.world.get(GROUP).await);
    let own = |groups: &Value| {
        let mut groups = groups["groups"].as_array().unwrap().iter();
        groups.find(|group| group["name"] == "subresources.kubevirt.io").cloned().unwrap()
    };
    let listed = site.aggregated("anybody", Method::GET, "/apis").await.body;
    assert_eq!(own(&listed)["versions"].as_array().unwrap().len(), 2);
    assert_eq!(own(&listed), own(&site.world.get("/apis").await));

    // All in one document, too.
    let headers = [("X-Remote-User", "anybody"), ("Accept", DISCOVERY)];
    let certificate = site.aggregators.client("front-proxy-client");
    let document =
        site.send(Some(certificate), Method::GET, "/apis", &headers, String::new()).await;
    let document = document.unwrap();
    assert_eq!(document.headers["Content-Type"], DISCOVERY);
    let own = |document: &Value| {
        let mut groups = document["items"].as_array().unwrap().iter();
        groups.find(|g| g["metadata"]["name"] == "subresources.kubevirt.io").cloned().unwrap()
    };
    let found = own(&document.body);
    assert_eq!(found, own(&site.world.discover(DISCOVERY).await));
    let machines = &found["versions"][0]["resources"][0];
    assert_eq!(machines["resource"], "virtualmachines");
    assert_eq!(machines["scope"], "Namespaced");
    let migrate = json!({"subresource": "migrate", "verbs": ["update"]});
    assert!(machines["subresources"].as_array().unwrap().contains(&migrate), "{machines}");
    let health = site.send(None, Method::GET, "/healthz", &[], String::new()).await.unwrap();
    assert_eq!(health.code, 200);
}

#[tokio::test]
async fn metrics_are_shown_to_who_may_see_those_of_the_api_server() {
    let site = Site::new().await;
    let metrics = async |token: Option<&str>| {
        let bearer = token.map(|token| format!("Bearer {token}")).unwrap_or_default();
        let headers: &[_] =
            if token.is_some() { &[("Authorization", bearer.as_str())] } else { &[] };
        site.send(None, Method::GET, "/metrics", headers, String::new()).await.unwrap().code
    };
    assert_eq!(metrics(None).await, 401);
    assert_eq!(metrics(Some("nobody's")).await, 401);
    let account = json!({
        "apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "prometheus"},
    });
    let accounts = "/api/v1/namespaces/default/serviceaccounts";
    site.world.create(&admin(), accounts, &account).await;
    let asked =
        json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}});
    let path = format!("{accounts}/prometheus/token");
    let given = site.world.create(&admin(), &path, &asked).await;
    let token = given["status"]["token"].as_str().unwrap();
    assert_eq!(metrics(Some(token)).await, 403);
    let binding = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
        "metadata": {"name": "prometheus"},
        "subjects": [{"kind": "ServiceAccount", "namespace": "default", "name": "prometheus"}],
        "roleRef": {
            "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole",
            "name": "system:monitoring",
        },
    });
    let bindings = "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings";
    site.world.create(&admin(), bindings, &binding).await;
    let until = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while metrics(Some(token)).await != 200 {
        assert!(std::time::Instant::now() < until, "the right never counts");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_console_passes_through_the_aggregator() {
    let site = Site::new().await;
    site.world.instance("vm", "Running").await;
    let open = async |user: &str| {
        let uri = format!("wss://localhost{SUB}/virtualmachineinstances/vm/console");
        let mut request: Request<()> = uri.into_client_request().unwrap();
        let headers = request.headers_mut();
        headers.insert("Sec-WebSocket-Protocol", "plain.kubevirt.io".parse().unwrap());
        headers.insert("X-Remote-User", user.parse().unwrap());
        headers.insert("X-Remote-Group", "system:authenticated".parse().unwrap());
        let certificate = site.aggregators.client("front-proxy-client");
        client_async(request, site.connect(Some(certificate)).await).await
    };
    assert!(open("viewer").await.is_err());
    let (mut client, response) = open("editor").await.unwrap();
    assert_eq!(response.status(), 101);
    let mut guest = site.world.guests.consoles.lock().unwrap().pop().unwrap();
    guest.write_all(b"login: ").await.unwrap();
    assert_eq!(client.next().await.unwrap().unwrap(), Message::binary(&b"login: "[..]));
    client.send(Message::binary(&b"root\n"[..])).await.unwrap();
    let mut typed = [0; 5];
    guest.read_exact(&mut typed).await.unwrap();
    assert_eq!(&typed, b"root\n");
}
