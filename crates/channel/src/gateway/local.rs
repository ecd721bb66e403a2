//! Connections from this host's launchers.

use std::sync::Arc;

use tokio::net::UnixStream;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::timeout;

use super::{Answer, Service, Shared, dial};
use crate::preface::{Refusal, code};
use crate::wire::{Failure, Request, Response};
use crate::{copy, socket, wire};

/// Serves one connection to its end.
pub(super) async fn serve(
    shared: Arc<Shared>,
    service: Arc<dyn Service>,
    mut unix: UnixStream,
    _permit: OwnedSemaphorePermit,
) {
    if !socket::is_own(&unix).unwrap_or(false) {
        tracing::warn!("a process of another user was turned away");
        return;
    }
    let request = match timeout(shared.limits.handshake, wire::read(&mut unix)).await {
        Ok(Ok(request)) => request,
        Ok(Err(error)) => return tracing::warn!(%error, "a local request cannot be read"),
        Err(_) => return tracing::warn!("a local request did not come in time"),
    };
    let answer = match request {
        Request::Dial { address, expect, preface } => {
            match dial::stream(&shared, &address, &expect, preface).await {
                Ok((tls, successor)) => {
                    let accepted = Response::Accepted { successor };
                    if let Err(error) = wire::write(&mut unix, &accepted).await {
                        return tracing::debug!(%error, "the launcher did not wait for its stream");
                    }
                    if let Err(error) = copy::both_ways(unix, tls).await {
                        tracing::debug!(%error, "dialed stream was cut");
                    }
                    return;
                }
                Err(failure) => {
                    tracing::warn!(%address, %expect, ?failure, "a stream cannot be opened");
                    Response::Failed(failure)
                }
            }
        }
        Request::Ask { address, expect, request } => match service.instead_of(&expect, &request) {
            Some(answer) => answered(&shared, answer).await,
            None => dial::ask(&shared, &address, &expect, &request)
                .await
                .map_or_else(Response::Failed, Response::Answer),
        },
        Request::Local(request) => answered(&shared, service.local(request)).await,
        Request::Counters => Response::Counters(shared.traffic.snapshot()),
    };
    match timeout(shared.limits.answer, wire::write(&mut unix, &answer)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "a local answer was not delivered"),
        Err(_) => tracing::debug!("a local answer was not taken in time"),
    }
}

async fn answered(shared: &Shared, answer: Answer<'_>) -> Response {
    match timeout(shared.limits.answer, answer).await {
        Ok(answer) => Response::Answer(answer),
        Err(_) => Response::Failed(Failure::Refused(Refusal::new(
            code::BUSY,
            "the handler took too long",
        ))),
    }
}
