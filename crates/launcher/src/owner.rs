//! The way to the owner record: through the host's handler.

use channel::client::GatewayClient;
use handover::ledger::{Request, Response};
use handover::record::{InstanceId, Record, Swap, VmId};
use handover::source::Answer;

/// Why the ledger could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No answer.
    #[error("this host's handler does not answer; is `godwit gateway` running for this host?")]
    Silent(#[source] channel::client::DialError),
    /// An answer that is none.
    #[error("this host's handler cannot answer: {0}")]
    Failed(String),
    /// The record does not let the VM start here.
    #[error("the VM may not be started here")]
    Refused(#[source] handover::record::Refused),
}

/// Asks about one VM.
#[derive(Debug, Clone)]
pub struct Owner {
    gateway: GatewayClient,
    vm: VmId,
}

impl Owner {
    /// Asks `gateway`'s handler about `vm`.
    pub fn new(gateway: GatewayClient, vm: &str) -> Self {
        Self { gateway, vm: vm.into() }
    }

    async fn ask(&self, request: &Request) -> Result<Response, Error> {
        let value = serde_json::to_value(request).map_err(|e| Error::Failed(e.to_string()))?;
        let value = self.gateway.local(value).await.map_err(Error::Silent)?;
        serde_json::from_value(value).map_err(|e| Error::Failed(e.to_string()))
    }

    /// What the record says.
    ///
    /// # Errors
    /// [`Error`]: no answer is never taken for no record.
    pub async fn read(&self) -> Result<Option<Record>, Error> {
        match self.ask(&Request::Read { vm: self.vm.clone() }).await? {
            Response::Record { record } => Ok(record),
            Response::Failed { why } => Err(Error::Failed(why)),
            other => Err(Error::Failed(format!("it answered {other:?}"))),
        }
    }

    /// Swaps; a failure is an unknown outcome.
    pub async fn swap(&self, change: Swap) -> Answer {
        let request = Request::Swap { vm: self.vm.clone(), change };
        match self.ask(&request).await {
            Ok(response) => response.into_answer(),
            Err(error) => {
                tracing::warn!(%error, "the owner record's swap has an unknown outcome");
                Answer::Unknown
            }
        }
    }

    /// The same swap in the ledger of another host.
    pub async fn swap_at(&self, peer: &crate::migration::ticket::Peer, change: Swap) -> Answer {
        let request = Request::Swap { vm: self.vm.clone(), change };
        let Ok(value) = serde_json::to_value(&request) else { return Answer::Unknown };
        match self.gateway.ask(&peer.address, &peer.id, value).await {
            Ok(value) => serde_json::from_value::<Response>(value)
                .map_or(Answer::Unknown, Response::into_answer),
            Err(error) => {
                tracing::warn!(%error, "the other host's ledger did not answer");
                Answer::Unknown
            }
        }
    }

    /// Takes the next epoch for `instance`, which is about to start the VM.
    ///
    /// # Errors
    /// [`Error`]: then it must not start.
    pub async fn start(&self, instance: &InstanceId, forced: bool) -> Result<u64, Error> {
        let seen = self.read().await?.map(|record| record.epoch);
        let change = Swap::Start { seen, instance: instance.clone(), forced };
        let request = Request::Swap { vm: self.vm.clone(), change };
        match self.ask(&request).await? {
            Response::Done { record } => Ok(record.epoch),
            Response::Refused { refused } => Err(Error::Refused(refused)),
            Response::Failed { why } => Err(Error::Failed(why)),
            other => Err(Error::Failed(format!("it answered {other:?}"))),
        }
    }

    /// Has the handler watch a QEMU. Without it a guest is not survived by its
    /// target when its launcher dies late in a move; nothing else depends on it.
    pub async fn watch(&self, instance: &InstanceId, pid: u32) {
        let Some(start_time) = crate::qemu::start_time(pid) else { return };
        let request = Request::Watch { instance: instance.clone(), pid, start_time };
        if let Err(error) = self.ask(&request).await {
            tracing::warn!(%error, "QEMU is not watched");
        }
    }
}
