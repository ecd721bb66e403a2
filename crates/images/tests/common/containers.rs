//! Container images, as a layout on disk and in a registry.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use images::{Credentials, Registry};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tar::{EntryType, Header};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

pub const USER: &str = "me";
pub const PASSWORD: &str = "open sesame";

/// A container image: its blobs, the manifest being the last of them.
pub struct Image {
    pub blobs: Vec<Vec<u8>>,
}

pub fn digest(bytes: &[u8]) -> String {
    let hex = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    format!("sha256:{hex}")
}

impl Image {
    /// Of layers, the topmost last.
    pub fn new(layers: Vec<Vec<u8>>) -> Self {
        let config = b"{}".to_vec();
        let described = |kind: &str, bytes: &[u8]| json!({ "mediaType": kind, "digest": digest(bytes), "size": bytes.len() });
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": described("application/vnd.oci.image.config.v1+json", &config),
            "layers": layers
                .iter()
                .map(|it| described("application/vnd.oci.image.layer.v1.tar", it))
                .collect::<Vec<_>>(),
        });
        let mut blobs = layers;
        blobs.extend([config, manifest.to_string().into_bytes()]);
        Self { blobs }
    }

    pub fn manifest(&self) -> &[u8] {
        self.blobs.last().unwrap()
    }

    /// As one of an index's variants.
    pub fn entry(&self, architecture: &str) -> Value {
        json!({
            "mediaType": MANIFEST,
            "digest": digest(self.manifest()),
            "size": self.manifest().len(),
            "platform": { "os": "linux", "architecture": architecture },
        })
    }
}

/// Writes an OCI layout with images, each for its architecture.
pub fn layout(folder: PathBuf, images: &[(&str, &Image)]) -> Registry {
    let blobs = folder.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).unwrap();
    for blob in images.iter().flat_map(|(_, image)| &image.blobs) {
        std::fs::write(blobs.join(&digest(blob)[7..]), blob).unwrap();
    }
    let entries = images.iter().map(|(it, image)| image.entry(it)).collect::<Vec<_>>();
    let index = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": entries });
    std::fs::write(folder.join("index.json"), index.to_string()).unwrap();
    Registry { url: format!("oci:{}", folder.display()), ..Registry::default() }
}

/// A layer of files.
pub fn layer(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    for (name, data) in files {
        entry(&mut archive, EntryType::Regular, name, data);
    }
    archive.into_inner().unwrap()
}

/// Adds an entry whose name is taken as it is; of links the data is where they lead to.
pub fn entry(archive: &mut tar::Builder<Vec<u8>>, kind: EntryType, name: &str, data: &[u8]) {
    let link = kind.is_symlink() || kind.is_hard_link();
    let mut header = Header::new_gnu();
    header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
    header.set_entry_type(kind);
    header.set_mode(0o644);
    header.set_size(if link { 0 } else { data.len() as u64 });
    if link {
        header.as_old_mut().linkname[..data.len()].copy_from_slice(data);
    }
    header.set_cksum();
    archive.append(&header, if link { &[][..] } else { data }).unwrap();
}

/// A registry of its own, which ends with its test.
pub struct Running {
    child: Child,
    host: String,
    ca: Option<String>,
    client: reqwest::Client,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Running {
    /// None if the program is not installed.
    pub async fn start(folder: &Path, tls: bool) -> Option<Self> {
        // Free a moment ago; a registry does not tell which port it got.
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let host = format!("127.0.0.1:{port}");
        std::fs::create_dir_all(folder).unwrap();
        let ca = tls.then(|| certify(folder));
        let mut config = json!({
            "version": "0.1",
            "log": { "level": "error" },
            "storage": { "filesystem": { "rootdirectory": folder.join("data") } },
            "http": { "addr": host, "secret": "of a test" },
        });
        if tls {
            config["http"]["tls"] =
                json!({ "certificate": folder.join("cert"), "key": folder.join("key") });
            config["auth"] =
                json!({ "htpasswd": { "realm": "test", "path": folder.join("htpasswd") } });
        }
        let path = folder.join("config.yml");
        std::fs::write(&path, config.to_string()).unwrap();
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(path)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .ok()?;
        let mut builder = reqwest::Client::builder();
        if let Some(pem) = &ca {
            let own = reqwest::Certificate::from_pem(pem.as_bytes()).unwrap();
            builder = builder.tls_certs_merge([own]);
        }
        let running = Self { child, host, ca, client: builder.build().unwrap() };
        running.wait().await;
        Some(running)
    }

    async fn wait(&self) {
        for _ in 0..100 {
            if self.client.get(self.url("/v2/")).send().await.is_ok() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("the registry does not answer");
    }

    pub fn url(&self, path: &str) -> String {
        let scheme = if self.ca.is_some() { "https" } else { "http" };
        format!("{scheme}://{}{path}", self.host)
    }

    pub fn credentials(&self) -> Option<Credentials> {
        self.ca.is_some().then(|| Credentials { user: USER.into(), password: PASSWORD.into() })
    }

    pub fn ca(&self) -> Option<String> {
        self.ca.clone()
    }

    pub fn registry(&self, name: &str) -> Registry {
        Registry {
            url: format!("docker://{}/{name}", self.host),
            credentials: self.credentials(),
            ca: self.ca(),
            insecure: self.ca.is_none(),
            ..Registry::default()
        }
    }

    /// From now on it is only reached by a way that breaks once, after so many bytes.
    /// Also returns what is left of these.
    pub async fn cut_once_after(&mut self, bytes: usize) -> (JoinHandle<()>, Arc<AtomicUsize>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let far = std::mem::replace(&mut self.host, listener.local_addr().unwrap().to_string());
        let left = Arc::new(AtomicUsize::new(bytes));
        let own = left.clone();
        let task = tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let far = TcpStream::connect(&far).await.unwrap();
                // Either side may go at any time.
                tokio::spawn(pass(near, far, own.clone()));
            }
        });
        (task, left)
    }

    pub async fn push(&self, name: &str, tag: &str, image: &Image) {
        let (manifest, blobs) = image.blobs.split_last().unwrap();
        for blob in blobs {
            let begin = self.client.post(self.url(&format!("/v2/{name}/blobs/uploads/")));
            let begun = self.send(begin).await;
            let mut place = begun.headers()["location"].to_str().unwrap().to_owned();
            if place.starts_with('/') {
                place = self.url(&place);
            }
            place.push_str(if place.contains('?') { "&digest=" } else { "?digest=" });
            self.send(self.client.put(place + &digest(blob)).body(blob.clone())).await;
        }
        self.put(name, tag, MANIFEST, manifest.clone()).await;
    }

    pub async fn push_index(&self, name: &str, tag: &str, images: &[(&str, &Image)]) {
        for (architecture, image) in images {
            self.push(name, architecture, image).await;
        }
        let entries = images.iter().map(|(it, image)| image.entry(it)).collect::<Vec<_>>();
        let index = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": entries });
        self.put(name, tag, INDEX, index.to_string().into_bytes()).await;
    }

    async fn put(&self, name: &str, tag: &str, kind: &str, manifest: Vec<u8>) {
        let put = self.client.put(self.url(&format!("/v2/{name}/manifests/{tag}")));
        self.send(put.header("Content-Type", kind).body(manifest)).await;
    }

    async fn send(&self, request: reqwest::RequestBuilder) -> reqwest::Response {
        let request = match self.credentials() {
            Some(it) => request.basic_auth(it.user, Some(it.password)),
            None => request,
        };
        request.send().await.unwrap().error_for_status().unwrap()
    }
}

/// Passes bytes on, until what is left of them has come from afar.
async fn pass(near: TcpStream, far: TcpStream, left: Arc<AtomicUsize>) -> std::io::Result<()> {
    let (mut near_read, mut near_write) = near.into_split();
    let (mut far_read, mut far_write) = far.into_split();
    let up = tokio::spawn(async move { tokio::io::copy(&mut near_read, &mut far_write).await });
    let mut piece = vec![0; 64 << 10];
    loop {
        let count = far_read.read(&mut piece).await?;
        let before = left.load(Ordering::Relaxed);
        // Once it broke, it does not break again.
        let passed = if before == 0 { count } else { count.min(before) };
        left.store(before - passed.min(before), Ordering::Relaxed);
        near_write.write_all(&piece[..passed]).await?;
        if count == 0 || before > 0 && before == passed {
            up.abort();
            return near_write.shutdown().await;
        }
    }
}

/// Makes a certificate and who signed it, and the file with the password.
fn certify(folder: &Path) -> String {
    let ca_key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let ca = params.self_signed(&ca_key).unwrap();
    let issuer = rcgen::Issuer::new(params, ca_key);
    let key = rcgen::KeyPair::generate().unwrap();
    let params = rcgen::CertificateParams::new(["127.0.0.1".to_owned()]).unwrap();
    let cert = params.signed_by(&key, &issuer).unwrap();
    std::fs::write(folder.join("cert"), cert.pem()).unwrap();
    std::fs::write(folder.join("key"), key.serialize_pem()).unwrap();
    std::fs::write(folder.join("htpasswd"), format!("{USER}:{HASH}\n")).unwrap();
    ca.pem()
}

/// The bcrypt hash of the password.
const HASH: &str = "$2y$05$abcdefghijklmnopqrstuupx2xBUC4954936wVIjyyPHmUBFu0wCW";
