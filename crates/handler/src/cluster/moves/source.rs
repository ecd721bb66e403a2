//! The source's part: to begin a move, to tell how far it is, to end it.

use super::super::Shared;
use super::super::guests::{Guest, SOON};
use super::prepare::{Told, What};
use super::there::There;
use super::way::Way;
use api::conditions::moment;
use api::keys;
use api::migration::{COMPLETION_PER_GIB, VirtualMachineInstanceMigration};
use api::migration::{Compression as Zip, MAX_DOWNTIME_MS, Options, PROGRESS_TIMEOUT, State};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Node;
use kube::api::{ListParams, Patch, PatchParams};
use kube::{Api, ResourceExt};
use launcher::migration::SendRequest;
use launcher::migration::policy::Policy;
use launcher::migration::status::{Half, Outcome, Status as Move};
use launcher::spec::VmSpec;
use launcher::status::Status as Found;
use mover::codec::Compression;
use reconcile::events::{Kind, why};
use reconcile::queue::Next;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// A target that is not ready to receive after this will not be.
const READY: Duration = Duration::from_secs(300);
/// How far a move is is told this often at most.
const TELL: Duration = Duration::from_millis(500);
/// The mode of a move whose guest stands still until it is through; as KubeVirt has it.
const PAUSED: &str = "Paused";

impl Guest<'_> {
    /// Sends the guest away, where the VMI says so.
    pub(in super::super) async fn send_away(&self, found: &Found) -> kube::Result<Next> {
        let Some(state) = self.moves() else { return Ok(Next::Rest) };
        let from = (state.source_node.as_deref(), &state.source_pod);
        if from != (Some(&*self.shared.config.node), &self.pod.metadata.name) {
            return Ok(Next::Rest);
        }
        let Some(migration) = state.attempt().map(str::to_owned) else { return Ok(Next::Rest) };
        let own = |of: &&Move| of.half == Half::Source && of.migration == migration;
        match found.migration.as_ref().filter(own) {
            Some(of) => self.follow(state, &migration, of).await,
            None if state.abort_requested == Some(true) => {
                self.fail(state, &migration, "it was cancelled before it began").await
            }
            None => self.set_out(state, &migration).await,
        }
    }

    /// Has the target prepared, and the launcher send.
    async fn set_out(&self, state: State, migration: &str) -> kube::Result<Next> {
        let policy = policy(state.migration_configuration.as_ref());
        let there = There::find(self.shared, self.key, &state).await;
        let told = match &there {
            Ok(there) => there.ask(What::Prepare { policy: policy.clone() }).await,
            Err(why) => Err(why.clone()),
        };
        let mut ticket = match told {
            Ok(Told::Prepared { ticket }) => *ticket,
            Ok(Told::Refused { why }) => return self.fail(state, migration, &why).await,
            Ok(Told::Comparing { .. } | Told::Judged { .. }) => {
                let why = "the target's node answers what was not asked";
                return self.fail(state, migration, why).await;
            }
            Ok(Told::NotYet { why }) | Err(why) => {
                if self.shared.moves.age(migration) > READY {
                    let why = format!("the target was not ready within {READY:?}: {why}");
                    return self.fail(state, migration, &why).await;
                }
                tracing::debug!(vm = self.vm, why, "the target is not ready");
                return Ok(Next::After(SOON));
            }
        };
        if let Ok(There { way: Some(Way { address, through: Some(why) }), .. }) = there {
            // Its gateway is found by another way than it says.
            ticket.peer.address = address;
            self.say(Kind::Normal, "Relayed", &why).await;
        }
        if let Err(error) = self.launcher.send(&SendRequest { ticket, policy }).await {
            return self.fail(state, migration, &launcher::chain(&error)).await;
        }
        self.tell_start(state).await
    }

    /// Tells that the guest is on its way. N.B. not only once it was sent: that may not have been
    /// heard, or another handler sent it.
    async fn tell_start(&self, mut state: State) -> kube::Result<Next> {
        let node = state.target_node.clone().unwrap_or_default();
        let address = match &state.target_state {
            Some(end) => end.gateway.clone().unwrap_or_default(),
            None => gateway_of(self.shared, &node).await.unwrap_or_default(),
        };
        state.target_node_address = Some(address.rsplit_once(':').map_or("", |(ip, _)| ip).into());
        state.start_timestamp = Some(moment(Timestamp::now()));
        state.mode = Some("PreCopy".into());
        self.write_state(state).await?;
        let message = format!("The VirtualMachineInstance is migrating to node {node}.");
        self.say(Kind::Normal, "Migrating", &message).await;
        Ok(Next::Rest)
    }

    /// A move that has begun.
    async fn follow(&self, mut state: State, migration: &str, of: &Move) -> kube::Result<Next> {
        match &of.outcome {
            // That it has left is told where it is seen: see `has_left`.
            Some(Outcome::Succeeded) => return Ok(Next::After(SOON)),
            Some(Outcome::Failed { reason, .. }) => {
                return self.fail(state, migration, reason).await;
            }
            Some(Outcome::Cancelled) => {
                return self.fail(state, migration, "it was cancelled").await;
            }
            Some(Outcome::InDoubt { .. }) | None => {}
        }
        if state.start_timestamp.is_none() {
            return self.tell_start(state).await;
        }
        self.tell(&state, migration, of).await;
        let late = self.is_late(&mut state, migration).await?;
        let wanted = state.abort_requested == Some(true);
        if (wanted || late) && state.abort_status.is_none() {
            let asked = self.launcher.cancel().await;
            if late && !wanted {
                state.failure_reason = Some("it did not end in the time that it had".into());
            }
            state.abort_status = Some(if asked.is_ok() { "Aborting" } else { "Failed" }.into());
            self.write_state(state).await?;
        }
        Ok(Next::After(TELL))
    }

    /// Whether the move has taken longer than its size allows: twice as long, where its guest may be
    /// stopped until it is through, and was.
    async fn is_late(&self, state: &mut State, migration: &str) -> kube::Result<bool> {
        let options = state.migration_configuration.clone().unwrap_or_default();
        let per_gib = options.completion_timeout_per_gib.unwrap_or(COMPLETION_PER_GIB);
        let began = state.start_timestamp.as_deref().and_then(|at| at.parse::<Timestamp>().ok());
        let (Some(began), Some(size)) = (began, self.size(migration).await) else {
            return Ok(false);
        };
        let allowed = size.saturating_mul(per_gib.max(0));
        let took = Timestamp::now().duration_since(began).as_secs();
        if per_gib <= 0 || took <= allowed {
            return Ok(false);
        }
        if options.allow_workload_disruption != Some(true) || took > allowed.saturating_mul(2) {
            return Ok(true);
        }
        if state.mode.as_deref() != Some(PAUSED) && self.launcher.disrupt().await.is_ok() {
            state.mode = Some(PAUSED.into());
            self.write_state(state.clone()).await?;
            let message = "The guest stands still until it is through: it was not caught in time.";
            self.say(Kind::Normal, "Migrating", message).await;
        }
        Ok(false)
    }

    /// Whole GiB that a move brings over: looked at once.
    async fn size(&self, migration: &str) -> Option<i64> {
        let known = |memory: &super::Memory| memory.known.get(migration)?.size;
        if let Some(size) = known(&self.shared.moves.memory()) {
            return Some(size);
        }
        let size = size_gib(&self.launcher.spec().await.ok()??);
        let mut memory = self.shared.moves.memory();
        memory.known.entry(migration.to_owned()).or_default().size = Some(size);
        Some(size)
    }

    async fn fail(&self, mut state: State, migration: &str, reason: &str) -> kube::Result<Next> {
        state.failed = Some(true);
        state.completed = Some(true);
        state.end_timestamp = Some(moment(Timestamp::now()));
        state.failure_reason = Some(match &state.failure_reason {
            Some(why) => format!("{why}: {reason}"),
            None => reason.to_owned(),
        });
        if state.abort_requested == Some(true) {
            state.abort_status = Some("Succeeded".into());
        }
        self.tell_end(migration).await;
        self.write_state(state).await?;
        let message = format!("VirtualMachineInstance migration uid {migration} failed: {reason}");
        self.say(Kind::Warning, "Migrated", &message).await;
        self.shared.moves.forget(migration);
        Ok(Next::Rest)
    }

    async fn write_state(&self, state: State) -> kube::Result<()> {
        let mut status = self.status();
        status.migration_state = Some(state);
        self.write(status).await
    }

    /// Tells how far the move is, where that has changed.
    async fn tell(&self, state: &State, migration: &str, of: &Move) {
        let progress = json!(of);
        {
            let mut memory = self.shared.moves.memory();
            let known = memory.known.entry(migration.to_owned()).or_default();
            let due = known.told.as_ref().is_none_or(|(at, told)| {
                at.elapsed() >= TELL && without_time(told) != without_time(&progress)
            });
            if !due {
                return;
            }
            known.told = Some((Instant::now(), progress.clone()));
        }
        let Some(name) = self.migration_name(state, migration).await else { return };
        self.tell_progress(&name, &progress).await;
    }

    /// Tells how it ended, as the launcher has it.
    pub(super) async fn tell_end(&self, migration: &str) {
        let state = self.status().migration_state.unwrap_or_default();
        let Ok(found) = self.launcher.status().await else { return };
        let Some(of) = found.migration.filter(|of| of.migration == migration) else { return };
        if let Some(name) = self.migration_name(&state, migration).await {
            self.tell_progress(&name, &json!(of)).await;
        }
    }

    /// N.B. only told: nobody depends on it.
    pub(super) async fn tell_progress(&self, name: &str, progress: &Value) {
        let migrations: Api<VirtualMachineInstanceMigration> =
            Api::namespaced(self.shared.client.clone(), &self.key.0);
        let patch = Patch::Merge(json!({"status": {"progress": progress}}));
        if let Err(error) = migrations.patch_status(name, &PatchParams::default(), &patch).await {
            tracing::debug!(name, "its progress cannot be told: {}", why(&error));
        }
    }

    /// The migration that is under way here.
    pub(super) async fn migration(
        &self,
        state: &State,
    ) -> kube::Result<Option<VirtualMachineInstanceMigration>> {
        let migrations: Api<VirtualMachineInstanceMigration> =
            Api::namespaced(self.shared.client.clone(), &self.key.0);
        let own = ListParams::default().labels(&format!("{}={}", keys::MIGRATES, self.key.1));
        let all = migrations.list(&own).await?.items;
        Ok(all.into_iter().find(|m| m.uid() == state.migration_uid))
    }

    /// The name of the migration that is under way here, which has this attempt.
    pub(super) async fn migration_name(&self, state: &State, migration: &str) -> Option<String> {
        let known = |memory: &super::Memory| memory.known.get(migration)?.name.clone();
        if let Some(name) = known(&self.shared.moves.memory()) {
            return Some(name);
        }
        let name = self.migration(state).await.ok()??.name_any();
        let mut memory = self.shared.moves.memory();
        memory.known.entry(migration.to_owned()).or_default().name = Some(name.clone());
        Some(name)
    }
}

/// Where a node's gateway is.
pub(super) async fn gateway_of(shared: &Shared, node: &str) -> Result<String, String> {
    let nodes: Api<Node> = Api::all(shared.client.clone());
    let found = nodes.get(node).await.map_err(|error| why(&error))?;
    let address = found.annotations().get(keys::GATEWAY).cloned();
    address.ok_or_else(|| {
        format!(
            "node {node} does not say where its gateway is: has it an address in the network for \
                 migrations? Its handler's log tells more"
        )
    })
}

/// What is told but for the moments at which phases began.
fn without_time(progress: &Value) -> Value {
    let mut progress = progress.clone();
    progress["since"] = Value::Null;
    progress
}

/// Whole GiB of what is moved: memory, and disks that are copied.
fn size_gib(vm: &VmSpec) -> i64 {
    let copied = vm.disks.iter().filter(|disk| !disk.shared && !disk.read_only);
    let disks: u64 =
        copied.filter_map(|disk| std::fs::metadata(&disk.path).ok()).map(|found| found.len()).sum();
    let bytes = (vm.memory_mib << 20).saturating_add(disks);
    i64::try_from(bytes.div_ceil(1 << 30)).unwrap_or(i64::MAX)
}

/// The launchers' policy.
pub(super) fn policy(options: Option<&Options>) -> Policy {
    let options = options.cloned().unwrap_or_default();
    let mut policy = Policy::default();
    let positive = |number: i64| u64::try_from(number).ok().filter(|number| *number > 0);
    let bandwidth = options.bandwidth_per_migration.and_then(|rate| api::quantity::bytes(&rate.0));
    policy.bandwidth = bandwidth.and_then(|rate| u64::try_from(rate).ok()).filter(|rate| *rate > 0);
    policy.disrupt = options.allow_workload_disruption.unwrap_or(false);
    let experimental = options.experimental.unwrap_or_default();
    match experimental.compression {
        Some(Zip::None) => policy.compression = Compression::Off,
        Some(Zip::Zstd) => policy.compression = Compression::Zstd,
        None => {}
    }
    let pause = positive(options.max_downtime_ms.unwrap_or(MAX_DOWNTIME_MS)).unwrap_or(1);
    policy.rounds.max_downtime_ms = pause;
    let first = experimental.downtime_tuning.and_then(|tuning| positive(tuning.initial_ms?));
    policy.rounds.downtime_ms = first.unwrap_or(policy.rounds.downtime_ms).min(pause);
    policy.rounds.throttle = options.allow_auto_converge.unwrap_or(false);
    let stall = experimental.stall_detector.and_then(|stall| stall.stall_progress_timeout);
    if let Some(stall) = positive(stall.or(options.progress_timeout).unwrap_or(PROGRESS_TIMEOUT)) {
        policy.stall_seconds = (stall as f64).min(86_400.0);
    }
    policy
}

#[cfg(test)]
mod test {
    use super::*;
    use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn whatever_admission_lets_through_makes_a_policy_that_launchers_take(
            rate in "[0-9]{1,5}(|k|M|Mi|Gi)", pause in 1i64..=2_000_000, stall in 0i64..86_400,
            slow in any::<bool>(),
        ) {
            let options = Options {
                bandwidth_per_migration: Some(Quantity(rate)),
                max_downtime_ms: Some(pause),
                progress_timeout: Some(stall),
                allow_auto_converge: Some(slow),
                ..Options::default()
            };
            let policy = policy(Some(&options));
            prop_assert_eq!(policy.validate(), Ok(()));
            prop_assert_eq!(policy.rounds.throttle, slow);
        }
    }
}
