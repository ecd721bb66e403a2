//! A guest's serial console over a WebSocket: one stream of bytes, as messages in either direction.

use super::{Target, guest};
use crate::Stream;
use apiserver::body::{self, Answer};
use apiserver::status::Failure;
use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use http::header::SEC_WEBSOCKET_PROTOCOL;
use http::request::Parts;
use http::{HeaderMap, HeaderValue, Request, StatusCode};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use std::sync::Mutex;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::server::create_response;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error, Message};

/// The protocol, as KubeVirt calls it.
const PROTOCOL: &str = "plain.kubevirt.io";
/// Consoles that are open at once, at most.
const CONSOLES: usize = 512;
/// Bytes of a message, at most.
const MESSAGE: usize = 1 << 20;
/// Bytes that are read from a guest at once.
const PIECE: usize = 16 << 10;
/// A client that says nothing is asked so often whether it is there.
const PING: Duration = Duration::from_secs(30);
/// One that has not answered for so long is not.
const SILENCE: Duration = Duration::from_secs(90);
/// What is left to be sent when a console ends is sent within this time.
const FAREWELL: Duration = Duration::from_secs(5);

/// Consoles that are open: they end with this.
#[derive(Default)]
pub struct Consoles(Mutex<JoinSet<()>>);

impl Consoles {
    fn spawn(&self, console: impl Future<Output = ()> + Send + 'static) -> Result<(), Failure> {
        let mut all = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        while all.try_join_next().is_some() {}
        if all.len() >= CONSOLES {
            let why = format!("{CONSOLES} consoles are open: close one, or try again later");
            return Err(Failure::too_many_requests(why));
        }
        all.spawn(console);
        Ok(())
    }
}

pub async fn open(target: &Target<'_>, head: Parts) -> Result<Answer, Failure> {
    let mut request = Request::from_parts(head, ());
    // Makes Sec-WebSocket-Accept, and says what is missing.
    let response = create_response(&request).map_err(|why| {
        Failure::bad_request(format!(
            "upgrade required: a console is opened as a WebSocket (protocol {PROTOCOL}), as \
             virtctl console does: {why}"
        ))
    })?;
    let protocol = protocol(request.headers())?;
    if request.extensions().get::<OnUpgrade>().is_none() {
        let why = "upgrade required: this connection cannot become a WebSocket; use HTTP/1.1";
        return Err(Failure::bad_request(why));
    }
    let vmi = target.vmi().await?;
    let node = guest::node(target, &vmi)?;
    let guest = target.web.guests.console(&node, target.namespace, target.name).await?;
    let upgrade = hyper::upgrade::on(&mut request);
    target.web.consoles.spawn(async move {
        let Ok(connection) = upgrade.await else { return };
        let config = WebSocketConfig::default()
            .max_message_size(Some(MESSAGE))
            .max_frame_size(Some(MESSAGE))
            .max_write_buffer_size(4 * MESSAGE);
        let socket =
            WebSocketStream::from_raw_socket(TokioIo::new(connection), Role::Server, Some(config));
        carry(socket.await, guest).await;
    })?;
    let mut answer = body::answer(StatusCode::OK, "", Bytes::new());
    *answer.status_mut() = response.status();
    *answer.headers_mut() = response.headers().clone();
    if protocol {
        answer.headers_mut().insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(PROTOCOL));
    }
    Ok(answer)
}

/// Whether the client asks for our protocol. One that asks for none gets none.
fn protocol(headers: &HeaderMap) -> Result<bool, Failure> {
    let all = headers.get_all(SEC_WEBSOCKET_PROTOCOL).iter().filter_map(|v| v.to_str().ok());
    let mut asked = all.flat_map(|list| list.split(',')).map(str::trim).peekable();
    let any = asked.peek().is_some();
    match asked.any(|one| one == PROTOCOL) {
        false if any => Err(Failure::bad_request(format!("only the protocol {PROTOCOL} is known"))),
        ours => Ok(ours),
    }
}

/// Carries bytes both ways until one end closes.
async fn carry<S: Stream>(socket: WebSocketStream<S>, guest: Box<dyn Stream>) {
    let (mut to_client, mut from_client) = socket.split();
    let (mut from_guest, mut to_guest) = tokio::io::split(guest);
    let typed = async {
        loop {
            let message = tokio::time::timeout(SILENCE, from_client.next()).await.ok()??.ok()?;
            match message {
                Message::Binary(bytes) => to_guest.write_all(&bytes).await.ok()?,
                Message::Text(text) => to_guest.write_all(text.as_bytes()).await.ok()?,
                Message::Close(_) => return None,
                // Pings are answered by the library.
                _ => continue,
            }
            to_guest.flush().await.ok()?;
        }
    };
    let shown = async {
        let mut piece = vec![0; PIECE];
        loop {
            let message = match tokio::time::timeout(PING, from_guest.read(&mut piece)).await {
                Err(_) => Message::Ping(Bytes::new()),
                Ok(Ok(read)) if read > 0 => Message::binary(Bytes::copy_from_slice(&piece[..read])),
                Ok(_) => break,
            };
            to_client.send(message).await?;
        }
        Ok::<(), Error>(())
    };
    // Neither waits for the other: a guest that does not read may still write.
    tokio::select! {
        _ = async { let _: Option<()> = typed.await; } => {}
        ended = shown => if let Err(error) = ended
            && !matches!(error, Error::ConnectionClosed | Error::AlreadyClosed)
        {
            tracing::debug!(%error, "a console's client is gone");
        },
    }
    // Whoever is still there is told that it is over.
    let _ = tokio::time::timeout(FAREWELL, to_client.close()).await;
}
