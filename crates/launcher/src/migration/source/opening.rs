//! The control stream: both sides agree on what is to be moved.

use super::{Input, Shell};
use crate::migration::control::{Control, Heard, Sent};
use crate::migration::links::{Dialing, Links};
use crate::migration::offer::{Offer, Prepared};
use channel::preface::{Stream, VmName};
use handover::Failure;
use handover::source::Event;
use handover::wire::v1::{FromSource, FromTarget};
use handover::wire::{Hello, Welcome};
use mover::codec::Compression;
use std::time::Duration;
use tokio::sync::mpsc;

impl Shell {
    /// Opens the control stream; the rest is told by inputs.
    pub(super) fn open(&mut self) -> Result<(), String> {
        let ticket = &self.request.ticket;
        let policy = &self.request.policy;
        let vm: VmName = ticket.vm.parse().map_err(str::to_owned)?;
        let dialing = Dialing {
            gateway: self.launcher.gateway.clone(),
            peer: ticket.peer.clone(),
            vm,
            migration: ticket.migration.clone(),
            patience: Duration::from_secs_f64(policy.reconnect_seconds),
            over: self.over.subscribe(),
        };
        let sizes = self.guest.qemu.spec.disks.iter().map(|disk| {
            mover::disk::Disk::source(&disk.path).map(|opened| disk.size.unwrap_or(opened.size()))
        });
        let firmware = self.guest.qemu.spec.firmware_size().map_err(|e| e.to_string())?;
        let offer = Offer {
            firmware,
            spec: self.guest.qemu.spec.clone(),
            epoch: self.guest.epoch,
            source: self.guest.instance.clone(),
            copy: self.copy.clone(),
            sizes: sizes.collect::<Result<_, _>>().map_err(|e| e.to_string())?,
            disk_streams: policy.disk_streams,
            multifd: policy.multifd,
            zstd: policy.compression == Compression::Zstd,
            paused: self.was_paused,
        };
        let dialer = dialing.stream(Stream::Control, ticket.token.clone());
        self.dialing = Some(dialing);
        let control = Control::start(Links::Dial(dialer), policy.reconnect_seconds);
        let inputs = self.inputs.clone();
        let answer = Duration::from_secs_f64(policy.answer_seconds);
        tokio::spawn(async move {
            let Control { sent, heard, monitor } = control;
            let opened = Input::Opened { sent: sent.clone(), monitor };
            if inputs.send(opened).await.is_err() {
                return;
            }
            converse(&sent, heard, offer, answer, &inputs).await;
        });
        Ok(())
    }
}

/// Shakes hands, then turns the target's messages into inputs until it is lost.
async fn converse(
    sent: &Sent,
    mut heard: Heard,
    offer: Offer,
    answer: Duration,
    inputs: &mpsc::Sender<Input>,
) {
    let shaken = tokio::time::timeout(answer, shake(sent, &mut heard, &offer)).await;
    let last = match shaken {
        Ok(Ok(prepared)) => {
            if prepared.disks.len() != offer.sizes.len() {
                failed("the target prepared other disks than were offered".into())
            } else {
                let _ = inputs.send(Input::Prepared(Box::new(prepared))).await;
                listen(heard, inputs).await
            }
        }
        Ok(Err(why)) => failed(why),
        Err(_) => failed(format!("the target did not answer within {answer:?}")),
    };
    // A half that is gone has heard enough.
    let _ = inputs.send(Input::Core(last)).await;
}

fn failed(why: String) -> Event {
    Event::Failed(Failure::Other(why))
}

async fn shake(sent: &Sent, heard: &mut Heard, offer: &Offer) -> Result<Prepared, String> {
    sent.send(&Hello::ours()).await;
    match heard.next::<Welcome>().await? {
        Some(Welcome::Version(handover::wire::CURRENT)) => {}
        Some(Welcome::Version(other)) => {
            return Err(format!(
                "the target chose protocol version {other}, which was not offered"
            ));
        }
        Some(Welcome::Unwelcome(why)) => return Err(why),
        None => return Err("the target closed the control stream".into()),
    }
    let body = serde_json::to_value(offer).map_err(|e| e.to_string())?;
    sent.send(&FromSource::Offer(body)).await;
    match heard.next::<FromTarget>().await? {
        Some(FromTarget::Prepared(body)) => {
            serde_json::from_value(body).map_err(|e| format!("the target's answer is wrong: {e}"))
        }
        Some(FromTarget::Failed(failure)) => {
            Err(format!("the target cannot receive it: {failure}"))
        }
        Some(other) => Err(format!("the target answered {other:?} to the offer")),
        None => Err("the target closed the control stream".into()),
    }
}

async fn listen(mut heard: Heard, inputs: &mpsc::Sender<Input>) -> Event {
    loop {
        let event = match heard.next::<FromTarget>().await {
            Ok(Some(FromTarget::Loaded)) => Event::PeerLoaded,
            Ok(Some(FromTarget::Running)) => Event::PeerRunning,
            Ok(Some(FromTarget::Failed(failure))) => {
                Event::Failed(Failure::Other(format!("the target failed: {failure}")))
            }
            Ok(Some(FromTarget::GaveBack(failure))) => Event::PeerGaveBack(failure),
            Ok(Some(FromTarget::Prepared(_))) => {
                Event::Failed(Failure::Other("the target prepared twice".into()))
            }
            Ok(None) => return Event::PeerLost,
            Err(why) => {
                tracing::warn!(%why, "the control stream is lost");
                return Event::PeerLost;
            }
        };
        if inputs.send(Input::Core(event)).await.is_err() {
            return Event::PeerLost;
        }
    }
}
