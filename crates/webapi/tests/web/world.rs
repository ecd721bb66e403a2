//! A server with the CRDs, the roles, some users and guests that are none.

use apiserver::auth::{MASTERS, User};
use apiserver::embedded::{Config, Server};
use apiserver::extension::Later;
use apiserver::status::Failure;
use bytes::Bytes;
use http::{HeaderMap, Method, Request};
use http_body_util::{BodyExt, Full};
use kube::Client;
use serde_json::{Value, json};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::io::DuplexStream;
use webapi::{Act, Guests, Measured, Stream, WebApi};

pub const VMS: &str = "/apis/kubevirt.io/v1/namespaces/default/virtualmachines";
pub const VMIS: &str = "/apis/kubevirt.io/v1/namespaces/default/virtualmachineinstances";
pub const MOVES: &str = "/apis/kubevirt.io/v1/namespaces/default/virtualmachineinstancemigrations";
pub const VOLUMES: &str = "/apis/cdi.kubevirt.io/v1beta1/namespaces/default/datavolumes";
pub const OWNERS: &str = "/apis/godwit.dev/v1alpha1/namespaces/default/ownerrecords";
pub const SUB: &str = "/apis/subresources.kubevirt.io/v1/namespaces/default";
/// What follows from a change has followed by then.
const SOON: Duration = Duration::from_secs(20);

/// Guests that do nothing but remember; the tests' ends of their consoles.
#[derive(Default)]
pub struct Fake {
    pub acts: Mutex<Vec<(String, String, Act)>>,
    pub consoles: Mutex<Vec<DuplexStream>>,
}

impl Guests for Fake {
    fn act<'a>(&'a self, node: &'a str, _: &'a str, name: &'a str, what: Act) -> Later<'a, ()> {
        self.acts.lock().unwrap().push((node.into(), name.into(), what));
        Box::pin(async { Ok(()) })
    }

    fn console<'a>(&'a self, _: &'a str, _: &'a str, _: &'a str) -> Later<'a, Box<dyn Stream>> {
        let (ours, theirs) = tokio::io::duplex(64);
        self.consoles.lock().unwrap().push(ours);
        Box::pin(async { Ok::<Box<dyn Stream>, Failure>(Box::new(theirs)) })
    }

    fn forecast<'a>(&'a self, plan: webapi::Plan<'a>) -> Later<'a, Value> {
        let to = plan.node.to_owned();
        Box::pin(async move { Ok(json!({"to": to})) })
    }

    fn measure(&self) -> Later<'_, Measured> {
        Box::pin(async { Ok(Measured::default()) })
    }
}

pub struct World {
    pub server: Server,
    pub guests: Arc<Fake>,
    _folder: tempfile::TempDir,
}

/// What came back.
#[derive(Debug)]
pub struct Reply {
    pub code: u16,
    pub headers: HeaderMap,
    pub body: Value,
}

impl Reply {
    pub fn message(&self) -> &str {
        self.body["message"].as_str().unwrap_or_default()
    }

    pub fn warnings(&self) -> Vec<&str> {
        self.headers.get_all("Warning").iter().filter_map(|value| value.to_str().ok()).collect()
    }
}

/// A user who may do everything.
pub fn admin() -> User {
    User::new("admin", &[MASTERS])
}

/// A part of Godwit, with all rights.
pub fn own() -> User {
    User::new("system:serviceaccount:kubevirt:godwit-controller", &[MASTERS])
}

pub fn user(name: &str) -> User {
    User::new(name, &[])
}

impl World {
    pub async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let config = Config { folder: folder.path().into(), listen, logs: None };
        let server = Server::start(config).await.unwrap();
        let guests = Arc::new(Fake::default());
        let ours = User::new("system:serviceaccount:kubevirt:godwit-api", &[MASTERS]);
        let client = Client::new(server.api.as_user(ours), "default");
        server.api.extend(Arc::new(WebApi::new(client, guests.clone())));
        let world = Self { server, guests, _folder: folder };
        world.install().await;
        world
    }

    async fn install(&self) {
        let crds = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
        for crd in api::crds() {
            self.create(&admin(), crds, &crd).await;
            let name = crd["metadata"]["name"].as_str().unwrap();
            self.until(&format!("{crds}/{name}"), |crd| {
                let conditions = crd["status"]["conditions"].as_array();
                let established = |c: &Value| c["type"] == "Established" && c["status"] == "True";
                conditions.is_some_and(|all| all.iter().any(established))
            })
            .await;
        }
        let rbac = "/apis/rbac.authorization.k8s.io/v1";
        for role in webapi::roles() {
            self.create(&admin(), &format!("{rbac}/clusterroles"), &role).await;
        }
        for binding in webapi::bindings() {
            self.create(&admin(), &format!("{rbac}/clusterrolebindings"), &binding).await;
        }
        for (user, role) in [
            ("viewer", "view"),
            ("editor", "edit"),
            ("owner", "admin"),
            ("mover", "kubevirt.io:migrate"),
        ] {
            let binding = json!({
                "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding",
                "metadata": {"name": user},
                "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role},
                "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": user}],
            });
            let path = format!("{rbac}/namespaces/default/rolebindings");
            self.create(&admin(), &path, &binding).await;
        }
        // The roles of others become parts of Kubernetes' own a moment later.
        let until = Instant::now() + SOON;
        for (user, path) in [("viewer", VMS), ("editor", VOLUMES), ("owner", VOLUMES)] {
            while self.ask(&User::new(user, &[]), Method::GET, path, "", None).await.code != 200 {
                assert!(Instant::now() < until, "{user} has no rights");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }

    pub async fn ask(
        &self,
        user: &User,
        method: Method,
        path: &str,
        media: &str,
        body: Option<&Value>,
    ) -> Reply {
        let text = body.map(Value::to_string).unwrap_or_default();
        self.send(user, method, path, media, text).await
    }

    pub async fn send(
        &self,
        user: &User,
        method: Method,
        path: &str,
        media: &str,
        body: String,
    ) -> Reply {
        let request = Request::builder().method(method).uri(path).header("Content-Type", media);
        let request = request.body(Full::new(Bytes::from(body))).unwrap();
        let answer = self.server.api.answer(request, Some(Arc::new(user.clone()))).await;
        let (head, body) = answer.into_parts();
        let bytes = body.collect().await.unwrap().to_bytes();
        let body = serde_json::from_slice(&bytes).unwrap_or_default();
        Reply { code: head.status.as_u16(), headers: head.headers, body }
    }

    /// All groups, in a document of a media type.
    pub async fn discover(&self, media: &str) -> Value {
        let request = Request::get("/apis").header("Accept", media);
        let request = request.body(Full::new(Bytes::new())).unwrap();
        let answer = self.server.api.answer(request, Some(Arc::new(admin()))).await;
        let bytes = answer.into_body().collect().await.unwrap().to_bytes();
        serde_json::from_slice(&bytes).unwrap()
    }

    pub async fn post(&self, user: &User, path: &str, object: &Value) -> Reply {
        self.ask(user, Method::POST, path, "application/json", Some(object)).await
    }

    /// Creates an object; it must succeed.
    pub async fn create(&self, user: &User, path: &str, object: &Value) -> Value {
        let reply = self.post(user, path, object).await;
        assert_eq!(reply.code, 201, "{path}: {}", reply.body);
        reply.body
    }

    pub async fn merge(&self, user: &User, path: &str, patch: &Value) -> Reply {
        self.ask(user, Method::PATCH, path, "application/merge-patch+json", Some(patch)).await
    }

    pub async fn get(&self, path: &str) -> Value {
        self.ask(&admin(), Method::GET, path, "", None).await.body
    }

    pub async fn put(&self, user: &User, path: &str, body: &Value) -> Reply {
        self.ask(user, Method::PUT, path, "application/json", Some(body)).await
    }

    pub async fn until(&self, path: &str, holds: impl Fn(&Value) -> bool) -> Value {
        let until = Instant::now() + SOON;
        loop {
            let found = self.get(path).await;
            if holds(&found) {
                return found;
            }
            assert!(Instant::now() < until, "{path} is not as awaited: {found}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// A VMI that is in a phase on node `n1`.
    pub async fn instance(&self, name: &str, phase: &str) -> Value {
        let mut vmi = vmi();
        vmi["metadata"]["name"] = name.into();
        self.create(&own(), VMIS, &vmi).await;
        let path = format!("{VMIS}/{name}");
        let status = json!({"status": {"phase": phase, "nodeName": "n1"}});
        let reply = self.merge(&own(), &format!("{path}/status"), &status).await;
        assert_eq!(reply.code, 200, "{}", reply.body);
        reply.body
    }

    /// A VM with a run strategy.
    pub async fn machine(&self, name: &str, strategy: &str) -> Value {
        let mut vm = vm();
        vm["metadata"]["name"] = name.into();
        vm["spec"]["runStrategy"] = strategy.into();
        self.create(&user("editor"), VMS, &vm).await
    }
}

/// The spec of a VMI that nothing is wrong with.
fn spec() -> Value {
    json!({
        "domain": {
            "cpu": {"cores": 2, "sockets": 1, "threads": 1},
            "memory": {"guest": "512Mi"},
            "devices": {
                "disks": [
                    {"name": "root", "disk": {"bus": "virtio"}, "bootOrder": 1},
                    {"name": "seed", "cdrom": {"bus": "sata"}},
                ],
                "interfaces": [{"name": "default", "masquerade": {}}],
            },
        },
        "networks": [{"name": "default", "pod": {}}],
        "volumes": [
            {"name": "root", "dataVolume": {"name": "disk"}},
            {"name": "seed", "cloudInitNoCloud": {"userData": "#cloud-config\n"}},
        ],
    })
}

pub fn vm() -> Value {
    json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "metadata": {"name": "vm"},
        "spec": {
            "runStrategy": "Halted",
            "dataVolumeTemplates": [{"metadata": {"name": "disk"}, "spec": volume()["spec"]}],
            "template": {"metadata": {"labels": {"app": "web"}}, "spec": spec()},
        },
    })
}

pub fn vmi() -> Value {
    json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance",
        "metadata": {"name": "vm"}, "spec": spec(),
    })
}

pub fn volume() -> Value {
    json!({
        "apiVersion": "cdi.kubevirt.io/v1beta1", "kind": "DataVolume", "metadata": {"name": "disk"},
        "spec": {
            "source": {"blank": {}},
            "storage": {"resources": {"requests": {"storage": "2Gi"}}},
        },
    })
}

pub fn migration(name: &str, vmi: &str) -> Value {
    json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstanceMigration",
        "metadata": {"name": name}, "spec": {"vmiName": vmi},
    })
}
