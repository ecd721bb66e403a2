//! What runs VMs in an embedded cluster: the kinds, the settings, controllers, and a handler for
//! each node, each under its own identity.

use super::guests::Handlers;
use super::kvm;
use super::nodes::{client, own_program};
use crate::rights;
use anyhow::{Context, Result, anyhow};
use apiserver::embedded::Server;
use channel::identity::{Ca, Role, SpiffeId, Trust};
use http::Method;
use kube::Client;
use node::agent::volumes::HostPaths;
use serde_json::{Value, json};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;

/// The controllers' account.
const CONTROLLER: &str = "system:serviceaccount:kubevirt:godwit-controller";
/// The group of all handlers.
const HANDLERS: &str = "system:godwit:handlers";
/// Handlers' and the API role's certificates.
const VALIDITY: Duration = Duration::from_secs(365 * 24 * 3600);
/// New kinds are served within this time.
const ESTABLISHED: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(10);

/// Where pods' folders of a node are on the machine.
pub fn host_paths(node: &Path) -> HostPaths {
    HostPaths(vec![(PathBuf::from("/var/run/godwit"), handler_folder(node).join("pods"))])
}

fn handler_folder(node: &Path) -> PathBuf {
    node.join("handler")
}

/// What all of them share.
pub struct Vms {
    ca: Ca,
    trust: Trust,
}

impl Vms {
    /// Makes the kinds, the roles, the CA and the settings.
    ///
    /// # Errors
    /// When the API refuses.
    pub async fn prepare(server: &Server, folder: &Path) -> Result<Self> {
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
        for role in [rights::controller(), rights::handler()].into_iter().chain(webapi::roles()) {
            replace(&api, roles, &role).await.map_err(failed).context("cannot make the roles")?;
        }
        let bindings = "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings";
        let own = [
            rights::bind(rights::CONTROLLER, rights::account(rights::CONTROLLER)),
            rights::bind(rights::HANDLER, rights::group(HANDLERS)),
        ];
        for binding in own.into_iter().chain(webapi::bindings()) {
            replace(&api, bindings, &binding)
                .await
                .map_err(failed)
                .context("cannot make the roles")?;
        }
        let place = folder.join("ca");
        let name = folder.file_name().and_then(|n| n.to_str()).unwrap_or("local");
        let ca = crate::host::authority(&place, name)?;
        let mut trust = Trust::new();
        trust.add_pem(ca.certificate_pem())?;
        let id = SpiffeId::new(ca.cluster(), Role::Api, "api")?;
        let own = account(server);
        let handlers = Handlers::new(own.clone(), ca.issue(&id, VALIDITY)?, trust.clone());
        server.api.extend(Arc::new(webapi::WebApi::new(own, Arc::new(handlers))));
        tokio::spawn(async move {
            if let Err(failure) = settings(&api).await {
                tracing::error!("the cluster's settings cannot be made: {failure}");
            }
        });
        Ok(Self { ca, trust })
    }

    /// Starts the controllers.
    pub fn start_controllers(&self, server: &Server, tasks: &mut JoinSet<()>) {
        tasks.spawn(controllers::run(account(server)));
    }

    /// Starts the handler of a node.
    ///
    /// # Errors
    /// When it can have no identity.
    pub fn start_handler(
        &self,
        server: &Server,
        node: &str,
        folder: &Path,
        tasks: &mut JoinSet<()>,
    ) -> Result<()> {
        let id = SpiffeId::new(self.ca.cluster(), Role::Handler, node)?;
        let config = handler::cluster::Config {
            node: node.to_owned(),
            folder: handler_folder(folder),
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            identity: self.ca.issue(&id, VALIDITY)?,
            trust: self.trust.clone(),
            confine: vec![own_program()?.into(), "confine".into(), "--".into()],
        };
        let client = client(server, &format!("system:godwit:handler:{node}"), &[HANDLERS]);
        let node = node.to_owned();
        tasks.spawn(async move {
            if let Err(error) = handler::cluster::run(client, config).await {
                tracing::error!(node, "its handler has ended: {}", launcher::chain(&error));
            }
        });
        Ok(())
    }
}

fn account(server: &Server) -> Client {
    let groups = ["system:serviceaccounts", "system:serviceaccounts:kubevirt"];
    client(server, CONTROLLER, &groups)
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

/// The cluster's settings, unless it has some.
async fn settings(api: &Api) -> Result<(), Failure> {
    let path = "/apis/kubevirt.io/v1/namespaces/kubevirt/kubevirts";
    let found = api.send(Method::GET, path, "application/json", None).await?;
    if found["items"].as_array().is_some_and(|items| !items.is_empty()) {
        return Ok(());
    }
    let emulated = !kvm::works().await;
    if emulated {
        tracing::info!("guests do not boot on KVM here: QEMU emulates their processors");
    }
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
