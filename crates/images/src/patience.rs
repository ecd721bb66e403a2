//! What is done again because it may pass.

use std::time::Duration;

use crate::progress::Reports;
use crate::{Error, Limits};

const MAX_BACKOFF: Duration = Duration::from_secs(30);

/// How often in a row something broke off and nothing came.
pub(crate) struct Patience<'a> {
    limits: &'a Limits,
    reports: Option<&'a Reports>,
    failures: u32,
}

impl<'a> Patience<'a> {
    pub fn new(limits: &'a Limits, reports: Option<&'a Reports>) -> Self {
        Self { limits, reports, failures: 0 }
    }

    /// Waits before the next try, and tells why. Fails with what went wrong when there is none.
    /// `progress`: something came of the last one.
    pub async fn wait(&mut self, error: Error, progress: bool) -> Result<(), Error> {
        self.failures = if progress { 1 } else { self.failures + 1 };
        if self.failures > self.limits.retries {
            return Err(error);
        }
        tracing::info!("{error}: trying again");
        if let Some(reports) = self.reports {
            reports.send_modify(|progress| progress.broken = Some(error.to_string()));
        }
        let wait = self.limits.backoff.saturating_mul(1 << (self.failures - 1).min(16));
        tokio::time::sleep(wait.min(MAX_BACKOFF)).await;
        Ok(())
    }
}
