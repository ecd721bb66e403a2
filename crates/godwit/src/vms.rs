//! `godwit vm`: virtual machines of a cluster, as kubectl sees them, with less typing.

mod console;
mod create;
mod show;

use crate::cli::{Console, VmAct, VmCommand};
use anyhow::{Context, Result, bail};
use api::vm::VirtualMachine;
use kube::api::DeleteParams;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// A VM is gone within this time, besides its guest's own.
const GONE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(200);

/// A way to a cluster, and a namespace of it.
pub struct Cluster {
    /// The way.
    pub client: Client,
    /// The namespace.
    pub namespace: String,
}

impl Cluster {
    /// The cluster that a person means: a kubeconfig that was named, the one that kubectl would
    /// take, or the embedded cluster of this user.
    ///
    /// # Errors
    /// When there is none.
    pub async fn open(place: &crate::cli::Place) -> Result<Self> {
        let named =
            place.kubeconfig.clone().or_else(|| std::env::var_os("KUBECONFIG").map(PathBuf::from));
        let home = std::env::var_os("HOME").map(PathBuf::from);
        let usual = home.map(|home| home.join(".kube/config")).filter(|path| path.exists());
        let path = match named.or(usual) {
            Some(path) => path,
            None => crate::cluster::own_kubeconfig()?,
        };
        let kubeconfig = Kubeconfig::read_from(&path).with_context(|| {
            format!("cannot read {}; run `godwit up`, or name a kubeconfig", path.display())
        })?;
        let options =
            KubeConfigOptions { context: place.context.clone(), ..KubeConfigOptions::default() };
        let mut config = Config::from_custom_kubeconfig(kubeconfig, &options).await?;
        // A person is told at once.
        config.default_retry = false;
        let namespace = place.namespace.clone().unwrap_or(config.default_namespace.clone());
        Ok(Self { client: Client::try_from(config)?, namespace })
    }

    fn vms(&self) -> Api<VirtualMachine> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// Does something to a VM or its guest: a subresource.
    async fn act(&self, resource: &str, name: &str, what: &str, body: &Value) -> Result<()> {
        let path = format!(
            "/apis/subresources.kubevirt.io/v1/namespaces/{}/{resource}/{name}/{what}",
            self.namespace
        );
        let request = http::Request::put(path)
            .header("Content-Type", "application/json")
            .body(serde_json::to_vec(body)?)?;
        self.client.request_text(request).await.map_err(plain)?;
        Ok(())
    }
}

/// What the API said, and nothing else.
pub fn plain(error: kube::Error) -> anyhow::Error {
    match error {
        kube::Error::Api(status) => anyhow::anyhow!("{}", status.message),
        other => other.into(),
    }
}

/// Carries a command out.
///
/// # Errors
/// For a person.
pub async fn run(command: VmCommand) -> Result<ExitCode> {
    let VmCommand { place, act } = command;
    if let VmAct::Create(arguments) = &act
        && arguments.dry_run
    {
        let namespace = place.namespace.as_deref();
        print!("{}", create::text(&create::manifest(arguments, namespace)?, arguments.output)?);
        return Ok(ExitCode::SUCCESS);
    }
    let cluster = Cluster::open(&place).await?;
    match act {
        VmAct::Create(arguments) => {
            let manifest = create::manifest(&arguments, Some(&cluster.namespace))?;
            let vm: VirtualMachine = serde_json::from_value(manifest)?;
            cluster.vms().create(&Default::default(), &vm).await.map_err(plain)?;
            eprintln!("virtual machine {} is created", arguments.name);
        }
        VmAct::Start { name, paused } => {
            cluster.act("virtualmachines", &name, "start", &json!({"paused": paused})).await?;
            eprintln!("virtual machine {name} is to start");
        }
        VmAct::Stop { name, grace } => {
            let body = grace.map_or(json!({}), |grace| json!({"gracePeriod": grace}));
            cluster.act("virtualmachines", &name, "stop", &body).await?;
            eprintln!("virtual machine {name} is to stop");
        }
        VmAct::Restart { name } => {
            cluster.act("virtualmachines", &name, "restart", &json!({})).await?;
            eprintln!("virtual machine {name} is to restart");
        }
        VmAct::Pause { name } => {
            cluster.act("virtualmachineinstances", &name, "pause", &json!({})).await?;
            eprintln!("virtual machine {name} stands still");
        }
        VmAct::Unpause { name } => {
            cluster.act("virtualmachineinstances", &name, "unpause", &json!({})).await?;
            eprintln!("virtual machine {name} goes on");
        }
        VmAct::Console { name } => console::run(&cluster, &name).await?,
        VmAct::List { all_namespaces, output } => {
            show::list(&cluster, all_namespaces, output).await?
        }
        VmAct::Describe { name } => show::describe(&cluster, &name).await?,
        VmAct::Delete { name, no_wait } => delete(&cluster, &name, no_wait).await?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Connects this terminal to a VM's console: on its host, or through its cluster.
///
/// # Errors
/// When it cannot be had.
pub async fn console_of(arguments: Console) -> Result<ExitCode> {
    let Console { vm, host, place, serial } = arguments;
    match host {
        Some(host) => crate::host::console(&host, &vm, &serial).await,
        None => {
            console::run(&Cluster::open(&place).await?, &vm).await?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

async fn delete(cluster: &Cluster, name: &str, no_wait: bool) -> Result<()> {
    let vms = cluster.vms();
    let vm = vms.get(name).await.map_err(plain)?;
    vms.delete(name, &DeleteParams::default()).await.map_err(plain)?;
    let spec = api::support::parse::<api::vmi::Spec>(&vm.spec.template.spec);
    let grace = spec.map(|(spec, _)| spec.grace()).unwrap_or_default();
    let until = Instant::now() + GONE + Duration::from_secs(grace);
    while !no_wait && vms.get_opt(name).await.map_err(plain)?.is_some() {
        if Instant::now() > until {
            bail!("virtual machine {name} is not gone yet; see `godwit vm describe {name}`");
        }
        tokio::time::sleep(POLL).await;
    }
    eprintln!("virtual machine {name} is deleted");
    Ok(())
}
