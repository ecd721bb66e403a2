//! The Kubernetes types of VMs: what of KubeVirt's and CDI's API Godwit does, its defaults and
//! its validation, and the CRDs.
//!
//! A type here has exactly the fields that Godwit acts on. What an object has besides is known by
//! its schema (`crds/`, made by `scripts/crds`), and found by [`support`]: it is refused or warned
//! of, never silently ignored. So objects are never written back from these types; they are
//! patched.

pub mod conditions;
pub mod datavolume;
pub mod duration;
pub mod eviction;
pub mod import;
pub mod instancetype;
pub mod kubevirt;
pub mod link;
pub mod migration;
pub mod owner;
pub mod processor;
pub mod quantity;
pub mod relocation;
pub mod support;
pub mod validate;
pub mod vm;
pub mod vmi;

use serde_json::Value;

/// Group of VMs.
pub const KUBEVIRT: &str = "kubevirt.io";
/// Group of disks.
pub const CDI: &str = "cdi.kubevirt.io";
/// Group of what is done to VMs.
pub const SUBRESOURCES: &str = "subresources.kubevirt.io";
/// The namespace of Godwit's own objects, as KubeVirt's.
pub const NAMESPACE: &str = "kubevirt";

/// Labels, annotations and finalizers, as KubeVirt has them.
pub mod keys {
    /// Label of a launcher's pod: [`LAUNCHER`].
    pub const APP: &str = "kubevirt.io";
    /// Value of [`APP`].
    pub const LAUNCHER: &str = "virt-launcher";
    /// Value of [`APP`] of a pod that lends a claim's disk to a clone.
    pub const LENDER: &str = "clone-source";
    /// Annotation of a lender's pod: the clone's DataVolume, as namespace/name.
    pub const LENDS_TO: &str = "godwit.dev/lends-to";
    /// Label of a lender's pod: the uid of the clone's DataVolume.
    pub const LENDS_TO_UID: &str = "godwit.dev/lends-to-uid";
    /// Label of a launcher's pod: the VMI's uid.
    pub const CREATED_BY: &str = "kubevirt.io/created-by";
    /// Annotation of a launcher's pod: the VMI's name.
    pub const DOMAIN: &str = "kubevirt.io/domain";
    /// Label of a pod that has claims bound, and runs nothing.
    pub const BINDS: &str = "godwit.dev/binds-claims";
    /// Label of VMI and pod: the node on which it runs.
    pub const NODE: &str = "kubevirt.io/nodeName";
    /// Label of a launcher's pod and of a VMI: the VM's name.
    pub const VM: &str = "vm.kubevirt.io/name";
    /// Label of a node on which VMs can run.
    pub const SCHEDULABLE: &str = "kubevirt.io/schedulable";
    /// What the pod of a guest on KVM asks of its node.
    pub const KVM: &str = "devices.kubevirt.io/kvm";
    /// Labels of such a node begin so: the machine types that its QEMU has.
    pub const MACHINE: &str = "machine-type.node.kubevirt.io/";
    /// Annotation of such a node: when its handler was last heard of.
    pub const HEARTBEAT: &str = "kubevirt.io/heartbeat";
    /// Holds a VMI until its guest has ended for certain.
    pub const VMI_FINALIZER: &str = "foregroundDeleteVirtualMachine";
    /// Holds a VM until its VMI is gone.
    pub const VM_FINALIZER: &str = "kubevirt.io/virtualMachineControllerFinalize";
    /// Holds an owner record until its VM is gone.
    pub const OWNER_FINALIZER: &str = "godwit.dev/owner";
    /// Label of a migration: its VMI's name.
    pub const MIGRATES: &str = "kubevirt.io/vmi-name";
    /// Label of a target's pod: the migration's uid.
    pub const MIGRATION: &str = "kubevirt.io/migrationJobUID";
    /// Annotation of a target's pod: the migration's name.
    pub const MIGRATION_NAME: &str = "kubevirt.io/migrationJobName";
    /// Label of a VMI: the node to which it is moved.
    pub const TARGET_NODE: &str = "kubevirt.io/migrationTargetNodeName";
    /// Holds a migration until what it has made is cleared away.
    pub const MIGRATION_FINALIZER: &str = "kubevirt.io/migrationJobFinalize";
    /// Annotation of a migration: seconds for which its pod may be without a node.
    pub const UNSCHEDULABLE_TIMEOUT: &str = "kubevirt.io/migrationUnschedulablePodTimeoutSeconds";
    /// Annotation of a migration: seconds for which its pod may be unready.
    pub const PENDING_TIMEOUT: &str = "kubevirt.io/migrationPendingPodTimeoutSeconds";
    /// Label of a migration that brings a VM's disks to other claims: the VM's name, or its VMI's
    /// uid where that is too long.
    pub const VOLUME_UPDATE: &str = "kubevirt.io/volume-update-migration";
    /// Annotation of a claim: a VM's disk is being copied to it, and is not whole.
    pub const INCOMPLETE: &str = "godwit.dev/incomplete";
    /// Annotation of a claim: a VM has left it and goes on elsewhere; it holds old data.
    pub const SUPERSEDED: &str = "godwit.dev/superseded";
    /// Annotation of a claim: the VM and the volume whose disk it is or was, `VM/VOLUME`.
    pub const LEFT_BY: &str = "godwit.dev/disk-of";
    /// Annotation of a claim that a VM has left: the disk's mark, by which a way back knows that nobody
    /// has written to it since.
    pub const LEFT_AS: &str = "godwit.dev/left-as";
    /// Annotation of a claim that was made for a disk which followed its guest: the first claim.
    pub const COPY_OF: &str = "godwit.dev/copy-of";
    /// Annotation of a migration: the node from which it takes a guest that is to leave.
    pub const EVACUATION: &str = "kubevirt.io/evacuationMigration";
    /// Annotation of a migration that renews an outdated launcher.
    pub const WORKLOAD_UPDATE: &str = "kubevirt.io/workloadUpdateMigration";
    /// Annotation of a VMI that is to leave its node, and of the migration: who wants it so.
    pub const EVICTION_SOURCE: &str = "kubevirt.io/eviction-source";
    /// Annotation of a launcher's pod that its guest is about to leave, for deschedulers.
    pub const EVICTION_IN_PROGRESS: &str = "descheduler.alpha.kubernetes.io/eviction-in-progress";
    /// Annotation of a launcher's pod: an eviction is asked for, and done by others.
    pub const EVICT_ONLY: &str = "descheduler.alpha.kubernetes.io/request-evict-only";
    /// Annotation of a launcher's pod: the version of Godwit that made it.
    pub const VERSION: &str = "godwit.dev/version";
    /// Label of a VMI whose launcher is of another version.
    pub const OUTDATED: &str = "kubevirt.io/outdatedLauncherImage";
    /// Taint with which a person says that a node is off.
    pub const OUT_OF_SERVICE: &str = "node.kubernetes.io/out-of-service";
    /// The guest does not give back memory that it does not use.
    pub const NO_FREE_PAGE_REPORTING: &str = "kubevirt.io/free-page-reporting-disabled";
    /// Annotation of the bundle of CAs: the cluster's id.
    pub const CLUSTER: &str = "godwit.dev/cluster";
    /// Where the gateway of a node is.
    pub const GATEWAY: &str = "godwit.dev/gateway";
    /// What a VM's run strategy becomes once its guest has arrived.
    pub const RESTORE_STRATEGY: &str = "kubevirt.io/restore-run-strategy";
    /// The VMI waits for its guest.
    pub const RECEIVES: &str = "kubevirt.io/create-migration-target";
    /// How long a migration waits for its other side, seconds.
    pub const SYNC_TIMEOUT: &str = "godwit.dev/synchronizationTimeoutSeconds";
    /// Annotation of a migration, of the sending one where there are two: `true` has its disks compared
    /// before the pod that the guest left goes.
    pub const VERIFY: &str = "godwit.dev/verify";
    /// Annotation of a claim: what a DataVolume has done with it.
    pub const POD_PHASE: &str = "cdi.kubevirt.io/storage.pod.phase";
    /// Annotation of a claim: its content, `kubevirt` for a disk.
    pub const CONTENT: &str = "cdi.kubevirt.io/storage.contentType";
    /// Annotation of a DataVolume: its claim of that name has its content already.
    pub const PRE_POPULATED: &str = "cdi.kubevirt.io/storage.prePopulated";
    /// Annotation of a claim: the name of the DataVolume whose content it has already.
    pub const POPULATED_FOR: &str = "cdi.kubevirt.io/storage.populatedFor";
    /// Annotation of a DataVolume or claim: bind at once, whatever the class says.
    pub const IMMEDIATE: &str = "cdi.kubevirt.io/storage.bind.immediate.requested";
}

/// All CRDs.
pub fn crds() -> impl Iterator<Item = Value> {
    const ALL: [&str; 15] = [
        include_str!("../crds/virtualmachines.kubevirt.io.json"),
        include_str!("../crds/virtualmachineinstances.kubevirt.io.json"),
        include_str!("../crds/virtualmachineinstancemigrations.kubevirt.io.json"),
        include_str!("../crds/kubevirts.kubevirt.io.json"),
        include_str!("../crds/virtualmachineinstancetypes.instancetype.kubevirt.io.json"),
        include_str!("../crds/virtualmachineclusterinstancetypes.instancetype.kubevirt.io.json"),
        include_str!("../crds/virtualmachinepreferences.instancetype.kubevirt.io.json"),
        include_str!("../crds/virtualmachineclusterpreferences.instancetype.kubevirt.io.json"),
        include_str!("../crds/migrationpolicies.migrations.kubevirt.io.json"),
        include_str!("../crds/datavolumes.cdi.kubevirt.io.json"),
        include_str!("../crds/storageprofiles.cdi.kubevirt.io.json"),
        include_str!("../crds/cdiconfigs.cdi.kubevirt.io.json"),
        include_str!("../crds/ownerrecords.godwit.dev.json"),
        include_str!("../crds/clusterlinks.godwit.dev.json"),
        include_str!("../crds/virtualmachinemoves.godwit.dev.json"),
    ];
    ALL.iter().map(|text| serde_json::from_str(text).unwrap_or_default())
}

#[cfg(test)]
mod test {
    #[test]
    fn every_crd_is_whole() {
        for crd in super::crds() {
            assert!(crd["spec"]["versions"][0]["schema"].is_object());
        }
    }
}
