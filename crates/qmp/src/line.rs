//! The lines of a QMP stream: bounded reading, and what a line says.

use std::{sync::Arc, time::Duration};

use serde_json::{Map, Value};
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};

use crate::{Closed, Event, client::ErrorClass, commands::Version};

/// A buffer larger than this is given back after the line that needed it.
const KEPT_BUFFER: usize = 64 * 1024;

/// Reads lines of at most `limit` bytes.
pub(crate) struct Lines<R> {
    reader: BufReader<R>,
    limit: usize,
    line: Vec<u8>,
}

impl<R: AsyncRead + Unpin> Lines<R> {
    pub(crate) fn new(reader: R, limit: usize) -> Self {
        Self { reader: BufReader::new(reader), limit, line: Vec::new() }
    }

    /// The next line that is not blank, without its end.
    pub(crate) async fn next(&mut self) -> Result<&[u8], Closed> {
        loop {
            self.read_line().await?;
            if !self.line.trim_ascii().is_empty() {
                return Ok(self.line.trim_ascii());
            }
        }
    }

    async fn read_line(&mut self) -> Result<(), Closed> {
        self.line.clear();
        self.line.shrink_to(KEPT_BUFFER);
        loop {
            let chunk = self.reader.fill_buf().await.map_err(|e| Closed::Io(Arc::new(e)))?;
            if chunk.is_empty() {
                return Err(if self.line.is_empty() { Closed::Eof } else { Closed::MidLine });
            }
            let end = chunk.iter().position(|&byte| byte == b'\n');
            let part = &chunk[..end.unwrap_or(chunk.len())];
            if self.line.len() + part.len() > self.limit {
                return Err(Closed::LineTooLong { limit: self.limit });
            }
            self.line.extend_from_slice(part);
            let consumed = end.map_or(chunk.len(), |end| end + 1);
            self.reader.consume(consumed);
            if end.is_some() {
                return Ok(());
            }
        }
    }
}

/// What QEMU answered to one command.
pub(crate) type Reply = Result<Value, Refusal>;

/// A QMP error: its class and its text.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) class: ErrorClass,
    pub(crate) desc: String,
}

/// What one line says.
#[derive(Debug)]
pub(crate) enum Line {
    Greeting {
        version: Version,
        oob: bool,
    },
    Reply {
        id: Option<u64>,
        reply: Reply,
    },
    Event(Event),
    /// JSON, but nothing that QMP defines today.
    Other,
}

impl Line {
    pub(crate) fn parse(line: &[u8]) -> Result<Self, serde_json::Error> {
        let mut line: Map<String, Value> = serde_json::from_slice(line)?;
        if let Some(Value::String(name)) = line.remove("event") {
            return Ok(Self::Event(event(name.into(), line)));
        }
        let id = line.get("id").and_then(Value::as_u64);
        if let Some(value) = line.remove("return") {
            return Ok(Self::Reply { id, reply: Ok(value) });
        }
        if let Some(error) = line.remove("error") {
            return Ok(Self::Reply { id, reply: Err(refusal(&error)) });
        }
        if let Some(greeting) = line.remove("QMP") {
            return self::greeting(&greeting);
        }
        Ok(Self::Other)
    }
}

fn event(name: Box<str>, mut line: Map<String, Value>) -> Event {
    let stamp = |unit| line.get("timestamp").and_then(|t| t.get(unit)?.as_u64());
    let timestamp = Duration::from_secs(stamp("seconds").unwrap_or(0))
        .saturating_add(Duration::from_micros(stamp("microseconds").unwrap_or(0)));
    Event { name, data: line.remove("data").unwrap_or_default(), timestamp }
}

fn refusal(error: &Value) -> Refusal {
    let text = |member| error.get(member).and_then(Value::as_str).unwrap_or_default();
    Refusal { class: text("class").into(), desc: text("desc").to_owned() }
}

fn greeting(greeting: &Value) -> Result<Line, serde_json::Error> {
    let version = serde_json::from_value(greeting.get("version").cloned().unwrap_or_default())?;
    let capabilities = greeting.get("capabilities").and_then(Value::as_array);
    let oob = capabilities.is_some_and(|all| all.iter().any(|one| one == "oob"));
    Ok(Line::Greeting { version, oob })
}
