//! Kubeconfigs: one for each cluster, and merged into another that there is.

use anyhow::{Context, Result, bail};
use apiserver::auth::pki::Credential;
use apiserver::embedded::Server;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

/// A kubeconfig is a few pages of text.
const MOST: u64 = 4 << 20;

/// How to reach a cluster as one of its users.
#[derive(Debug, Clone)]
pub struct Access<'a> {
    /// Name of the cluster, and of its context.
    pub cluster: &'a str,
    /// What the user is called here.
    pub user: &'a str,
    /// Such as `https://127.0.0.1:6443`.
    pub server: String,
    /// PEM, base64.
    pub authority: String,
    /// PEM, base64.
    pub certificate: String,
    /// PEM, base64.
    pub key: String,
}

impl<'a> Access<'a> {
    /// To a server, with a credential of its own.
    pub fn new(cluster: &'a str, user: &'a str, server: &Server, credential: &Credential) -> Self {
        Self {
            cluster,
            user,
            server: format!("https://{}", server.address),
            authority: STANDARD.encode(server.pki.authority()),
            certificate: STANDARD.encode(&credential.certificate),
            key: STANDARD.encode(&credential.key),
        }
    }

    fn context(&self) -> String {
        format!("godwit-{}", self.cluster)
    }

    /// The kubeconfig of this cluster alone.
    pub fn config(&self) -> Value {
        let (context, user) = (self.context(), format!("godwit-{}-{}", self.cluster, self.user));
        let cluster = json!({"server": self.server, "certificate-authority-data": self.authority});
        let credentials = json!({
            "client-certificate-data": self.certificate, "client-key-data": self.key,
        });
        json!({
            "apiVersion": "v1", "kind": "Config", "preferences": {},
            "clusters": [{"name": context, "cluster": cluster}],
            "users": [{"name": user, "user": credentials}],
            "contexts": [{"name": context, "context": {"cluster": context, "user": user}}],
            "current-context": context,
        })
    }
}

fn put(config: &mut Value, list: &str, name: &str, what: &str, value: Value) {
    let entry = json!({"name": name, what: value});
    match config[list].as_array_mut() {
        Some(all) => match all.iter_mut().find(|e| e["name"] == name) {
            Some(old) => *old = entry,
            None => all.push(entry),
        },
        None => config[list] = json!([entry]),
    }
}

/// Merges all entries of one kubeconfig into another, a file; makes one if there is none. The
/// current context changes only if there was none.
///
/// # Errors
/// When the file is no kubeconfig or cannot be written; then it is as it was.
pub fn merge(file: &Path, own: &Value) -> Result<()> {
    let Some(mut config) = read(file)? else { return write(file, own) };
    for (list, what) in [("clusters", "cluster"), ("users", "user"), ("contexts", "context")] {
        for entry in own[list].as_array().into_iter().flatten() {
            let name = entry["name"].as_str().unwrap_or_default();
            put(&mut config, list, name, what, entry[what].clone());
        }
    }
    if config["current-context"].as_str().is_none_or(str::is_empty) {
        config["current-context"] = own["current-context"].clone();
    }
    write(file, &config)
}

fn read(file: &Path) -> Result<Option<Value>> {
    let size = match std::fs::metadata(file) {
        Ok(meta) => meta.len(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", file.display())),
    };
    if size > MOST {
        bail!("{} is too large to be a kubeconfig", file.display());
    }
    let text =
        std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    if text.trim().is_empty() {
        return Ok(None);
    }
    let config: Value = serde_saphyr::from_str(&text)
        .with_context(|| format!("{} is no kubeconfig; nothing was changed", file.display()))?;
    let lists = ["clusters", "contexts", "users"];
    let odd = |list: &str| !config[list].is_null() && !config[list].is_array();
    if !config.is_object() || lists.iter().any(|list| odd(list)) {
        bail!("{} is no kubeconfig; nothing was changed", file.display());
    }
    Ok(Some(config))
}

/// Writes a kubeconfig that only its owner can read, whole or not at all.
///
/// # Errors
/// When it cannot be written.
pub fn write(file: &Path, config: &Value) -> Result<()> {
    let text = serde_saphyr::to_string(config).context("a kubeconfig cannot be written as YAML")?;
    // A link stays one: the file that it leads to is replaced.
    let file = std::fs::canonicalize(file).unwrap_or_else(|_| file.to_owned());
    let folder = file.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder)
        .with_context(|| format!("cannot make the folder {}", folder.display()))?;
    let draft = file.with_extension(format!("{}.new", std::process::id()));
    let written = (|| {
        let mut options = std::fs::OpenOptions::new();
        let mut out = options.write(true).create(true).truncate(true).mode(0o600).open(&draft)?;
        out.set_permissions(std::fs::Permissions::from_mode(0o600))?;
        out.write_all(text.as_bytes())?;
        out.sync_all()?;
        std::fs::rename(&draft, &file)
    })();
    if written.is_err() {
        // What could not be written whole is of no use.
        let _ = std::fs::remove_file(&draft);
    }
    written.with_context(|| format!("cannot write the kubeconfig {}", file.display()))
}
