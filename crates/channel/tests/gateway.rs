//! Streams through two gateways: what passes, and one clear refusal for each thing that
//! must not; the gateway serves on after each.

mod common;

use std::net::SocketAddr;
use std::os::unix::fs::symlink;
use std::time::{Duration, SystemTime};

use channel::client::{DialError, GatewayClient};
use channel::gateway::{Config, Error, Gateway, Limits};
use channel::identity::{Ca, Role, SpiffeId};
use channel::preface::{Stream, code};
use channel::relay::DelayRelay;
use channel::tls;
use channel::tokens::Token;
use common::{Echo, Host, PATIENCE, Target, handler, id, identity, pair, preface, trust};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Proves that the target's gateway still serves: one stream, both ways, to both ends.
async fn a_stream_passes(source: &Host, target: &Host) {
    let launcher = Target::of(target, "still-served");
    let token = launcher.issue(Stream::Memory(0));
    let served = async {
        let (_, peer, mut stream) = launcher.next().await;
        assert_eq!(peer, source.id());
        let mut got = Vec::new();
        stream.read_to_end(&mut got).await.expect("the source's bytes");
        stream.write_all(&got).await.expect("they go back");
        stream.shutdown().await.expect("a half-close");
    };
    let sent = vec![7; 3 << 20];
    let dialed = async {
        let preface = preface("still-served", Stream::Memory(0), &token);
        let dialed = source.client().dial(&target.address(), &target.id(), &preface).await;
        let (mut stream, _) = dialed.expect("the stream is accepted");
        stream.write_all(&sent).await.expect("bytes are taken");
        stream.shutdown().await.expect("a half-close");
        let mut back = Vec::new();
        stream.read_to_end(&mut back).await.expect("the target's bytes");
        assert!(back == sent, "the bytes differ");
    };
    timeout(PATIENCE, async { tokio::join!(served, dialed) }).await.expect("in time");
}

async fn refusal_of(client: GatewayClient, target: &Host, vm: &str, token: &Token) -> String {
    let preface = preface(vm, Stream::Control, token);
    match client.dial(&target.address(), &target.id(), &preface).await {
        Err(DialError::Refused(refusal)) => refusal.code,
        other => panic!("expected a refusal, got {other:?}"),
    }
}

#[tokio::test]
async fn a_stream_passes_with_half_closes_and_is_counted_on_the_wire() {
    let (source, target) = pair();
    a_stream_passes(&source, &target).await;
    let sent = source.client().counters().await.expect("counters");
    let received = target.gateway().counters();
    let bytes = sent.migrations["m1"];
    assert!((3 << 20..4 << 20).contains(&bytes.sent), "sent {bytes:?}");
    assert!((3 << 20..4 << 20).contains(&bytes.received), "received {bytes:?}");
    assert!(received.migrations["m1"].received <= bytes.sent);
    assert!(sent.total.sent >= bytes.sent);
    assert_eq!((sent.relayed, received.relayed, sent.refused), (1, 1, 0));
}

#[tokio::test]
async fn handlers_are_asked_here_and_across() {
    let (source, target) = pair();
    let here = source.client().local(json!(1)).await.expect("an answer");
    assert_eq!(here, json!({ "local": 1 }));
    let across = source.client().ask(&target.address(), &target.id(), json!({ "swap": 2 })).await;
    let expected = json!({ "peer": source.id(), "request": { "swap": 2 } });
    assert_eq!(across.expect("an answer"), expected);
}

#[tokio::test]
async fn the_way_to_another_gateway_is_measured_as_it_is() {
    let (source, target) = pair();
    let delay = Duration::from_millis(20);
    let rate = 4 << 20;
    let listen = SocketAddr::new(target.listen.ip(), 0);
    let relay = DelayRelay::start(listen, target.gateway().local_addr(), delay, Some(rate)).await;
    let relay = relay.expect("it listens");
    let address = relay.local_addr().to_string();
    let link = source.gateway().probe(&address, &target.id()).await.expect("a link");
    assert!(link.rtt >= 2 * delay, "{link:?}");
    // It bursts by what a piece is, and no more.
    let mean = link.rates.iter().sum::<f64>() / link.rates.len() as f64;
    assert!(mean < 1.5 * rate as f64, "{link:?}");
    let stranger = source.gateway().probe(&address, &source.id()).await;
    assert!(stranger.is_err(), "{stranger:?}");
}

#[tokio::test]
async fn a_gateway_that_goes_elsewhere_is_found_there_and_what_stands_goes_on() {
    let (source, mut target) = pair();
    let elsewhere = SocketAddr::new([127, 0, 0, 4].into(), 0);
    let launcher = Target::of(&target, "stands");
    let token = launcher.issue(Stream::Memory(0));
    let preface = preface("stands", Stream::Memory(0), &token);
    let client = source.client();
    let (address, id) = (target.address(), target.id());
    let dialed = client.dial(&address, &id, &preface);
    let (dialed, (_, _, mut there)) = tokio::join!(dialed, launcher.next());
    let (mut here, _) = dialed.expect("the stream is accepted");

    let after = target.gateway().relocate(elsewhere).expect("it listens");
    assert_eq!((after.ip(), target.gateway().local_addr()), (elsewhere.ip(), after));
    here.write_all(b"still").await.expect("bytes are taken");
    let mut got = [0; 5];
    timeout(PATIENCE, there.read_exact(&mut got)).await.expect("in time").expect("they come");
    assert_eq!(&got, b"still");
    // Where it was, for what comes again; where it is, for what is new.
    a_stream_passes(&source, &target).await;
    assert!(target.gateway().relocate(SocketAddr::from(([0, 0, 0, 0], 0))).is_err());
    target.listen = after;
    a_stream_passes(&source, &target).await;
}

#[tokio::test]
async fn a_used_token_is_refused_and_its_successor_is_taken() {
    let (source, target) = pair();
    let launcher = Target::of(&target, "web");
    let first = launcher.issue(Stream::Control);
    let guessed = Token::random();
    let dial = async |token: &Token| {
        let preface = preface("web", Stream::Control, token);
        source.client().dial(&target.address(), &target.id(), &preface).await
    };
    let (dialed, _) = tokio::join!(dial(&first), launcher.next());
    let (_stream, successor) = dialed.expect("the first token is good");
    tokio::select! {
        _ = launcher.next() => panic!("a used token led to a connection"),
        code = refusal_of(source.client(), &target, "web", &first) => {
            assert_eq!(code, code::TOKEN_USED);
        }
    }
    tokio::select! {
        _ = launcher.next() => panic!("a guessed token led to a connection"),
        code = refusal_of(source.client(), &target, "web", &guessed) => {
            assert_eq!(code, code::TOKEN_UNKNOWN);
        }
    }
    let (dialed, _) = tokio::join!(dial(&successor), launcher.next());
    dialed.expect("the successor is good");
    a_stream_passes(&source, &target).await;
}

#[tokio::test]
async fn a_stream_for_no_launcher_a_link_or_a_file_is_refused() {
    let (source, target) = pair();
    let token = Token::random();
    let vms = target.dir.path().join("vms");
    let elsewhere = target.dir.path().join("elsewhere");
    std::fs::create_dir_all(&elsewhere).expect("a folder");
    let _victim = Target::in_dir(&elsewhere);
    for vm in ["linked-socket", "plain-file", "dead"] {
        std::fs::create_dir_all(vms.join(vm)).expect("a folder");
    }
    symlink(elsewhere.join("streams.sock"), vms.join("linked-socket/streams.sock"))
        .expect("a link");
    symlink(&elsewhere, vms.join("linked-folder")).expect("a link");
    std::fs::write(vms.join("plain-file/streams.sock"), b"").expect("a file");
    drop(Target::of(&target, "dead"));
    for (vm, expected) in [
        ("absent", code::NO_LAUNCHER),
        ("dead", code::NO_LAUNCHER),
        ("linked-socket", code::UNSAFE_SOCKET),
        ("linked-folder", code::UNSAFE_SOCKET),
        ("plain-file", code::UNSAFE_SOCKET),
    ] {
        assert_eq!(refusal_of(source.client(), &target, vm, &token).await, expected, "{vm}");
    }
    assert_eq!(target.gateway().counters().refused, 5);
    a_stream_passes(&source, &target).await;
}

#[tokio::test]
async fn peers_without_the_right_certificate_are_refused() {
    let (source, target) = pair();
    let vm = preface("web", Stream::Control, &Token::random());
    let target_id = target.id();
    let expired = {
        let ca = Ca::create("east").expect("a CA");
        let (id, from) = (handler("east", "node-c"), SystemTime::now() - Duration::from_secs(7200));
        let old = ca.issue_from(&id, from, Duration::from_secs(3600)).expect("a certificate");
        (old, ca)
    };
    // (who dials, whom that side trusts)
    let impostor = Ca::create("east").expect("a CA of the same name");
    let west = Ca::create("west").expect("a CA");
    for (what, identity, cas) in [
        ("a CA of the same name", identity(&impostor, &handler("east", "node-a")), &impostor),
        ("a cluster that is not linked", identity(&west, &handler("west", "node-a")), &west),
        ("an expired certificate", expired.0.clone(), &expired.1),
    ] {
        let dialer = Host::start("127.0.0.2", identity, trust(&[cas]));
        let error = dialer.client().dial(&target.address(), &target_id, &vm).await;
        assert!(matches!(error, Err(DialError::PeerIdentity(_))), "{what}: {error:?}");
    }
    let wrong = handler("east", "node-z");
    let error = source.client().dial(&target.address(), &wrong, &vm).await;
    let Err(DialError::PeerIdentity(text)) = error else { panic!("wrong instance: {error:?}") };
    assert!(text.contains("node-b answered where") && text.contains("node-z"), "{text}");
    a_stream_passes(&source, &target).await;
}

/// Both ends' verdicts on one handshake.
async fn handshake(
    server: tls::Server,
    client: tls::Client,
    expected: &SpiffeId,
) -> (Result<SpiffeId, tls::Error>, Result<(), tls::Error>) {
    let (near, far) = tokio::io::duplex(64 << 10);
    let accept = async { server.accept(far).await.map(|(_, id)| id) };
    let connect = async {
        let mut stream = client.connect(expected, near).await?;
        match stream.read(&mut [0]).await {
            Ok(_) => Ok(()),
            Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => Ok(()),
            Err(e) => Err(tls::Error::from_io(e)),
        }
    };
    timeout(PATIENCE, async { tokio::join!(accept, connect) }).await.expect("in time")
}

#[tokio::test]
async fn each_flaw_of_a_certificate_is_named() {
    use tls::PeerError::{Expired, NotYetValid, UnknownCluster, WrongCa, WrongInstance, WrongRole};
    let east = Ca::create("east").expect("a CA");
    let west = Ca::create("west").expect("a CA");
    let other_east = Ca::create("east").expect("a CA");
    let hour = Duration::from_secs(3600);
    let now = SystemTime::now();
    let node = handler("east", "node-a");
    let server_id = handler("east", "node-b");
    let server =
        tls::Server::new(&identity(&east, &server_id), trust(&[&east, &west]), &[Role::Handler])
            .expect("a server");
    let verdict = async |identity| {
        let client = tls::Client::new(identity, trust(&[&east]));
        match handshake(server.clone(), client, &server_id).await {
            (Err(tls::Error::Peer(error)), Err(tls::Error::RefusedByPeer(_))) => Some(error),
            (Ok(id), Ok(())) => {
                assert_eq!(id, node);
                None
            }
            other => panic!("unexpected: {other:?}"),
        }
    };
    assert!(verdict(identity(&east, &node)).await.is_none());
    let launcher = identity(&east, &id("east", Role::Launcher, "vm-1"));
    assert!(matches!(verdict(launcher).await, Some(WrongRole { .. })));
    let old = east.issue_from(&node, now - 2 * hour, hour).expect("a certificate");
    assert!(matches!(verdict(old).await, Some(Expired { .. })));
    let early = east.issue_from(&node, now + hour, hour).expect("a certificate");
    assert!(matches!(verdict(early).await, Some(NotYetValid { .. })));
    let impostor = identity(&other_east, &node);
    assert!(matches!(verdict(impostor).await, Some(WrongCa { .. })));
    let north = Ca::create("north").expect("a CA");
    let stranger = identity(&north, &handler("north", "node-a"));
    assert!(matches!(verdict(stranger).await, Some(UnknownCluster { .. })));

    // A CA that is trusted, for west, vouches for an id of east.
    let forged = forged_by(&west, &node);
    assert!(matches!(verdict(forged).await, Some(WrongCa { .. })));

    let client = tls::Client::new(identity(&east, &node), trust(&[&east]));
    let (_, error) = handshake(server.clone(), client, &handler("east", "node-z")).await;
    assert!(matches!(error, Err(tls::Error::Peer(WrongInstance { .. }))), "{error:?}");
}

/// What a cluster's CA could sign if its owner were malicious.
fn forged_by(ca: &Ca, id: &SpiffeId) -> channel::identity::Identity {
    use rcgen::{CertificateParams, Issuer, KeyPair, SanType};
    let dir = tempfile::tempdir().expect("a folder");
    ca.save(dir.path()).expect("the CA is saved");
    let key = std::fs::read_to_string(dir.path().join("ca.key")).expect("its key");
    let key = KeyPair::from_pem(&key).expect("its key");
    let issuer = Issuer::from_ca_cert_pem(ca.certificate_pem(), key).expect("an issuer");
    let mut params = CertificateParams::default();
    let uri = id.to_string().try_into().expect("a URI");
    params.subject_alt_names = vec![SanType::URI(uri)];
    let key = KeyPair::generate().expect("a key");
    let certificate = params.signed_by(&key, &issuer).expect("a certificate");
    channel::identity::Identity::from_pem(&certificate.pem(), &key.serialize_pem()).expect("both")
}

/// What a gateway answers to bytes sent after a good handshake.
async fn answer_to(source: &Host, target: &Host, bytes: &[u8]) -> String {
    let client = tls::Client::new(source.identity.clone(), source.trust.clone());
    let tcp = TcpStream::connect(target.listen).await.expect("a connection");
    let mut stream = client.connect(&target.id(), tcp).await.expect("a handshake");
    stream.write_all(bytes).await.expect("bytes are taken");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.expect("an answer and a proper end");
    String::from_utf8_lossy(&answer[8..]).into_owned()
}

#[tokio::test]
async fn whatever_is_no_preface_is_refused_with_its_reason() {
    let (source, target) = pair();
    let mut oversized = b"GDWT\x00\x01\xff\xff".to_vec();
    oversized.resize(70_000, b' ');
    let escaping =
        br#"{"stream":{"vm":"../../etc","migration":"m","stream":"control","token":"0"}}"#;
    let mut traversal = b"GDWT\x00\x01\x00".to_vec();
    traversal.push(u8::try_from(escaping.len()).expect("short"));
    traversal.extend_from_slice(escaping);
    for (bytes, expected) in [
        (&b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"[..], code::BAD_PREFACE),
        (&oversized, code::PREFACE_TOO_LARGE),
        (b"GDWT\x00\x63\x00\x02{}", code::VERSION),
        (b"GDWT\x00\x01\x00\x02{}", code::BAD_PREFACE),
        (&traversal, code::BAD_PREFACE),
        (b"GDWT", code::PREFACE_TIMEOUT),
        (b"", code::PREFACE_TIMEOUT),
    ] {
        let answer = timeout(PATIENCE, answer_to(&source, &target, bytes)).await.expect("in time");
        assert!(answer.contains(&format!("\"{expected}\"")), "{answer} to {expected}");
    }
    a_stream_passes(&source, &target).await;
}

#[tokio::test]
async fn silent_and_plain_connections_do_not_keep_others_out() {
    let ca = Ca::create("east").expect("a CA");
    let limits =
        Limits { handshakes: 2, handshake: Duration::from_millis(500), ..Limits::default() };
    let node = |name| identity(&ca, &handler("east", name));
    let patient = Limits { handshake: PATIENCE, ..Limits::default() };
    let source = Host::start_with("127.0.0.2", node("node-a"), trust(&[&ca]), patient);
    let target = Host::start_with("127.0.0.3", node("node-b"), trust(&[&ca]), limits);
    let mut silent = Vec::new();
    for _ in 0..4 {
        silent.push(TcpStream::connect(target.listen).await.expect("a connection"));
    }
    silent[0].write_all(b"plaintext").await.expect("bytes are taken");
    a_stream_passes(&source, &target).await;
}

#[tokio::test]
async fn a_gateway_refuses_to_listen_everywhere_or_beside_a_live_one() {
    let (mut source, _target) = pair();
    let config = |listen: &str, host: &Host| Config {
        listen: listen.parse().expect("an address"),
        host_dir: host.dir.path().into(),
        identity: host.identity.clone(),
        trust: host.trust.clone(),
        service: std::sync::Arc::new(Echo),
        limits: Limits::default(),
    };
    for everywhere in ["0.0.0.0:0", "[::]:0"] {
        let started = Gateway::start(config(everywhere, &source));
        assert!(matches!(started, Err(Error::Unspecified(_))));
    }
    let second = Gateway::start(config("127.0.0.2:0", &source));
    assert!(matches!(second, Err(Error::Socket(channel::socket::Error::InUse { .. }))));
    source.kill().await;
    let down = source.client().local(json!(null)).await;
    assert!(matches!(down, Err(DialError::GatewayDown(_))), "{down:?}");
    source.restart();
    source.client().local(json!(null)).await.expect("the dead gateway's socket is replaced");
}
