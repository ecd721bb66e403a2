//! Points at which a test can stop a move, to kill or cut exactly there.
//!
//! A point does nothing unless the launcher was started with failpoints on and
//! a test armed it: then the move stops there and says so in its status, until
//! the test lets it go on.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::watch;

/// The failpoints of one launcher.
#[derive(Debug, Clone, Default)]
pub struct Failpoints {
    on: bool,
    armed: Arc<Mutex<HashSet<String>>>,
    /// The point at which a move stands.
    at: Arc<watch::Sender<Option<String>>>,
}

impl Failpoints {
    /// Failpoints that can be armed if `on`.
    pub fn new(on: bool) -> Self {
        Self { on, ..Self::default() }
    }

    /// Arms a point; false when failpoints are off.
    pub fn arm(&self, point: &str) -> bool {
        self.on && {
            self.lock().insert(point.to_owned());
            true
        }
    }

    /// Lets a move that stands at a point go on.
    pub fn release(&self) {
        self.at.send_replace(None);
    }

    /// Whether a move that comes by has to stop here. Disarms the point.
    pub fn stops_at(&self, point: &str) -> bool {
        self.on && self.lock().remove(point)
    }

    /// Stands here until a test lets the move go on.
    pub async fn stand(&self, point: &str) {
        tracing::info!(point, "standing at a failpoint");
        self.at.send_replace(Some(point.to_owned()));
        let mut at = self.at.subscribe();
        // N.B. no deadline: a test decides when the move goes on.
        let _ = at.wait_for(Option::is_none).await;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashSet<String>> {
        self.armed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
