//! The other cluster's part of a VM that comes with all that it needs.

use super::along::{self, bring};
use super::checks::{self, PROTOCOL};
use super::offer::{self, MOVE, Offer};
use super::types::{machine, what};
use crate::ground::Arrival;
use crate::wire::{Spot, Told};
use crate::world::World;
use api::instancetype::revision;
use api::keys;
use api::migration::{
    Receive, Spec as MigrationSpec, VirtualMachineInstanceMigration as Migration,
};
use api::owner::{Ledger, OwnerRecord};
use api::vm::VirtualMachine;
use api::vmi::{Phase, VirtualMachineInstance};
use channel::identity::{Role, SpiffeId};
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::ControllerRevision;
use kube::api::{ApiResource, DeleteParams, DynamicObject, Patch, PatchParams, PostParams};
use kube::{Api, Resource, ResourceExt};
use reconcile::events::why;
use serde_json::{Value, json};
use uuid::Uuid;

/// Annotation of a VM that is made for a move: the cluster that it comes from.
const FROM: &str = "godwit.dev/moved-from";

/// Answers an offer: with all that stands in its way here; or makes it so.
pub async fn offered(world: &World, cluster: &str, id: &str, offer: &Offer, check: bool) -> Told {
    let told = |faults: Vec<String>, warnings| Told::Offered {
        faults,
        warnings,
        address: None,
        waits: None,
        spot: None,
        now: Some(Timestamp::now()),
        protocol: PROTOCOL,
    };
    let came_from = Ledger {
        cluster: cluster.into(),
        namespace: offer.from_namespace.clone(),
        name: offer.from_name.clone(),
    };
    let there = match Place::look(world, offer, &came_from).await {
        Ok(there) => there,
        Err(why) => return told(vec![why], Vec::new()),
    };
    let mut faults = there.faults(world, cluster, id, offer);
    faults.extend(checks::protocol(cluster, offer.protocol));
    let mut warnings = Vec::new();
    // N.B. nothing is made before all of it could be.
    if there.namespace && world.allows(&offer.namespace, cluster) {
        for brought in &offer.brings {
            match bring(world, brought, offer, id, true).await {
                Ok(warning) => warnings.extend(warning),
                Err(why) => faults.push(why),
            }
        }
        if let Err(why) = there.make(world, cluster, id, offer, true).await {
            faults.push(why);
        }
    }
    let mut told = told(faults, warnings);
    let Told::Offered { faults, address, waits, spot, .. } = &mut told else { return told };
    if check {
        match there.spot(world, offer).await {
            Ok(found) => *spot = Some(found),
            Err(more) => faults.extend(more),
        }
    } else if faults.is_empty() {
        match make(world, &there, cluster, id, offer).await {
            Ok(()) => *address = Some(world.address()),
            Err(why) => *waits = Some(why),
        }
    }
    told
}

fn vms(world: &World, namespace: &str) -> Api<DynamicObject> {
    // N.B. as it is sent: with what the types here do not have.
    let kind = ApiResource::erase::<VirtualMachine>(&());
    Api::namespaced_with(world.client.clone(), namespace, &kind)
}

/// What there is of the VM here.
struct Place {
    vm: Option<VirtualMachine>,
    /// It is the VM that has left for where it comes from.
    returns: bool,
    /// Whether a namespace of that name is there.
    namespace: bool,
}

impl Place {
    async fn look(world: &World, offer: &Offer, from: &Ledger) -> Result<Self, String> {
        let (namespace, name) = (&offer.namespace, &offer.name);
        let found: Api<VirtualMachine> = Api::namespaced(world.client.clone(), namespace);
        let vm = found.get_opt(name).await.map_err(|error| why(&error))?;
        let records: Api<OwnerRecord> = Api::namespaced(world.client.clone(), namespace);
        let record = records.get_opt(name).await.map_err(|error| why(&error))?;
        let left = record.and_then(|record| record.status?.has_left());
        let returns = vm.is_some() && left.as_ref() == Some(from);
        Ok(Self { vm, returns, namespace: world.has_namespace(namespace) })
    }

    /// Whether it is the VM that was made for this move.
    fn is_made(&self, id: &str) -> bool {
        self.vm.as_ref().is_some_and(|vm| vm.labels().get(MOVE).is_some_and(|of| of == id))
    }

    /// All that stands in the way of the VM here, as far as objects tell.
    fn faults(&self, world: &World, cluster: &str, id: &str, offer: &Offer) -> Vec<String> {
        let Offer { namespace, name, .. } = offer;
        let own = world.cluster();
        let mut faults = Vec::new();
        if !self.namespace {
            faults.push(format!("cluster {own} has no namespace {namespace}"));
        } else if !world.allows(namespace, cluster) {
            faults.push(format!(
                "namespace {namespace} of cluster {own} takes nothing from cluster {cluster}"
            ));
        }
        if self.vm.is_some() && !self.returns && !self.is_made(id) {
            faults.push(format!("cluster {own} has another VM {namespace}/{name}"));
        }
        let spec = &offer.vm["spec"]["template"]["spec"];
        for interface in spec["domain"]["devices"]["interfaces"].as_array().into_iter().flatten() {
            let Some(mac) = interface["macAddress"].as_str() else { continue };
            if let Some(other) = world.has_address(mac, namespace, name) {
                faults.push(format!("hardware address {mac} is that of {other} in cluster {own}"));
            }
        }
        for template in offer.vm["spec"]["dataVolumeTemplates"].as_array().into_iter().flatten() {
            let class = offer::claim(template)["storageClassName"].as_str();
            if let Some(class) = class.filter(|class| !world.has_class(class)) {
                faults.push(format!("cluster {own} has no storage class {class}"));
            }
        }
        let lacking = world.lacking(&offer.selectors);
        if !lacking.is_empty() {
            let lacking = lacking.join(", ");
            faults.push(format!("no node of cluster {own} has what the guest has: {lacking}"));
        }
        faults
    }

    /// The node that the guest would get, and the way to it.
    async fn spot(&self, world: &World, offer: &Offer) -> Result<Spot, Vec<String>> {
        let failed = |error: serde_json::Error| vec![error.to_string()];
        let mut vmi = json!({
            "metadata": offer.vm["spec"]["template"]["metadata"],
            "spec": machine(&offer.vm["spec"]["template"]["spec"], &offer.revisions),
        });
        let mut templates = offer.vm["spec"]["dataVolumeTemplates"].clone();
        if let Some(vm) = self.vm.as_ref().filter(|_| self.returns) {
            // It has disks there already.
            vmi["spec"] = machine(&vm.spec.template.spec, &offer.revisions);
            templates = Value::Null;
        }
        vmi["metadata"]["name"] = offer.name.as_str().into();
        vmi["metadata"]["namespace"] = offer.namespace.as_str().into();
        // Of one that is not made; as long as a uid is.
        vmi["metadata"]["uid"] = Uuid::nil().to_string().into();
        let claims = templates.as_array().into_iter().flatten().map(|template| {
            serde_json::from_value(json!({
                "metadata": {"name": template["metadata"]["name"], "namespace": offer.namespace},
                "spec": offer::claim(template),
            }))
        });
        // What no node has was told: whether there is a place otherwise?
        let lacking = world.lacking(&offer.selectors);
        let mut selectors = offer.selectors.clone();
        selectors.retain(|name, _| !lacking.contains(&name.as_str()));
        let arrival = Arrival {
            selectors,
            vmi: serde_json::from_value(vmi).map_err(failed)?,
            claims: claims.collect::<Result<_, _>>().map_err(failed)?,
            settings: world.configuration(),
        };
        let found = world.ground.place(arrival).await.map_err(|why| vec![why])?;
        if !found.faults.is_empty() {
            return Err(found.faults);
        }
        let node = found.node.unwrap_or_default();
        let cluster = world.cluster();
        let gateway = world.gateway(&node).ok_or_else(|| {
            vec![format!(
                "node {node} of cluster {cluster} does not say where its gateway is: its handler's log tells more"
            )]
        })?;
        let id = SpiffeId::new(&cluster, Role::Handler, &node);
        Ok(Spot { node, gateway, id: id.map_err(|error| vec![error.to_string()])? })
    }

    /// Makes the VM, or lets the one that has left wait for its guest; or tries only whether the API
    /// would take it.
    async fn make(
        &self,
        world: &World,
        cluster: &str,
        id: &str,
        offer: &Offer,
        try_only: bool,
    ) -> Result<(), String> {
        if !self.namespace || self.is_made(id) {
            return Ok(());
        }
        let api = vms(world, &offer.namespace);
        let failed = |error: kube::Error| why(&error);
        if self.returns {
            let metadata = &offer.vm["metadata"];
            let restore = &metadata["annotations"][keys::RESTORE_STRATEGY];
            let patch = json!({
                "metadata": {
                    "labels": {MOVE: id},
                    "annotations": {keys::RESTORE_STRATEGY: restore, FROM: cluster},
                },
                "spec": {"runStrategy": "WaitAsReceiver", "running": null},
            });
            let params = PatchParams { dry_run: try_only, ..PatchParams::default() };
            let patched = api.patch(&offer.name, &params, &Patch::Merge(&patch)).await;
            return patched.map(|_| ()).map_err(failed);
        }
        if self.vm.is_some() {
            // Another one, which is told of.
            return Ok(());
        }
        let mut object: DynamicObject =
            serde_json::from_value(offer.vm.clone()).map_err(|error| error.to_string())?;
        object.metadata.name = Some(offer.name.clone());
        object.metadata.namespace = Some(offer.namespace.clone());
        object.labels_mut().insert(MOVE.into(), id.into());
        object.annotations_mut().insert(FROM.into(), cluster.into());
        let params = PostParams { dry_run: try_only, ..PostParams::default() };
        match api.create(&params, &object).await {
            Err(kube::Error::Api(status)) if status.reason == "AlreadyExists" && !try_only => {
                Ok(())
            }
            other => other.map(|_| ()).map_err(failed),
        }
    }
}

/// Makes what the guest needs.
///
/// # Errors
/// What is waited for.
async fn make(
    world: &World,
    there: &Place,
    cluster: &str,
    id: &str,
    offer: &Offer,
) -> Result<(), String> {
    for brought in &offer.brings {
        bring(world, brought, offer, id, false).await?;
    }
    there.make(world, cluster, id, offer, false).await?;
    if !there.returns {
        pin(world, offer).await?;
    }
    let Offer { namespace, name, .. } = offer;
    let vmis: Api<VirtualMachineInstance> = Api::namespaced(world.client.clone(), namespace);
    let vmi = vmis.get_opt(name).await.map_err(|error| why(&error))?;
    let phase = vmi.and_then(|vmi| vmi.status).map(|status| status.phase);
    if phase != Some(Phase::WaitingForSync) {
        return Err(format!("VM {namespace}/{name} is made ready to take its guest"));
    }
    let spec = MigrationSpec {
        vmi_name: name.clone(),
        receive: Some(Receive { migration_id: id.into() }),
        ..MigrationSpec::default()
    };
    let mut migration = Migration::new(&migration_name(id), spec);
    migration.labels_mut().insert(MOVE.into(), id.into());
    let migrations: Api<Migration> = Api::namespaced(world.client.clone(), namespace);
    match migrations.create(&PostParams::default(), &migration).await {
        Err(kube::Error::Api(status)) if status.reason == "AlreadyExists" => Ok(()),
        other => other.map(|_| ()).map_err(|error| why(&error)),
    }
}

fn migration_name(id: &str) -> String {
    let id: String = id.chars().filter(|c| *c != '-').take(8).collect();
    format!("receive-{id}")
}

/// Makes the revisions that a VM names: they are the VM's, and go with it.
async fn pin(world: &World, offer: &Offer) -> Result<(), String> {
    let Offer { namespace, name, .. } = offer;
    let revisions: Api<ControllerRevision> = Api::namespaced(world.client.clone(), namespace);
    for sent in offer.revisions.iter().filter(|sent| what(&sent["data"]).is_some()) {
        let called = sent["metadata"]["name"].as_str().unwrap_or_default();
        // N.B. of what was sent its data alone: what else a revision says is whose it is.
        let made = revision(namespace, called, &sent["data"]);
        let mut made: ControllerRevision =
            serde_json::from_value(made).map_err(|error| error.to_string())?;
        let vms: Api<VirtualMachine> = Api::namespaced(world.client.clone(), namespace);
        let vm = vms.get(name).await.map_err(|error| why(&error))?;
        made.metadata.owner_references = vm.owner_ref(&()).map(|owner| vec![owner]);
        match revisions.create(&PostParams::default(), &made).await {
            Err(kube::Error::Api(status)) if status.reason == "AlreadyExists" => {
                let there = revisions.get(called).await.map_err(|error| why(&error))?;
                if there.data != made.data {
                    return Err(format!(
                        "ControllerRevision {namespace}/{called} is there already, and holds \
                         something else: delete it"
                    ));
                }
            }
            other => {
                other.map_err(|error| format!("ControllerRevision {called}: {}", why(&error)))?;
            }
        }
    }
    Ok(())
}

/// Forgets a move. One that failed takes away what it made: if the guest is not here for certain.
pub async fn settle(
    world: &World,
    cluster: &str,
    id: &str,
    (namespace, name): (&str, &str),
    succeeded: bool,
) -> Told {
    match undo(world, cluster, id, (namespace, name), succeeded).await {
        Ok(()) => Told::Settled { waits: None },
        Err(why) => Told::Settled { waits: Some(why) },
    }
}

async fn undo(
    world: &World,
    cluster: &str,
    id: &str,
    (namespace, name): (&str, &str),
    succeeded: bool,
) -> Result<(), String> {
    let failed = |error: kube::Error| why(&error);
    let vms = vms(world, namespace);
    let Some(vm) = vms.get_opt(name).await.map_err(failed)? else { return Ok(()) };
    let own = vm.labels().get(MOVE).is_some_and(|of| of == id)
        && vm.annotations().get(FROM).is_some_and(|from| from == cluster);
    if !own {
        return Ok(());
    }
    if succeeded {
        let forget = Patch::Merge(json!({
            "metadata": {"labels": {MOVE: null}, "annotations": {FROM: null}},
        }));
        return vms.patch(name, &PatchParams::default(), &forget).await.map(|_| ()).map_err(failed);
    }
    let migrations: Api<Migration> = Api::namespaced(world.client.clone(), namespace);
    let receiving = migration_name(id);
    if let Some(migration) = migrations.get_opt(&receiving).await.map_err(failed)?
        && !migration.is_over()
    {
        migrations.delete(&receiving, &DeleteParams::default()).await.map_err(failed)?;
        return Err(format!("migration {namespace}/{receiving} ends"));
    }
    // N.B. the owner record is asked, not how the move went: what has the guest stays.
    let records: Api<OwnerRecord> = Api::namespaced(world.client.clone(), namespace);
    let record = records.get_opt(name).await.map_err(failed)?;
    let status = record.and_then(|record| record.status).unwrap_or_default();
    if status.state == "idle" && !status.owner.is_empty() && !status.is_over() {
        return Ok(());
    }
    if !status.is_over() {
        return Err(format!("who has the guest of {namespace}/{name} is not decided"));
    }
    if status.has_left().is_some() {
        // It was here before: it goes back to what it was.
        let back = Patch::Merge(json!({
            "metadata": {"labels": {MOVE: null}, "annotations": {
                keys::RESTORE_STRATEGY: null, FROM: null,
            }},
            "spec": {"runStrategy": "Halted"},
        }));
        return vms.patch(name, &PatchParams::default(), &back).await.map(|_| ()).map_err(failed);
    }
    along::take_away(world, namespace, id).await?;
    vms.delete(name, &DeleteParams::default()).await.map(|_| ()).map_err(failed)
}
