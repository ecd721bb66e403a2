//! Laws of what becomes of a DataVolume, with watches that are late and steps that fail.

use super::claim::Terms;
use super::plan::{Action, Snapshot, may_fill, plan};
use api::datavolume::{DataVolume, Phase};
use api::import::{Progress, Step};
use api::keys;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use kube::ResourceExt;
use proptest::prelude::*;
use serde_json::{Value, json};
use std::sync::Arc;

/// What happens.
#[derive(Debug, Clone, Copy)]
enum Happens {
    /// The controller plans with what it has seen, and does so many steps of it.
    Acts(usize),
    SeesVolume,
    SeesClaim,
    SeesPods,
    Binds,
    Runs(u64),
    Restarts,
    Done,
    Lost,
    PodDeleted,
    ClaimDeleted,
    StatusLost,
}

fn happenings() -> impl Strategy<Value = Happens> {
    use Happens::{
        Acts, Binds, ClaimDeleted, Done, Lost, PodDeleted, Restarts, Runs, SeesClaim, SeesPods,
        SeesVolume, StatusLost,
    };
    prop_oneof![
        8 => (0usize..6).prop_map(Acts),
        3 => Just(SeesVolume),
        3 => Just(SeesClaim),
        3 => Just(SeesPods),
        2 => Just(Binds),
        2 => (0u64..=100).prop_map(Runs),
        1 => Just(Restarts),
        2 => Just(Done),
        1 => Just(Lost),
        1 => Just(PodDeleted),
        1 => Just(ClaimDeleted),
        1 => Just(StatusLost),
    ]
}

/// What the API has, and what the controller has seen of it.
struct World {
    volume: DataVolume,
    claim: Option<PersistentVolumeClaim>,
    pods: Vec<Pod>,
    seen: (DataVolume, Option<PersistentVolumeClaim>, Vec<Pod>),
    terms: Arc<Terms>,
    progress: u64,
    now: Timestamp,
    count: u64,
}

fn of<K: serde::de::DeserializeOwned>(object: Value) -> K {
    serde_json::from_value(object).unwrap()
}

fn share(volume: &DataVolume) -> f64 {
    let status = volume.status.clone().unwrap_or_default();
    let text = status.progress.unwrap_or_default();
    text.strip_suffix('%').and_then(|text| text.parse().ok()).unwrap_or(0.0)
}

fn phase(volume: &DataVolume) -> Phase {
    volume.status.as_ref().map(|status| status.phase).unwrap_or_default()
}

impl World {
    fn new() -> Self {
        let volume: DataVolume = of(json!({
            "metadata": {"name": "d", "namespace": "n", "uid": "u", "resourceVersion": "0"},
            "spec": {
                "source": {"http": {"url": "http://example.org/disk"}},
                "pvc": {
                    "storageClassName": "late", "accessModes": ["ReadWriteOnce"],
                    "volumeMode": "Block", "resources": {"requests": {"storage": "1Gi"}},
                },
            },
        }));
        let class = of(json!({
            "metadata": {"name": "late"}, "provisioner": "x",
            "volumeBindingMode": "WaitForFirstConsumer",
        }));
        let terms = Arc::new(Terms { classes: vec![Arc::new(class)], ..Terms::default() });
        let seen = (volume.clone(), None, Vec::new());
        let now = "2026-01-01T00:00:00Z".parse().unwrap();
        Self { volume, claim: None, pods: vec![], seen, terms, progress: 0, now, count: 0 }
    }

    fn version(&mut self) -> Option<String> {
        self.count += 1;
        Some(self.count.to_string())
    }

    fn snapshot(&self) -> Snapshot {
        let (volume, claim, pods) = self.seen.clone();
        let (done, what) = (self.progress, Step::Downloading);
        let progress = Progress { done, total: Some(100), what, broken: None };
        Snapshot {
            offer: None,
            volume: Arc::new(volume),
            claim: claim.map(Arc::new),
            pods: pods.into_iter().map(Arc::new).collect(),
            origin: None,
            progress: Some(progress),
            terms: Arc::clone(&self.terms),
            now: self.now,
        }
    }

    fn act(&mut self, steps: usize) -> Result<(), TestCaseError> {
        let snapshot = self.snapshot();
        for action in plan(&snapshot).actions.into_iter().take(steps) {
            if !self.carry_out(&snapshot, action)? {
                break;
            }
        }
        Ok(())
    }

    /// Does a step as the API would: false if it refuses.
    fn carry_out(&mut self, snapshot: &Snapshot, action: Action) -> Result<bool, TestCaseError> {
        match action {
            Action::CreateSecret(_) | Action::Offer(_) => {}
            Action::CreateLender(_) | Action::GiveToken(_) => prop_assert!(false, "it is no clone"),
            Action::CreateClaim(mut claim) if self.claim.is_none() => {
                claim.metadata.uid = self.version().map(|version| format!("claim-{version}"));
                claim.metadata.resource_version = self.version();
                self.claim = Some(*claim);
            }
            Action::MarkClaim(version) => {
                let next = self.version();
                let Some(claim) = &mut self.claim else { return Ok(true) };
                if claim.metadata.resource_version != version {
                    return Ok(false);
                }
                claim.annotations_mut().insert(keys::POD_PHASE.into(), "Succeeded".into());
                claim.metadata.resource_version = next;
            }
            Action::CreatePod(mut pod) => {
                let live = self.claim.as_ref().is_some_and(|claim| may_fill(&pod, claim));
                if live && self.pods.iter().all(|other| other.name_any() != pod.name_any()) {
                    prop_assert!(phase(&self.volume) != Phase::Succeeded, "it is filled again");
                    let bound =
                        self.claim.as_ref().and_then(|c| c.spec.as_ref()?.volume_name.clone());
                    prop_assert!(bound.is_some(), "it is filled before it is known where");
                    pod.metadata.uid = self.version();
                    self.pods.push(*pod);
                }
            }
            Action::DeletePod { uid, .. } => {
                self.pods.retain(|pod| pod.uid().as_ref() != Some(&uid));
            }
            Action::PatchStatus(status) => {
                if snapshot.volume.resource_version() != self.volume.resource_version() {
                    return Ok(false);
                }
                let before = (share(&self.volume), phase(&self.volume));
                self.volume.status = Some(of(status));
                self.volume.metadata.resource_version = self.version();
                prop_assert!(share(&self.volume) >= before.0, "progress goes back");
                let was_done = before.1 == Phase::Succeeded;
                prop_assert!(!was_done || phase(&self.volume) == Phase::Succeeded);
            }
            Action::CreateClaim(_) | Action::Say { .. } => {}
        }
        prop_assert!(self.pods.len() <= 1, "two importers write to one disk");
        Ok(true)
    }

    fn pod_is(&mut self, status: Value) {
        for pod in &mut self.pods {
            let ended = pod.status.as_ref().and_then(|status| status.phase.as_deref());
            if !matches!(ended, Some("Succeeded" | "Failed")) {
                pod.status = Some(of(status.clone()));
            }
        }
    }

    fn happens(&mut self, what: Happens) -> Result<(), TestCaseError> {
        let container = |state: Value, restarts: u32| {
            json!([{
                "name": "importer", "image": "i", "imageID": "i", "ready": true,
                "restartCount": restarts, "state": state,
            }])
        };
        match what {
            Happens::Acts(steps) => self.act(steps)?,
            Happens::SeesVolume => self.seen.0 = self.volume.clone(),
            Happens::SeesClaim => self.seen.1 = self.claim.clone(),
            Happens::SeesPods => self.seen.2 = self.pods.clone(),
            Happens::Binds => {
                let next = self.version();
                if let Some(claim) = &mut self.claim {
                    claim.spec.get_or_insert_default().volume_name = Some("v".into());
                    claim.status = Some(of(json!({"phase": "Bound"})));
                    claim.metadata.resource_version = next;
                }
            }
            Happens::Runs(progress) => {
                self.progress = progress;
                let running = container(json!({"running": {}}), 0);
                self.pod_is(json!({"phase": "Running", "containerStatuses": running}));
            }
            Happens::Restarts => {
                let ended = json!({"terminated": {"exitCode": 1, "message": "broken"}});
                let ended = container(ended, 1);
                self.pod_is(json!({"phase": "Running", "containerStatuses": ended}));
            }
            Happens::Done => self.pod_is(json!({"phase": "Succeeded"})),
            Happens::Lost => self.pod_is(json!({"phase": "Failed", "reason": "Evicted"})),
            Happens::PodDeleted => self.pods.clear(),
            Happens::ClaimDeleted => self.claim = None,
            Happens::StatusLost => {
                // Somebody restores it without: its claim still knows.
                if self.claim.is_some() || phase(&self.volume) != Phase::Succeeded {
                    self.volume.status = None;
                    self.volume.metadata.resource_version = self.version();
                }
            }
        }
        Ok(())
    }
}

proptest! {
    #[test]
    fn a_disk_is_filled_by_one_at_a_time_and_never_again_and_in_the_end_it_is(
        all in prop::collection::vec(happenings(), 0..60),
    ) {
        let mut world = World::new();
        for what in all {
            world.happens(what)?;
        }
        // From now on nothing goes wrong.
        let in_order = [
            Happens::SeesVolume, Happens::SeesClaim, Happens::SeesPods, Happens::Acts(9),
            Happens::Binds, Happens::Done,
        ];
        for _ in 0..20 {
            world.now += jiff::SignedDuration::from_secs(1000);
            for what in in_order {
                world.happens(what)?;
            }
        }
        prop_assert_eq!(phase(&world.volume), Phase::Succeeded);
        prop_assert!(world.pods.is_empty(), "its importer stays");
    }
}
