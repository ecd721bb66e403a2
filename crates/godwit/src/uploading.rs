//! `godwit image upload`: a DataVolume of a file of this machine.

use crate::cli::UploadImage;
use crate::vms::{Cluster, plain};
use anyhow::{Context, Result, bail, ensure};
use api::datavolume::{DataVolume, Phase};
use api::import::{UPLOAD, Upload, upload_secret};
use futures_util::StreamExt;
use k8s_openapi::api::core::v1::Secret;
use kube::{Api, ResourceExt};
use serde_json::json;
use std::io::{IsTerminal, SeekFrom};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use tokio::io::AsyncSeekExt;
use tokio_util::io::ReaderStream;

/// The cluster is ready for the image within this time.
const READY: Duration = Duration::from_secs(120);
/// The image is converted within this time.
const DONE: Duration = Duration::from_secs(3600);
const POLL: Duration = Duration::from_millis(200);
/// Tries of an upload that is cut.
const TRIES: u32 = 10;

/// Makes a DataVolume and uploads a file into it.
///
/// # Errors
/// For a person.
pub async fn run(arguments: UploadImage) -> Result<ExitCode> {
    let UploadImage { place, name, file, size, class } = arguments;
    let cluster = Cluster::open(&place).await?;
    let volumes: Api<DataVolume> = Api::namespaced(cluster.client.clone(), &cluster.namespace);
    let length = tokio::fs::metadata(&file)
        .await
        .with_context(|| format!("cannot read {}", file.display()))?
        .len();
    if volumes.get_opt(&name).await.map_err(plain)?.is_none() {
        let mut storage = json!({"resources": {"requests": {"storage": size}}});
        if let Some(class) = class {
            storage["storageClassName"] = class.into();
        }
        let volume = json!({
            "apiVersion": "cdi.kubevirt.io/v1beta1", "kind": "DataVolume",
            "metadata": {
                "name": name,
                "annotations": {api::keys::IMMEDIATE: "true"},
            },
            "spec": {"source": {"upload": {}}, "storage": storage},
        });
        let volume = serde_json::from_value(volume)?;
        volumes.create(&Default::default(), &volume).await.map_err(plain)?;
    }
    let mut tries = 0;
    loop {
        let Some(volume) = ready(&volumes, &name).await? else { break };
        let way = way(&cluster, &volume).await?;
        match send(&way, &file, length).await {
            Ok(()) => break,
            Err(error) if tries < TRIES && !way.is_final(&error) => {
                tries += 1;
                eprintln!("the upload was cut ({error:#}); it goes on");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            Err(error) => return Err(error),
        }
    }
    succeed(&volumes, &name).await?;
    eprintln!("DataVolume {name} has the image");
    Ok(ExitCode::SUCCESS)
}

fn phase(volume: &DataVolume) -> Phase {
    volume.status.as_ref().map(|status| status.phase).unwrap_or_default()
}

/// Why a DataVolume is not further.
fn words(volume: &DataVolume) -> String {
    let conditions = volume.status.iter().flat_map(|status| &status.conditions);
    let said: Vec<&str> = conditions.filter_map(|c| c.message.as_deref()).collect();
    format!("it is {:?}: {}", phase(volume), said.join("; "))
}

/// Waits until an upload is awaited. None: it has its image already.
async fn ready(volumes: &Api<DataVolume>, name: &str) -> Result<Option<DataVolume>> {
    let until = Instant::now() + READY;
    loop {
        let volume = volumes.get(name).await.map_err(plain)?;
        match phase(&volume) {
            Phase::Succeeded => return Ok(None),
            Phase::UploadReady => return Ok(Some(volume)),
            _ if volume.spec.source.as_ref().is_none_or(|source| source.upload.is_none()) => {
                bail!("DataVolume {name} is there, and none that is uploaded to")
            }
            _ => {}
        }
        ensure!(Instant::now() < until, "DataVolume {name} is not ready: {}", words(&volume));
        tokio::time::sleep(POLL).await;
    }
}

async fn succeed(volumes: &Api<DataVolume>, name: &str) -> Result<()> {
    let until = Instant::now() + DONE;
    loop {
        let volume = volumes.get(name).await.map_err(plain)?;
        match phase(&volume) {
            Phase::Succeeded => return Ok(()),
            Phase::Failed => bail!("DataVolume {name} has failed: {}", words(&volume)),
            _ => {}
        }
        ensure!(Instant::now() < until, "DataVolume {name} is not complete: {}", words(&volume));
        tokio::time::sleep(POLL).await;
    }
}

/// Where an upload goes, and by what it is let in.
struct Way {
    client: reqwest::Client,
    url: String,
    token: String,
}

impl Way {
    /// Whether another try would end the same way.
    fn is_final(&self, error: &anyhow::Error) -> bool {
        error.downcast_ref::<Refused>().is_some()
    }
}

/// The importer said no.
#[derive(Debug, thiserror::Error)]
#[error("the image is refused: {0}")]
struct Refused(String);

async fn way(cluster: &Cluster, volume: &DataVolume) -> Result<Way> {
    let told = volume.annotations().get(UPLOAD).context("the DataVolume does not say where to")?;
    let Upload { upload, certificate } = serde_json::from_str(told)?;
    let secrets: Api<Secret> = Api::namespaced(cluster.client.clone(), &cluster.namespace);
    let secret = secrets.get(&upload_secret(&volume.name_any())).await.map_err(plain)?;
    let token =
        secret.data.unwrap_or_default().remove("token").context("the Secret has no token")?;
    let certificate = reqwest::Certificate::from_pem(certificate.as_bytes())?;
    let client = reqwest::Client::builder().tls_certs_only([certificate]).build()?;
    Ok(Way { client, url: upload, token: String::from_utf8(token.0)? })
}

async fn send(way: &Way, path: &Path, length: u64) -> Result<()> {
    let asked = way.client.head(&way.url).bearer_auth(&way.token).send().await?;
    let have = asked.headers().get("Upload-Offset").and_then(|value| value.to_str().ok());
    let have: u64 = have.and_then(|text| text.parse().ok()).unwrap_or(0);
    // What is there is longer than the file: it was another.
    let begins = if have > length { 0 } else { have };
    let mut file = tokio::fs::File::open(path).await?;
    file.seek(SeekFrom::Start(begins)).await?;
    let mut sent = begins;
    let mut told = Instant::now();
    let shows = std::io::stderr().is_terminal();
    let body = ReaderStream::with_capacity(file, 256 << 10).inspect(move |piece| {
        sent += piece.as_ref().map_or(0, |bytes| bytes.len() as u64);
        if shows && told.elapsed() > POLL {
            told = Instant::now();
            eprint!("\r{} of {} MiB", sent >> 20, length >> 20);
        }
    });
    let answer = way
        .client
        .put(&way.url)
        .bearer_auth(&way.token)
        .header("Upload-Offset", begins)
        .header("Content-Length", length - begins)
        .body(reqwest::Body::wrap_stream(body))
        .send()
        .await?;
    let code = answer.status();
    if code.is_success() {
        return Ok(());
    }
    let said = answer.text().await.unwrap_or_default();
    match code.as_u16() {
        401 | 413 => Err(Refused(said).into()),
        _ => bail!("{code}: {said}"),
    }
}
