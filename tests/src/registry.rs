//! A registry of Debian's (`docker-registry`), with images made of files.

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// It answers within this time.
const SOON: Duration = Duration::from_secs(20);

/// A registry; it ends with the test.
pub struct Registry {
    process: Child,
    /// Where it listens.
    pub address: SocketAddr,
    folder: tempfile::TempDir,
}

impl Registry {
    /// Starts one on a free port.
    ///
    /// # Errors
    /// When it is not installed, or does not answer.
    pub fn start() -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("godwit-registry-").tempdir()?;
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let config = folder.path().join("config.yml");
        std::fs::write(
            &config,
            format!(
                "version: 0.1\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: \"{address}\"}}\n",
                folder.path().join("data").display()
            ),
        )?;
        let log = std::fs::File::create(folder.path().join("log"))?;
        let process = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("docker-registry cannot be run: run `make setup`")?;
        let registry = Self { process, address, folder };
        let until = Instant::now() + SOON;
        while TcpStream::connect(address).is_err() {
            if Instant::now() > until {
                let log = std::fs::read_to_string(registry.folder.path().join("log"));
                bail!("docker-registry does not listen: {}", log.unwrap_or_default());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(registry)
    }

    /// Pushes an image with one file, uncompressed. Returns how it is named.
    ///
    /// # Errors
    /// When the registry refuses.
    pub fn push(&self, name: &str, place: &str, file: &Path) -> Result<String> {
        let layer = tar(place, file)?;
        let digest = |bytes: &[u8]| {
            let hex: String = Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect();
            format!("sha256:{hex}")
        };
        let layer_digest = digest(&layer);
        let config = serde_json::json!({
            "architecture": "amd64", "os": "linux", "config": {},
            "rootfs": {"type": "layers", "diff_ids": [layer_digest]},
        })
        .to_string();
        for blob in [&layer[..], config.as_bytes()] {
            let begun = self.send("POST", &format!("/v2/{name}/blobs/uploads/"), "", &[])?;
            let place = begun
                .lines()
                .find_map(|line| {
                    let (key, value) = line.split_once(": ")?;
                    key.eq_ignore_ascii_case("location").then(|| value.trim().to_owned())
                })
                .context("an upload has no place")?;
            let (_, path) = place.split_once("/v2/").context("a place of an upload")?;
            let joint = if path.contains('?') { '&' } else { '?' };
            let path = format!("/v2/{path}{joint}digest={}", digest(blob));
            self.send("PUT", &path, "application/octet-stream", blob)?;
        }
        let media = "application/vnd.oci.image.manifest.v1+json";
        let manifest = serde_json::json!({
            "schemaVersion": 2, "mediaType": media,
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": digest(config.as_bytes()), "size": config.len(),
            },
            "layers": [{
                "mediaType": "application/vnd.oci.image.layer.v1.tar",
                "digest": layer_digest, "size": layer.len(),
            }],
        });
        let path = format!("/v2/{name}/manifests/v1");
        self.send("PUT", &path, media, manifest.to_string().as_bytes())?;
        Ok(format!("{}/{name}:v1", self.address))
    }

    /// Sends a request; returns the head of the answer.
    fn send(&self, method: &str, path: &str, media: &str, body: &[u8]) -> Result<String> {
        let mut stream = TcpStream::connect(self.address)?;
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: {}\r\nContent-Type: {media}\r\nContent-Length: {}\r\n\
             Connection: close\r\n\r\n",
            self.address,
            body.len()
        )?;
        stream.write_all(body)?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        let answer = String::from_utf8_lossy(&answer).into_owned();
        let code = answer.split(' ').nth(1).unwrap_or_default();
        ensure!(code.starts_with('2'), "{method} {path}: {answer}");
        Ok(answer.split("\r\n\r\n").next().unwrap_or_default().to_owned())
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A layer with one file.
fn tar(place: &str, file: &Path) -> Result<Vec<u8>> {
    let folder = tempfile::tempdir()?;
    let target = folder.path().join(place);
    std::fs::create_dir_all(target.parent().context("a folder")?)?;
    std::fs::copy(file, &target)?;
    let output =
        Command::new("tar").arg("-cf").arg("-").arg("-C").arg(folder.path()).arg(place).output()?;
    ensure!(output.status.success(), "tar: {}", String::from_utf8_lossy(&output.stderr));
    Ok(output.stdout)
}
