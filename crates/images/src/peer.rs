//! A disk of another node, from who lends it there ([`Lent`](crate::Lent)).
//!
//! ```text
//! HEAD url            -> Disk-Size: bytes
//! GET  url?from=N     -> Disk-Size: bytes; frames of what is not zero from N on
//! ```
//!
//! It goes straight to the target: a disk is larger than the room beside it. When the stream is cut
//! it goes on behind the last piece that was written.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use reqwest::{Certificate, Client, Method, Response, StatusCode};

use crate::frames::{Frame, Frames};
use crate::patience::Patience;
use crate::progress::{Reports, Step, report};
use crate::source::public;
use crate::target::Disk;
use crate::work::Work;
use crate::{Error, Format, Imported, Limits, Peer};

const CONNECT: Duration = Duration::from_secs(10);
/// The header with the size of the disk.
pub const SIZE: &str = "Disk-Size";

/// The size of a disk that is lent, in bytes.
///
/// # Errors
/// When its lender does not answer, or not as it should.
pub async fn size(peer: &Peer, limits: &Limits) -> Result<u64, Error> {
    let mut patience = Patience::new(limits, None);
    loop {
        match ask(&client(peer, limits)?, peer, Method::HEAD, 0).await {
            Ok((size, _)) => return Ok(size),
            Err(error) if may_pass(&error) => patience.wait(error, false).await?,
            Err(error) => return Err(error),
        }
    }
}

/// Brings all of it to a disk.
pub(crate) async fn bring(
    peer: &Peer,
    disk: Disk,
    work: &Work,
    limits: &Limits,
    reports: &Reports,
) -> Result<Imported, Error> {
    let client = client(peer, limits)?;
    let mut copy = Copy { peer, disk: Arc::new(disk), work, reports, position: 0, moved: 0 };
    let mut patience = Patience::new(limits, Some(reports));
    let size = loop {
        let before = copy.position;
        match copy.attempt(&client).await {
            Ok(size) => break size,
            Err(error) if may_pass(&error) => {
                patience.wait(error, copy.position > before).await?;
            }
            Err(error) => return Err(error),
        }
    };
    let (disk, end) = (Arc::clone(&copy.disk), copy.position);
    work.blocking(move |held| disk.finish(end, held)).await?;
    Ok(Imported { virtual_size: size, format: Format::Raw, bytes_moved: copy.moved })
}

/// Whether it may help to try again.
fn may_pass(error: &Error) -> bool {
    match error {
        Error::Request { .. } | Error::Answer { .. } => true,
        Error::Status { status, .. } => *status >= 500,
        _ => false,
    }
}

struct Copy<'a> {
    peer: &'a Peer,
    disk: Arc<Disk>,
    work: &'a Work,
    reports: &'a Reports,
    /// Everything before it is as it is there.
    position: u64,
    moved: u64,
}

impl Copy<'_> {
    async fn attempt(&mut self, client: &Client) -> Result<u64, Error> {
        let (size, response) = ask(client, self.peer, Method::GET, self.position).await?;
        if size > self.disk.size {
            return Err(Error::TooLarge { image: size, disk: self.disk.size });
        }
        let mut frames = Frames::new(size, self.position);
        let mut stream = response.bytes_stream();
        while let Some(bytes) = stream.next().await {
            frames.feed(&bytes.map_err(|source| broken(self.peer, source))?);
            while let Some(frame) = frames.take().map_err(|why| wrong(self.peer, why))? {
                let Frame::Data(offset, data) = frame else { return Ok(size) };
                self.write(offset, data, size).await?;
            }
        }
        Err(wrong(self.peer, "it ended too early"))
    }

    async fn write(&mut self, offset: u64, data: bytes::Bytes, size: u64) -> Result<(), Error> {
        let (disk, hole) = (Arc::clone(&self.disk), self.position..offset);
        self.moved += data.len() as u64;
        self.position = offset + data.len() as u64;
        let put = move |held: &_| {
            disk.zero_extent(hole, held)?;
            disk.write(&data, offset)
        };
        self.work.blocking(put).await?;
        report(self.reports, Step::Writing, self.position, Some(size));
        Ok(())
    }
}

/// Asks for a disk. Returns its size as well.
async fn ask(
    client: &Client,
    peer: &Peer,
    method: Method,
    from: u64,
) -> Result<(u64, Response), Error> {
    let url = format!("{}?from={from}", peer.url);
    let asked = client.request(method, url).bearer_auth(&peer.token).send().await;
    let response = asked.map_err(|source| broken(peer, source))?;
    if response.status() != StatusCode::OK {
        let (url, status) = (public(&peer.url), response.status().as_u16());
        let hint = "its node's log says why; the clone begins again by itself";
        return Err(Error::Status { url, status, hint });
    }
    let size = response.headers().get(SIZE).and_then(|size| size.to_str().ok()?.parse().ok());
    Ok((size.ok_or_else(|| wrong(peer, "it does not say how large the disk is"))?, response))
}

fn broken(peer: &Peer, source: reqwest::Error) -> Error {
    Error::Request { url: public(&peer.url), source: source.without_url() }
}

fn wrong(peer: &Peer, reason: &str) -> Error {
    Error::Answer { url: public(&peer.url), reason: reason.to_owned() }
}

/// Believes the one certificate, and nobody else.
fn client(peer: &Peer, limits: &Limits) -> Result<Client, Error> {
    let setting = || Error::Setting { what: "certificate", url: public(&peer.url) };
    let only = Certificate::from_pem(peer.certificate.as_bytes()).map_err(|_| setting())?;
    Client::builder()
        .tls_certs_only([only])
        .https_only(true)
        .redirect(reqwest::redirect::Policy::none())
        .no_proxy()
        .connect_timeout(CONNECT.min(limits.stall))
        .read_timeout(limits.stall)
        .build()
        .map_err(|_| setting())
}
