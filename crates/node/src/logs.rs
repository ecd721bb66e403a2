//! Logs of containers: written by their supervisors, read for `pods/log`.
//!
//! A line is kept as the container runtimes of Kubernetes keep it: time, stream, `F` for the end of
//! a line or `P` for a part of one, text. One older file is kept beside the newest.

pub mod serve;

use jiff::Timestamp;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::PathBuf;

/// A file is put aside at this size.
const LARGEST: u64 = 10 << 20;
/// A line is broken at this length, as container runtimes do.
const LONGEST: usize = 16 << 10;

/// Where a line was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Out,
    /// Standard error.
    Err,
}

impl Stream {
    fn name(self) -> &'static str {
        match self {
            Self::Out => "stdout",
            Self::Err => "stderr",
        }
    }
}

/// Writes a log.
pub struct Writer {
    path: PathBuf,
    file: File,
    size: u64,
    /// Begun lines of both streams.
    begun: [Vec<u8>; 2],
}

impl Writer {
    /// Goes on with a log, or begins it.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn create(path: PathBuf) -> io::Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(&path)?;
        let size = file.metadata()?.len();
        Ok(Self { path, file, size, begun: [Vec::new(), Vec::new()] })
    }

    /// Takes what a stream said.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&mut self, stream: Stream, bytes: &[u8], now: Timestamp) -> io::Result<()> {
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            let line = &mut self.begun[stream as usize];
            line.extend_from_slice(part);
            let whole = line.last() == Some(&b'\n');
            if whole || line.len() >= LONGEST {
                let line = std::mem::take(line);
                self.line(stream, &line, whole, now)?;
            }
        }
        Ok(())
    }

    /// Writes what a stream has begun and will not end.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn finish(&mut self, stream: Stream, now: Timestamp) -> io::Result<()> {
        let line = std::mem::take(&mut self.begun[stream as usize]);
        if line.is_empty() { Ok(()) } else { self.line(stream, &line, false, now) }
    }

    fn line(&mut self, stream: Stream, line: &[u8], whole: bool, now: Timestamp) -> io::Result<()> {
        let text = line.strip_suffix(b"\n").unwrap_or(line);
        let tag = if whole { "F" } else { "P" };
        let mut out = format!("{now:.9} {} {tag} ", stream.name()).into_bytes();
        out.extend_from_slice(text);
        out.push(b'\n');
        if self.size > 0 && self.size + out.len() as u64 > LARGEST {
            std::fs::rename(&self.path, self.path.with_extension("log.1"))?;
            self.file = OpenOptions::new().create(true).append(true).open(&self.path)?;
            self.size = 0;
        }
        self.file.write_all(&out)?;
        self.size += out.len() as u64;
        Ok(())
    }
}

/// What of a log is asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wanted {
    /// The last lines only.
    pub tail: Option<usize>,
    /// Not what was said before.
    pub since: Option<Timestamp>,
    /// Each line begins with its time.
    pub timestamps: bool,
    /// One stream only.
    pub stream: Option<Stream>,
}

/// A line of a log.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Line<'a> {
    at: Timestamp,
    stream: Stream,
    whole: bool,
    text: &'a [u8],
}

fn parse(line: &[u8]) -> Option<Line<'_>> {
    let mut parts = line.splitn(4, |byte| *byte == b' ');
    let at = std::str::from_utf8(parts.next()?).ok()?.parse().ok()?;
    let stream = match parts.next()? {
        b"stdout" => Stream::Out,
        b"stderr" => Stream::Err,
        _ => return None,
    };
    let whole = parts.next()? == b"F";
    Some(Line { at, stream, whole, text: parts.next()? })
}

impl Wanted {
    /// What whole lines of a log look like to who asked. A damaged line is left out.
    pub fn render(&self, log: &[u8]) -> Vec<u8> {
        let wanted = |line: &Line<'_>| {
            self.since.is_none_or(|since| line.at >= since)
                && self.stream.is_none_or(|stream| line.stream == stream)
        };
        let lines: Vec<Line<'_>> =
            log.split(|byte| *byte == b'\n').filter_map(parse).filter(wanted).collect();
        // Parts of one line count as one.
        let begins = |i: &usize| *i == 0 || lines[*i - 1].whole;
        let starts: Vec<usize> = (0..lines.len()).filter(begins).collect();
        let skipped = self.tail.map_or(0, |tail| starts.len().saturating_sub(tail));
        let first = starts.get(skipped).copied().unwrap_or(lines.len());
        let mut out = Vec::new();
        for (i, line) in lines.iter().enumerate().skip(first) {
            if self.timestamps && begins(&i) {
                out.extend_from_slice(format!("{:.9} ", line.at).as_bytes());
            }
            out.extend_from_slice(line.text);
            if line.whole {
                out.push(b'\n');
            }
        }
        out
    }
}
