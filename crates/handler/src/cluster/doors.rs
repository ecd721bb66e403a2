//! Each launcher's door to its handler: a folder of its pod's, with a socket that is nobody else's.

use super::records::{Door, OfVm};
use super::{Shared, guests, network};
use channel::gateway::{self, Gateway};
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use launcher::migration::ticket::{Here, Peer};
use rustix::fs::{FlockOperation, Mode, OFlags};
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// What could not be done is tried again after this; else a pod that comes or goes rings.
const AGAIN: Duration = Duration::from_secs(2);

/// The folder of a pod, below those of all pods.
pub fn folder(pods: &Path, pod: &Pod) -> PathBuf {
    pods.join(format!("{}_{}", pod.namespace().unwrap_or_default(), pod.name_any()))
}

/// Opens doors for pods that come, shuts those of pods that are gone. Never ends by itself.
pub async fn run(shared: Shared, gateway: Arc<Gateway>) {
    let mut open: HashMap<PathBuf, (SocketAddr, gateway::Door)> = HashMap::new();
    let mut told: HashMap<PathBuf, String> = HashMap::new();
    loop {
        let pods = shared.pods.state();
        let folders: Vec<PathBuf> =
            pods.iter().map(|pod| folder(&shared.config.pods(), pod)).collect();
        for (pod, folder) in pods.iter().zip(&folders) {
            let here = gateway.local_addr();
            if let Some((written, _)) = open.get_mut(folder) {
                if *written == here {
                    continue;
                }
                match write_place(&shared, here, folder) {
                    Ok(()) => *written = here,
                    Err(error) => {
                        let pod = pod.name_any();
                        tracing::warn!(pod, %error, "its launcher is told an old address");
                    }
                }
                continue;
            }
            match door(&shared, &gateway, here, pod, folder) {
                Ok(Some(door)) => {
                    open.insert(folder.clone(), (here, door));
                    // Whoever waited for it is looked at.
                    if let Some(vmi) = guests::owner(pod) {
                        shared.queue.ring(vmi);
                    }
                }
                Ok(None) => {}
                Err(why) => {
                    if told.insert(folder.clone(), why.clone()).as_ref() != Some(&why) {
                        tracing::warn!(pod = %pod.name_any(), why, "its launcher cannot be heard");
                    }
                }
            }
        }
        open.retain(|folder, _| folders.contains(folder));
        told.retain(|folder, _| folders.contains(folder));
        shared.moves.keep(|uid| pods.iter().any(|pod| pod.uid().as_deref() == Some(uid)));
        sweep(&shared.config.pods(), &folders).await;
        let _ = tokio::time::timeout(AGAIN, shared.pods_bell.notified()).await;
    }
}

fn door(
    shared: &Shared,
    gateway: &Gateway,
    here: SocketAddr,
    pod: &Arc<Pod>,
    folder: &Path,
) -> Result<Option<gateway::Door>, String> {
    let Some((namespace, name)) = guests::owner(pod) else { return Ok(None) };
    std::fs::create_dir_all(folder).map_err(|error| error.to_string())?;
    write_place(shared, here, folder).map_err(|error| error.to_string())?;
    let vm = api::owner::vm_id(&namespace, &name);
    let vm = handover::record::VmId(vm);
    let record = OfVm { shared: shared.clone(), namespace, name, vm };
    let service = Door { record, pod: Arc::clone(pod) };
    let door = gateway.open_door(folder, Arc::new(service));
    door.map(Some).map_err(|error| launcher::chain(&error))
}

/// Writes down where a launcher is reached by others: its gateway.
fn write_place(shared: &Shared, here: SocketAddr, folder: &Path) -> io::Result<()> {
    let peer = Peer { address: here.to_string(), id: shared.config.id() };
    let draft = folder.join("gateway.json.new");
    std::fs::write(&draft, serde_json::to_vec(&Here { peer })?)?;
    std::fs::rename(&draft, folder.join("gateway.json"))
}

/// Removes folders of pods that are gone, unless a launcher still lives in one.
///
/// N.B. only those that have had a door: another may belong to a pod that is not seen yet.
async fn sweep(pods: &Path, known: &[PathBuf]) {
    let entries = std::fs::read_dir(pods).into_iter().flatten().flatten();
    for folder in entries.map(|entry| entry.path()).filter(|folder| !known.contains(folder)) {
        if folder.join("gateway.json").exists() && !is_held(&folder) {
            network::remove(&folder).await;
            if let Err(error) = std::fs::remove_dir_all(&folder) {
                tracing::warn!(folder = %folder.display(), %error, "a pod's folder cannot be removed");
            }
        }
    }
}

/// Whether a launcher holds a folder of the pod's: see `launcher::folder`.
fn is_held(folder: &Path) -> bool {
    let vms = std::fs::read_dir(folder.join("vms")).into_iter().flatten().flatten();
    vms.map(|entry| entry.path().join("lock")).any(|lock| {
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        match rustix::fs::open(&lock, flags, Mode::empty()) {
            Ok(file) => rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err(),
            Err(errno) => errno != rustix::io::Errno::NOENT,
        }
    })
}
