//! What people see of a DataVolume: its status and its events. Pure.

use super::Waits;
use super::plan::{Action, Snapshot, Way};
use api::conditions::{self, Condition, Is};
use api::datavolume::{DataVolume, Phase, Status};
use api::import::Progress;
use kube::ResourceExt;

/// How far a DataVolume is.
pub struct Stage {
    /// In one word.
    pub phase: Phase,
    /// Its importer runs.
    runs: bool,
    /// What its importer does, or why it does nothing.
    why: Waits,
}

impl Stage {
    /// Its importer does not run.
    pub fn waits(phase: Phase, why: Waits) -> Self {
        Self { phase, runs: false, why }
    }

    /// Its importer runs, and says how far it is.
    pub fn runs(phase: Phase, progress: Option<&Progress>) -> Self {
        let broken = progress.and_then(|progress| progress.broken.as_deref());
        let why = match broken {
            Some(why) => Waits::wrong("TransferBroken", format!("{why}: it is tried again")),
            None => Waits::new("Pod is running", String::new()),
        };
        Self { phase, runs: true, why }
    }

    /// All is done.
    pub fn complete() -> Self {
        Self::waits(Phase::Succeeded, Waits::new("Completed", "Import Complete".into()))
    }
}

impl Waits {
    /// As it was written last.
    pub fn last(status: &Status) -> Self {
        let found = status.conditions.iter().find(|condition| condition.kind == "Running");
        let text = |text: Option<&String>| text.cloned().unwrap_or_default();
        let reason = text(found.and_then(|condition| condition.reason.as_ref()));
        Self::wrong(&reason, text(found.and_then(|condition| condition.message.as_ref())))
    }
}

/// Completes a status.
pub fn show(snapshot: &Snapshot, stage: &Stage, status: &mut Status) {
    let done = stage.phase == Phase::Succeeded;
    status.phase = stage.phase;
    if let Some(claim) = &snapshot.claim {
        status.claim_name = Some(claim.name_any());
    }
    if done {
        status.progress = Some("100.0%".into());
    }
    status.progress.get_or_insert("N/A".into());
    let Waits { reason, message, .. } = &stage.why;
    let ready = match (done, stage.runs) {
        (true, _) => Condition::new("Ready", true, "", ""),
        (false, true) => Condition::new("Ready", false, "TransferRunning", ""),
        (false, false) => Condition::new("Ready", false, reason, message),
    };
    let running = Condition::new("Running", stage.runs, reason, message);
    let new = vec![bound(snapshot), ready, running];
    status.conditions = conditions::merge(&status.conditions, new, &[], snapshot.now);
}

fn bound(snapshot: &Snapshot) -> Condition {
    let Some(claim) = &snapshot.claim else {
        return Condition::new("Bound", false, "NotFound", "No PVC found");
    };
    let phase = claim.status.as_ref().and_then(|status| status.phase.as_deref());
    let phase = phase.unwrap_or("Pending");
    let message = format!("PVC {} {phase}", claim.name_any());
    Condition::new("Bound", Is::from(phase == "Bound"), phase, &message)
}

/// What people are told of a step: the new phase, and what somebody has to do something about.
pub fn tell(volume: &DataVolume, old: &Status, stage: &Stage) -> Vec<Action> {
    let mut all = Vec::new();
    let Waits { reason, message, warning } = &stage.why;
    let before = old.conditions.iter().find(|condition| condition.kind == "Running");
    let said = before.is_some_and(|before| before.message.as_ref() == Some(message));
    if *warning && !said {
        let (reason, message) = (reason.clone(), message.clone());
        all.push(Action::Say { warning: true, reason, message });
    }
    if old.phase != stage.phase && stage.phase != Phase::Failed {
        let (reason, message) = words(volume, stage.phase);
        all.push(Action::Say { warning: false, reason, message });
    }
    all
}

/// What is told of a phase.
fn words(volume: &DataVolume, phase: Phase) -> (String, String) {
    let name = volume.name_any();
    let word = Way::of(volume).map_or("Import", |way| way.word);
    let message = match phase {
        Phase::ImportScheduled | Phase::CloneScheduled | Phase::UploadScheduled => {
            format!("{word} into {name} scheduled")
        }
        Phase::ImportInProgress | Phase::CloneInProgress => {
            format!("{word} into {name} in progress")
        }
        Phase::Succeeded => {
            return (format!("{word}Succeeded"), format!("Successfully filled PVC {name}"));
        }
        Phase::WaitForFirstConsumer => format!("PVC {name} waits for the first pod that uses it"),
        _ => format!("PVC {name} Pending"),
    };
    (format!("{phase:?}"), message)
}

#[cfg(test)]
mod test {
    use super::*;
    use api::import::Step;

    #[test]
    fn a_transfer_that_broke_off_is_somebodys_concern_until_it_goes_on() {
        let broken = Some("no answer".to_owned());
        let mut progress = Progress { done: 1, total: None, what: Step::Downloading, broken };
        let stage = Stage::runs(Phase::ImportInProgress, Some(&progress));
        assert!(stage.runs && stage.why.warning);
        assert_eq!(stage.why.reason, "TransferBroken");
        assert!(stage.why.message.contains("no answer"), "{}", stage.why.message);
        progress.broken = None;
        assert!(!Stage::runs(Phase::ImportInProgress, Some(&progress)).why.warning);
    }
}
