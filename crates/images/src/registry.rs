//! Container images that hold a disk.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Seek as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::sync::Arc;

use futures_util::StreamExt as _;
use oci_client::client::{
    BlobResponse, Certificate, CertificateEncoding, ClientConfig, ClientProtocol,
};
use oci_client::errors::OciDistributionError;
use oci_client::manifest::{ImageIndexEntry, OciDescriptor, OciImageManifest};
use oci_client::secrets::RegistryAuth;
use oci_client::{Client, Reference};

use crate::http::check;
use crate::layers::Search;
use crate::layout::Layout;
use crate::patience::Patience;
use crate::progress::{Reports, Step, report};
use crate::source::public;
use crate::sparse::PIECE;
use crate::work::{self, DISK_PARTIAL, DOWNLOAD, DOWNLOAD_PARTIAL, Work};
use crate::{Checksum, Error, Limits, Registry};

const EXAMPLE: &str = "docker://registry.example.org/disks/debian:12, or oci:/path";

/// Which variant of an image is meant.
#[derive(Clone)]
pub(crate) struct Platform {
    os: String,
    architecture: String,
}

impl Platform {
    fn parse(text: Option<&str>) -> Self {
        let (os, architecture) =
            text.and_then(|it| it.split_once('/')).unwrap_or(("linux", "amd64"));
        Self { os: os.to_owned(), architecture: architecture.to_owned() }
    }

    /// An entry that names no platform is for all.
    pub fn choose(&self, entries: &[ImageIndexEntry]) -> Option<String> {
        let fits = |entry: &&ImageIndexEntry| {
            entry.platform.as_ref().is_none_or(|it| {
                it.os.to_string() == self.os && it.architecture.to_string() == self.architecture
            })
        };
        entries.iter().find(fits).map(|entry| entry.digest.clone())
    }

    /// That it is not among an image's.
    pub fn missing(&self) -> String {
        format!("it has no variant for {}/{}", self.os, self.architecture)
    }
}

/// An image that was resolved to its manifest.
pub(crate) struct Resolved {
    place: Place,
    name: String,
    manifest: OciImageManifest,
    pub digest: Checksum,
}

enum Place {
    Remote { client: Client, reference: Reference },
    Layout(Arc<Layout>),
}

/// Fetches the disk into the work folder's `download`, and returns how many bytes were moved.
pub(crate) async fn download(
    registry: &Registry,
    work: &Work,
    limits: &Limits,
    reports: &Reports,
) -> Result<u64, Error> {
    let resolved = resolve(registry, limits).await?;
    resolved.download(registry.disk_path.clone(), work, limits, reports).await
}

/// Asks for an image's manifest.
pub(crate) async fn resolve(registry: &Registry, limits: &Limits) -> Result<Resolved, Error> {
    let platform = Platform::parse(registry.platform.as_deref());
    if let Some(path) = registry.url.strip_prefix("oci:") {
        let layout = Arc::new(Layout::parse(path));
        let name = layout.name();
        let own = layout.clone();
        let (manifest, digest) = work::unblock(move || own.manifest(&platform)).await?;
        let digest = digest_of(&digest, &name)?;
        return Ok(Resolved { place: Place::Layout(layout), name, manifest, digest });
    }
    let reference = parse(&registry.url)?;
    let name = reference.whole();
    let client = client(registry, &reference, platform, limits)?;
    let auth = registry.credentials.as_ref().map_or(RegistryAuth::Anonymous, |it| {
        RegistryAuth::Basic(it.user.clone(), it.password.clone())
    });
    let (manifest, digest) =
        client.pull_image_manifest(&reference, &auth).await.map_err(failed(&name))?;
    let digest = digest_of(&digest, &name)?;
    Ok(Resolved { place: Place::Remote { client, reference }, name, manifest, digest })
}

impl Resolved {
    /// Looks for the disk in one layer after the other, from the topmost on.
    pub async fn download(
        &self,
        disk_path: Option<String>,
        work: &Work,
        limits: &Limits,
        reports: &Reports,
    ) -> Result<u64, Error> {
        let max_bytes = limits.max_bytes;
        let search = Arc::new(Search { image: self.name.clone(), disk_path, max_bytes });
        let mut moved = 0;
        for layer in self.manifest.layers.iter().rev() {
            self.bound(layer, moved, limits.max_bytes)?;
            let (file, count) = self.fetch(layer, work, limits, reports).await?;
            moved += count;
            let (search, reports) = (search.clone(), reports.clone());
            let (partial, complete) = (work.path(DISK_PARTIAL), work.path(DOWNLOAD));
            let blob = work.path(DOWNLOAD_PARTIAL);
            let found = work
                .blocking(move |held| {
                    let found = search.extract(&file, &partial, held, &reports)?;
                    if found {
                        let disk = File::open(&partial).map_err(Error::io("open", &partial))?;
                        work::publish(&disk, &partial, &complete)?;
                    }
                    work::remove(&blob)?;
                    Ok(found)
                })
                .await?;
            if found {
                return Ok(moved);
            }
        }
        Err(Error::NoDisk { image: self.name.clone(), place: search.place() })
    }

    /// The layers must not be too large together.
    fn bound(&self, layer: &OciDescriptor, moved: u64, limit: u64) -> Result<(), Error> {
        let sum = u64::try_from(layer.size).unwrap_or(0).saturating_add(moved);
        match sum > limit {
            true => Err(Error::TooManyBytes { what: self.name.clone(), limit }),
            false => Ok(()),
        }
    }

    /// A layer's verified bytes, and how many of them had to be moved.
    async fn fetch(
        &self,
        layer: &OciDescriptor,
        work: &Work,
        limits: &Limits,
        reports: &Reports,
    ) -> Result<(File, u64), Error> {
        let digest = digest_of(&layer.digest, &self.name)?;
        match &self.place {
            Place::Layout(layout) => {
                let (layout, layer) = (layout.clone(), layer.clone());
                let file = work.blocking(move |_| layout.blob(&layer)).await?;
                Ok((file, 0))
            }
            Place::Remote { client, reference } => {
                let name = &self.name;
                // Only the registry itself was named as a source.
                let layer = &OciDescriptor { urls: None, ..layer.clone() };
                let blob = Blob { client, reference, layer, digest, name, limits, reports };
                blob.fetch(work).await
            }
        }
    }
}

/// A layer in a registry.
struct Blob<'a> {
    client: &'a Client,
    reference: &'a Reference,
    layer: &'a OciDescriptor,
    digest: Checksum,
    name: &'a str,
    limits: &'a Limits,
    reports: &'a Reports,
}

impl Blob<'_> {
    async fn fetch(self, work: &Work) -> Result<(File, u64), Error> {
        let mut partial = Partial::open(&self.digest, work).await?;
        let size = u64::try_from(self.layer.size).unwrap_or(0);
        let mut moved = 0;
        let mut patience = Patience::new(self.limits, Some(self.reports));
        while partial.length < size {
            let before = partial.length;
            let result = self.attempt(&mut partial, size, work, &mut moved).await;
            let Err(error) = result else { break };
            if !may_pass(&error) {
                return Err(error);
            }
            patience.wait(error, partial.length > before).await?;
        }
        self.verified(partial, work).await.map(|file| (file, moved))
    }

    async fn attempt(
        &self,
        partial: &mut Partial,
        size: u64,
        work: &Work,
        moved: &mut u64,
    ) -> Result<(), Error> {
        let offset = partial.length;
        let stream = match offset {
            0 => self.client.pull_blob_stream(self.reference, self.layer).await,
            _ => {
                let rest = self
                    .client
                    .pull_blob_stream_partial(self.reference, self.layer, offset, None)
                    .await;
                rest.map(|response| match response {
                    BlobResponse::Partial(stream) => stream,
                    BlobResponse::Full(stream) => {
                        partial.length = 0;
                        stream
                    }
                })
            }
        };
        let mut stream = stream.map_err(failed(self.name))?;
        let mut piece = Vec::with_capacity(PIECE);
        loop {
            let next = stream.next().await;
            if let Some(Ok(bytes)) = &next {
                piece.extend_from_slice(bytes);
                if piece.len() < PIECE {
                    continue;
                }
            }
            if partial.length + piece.len() as u64 > size {
                let what = format!("the layer {} of {}", self.digest, self.name);
                return Err(Error::TooManyBytes { what, limit: size });
            }
            *moved += piece.len() as u64;
            partial.write(std::mem::take(&mut piece), work).await?;
            report(self.reports, Step::Downloading, partial.length, Some(size));
            match next {
                Some(Ok(_)) => {}
                Some(Err(source)) => {
                    return Err(Error::Layer { image: self.name.to_owned(), source });
                }
                None if partial.length < size => {
                    let source = ErrorKind::UnexpectedEof.into();
                    return Err(Error::Layer { image: self.name.to_owned(), source });
                }
                None => return Ok(()),
            }
        }
    }

    async fn verified(self, partial: Partial, work: &Work) -> Result<File, Error> {
        let (file, path) = (partial.file, work.path(DOWNLOAD_PARTIAL));
        let what = format!("the layer {} of {}", self.digest, self.name);
        let (expected, reports) = (self.digest, self.reports.clone());
        work.blocking(move |held| {
            check(&expected, &file, &path, &what, held, &reports)?;
            (&*file).rewind().map_err(Error::io("read", &path))?;
            file.try_clone().map_err(Error::io("open", &path))
        })
        .await
    }
}

/// What is here of a layer. Its digest tells of which one, and whether it is right.
struct Partial {
    file: Arc<File>,
    length: u64,
}

impl Partial {
    async fn open(digest: &Checksum, work: &Work) -> Result<Self, Error> {
        let (path, state) = (work.path(DOWNLOAD_PARTIAL), work.path(work::DOWNLOAD_STATE));
        let digest = digest.to_string();
        work.blocking(move |_| {
            if work::load::<String>(&state)?.as_ref() != Some(&digest) {
                work::remove(&path)?;
                work::save(&state, &digest)?;
            }
            let file = OpenOptions::new()
                .create(true)
                .truncate(false)
                .read(true)
                .write(true)
                .mode(0o600)
                .open(&path)
                .map_err(Error::io("open", &path))?;
            let length = file.metadata().map_err(Error::io("inspect", &path))?.len();
            Ok(Self { file: Arc::new(file), length })
        })
        .await
    }

    async fn write(&mut self, piece: Vec<u8>, work: &Work) -> Result<(), Error> {
        let (file, path) = (self.file.clone(), work.path(DOWNLOAD_PARTIAL));
        let (offset, count) = (self.length, piece.len() as u64);
        work.blocking(move |_| {
            file.write_all_at(&piece, offset).map_err(Error::io("write", &path))
        })
        .await?;
        self.length += count;
        Ok(())
    }
}

/// Parses a digest, of which the only kind that is taken is SHA-256.
pub(crate) fn digest_of(text: &str, image: &str) -> Result<Checksum, Error> {
    let digest = text.parse::<Checksum>().ok().filter(Checksum::is_sha256);
    digest.ok_or_else(|| Error::Manifest {
        image: image.to_owned(),
        reason: format!("{text:?} is not a SHA-256 digest"),
    })
}

fn parse(url: &str) -> Result<Reference, Error> {
    let error = |reason: String| Error::Address { url: public(url), reason, example: EXAMPLE };
    let name = url
        .strip_prefix("docker://")
        .ok_or_else(|| error("it begins with neither docker:// nor oci:".to_owned()))?;
    name.parse().map_err(|e: oci_client::ParseError| error(e.to_string()))
}

fn client(
    registry: &Registry,
    reference: &Reference,
    platform: Platform,
    limits: &Limits,
) -> Result<Client, Error> {
    let protocol = match registry.insecure {
        true => ClientProtocol::HttpsExcept(vec![reference.resolve_registry().to_owned()]),
        false => ClientProtocol::Https,
    };
    let extra_root_certificates = registry
        .ca
        .iter()
        .map(|pem| Certificate { encoding: CertificateEncoding::Pem, data: pem.clone().into() })
        .collect();
    let config = ClientConfig {
        protocol,
        extra_root_certificates,
        platform_resolver: Some(Box::new(move |entries| platform.choose(entries))),
        read_timeout: Some(limits.stall),
        connect_timeout: Some(limits.stall),
        ..ClientConfig::default()
    };
    Client::try_from(config)
        .map_err(|_| Error::Setting { what: "CA certificate", url: public(&registry.url) })
}

fn failed(image: &str) -> impl FnOnce(OciDistributionError) -> Error {
    let image = image.to_owned();
    move |source| Error::Registry { image, source: Box::new(source) }
}

/// Whether it may help to try again.
fn may_pass(error: &Error) -> bool {
    match error {
        Error::Layer { .. } => true,
        Error::Registry { source, .. } => match &**source {
            OciDistributionError::RequestError(_) | OciDistributionError::IoError(_) => true,
            OciDistributionError::ServerError { code, .. } => *code >= 500 || *code == 429,
            _ => false,
        },
        _ => false,
    }
}
