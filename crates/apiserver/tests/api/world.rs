//! A server of its own in a folder of its own; or a part of its own of any other Kubernetes.
//!
//! With `GODWIT_CONFORMANCE` naming a kubeconfig the same tests run against that cluster, as its
//! administrator. A test then has a namespace of its own for `default`, and a group of its own for
//! `example.com`, so that tests do not meet: names are translated on the way to the server and back.

use apiserver::auth::{MASTERS, User};
use apiserver::embedded::{Config, Server};
use apiserver::local::{Local, failure_of};
use apiserver::status::Failure;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::{Method, Request};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

/// What housekeeping does is done within this time.
pub const SOON: Duration = Duration::from_secs(20);
const FOREIGN: &str = "GODWIT_CONFORMANCE";
const GROUP: &str = "example.com";

pub struct World {
    /// None where the tests run against another's.
    server: Option<Server>,
    /// Of Kubernetes 1.
    pub minor: u32,
    pub admin: Account,
    pub folder: tempfile::TempDir,
    /// What stands in for `default`.
    pub name: String,
}

/// The API as a user.
#[derive(Clone)]
pub enum Account {
    Own(Local),
    Foreign { client: kube::Client, user: Option<(String, Vec<String>)>, name: String },
}

impl Account {
    pub async fn send(
        &self,
        method: Method,
        path: &str,
        media: &'static str,
        body: Option<&Value>,
    ) -> Result<Value, Failure> {
        let (client, user, name) = match self {
            Self::Own(local) => return local.send(method, path, media, body).await,
            Self::Foreign { client, user, name } => (client, user, name),
        };
        let group = format!("{name}.{GROUP}");
        let path = path
            .replace("/namespaces/default/", &format!("/namespaces/{name}/"))
            .replace(GROUP, &group);
        let body = body.map(|body| {
            body.to_string()
                .replace(GROUP, &group)
                .replace("\"namespace\":\"default\"", &format!("\"namespace\":\"{name}\""))
        });
        let mut request = Request::builder().method(method).uri(path).header("Content-Type", media);
        if let Some((user, groups)) = user {
            request = request.header("Impersonate-User", user);
            for group in groups {
                request = request.header("Impersonate-Group", group);
            }
        }
        let request = request.body(kube::client::Body::from(body.unwrap_or_default().into_bytes()));
        let answer = client.send(request.unwrap()).await.unwrap();
        let code = answer.status();
        let bytes = answer.into_body().collect().await.unwrap().to_bytes();
        let text = String::from_utf8(bytes.into()).unwrap();
        let text = text.replace(&group, GROUP).replace(name.as_str(), "default");
        let value: Value = serde_json::from_str(&text).unwrap_or_default();
        if code.is_success() { Ok(value) } else { Err(failure_of(code.as_u16(), &value)) }
    }

    pub async fn merge(&self, path: &str, patch: &Value) -> Result<Value, Failure> {
        self.send(Method::PATCH, path, "application/merge-patch+json", Some(patch)).await
    }
}

impl World {
    pub async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        match std::env::var_os(FOREIGN) {
            Some(file) => foreign(folder, PathBuf::from(file)).await,
            None => {
                let world = own(folder).await;
                // Pods need it, and it comes a moment later.
                let account = "/api/v1/namespaces/default/serviceaccounts/default";
                world.until(account, |_| true).await;
                world
            }
        }
    }

    /// Before 1.24 an account is ready once it has a token of its own.
    fn takes_pods(&self, account: &Value) -> bool {
        self.minor >= 24 || account["secrets"].is_array()
    }

    /// Ends the server and starts it again over the same folder; None where it is not ours.
    pub async fn restart(self) -> Option<Self> {
        let Self { server, folder, admin, .. } = self;
        drop(admin);
        server?.stop().await;
        Some(own(folder).await)
    }

    pub fn user(&self, name: &str, groups: &[&str]) -> Account {
        match (&self.server, &self.admin) {
            (Some(server), _) => Account::Own(server.api.as_user(User::new(name, groups))),
            (None, Account::Foreign { client, name: own, .. }) => {
                let groups = groups.iter().map(ToString::to_string).collect();
                let user = Some((name.to_owned(), groups));
                Account::Foreign { client: client.clone(), user, name: own.clone() }
            }
            (None, Account::Own(_)) => unreachable!("what is not ours is foreign"),
        }
    }

    /// The name of something that is in no namespace: another's tests may have one too.
    pub fn unique(&self, name: &str) -> String {
        match self.server {
            Some(_) => name.to_owned(),
            None => format!("{}-{name}", self.name),
        }
    }

    /// Whether the server is at least of this version; else it is said that a test is left out.
    pub fn has(&self, minor: u32, what: &str) -> bool {
        if self.minor < minor {
            eprintln!("NOT RUN: 1.{} has no {what}, 1.{minor} has", self.minor);
        }
        self.minor >= minor
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

    /// What holds at once on our server, and a moment later on others, whose parts learn of
    /// changes by watches.
    pub async fn soon(&self, holds: impl AsyncFn() -> bool) {
        let until = Instant::now() + SOON;
        while !holds().await {
            assert!(self.server.is_none() && Instant::now() < until, "it is not as awaited");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Makes a CRD, and waits until its objects are served.
    pub async fn serve(&self, crd: Value) {
        let path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
        let crd = self.create(path, crd).await.unwrap();
        let (spec, until) = (&crd["spec"], Instant::now() + SOON);
        for version in spec["versions"].as_array().unwrap() {
            let text = |value: &Value| value.as_str().unwrap().to_owned();
            let (group, version) = (text(&spec["group"]), text(&version["name"]));
            let path = format!("/apis/{group}/{version}/{}", text(&spec["names"]["plural"]));
            while let Err(failure) = self.get(&path).await {
                // Ours are served when the creation is acknowledged.
                assert!(self.server.is_none() && Instant::now() < until, "{failure}");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }

    pub async fn namespace(&self, name: &str) -> String {
        let name = self.unique(name);
        let namespace =
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
        self.create("/api/v1/namespaces", namespace).await.unwrap();
        let path = format!("/api/v1/namespaces/{name}");
        self.until(&format!("{path}/serviceaccounts/default"), |account| self.takes_pods(account))
            .await;
        path
    }

    /// The administrator's kubeconfig.
    pub fn kubeconfig(&self) -> PathBuf {
        let mut config = match &self.server {
            Some(server) => of(server),
            None => {
                let file = std::env::var_os(FOREIGN).unwrap();
                let config = kube::config::Kubeconfig::read_from(file).unwrap();
                serde_json::to_value(config).unwrap()
            }
        };
        for context in config["contexts"].as_array_mut().unwrap() {
            context["context"]["namespace"] = self.name.as_str().into();
        }
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

fn of(server: &Server) -> Value {
    let admin = server.administrator().unwrap();
    json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "it",
        "clusters": [{"name": "it", "cluster": {
            "server": format!("https://{}", server.address),
            "certificate-authority-data": STANDARD.encode(server.pki.authority()),
        }}],
        "users": [{"name": "it", "user": {
            "client-certificate-data": STANDARD.encode(admin.certificate),
            "client-key-data": STANDARD.encode(admin.key),
        }}],
        "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}],
    })
}

async fn own(folder: tempfile::TempDir) -> World {
    let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let config = Config { folder: folder.path().into(), listen, logs: None };
    let server = Server::start(config).await.unwrap();
    let admin = Account::Own(server.api.as_user(User::new("admin", &[MASTERS])));
    World { server: Some(server), minor: 33, admin, folder, name: "default".into() }
}

async fn foreign(folder: tempfile::TempDir, file: PathBuf) -> World {
    let config = kube::config::Kubeconfig::read_from(file).unwrap();
    let config = kube::Config::from_custom_kubeconfig(config, &Default::default()).await.unwrap();
    let client = kube::Client::try_from(config).unwrap();
    let version = client.apiserver_version().await.unwrap();
    let minor = version.minor.trim_end_matches('+').parse().unwrap();
    // Whoever runs the tests removes what begins with this.
    let run = std::env::var("GODWIT_CONFORMANCE_RUN").unwrap_or("conformance".into());
    let name = format!("{run}-{:x}", fastrand::u32(..));
    let admin = Account::Foreign { client, user: None, name: name.clone() };
    let world = World { server: None, minor, admin, folder, name: name.clone() };
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
    // A server of custom resources alone has none, and serves any.
    if world.get("/api/v1").await.is_ok() {
        world.create("/api/v1/namespaces", namespace).await.unwrap();
        let account = "/api/v1/namespaces/default/serviceaccounts/default";
        world.until(account, |account| world.takes_pods(account)).await;
    }
    world
}

/// kubectl, with nothing of the user's. None where there is none that is new enough.
pub fn kubectl(world: &World) -> Option<Kubectl> {
    let kubeconfig = world.kubeconfig();
    let own = Kubectl { kubeconfig, home: world.folder.path().to_owned() };
    let version = Command::new("kubectl").args(["version", "--client", "-o", "json"]).output().ok();
    let version: Value = serde_json::from_slice(&version?.stdout).ok()?;
    let minor: u32 =
        version["clientVersion"]["minor"].as_str()?.trim_end_matches('+').parse().ok()?;
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
        // Groups that come and go in other tests are none of this one's.
        let said = String::from_utf8_lossy(&said);
        let said = said.split_inclusive('\n').filter(|line| !line.contains("memcache.go"));
        (output.status.success(), said.collect())
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
