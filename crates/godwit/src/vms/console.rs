//! A guest's console in this terminal.

use super::{Cluster, plain};
use crate::host::Raw;
use anyhow::{Context, Result, bail};
use futures_util::{SinkExt, StreamExt};
use http::StatusCode;
use hyper_util::rt::TokioIo;
use kube::client::Body;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::client::generate_key;
use tokio_tungstenite::tungstenite::protocol::{Message, Role};

/// Ctrl-].
const ESCAPE: u8 = 0x1d;
/// The protocol of KubeVirt's consoles: bytes, and nothing else.
const PROTOCOL: &str = "plain.kubevirt.io";

/// Connects this terminal to a guest's console, until Ctrl-] or the end of the input.
///
/// # Errors
/// When it cannot be had.
pub async fn run(cluster: &Cluster, name: &str) -> Result<()> {
    let mut stream = connect(cluster, name).await?;
    if std::io::IsTerminal::is_terminal(&std::io::stdin()) {
        eprintln!("Connected to {name}'s console. Ctrl-] leaves it.\r");
    }
    let _raw = Raw::enter()?;
    let (mut input, mut output) = (tokio::io::stdin(), tokio::io::stdout());
    let mut typed = vec![0; 1024];
    let mut open = true;
    loop {
        tokio::select! {
            message = stream.next() => match message {
                Some(Ok(Message::Binary(bytes))) => show(&mut output, &bytes).await?,
                Some(Ok(Message::Text(text))) => show(&mut output, text.as_bytes()).await?,
                Some(Ok(Message::Close(_)) | Err(_)) | None => return Ok(()),
                Some(Ok(_)) => {}
            },
            read = input.read(&mut typed), if open => {
                let read = read?;
                let end = typed[..read].iter().position(|byte| *byte == ESCAPE);
                let bytes = typed[..end.unwrap_or(read)].to_vec();
                stream.send(Message::Binary(bytes.into())).await?;
                if end.is_some() {
                    let _ = stream.close(None).await;
                    return Ok(());
                }
                // What is piped in ends; what it has caused is still shown.
                open = read > 0;
            }
        }
    }
}

async fn show(output: &mut tokio::io::Stdout, bytes: &[u8]) -> Result<()> {
    output.write_all(bytes).await?;
    output.flush().await?;
    Ok(())
}

type Stream = WebSocketStream<TokioIo<hyper::upgrade::Upgraded>>;

/// N.B. by hand: kube's own speaks the protocol of `kubectl exec` only.
async fn connect(cluster: &Cluster, name: &str) -> Result<Stream> {
    let path = format!(
        "/apis/subresources.kubevirt.io/v1/namespaces/{}/virtualmachineinstances/{name}/console",
        cluster.namespace
    );
    let request = http::Request::get(path)
        .header("Connection", "Upgrade")
        .header("Upgrade", "websocket")
        .header("Sec-WebSocket-Version", "13")
        .header("Sec-WebSocket-Key", generate_key())
        .header("Sec-WebSocket-Protocol", PROTOCOL)
        .body(Body::empty())?;
    let response = cluster.client.send(request).await.map_err(plain)?;
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        let bytes = response.into_body().collect_bytes().await.unwrap_or_default();
        let status: serde_json::Value = serde_json::from_slice(&bytes).unwrap_or_default();
        bail!("{}", status["message"].as_str().unwrap_or("the console cannot be had"));
    }
    let upgraded = hyper::upgrade::on(response).await.context("the console cannot be had")?;
    Ok(WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Client, None).await)
}
