//! The guests of a node's VMIs: started through their launchers, watched, and told of.

use super::translate::{self, Facts};
use super::{Shared, doors, files, moves, network, records};
use api::conditions::{self, Condition, types};
use api::keys;
use api::kubevirt::KubeVirt;
use api::vmi::{
    InterfaceStatus, Machine, MemoryStatus, Phase, Spec, Status, VirtualMachineInstance,
};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use kube::api::{Patch, PatchParams};
use kube::runtime::reflector::{ObjectRef, Store};
use kube::{Api, Resource, ResourceExt};
use launcher::client::Client as Launcher;
use launcher::spec::VmSpec;
use launcher::status::{Phase as Does, Status as Found};
use reconcile::events::{Kind, why};
use reconcile::kept::reference;
use reconcile::queue::Next;
use serde_json::json;
use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Guests that are looked at the same time.
const AT_ONCE: usize = 32;
/// A launcher that does not answer yet is asked again after this.
pub(super) const SOON: Duration = Duration::from_millis(100);
/// A guest that does not start in this time has failed.
const START: SignedDuration = SignedDuration::from_mins(10);
/// A launcher's news are waited for so long at a time.
const WAIT: Duration = Duration::from_secs(50);

/// A namespace and a name.
pub type Key = (String, String);

/// The key of an object.
pub fn key(object: &impl ResourceExt) -> Key {
    (object.namespace().unwrap_or_default(), object.name_any())
}

/// The VMI of a launcher's pod.
pub fn owner(pod: &Pod) -> Option<Key> {
    let owner = pod.owner_references().iter().find(|o| o.kind == "VirtualMachineInstance")?;
    Some((pod.namespace().unwrap_or_default(), owner.name.clone()))
}

/// Whether a pod has a launcher: one that only has claims bound has the same labels else.
pub fn launches(pod: &Pod) -> bool {
    !pod.labels().contains_key(keys::BINDS)
}

pub(super) fn get<K>(store: &Store<K>, (namespace, name): &Key) -> Option<Arc<K>>
where
    K: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope> + Clone + 'static,
{
    store.get(&ObjectRef::new(name).within(namespace))
}

/// Looks after them. Never ends by itself.
pub async fn run(shared: Shared) {
    let queue = shared.queue.clone();
    let watched: Watched = Arc::default();
    queue
        .run(AT_ONCE, move |key| {
            let (shared, watched) = (shared.clone(), Arc::clone(&watched));
            async move { reconcile(&shared, &watched, &key).await }
        })
        .await;
}

/// Uids of pods whose launchers' news are waited for.
type Watched = Arc<Mutex<HashSet<String>>>;

/// One guest: its VMI, its pod, its launcher.
pub(super) struct Guest<'a> {
    pub(super) shared: &'a Shared,
    pub(super) key: &'a Key,
    pub(super) vmi: Arc<VirtualMachineInstance>,
    pub(super) pod: Arc<Pod>,
    pub(super) launcher: Launcher,
    pub(super) vm: String,
}

async fn reconcile(shared: &Shared, watched: &Watched, key: &Key) -> Next {
    let pods = pods_of(shared, key);
    if pods.is_empty() {
        return Next::Rest;
    }
    let vmi = match get(&shared.vmis, key) {
        Some(vmi) => vmi,
        // One that comes from another node, or has left for it.
        None => match moves::elsewhere(shared, key).await {
            Ok(Some(vmi)) => vmi,
            Ok(None) => return Next::Rest,
            Err(error) => return failed(key, &error),
        },
    };
    let record = get(&shared.owners, key);
    let record = record.and_then(|record| record.status.clone()).unwrap_or_default();
    let mut next = Next::Rest;
    for pod in pods.iter().filter(|pod| pod.labels().get(keys::CREATED_BY) == vmi.uid().as_ref()) {
        let place = Place { shared, watched, key, vmi: &vmi, record: &record, pod };
        next = sooner(next, place.reconcile().await);
    }
    next
}

/// The one that comes first.
fn sooner(one: Next, other: Next) -> Next {
    match (one, other) {
        (Next::Rest, other) => other,
        (one, Next::Rest) => one,
        (Next::Failed, _) | (_, Next::Failed) => Next::Failed,
        (Next::After(one), Next::After(other)) => Next::After(one.min(other)),
    }
}

fn failed(key: &Key, error: &kube::Error) -> Next {
    if matches!(error, kube::Error::Api(status) if status.code == 409) {
        return Next::After(SOON);
    }
    tracing::warn!(vmi = %format!("{}/{}", key.0, key.1), "{}", why(error));
    Next::Failed
}

/// The launchers' pods of a VMI that are on this node and have not ended.
fn pods_of(shared: &Shared, key: &Key) -> Vec<Arc<Pod>> {
    let ended = |pod: &Pod| {
        let phase = pod.status.as_ref().and_then(|s| s.phase.as_deref()).unwrap_or_default();
        ["Succeeded", "Failed"].contains(&phase)
    };
    let mut pods = shared.pods.state();
    pods.retain(|pod| owner(pod).as_ref() == Some(key) && launches(pod) && !ended(pod));
    pods
}

/// A pod that a VMI has on this node.
struct Place<'a> {
    shared: &'a Shared,
    watched: &'a Watched,
    key: &'a Key,
    vmi: &'a Arc<VirtualMachineInstance>,
    record: &'a api::owner::Status,
    pod: &'a Arc<Pod>,
}

impl Place<'_> {
    async fn reconcile(&self) -> Next {
        let Self { shared, key, vmi, pod, .. } = *self;
        let folder = doors::folder(&shared.config.pods(), pod);
        // Without its door the launcher could not ask whether it may start.
        if !folder.join("gateway.json").exists() {
            return Next::After(SOON);
        }
        let vm = api::owner::vm_id(&key.0, &key.1);
        let launcher = Launcher::new(&folder, &vm);
        let Ok(found) = launcher.status().await else { return Next::After(SOON) };
        watch(shared, self.watched, key, pod, &launcher, found.generation);
        let guest = Guest { shared, key, vmi: Arc::clone(vmi), pod: Arc::clone(pod), launcher, vm };
        if found.phase == Does::Stopped && self.is_undecided() {
            // The guest may go on at the target: the record rings when that is decided.
            return Next::Rest;
        }
        let looked = match self.is_owner(&found) {
            true if moves::is_new_here(vmi, &shared.config.node, pod) => guest.arrive(&found).await,
            true => guest.look_after(&found).await,
            false => guest.move_along(&found).await,
        };
        looked.unwrap_or_else(|error| failed(key, &error))
    }

    /// Whether a move may still be decided in its heir's favour.
    fn is_undecided(&self) -> bool {
        self.record.of.as_ref().is_some_and(|of| self.record.may_come_by(&of.attempt))
    }

    /// Whether the guest is this pod's: it runs it, or is to begin it.
    fn is_owner(&self, found: &Found) -> bool {
        let begins = found.phase == Does::Empty || found.phase == Does::Starting;
        let is_target = self.pod.labels().contains_key(keys::MIGRATION);
        let phase = self.vmi.status.as_ref().map(|status| status.phase).unwrap_or_default();
        let lives = matches!(
            phase,
            Phase::Scheduled | Phase::Running | Phase::Unknown | Phase::WaitingForSync
        );
        let owns = self.record.pod.as_deref() == Some(&*self.pod.name_any());
        lives && (owns || begins && !is_target && self.record.is_over())
    }
}

/// Rings when a launcher has news, until it is gone.
fn watch(shared: &Shared, watched: &Watched, key: &Key, pod: &Pod, launcher: &Launcher, seen: u64) {
    let uid = pod.uid().unwrap_or_default();
    let lock = |watched: &Watched, insert: bool| {
        let mut watched = watched.lock().unwrap_or_else(PoisonError::into_inner);
        if insert { watched.insert(uid.clone()) } else { watched.remove(&uid) }
    };
    if !lock(watched, true) {
        return;
    }
    let (queue, key, launcher) = (shared.queue.clone(), key.clone(), launcher.clone());
    let (watched, uid) = (Arc::clone(watched), uid.clone());
    tokio::spawn(async move {
        let mut seen = seen;
        while let Ok(status) = launcher.status_after(seen, WAIT).await {
            seen = status.generation;
            queue.ring(key.clone());
        }
        watched.lock().unwrap_or_else(PoisonError::into_inner).remove(&uid);
        queue.ring(key);
    });
}

impl Guest<'_> {
    pub(super) fn status(&self) -> Status {
        self.vmi.status.clone().unwrap_or_default()
    }

    fn leaves(&self) -> bool {
        self.vmi.metadata.deletion_timestamp.is_some()
    }

    pub(super) async fn say(&self, kind: Kind, reason: &str, message: &str) {
        self.shared.events.say(&reference(&*self.vmi), kind, reason, message).await;
    }

    async fn look_after(&self, found: &Found) -> kube::Result<Next> {
        match found.phase {
            Does::Empty if self.leaves() => {
                self.end(Phase::Succeeded, "it was deleted before its guest was started").await
            }
            Does::Empty => self.begin().await,
            Does::Starting | Does::Receiving => Ok(Next::After(SOON)),
            Does::Running | Does::Paused | Does::ShuttingDown => {
                if self.leaves() {
                    self.shut_down(found).await;
                }
                self.show(found).await?;
                self.send_away(found).await
            }
            Does::Stopped => {
                let phase = if found.broke { Phase::Failed } else { Phase::Succeeded };
                let reason = found.reason.clone().unwrap_or_default();
                self.end(phase, &reason).await
            }
            // The record stays this pod's, where the guest went to another VMI's.
            Does::Left => self.has_left(found).await,
        }
    }

    /// Lets the guest shut down in the time that it has.
    async fn shut_down(&self, found: &Found) {
        let grace = self.vmi.parse().map(|spec| spec.grace()).unwrap_or_default();
        let asked = match found.phase {
            Does::ShuttingDown => return,
            // One that stands still hears nothing.
            Does::Paused => self.launcher.kill().await,
            _ if grace == 0 => self.launcher.kill().await,
            _ => self.launcher.shut_down(Duration::from_secs(grace)).await,
        };
        match asked {
            Ok(_) => self.say(Kind::Normal, "ShuttingDown", "Signaled Graceful Shutdown").await,
            Err(error) => tracing::warn!(vm = self.vm, "{}", launcher::chain(&error)),
        }
    }

    /// Prepares what the guest needs and starts it.
    async fn begin(&self) -> kube::Result<Next> {
        let Some(cluster) = self.shared.cluster() else {
            return Ok(Next::After(SOON));
        };
        match self.try_begin(&cluster).await {
            Ok(()) => {
                self.say(Kind::Normal, "Started", "VirtualMachineInstance started.").await;
                Ok(Next::After(Duration::ZERO))
            }
            Err(Refusal { reason, message, is_final }) => {
                self.say(Kind::Warning, reason, &message).await;
                let mut status = self.status();
                let now = Timestamp::now();
                let since = status.phase_transition_timestamps.last();
                let since = since.and_then(|t| t.at());
                let late = since.is_some_and(|at: Timestamp| now.duration_since(at) > START);
                let wrong = Condition::new(types::SYNCHRONIZED, false, reason, &message);
                status.conditions = conditions::merge(&status.conditions, vec![wrong], &[], now);
                if is_final || late {
                    status.enter(Phase::Failed, now);
                    status.reason = Some(reason.into());
                }
                self.write(status).await?;
                Ok(Next::Failed)
            }
        }
    }

    /// The claims that this pod has in other places than the VMI's, by their volumes.
    pub(super) fn other_claims(&self) -> BTreeMap<String, String> {
        let own = self.vmi.parse().map(|spec| spec.claims()).unwrap_or_default();
        let mut claims = records::volumes(&self.pod);
        claims.retain(|volume, claim| own.get(volume).is_some_and(|own| own != claim));
        claims
    }

    /// The claims of this pod to which disks are copied when the guest comes to it, by their volumes.
    pub(super) fn copied_claims(&self) -> BTreeMap<String, String> {
        match self.vmi.annotations().contains_key(keys::RECEIVES) {
            true => records::volumes(&self.pod),
            false => self.other_claims(),
        }
    }

    /// The claims that are the VM's, as the owner record says it, by their volumes.
    fn own_volumes(&self) -> BTreeMap<String, String> {
        let record = get(&self.shared.owners, self.key);
        record.and_then(|record| record.status.clone()).unwrap_or_default().volumes
    }

    /// Refuses disks that hold old data, or half of it; the owner record knows the VM's own.
    fn check_disks(&self) -> Result<(), Refusal> {
        let own = self.own_volumes();
        for (volume, claim) in records::volumes(&self.pod) {
            let key = (self.key.0.clone(), claim.clone());
            let Some(found) = get(&self.shared.claims, &key) else { continue };
            let note = |key: &'static str| Some((key, found.annotations().get(key)?));
            let stale = note(keys::INCOMPLETE).or_else(|| note(keys::SUPERSEDED));
            if let Some((key, note)) = stale.filter(|_| own.get(&volume) != Some(&claim)) {
                return Err(Refusal {
                    reason: "StaleDisk",
                    message: format!(
                        "claim {claim} of volume {volume} is not to be started from ({note}): name the \
                         claim with the VM's data, or remove annotation {key} if you know better"
                    ),
                    is_final: false,
                });
            }
        }
        Ok(())
    }

    async fn try_begin(&self, cluster: &KubeVirt) -> Result<(), Refusal> {
        self.check_disks()?;
        let (spec, vm) = self.arrange(cluster).await?;
        let started = match spec.start_strategy.as_deref() {
            Some("Paused") => self.launcher.start_paused(&vm).await,
            _ => self.launcher.start(&vm, false).await,
        };
        started.map(|_| ()).map_err(|error| Refusal {
            reason: "SyncFailed",
            is_final: matches!(error, launcher::client::Error::Refused { status: 400, .. }),
            message: launcher::chain(&error),
        })
    }

    /// Prepares what the guest needs in this pod, and says how it is to be run here.
    pub(super) async fn arrange(&self, cluster: &KubeVirt) -> Result<(Spec, VmSpec), Refusal> {
        let last = |message: String| Refusal { reason: "SyncFailed", message, is_final: true };
        let mut spec = self.vmi.parse().map_err(last)?;
        // A guest that moves may come to other disks than it has.
        spec.use_claims(&records::volumes(&self.pod));
        let Claims { blocks, mut shared, sizes, blanks } = self.claims(&spec, cluster);
        // Those are copied, whoever else could use them.
        shared.extend(self.copied_claims().into_values().map(|claim| (claim, false)));
        let pod = doors::folder(&self.shared.config.pods(), &self.pod);
        let taps = network::prepare(&spec, &pod).await.map_err(|message| Refusal {
            reason: "FailedNetwork",
            message,
            is_final: false,
        })?;
        let facts = Facts {
            vm: self.vm.clone(),
            cluster,
            blocks,
            shared,
            address: self.address().and_then(|ip| ip.parse().ok()),
            sizes,
            blanks,
            taps,
        };
        let vm = translate::spec(&spec, &facts).map_err(last)?;
        let folder = pod.join("prepared");
        files::prepare(self.shared, &self.vmi, &spec, &folder).await.map_err(|unprepared| {
            let files::Unprepared { reason, message } = unprepared;
            Refusal { reason, message, is_final: false }
        })?;
        Ok((spec, vm))
    }

    /// What is known of the VMI's claims.
    fn claims(&self, spec: &Spec, cluster: &KubeVirt) -> Claims {
        let grows = cluster.spec.gate("ExpandDisks");
        let own = self.own_volumes();
        let mut all = Claims::default();
        for name in spec.volumes.iter().filter_map(|volume| volume.claim()) {
            let key = (self.key.0.clone(), name.to_owned());
            let Some(claim) = get(&self.shared.claims, &key) else { continue };
            let wanted = claim.spec.clone().unwrap_or_default();
            let is_block = wanted.volume_mode.as_deref() == Some("Block");
            let modes = wanted.access_modes.unwrap_or_default();
            let capacity = claim.status.as_ref().and_then(|s| s.capacity.as_ref()?.get("storage"));
            let capacity = capacity.and_then(|size| api::quantity::bytes(&size.0));
            all.blocks.insert(name.to_owned(), is_block);
            all.shared.insert(name.to_owned(), modes.iter().any(|mode| mode == "ReadWriteMany"));
            let Some(size) = capacity.filter(|_| !is_block).and_then(room) else { continue };
            if grows {
                all.sizes.insert(name.to_owned(), size);
            }
            // N.B. a disk that was there once is not replaced by an empty one.
            if !is_filled(&claim) && !own.values().any(|taken| taken == name) {
                all.blanks.insert(name.to_owned(), size);
            }
        }
        all
    }

    fn address(&self) -> Option<String> {
        self.pod.status.as_ref().and_then(|status| status.pod_ip.clone())
    }

    /// Tells how a guest is that runs.
    async fn show(&self, found: &Found) -> kube::Result<()> {
        let mut status = self.status();
        let now = Timestamp::now();
        let first = status.phase != Phase::Running;
        if first || status.machine.is_none() {
            // N.B. one that has just ended tells so itself.
            let Ok(Some(vm)) = self.launcher.spec().await else { return Ok(()) };
            self.describe(&mut status, &vm);
        }
        status.enter(Phase::Running, now);
        status.node_name = Some(self.shared.config.node.clone());
        status.reason = None;
        let mut new = vec![Condition::new(types::READY, true, "", "")];
        new.extend(self.mobility(&mut status));
        if found.phase == Does::Paused {
            let message = "VMI was paused by user";
            new.push(Condition::new(types::PAUSED, true, "PausedByUser", message));
        }
        if let Ok((_, unknown)) = api::support::parse::<Spec>(&self.vmi.spec.0)
            && !unknown.is_empty()
        {
            let message = format!("these have no effect: {}", unknown.join(", "));
            new.push(Condition::new(types::UNSUPPORTED_FIELDS, true, "NotSupported", &message));
        }
        let gone = [types::PAUSED, types::SYNCHRONIZED, types::IN_DOUBT, types::UNSUPPORTED_FIELDS];
        status.conditions = conditions::merge(&status.conditions, new, &gone, now);
        self.write(status).await
    }

    /// What the guest is: written once for each node.
    pub(super) fn describe(&self, status: &mut Status, vm: &VmSpec) {
        status.machine = Some(Machine { kind: vm.machine.clone() });
        let Ok(spec) = self.vmi.parse() else { return };
        status.current_cpu_topology = Some(spec.domain.cpu.topology());
        status.memory = spec.memory().map(|memory| MemoryStatus {
            guest_at_boot: Some(memory.clone()),
            guest_current: Some(memory.clone()),
            guest_requested: Some(memory.clone()),
        });
        let address = self.address();
        let interfaces = spec.domain.devices.interfaces.iter().map(|interface| {
            let masquerade = interface.bridge.is_none();
            let address = address.clone().filter(|_| masquerade);
            InterfaceStatus {
                name: interface.name.clone(),
                ip_addresses: address.clone().into_iter().collect(),
                ip_address: address,
                mac: Some(translate::mac(interface)),
                info_source: Some("domain".into()),
            }
        });
        status.interfaces = interfaces.collect();
        let targets = translate::targets(vm);
        for (disk, (target, vm)) in
            spec.domain.devices.disks.iter().zip(targets.iter().zip(&vm.disks))
        {
            let volume = status.volume_status.iter_mut().find(|v| v.name == disk.name);
            if let Some(volume) = volume {
                volume.target.clone_from(target);
                let size = std::fs::metadata(&vm.path).map(|found| found.len()).ok();
                volume.size = size.and_then(|size| i64::try_from(size).ok());
            }
        }
    }

    /// The guest has ended.
    async fn end(&self, phase: Phase, reason: &str) -> kube::Result<Next> {
        let mut status = self.status();
        let now = Timestamp::now();
        let warning = phase == Phase::Failed;
        status.enter(phase, now);
        let message = if warning { "GuestFailed" } else { "GuestNotRunning" };
        if warning {
            status.reason = Some(message.into());
        }
        let ready = Condition::new(types::READY, false, message, reason);
        status.conditions =
            conditions::merge(&status.conditions, vec![ready], &[types::PAUSED], now);
        self.write(status).await?;
        match warning {
            true => {
                self.say(
                    Kind::Warning,
                    "Stopped",
                    &format!("The VirtualMachineInstance crashed: {reason}"),
                )
                .await
            }
            false => {
                self.say(Kind::Normal, "Stopped", "The VirtualMachineInstance was shut down.").await
            }
        }
        Ok(Next::Rest)
    }

    pub(super) async fn write(&self, status: Status) -> kube::Result<()> {
        if self.vmi.status.as_ref() == Some(&status) {
            return Ok(());
        }
        let vmis: Api<VirtualMachineInstance> =
            Api::namespaced(self.shared.client.clone(), &self.key.0);
        let mut value = serde_json::to_value(&status).map_err(kube::Error::SerdeError)?;
        // A merge patch removes what is null.
        for (field, is_none) in [
            ("reason", status.reason.is_none()),
            ("evacuationNodeName", status.evacuation_node_name.is_none()),
        ] {
            if is_none {
                value[field] = serde_json::Value::Null;
            }
        }
        let read = json!({"resourceVersion": self.vmi.resource_version()});
        let patch = Patch::Merge(json!({"metadata": read, "status": value}));
        match vmis.patch_status(&self.key.1, &PatchParams::default(), &patch).await {
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            other => other.map(|_| ()),
        }
    }
}

/// Facts of claims, by their names.
#[derive(Default)]
struct Claims {
    /// Whether it is a device.
    blocks: BTreeMap<String, bool>,
    /// Whether it can be used on several nodes at once.
    shared: BTreeMap<String, bool>,
    /// To how many bytes the disk of one that is a folder may grow.
    sizes: BTreeMap<String, u64>,
    /// How large its disk is to be, of one that is a folder in which there may be none yet.
    blanks: BTreeMap<String, u64>,
}

/// Whether somebody else puts a disk into a claim: a DataVolume, or a migration.
fn is_filled(claim: &PersistentVolumeClaim) -> bool {
    let is_cdi = |key: &String| key.starts_with("cdi.kubevirt.io/");
    claim.owner_references().iter().any(|owner| owner.kind == "DataVolume")
        || claim.annotations().keys().any(is_cdi)
        || [keys::INCOMPLETE, keys::SUPERSEDED]
            .iter()
            .any(|key| claim.annotations().contains_key(*key))
}

/// What a disk may take of a file system of that size: as CDI has it, all but 6 % of the disk, and
/// whole MiB.
fn room(capacity: i128) -> Option<u64> {
    const PERCENT: i128 = 106;
    let bytes = u64::try_from(capacity.checked_mul(100)? / PERCENT).ok()?;
    Some(bytes >> 20 << 20)
}

/// Why a guest is not started.
pub(super) struct Refusal {
    pub(super) reason: &'static str,
    pub(super) message: String,
    /// Another try would end the same way.
    pub(super) is_final: bool,
}
