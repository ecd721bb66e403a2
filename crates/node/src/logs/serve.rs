//! `pods/log`: a container's log, as a client asks for it.

use super::{Stream, Wanted};
use crate::agent::record::Files;
use crate::storage::disks::Disks;
use apiserver::api::Logs;
use apiserver::body::{self, Answer};
use apiserver::meta;
use apiserver::status::Failure;
use bytes::Bytes;
use http::StatusCode;
use jiff::{SignedDuration, Timestamp};
use serde_json::Value;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::time::Duration;
use tokio::sync::mpsc;

const TEXT: &str = "text/plain";
/// How often a log that is followed is looked at.
const POLL: Duration = Duration::from_millis(100);
/// Of a log, what is read at once.
const PIECE: u64 = 256 << 10;

/// The logs of the pods of an embedded cluster's nodes.
pub struct PodLogs {
    /// Where the nodes' folders are.
    pub disks: Disks,
}

/// What a request asks for.
struct Query {
    container: Option<String>,
    previous: bool,
    follow: bool,
    limit: Option<usize>,
    wanted: Wanted,
}

impl Query {
    fn of(pairs: &[(String, String)]) -> Result<Self, Failure> {
        let find = |name: &str| {
            let value = pairs.iter().find(|(key, _)| key == name).map(|(_, value)| &**value);
            value.filter(|value| !value.is_empty())
        };
        let is = |name: &str| matches!(find(name), Some("true" | "1"));
        let number = |name: &str| {
            let parse = |text: &str| {
                text.parse::<u32>().map_err(|_| {
                    Failure::bad_request(format!("{name}: {text:?} is no number that is 0 or more"))
                })
            };
            find(name).map(parse).transpose()
        };
        let time = |text: &str| {
            text.parse::<Timestamp>()
                .map_err(|_| Failure::bad_request(format!("sinceTime: {text:?} is no time")))
        };
        let seconds = number("sinceSeconds")?;
        let since = find("sinceTime").map(time).transpose()?;
        if seconds.is_some() && since.is_some() {
            let text = "at most one of `sinceTime` or `sinceSeconds` may be specified";
            return Err(Failure::bad_request(text));
        }
        let ago = |seconds| Timestamp::now() - SignedDuration::from_secs(i64::from(seconds));
        let stream = match find("stream") {
            None | Some("All") => None,
            Some("Stdout") => Some(Stream::Out),
            Some("Stderr") => Some(Stream::Err),
            Some(other) => {
                let text = format!("stream: {other:?} is none of All, Stdout and Stderr");
                return Err(Failure::bad_request(text));
            }
        };
        Ok(Self {
            container: find("container").map(str::to_owned),
            previous: is("previous"),
            follow: is("follow"),
            limit: number("limitBytes")?.map(|n| n as usize),
            wanted: Wanted {
                tail: number("tailLines")?.map(|n| n as usize),
                since: since.or(seconds.map(ago)),
                timestamps: is("timestamps"),
                stream,
            },
        })
    }
}

/// The container that is meant.
fn container(pod: &Value, asked: Option<&str>) -> Result<String, Failure> {
    let names = |kind: &str| -> Vec<String> {
        let all = pod["spec"][kind].as_array().into_iter().flatten();
        all.filter_map(|c| c["name"].as_str()).map(str::to_owned).collect()
    };
    let (main, init) = (names("containers"), names("initContainers"));
    let name = meta::text(pod, "name");
    match (asked, &main[..]) {
        (Some(asked), _) if main.iter().chain(&init).any(|c| c == asked) => Ok(asked.into()),
        (Some(asked), _) => {
            Err(Failure::bad_request(format!("container {asked} is not valid for pod {name}")))
        }
        (None, [one]) => Ok(one.clone()),
        (None, _) => {
            let others = if init.is_empty() {
                String::new()
            } else {
                format!(" or one of the init containers: [{}]", init.join(" "))
            };
            Err(Failure::bad_request(format!(
                "a container name must be specified for pod {name}, choose one of: [{}]{others}",
                main.join(" ")
            )))
        }
    }
}

impl PodLogs {
    fn open(&self, pod: &Value, query: &Query) -> Result<Files, Failure> {
        let container = container(pod, query.container.as_deref())?;
        let name = meta::text(pod, "name");
        let node = pod["spec"]["nodeName"].as_str().unwrap_or_default();
        let folder = self.disks.node(node).join("pods").join(meta::text(pod, "uid"));
        let folder = folder.join("containers").join(&container);
        let waits = || {
            Failure::bad_request(format!(
                "container {container:?} in pod {name:?} is waiting to start: ContainerCreating"
            ))
        };
        // A run that waits to be started again has the log of the one before.
        let newest = Files::newest(&folder).filter(|_| !node.is_empty()).ok_or_else(waits)?;
        if !query.previous {
            return Ok(newest);
        }
        newest.previous().filter(|files| files.log().exists()).ok_or_else(|| {
            Failure::bad_request(format!(
                "previous terminated container {container:?} in pod {name:?} not found"
            ))
        })
    }
}

impl Logs for PodLogs {
    fn read<'a>(
        &'a self,
        pod: &'a Value,
        query: &'a [(String, String)],
    ) -> Pin<Box<dyn Future<Output = Result<Answer, Failure>> + Send + 'a>> {
        Box::pin(async move {
            let query = Query::of(query)?;
            let files = self.open(pod, &query)?;
            let path = files.log();
            let opened = tokio::task::spawn_blocking(move || Follower::open(path)).await;
            let opened = opened.map_err(io::Error::other).and_then(|done| done);
            let (mut follower, log) = opened
                .map_err(|error| Failure::internal(format!("the log cannot be read: {error}")))?;
            let mut text = query.wanted.render(&log);
            let mut left = query.limit.unwrap_or(usize::MAX);
            text.truncate(left);
            left -= text.len();
            if !query.follow {
                return Ok(body::answer(StatusCode::OK, TEXT, text));
            }
            let (send, pieces) = mpsc::channel(16);
            tokio::spawn(async move {
                let all = Wanted { tail: None, ..query.wanted };
                let mut text = text;
                while !send.is_closed() {
                    if !text.is_empty() && send.send(Bytes::from(text)).await.is_err() {
                        break;
                    }
                    // Asked before the log is read: what was said until then is in it.
                    let ended = files.exit().is_some();
                    let Ok(more) = follower.more() else { break };
                    if left == 0 || (ended && more.is_empty()) {
                        break;
                    }
                    if more.is_empty() {
                        tokio::time::sleep(POLL).await;
                    }
                    text = all.render(&more);
                    text.truncate(left);
                    left -= text.len();
                }
            });
            Ok(body::stream(TEXT, pieces))
        })
    }
}

/// Reads a log on as it grows.
struct Follower {
    path: PathBuf,
    file: Option<File>,
    /// A line that is not whole yet.
    begun: Vec<u8>,
}

impl Follower {
    /// Opens a log, and reads what is there: of the older file too.
    fn open(path: PathBuf) -> io::Result<(Self, Vec<u8>)> {
        let mut log = read_all(&path.with_extension("log.1"))?;
        let mut follower = Self { path, file: None, begun: Vec::new() };
        loop {
            let more = follower.more()?;
            if more.is_empty() {
                return Ok((follower, log));
            }
            log.extend(more);
        }
    }

    /// The whole lines that have come since.
    fn more(&mut self) -> io::Result<Vec<u8>> {
        if self.file.is_none() {
            self.file = open(&self.path)?;
        }
        let Some(file) = &mut self.file else { return Ok(Vec::new()) };
        let before = self.begun.len();
        file.take(PIECE).read_to_end(&mut self.begun)?;
        let grew = self.begun.len() > before;
        let inode = file.metadata()?.ino();
        if !grew && std::fs::metadata(&self.path).is_ok_and(|now| now.ino() != inode) {
            // It was put aside.
            self.file = open(&self.path)?;
            return self.more();
        }
        let whole = self.begun.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let rest = self.begun.split_off(whole);
        Ok(std::mem::replace(&mut self.begun, rest))
    }
}

fn open(path: &Path) -> io::Result<Option<File>> {
    match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        other => other.map(Some),
    }
}

fn read_all(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if let Some(file) = open(path)? {
        file.take(super::LARGEST).read_to_end(&mut bytes)?;
    }
    Ok(bytes)
}
