//! What a node has for guests besides processors and memory: KVM, which pods get by asking for it.

use kubelet::Device;
use std::path::PathBuf;
use std::time::Duration;

/// More than a node has pods: KVM is not used up.
const GUESTS: usize = 1000;
/// A kubelet that does not take it is asked again after this.
const AGAIN: Duration = Duration::from_secs(5);

/// KVM.
pub fn kvm() -> Device {
    Device { resource: api::keys::KVM.into(), path: "/dev/kvm".into(), shares: GUESTS }
}

/// Offers it to the node's kubelet, in that one's folder. Never ends.
pub async fn offer(folder: PathBuf) {
    let device = kvm();
    let mut told = None;
    loop {
        match kubelet::offer(&folder, &device).await {
            Ok(()) => told = None,
            // It may be away for long.
            Err(error) => {
                let text = launcher::chain(&error);
                if told.as_ref() != Some(&text) {
                    tracing::warn!("{text}: no guest on KVM begins on this node until it does");
                }
                told = Some(text);
            }
        }
        tokio::time::sleep(AGAIN).await;
    }
}
