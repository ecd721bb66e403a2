//! One pod on this node: sees it, plans, acts, tells, and waits for the next thing to happen.

use super::command::{Place, Sources, command};
use super::container::Kept;
use super::machine::{self, Plan, Seen, Stop};
use super::record::{self, Run};
use super::status::status;
use super::volumes::{REFRESH, Volumes};
use super::{Config, machine::RETRY};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, Node, Pod};
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use kube::{Api, Client};
use reconcile::events::{Kind, Recorder, why};
use reconcile::kept::reference;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, watch};

/// What a pod has been asked to is looked after at least this often.
const ROUND: Duration = Duration::from_secs(60);
/// What could not be told or written is tried again after this.
const AGAIN: Duration = Duration::from_secs(2);

/// Whose folder it is, and since when.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Owner {
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's name.
    pub name: String,
    /// When the agent first saw it.
    pub since: Timestamp,
}

/// What all workers of a node share.
#[derive(Clone)]
pub struct Shared {
    /// As the node's user.
    pub client: Client,
    /// The node's.
    pub config: Arc<Config>,
    /// As it was registered.
    pub node: Arc<Node>,
    /// Says what happens.
    pub events: Recorder,
}

/// What is to become of a pod.
#[derive(Debug, Clone)]
pub enum Wish {
    /// It is as the API has it.
    Pod(Arc<Pod>),
    /// It is gone from the API: whatever runs of it ends at once.
    Gone,
    /// The node ends: what runs ends in its time, and the pod stays.
    Leave,
}

struct Worker {
    shared: Shared,
    folder: PathBuf,
    place: Place,
    since: Timestamp,
    volumes: Volumes,
    /// The volumes are there.
    mounted: bool,
    /// When they are to be looked at again; None before the first time.
    refresh: Option<Timestamp>,
    containers: BTreeMap<String, Kept>,
    bell: Arc<Notify>,
    told: Option<Value>,
}

/// All containers of a pod.
fn containers(pod: &Pod) -> impl Iterator<Item = &Container> {
    pod.spec.iter().flat_map(|s| s.init_containers.iter().flatten().chain(&s.containers))
}

/// Runs a pod until it is no more.
pub async fn run(shared: Shared, folder: PathBuf, uid: &str, mut wishes: watch::Receiver<Wish>) {
    let place = Place { pod_ip: super::pod_address(uid), host_ip: shared.config.address.clone() };
    let volumes =
        Volumes::new(shared.client.clone(), folder.clone(), shared.config.host_paths.clone());
    let mut worker = Worker {
        since: Timestamp::now(),
        volumes,
        mounted: false,
        refresh: None,
        containers: BTreeMap::new(),
        bell: Arc::default(),
        told: None,
        shared,
        folder,
        place,
    };
    loop {
        let wish = wishes.borrow_and_update().clone();
        let wait = match worker.round(&wish).await {
            Ok(None) => return,
            Ok(Some(wait)) => wait,
            Err(error) => {
                tracing::warn!(uid, "the pod is looked after again: {error}");
                AGAIN
            }
        };
        tokio::select! {
            changed = wishes.changed() => if changed.is_err() { return },
            () = worker.bell.notified() => {}
            () = tokio::time::sleep(wait) => {}
        }
    }
}

impl Worker {
    /// One round: how long to wait for the next, or that there is none.
    async fn round(&mut self, wish: &Wish) -> Result<Option<Duration>, Error> {
        let pod = match wish {
            Wish::Pod(pod) => Arc::clone(pod),
            Wish::Gone => return self.clear(true),
            Wish::Leave => return self.clear(false),
        };
        self.own(&pod)?;
        for container in containers(&pod) {
            let folder = self.folder.join("containers").join(&container.name);
            let bell = Arc::clone(&self.bell);
            self.containers
                .entry(container.name.clone())
                .or_insert_with(|| Kept::new(folder, bell));
        }
        let seen = self.see(&pod)?;
        let mut plan = machine::plan(&pod, &seen);
        if !plan.over {
            self.mount(&pod, seen.now).await;
        }
        let started = !plan.start.is_empty() && self.start(&pod, &seen, &mut plan).await?;
        for (name, stop) in &plan.stop {
            self.stop(&pod, name, *stop);
        }
        for (name, _) in plan.stop.iter().filter(|(_, stop)| *stop == Stop::Ask) {
            let text = format!("Stopping container {name}");
            self.say(&pod, Kind::Normal, "Killing", &text).await;
        }
        let acted = started || !plan.stop.is_empty();
        let seen = if acted { self.see(&pod)? } else { seen };
        self.complain(&pod).await;
        let last = status(&pod, &seen, &self.place);
        self.tell(&pod, &json!(last)).await?;
        if plan.over && pod.metadata.deletion_timestamp.is_some() {
            self.bury(&pod).await?;
        }
        let until = |at: Timestamp| Duration::try_from(at.duration_since(Timestamp::now()));
        // The volumes of what is over are not looked at again.
        let refresh = self.refresh.filter(|_| !plan.over);
        let next = [plan.wake, refresh].into_iter().flatten().min();
        // What is due already waits a moment all the same.
        let wait = next.map_or(ROUND, |at| until(at).unwrap_or_default());
        Ok(Some(if started {
            Duration::ZERO
        } else {
            wait.clamp(Duration::from_millis(10), ROUND)
        }))
    }

    /// Says whose folder it is, before anything is in it.
    fn own(&mut self, pod: &Pod) -> io::Result<()> {
        let path = self.folder.join("pod.json");
        if let Some(owner) = owner(&self.folder) {
            self.since = owner.since;
            return Ok(());
        }
        std::fs::create_dir_all(&self.folder)?;
        let text = |field: &Option<String>| field.clone().unwrap_or_default();
        let (namespace, name) = (text(&pod.metadata.namespace), text(&pod.metadata.name));
        record::write(&path, &Owner { namespace, name, since: self.since })
    }

    fn see(&mut self, pod: &Pod) -> io::Result<Seen> {
        let mut all = BTreeMap::new();
        for container in containers(pod) {
            let Some(kept) = self.containers.get_mut(&container.name) else { continue };
            let mut found = kept.see()?;
            if found.runs() {
                let image = container.image.as_deref().unwrap_or_default();
                let image = self.shared.config.images.find(image).cloned().unwrap_or_default();
                kept.watch(container, &image, &self.place.pod_ip)?;
                // It may have ended before it was watched.
                found = kept.see()?;
            }
            all.insert(container.name.clone(), found);
        }
        Ok(Seen { now: Timestamp::now(), since: self.since, containers: all })
    }

    /// Makes the volumes what they are to be now, when it is time: what is in them may have changed.
    async fn mount(&mut self, pod: &Pod, now: Timestamp) {
        if self.refresh.is_some_and(|at| at > now) {
            return;
        }
        match self.volumes.refresh(pod, &self.place, &self.shared.node).await {
            Ok(()) => {
                self.mounted = true;
                self.refresh = Some(now + REFRESH);
            }
            Err(why) => {
                self.refresh = Some(now + RETRY);
                self.say(pod, Kind::Warning, "FailedMount", &why).await;
            }
        }
    }

    /// Starts what is to be started. Whether anything was.
    async fn start(&mut self, pod: &Pod, seen: &Seen, plan: &mut Plan) -> Result<bool, Error> {
        if !self.mounted {
            return Ok(false);
        }
        let mut started = false;
        for container in containers(pod).filter(|c| plan.start.contains(&c.name)) {
            match self.start_one(pod, container, seen).await? {
                Ok(()) => started = true,
                Err(why) => {
                    let wake = seen.now + RETRY;
                    plan.wake = Some(plan.wake.map_or(wake, |before| before.min(wake)));
                    self.refuse(pod, container, why).await;
                }
            }
        }
        Ok(started)
    }

    async fn start_one(
        &mut self,
        pod: &Pod,
        container: &Container,
        seen: &Seen,
    ) -> Result<Result<(), (&'static str, String)>, Error> {
        let run = match self.prepare(pod, container, seen) {
            Ok(run) => run,
            Err(why) => return Ok(Err(why)),
        };
        let Some(kept) = self.containers.get_mut(&container.name) else { return Ok(Ok(())) };
        kept.start(&run, &self.shared.config.supervisor).await?;
        let image = container.image.as_deref().unwrap_or_default();
        let text = format!("Container image {image:?} already present on machine");
        self.say(pod, Kind::Normal, "Pulled", &text).await;
        let text = format!("Created container: {}", container.name);
        self.say(pod, Kind::Normal, "Created", &text).await;
        let text = format!("Started container {}", container.name);
        self.say(pod, Kind::Normal, "Started", &text).await;
        Ok(Ok(()))
    }

    /// How a container is to be run.
    fn prepare(
        &self,
        pod: &Pod,
        container: &Container,
        seen: &Seen,
    ) -> Result<Run, (&'static str, String)> {
        let name = container.image.as_deref().unwrap_or_default();
        let image = self.shared.config.images.find(name).map_err(|error| {
            let invalid = matches!(error, super::images::Error::Invalid(_));
            (if invalid { "InvalidImageName" } else { "ErrImagePull" }, error.to_string())
        })?;
        let sources = Sources {
            pod,
            place: &self.place,
            node: &self.shared.node,
            config_maps: &self.volumes.config_maps,
            secrets: &self.volumes.secrets,
        };
        let cannot = |why: String| ("CreateContainerError", why);
        let own = sources.environment(container)?;
        let root = self.volumes.root(container).map_err(cannot)?;
        let (program, arguments) = command(container, image, &own)?;
        let below = |path: &str| root.join(path.trim_start_matches('/'));
        let directory = below(container.working_dir.as_deref().unwrap_or("/"));
        let message = container.termination_message_path.as_deref();
        let message = below(message.unwrap_or("/dev/termination-log"));
        for folder in [Some(directory.as_path()), message.parent()].into_iter().flatten() {
            std::fs::create_dir_all(folder).map_err(|error| cannot(error.to_string()))?;
        }
        let host = pod.spec.as_ref().and_then(|spec| spec.hostname.clone());
        let host = host.or_else(|| pod.metadata.name.clone()).unwrap_or_default();
        let mut environment = vec![
            ("PATH".into(), "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".into()),
            ("HOSTNAME".into(), host),
            (ROOT.into(), root.display().to_string()),
        ];
        environment.extend(self.shared.config.environment.iter().cloned());
        environment.extend(own);
        let log = container.termination_message_policy.as_deref() == Some("FallbackToLogsOnError");
        let backoff = seen.containers.get(&container.name).map_or(0, |found| found.pause());
        Ok(Run { program, arguments, environment, directory, message: (message, log), backoff })
    }

    async fn refuse(&mut self, pod: &Pod, container: &Container, why: (&'static str, String)) {
        let Some(kept) = self.containers.get_mut(&container.name) else { return };
        let times = kept.refuse(why.clone());
        let image = container.image.as_deref().unwrap_or_default();
        let text = match why.0 {
            "ErrImagePull" => format!("Failed to pull image {image:?}: {}", why.1),
            _ => format!("Error: {}", why.1),
        };
        let reason = if why.0 == "InvalidImageName" { "InspectFailed" } else { "Failed" };
        // Said once: the status shows that it goes on.
        if times == 1 {
            self.say(pod, Kind::Warning, reason, &text).await;
        }
    }

    /// Ends a container, or asks it to, by its hook first. Nobody waits for the hook here: the
    /// grace runs meanwhile, and a pod that is gone is ended at once.
    fn stop(&mut self, pod: &Pod, name: &str, stop: Stop) {
        let Some(kept) = self.containers.get_mut(name) else { return };
        let container = containers(pod).find(|container| container.name == name);
        let hook = container.and_then(|c| c.lifecycle.as_ref()?.pre_stop.clone());
        match (stop, container, hook) {
            (Stop::Kill, ..) => kept.signal(true),
            (Stop::Ask, Some(container), Some(hook)) => {
                let image = container.image.as_deref().unwrap_or_default();
                let image = self.shared.config.images.find(image).cloned().unwrap_or_default();
                let (events, about) = (self.shared.events.clone(), reference(pod));
                let failed = async move |why: String| {
                    let text = format!("PreStopHook failed: {why}");
                    events.say(&about, Kind::Warning, "FailedPreStopHook", &text).await;
                };
                kept.ask_by(hook, container, image, &self.place.pod_ip, failed);
            }
            (Stop::Ask, ..) => kept.ask(),
        }
    }

    async fn complain(&mut self, pod: &Pod) {
        let complaints: Vec<String> =
            self.containers.values_mut().filter_map(Kept::complaint).collect();
        for text in complaints {
            self.say(pod, Kind::Warning, "Unhealthy", &text).await;
        }
    }

    async fn say(&self, pod: &Pod, kind: Kind, reason: &str, text: &str) {
        self.shared.events.say(&reference(pod), kind, reason, text).await;
    }

    fn api(&self, pod: &Pod) -> Api<Pod> {
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        Api::namespaced(self.shared.client.clone(), namespace)
    }

    async fn tell(&mut self, pod: &Pod, status: &Value) -> kube::Result<()> {
        if self.told.as_ref() == Some(status) {
            return Ok(());
        }
        let name = pod.metadata.name.as_deref().unwrap_or_default();
        // The status of another pod of this name is not ours.
        let patch = json!({"metadata": {"uid": pod.metadata.uid}, "status": status});
        let sent = self.api(pod);
        match sent.patch_status(name, &PatchParams::default(), &Patch::Strategic(patch)).await {
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(()),
            Err(error) => Err(error),
            Ok(_) => {
                self.told = Some(status.clone());
                Ok(())
            }
        }
    }

    /// Lets go of a pod that nothing runs of any more.
    async fn bury(&self, pod: &Pod) -> kube::Result<()> {
        let options = DeleteParams {
            grace_period_seconds: Some(0),
            preconditions: Some(Preconditions {
                uid: pod.metadata.uid.clone(),
                resource_version: None,
            }),
            ..DeleteParams::default()
        };
        let name = pod.metadata.name.as_deref().unwrap_or_default();
        match self.api(pod).delete(name, &options).await {
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(()),
            other => other.map(|_| ()),
        }
    }

    /// Ends all that runs: at once when the pod is gone, and then its folder goes too; in its time
    /// when the node ends.
    fn clear(&mut self, gone: bool) -> Result<Option<Duration>, Error> {
        let folders = std::fs::read_dir(self.folder.join("containers"));
        for entry in folders.into_iter().flatten().flatten() {
            let Ok(name) = entry.file_name().into_string() else { continue };
            let bell = Arc::clone(&self.bell);
            self.containers.entry(name).or_insert_with(|| Kept::new(entry.path(), bell));
        }
        let mut running = false;
        for kept in self.containers.values_mut() {
            if !kept.see()?.runs() {
                continue;
            }
            running = true;
            let late = kept.asked.is_some_and(|asked| {
                let waited = Timestamp::now().duration_since(asked);
                waited >= self.shared.config.leaving
            });
            match kept.asked {
                _ if gone || late => kept.signal(true),
                None => kept.ask(),
                Some(_) => {}
            }
        }
        if running {
            return Ok(Some(Duration::from_millis(20)));
        }
        if gone {
            remove(&self.folder)?;
        }
        Ok(None)
    }
}

/// The environment variable that tells a program where its `/` is.
pub const ROOT: &str = "GODWIT_ROOT";

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("{}", why(.0))]
    Api(#[from] kube::Error),
    #[error("its folder cannot be used: {0}")]
    Disk(#[from] io::Error),
}

/// Whose folder it is.
pub fn owner(folder: &Path) -> Option<Owner> {
    let text = std::fs::read(folder.join("pod.json")).ok()?;
    serde_json::from_slice(&text).ok()
}

/// Removes a pod's folder. Links in it lead to volumes, which stay.
fn remove(folder: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
