//! The cluster's settings and what follows from them; what classes of storage can do.

use crate::world::{World, key};
use crate::{components, synchronizer};
use api::conditions::{self, Condition};
use api::datavolume::{ClaimProperties, ProfileStatus, StorageProfile};
use api::kubevirt::{KNOWN_GATES, KubeVirt, Status};
use jiff::Timestamp;
use k8s_openapi::api::storage::v1::StorageClass;
use kube::api::{Patch, PatchParams, PostParams};
use kube::runtime::reflector::ObjectRef;
use kube::{Api, ResourceExt};
use reconcile::events::{Kind, why};
use reconcile::kept::reference;
use reconcile::queue::Next;
use serde_json::json;

/// Runs the reconciler. Never ends by itself.
pub async fn run(world: World) {
    let queue = world.settings_queue.clone();
    queue.ring(());
    queue
        .run(1, move |()| {
            let world = world.clone();
            async move {
                match reconcile(&world).await {
                    Ok(()) => Next::Rest,
                    Err(error) => {
                        tracing::warn!("the settings cannot be followed: {}", why(&error));
                        Next::Failed
                    }
                }
            }
        })
        .await;
}

async fn reconcile(world: &World) -> kube::Result<()> {
    for class in world.classes.state() {
        profile(world, &class).await?;
    }
    for settings in world.settings.state() {
        observe(world, &settings).await?;
    }
    if let Some(settings) = world.cluster() {
        synchronizer::follow(&world.client, &settings.spec).await?;
    }
    Ok(())
}

/// Gates that are named and mean nothing here.
fn unknown_gates(settings: &KubeVirt) -> Vec<&str> {
    let gates = settings.spec.configuration.developer_configuration.feature_gates.iter();
    gates.map(String::as_str).filter(|gate| !KNOWN_GATES.contains(gate)).collect()
}

async fn observe(world: &World, settings: &KubeVirt) -> kube::Result<()> {
    let old = settings.status.clone().unwrap_or_default();
    let unknown = unknown_gates(settings);
    let now = Timestamp::now();
    let judged = components::judge(&old, &world.components.state(), now);
    let mut new =
        vec![Condition::new("Created", true, "AllResourcesCreated", "All resources were created.")];
    if !unknown.is_empty() {
        let message = format!("feature gates without effect here: {}", unknown.join(", "));
        new.push(Condition::new("UnknownFeatureGates", true, "NotSupported", &message));
        if old.observed_generation != settings.metadata.generation {
            let about = reference(settings);
            world.events.say(&about, Kind::Warning, "UnknownFeatureGates", &message).await;
        }
    }
    let gone = ["UnknownFeatureGates"];
    let version = Some(format!("v{}", env!("CARGO_PKG_VERSION")));
    let status = Status {
        conditions: conditions::merge(&judged.conditions, new, &gone, now),
        observed_generation: settings.metadata.generation,
        operator_version: version.clone(),
        observed_version: version,
        ..judged
    };
    if settings.status.as_ref() == Some(&status) {
        return Ok(());
    }
    let (namespace, name) = key(settings);
    let patch = json!({"status": status});
    let api = world.api::<KubeVirt>(&namespace);
    crate::vm::ignore_gone(
        api.patch_status(&name, &PatchParams::default(), &Patch::Merge(&patch)).await,
    )
}

/// What is known of a class from who provisions it.
fn properties(class: &StorageClass) -> Vec<ClaimProperties> {
    let set = |access: &str, volume: &str| ClaimProperties {
        access_modes: vec![access.into()],
        volume_mode: Some(volume.into()),
    };
    match &*class.provisioner {
        "storage.godwit.dev/local" => vec![set("ReadWriteOnce", "Filesystem")],
        "storage.godwit.dev/local-block" => vec![set("ReadWriteOnce", "Block")],
        "storage.godwit.dev/scratch" => {
            vec![set("ReadWriteOnce", "Filesystem"), set("ReadWriteOnce", "Block")]
        }
        "storage.godwit.dev/shared" => vec![set("ReadWriteMany", "Filesystem")],
        "storage.godwit.dev/shared-block" => vec![set("ReadWriteMany", "Block")],
        // What every provisioner can.
        _ => vec![set("ReadWriteOnce", "Filesystem")],
    }
}

/// Every class has a profile of its name.
async fn profile(world: &World, class: &StorageClass) -> kube::Result<()> {
    let profiles: Api<StorageProfile> = Api::all(world.client.clone());
    let name = class.name_any();
    let found = match world.profiles.get(&ObjectRef::new(&name)) {
        Some(found) => found,
        None => {
            let made = StorageProfile::new(&name, Default::default());
            match profiles.create(&PostParams::default(), &made).await {
                Err(kube::Error::Api(status)) if status.reason == "AlreadyExists" => {
                    std::sync::Arc::new(profiles.get(&name).await?)
                }
                other => std::sync::Arc::new(other?),
            }
        }
    };
    let said = found.spec.claim_property_sets.clone();
    let status = ProfileStatus {
        claim_property_sets: if said.is_empty() { properties(class) } else { said },
        provisioner: Some(class.provisioner.clone()),
        storage_class: Some(name.clone()),
    };
    if found.status.as_ref() == Some(&status) {
        return Ok(());
    }
    let patch = json!({"status": status});
    crate::vm::ignore_gone(
        profiles.patch_status(&name, &PatchParams::default(), &Patch::Merge(&patch)).await,
    )
}
