//! One host's agent: keeps the owner ledger, watches QEMU processes, answers
//! the launchers of its host and other hosts.

pub mod cluster;
pub mod ledger;
pub mod watch;

use handover::handler::{is_too_late, local, peer, told_of, too_late};
use handover::ledger::{Request, Response};
use handover::record::{HostId, InstanceId};
use std::path::Path;

/// The agent of one host.
#[derive(Debug)]
pub struct Handler {
    ledger: ledger::Ledger,
    watch: watch::Watch,
}

impl Handler {
    /// The agent of the host whose folder this is.
    ///
    /// # Errors
    /// When the ledger or the list of watched processes cannot be opened.
    pub fn open(host: &Path) -> std::io::Result<Self> {
        Ok(Self { ledger: ledger::Ledger::open(host)?, watch: watch::Watch::open(host)? })
    }

    /// Answers a launcher of this host.
    pub fn local(&self, request: &Request) -> Response {
        match request {
            Request::Read { vm } => match self.ledger.read(vm) {
                Ok(record) => Response::Record { record },
                Err(error) => failed(&error),
            },
            Request::Swap { vm, change } => {
                let qemu = |instance: &InstanceId| self.watch.qemu_of(instance);
                answer(self.ledger.swap_telling(vm, |current, told| {
                    let answer = match is_too_late(told, change) {
                        true => Err(too_late(current)),
                        false => local(vm, current, qemu, change),
                    };
                    (answer, told.cloned())
                }))
            }
            Request::Watch { instance, process } => match self.watch.add(instance, process) {
                Ok(()) => Response::Watching,
                Err(error) => failed(&error),
            },
        }
    }

    /// Answers another host, whose identity was checked.
    pub fn peer(&self, asker: &HostId, request: &Request) -> Response {
        let Request::Swap { vm, change } = request else {
            return Response::Failed { why: "another host may not ask this".into() };
        };
        let qemu = |instance: &InstanceId| self.watch.qemu_of(instance);
        answer(self.ledger.swap_telling(vm, |current, told| {
            let answer = peer(vm, current, asker, qemu, change);
            let now = told_of(current, change).filter(|_| answer.is_err());
            (answer, now.or(told).cloned())
        }))
    }
}

fn answer(
    swapped: Result<Result<handover::record::Record, handover::record::Refused>, ledger::Error>,
) -> Response {
    match swapped {
        Ok(Ok(record)) => Response::Done { record },
        Ok(Err(refused)) => Response::Refused { refused },
        Err(error) => failed(&error),
    }
}

fn failed(error: &dyn std::error::Error) -> Response {
    let mut why = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        why = format!("{why}: {cause}");
        source = cause.source();
    }
    tracing::warn!(%why, "cannot answer");
    Response::Failed { why }
}
