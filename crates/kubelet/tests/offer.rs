//! A device is offered to whatever speaks as a kubelet does.

use kubelet::wire::{
    AllocateRequest, ContainerRequest, DevicePluginClient, Empty, RegisterRequest, Registration,
    RegistrationServer, Share,
};
use kubelet::{Device, Error, offer};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;
use tokio::net::UnixListener;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Request, Response, Status};

const PATIENCE: Duration = Duration::from_secs(30);

/// The kubelet's half: who came.
struct Kubelet(mpsc::Sender<RegisterRequest>);

#[tonic::async_trait]
impl Registration for Kubelet {
    async fn register(&self, request: Request<RegisterRequest>) -> Result<Response<Empty>, Status> {
        self.0.try_send(request.into_inner()).unwrap();
        Ok(Response::new(Empty {}))
    }
}

/// Begins as kubelets do: with an empty folder.
fn begin(folder: &Path) -> (mpsc::Receiver<RegisterRequest>, JoinHandle<()>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        std::fs::remove_file(entry.unwrap().path()).unwrap();
    }
    let (came, comes) = mpsc::channel(4);
    let listener = UnixListener::bind(folder.join("kubelet.sock")).unwrap();
    let served = Server::builder()
        .add_service(RegistrationServer::new(Kubelet(came)))
        .serve_with_incoming(UnixListenerStream::new(listener));
    (comes, tokio::spawn(async { served.await.unwrap() }))
}

async fn next<T>(comes: &mut mpsc::Receiver<T>) -> T {
    timeout(PATIENCE, comes.recv()).await.expect("nothing comes").unwrap()
}

async fn client(folder: &Path, asked: &RegisterRequest) -> DevicePluginClient<Channel> {
    let path = folder.join(&asked.endpoint);
    let endpoint = Endpoint::try_from(format!("unix://{}", path.display())).unwrap();
    DevicePluginClient::new(endpoint.connect().await.unwrap())
}

fn device(path: &Path) -> Device {
    Device { resource: "devices.kubevirt.io/kvm".into(), path: path.into(), shares: 3 }
}

#[tokio::test]
async fn containers_get_the_device_as_long_as_it_is_there() {
    let folder = tempfile::tempdir().unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    let path = elsewhere.path().join("kvm");
    symlink("/dev/null", &path).unwrap();
    let (mut comes, _kubelet) = begin(folder.path());
    let (there, device) = (folder.path().to_owned(), device(&path));
    tokio::spawn(async move { offer(&there, &device).await });

    let asked = next(&mut comes).await;
    assert_eq!((&*asked.version, &*asked.resource_name), ("v1beta1", "devices.kubevirt.io/kvm"));
    let mut plugin = client(folder.path(), &asked).await;
    let mut lists = plugin.list(Empty {}).await.unwrap().into_inner();
    let share = |number: usize, health: &str| Share {
        id: format!("kvm{number}"),
        health: health.to_owned(),
    };
    let all = |health: &str| (0..3).map(|number| share(number, health)).collect::<Vec<_>>();
    assert_eq!(lists.message().await.unwrap().unwrap().devices, all("Healthy"));

    let containers = vec![ContainerRequest { ids: vec!["kvm1".into()] }; 2];
    let got = plugin.allocate(AllocateRequest { containers }).await.unwrap().into_inner();
    assert_eq!(got.containers.len(), 2, "each container that was asked for is answered");
    for container in got.containers {
        let [device] = &*container.devices else { panic!("{container:?}") };
        assert_eq!(Path::new(&device.host_path), path);
        assert_eq!((&device.container_path, &*device.permissions), (&device.host_path, "rw"));
    }

    // A file of that name is none.
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "").unwrap();
    let told = timeout(PATIENCE, lists.message()).await.expect("it is not told");
    assert_eq!(told.unwrap().unwrap().devices, all("Unhealthy"));
    std::fs::remove_file(&path).unwrap();
    symlink("/dev/null", &path).unwrap();
    let told = timeout(PATIENCE, lists.message()).await.expect("it is not told");
    assert_eq!(told.unwrap().unwrap().devices, all("Healthy"));
}

#[tokio::test]
async fn a_kubelet_that_does_not_ask_for_what_it_was_offered_is_told_of() {
    let folder = tempfile::tempdir().unwrap();
    let (_comes, _kubelet) = begin(folder.path());
    let device = device(Path::new("/dev/null"));
    let offered = timeout(PATIENCE, offer(folder.path(), &device)).await.expect("nothing is told");
    assert!(matches!(offered, Err(Error::Unasked { .. })), "{offered:?}");
}

#[tokio::test]
async fn a_kubelet_that_begins_anew_is_offered_it_anew() {
    let folder = tempfile::tempdir().unwrap();
    let device = device(Path::new("/dev/null"));
    let alone = offer(folder.path(), &device).await;
    assert!(matches!(alone, Err(Error::Register { .. })), "{alone:?}");

    for _ in 0..2 {
        let (mut comes, kubelet) = begin(folder.path());
        let offered = offer(folder.path(), &device);
        let seen = async {
            let asked = next(&mut comes).await;
            let mut plugin = client(folder.path(), &asked).await;
            let mut lists = plugin.list(Empty {}).await.unwrap().into_inner();
            assert_eq!(lists.message().await.unwrap().unwrap().devices.len(), 3);
            kubelet.abort();
            begin(folder.path())
        };
        let (offered, _) = timeout(PATIENCE, async { tokio::join!(offered, seen) }).await.unwrap();
        offered.unwrap();
    }
}
