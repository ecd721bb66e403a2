//! What can be said to roles.

use clap::Args;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

/// `godwit gateway`
#[derive(Debug, Args)]
pub struct Gateway {
    /// The host's folder.
    #[arg(long)]
    pub host: PathBuf,
    /// The address to listen on, and on no other. Port 0 takes a free one.
    #[arg(long)]
    pub listen: SocketAddr,
    /// What other hosts dial, if that is another address (`host:port`).
    #[arg(long)]
    pub advertise: Option<String>,
}

/// `godwit launcher`
#[derive(Debug, Args)]
pub struct Launcher {
    /// The host's folder.
    #[arg(long)]
    pub host: PathBuf,
    /// The VM's spec (YAML or JSON): start it.
    #[arg(long, conflicts_with = "vm", required_unless_present = "vm")]
    pub spec: Option<PathBuf>,
    /// The VM's name: wait for it to move in.
    #[arg(long)]
    pub vm: Option<String>,
    /// Start it though its disks are marked, or its owner record says that it left.
    #[arg(long)]
    pub force: bool,
    /// Seconds that the guest may take to shut down when the launcher ends.
    #[arg(long, default_value_t = 10)]
    pub grace: u64,
    /// Let tests stop moves at failpoints.
    #[arg(long, hide = true)]
    pub failpoints: bool,
    /// Put a fault into moves that arrive: the checks must find it.
    #[arg(long, hide = true)]
    pub inject: Option<launcher::migration::Fault>,
}

/// `godwit controller`
#[derive(Debug, Args)]
pub struct Controller {
    /// The kubeconfig; default: the service account of the pod that this is run in.
    #[arg(long)]
    pub kubeconfig: Option<PathBuf>,
    /// Its name among replicas, of which one does the work; default: a new one.
    #[arg(long)]
    pub name: Option<String>,
    /// The certificates of the cluster's CAs, where the controllers are to tell everybody whom to
    /// believe: these, and linked clusters'.
    #[arg(long)]
    pub ca: Option<PathBuf>,
    /// The image with this program, of which the pods are that it makes.
    #[arg(long, default_value = controllers::IMAGE)]
    pub image: String,
}

/// `godwit synchronizer`
#[derive(Debug, Args)]
pub struct Synchronizer {
    /// The address to listen on; the port is the settings' `synchronizationPort`, or 9185.
    #[arg(long, default_value = "0.0.0.0")]
    pub listen: IpAddr,
    /// A network for migrations, and the address in it or the interface that has one: it listens there
    /// when the settings name that network.
    #[arg(long, value_name = "NAME=ADDRESS|INTERFACE")]
    pub migration_network: Vec<String>,
    /// Where other clusters find it, `host:port`; default: where it listens.
    #[arg(long)]
    pub advertise: Option<String>,
    /// The Service in its namespace that says where other clusters find it: at its load balancer, or at its
    /// own address.
    #[arg(long, conflicts_with = "advertise")]
    pub service: Option<String>,
    /// Where the port is written down that it has: then one that is taken is no reason not to listen.
    #[arg(long, hide = true)]
    pub remember: Option<PathBuf>,
    /// The folder of its credentials: tls.crt, tls.key and trust.pem. It takes new ones as they
    /// come.
    #[arg(long)]
    pub identity: PathBuf,
    /// The kubeconfig; default: the service account of the pod that this is run in.
    #[arg(long)]
    pub kubeconfig: Option<PathBuf>,
}

/// `godwit handler`
#[derive(Debug, Args)]
pub struct Handler {
    /// Its node.
    #[arg(long)]
    pub node: String,
    /// Its folder: disks of images, and a folder for each launcher's pod.
    #[arg(long)]
    pub folder: PathBuf,
    /// The address to listen on, and on no other. Port 0 takes a free one.
    #[arg(long)]
    pub listen: SocketAddr,
    /// A network for migrations, and the node's address in it or the interface that has one.
    #[arg(long, value_name = "NAME=ADDRESS|INTERFACE")]
    pub migration_network: Vec<String>,
    /// The folder in which the node's kubelet takes offers of devices: it is offered /dev/kvm there.
    #[arg(long, value_name = "FOLDER")]
    pub device_plugins: Option<PathBuf>,
    /// The folder of its credentials: tls.crt, tls.key and trust.pem. It takes new ones as they
    /// come.
    #[arg(long)]
    pub identity: PathBuf,
    /// The kubeconfig; default: the service account of the pod that this is run in.
    #[arg(long)]
    pub kubeconfig: Option<PathBuf>,
}
