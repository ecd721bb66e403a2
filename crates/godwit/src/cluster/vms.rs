//! What runs VMs in an embedded cluster: the kinds, the settings, controllers, and a handler for
//! each node, each under its own identity, in this process or in one of its own.

use super::certificates::Certificates;
use super::children::Children;
use super::guests::Handlers;
use super::kubeconfig::{self, Access};
use super::kvm;
use super::nodes::client;
use crate::cli::{self, Accelerator};
use crate::ground::Ground;
use crate::{rights, roles};
use anyhow::{Context, Result, anyhow};
use apiserver::embedded::Server;
use channel::identity::{Credentials, Role, SpiffeId};
use controllers::FOLDERS;
use controllers::certificates::Terms;
use http::Method;
use kube::Client;
use node::agent::volumes::HostPaths;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use synchronizer::Advertise;
use tokio::task::JoinSet;

/// Where the settings are.
pub(super) const SETTINGS: &str = "/apis/kubevirt.io/v1/namespaces/kubevirt/kubevirts";
/// The controllers' account.
const CONTROLLER: &str = "system:serviceaccount:kubevirt:godwit-controller";
/// The API role's.
const API: &str = "system:serviceaccount:kubevirt:godwit-api";
/// The synchronizer's.
const SYNCHRONIZER: &str = "system:serviceaccount:kubevirt:godwit-synchronizer";
/// The groups of that account.
const ACCOUNTS: [&str; 2] = ["system:serviceaccounts", "system:serviceaccounts:kubevirt"];
/// The group of all handlers.
const HANDLERS: &str = "system:godwit:handlers";
/// New kinds are served within this time.
const ESTABLISHED: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(10);
/// What could not be written is written again after this.
const AGAIN: Duration = Duration::from_millis(200);

/// Where pods' folders of a node are on the machine.
pub fn host_paths(node: &Path) -> HostPaths {
    HostPaths(vec![(PathBuf::from(FOLDERS), handler_folder(node).join("pods"))])
}

fn handler_folder(node: &Path) -> PathBuf {
    node.join("handler")
}

/// What all of them share.
pub struct Vms {
    cluster: String,
    certificates: Certificates,
    /// The way to guests.
    handlers: Arc<Handlers>,
    /// Of those that run as processes of their own.
    children: Option<Children>,
}

impl Vms {
    /// Makes the kinds, the roles, the CA and the settings.
    ///
    /// # Errors
    /// When the API refuses.
    pub async fn prepare(server: &Server, folder: &Path, arguments: &cli::Up) -> Result<Self> {
        let (separate, accelerator) = (arguments.separate, arguments.accelerator);
        // What is left of an earlier run is ended whether or not others take its place.
        let children = Children::open(folder).await?;
        let api = server
            .api
            .as_user(apiserver::auth::User::new("system:apiserver", &[apiserver::auth::MASTERS]));
        let failed = |failure: apiserver::status::Failure| anyhow!("{failure}");
        for crd in api::crds() {
            define(&api, &crd).await.map_err(failed).context("cannot define the kinds of VMs")?;
        }
        established(&api).await?;
        let namespace = json!({
            "apiVersion": "v1", "kind": "Namespace", "metadata": {"name": api::NAMESPACE},
        });
        api.ensure("/api/v1/namespaces", &namespace).await.map_err(failed)?;
        let roles = "/apis/rbac.authorization.k8s.io/v1/clusterroles";
        let own = [rights::controller(), rights::handler(), rights::api(), rights::synchronizer()];
        for role in own.into_iter().chain(webapi::roles()) {
            replace(&api, roles, &role).await.map_err(failed).context("cannot make the roles")?;
        }
        let bindings = "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings";
        let own = [
            rights::bind(rights::CONTROLLER, rights::account(rights::CONTROLLER)),
            rights::bind(rights::HANDLER, rights::group(HANDLERS)),
            rights::bind(rights::API, rights::account(rights::API)),
            rights::bind(rights::SYNCHRONIZER, rights::account(rights::SYNCHRONIZER)),
        ];
        for binding in own.into_iter().chain(webapi::bindings()) {
            replace(&api, bindings, &binding)
                .await
                .map_err(failed)
                .context("cannot make the roles")?;
        }
        let rights = "/apis/rbac.authorization.k8s.io/v1/namespaces/kubevirt";
        let own = [
            ("roles", rights::leads()),
            ("rolebindings", rights::bind_leads()),
            ("roles", rights::believes()),
            ("rolebindings", rights::bind_believes(rights::group(HANDLERS))),
        ];
        for (kind, object) in own {
            let path = format!("{rights}/{kind}");
            replace(&api, &path, &object).await.map_err(failed).context("cannot make the roles")?;
        }
        let cluster = folder.file_name().and_then(|n| n.to_str()).unwrap_or("local").to_owned();
        let mut certificates = Certificates::open(&folder.join("ca"), &cluster, terms(&api).await)?;
        let credentials = certificates.add(SpiffeId::new(&cluster, Role::Api, "api")?)?;
        let own = client(server, API, &ACCOUNTS);
        let handlers = Arc::new(Handlers { client: own.clone(), credentials });
        server.api.extend(Arc::new(webapi::WebApi::new(own, handlers.clone())));
        tokio::spawn(async move {
            if let Err(failure) = settings(&api, accelerator).await {
                tracing::error!("the cluster's settings cannot be made: {failure}");
            }
        });
        let children = separate.then_some(children);
        Ok(Self { cluster, certificates, handlers, children })
    }

    /// The way to guests.
    pub fn handlers(&self) -> Arc<Handlers> {
        self.handlers.clone()
    }

    /// Starts the controllers.
    ///
    /// # Errors
    /// When they can have no identity.
    pub fn start_controllers(&mut self, server: &Server, tasks: &mut JoinSet<()>) -> Result<()> {
        let Some(children) = &mut self.children else {
            let (client, name) = (account(server), self.cluster.clone());
            let never = std::future::pending();
            tasks.spawn(async move {
                roles::lead(client, &name, controllers::IMAGE, None, never).await
            });
            return Ok(());
        };
        let name = "controller";
        let place = children.place(name)?;
        let config = Login { cluster: &self.cluster, name, user: CONTROLLER, groups: &ACCOUNTS };
        let mut arguments: Vec<OsString> = vec![name.into(), "--kubeconfig".into()];
        arguments.push(config.write(server, &place)?.into());
        // N.B. there is one at a time: the next need not wait until the lease of the last is free.
        arguments.extend(["--name".into(), self.cluster.clone().into()]);
        children.start(name, arguments);
        Ok(())
    }

    /// Starts the handler of a node.
    ///
    /// # Errors
    /// When it can have no identity.
    pub fn start_handler(
        &mut self,
        server: &Server,
        node: &str,
        folder: &Path,
        networks: BTreeMap<String, String>,
        tasks: &mut JoinSet<()>,
    ) -> Result<()> {
        let credentials =
            self.certificates.add(SpiffeId::new(&self.cluster, Role::Handler, node)?)?;
        let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let (user, groups) = (format!("system:godwit:handler:{node}"), [HANDLERS]);
        if let Some(children) = &mut self.children {
            let name = format!("handler-{node}");
            let place = children.place(&name)?;
            let config =
                Login { cluster: &self.cluster, name: &name, user: &user, groups: &groups };
            let identity = place.join("identity");
            credentials.borrow().save(&identity)?;
            tasks.spawn(Credentials::keep(credentials, identity.clone(), AGAIN));
            let mut arguments: Vec<OsString> = vec!["handler".into(), "--node".into(), node.into()];
            arguments.extend(["--folder".into(), handler_folder(folder).into()]);
            arguments.extend(["--listen".into(), listen.to_string().into()]);
            arguments.extend(options(&networks));
            arguments.extend(["--identity".into(), identity.into()]);
            arguments.extend(["--kubeconfig".into(), config.write(server, &place)?.into()]);
            children.start(&name, arguments);
            return Ok(());
        }
        let config = handler::cluster::Config {
            node: node.to_owned(),
            folder: handler_folder(folder),
            listen,
            networks,
            credentials,
            // Its node's agent says itself what the node has.
            devices: None,
            confine: roles::confine()?,
        };
        let client = client(server, &user, &groups);
        let node = node.to_owned();
        tasks.spawn(async move {
            if let Err(error) = handler::cluster::run(client, config).await {
                tracing::error!(node, "its handler has ended: {}", launcher::chain(&error));
            }
        });
        Ok(())
    }

    /// Starts the synchronizer, which listens where the settings want one.
    ///
    /// # Errors
    /// When it can have no identity.
    pub fn start_synchronizer(
        &mut self,
        server: &Server,
        folder: &Path,
        networks: BTreeMap<String, IpAddr>,
        tasks: &mut JoinSet<()>,
    ) -> Result<()> {
        let id = SpiffeId::new(&self.cluster, synchronizer::ROLE, synchronizer::INSTANCE)?;
        let credentials = self.certificates.add(id)?;
        let remembered = folder.join("synchronizer.port");
        if let Some(children) = &mut self.children {
            let name = "synchronizer";
            let place = children.place(name)?;
            let config =
                Login { cluster: &self.cluster, name, user: SYNCHRONIZER, groups: &ACCOUNTS };
            let identity = place.join("identity");
            credentials.borrow().save(&identity)?;
            tasks.spawn(Credentials::keep(credentials, identity.clone(), AGAIN));
            let mut arguments: Vec<OsString> = vec![name.into(), "--identity".into()];
            arguments.push(identity.into());
            arguments.extend(["--listen".into(), Ipv4Addr::LOCALHOST.to_string().into()]);
            arguments.extend(["--remember".into(), remembered.into()]);
            arguments.extend(options(&networks));
            arguments.extend(["--kubeconfig".into(), config.write(server, &place)?.into()]);
            children.start(name, arguments);
            return Ok(());
        }
        let client = client(server, SYNCHRONIZER, &ACCOUNTS);
        let config = synchronizer::Config {
            address: Ipv4Addr::LOCALHOST.into(),
            networks,
            remembered: Some(remembered),
            advertise: Advertise::Here,
            ground: Arc::new(Ground::new(&client, &credentials)),
            credentials,
        };
        tasks.spawn(synchronizer::run(client, config));
        Ok(())
    }

    /// Keeps certificates fresh, once all parts are there; returns the processes.
    pub fn go_on(self, server: &Server, tasks: &mut JoinSet<()>) -> Option<Children> {
        tasks.spawn(self.certificates.run(account(server)));
        self.children
    }
}

/// Networks for migrations, as a role in a process of its own is told of them.
fn options<T: std::fmt::Display>(networks: &BTreeMap<String, T>) -> Vec<OsString> {
    let option = |(name, address): (&String, &T)| {
        ["--migration-network".into(), format!("{name}={address}").into()]
    };
    networks.iter().flat_map(option).collect()
}

/// How a role in a process of its own is known to the API.
struct Login<'a> {
    cluster: &'a str,
    name: &'a str,
    user: &'a str,
    groups: &'a [&'a str],
}

impl Login<'_> {
    /// Writes its kubeconfig.
    fn write(&self, server: &Server, place: &Path) -> Result<PathBuf> {
        let file = place.join("kubeconfig");
        let kept = format!("role-{}", self.name);
        let credential = server.pki.user(&kept, self.user, self.groups)?;
        let access = Access::new(self.cluster, self.name, server, &credential);
        kubeconfig::write(&file, &access.config())?;
        Ok(file)
    }
}

fn account(server: &Server) -> Client {
    client(server, CONTROLLER, &ACCOUNTS)
}

type Api = apiserver::local::Local;
type Failure = apiserver::status::Failure;

/// Makes an object what it should be.
async fn replace(api: &Api, path: &str, object: &Value) -> Result<(), Failure> {
    let name = object["metadata"]["name"].as_str().unwrap_or_default();
    match api.send(Method::POST, path, "application/json", Some(object)).await {
        Err(failure) if failure.reason == "AlreadyExists" => {
            api.merge(&format!("{path}/{name}"), object).await.map(|_| ())
        }
        other => other.map(|_| ()),
    }
}

async fn define(api: &Api, crd: &Value) -> Result<(), Failure> {
    let path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
    replace(api, path, crd).await
}

/// Waits until all kinds are served.
async fn established(api: &Api) -> Result<()> {
    let until = std::time::Instant::now() + ESTABLISHED;
    for crd in api::crds() {
        let spec = &crd["spec"];
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let (group, version) = (text(&spec["group"]), text(&spec["versions"][0]["name"]));
        let path = format!("/apis/{group}/{version}/{}", text(&spec["names"]["plural"]));
        while api.send(Method::GET, &path, "application/json", None).await.is_err() {
            if std::time::Instant::now() > until {
                anyhow::bail!("{path} is not served after {ESTABLISHED:?}");
            }
            tokio::time::sleep(POLL).await;
        }
    }
    Ok(())
}

/// How long certificates last, as the settings say that are there already.
async fn terms(api: &Api) -> Terms {
    let found = api.send(Method::GET, SETTINGS, "application/json", None).await;
    let found = found.unwrap_or_default();
    // Those that cannot be read are looked at again soon.
    let spec: api::kubevirt::Spec =
        serde_json::from_value(found["items"][0]["spec"].clone()).unwrap_or_default();
    Terms::of(&spec.certificate_rotate_strategy)
}

/// The cluster's settings, unless it has some.
async fn settings(api: &Api, accelerator: Option<Accelerator>) -> Result<(), Failure> {
    let path = SETTINGS;
    let found = api.send(Method::GET, path, "application/json", None).await?;
    if let Some(there) = found["items"].as_array().and_then(|items| items.first()) {
        let Some(accelerator) = accelerator else { return Ok(()) };
        let name = there["metadata"]["name"].as_str().unwrap_or_default();
        let emulated = json!({"useEmulation": accelerator == Accelerator::Tcg});
        let patch = json!({"spec": {"configuration": {"developerConfiguration": emulated}}});
        return api.merge(&format!("{path}/{name}"), &patch).await.map(|_| ());
    }
    let emulated = match accelerator {
        Some(accelerator) => accelerator == Accelerator::Tcg,
        None => !kvm::works().await,
    };
    let how = if emulated { "by QEMU's emulation" } else { "on KVM" };
    tracing::info!(
        "guests run {how}; the object KubeVirt kubevirt/kubevirt says so, and can be changed"
    );
    let settings = json!({
        "apiVersion": "kubevirt.io/v1", "kind": "KubeVirt", "metadata": {"name": "kubevirt"},
        "spec": {
            "configuration": {
                "developerConfiguration": {
                    "useEmulation": emulated,
                    // forklift looks for the name, though the gate is open anyway.
                    "featureGates": ["DecentralizedLiveMigration", "ExpandDisks"],
                },
                "vmRolloutStrategy": "LiveUpdate",
            },
            "workloadUpdateStrategy": {"workloadUpdateMethods": ["LiveMigrate"]},
        },
    });
    api.ensure(path, &settings).await
}
