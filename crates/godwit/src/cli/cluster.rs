//! `godwit cluster` and `godwit deploy`.

use super::Place;
use clap::{Args, Subcommand};
use std::path::PathBuf;

/// `godwit cluster`
#[derive(Debug, Args)]
pub struct ClusterCommand {
    /// What is done.
    #[command(subcommand)]
    pub act: ClusterAct,
}

/// What is done to clusters.
#[derive(Debug, Subcommand)]
pub enum ClusterAct {
    /// Have two clusters believe each other, from now on and through every change of their CAs.
    Link(Pair),
    /// Invite another cluster, where nobody holds both: prints a token for `godwit cluster join`, which is
    /// good once.
    Invite(Invite),
    /// Link this cluster to the one that has invited it.
    Join(Join),
    /// End that: neither believes the other any more.
    Unlink(Pair),
}

/// `godwit cluster invite`
#[derive(Debug, Args)]
pub struct Invite {
    /// Where.
    #[command(flatten)]
    pub place: Place,
    /// How long the token is good, in minutes.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..=10080))]
    pub minutes: u32,
}

/// `godwit cluster join`
#[derive(Debug, Args)]
pub struct Join {
    /// Where.
    #[command(flatten)]
    pub place: Place,
    /// What `godwit cluster invite` has printed; `-`: it is read from stdin.
    pub token: String,
}

/// Two clusters.
#[derive(Debug, Args)]
pub struct Pair {
    /// One: an embedded cluster, or a context of the kubeconfig.
    pub one: String,
    /// The other.
    pub other: String,
    /// The kubeconfig with both contexts; default: $KUBECONFIG, ~/.kube/config.
    #[arg(long)]
    pub kubeconfig: Option<PathBuf>,
    /// The folder of the embedded clusters' folders; default: in the user's data.
    #[arg(long)]
    pub dir: Option<PathBuf>,
}

/// `godwit deploy`
#[derive(Debug, Args)]
pub struct Deploy {
    /// The image with this program.
    #[arg(long)]
    pub image: String,
    /// Folder of the CA that vouches for Godwit's parts to each other; made if there is none.
    /// Without it, the CA is new, and known from the manifests alone.
    #[arg(long)]
    pub ca: Option<PathBuf>,
    /// The name of the cluster that a new CA is for.
    #[arg(long, default_value = "godwit")]
    pub cluster: String,
    /// A network for migrations, and the nodes' interface in it: `moves=eth1`. The KubeVirt object's
    /// `configuration.migrations.network` says whether it is taken.
    #[arg(long, value_name = "NAME=INTERFACE")]
    pub migration_network: Vec<String>,
    /// Where other clusters find this one's synchronizer, `host:port`; default: where its Service is, at
    /// its load balancer if it gets one.
    #[arg(long)]
    pub advertise: Option<String>,
}
