//! Laws of storage: what is planned, done step by step in any order of failures, comes to rest
//! with every claim that can be served bound to a volume of its own; and no data of a claim goes.

use k8s_openapi::api::core::v1::{Node, PersistentVolume, PersistentVolumeClaim};
use k8s_openapi::api::storage::v1::StorageClass;
use node::storage::claims::{Claim, POOL, capacity};
use node::storage::disks::Disks;
use node::storage::plan::{Step, Stock, plan, volume_name};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;

const MI: i64 = 1 << 20;

fn object<T: serde::de::DeserializeOwned>(value: &Value) -> Arc<T> {
    Arc::new(serde_json::from_value(value.clone()).unwrap())
}

fn class(name: &str, mode: &str) -> Arc<StorageClass> {
    object(&json!({
        "metadata": {"name": name}, "provisioner": format!("storage.godwit.dev/{name}"),
        "volumeBindingMode": mode, "reclaimPolicy": "Delete", "allowVolumeExpansion": true,
    }))
}

/// The API's objects, and the data that there is.
struct World {
    claims: BTreeMap<String, Value>,
    volumes: BTreeMap<String, Value>,
    pool: i64,
}

impl World {
    fn stock(&self) -> Stock {
        let node: Arc<Node> = object(&json!({"metadata": {
            "name": "n", "labels": {"kubernetes.io/hostname": "n"},
            "annotations": {POOL: self.pool.to_string()},
        }}));
        Stock {
            claims: self.claims.values().map(object).collect(),
            volumes: self.volumes.values().map(object).collect(),
            classes: vec![class("local", "WaitForFirstConsumer"), class("shared", "Immediate")],
            nodes: vec![node],
            shared: self.pool,
        }
    }

    fn reference(claim: &PersistentVolumeClaim) -> Value {
        json!({"namespace": "d", "name": claim.metadata.name, "uid": claim.metadata.uid})
    }

    fn act(&mut self, step: &Step) -> Result<(), TestCaseError> {
        let name = |volume: &PersistentVolume| volume.metadata.name.clone().unwrap();
        let claim_name = |claim: &PersistentVolumeClaim| claim.metadata.name.clone().unwrap();
        match step {
            Step::Provision(claim, class, node) => {
                let affinity = node.as_ref().map(|node| json!({"required": {"nodeSelectorTerms": [
                    {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": [node]}]},
                ]}}));
                let volume = json!({
                    "metadata": {
                        "name": volume_name(claim),
                        "annotations": {"pv.kubernetes.io/provisioned-by": class.provisioner},
                    },
                    "spec": {
                        "capacity": {"storage": claim.size().to_string()},
                        "accessModes": ["ReadWriteOnce"], "nodeAffinity": affinity,
                        "storageClassName": class.metadata.name,
                        "persistentVolumeReclaimPolicy": "Delete",
                        "claimRef": Self::reference(claim),
                    },
                });
                self.volumes.entry(volume_name(claim)).or_insert(volume);
            }
            Step::Reserve(volume, claim) => {
                let volume = self.volumes.get_mut(&name(volume)).unwrap();
                prop_assert!(volume["spec"].get("claimRef").is_none_or(|r| r["uid"].is_null()));
                volume["spec"]["claimRef"] = Self::reference(claim);
            }
            Step::Bind(claim, volume) => {
                let claim = self.claims.get_mut(&claim_name(claim)).unwrap();
                claim["spec"]["volumeName"] = name(volume).into();
                claim["metadata"]["annotations"]["pv.kubernetes.io/bind-completed"] = "yes".into();
            }
            Step::ClaimStatus(claim, volume) => {
                let capacity = self.volumes[&name(volume)]["spec"]["capacity"].clone();
                let claim = self.claims.get_mut(&claim_name(claim)).unwrap();
                claim["status"] = json!({"phase": "Bound", "capacity": capacity});
            }
            Step::Lost(claim) => {
                self.claims.get_mut(&claim_name(claim)).unwrap()["status"] =
                    json!({"phase": "Lost"});
            }
            Step::Expand(volume, claim) => {
                let volume = self.volumes.get_mut(&name(volume)).unwrap();
                volume["spec"]["capacity"]["storage"] = claim.size().to_string().into();
            }
            Step::Phase(volume, phase) => {
                self.volumes.get_mut(&name(volume)).unwrap()["status"] = json!({"phase": phase});
            }
            Step::Reclaim(volume) => {
                let uid = &self.volumes[&name(volume)]["spec"]["claimRef"]["uid"];
                let lives = self.claims.values().any(|claim| claim["metadata"]["uid"] == *uid);
                prop_assert!(!lives, "the data of a claim that lives was reclaimed");
                self.volumes.remove(&name(volume));
            }
            Step::Say(..) => {}
            Step::Unselect(claim, _) => {
                let claim = self.claims.get_mut(&claim_name(claim)).unwrap();
                claim["metadata"]["annotations"]["volume.kubernetes.io/selected-node"] = "".into();
            }
        }
        Ok(())
    }

    fn check(&self) -> Result<(), TestCaseError> {
        let mut owners = Vec::new();
        for claim in self.stock().claims.iter().filter(|claim| claim.is_bound()) {
            let volume = claim.spec.as_ref().unwrap().volume_name.clone().unwrap();
            prop_assert!(!owners.contains(&volume), "{volume} has two claims");
            owners.push(volume);
        }
        for local in [false, true] {
            let volumes = self.stock().volumes;
            let of = |v: &&Arc<PersistentVolume>| {
                v.spec.as_ref().is_some_and(|spec| spec.node_affinity.is_some() == local)
            };
            let used: i64 = volumes.iter().filter(of).map(|volume| capacity(volume)).sum();
            // A person's volumes are small, and are counted to no pool.
            prop_assert!(used <= self.pool + 3 * 40, "a pool gives {used}, and has {}", self.pool);
        }
        Ok(())
    }
}

#[derive(Debug, Clone)]
enum Event {
    Claim(u8, bool, i64),
    Volume(u8, i64),
    Delete(u8),
    Grow(u8, i64),
    /// So many steps of the plan are done, and then the controller ends.
    Work(usize),
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let event = prop_oneof![
        (0u8..6, any::<bool>(), 1i64..70).prop_map(|(n, local, size)| Event::Claim(n, local, size)),
        (0u8..3, 1i64..40).prop_map(|(n, size)| Event::Volume(n, size)),
        (0u8..6).prop_map(Event::Delete),
        (0u8..6, 1i64..60).prop_map(|(n, size)| Event::Grow(n, size)),
        (0usize..9).prop_map(Event::Work),
    ];
    prop::collection::vec(event, 1..40)
}

proptest! {
    #[test]
    fn no_volume_has_two_claims_and_no_data_of_a_claim_goes(events in events()) {
        let mut world = World { claims: BTreeMap::new(), volumes: BTreeMap::new(), pool: 100 * MI };
        for (serial, event) in events.into_iter().enumerate() {
            match event {
                Event::Claim(n, local, size) => {
                    // As the scheduler leaves it, where it waited for a pod.
                    let node = if local { "n" } else { "" };
                    let claim = json!({
                        "metadata": {
                            "name": format!("c{n}"), "namespace": "d", "uid": format!("u{serial}"),
                            "annotations": {"volume.kubernetes.io/selected-node": node},
                        },
                        "spec": {
                            "storageClassName": if local { "local" } else { "shared" },
                            "accessModes": ["ReadWriteOnce"],
                            "resources": {"requests": {"storage": (size * MI).to_string()}},
                        },
                    });
                    world.claims.entry(format!("c{n}")).or_insert(claim);
                }
                Event::Volume(n, size) => {
                    // Made by a person, who counts it to no pool.
                    let volume = json!({
                        "metadata": {"name": format!("v{n}")},
                        "spec": {
                            "capacity": {"storage": size.to_string()},
                            "accessModes": ["ReadWriteOnce"], "storageClassName": "shared",
                            "persistentVolumeReclaimPolicy": "Retain",
                        },
                    });
                    world.volumes.entry(format!("v{n}")).or_insert(volume);
                }
                Event::Delete(n) => drop(world.claims.remove(&format!("c{n}"))),
                Event::Grow(n, size) => {
                    if let Some(claim) = world.claims.get_mut(&format!("c{n}"))
                        && claim["status"]["phase"] == "Bound"
                    {
                        let size = (size * MI).to_string();
                        claim["spec"]["resources"]["requests"]["storage"] = size.into();
                    }
                }
                Event::Work(steps) => {
                    for step in plan(&world.stock()).iter().take(steps) {
                        world.act(step)?;
                    }
                }
            }
            world.check()?;
        }
        // Left alone, it comes to rest.
        for round in 0.. {
            let steps = plan(&world.stock());
            let Some(step) = steps.iter().find(|step| !matches!(step, Step::Say(..))) else { break };
            prop_assert!(round < 500, "it does not come to rest: {step:?}");
            world.act(step)?;
            world.check()?;
        }
        for claim in world.stock().claims {
            let waits = plan(&world.stock()).iter().any(|step| {
                matches!(step, Step::Say(said, ..) if said.metadata.uid == claim.metadata.uid)
            });
            prop_assert!(claim.is_bound() || waits, "{claim:?} is neither bound nor told why");
        }
    }
}

/// A person can write any path into a volume; only what is a volume of ours is removed.
#[test]
fn what_is_no_volume_is_not_removed() {
    let base = tempfile::tempdir().unwrap();
    let disks = Disks::new(base.path().to_owned());
    let local = disks.make(Some("n"), "v", false, 0).unwrap();
    let shared = disks.make(None, "w", true, 7).unwrap();
    let inside = |path: &str| base.path().join(path);
    for path in [
        inside("nodes/n/disk"),
        inside("nodes/n/volumes/disk"),
        inside("nodes/n/volumes/v/other"),
        inside("nodes/n/volumes/../disk"),
        inside("shared/disk"),
        "/etc/data".into(),
    ] {
        let refused = disks.remove(&path).unwrap_err();
        assert!(refused.to_string().contains("is no volume below"), "{refused}");
    }
    assert!(local.is_dir() && std::fs::metadata(&shared).unwrap().len() == 7);
    disks.remove(&local).unwrap();
    disks.remove(&local).unwrap();
    disks.remove(&shared).unwrap();
    assert!(!inside("nodes/n/volumes/v").exists() && !inside("shared/w").exists());
    assert!(inside("nodes/n/volumes").exists());
}
