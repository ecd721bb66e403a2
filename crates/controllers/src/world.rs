//! All that reconcilers look at, kept by watches; and who is rung for what.

use crate::components;
use api::datavolume::{CDIConfig, DataVolume, StorageProfile};
use api::instancetype::{
    OBJECT_KIND, VirtualMachineClusterInstancetype, VirtualMachineClusterPreference,
    VirtualMachineInstancetype, VirtualMachinePreference, wanted,
};
use api::keys;
use api::kubevirt::{self, KubeVirt};
use api::migration::{MigrationPolicy, VirtualMachineInstanceMigration};
use api::owner::OwnerRecord;
use api::vm::VirtualMachine;
use api::vmi::{Phase, VirtualMachineInstance};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::apps::v1::ControllerRevision;
use k8s_openapi::api::core::v1::{Namespace, Node, ObjectReference, PersistentVolumeClaim, Pod};
use k8s_openapi::api::storage::v1::StorageClass;
use kube::api::PostParams;
use kube::runtime::reflector::{ObjectRef, Store};
use kube::runtime::watcher;
use kube::{Api, Client, Resource, ResourceExt};
use reconcile::Queue;
use reconcile::events::{Kind, Recorder, why};
use reconcile::kept::{Keeper, reference};
use reconcile::queue::Next;
use serde::de::DeserializeOwned;
use std::fmt::Display;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A namespace and a name.
pub type Key = (String, String);

/// What was just made is seen within this time.
pub const SEEN: Duration = Duration::from_secs(5);
/// It is looked for this often.
pub const LOOK: Duration = Duration::from_millis(20);
/// A write that another has outrun is tried again after this.
const SOON: Duration = Duration::from_millis(100);

/// The label of importers' pods.
pub const IMPORTER: &str = "importer";

/// All that is kept.
#[derive(Clone)]
pub struct World {
    /// The API.
    pub client: Client,
    /// The image of all pods.
    pub image: Arc<str>,
    /// Says what happens.
    pub events: Recorder,
    /// VMs.
    pub vms: Store<VirtualMachine>,
    /// VMIs.
    pub vmis: Store<VirtualMachineInstance>,
    /// What VMs take.
    pub types: TypeStores,
    /// DataVolumes.
    pub volumes: Store<DataVolume>,
    /// Claims.
    pub claims: Store<PersistentVolumeClaim>,
    /// Launchers', importers' and lenders' pods.
    pub pods: Store<Pod>,
    /// Pods of Godwit's own roles.
    pub components: Store<Pod>,
    /// Owner records.
    pub owners: Store<OwnerRecord>,
    /// Migrations.
    pub migrations: Store<VirtualMachineInstanceMigration>,
    /// How they are made.
    pub policies: Store<MigrationPolicy>,
    /// Namespaces.
    pub namespaces: Store<Namespace>,
    /// Nodes.
    pub nodes: Store<Node>,
    /// Classes of storage.
    pub classes: Store<StorageClass>,
    /// What they can do.
    pub profiles: Store<StorageProfile>,
    /// How disks are imported.
    pub imports: Store<CDIConfig>,
    /// The cluster's settings.
    pub settings: Store<KubeVirt>,
    /// VMs to be looked at.
    pub vm_queue: Queue<Key>,
    /// VMIs to be looked at.
    pub vmi_queue: Queue<Key>,
    /// Migrations to be looked at.
    pub migration_queue: Queue<Key>,
    /// VMIs that may have to leave their nodes.
    pub evacuation_queue: Queue<Key>,
    /// The launchers' versions to be looked at.
    pub workload_queue: Queue<()>,
    /// DataVolumes to be looked at.
    pub volume_queue: Queue<Key>,
    /// The settings to be looked at.
    pub settings_queue: Queue<()>,
}

/// What VMs take from objects of their own.
#[derive(Clone)]
pub struct TypeStores {
    /// Instancetypes of namespaces.
    pub instancetypes: Store<VirtualMachineInstancetype>,
    /// Instancetypes of the cluster.
    pub cluster_instancetypes: Store<VirtualMachineClusterInstancetype>,
    /// Preferences of namespaces.
    pub preferences: Store<VirtualMachinePreference>,
    /// Preferences of the cluster.
    pub cluster_preferences: Store<VirtualMachineClusterPreference>,
    /// Revisions that hold them as they were.
    pub revisions: Store<ControllerRevision>,
}

/// The key of an object.
pub fn key(object: &impl ResourceExt) -> Key {
    (object.namespace().unwrap_or_default(), object.name_any())
}

/// A label of an object.
pub fn label<'a>(object: &'a impl ResourceExt, name: &str) -> Option<&'a str> {
    object.labels().get(name).map(String::as_str)
}

/// The object of a key.
pub fn get<K>(store: &Store<K>, (namespace, name): &Key) -> Option<Arc<K>>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + 'static,
{
    store.get(&ObjectRef::new(name).within(namespace))
}

impl World {
    /// Begins to keep all of it.
    pub fn open(client: Client, image: &str) -> (Self, Keeper) {
        let mut keeper = Keeper::default();
        let (vm_queue, vmi_queue) = (Queue::<Key>::default(), Queue::<Key>::default());
        let (volume_queue, settings_queue) = (Queue::<Key>::default(), Queue::<()>::default());
        let migration_queue = Queue::<Key>::default();
        let (evacuation_queue, workload_queue) = (Queue::<Key>::default(), Queue::<()>::default());
        let (leaves, outdated) = (&evacuation_queue, &workload_queue);
        let all = watcher::Config::default;
        let migrations: Store<VirtualMachineInstanceMigration> =
            keeper.keep_and(Api::all(client.clone()), all(), {
                let (queue, vmi) = (migration_queue.clone(), vmi_queue.clone());
                let (leaves, outdated) = (leaves.clone(), outdated.clone());
                move |object: &VirtualMachineInstanceMigration| {
                    queue.ring(key(object));
                    let of = (object.namespace().unwrap_or_default(), object.spec.vmi_name.clone());
                    vmi.ring(of.clone());
                    leaves.ring(of);
                    outdated.ring(());
                }
            });
        let ring_moves = {
            let (migrations, queue) = (migrations.clone(), migration_queue.clone());
            move |vmi: &Key| ring_moves(&migrations, &queue, vmi)
        };
        let (vm, vmi, dv, kv) = (&vm_queue, &vmi_queue, &volume_queue, &settings_queue);
        let vms: Store<VirtualMachine> = keeper.keep_and(Api::all(client.clone()), all(), {
            let (vm, vmi) = (vm.clone(), vmi.clone());
            move |object: &VirtualMachine| {
                vm.ring(key(object));
                vmi.ring(key(object));
            }
        });
        let vmis: Store<VirtualMachineInstance> =
            keeper.keep_and(Api::all(client.clone()), all(), {
                let (vm, vmi, moves) = (vm.clone(), vmi.clone(), ring_moves.clone());
                let (leaves, outdated) = (leaves.clone(), outdated.clone());
                move |object: &VirtualMachineInstance| {
                    // A VM's VMI has its name.
                    vm.ring(key(object));
                    vmi.ring(key(object));
                    leaves.ring(key(object));
                    outdated.ring(());
                    moves(&key(object));
                }
            });
        let owners = keeper.keep_and(Api::all(client.clone()), all(), {
            let (vm, vmi, moves) = (vm.clone(), vmi.clone(), ring_moves.clone());
            move |object: &OwnerRecord| {
                vm.ring(key(object));
                vmi.ring(key(object));
                moves(&key(object));
            }
        });
        let volumes: Store<DataVolume> = keeper.keep_and(Api::all(client.clone()), all(), {
            let (vm, vmi, dv, waiting) = (vm.clone(), vmi.clone(), dv.clone(), vmis.clone());
            let vms = vms.clone();
            move |object: &DataVolume| {
                dv.ring(key(object));
                ring_changing(&vms, &vm, &key(object));
                ring_waiting(&waiting, &vmi, &key(object));
                if let Some(owner) = owner_of(object, "VirtualMachine") {
                    vm.ring(owner.clone());
                    vmi.ring(owner);
                }
            }
        });
        let claims = keeper.keep_and(Api::all(client.clone()), all(), {
            let (vm, vmi, dv, waiting) = (vm.clone(), vmi.clone(), dv.clone(), vmis.clone());
            let vms = vms.clone();
            move |object: &PersistentVolumeClaim| {
                dv.ring(key(object));
                ring_changing(&vms, &vm, &key(object));
                ring_waiting(&waiting, &vmi, &key(object));
            }
        });
        let kinds = [keys::LAUNCHER, IMPORTER, keys::LENDER].join(", ");
        let ours = all().labels(&format!("{} in ({kinds})", keys::APP));
        let pods = keeper.keep_and(Api::all(client.clone()), ours, {
            let (vmi, dv, moves) = (vmi.clone(), dv.clone(), ring_moves.clone());
            let waiting = vmis.clone();
            move |object: &Pod| {
                if let Some(clone) = lends_to(object) {
                    dv.ring(clone);
                    let claims =
                        claims_of(object).map(|claim| (object.namespace(), claim.to_owned()));
                    for (namespace, claim) in claims {
                        ring_waiting(&waiting, &vmi, &(namespace.unwrap_or_default(), claim));
                    }
                }
                if let Some(owner) = owner_of(object, "VirtualMachineInstance") {
                    moves(&owner);
                    vmi.ring(owner);
                } else if let Some(owner) = owner_of(object, "DataVolume") {
                    dv.ring(owner);
                }
            }
        });
        let parts = format!("{} in ({})", components::LABEL, components::ROLES.join(", "));
        let parts = all().labels(&parts);
        let components = keeper.keep_and(Api::namespaced(client.clone(), api::NAMESPACE), parts, {
            let kv = kv.clone();
            move |_: &Pod| kv.ring(())
        });
        let settings = keeper.keep_and(Api::all(client.clone()), all(), {
            let (kv, outdated) = (kv.clone(), outdated.clone());
            let (leaves, vmis) = (leaves.clone(), vmis.clone());
            move |_: &KubeVirt| {
                kv.ring(());
                outdated.ring(());
                vmis.state().iter().for_each(|vmi| leaves.ring(key(&**vmi)));
            }
        });
        let types = TypeStores {
            instancetypes: keeper.keep_and(Api::all(client.clone()), all(), {
                let (vms, vm) = (vms.clone(), vm.clone());
                move |object: &VirtualMachineInstancetype| ring_takers(&vms, &vm, object)
            }),
            cluster_instancetypes: keeper.keep_and(Api::all(client.clone()), all(), {
                let (vms, vm) = (vms.clone(), vm.clone());
                move |object: &VirtualMachineClusterInstancetype| ring_takers(&vms, &vm, object)
            }),
            preferences: keeper.keep_and(Api::all(client.clone()), all(), {
                let (vms, vm) = (vms.clone(), vm.clone());
                move |object: &VirtualMachinePreference| ring_takers(&vms, &vm, object)
            }),
            cluster_preferences: keeper.keep_and(Api::all(client.clone()), all(), {
                let (vms, vm) = (vms.clone(), vm.clone());
                move |object: &VirtualMachineClusterPreference| ring_takers(&vms, &vm, object)
            }),
            revisions: keeper.keep_and(Api::all(client.clone()), all().labels(OBJECT_KIND), {
                let (vms, vm) = (vms.clone(), vm.clone());
                move |object: &ControllerRevision| ring_takers(&vms, &vm, object)
            }),
        };
        let classes = keeper.keep_and(Api::all(client.clone()), all(), {
            let kv = kv.clone();
            move |_: &StorageClass| kv.ring(())
        });
        let nodes = keeper.keep_and(Api::all(client.clone()), all(), {
            let (leaves, vmis) = (leaves.clone(), vmis.clone());
            move |node: &Node| ring_guests(&vmis, &leaves, &node.name_any())
        });
        let policies = keeper.keep(Api::all(client.clone()), all());
        let namespaces = keeper.keep(Api::all(client.clone()), all());
        let profiles = keeper.keep(Api::all(client.clone()), all());
        let imports = keeper.keep(Api::all(client.clone()), all());
        let world = Self {
            events: Recorder::new(client.clone(), "virt-controller", None),
            client,
            image: image.into(),
            vms,
            vmis,
            types,
            volumes,
            claims,
            pods,
            components,
            owners,
            migrations,
            policies,
            namespaces,
            nodes,
            classes,
            profiles,
            imports,
            settings,
            vm_queue,
            vmi_queue,
            migration_queue,
            evacuation_queue,
            workload_queue,
            volume_queue,
            settings_queue,
        };
        (world, keeper)
    }

    /// Waits until a first list of each kind is there.
    pub async fn wait(&self) {
        let Self { vms, vmis, volumes, claims, pods, owners, .. } = self;
        let Self { nodes, classes, profiles, imports, settings, .. } = self;
        let Self { migrations, policies, namespaces, components, .. } = self;
        let TypeStores {
            instancetypes,
            cluster_instancetypes,
            preferences,
            cluster_preferences,
            revisions,
        } = &self.types;
        reconcile::ready!(
            instancetypes,
            cluster_instancetypes,
            preferences,
            cluster_preferences,
            revisions,
        );
        reconcile::ready!(
            vms, vmis, volumes, claims, pods, owners, nodes, classes, profiles, imports, settings,
            migrations, policies, namespaces, components
        );
    }

    /// The API of a kind in a namespace.
    pub fn api<K>(&self, namespace: &str) -> Api<K>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + DeserializeOwned,
    {
        Api::namespaced(self.client.clone(), namespace)
    }

    /// Makes a pod: plans say nothing of the image that it is of.
    ///
    /// # Errors
    /// Those of the API.
    pub async fn create_pod(&self, pod: &Pod) -> kube::Result<Pod> {
        let mut pod = pod.clone();
        for container in pod.spec.iter_mut().flat_map(|spec| &mut spec.containers) {
            container.image = Some(self.image.to_string());
        }
        let pods = self.api::<Pod>(&pod.namespace().unwrap_or_default());
        pods.create(&PostParams::default(), &pod).await
    }

    /// The cluster's settings; None as long as there are none.
    pub fn cluster(&self) -> Option<Arc<KubeVirt>> {
        kubevirt::foremost(self.settings.state())
    }

    /// The migrations of a VMI.
    pub fn moves_of(&self, (namespace, name): &Key) -> Vec<Arc<VirtualMachineInstanceMigration>> {
        let mut all = self.migrations.state();
        all.retain(|m| m.spec.vmi_name == *name && m.namespace().as_ref() == Some(namespace));
        all
    }

    /// Makes a migration, and waits until it is seen: whoever looks again would make a second one,
    /// which is refused. `about` is what it is told of.
    ///
    /// # Errors
    /// Those of the API.
    pub async fn migrate(
        &self,
        namespace: &str,
        migration: &VirtualMachineInstanceMigration,
        about: &ObjectReference,
    ) -> kube::Result<()> {
        let migrations = self.api::<VirtualMachineInstanceMigration>(namespace);
        let made = migrations.create(&PostParams::default(), migration).await?;
        let message = format!("Created Migration {}", made.name_any());
        self.events.say(about, Kind::Normal, "SuccessfulCreate", &message).await;
        let until = Instant::now() + SEEN;
        while get(&self.migrations, &key(&made)).is_none() && Instant::now() < until {
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }

    /// What a reconciler does when it cannot do what it planned: told, and tried again. `reason` is
    /// the event's.
    pub async fn failed<K: Resource<DynamicType = ()>>(
        &self,
        about: &K,
        action: &impl Display,
        reason: &str,
        error: &kube::Error,
    ) -> Next {
        // Another was faster: the change that it made rings again.
        if matches!(error, kube::Error::Api(status) if status.code == 409) {
            return Next::After(SOON);
        }
        let message = format!("cannot {action}: {}", why(error));
        let name = format!("{}/{}", about.namespace().unwrap_or_default(), about.name_any());
        tracing::warn!(kind = %K::kind(&()), name, "{message}");
        self.events.say(&reference(about), Kind::Warning, reason, &message).await;
        Next::Failed
    }

    /// The pods that an object controls.
    pub fn pods_of(&self, uid: &str) -> Vec<Arc<Pod>> {
        let owned = |pod: &Arc<Pod>| pod.owner_references().iter().any(|owner| owner.uid == uid);
        self.pods.state().into_iter().filter(owned).collect()
    }
}

/// Rings for the VMs that take an object, or have a revision.
fn ring_takers(vms: &Store<VirtualMachine>, queue: &Queue<Key>, object: &impl ResourceExt) {
    let (namespace, name) = (object.namespace(), object.name_any());
    let takes = |vm: &VirtualMachine| {
        let all = wanted(&vm.spec, vm.status.as_ref());
        (namespace.is_none() || vm.namespace() == namespace)
            && all.iter().any(|one| one.name == name || one.revision.as_ref() == Some(&name))
    };
    vms.state().iter().filter(|vm| takes(vm)).for_each(|vm| queue.ring(key(&**vm)));
}

/// Rings for the VMs whose disks are to move to a claim.
fn ring_changing(vms: &Store<VirtualMachine>, queue: &Queue<Key>, (namespace, claim): &Key) {
    let names = |vm: &VirtualMachine| {
        let volumes = vm.spec.template.spec["volumes"].as_array();
        volumes.into_iter().flatten().any(|volume| {
            volume["persistentVolumeClaim"]["claimName"] == **claim
                || volume["dataVolume"]["name"] == **claim
        })
    };
    let changes = |vm: &VirtualMachine| {
        vm.spec.update_volumes_strategy.as_deref() == Some("Migration")
            && vm.namespace().as_ref() == Some(namespace)
            && names(vm)
    };
    vms.state().iter().filter(|vm| changes(vm)).for_each(|vm| queue.ring(key(&**vm)));
}

/// Rings for the migrations of a VMI.
fn ring_moves(
    migrations: &Store<VirtualMachineInstanceMigration>,
    queue: &Queue<Key>,
    (namespace, name): &Key,
) {
    let all = migrations.state();
    let of = |m: &&Arc<VirtualMachineInstanceMigration>| {
        m.spec.vmi_name == *name && m.namespace().as_ref() == Some(namespace)
    };
    all.iter().filter(of).for_each(|migration| queue.ring(key(&**migration)));
}

/// Rings for the VMIs on a node.
fn ring_guests(vmis: &Store<VirtualMachineInstance>, queue: &Queue<Key>, node: &str) {
    let is_on = |vmi: &VirtualMachineInstance| {
        vmi.status.as_ref().and_then(|status| status.node_name.as_deref()) == Some(node)
    };
    vmis.state().iter().filter(|vmi| is_on(vmi)).for_each(|vmi| queue.ring(key(&**vmi)));
}

/// Rings for the VMIs that wait for a claim, whoever makes it.
fn ring_waiting(vmis: &Store<VirtualMachineInstance>, queue: &Queue<Key>, claim: &Key) {
    let waits = |vmi: &VirtualMachineInstance| {
        let phase = vmi.status.as_ref().map(|status| status.phase).unwrap_or_default();
        let volumes = || vmi.parse().map(|spec| spec.volumes).unwrap_or_default();
        phase == Phase::Pending
            && vmi.namespace().as_ref() == Some(&claim.0)
            && volumes().iter().any(|volume| volume.claim() == Some(&claim.1))
    };
    vmis.state().iter().filter(|vmi| waits(vmi)).for_each(|vmi| queue.ring(key(&**vmi)));
}

/// The key of the DataVolume that a lender lends to. None of other pods.
pub fn lends_to(pod: &Pod) -> Option<Key> {
    let lends = label(pod, keys::APP) == Some(keys::LENDER);
    let (namespace, name) = pod.annotations().get(keys::LENDS_TO)?.split_once('/')?;
    lends.then(|| (namespace.to_owned(), name.to_owned()))
}

/// The claims that a pod has.
pub fn claims_of(pod: &Pod) -> impl Iterator<Item = &str> {
    let volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
    volumes.filter_map(|volume| Some(&*volume.persistent_volume_claim.as_ref()?.claim_name))
}

/// Whether a pod that has not ended has a claim.
pub fn mounts(pod: &Pod, claim: &str) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    !matches!(phase, Some("Succeeded" | "Failed")) && claims_of(pod).any(|used| used == claim)
}

/// An answer as of the API, to what it was not asked because it cannot be done now.
pub fn refusal(code: u16, reason: &str, message: &str) -> kube::Error {
    kube::Error::Api(Box::new(kube::core::Status::failure(message, reason).with_code(code)))
}

/// The key of an object's owner of a kind.
pub fn owner_of(object: &impl ResourceExt, kind: &str) -> Option<Key> {
    let owner = object.owner_references().iter().find(|owner| owner.kind == kind)?;
    Some((object.namespace().unwrap_or_default(), owner.name.clone()))
}
