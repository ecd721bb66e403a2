//! Requests that another API server passes on, and those of who would like to be taken for it.

use crate::site::{Authority, Site};
use crate::world::SUB;
use futures_util::{SinkExt, StreamExt};
use http::{Method, Request};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_tungstenite::client_async;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use webapi::Act;

const GROUP: &str = "/apis/subresources.kubevirt.io";

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
    let health = site.send(None, Method::GET, "/healthz", &[], String::new()).await.unwrap();
    assert_eq!(health.code, 200);
    let metrics = site.send(None, Method::GET, "/metrics", &[], String::new()).await.unwrap();
    assert_eq!(metrics.code, 200);
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
