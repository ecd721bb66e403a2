//! A server of its own in a folder of its own.

use apiserver::auth::{MASTERS, User};
use apiserver::embedded::{Config, Server};
use apiserver::local::Local;
use apiserver::status::Failure;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::Method;
use serde_json::{Value, json};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

/// What housekeeping does is done within this time.
pub const SOON: Duration = Duration::from_secs(20);

pub struct World {
    pub server: Server,
    pub admin: Local,
    pub folder: tempfile::TempDir,
}

impl World {
    pub async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let server = start(&folder).await;
        let admin = server.api.as_user(User::new("admin", &[MASTERS]));
        let world = Self { server, admin, folder };
        // Pods need it, and it comes a moment later.
        world.until("/api/v1/namespaces/default/serviceaccounts/default", |_| true).await;
        world
    }

    /// Ends the server and starts it again over the same folder.
    pub async fn restart(self) -> Self {
        let Self { server, folder, admin } = self;
        drop(admin);
        server.stop().await;
        let server = start(&folder).await;
        let admin = server.api.as_user(User::new("admin", &[MASTERS]));
        Self { server, admin, folder }
    }

    pub fn user(&self, name: &str, groups: &[&str]) -> Local {
        self.server.api.as_user(User::new(name, groups))
    }

    pub async fn get(&self, path: &str) -> Result<Value, Failure> {
        self.admin.send(Method::GET, path, "application/json", None).await
    }

    pub async fn create(&self, path: &str, object: Value) -> Result<Value, Failure> {
        self.admin.send(Method::POST, path, "application/json", Some(&object)).await
    }

    pub async fn put(&self, path: &str, object: &Value) -> Result<Value, Failure> {
        self.admin.send(Method::PUT, path, "application/json", Some(object)).await
    }

    pub async fn delete(&self, path: &str, options: Value) -> Result<Value, Failure> {
        self.admin.send(Method::DELETE, path, "application/json", Some(&options)).await
    }

    pub async fn patch(
        &self,
        path: &str,
        media: &'static str,
        patch: Value,
    ) -> Result<Value, Failure> {
        self.admin.send(Method::PATCH, path, media, Some(&patch)).await
    }

    pub async fn apply(
        &self,
        path: &str,
        manager: &str,
        force: bool,
        object: Value,
    ) -> Result<Value, Failure> {
        let path = format!("{path}?fieldManager={manager}&force={force}");
        self.patch(&path, "application/apply-patch+yaml", object).await
    }

    /// Waits until an object is as `holds` says, and returns it.
    pub async fn until(&self, path: &str, holds: impl Fn(&Value) -> bool) -> Value {
        let until = Instant::now() + SOON;
        loop {
            let found = self.get(path).await;
            match found {
                Ok(object) if holds(&object) => return object,
                found => assert!(Instant::now() < until, "{path} is not as awaited: {found:?}"),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until an object is gone.
    pub async fn until_gone(&self, path: &str) {
        let until = Instant::now() + SOON;
        while self.get(path).await.is_ok() {
            assert!(Instant::now() < until, "{path} is still there");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub async fn namespace(&self, name: &str) -> String {
        let namespace =
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
        self.create("/api/v1/namespaces", namespace).await.unwrap();
        let path = format!("/api/v1/namespaces/{name}");
        self.until(&format!("{path}/serviceaccounts/default"), |_| true).await;
        path
    }

    /// The administrator's kubeconfig.
    pub fn kubeconfig(&self) -> PathBuf {
        let admin = self.server.administrator().unwrap();
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "it",
            "clusters": [{"name": "it", "cluster": {
                "server": format!("https://{}", self.server.address),
                "certificate-authority-data": STANDARD.encode(self.server.pki.authority()),
            }}],
            "users": [{"name": "it", "user": {
                "client-certificate-data": STANDARD.encode(admin.certificate),
                "client-key-data": STANDARD.encode(admin.key),
            }}],
            "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}],
        });
        let file = self.folder.path().join("kubeconfig");
        std::fs::write(&file, config.to_string()).unwrap();
        file
    }

    pub async fn client(&self) -> kube::Client {
        let config = kube::config::Kubeconfig::read_from(self.kubeconfig()).unwrap();
        let config =
            kube::Config::from_custom_kubeconfig(config, &Default::default()).await.unwrap();
        kube::Client::try_from(config).unwrap()
    }
}

async fn start(folder: &tempfile::TempDir) -> Server {
    let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    Server::start(Config { folder: folder.path().into(), listen, logs: None }).await.unwrap()
}

/// kubectl, with nothing of the user's. None where there is none that is new enough.
pub fn kubectl(world: &World) -> Option<Kubectl> {
    let kubeconfig = world.kubeconfig();
    let own = Kubectl { kubeconfig, home: world.folder.path().to_owned() };
    let version = Command::new("kubectl").args(["version", "--client", "-o", "json"]).output().ok();
    let version: Value = serde_json::from_slice(&version?.stdout).ok()?;
    let minor: u32 = version["clientVersion"]["minor"].as_str()?.parse().ok()?;
    (minor >= 27).then_some(own)
}

pub struct Kubectl {
    kubeconfig: PathBuf,
    home: PathBuf,
}

impl Kubectl {
    /// Whether it succeeded, and all that it said.
    pub fn run(&self, arguments: &[&str], input: &str) -> (bool, String) {
        use std::io::Write;
        let mut child = Command::new("kubectl")
            .arg("--kubeconfig")
            .arg(&self.kubeconfig)
            .args(arguments)
            .env("HOME", &self.home)
            .env_remove("KUBECONFIG")
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        // It may end without having read all of it.
        let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
        let output = child.wait_with_output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8_lossy(&said).into_owned())
    }

    /// What it said; it must succeed.
    pub fn ok(&self, arguments: &[&str]) -> String {
        let (success, said) = self.run(arguments, "");
        assert!(success, "kubectl {arguments:?}: {said}");
        said
    }

    /// What it said; it must fail.
    pub fn fails(&self, arguments: &[&str]) -> String {
        let (success, said) = self.run(arguments, "");
        assert!(!success, "kubectl {arguments:?} succeeded: {said}");
        said
    }
}

pub fn config_map(name: &str, data: Value) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data})
}

pub fn pod(name: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
        "spec": {"containers": [{"name": "c", "image": "a:1"}]},
    })
}
