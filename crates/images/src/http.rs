//! Downloads over HTTP that go on where they broke off.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek as _, SeekFrom};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use reqwest::header::{
    ACCEPT_ENCODING, CONTENT_RANGE, ETAG, HeaderMap, HeaderName, IF_RANGE, LAST_MODIFIED, LOCATION,
    RANGE,
};
use reqwest::{Certificate, Client, RequestBuilder, Response, StatusCode, Url, redirect};
use serde::{Deserialize, Serialize};

use crate::patience::Patience;
use crate::progress::{Reports, Step, Watched, report};
use crate::source::public;
use crate::sparse::PIECE;
use crate::work::{self, DOWNLOAD, DOWNLOAD_PARTIAL, DOWNLOAD_STATE, Held, Work};
use crate::{Checksum, Error, Http, Limits};

const CONNECT: Duration = Duration::from_secs(10);
const MAX_REDIRECTS: usize = 10;
/// How much may have to be fetched again after the machine has crashed.
const SYNC: u64 = 64 << 20;
const EXAMPLE: &str = "https://images.example.org/disk.qcow2";

/// What is known about a partial download.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct State {
    url: String,
    etag: Option<String>,
    last_modified: Option<String>,
    total: Option<u64>,
    /// What is durable. The file's length says more only as long as the machine runs.
    synced: u64,
    boot: Option<String>,
}

impl State {
    fn new(url: &str, headers: &HeaderMap, total: Option<u64>) -> Self {
        let text = |name| Some(headers.get(name)?.to_str().ok()?.to_owned());
        Self {
            url: url.to_owned(),
            etag: text(ETAG),
            last_modified: text(LAST_MODIFIED),
            total,
            synced: 0,
            boot: boot(),
        }
    }

    /// What tells the server which object the first part is of. Weak tags do not.
    fn validator(&self) -> Option<&str> {
        let strong = self.etag.as_deref().filter(|etag| !etag.starts_with("W/"));
        strong.or(self.last_modified.as_deref())
    }
}

/// Whether it may help to try again.
enum Failure {
    Again(Error),
    Final(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Final(error)
    }
}

struct Download<'a> {
    http: &'a Http,
    url: Url,
    client: Client,
    work: &'a Work,
    limits: &'a Limits,
    reports: &'a Reports,
    file: Arc<File>,
    state: State,
    length: u64,
    moved: u64,
}

/// Fetches into the work folder's `download`, and returns how many bytes were moved.
pub(crate) async fn download(
    http: &Http,
    work: &Work,
    limits: &Limits,
    reports: &Reports,
) -> Result<u64, Error> {
    let mut download = Download::open(http, work, limits, reports).await?;
    let mut patience = Patience::new(limits, Some(reports));
    while !download.is_complete() {
        let before = download.length;
        match download.attempt().await {
            Ok(()) => break,
            Err(Failure::Final(error)) => return Err(error),
            Err(Failure::Again(error)) => patience.wait(error, download.length > before).await?,
        }
    }
    download.finish().await
}

impl<'a> Download<'a> {
    async fn open(
        http: &'a Http,
        work: &'a Work,
        limits: &'a Limits,
        reports: &'a Reports,
    ) -> Result<Self, Error> {
        let url = parse(&http.url)?;
        let client = client(http, limits)?;
        let (own, state) = (http.url.clone(), work.path(DOWNLOAD_STATE));
        let partial = work.path(DOWNLOAD_PARTIAL);
        let (file, state, length) = work
            .blocking(move |_| {
                let file = OpenOptions::new()
                    .create(true)
                    .truncate(false)
                    .read(true)
                    .write(true)
                    .mode(0o600)
                    .open(&partial)
                    .map_err(Error::io("open", &partial))?;
                let known = work::load::<State>(&state)?.filter(|known| known.url == own);
                let length = file.metadata().map_err(Error::io("inspect", &partial))?.len();
                let length = match &known {
                    None => 0,
                    Some(known) if known.boot.is_some() && known.boot == boot() => length,
                    Some(known) => known.synced.min(length),
                };
                file.set_len(length).map_err(Error::io("resize", &partial))?;
                Ok((file, known.unwrap_or_default(), length))
            })
            .await?;
        let file = Arc::new(file);
        Ok(Self { http, url, client, work, limits, reports, file, state, length, moved: 0 })
    }

    fn is_complete(&self) -> bool {
        self.state.total == Some(self.length)
    }

    async fn attempt(&mut self) -> Result<(), Failure> {
        let response = self.request().await?;
        self.begin(&response).await?;
        self.receive(response).await
    }

    /// Follows redirects itself, since secrets must not go along to other servers.
    async fn request(&self) -> Result<Response, Failure> {
        let mut url = self.url.clone();
        let mut trusted = true;
        for _ in 0..=MAX_REDIRECTS {
            let response = self.prepare(&url, trusted)?.send().await.map_err(|e| self.broken(e))?;
            let Some(next) = response.headers().get(LOCATION) else { return Ok(response) };
            if !response.status().is_redirection() {
                return Ok(response);
            }
            let next = next.to_str().ok().and_then(|next| url.join(next).ok());
            let next = next.ok_or_else(|| self.wrong("it redirects to no address"))?;
            if !matches!(next.scheme(), "https" | "http")
                || url.scheme() == "https" && next.scheme() == "http"
            {
                return Err(self.wrong("it redirects to where nothing is encrypted").into());
            }
            trusted &= next.origin() == url.origin();
            url = next;
        }
        Err(self.wrong("it redirects again and again").into())
    }

    fn prepare(&self, url: &Url, trusted: bool) -> Result<RequestBuilder, Error> {
        // Compression on the way would make ranges and checksums mean something else.
        let mut request = self.client.get(url.clone()).header(ACCEPT_ENCODING, "identity");
        if trusted {
            request = request.headers(self.http.header_map()?);
            if let Some(it) = &self.http.credentials {
                request = request.basic_auth(&it.user, Some(&it.password));
            }
        }
        if let (1.., Some(validator)) = (self.length, self.state.validator()) {
            request = request
                .header(RANGE, format!("bytes={}-", self.length))
                .header(IF_RANGE, validator);
        }
        Ok(request)
    }

    /// Makes the partial file ready for what the answer brings.
    async fn begin(&mut self, response: &Response) -> Result<(), Failure> {
        let status = response.status();
        match status {
            StatusCode::PARTIAL_CONTENT if self.continues(response) => Ok(()),
            StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE => {
                self.restart(State::default()).await?;
                Err(Failure::Again(self.wrong("it is not the range that was asked for")))
            }
            StatusCode::OK => {
                let total = response.content_length();
                self.bound(total.unwrap_or(0))?;
                let state = State::new(&self.http.url, response.headers(), total);
                Ok(self.restart(state).await?)
            }
            _ => Err(self.refused(status)),
        }
    }

    /// Whether a partial answer is the rest of what is here.
    fn continues(&self, response: &Response) -> bool {
        let header = |name| response.headers().get(name).and_then(|it| it.to_str().ok());
        let same = match (header(ETAG), self.state.etag.as_deref()) {
            (Some(theirs), Some(ours)) => theirs == ours,
            _ => true,
        };
        let starts = header(CONTENT_RANGE)
            .and_then(|range| range.strip_prefix("bytes ")?.split_once('-'))
            .is_some_and(|(start, _)| start.parse() == Ok(self.length));
        same && starts
    }

    async fn restart(&mut self, state: State) -> Result<(), Error> {
        (self.state, self.length) = (state, 0);
        let (file, path) = (self.file.clone(), self.work.path(DOWNLOAD_PARTIAL));
        self.work.blocking(move |_| file.set_len(0).map_err(Error::io("resize", &path))).await?;
        self.save_state().await
    }

    async fn save_state(&self) -> Result<(), Error> {
        let path = self.work.path(DOWNLOAD_STATE);
        let state = self.state.clone();
        self.work.blocking(move |_| work::save(&path, &state)).await
    }

    async fn receive(&mut self, response: Response) -> Result<(), Failure> {
        let mut stream = response.bytes_stream();
        let mut piece = Vec::with_capacity(PIECE);
        loop {
            let next = stream.next().await;
            if let Some(Ok(bytes)) = &next {
                piece.extend_from_slice(bytes);
                self.bound(self.length + piece.len() as u64)?;
                if piece.len() < PIECE {
                    continue;
                }
            }
            // What came before a failure is kept as well.
            self.write(std::mem::replace(&mut piece, Vec::with_capacity(PIECE))).await?;
            match next {
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(self.broken(error)),
                None if self.state.total.is_some_and(|total| total != self.length) => {
                    return Err(Failure::Again(self.wrong("it ended too early")));
                }
                None => return Ok(()),
            }
        }
    }

    async fn write(&mut self, piece: Vec<u8>) -> Result<(), Error> {
        let (file, path) = (self.file.clone(), self.work.path(DOWNLOAD_PARTIAL));
        let (offset, count) = (self.length, piece.len() as u64);
        let sync = offset + count >= self.state.synced + SYNC;
        self.work
            .blocking(move |_| {
                file.write_all_at(&piece, offset)
                    .and_then(|()| if sync { file.sync_data() } else { Ok(()) })
                    .map_err(Error::io("write", &path))
            })
            .await?;
        self.length += count;
        self.moved += count;
        report(self.reports, Step::Downloading, self.length, self.state.total);
        if sync {
            self.state.synced = self.length;
            self.save_state().await?;
        }
        Ok(())
    }

    async fn finish(self) -> Result<u64, Error> {
        let (partial, complete) = (self.work.path(DOWNLOAD_PARTIAL), self.work.path(DOWNLOAD));
        let (state, what) = (self.work.path(DOWNLOAD_STATE), public(&self.http.url));
        let (expected, reports) = (self.http.checksum.clone(), self.reports.clone());
        let (file, moved) = (self.file, self.moved);
        self.work
            .blocking(move |held| {
                if let Some(expected) = expected {
                    check(&expected, &file, &partial, &what, held, &reports)?;
                }
                work::publish(&file, &partial, &complete)?;
                work::remove(&state)?;
                Ok(moved)
            })
            .await
    }

    fn bound(&self, length: u64) -> Result<(), Error> {
        let limit = self.limits.max_bytes;
        let what = || public(&self.http.url);
        if length > limit { Err(Error::TooManyBytes { what: what(), limit }) } else { Ok(()) }
    }

    fn broken(&self, error: reqwest::Error) -> Failure {
        let url = public(&self.http.url);
        let own_fault = error.is_builder();
        let error = Error::Request { url, source: error.without_url() };
        if own_fault { Failure::Final(error) } else { Failure::Again(error) }
    }

    fn wrong(&self, reason: &str) -> Error {
        Error::Answer { url: public(&self.http.url), reason: reason.to_owned() }
    }

    fn refused(&self, status: StatusCode) -> Failure {
        let passing = status.is_server_error()
            || matches!(status, StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS);
        let hint = match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => "check the credentials",
            StatusCode::NOT_FOUND | StatusCode::GONE => "check the address",
            _ if passing => "try again later",
            _ => "check the address and the server",
        };
        let url = public(&self.http.url);
        let error = Error::Status { url, status: status.as_u16(), hint };
        if passing { Failure::Again(error) } else { Failure::Final(error) }
    }
}

impl Http {
    fn header_map(&self) -> Result<HeaderMap, Error> {
        let setting = || Error::Setting { what: "header", url: public(&self.url) };
        let mut map = HeaderMap::new();
        for (name, value) in &self.headers {
            let name = HeaderName::try_from(name.as_str()).map_err(|_| setting())?;
            let mut value =
                reqwest::header::HeaderValue::try_from(value.as_str()).map_err(|_| setting())?;
            value.set_sensitive(true);
            map.append(name, value);
        }
        Ok(map)
    }
}

/// Compares the checksum of a download, and removes one that is wrong.
pub(crate) fn check(
    expected: &Checksum,
    file: &File,
    path: &Path,
    what: &str,
    held: &Held,
    reports: &Reports,
) -> Result<(), Error> {
    let mut inner = file;
    let total = Some(inner.seek(SeekFrom::End(0)).map_err(Error::io("measure", path))?);
    inner.rewind().map_err(Error::io("read", path))?;
    let step = Step::Verifying;
    let mut reader = Watched { inner, held, reports, what: step, done: 0, total };
    verify(expected, &mut reader, what, path).inspect_err(|error| {
        if matches!(error, Error::Checksum { .. }) {
            // The mismatch says more than a failure of this.
            let _ = work::remove(path);
        }
    })
}

/// Reads everything and compares its checksum.
pub(crate) fn verify(
    expected: &Checksum,
    reader: &mut dyn Read,
    what: &str,
    path: &Path,
) -> Result<(), Error> {
    let actual = expected.of(reader).map_err(Error::io("read", path))?;
    if actual == *expected {
        return Ok(());
    }
    let (expected, actual) = (expected.to_string(), actual.to_string());
    Err(Error::Checksum { what: what.to_owned(), expected, actual })
}

fn parse(url: &str) -> Result<Url, Error> {
    let error = |reason: String| Error::Address { url: public(url), reason, example: EXAMPLE };
    let parsed = Url::parse(url).map_err(|e| error(e.to_string()))?;
    match parsed.scheme() {
        "http" | "https" => Ok(parsed),
        scheme => Err(error(format!("{scheme} is not http or https"))),
    }
}

fn client(http: &Http, limits: &Limits) -> Result<Client, Error> {
    let setting = |what| Error::Setting { what, url: public(&http.url) };
    let mut builder = Client::builder()
        .redirect(redirect::Policy::none())
        .connect_timeout(CONNECT.min(limits.stall))
        .read_timeout(limits.stall);
    if let Some(pem) = &http.ca {
        let own =
            Certificate::from_pem_bundle(pem.as_bytes()).map_err(|_| setting("CA certificate"))?;
        builder = builder.tls_certs_merge(own);
    }
    builder.build().map_err(|_| setting("CA certificate"))
}

/// Tells this run of the machine from others, if it can.
fn boot() -> Option<String> {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()
}
