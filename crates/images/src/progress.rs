//! How far an import is.

use std::io::{self, Read};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::work::Held;

/// What an import is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Step {
    /// Waits for another one that uses the same folder to end.
    #[default]
    Waiting,
    /// Brings the source's bytes to the work folder.
    Downloading,
    /// Compares the checksum.
    Verifying,
    /// Decompresses, or takes the disk out of a container image's layers.
    Unpacking,
    /// Turns qcow2 into raw on the target.
    Converting,
    /// Copies raw data to the target.
    Writing,
}

impl std::fmt::Display for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Waiting => "waiting",
            Self::Downloading => "downloading",
            Self::Verifying => "verifying",
            Self::Unpacking => "unpacking",
            Self::Converting => "converting",
            Self::Writing => "writing",
        })
    }
}

/// How far an import's current step is, in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Progress {
    /// What is done of this step.
    pub done: u64,
    /// What there is to do, if it is known.
    pub total: Option<u64>,
    /// Which step it is.
    pub what: Step,
    /// Why it broke off, as long as nothing has come since: it is tried again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub broken: Option<String>,
}

/// Where an import reports to.
pub type Reports = watch::Sender<Progress>;

pub(crate) fn report(reports: &Reports, what: Step, done: u64, total: Option<u64>) {
    reports.send_replace(Progress { done, total, what, broken: None });
}

/// A reader that reports what was read, and fails once its import was given up.
pub(crate) struct Watched<'a, R> {
    pub inner: R,
    pub held: &'a Held,
    pub reports: &'a Reports,
    pub what: Step,
    pub done: u64,
    pub total: Option<u64>,
}

impl<R: Read> Read for Watched<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.held.check().map_err(io::Error::other)?;
        let count = self.inner.read(buffer)?;
        self.done += count as u64;
        report(self.reports, self.what, self.done, self.total);
        Ok(count)
    }
}
