//! Which QEMU processes have ended, as the kernel says it.

use handover::record::InstanceId;
use rustix::process::{Pid, PidfdFlags};
use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::io::unix::AsyncFd;

/// Instances that are remembered; the oldest knowledge goes first.
const MAX_WATCHED: usize = 10_000;

/// The processes that are watched.
#[derive(Debug, Clone, Default)]
pub struct Watch {
    ended: Arc<Mutex<HashMap<InstanceId, bool>>>,
}

impl Watch {
    /// Watches a launcher's QEMU. A process that is not the one meant counts
    /// as ended: its id was given to another.
    ///
    /// # Errors
    /// When the kernel gives no descriptor for a process that lives.
    pub fn add(&self, instance: &InstanceId, pid: u32, start_time: u64) -> io::Result<()> {
        let raw = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let raw = raw.ok_or_else(|| io::Error::other(format!("{pid} is no process id")))?;
        let descriptor = match rustix::process::pidfd_open(raw, PidfdFlags::empty()) {
            Ok(descriptor) => descriptor,
            Err(rustix::io::Errno::SRCH) => {
                self.lock().insert(instance.clone(), true);
                return Ok(());
            }
            Err(errno) => return Err(errno.into()),
        };
        // N.B. after the descriptor was opened: from here on it names one process.
        if launcher::qemu::start_time(pid) != Some(start_time) {
            self.lock().insert(instance.clone(), true);
            return Ok(());
        }
        let descriptor = AsyncFd::with_interest(descriptor, tokio::io::Interest::READABLE)?;
        {
            let mut ended = self.lock();
            if ended.len() >= MAX_WATCHED {
                ended.retain(|_, ended| !*ended);
            }
            ended.insert(instance.clone(), false);
        }
        let (all, instance) = (self.clone(), instance.clone());
        tokio::spawn(async move {
            // A pidfd becomes readable when its process ends.
            if descriptor.readable().await.is_ok() {
                all.lock().insert(instance, true);
            }
        });
        Ok(())
    }

    /// Whether an instance's QEMU was seen to end. False also when nobody knows.
    pub fn has_ended(&self, instance: &InstanceId) -> bool {
        self.lock().get(instance).copied().unwrap_or(false)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<InstanceId, bool>> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
