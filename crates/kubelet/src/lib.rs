//! Offers a device of a node to its kubelet, so that pods can ask for it: Kubernetes' device plugins
//! (<https://kubernetes.io/docs/concepts/extend-kubernetes/compute-storage-net/device-plugins/>).
//!
//! ```text
//!            the kubelet's folder, /var/lib/kubelet/device-plugins
//!  offer  ── kubelet.sock: "devices.kubevirt.io/kvm is at godwit-kvm.sock" ──▶ kubelet
//!         ◀─────────────── godwit-kvm.sock: list, allocate ──────────────────
//! ```
//!
//! A kubelet that begins anew empties its folder and knows of nobody. So the own socket is looked for
//! now and then, and all is done again once it has gone.
//!
//! N.B. kubelets before 1.26 send the path of the socket where HTTP/2 has a host
//! (<https://github.com/kubernetes/kubernetes/pull/112597>), which is refused as it has to be.

pub mod wire;

use futures_util::Stream;
use futures_util::stream::unfold;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::time::{Duration, Instant};
use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::{Endpoint, Server};
use tonic::{Request, Response, Status};
use wire::{
    AllocateRequest, AllocateResponse, ContainerResponse, DevicePlugin, DevicePluginServer,
    DeviceSpec, Empty, HEALTHY, List, Options, RegisterRequest, RegistrationClient, Share,
    UNHEALTHY, VERSION,
};

/// Where kubelets have their folder.
pub const FOLDER: &str = "/var/lib/kubelet/device-plugins";
/// Their socket in it.
const KUBELET: &str = "kubelet.sock";
/// How often is looked for the device, and for whether the kubelet still knows of it.
const LOOK: Duration = Duration::from_secs(2);
/// A kubelet answers, and asks what there is, within this time.
const PATIENCE: Duration = Duration::from_secs(10);

/// A device that many can use at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// What pods ask for: `devices.kubevirt.io/kvm`.
    pub resource: String,
    /// Its file, on the node and in the pods.
    pub path: PathBuf,
    /// How many containers may have it.
    pub shares: usize,
}

impl Device {
    /// Whether it is a character device that can be opened, to be read and written.
    pub fn is_there(&self) -> bool {
        let is_device = self.path.metadata().is_ok_and(|found| found.file_type().is_char_device());
        is_device && File::options().read(true).write(true).open(&self.path).is_ok()
    }

    /// The resource without its domain.
    fn name(&self) -> &str {
        self.resource.rsplit('/').next().unwrap_or_default()
    }

    /// The name of the socket at which it is offered.
    fn socket(&self) -> String {
        format!("godwit-{}.sock", self.name())
    }
}

/// Why a device is not offered.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The own socket.
    #[error("cannot open the socket {}", path.display())]
    Socket {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The kubelet is not reached, or does not want it.
    #[error(
        "the kubelet at {} does not take {resource}: look whether it runs, and has its folder there",
        path.display()
    )]
    Register {
        /// Its socket.
        path: PathBuf,
        /// What is offered.
        resource: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The kubelet knows of it, and does not ask what there is.
    #[error(
        "the kubelet does not ask for {resource}, which it was offered: one before 1.26 cannot, as it names \
         the socket's path as a host: use a newer one, or have guests emulated (useEmulation)"
    )]
    Unasked {
        /// What was offered.
        resource: String,
    },
    /// The offer has ended.
    #[error("{resource} is not offered any more")]
    Served {
        /// Which.
        resource: String,
        /// Why.
        #[source]
        source: tonic::transport::Error,
    },
}

/// Offers a device in the kubelet's folder, until the kubelet has forgotten of it: then it is to be
/// offered again.
///
/// # Errors
/// [`Error`]. A kubelet may be away for a while.
pub async fn offer(folder: &Path, device: &Device) -> Result<(), Error> {
    let path = folder.join(device.socket());
    let socket = |source| Error::Socket { path: path.clone(), source };
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(socket(error)),
        _ => {}
    }
    let listener = UnixListener::bind(&path).map_err(socket)?;
    let own = inode(&path);
    let health = watch::Sender::new(device.is_there());
    let plugin = Plugin { device: device.clone(), health: health.subscribe() };
    let served = Server::builder()
        .add_service(DevicePluginServer::new(plugin))
        .serve_with_incoming(UnixListenerStream::new(listener));
    let kept = async {
        register(&folder.join(KUBELET), device).await?;
        let mut asked = Instant::now();
        while own.is_some() && inode(&path) == own {
            tokio::time::sleep(LOOK).await;
            // Each list that is told has one of its own.
            if health.receiver_count() > 1 {
                asked = Instant::now();
            } else if asked.elapsed() > PATIENCE {
                return Err(Error::Unasked { resource: device.resource.clone() });
            }
            let is_there = device.is_there();
            health.send_if_modified(|before| std::mem::replace(before, is_there) != is_there);
        }
        Ok(())
    };
    tokio::select! {
        ended = served => {
            ended.map_err(|source| Error::Served { resource: device.resource.clone(), source })
        }
        kept = kept => kept,
    }
}

fn inode(path: &Path) -> Option<u64> {
    path.symlink_metadata().ok().map(|found| found.ino())
}

async fn register(kubelet: &Path, device: &Device) -> Result<(), Error> {
    let said = async {
        let endpoint = Endpoint::try_from(format!("unix://{}", kubelet.display()))?
            .timeout(PATIENCE)
            .connect_timeout(PATIENCE);
        let request = RegisterRequest {
            version: VERSION.into(),
            endpoint: device.socket(),
            resource_name: device.resource.clone(),
        };
        RegistrationClient::new(endpoint.connect().await?).register(request).await?;
        Ok(())
    };
    said.await.map_err(|source| Error::Register {
        path: kubelet.to_owned(),
        resource: device.resource.clone(),
        source,
    })
}

/// What the kubelet asks.
struct Plugin {
    device: Device,
    health: watch::Receiver<bool>,
}

impl Plugin {
    fn list(device: &Device, is_there: bool) -> List {
        let health = if is_there { HEALTHY } else { UNHEALTHY };
        let share =
            |number| Share { id: format!("{}{number}", device.name()), health: health.into() };
        List { devices: (0..device.shares).map(share).collect() }
    }
}

type Lists = Pin<Box<dyn Stream<Item = Result<List, Status>> + Send>>;

#[tonic::async_trait]
impl DevicePlugin for Plugin {
    type ListAndWatchStream = Lists;

    async fn options(&self, _: Request<Empty>) -> Result<Response<Options>, Status> {
        Ok(Response::new(Options {}))
    }

    /// What there is, and again when that changes.
    async fn list(&self, _: Request<Empty>) -> Result<Response<Lists>, Status> {
        let mut health = self.health.clone();
        health.mark_changed();
        let state = (health, self.device.clone());
        let lists = unfold(state, async |(mut health, device)| {
            health.changed().await.ok()?;
            let list = Self::list(&device, *health.borrow_and_update());
            Some((Ok(list), (health, device)))
        });
        Ok(Response::new(Box::pin(lists)))
    }

    async fn prefer(&self, _: Request<Empty>) -> Result<Response<Empty>, Status> {
        Err(Status::unimplemented("no share is better than another"))
    }

    async fn allocate(
        &self,
        request: Request<AllocateRequest>,
    ) -> Result<Response<AllocateResponse>, Status> {
        let path = self.device.path.display().to_string();
        let device =
            DeviceSpec { container_path: path.clone(), host_path: path, permissions: "rw".into() };
        let each = |_| ContainerResponse { devices: vec![device.clone()] };
        let containers = request.into_inner().containers.into_iter().map(each).collect();
        Ok(Response::new(AllocateResponse { containers }))
    }

    async fn pre_start(&self, _: Request<Empty>) -> Result<Response<Empty>, Status> {
        Err(Status::unimplemented("nothing is to be done before a container begins"))
    }
}
