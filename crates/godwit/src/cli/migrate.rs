//! `godwit migrate` and `godwit watch`.

use super::Place;
use crate::view::Output;
use clap::Args;

/// `godwit migrate`
#[derive(Debug, Args)]
pub struct Migrate {
    /// Where.
    #[command(flatten)]
    pub place: Place,
    /// The VM: `vm/NAME`, or `NAME`.
    pub vm: String,
    /// The node to which it is to go; default: one that fits.
    #[arg(long)]
    pub to_node: Option<String>,
    /// The cluster to which it is to go, with all that it needs: one that is linked.
    #[arg(long, value_name = "CLUSTER", conflicts_with = "to_node")]
    pub to: Option<String>,
    /// The namespace there; default: the one that it is in.
    #[arg(long, requires = "to")]
    pub to_namespace: Option<String>,
    /// What a network is called there, where that is another name.
    #[arg(long, requires = "to", value_name = "HERE=THERE")]
    pub network_map: Vec<String>,
    /// The class of storage to which its disks are to go, while it runs.
    #[arg(long, conflicts_with = "to_node")]
    pub storage_class: Option<String>,
    /// Compare the disks that the guest left with those on which it runs then, before the move is over.
    #[arg(long)]
    pub verify: bool,
    /// Do not wait for its end.
    #[arg(long)]
    pub no_wait: bool,
    /// Move nothing: tell all that would make it fail, what it would take, and how long the guest
    /// would stand still.
    #[arg(long, conflicts_with_all = ["no_wait", "verify"])]
    pub dry_run: bool,
    /// How it is shown.
    #[arg(short, long, value_enum, default_value = "text")]
    pub output: Output,
}

/// `godwit watch`
#[derive(Debug, Args)]
pub struct Watch {
    /// Where.
    #[command(flatten)]
    pub place: Place,
    /// The VM: `vm/NAME`, or `NAME`.
    pub vm: String,
    /// How it is shown.
    #[arg(short, long, value_enum, default_value = "text")]
    pub output: Output,
}
