//! A console over the server's socket, as virtctl opens it.

use crate::world::{SUB, World};
use futures_util::{SinkExt, StreamExt};
use http::{Request, Response};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_tungstenite::{WebSocketStream, client_async};

type Opened = (WebSocketStream<TlsStream<TcpStream>>, Response<Option<Vec<u8>>>);

async fn connection(world: &World) -> TlsStream<TcpStream> {
    let credential = world.server.administrator().unwrap();
    let mut roots = RootCertStore::empty();
    let authority = world.server.pki.authority().as_bytes();
    roots.add(CertificateDer::from_pem_slice(authority).unwrap()).unwrap();
    let chain = vec![CertificateDer::from_pem_slice(credential.certificate.as_bytes()).unwrap()];
    let key = PrivateKeyDer::from_pem_slice(credential.key.as_bytes()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, key)
        .unwrap();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    let stream = TcpStream::connect(world.server.address).await.unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap()
}

async fn open(world: &World, vmi: &str, protocol: Option<&str>) -> Result<Opened, Error> {
    let uri = format!("wss://localhost{SUB}/virtualmachineinstances/{vmi}/console");
    let mut request: Request<()> = uri.into_client_request().unwrap();
    if let Some(protocol) = protocol {
        let value = protocol.parse().unwrap();
        request.headers_mut().insert("Sec-WebSocket-Protocol", value);
    }
    client_async(request, connection(world).await).await
}

async fn refused(world: &World, vmi: &str, protocol: Option<&str>) -> u16 {
    match open(world, vmi, protocol).await {
        Err(Error::Http(response)) => response.status().as_u16(),
        Err(other) => panic!("{vmi}: {other}"),
        Ok(_) => 101,
    }
}

#[tokio::test]
async fn what_is_typed_reaches_the_guest_and_what_it_says_comes_back_until_one_end_closes() {
    let world = World::new().await;
    world.instance("vm", "Running").await;
    let (client, response) = open(&world, "vm", Some("plain.kubevirt.io")).await.unwrap();
    assert_eq!(response.headers()["Sec-WebSocket-Protocol"], "plain.kubevirt.io");
    let mut guest = world.guests.consoles.lock().unwrap().pop().unwrap();
    // More than fits on the way, in both directions at once: neither waits for the other.
    let many = vec![b'x'; 300_000];
    let (sent, said) = (many.clone(), many.clone());
    let (mut reads, mut writes) = tokio::io::split(&mut guest);
    let (mut to, mut from) = client.split();
    let received = async {
        let mut all = Vec::new();
        while all.len() < 300_000 {
            match from.next().await.unwrap().unwrap() {
                Message::Binary(bytes) => all.extend_from_slice(&bytes),
                other => panic!("{other}"),
            }
        }
        all
    };
    let mut typed = vec![0; 300_000];
    let (sent, said, received, read) = tokio::join!(
        to.send(Message::binary(sent)),
        writes.write_all(&said),
        received,
        reads.read_exact(&mut typed),
    );
    sent.unwrap();
    said.unwrap();
    read.unwrap();
    assert!(typed == many && received == many);
    to.send(Message::Ping("there?".into())).await.unwrap();
    assert_eq!(from.next().await.unwrap().unwrap(), Message::Pong("there?".into()));
    // The guest's end closes: the client is told.
    drop(guest);
    let end = tokio::time::timeout(Duration::from_secs(10), from.next()).await.unwrap();
    assert!(matches!(end, Some(Ok(Message::Close(_)))), "{end:?}");

    // The client's end closes: so does the guest's. It need not name a protocol.
    let (client, response) = open(&world, "vm", None).await.unwrap();
    assert!(response.headers().get("Sec-WebSocket-Protocol").is_none());
    let mut guest = world.guests.consoles.lock().unwrap().pop().unwrap();
    drop(client);
    let end = tokio::time::timeout(Duration::from_secs(10), guest.read_u8()).await.unwrap();
    assert!(end.is_err(), "{end:?}");
}

#[tokio::test]
async fn a_console_is_refused_before_the_upgrade_with_why() {
    let world = World::new().await;
    world.instance("waits", "Scheduling").await;
    world.instance("runs", "Running").await;
    assert_eq!(refused(&world, "nobody", None).await, 404);
    assert_eq!(refused(&world, "waits", None).await, 409);
    assert_eq!(refused(&world, "runs", Some("v4.channel.k8s.io")).await, 400);
    let mut plain = connection(&world).await;
    let path = format!("{SUB}/virtualmachineinstances/runs/console");
    let head = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    plain.write_all(head.as_bytes()).await.unwrap();
    let mut answer = String::new();
    let _ = plain.read_to_string(&mut answer).await;
    assert!(answer.starts_with("HTTP/1.1 400") && answer.contains("upgrade required"), "{answer}");
}
