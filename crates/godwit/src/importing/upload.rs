//! The importer's way in for an image that a person uploads.
//!
//! ```text
//! HEAD /v1/upload                        -> Upload-Offset: bytes that are here
//! PUT  /v1/upload, Upload-Offset: N      -> 204 once all is here and safe
//! ```
//!
//! What was received outlives the container: an upload that was cut goes on where it was.

use super::door::{Door, PATIENCE, Room};
use anyhow::{Context, Result};
use api::import::Upload;
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::io::{AsyncSeekExt, AsyncWriteExt, SeekFrom};
use tokio::sync::{Mutex, mpsc};

/// The header with how many bytes there are.
const OFFSET: &str = "Upload-Offset";

/// What an upload is received by.
struct Receiver {
    /// Held by the one upload that is under way.
    file: Mutex<PathBuf>,
    most: u64,
    done: mpsc::Sender<()>,
}

/// Waits until an image of at most so many bytes is in a file.
///
/// # Errors
/// When it cannot listen. What goes wrong with an upload is its sender's to know.
pub async fn receive(file: &Path, most: u64) -> Result<()> {
    let complete = file.with_extension("complete");
    if complete.exists() {
        return Ok(());
    }
    let door = Door::open().await?;
    let certificate = door.certificate.clone();
    let upload = Upload { upload: format!("{}/v1/upload", door.url), certificate };
    let told = serde_json::to_string(&upload)?;
    let (done, mut ended) = mpsc::channel(1);
    let receiver = Arc::new(Receiver { file: Mutex::new(file.to_owned()), most, done });
    tokio::select! {
        () = door.serve(&told, receiver) => {}
        _ = ended.recv() => {}
    }
    std::fs::File::create(&complete).context("cannot note that the upload is whole")?;
    Ok(())
}

type Answer = Response<Full<Bytes>>;

fn answer(code: StatusCode, offset: u64, text: impl Into<String>) -> Answer {
    let mut answer = Response::new(Full::new(Bytes::from(text.into())));
    *answer.status_mut() = code;
    answer.headers_mut().insert(OFFSET, offset.into());
    answer
}

impl Room for Receiver {
    type Body = Full<Bytes>;

    async fn answer(&self, request: Request<Incoming>) -> Answer {
        if request.uri().path() != "/v1/upload" {
            return answer(StatusCode::NOT_FOUND, 0, "uploads go to /v1/upload");
        }
        let Ok(file) = self.file.try_lock() else {
            return answer(StatusCode::CONFLICT, 0, "another upload is under way");
        };
        let have = std::fs::metadata(&*file).map(|found| found.len()).unwrap_or_default();
        match *request.method() {
            Method::HEAD => answer(StatusCode::OK, have, ""),
            Method::PUT => self.take(request, &file, have).await,
            _ => answer(StatusCode::METHOD_NOT_ALLOWED, have, "say HEAD or PUT"),
        }
    }

    fn say(code: StatusCode, text: &'static str) -> Answer {
        answer(code, 0, text)
    }
}

impl Receiver {
    async fn take(&self, request: Request<Incoming>, file: &Path, have: u64) -> Answer {
        let header = |name: &str| {
            let value = request.headers().get(name)?.to_str().ok()?;
            value.parse::<u64>().ok()
        };
        let begins = header(OFFSET).unwrap_or(0);
        let Some(length) = header("Content-Length") else {
            return answer(StatusCode::LENGTH_REQUIRED, have, "say Content-Length");
        };
        if begins != have && begins != 0 {
            return answer(StatusCode::CONFLICT, have, format!("go on at {have}"));
        }
        if begins.saturating_add(length) > self.most {
            let text = format!("an image of more than {} bytes is not taken", self.most);
            return answer(StatusCode::PAYLOAD_TOO_LARGE, have, text);
        }
        match write(request.into_body(), file, begins).await {
            Ok(end) if end == begins + length => {
                // Its receiver lives as long as the pod.
                let _ = self.done.try_send(());
                answer(StatusCode::NO_CONTENT, end, "")
            }
            Ok(end) => answer(StatusCode::BAD_REQUEST, end, "the upload broke off"),
            Err(error) => answer(StatusCode::INSUFFICIENT_STORAGE, have, format!("{error:#}")),
        }
    }
}

/// Writes what comes, from an offset on. Returns where it ends; it is safe then.
async fn write(mut body: Incoming, path: &Path, begins: u64) -> Result<u64> {
    let mut file =
        tokio::fs::File::options().create(true).truncate(false).write(true).open(path).await?;
    file.set_len(begins).await?;
    file.seek(SeekFrom::Start(begins)).await?;
    let mut end = begins;
    while let Ok(Some(Ok(frame))) = tokio::time::timeout(PATIENCE, body.frame()).await {
        if let Ok(data) = frame.into_data() {
            file.write_all(&data).await.context("the image cannot be kept")?;
            end += data.len() as u64;
        }
    }
    file.flush().await?;
    file.sync_all().await.context("the image cannot be kept")?;
    Ok(end)
}
