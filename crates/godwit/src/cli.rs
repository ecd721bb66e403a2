//! What can be said on the command line.

mod cluster;
mod migrate;
mod network;
mod role;

use crate::view::Output;
use crate::{deploy, host, importing, linking, migrating, moving, roles, serving};
use anyhow::Result;
use clap::{Args, Parser, Subcommand, ValueEnum};
use mover::codec::Compression;
use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

pub use cluster::{ClusterAct, ClusterCommand, Deploy, Invite, Join, Pair};
pub use migrate::{Migrate, Watch};
pub use network::{Network, pairs};
pub use role::{Controller, Gateway, Handler, Launcher, Synchronizer};

/// Moves running virtual machines between hosts without stopping them.
#[derive(Debug, Parser)]
#[command(name = "godwit", version, disable_help_subcommand = true)]
pub struct Arguments {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a folder a host: give it an identity that other hosts believe.
    Host(Host),
    /// Run a host's gateway: the one port that moves pass, and the ledger of who owns which VM.
    Gateway(Gateway),
    /// Run one VM, or wait for one that moves in.
    Launcher(Launcher),
    /// Run the controllers of a cluster: what VMs, their disks and the settings ask for is done.
    Controller(Controller),
    /// Run a node's handler: what runs VMs there.
    Handler(Handler),
    /// Run a cluster's synchronizer: what links it to others.
    Synchronizer(Synchronizer),
    /// Move a running VM from one host to another.
    Move(Move),
    /// Compare the disks that a VM left with those that it runs on now.
    Verify(Verify),
    /// Move a running VM of a cluster to another node, or its disks to other storage.
    Migrate(Migrate),
    /// Link clusters, so that VMs can go from one to the other.
    Cluster(ClusterCommand),
    /// Watch a VM of a cluster move.
    Watch(Watch),
    /// Virtual machines of a cluster.
    Vm(VmCommand),
    /// Disk images of a cluster.
    Image(ImageCommand),
    /// Connect to a VM's serial console. End with Ctrl-].
    Console(Console),
    /// Run a Kubernetes API of its own on this machine: an embedded cluster.
    Up(Up),
    /// End an embedded cluster. What is in it is kept.
    Down(Down),
    /// Print the kubeconfig of an embedded cluster, or merge it into another.
    Kubeconfig(Kubeconfig),
    /// List the embedded clusters, or show what a VM does.
    Status(Status),
    /// Let a VM shut itself down.
    Shutdown(Shutdown),
    /// Answer for a cluster whose API server is not Godwit's: judge what is written of VMs, and
    /// do what is asked of them.
    Api(ApiRole),
    /// Print the manifests that put Godwit on a Kubernetes cluster.
    Deploy(Deploy),
    /// Become another program that ends with its parent.
    #[command(hide = true)]
    Exec {
        /// The parent's process id.
        #[arg(long)]
        parent: u32,
        /// The program and its arguments.
        #[arg(last = true, required = true)]
        command: Vec<OsString>,
    },
    /// Bring a disk to where a pod's environment says.
    #[command(hide = true)]
    Import,
    /// Read a disk for a pod elsewhere, as this pod's environment says.
    #[command(hide = true)]
    Lend,
    /// Become another program that may use little, and gain nothing.
    #[command(hide = true)]
    Confine {
        /// The program and its arguments.
        #[arg(last = true, required = true)]
        command: Vec<OsString>,
    },
    /// Run a pod's container until it ends.
    #[command(hide = true, name = node::supervise::COMMAND)]
    PodProcess {
        /// The container's folder.
        folder: PathBuf,
        /// The number of its run.
        attempt: u32,
    },
}

/// Which cluster, and which namespace of it.
#[derive(Debug, Clone, Args)]
pub struct Place {
    /// The kubeconfig; default: $KUBECONFIG, ~/.kube/config, or that of the embedded cluster.
    #[arg(long, global = true)]
    pub kubeconfig: Option<PathBuf>,
    /// The kubeconfig's context.
    #[arg(long, global = true)]
    pub context: Option<String>,
    /// The namespace; default: the context's.
    #[arg(long, short, global = true)]
    pub namespace: Option<String>,
}

/// `godwit vm`
#[derive(Debug, Args)]
pub struct VmCommand {
    /// Where.
    #[command(flatten)]
    pub place: Place,
    /// What to do.
    #[command(subcommand)]
    pub act: VmAct,
}

/// What to do with a VM.
#[derive(Debug, Subcommand)]
pub enum VmAct {
    /// Write a VM's manifest and create it; or print it, with --dry-run.
    Create(CreateVm),
    /// Start it.
    Start {
        /// The VM.
        name: String,
        /// Let its guest stand still at its first instruction.
        #[arg(long)]
        paused: bool,
    },
    /// Let its guest shut down.
    Stop {
        /// The VM.
        name: String,
        /// Seconds until it is ended.
        #[arg(long)]
        grace: Option<u32>,
    },
    /// Let its guest shut down, and start it again.
    Restart {
        /// The VM.
        name: String,
    },
    /// Let its guest stand still.
    Pause {
        /// The VM.
        name: String,
    },
    /// Let its guest go on.
    Unpause {
        /// The VM.
        name: String,
    },
    /// Connect to its serial console. End with Ctrl-].
    Console {
        /// The VM.
        name: String,
    },
    /// List VMs.
    List {
        /// Those of all namespaces.
        #[arg(long, short = 'A')]
        all_namespaces: bool,
        /// How.
        #[arg(short, value_enum, default_value = "text")]
        output: Output,
    },
    /// Tell all that is known of it.
    Describe {
        /// The VM.
        name: String,
    },
    /// Delete it with its disks, and wait until it is gone.
    Delete {
        /// The VM.
        name: String,
        /// Do not wait.
        #[arg(long)]
        no_wait: bool,
    },
}

/// `godwit vm create`
#[derive(Debug, Args)]
pub struct CreateVm {
    /// Its name.
    pub name: String,
    /// Where its disk comes from: an image (`docker://HOST/NAME:TAG`), a web server's file
    /// (`https://…`), a claim (`pvc:NAMESPACE/NAME`); default: an empty disk.
    #[arg(long)]
    pub image: Option<String>,
    /// Run the image itself: what is written to it is lost when the VM stops.
    #[arg(long, requires = "image")]
    pub ephemeral: bool,
    /// The size of its disk; default: 10Gi.
    #[arg(long, conflicts_with = "ephemeral")]
    pub size: Option<String>,
    /// The class of storage of its disk; default: the cluster's.
    #[arg(long, conflicts_with = "ephemeral")]
    pub class: Option<String>,
    /// Its memory.
    #[arg(long, default_value = "1Gi")]
    pub memory: String,
    /// Its processors.
    #[arg(long, default_value_t = 1)]
    pub cpus: u32,
    /// A file with cloud-init's user data.
    #[arg(long)]
    pub cloud_init: Option<PathBuf>,
    /// Always, Manual, RerunOnFailure, Once or Halted.
    #[arg(long, default_value = "Always")]
    pub run_strategy: String,
    /// Do not start it.
    #[arg(long)]
    pub halted: bool,
    /// Print the manifest, and create nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// How it is printed.
    #[arg(short, value_enum, default_value = "yaml")]
    pub output: Format,
}

/// `godwit image`
#[derive(Debug, Args)]
pub struct ImageCommand {
    /// What to do.
    #[command(subcommand)]
    pub act: ImageAct,
}

/// What to do with an image.
#[derive(Debug, Subcommand)]
pub enum ImageAct {
    /// Make a DataVolume of a file of this machine. An upload that was cut is taken up.
    Upload(UploadImage),
}

/// `godwit image upload`
#[derive(Debug, Args)]
pub struct UploadImage {
    /// Where.
    #[command(flatten)]
    pub place: Place,
    /// The DataVolume's name.
    pub name: String,
    /// The image: raw or qcow2, as it is or compressed by gzip, xz or zstd.
    #[arg(long)]
    pub file: PathBuf,
    /// The size of the disk.
    #[arg(long)]
    pub size: String,
    /// The class of storage; default: the cluster's.
    #[arg(long)]
    pub class: Option<String>,
}

/// How a manifest is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    Yaml,
    /// For programs.
    Json,
}

/// What runs guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Accelerator {
    /// The processor.
    Kvm,
    /// QEMU's emulation.
    Tcg,
}

/// `godwit host`
#[derive(Debug, Args)]
pub struct Host {
    /// The folder.
    pub dir: PathBuf,
    /// Folder of the CA that vouches for the hosts; made if there is none.
    #[arg(long)]
    pub ca: PathBuf,
    /// The host's name.
    #[arg(long)]
    pub name: String,
    /// The name of the cluster that a new CA is for.
    #[arg(long, default_value = "godwit")]
    pub cluster: String,
    /// The folder is for a cluster's synchronizer.
    #[arg(long, hide = true)]
    pub synchronizer: bool,
}

/// Which way.
#[derive(Debug, Args)]
pub struct Way {
    /// The VM.
    pub vm: String,
    /// The folder of the host that it leaves.
    #[arg(long)]
    pub from: PathBuf,
    /// The folder of the host that it goes to.
    #[arg(long)]
    pub to: PathBuf,
    /// Where a disk lies on the other host (NAME=PATH); default: the VM's folder there.
    #[arg(long = "disk", value_parser = name_and_path)]
    pub disks: Vec<(String, PathBuf)>,
    /// How to show it.
    #[arg(short, long, value_enum, default_value = "text")]
    pub output: Output,
}

/// `godwit move`
#[derive(Debug, Args)]
pub struct Move {
    /// Which way.
    #[command(flatten)]
    pub way: Way,
    /// Go on with a move that failed; refuse to begin a new one.
    #[arg(long)]
    pub resume: bool,
    /// Most bytes per second, disks and memory together (10M, 1G).
    #[arg(long, value_parser = size)]
    pub bandwidth: Option<u64>,
    /// Compression of the disks.
    #[arg(long, value_enum, default_value = "auto")]
    pub compression: Codec,
    /// The pause to aim at, milliseconds.
    #[arg(long, default_value_t = 50)]
    pub downtime: u64,
    /// The longest pause, where the guest does not let itself be caught, milliseconds.
    #[arg(long, default_value_t = 300)]
    pub max_downtime: u64,
    /// Fail rather than slow down the guest's disk writes.
    #[arg(long)]
    pub no_throttle: bool,
    /// Disk streams.
    #[arg(long, default_value_t = 2)]
    pub streams: u16,
    /// QEMU's additional memory channels; default: one for each core, at most four.
    #[arg(long)]
    pub multifd: Option<u8>,
    /// Seconds that a lost link may take to come back.
    #[arg(long, default_value_t = 30.0)]
    pub reconnect: f64,
    /// Seconds for an answer, for the pause, and until doubt is shown.
    #[arg(long, default_value_t = 30.0)]
    pub patience: f64,
}

/// Compression of disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Codec {
    /// When it makes the move faster.
    Auto,
    /// Never.
    Off,
    /// Always LZ4.
    Lz4,
    /// Always Zstandard.
    Zstd,
}

impl From<Codec> for Compression {
    fn from(codec: Codec) -> Self {
        match codec {
            Codec::Auto => Compression::Auto,
            Codec::Off => Compression::Off,
            Codec::Lz4 => Compression::Lz4,
            Codec::Zstd => Compression::Zstd,
        }
    }
}

/// `godwit verify`
#[derive(Debug, Args)]
pub struct Verify {
    /// Which way the VM went.
    #[command(flatten)]
    pub way: Way,
}

/// `godwit console`
#[derive(Debug, Args)]
pub struct Console {
    /// The VM.
    pub vm: String,
    /// The folder of the VM's host; without it the VM is a cluster's.
    #[arg(long)]
    pub host: Option<PathBuf>,
    /// Where, in a cluster.
    #[command(flatten)]
    pub place: Place,
    /// The serial port.
    #[arg(long, default_value = "console")]
    pub serial: String,
}

/// `godwit status`
#[derive(Debug, Args)]
pub struct Status {
    /// The VM; without it the clusters are listed.
    #[arg(requires = "host")]
    pub vm: Option<String>,
    /// The folder of the VM's host.
    #[arg(long, requires = "vm")]
    pub host: Option<PathBuf>,
    /// The folder of the clusters' folders.
    #[arg(long, conflicts_with = "vm")]
    pub dir: Option<PathBuf>,
    /// How to show it.
    #[arg(short, long, value_enum, default_value = "text")]
    pub output: Output,
}

/// `godwit up`
#[derive(Debug, Args)]
pub struct Up {
    /// The cluster's name.
    #[arg(long, default_value = "local")]
    pub name: String,
    /// The folder of the clusters' folders; default: in the user's data.
    #[arg(long)]
    pub dir: Option<PathBuf>,
    /// The port of its API on 127.0.0.1; default: the one it had before, or a free one.
    #[arg(long)]
    pub port: Option<u16>,
    /// How many nodes it has; without any it runs no pods.
    #[arg(long, default_value_t = 1)]
    pub nodes: u8,
    /// What each node's volumes may take, and those that all share: `20Gi`; default: the size of
    /// the file system.
    #[arg(long, value_name = "SIZE")]
    pub storage: Option<String>,
    /// What runs guests; default: found out when the cluster is made, and kept in its KubeVirt object.
    #[arg(long, value_enum)]
    pub accelerator: Option<Accelerator>,
    /// An image that its nodes have: a program of this machine that is run in its stead.
    #[arg(long, value_name = "NAME=PROGRAM")]
    pub image: Vec<String>,
    /// A network for migrations, in which each node has an address: `moves=127.80.0.0/24`. The KubeVirt
    /// object's `configuration.migrations.network` says whether it is taken.
    #[arg(long, value_name = "NAME=RANGE")]
    pub migration_network: Vec<Network>,
    /// Run controllers and handlers as processes of their own; their logs are in the cluster's
    /// folder.
    #[arg(long)]
    pub separate: bool,
    /// Let it run on its own.
    #[arg(long)]
    pub detach: bool,
}

/// `godwit down`
#[derive(Debug, Args)]
pub struct Down {
    /// The cluster's name.
    #[arg(long, default_value = "local")]
    pub name: String,
    /// The folder of the clusters' folders.
    #[arg(long)]
    pub dir: Option<PathBuf>,
    /// Let its pods go on: the next `godwit up` takes them over.
    #[arg(long)]
    pub keep_pods: bool,
}

/// `godwit kubeconfig`
#[derive(Debug, Args)]
pub struct Kubeconfig {
    /// The cluster's name.
    #[arg(long, default_value = "local")]
    pub name: String,
    /// The folder of the clusters' folders.
    #[arg(long)]
    pub dir: Option<PathBuf>,
    /// Merge it into the one that kubectl uses.
    #[arg(long)]
    pub merge: bool,
    /// Merge it into this one.
    #[arg(long, requires = "merge")]
    pub into: Option<PathBuf>,
}

/// `godwit shutdown`
#[derive(Debug, Args)]
pub struct Shutdown {
    /// The VM.
    pub vm: String,
    /// The host's folder.
    #[arg(long)]
    pub host: PathBuf,
    /// Seconds until it is ended.
    #[arg(long, default_value_t = 30)]
    pub grace: u64,
}

/// `godwit api`
#[derive(Debug, Args)]
pub struct ApiRole {
    /// The address to listen on.
    #[arg(long)]
    pub listen: SocketAddr,
    /// The cluster; default: $KUBECONFIG, or the one that this runs in.
    #[arg(long)]
    pub kubeconfig: Option<PathBuf>,
    /// Folder of the CA that vouches for it and for the handlers, as `godwit host --ca` makes it.
    #[arg(long)]
    pub identity: PathBuf,
}

/// Carries a command out.
///
/// # Errors
/// For a person.
pub async fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Host(arguments) => host::init(&arguments),
        Command::Gateway(arguments) => roles::gateway(arguments).await,
        Command::Launcher(arguments) => roles::launcher(arguments).await,
        Command::Controller(arguments) => roles::controller(arguments).await,
        Command::Handler(arguments) => roles::handler(arguments).await,
        Command::Synchronizer(arguments) => roles::synchronizer(arguments).await,
        Command::Cluster(command) => linking::run(command).await,
        Command::Move(arguments) => moving::run(arguments).await,
        Command::Verify(arguments) => moving::verify(arguments).await,
        Command::Image(ImageCommand { act: ImageAct::Upload(arguments) }) => {
            crate::uploading::run(arguments).await
        }
        Command::Migrate(arguments) => migrating::run(arguments).await,
        Command::Watch(arguments) => migrating::watch(arguments).await,
        Command::Vm(command) => crate::vms::run(command).await,
        Command::Console(arguments) => crate::vms::console_of(arguments).await,
        Command::Up(arguments) => crate::cluster::up(arguments).await,
        Command::Down(arguments) => crate::cluster::down(&arguments).await,
        Command::Kubeconfig(arguments) => crate::cluster::kubeconfig(&arguments),
        Command::Status(Status { vm: Some(vm), host: Some(host), output, .. }) => {
            host::status(&host, &vm, output).await
        }
        Command::Status(arguments) => {
            crate::cluster::list(arguments.dir.as_deref(), arguments.output)
        }
        Command::Shutdown(arguments) => host::shutdown(&arguments).await,
        Command::Import => importing::run().await,
        Command::Lend => importing::lend().await,
        Command::Api(arguments) => serving::run(arguments).await,
        Command::Deploy(arguments) => deploy::print(&arguments),
        // Handled before there is a runtime.
        Command::Exec { .. } | Command::Confine { .. } | Command::PodProcess { .. } => {
            Ok(ExitCode::FAILURE)
        }
    }
}

fn name_and_path(text: &str) -> Result<(String, PathBuf), String> {
    let (name, path) = text.split_once('=').ok_or("say NAME=PATH")?;
    let path = std::path::absolute(path).map_err(|e| e.to_string())?;
    Ok((name.to_owned(), path))
}

fn size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'K' | b'k') => (&text[..text.len() - 1], 10),
        Some(b'M' | b'm') => (&text[..text.len() - 1], 20),
        Some(b'G' | b'g') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let number: u64 = digits.parse().map_err(|_| "say a number, with K, M or G if you like")?;
    number
        .checked_shl(shift)
        .filter(|n| n >> shift == number && *n > 0)
        .ok_or("out of range".into())
}
