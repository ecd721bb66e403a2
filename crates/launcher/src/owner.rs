//! The way to the owner record: through the host's handler.

use crate::migration::ticket::Peer;
use channel::client::GatewayClient;
use handover::ledger::{Process, Request, Response};
use handover::record::{HostId, InstanceId, Record, Swap, VmId};
use handover::source::Answer;
use handover::start::{Action, Event, Start, Starter, State};
use std::time::{Duration, Instant};

/// How long a start asks the ledgers that have to agree to it.
const DECISION: Duration = Duration::from_secs(10);
/// A ledger that did not answer is asked again after this.
const SETTLE: Duration = Duration::from_millis(300);

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
    /// The VM went to another host and lives there, or nobody knows.
    #[error("the VM may not be started here: {0}")]
    Elsewhere(String),
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
    pub async fn swap_at(&self, peer: &Peer, change: Swap) -> Answer {
        let request = Request::Swap { vm: self.vm.clone(), change };
        let Ok(value) = serde_json::to_value(&request) else { return Answer::Unknown };
        match self.gateway.ask(&peer.address, &peer.id, value).await {
            Ok(value) => {
                let response = serde_json::from_value::<Response>(value)
                    .unwrap_or_else(|error| Response::Failed { why: error.to_string() });
                if let Response::Failed { why } = &response {
                    tracing::warn!(why, "the other host's ledger could not answer");
                }
                response.into_answer()
            }
            Err(error) => {
                tracing::warn!(%error, "the other host's ledger did not answer");
                Answer::Unknown
            }
        }
    }

    /// Takes the next epoch for `starter`, which is about to start the VM. One that
    /// has left is first recalled from the host to which it went, if that is still
    /// possible; `peers` knows where that is.
    ///
    /// # Errors
    /// [`Error`]: then it must not start.
    pub async fn start(
        &self,
        starter: Starter,
        peers: impl Fn(&HostId) -> Result<Peer, String>,
    ) -> Result<u64, Error> {
        let record = self.read().await?;
        let (mut start, mut actions) = Start::begin(starter, record.as_ref());
        let until = Instant::now() + DECISION;
        let mut last_refusal = None;
        while let Some(action) = actions.pop() {
            let before = start.state.clone();
            let event = match action {
                Action::Swap(change) => {
                    let request = Request::Swap { vm: self.vm.clone(), change };
                    let response = self.ask(&request).await?;
                    match &response {
                        Response::Refused { refused } => last_refusal = Some(refused.clone()),
                        Response::Failed { why } => return Err(Error::Failed(why.clone())),
                        _ => {}
                    }
                    Event::Swapped(response.into_answer())
                }
                Action::AskPeer(host, swap) => {
                    let peer = peers(&host).map_err(Error::Elsewhere)?;
                    Event::Recalled(self.swap_at(&peer, swap).await)
                }
            };
            (start, actions) = start.step(event);
            if start.state == before {
                if Instant::now() > until {
                    return Err(undecided(record));
                }
                tokio::time::sleep(SETTLE).await;
            }
        }
        match (start.state, last_refusal) {
            (State::Started { epoch }, _) => Ok(epoch),
            (State::Refused { .. }, Some(refused)) => Err(Error::Refused(refused)),
            (State::Refused { why }, None) => Err(Error::Elsewhere(why)),
            _ => Err(undecided(record)),
        }
    }

    /// Has the handler watch a QEMU. Without it a guest is not survived by its
    /// target when its launcher dies late in a move; nothing else depends on it.
    pub async fn watch(&self, instance: &InstanceId, pid: u32) {
        let Some(start_time) = crate::qemu::start_time(pid) else { return };
        let process = Process { pid, start_time, namespace: crate::qemu::pid_namespace(None) };
        let request = Request::Watch { instance: instance.clone(), process };
        if let Err(error) = self.ask(&request).await {
            tracing::warn!(%error, "QEMU is not watched");
        }
    }
}

fn undecided(record: Option<Record>) -> Error {
    let record = record.map_or("nothing".into(), |record| record.to_string());
    Error::Elsewhere(format!(
        "the owner record says {record}, and the ledger there does not say that it will never \
         run it; start it there, try again when that host answers, or insist with --force"
    ))
}
