//! `godwit cluster`.

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
    /// End that: neither believes the other any more.
    Unlink(Pair),
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
