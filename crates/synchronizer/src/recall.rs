//! Guests that have left and may not have come: both launchers of a move may die between its commit and
//! its adoption. The record at the other end is asked, until it has answered: then it is known either
//! that the guest has come, or that it never will, and it may begin anew where it was.

use crate::records::OfVm;
use crate::serve::forward;
use crate::wire::{Ask, Told};
use crate::world::World;
use api::owner::{Ledger, OwnerRecord, Status};
use futures_util::future::join_all;
use handover::handler::Qemu;
use handover::ledger::Response;
use handover::record::{AttemptId, InstanceId, Swap};
use kube::ResourceExt;
use std::sync::Arc;
use std::time::Duration;

/// Those that cannot be asked are asked again after this.
const AGAIN: Duration = Duration::from_secs(5);

/// Settles all of them. Never ends by itself.
pub async fn run(world: Arc<World>) {
    let mut changes = world.changes.clone();
    loop {
        changes.borrow_and_update();
        let all = world.owners.state();
        let astray: Vec<_> = all.iter().filter_map(|record| Astray::of(&world, record)).collect();
        if astray.is_empty() {
            // Its sender lives as long as the watches do.
            drop(changes.changed().await);
            continue;
        }
        join_all(astray.iter().map(|one| one.settle(&world))).await;
        tokio::time::sleep(AGAIN).await;
    }
}

/// One that may not have come.
struct Astray {
    record: OfVm,
    status: Status,
    attempt: AttemptId,
    /// Where it was to go.
    to: Ledger,
}

impl Astray {
    fn of(world: &World, record: &OwnerRecord) -> Option<Self> {
        let status = record.status.as_ref()?;
        let to = status.is_astray()?;
        let (namespace, name) = (record.namespace().unwrap_or_default(), record.name_any());
        Some(Self {
            record: OfVm { client: world.client.clone(), namespace, name },
            attempt: AttemptId(status.of.as_ref()?.attempt.clone()),
            status: status.clone(),
            to,
        })
    }

    async fn settle(&self, world: &World) {
        let Self { record, status, attempt, to } = self;
        let (epoch, owner) = (status.epoch, InstanceId(status.owner.clone()));
        let written = match self.ask(world).await {
            Ok(Response::Done { .. }) => {
                let back = Swap::HandBack { epoch, owner, attempt: attempt.clone() };
                record.take_back(&back).await
            }
            Ok(Response::Refused { refused })
                if refused.current.as_ref().is_some_and(|r| r.epoch > epoch) =>
            {
                record.arrived(&attempt.0).await
            }
            Ok(Response::Refused { refused }) => Response::Failed { why: refused.why },
            Ok(_) => Response::Failed { why: "it answers what was not asked".into() },
            Err(why) => Response::Failed { why },
        };
        if let Response::Failed { why } = written {
            let (vm, to) = (record.vm(), to.id());
            tracing::warn!("{vm} has left for {to}, and whether it came is not known: {why}");
        }
    }

    /// Asks the record there to let the guest go, if its heir has not taken it and does not live.
    async fn ask(&self, world: &World) -> Result<Response, String> {
        let Self { record, status, attempt, to } = self;
        let cluster = world.cluster();
        let (namespace, name) = (record.namespace.clone(), record.name.clone());
        let own = Ledger { cluster: cluster.clone(), namespace, name }.id();
        let change = Swap::Relinquish {
            epoch: status.epoch,
            source: InstanceId(status.owner.clone()),
            attempt: attempt.clone(),
            peer: own.clone(),
            adopted: None,
            has_guest: false,
        };
        let Ledger { cluster: there, namespace, name } = to.clone();
        if there == cluster {
            let other = OfVm { client: world.client.clone(), namespace, name };
            return Ok(other.swap_of(&own, &change, |_| Qemu::Unknown).await);
        }
        match forward(world, &there, &Ask::Owner { asker: own, namespace, name, change }).await {
            Told::Owner { response } => Ok(response),
            Told::Refused { why } => Err(why),
            _ => Err("it answers what was not asked".into()),
        }
    }
}
