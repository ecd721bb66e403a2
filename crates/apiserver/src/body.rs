//! Bodies of requests and answers.

use crate::status::Failure;
use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderValue};
use http::{Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Body, Frame};
use serde_json::Value;
use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::sync::mpsc;

/// What is sent back.
pub type Answer = Response<UnsyncBoxBody<Bytes, Infallible>>;

/// Bytes of a request's body, at most: as Kubernetes has it.
pub const MOST: usize = 3 << 20;

/// Reads the body of a request of at most [`MOST`] bytes.
///
/// # Errors
/// 413 when it is larger, 400 when it breaks off.
pub async fn read<B>(body: B) -> Result<Bytes, Failure>
where
    B: Body<Data = Bytes>,
    B::Error: std::fmt::Display,
{
    read_up_to(body, MOST).await
}

/// Reads the body of a request.
///
/// # Errors
/// 413 when it is larger than `most`, 400 when it breaks off.
pub async fn read_up_to<B>(body: B, most: usize) -> Result<Bytes, Failure>
where
    B: Body<Data = Bytes>,
    B::Error: std::fmt::Display,
{
    let mut body = std::pin::pin!(body);
    let mut all = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|e| Failure::bad_request(format!("the body broke off: {e}")))?;
        let Ok(data) = frame.into_data() else { continue };
        if all.len() + data.len() > most {
            return Err(Failure::too_large(most));
        }
        all.extend_from_slice(&data);
    }
    Ok(all.freeze())
}

/// An answer of these bytes.
pub fn answer(code: StatusCode, media: &'static str, bytes: impl Into<Bytes>) -> Answer {
    let bytes = bytes.into();
    let length = HeaderValue::from(bytes.len());
    let mut answer = Response::new(Full::new(bytes).boxed_unsync());
    *answer.status_mut() = code;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(media));
    answer.headers_mut().insert(CONTENT_LENGTH, length);
    answer
}

/// An answer of one JSON value.
pub fn json(code: StatusCode, value: &Value) -> Answer {
    let mut bytes = value.to_string();
    bytes.push('\n');
    answer(code, "application/json", bytes)
}

/// A failure, as clients know it.
pub fn failure(failure: &Failure) -> Answer {
    let code = StatusCode::from_u16(failure.code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    json(code, &failure.to_json())
}

/// An answer whose body comes bit by bit, until the sender is dropped.
pub fn stream(media: &'static str, pieces: mpsc::Receiver<Bytes>) -> Answer {
    let mut answer = Response::new(StreamBody::new(Pieces(pieces)).boxed_unsync());
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(media));
    answer
}

struct Pieces(mpsc::Receiver<Bytes>);

impl futures_util::Stream for Pieces {
    type Item = Result<Frame<Bytes>, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_recv(cx).map(|piece| piece.map(|bytes| Ok(Frame::data(bytes))))
    }
}
