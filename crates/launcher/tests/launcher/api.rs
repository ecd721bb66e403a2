//! What the API makes of wrong, large and impatient requests.

use crate::world::{Host, VM, firmware, spec};
use launcher::client::Error;
use launcher::status::Phase;
use serde_json::json;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

async fn raw(host: &Host, request: &str, body: &str) -> String {
    let mut stream = send(host, request, body).await;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

async fn send(host: &Host, request: &str, body: &str) -> tokio::net::UnixStream {
    let mut stream =
        channel::socket::connect_beneath(&host.folder(), "launcher.sock").await.unwrap();
    let length = body.len();
    let text = format!(
        "{request} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Content-Length: {length}\r\n\r\n{body}"
    );
    stream.write_all(text.as_bytes()).await.unwrap();
    stream
}

#[tokio::test]
async fn a_spec_is_refused_with_all_its_faults_on_one_line() {
    let host = Host::start();
    let launcher = host.launcher().await;
    let bad = spec(json!({
        "vcpus": 0, "serials": [], "disks": [{"name": "a-raw", "path": "relative"}],
        "nics": [{"name": "lan", "mac": "nonsense"}],
    }));
    let error = launcher.client.start(&bad, false).await.unwrap_err();
    let Error::Refused { status: 400, text } = error else { panic!("{error}") };
    for fault in ["vcpus", "serials", "a-raw", "relative", "nonsense"] {
        assert!(text.contains(fault), "{text}");
    }
    assert!(!text.contains('\n'), "{text}");
    let other = spec(json!({"name": "other"}));
    let error = launcher.client.start(&other, false).await.unwrap_err();
    assert!(matches!(error, Error::Refused { status: 400, .. }), "{error}");
    assert_eq!(launcher.client.status().await.unwrap().phase, Phase::Empty);
}

#[tokio::test]
async fn strange_requests_are_refused_in_json_and_leave_no_trace() {
    let host = Host::start();
    let launcher = host.launcher().await;
    let large = " ".repeat((1 << 20) + 1);
    for (request, body, status) in [
        ("GET /v1/nothing", "", "404"),
        ("GET /v1/spec", "", "404"),
        ("GET /v1/start", "", "405"),
        ("GET /v1/status?after=x", "", "400"),
        ("GET /v1/status?after=0&wait=-1", "", "400"),
        ("POST /v1/start", "{", "400"),
        ("POST /v1/shutdown", r#"{"grace_seconds":1e300}"#, "400"),
        ("POST /v1/shutdown", r#"{"grace_seconds":1,"why":"extra"}"#, "400"),
        ("POST /v1/start", &large, "413"),
        ("POST /v1/pause", "", "409"),
        ("POST /v1/failpoint", r#"{"point":"armed"}"#, "404"),
        ("DELETE /v1/failpoint", "", "404"),
    ] {
        let answer = raw(&host, request, body).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{request}: {answer}");
        assert!(answer.contains("\r\n\r\n{\"error\":\""), "{request}: {answer}");
    }
    assert_eq!(launcher.client.status().await.unwrap().generation, 0);
}

#[tokio::test]
async fn a_start_is_carried_out_though_nobody_waits_for_it() {
    let host = Host::start();
    let launcher = host.launcher().await;
    let body = json!({"spec": firmware()}).to_string();
    drop(send(&host, "POST /v1/start", &body).await);
    launcher.until_phase(Phase::Running).await;
}

#[tokio::test]
async fn a_status_is_waited_for_no_longer_than_wanted() {
    let host = Host::start();
    let launcher = host.launcher().await;
    let wait = Duration::from_millis(100);
    assert_eq!(launcher.client.status_after(0, wait).await.unwrap().generation, 0);
    // One who knows a generation of an earlier launcher is told at once.
    let status = launcher.client.status_after(500, Duration::from_secs(60)).await.unwrap();
    assert_eq!((status.generation, status.vm.as_str()), (0, VM));
}
