//! Every interleaving of a move with its faults, over the functions that the
//! launchers and the handlers run.
//!
//! Two hosts, each with a handler and a ledger (or one ledger for both), and
//! launchers of one VM: the source, the target, those of a retry, and one that
//! starts the VM again after its launcher died. What may go wrong, within a
//! budget, at any moment:
//! - a launcher crashes; its QEMU ends some time later; a QEMU ends alone
//! - a handler crashes: what it is asked is not done, or is done unheard (while
//!   it is down nothing is carried out, which is a matter of order)
//! - a swap has an unknown outcome and is done much later, or never
//! - the control stream is cut, given up by one side only, or repeats a message
//! - QEMU refuses to run the guest at the target
//! - besides: a half of the move is cancelled, fails or waits too long (all of
//!   which is one event to it), a retry, a start
//!
//! Or two clusters, each with an API server that keeps its record and a
//! synchronizer, through which alone the other's record is asked, and which calls
//! back guests that have not come (see `clusters`). Then these fail too:
//! - an API server is down for a time, or for ever
//! - a synchronizer is, or dies with a question or an answer
//! - trust is revoked, for a time or for ever: no question is answered, streams
//!   are cut, and both halves are told to end
//!
//! What is left out, because it cannot matter here: the contents of disks and
//! memory (only "complete and newest" is kept), the reasons of failures (no
//! function may depend on them: they are made equal after every step), time
//! (a deadline is a failure that may happen at any moment), and an answer that
//! tells the asker nothing, after which the same is asked again.

mod clusters;
mod ends;
mod step;
mod twist;
mod world;

use handover::source::Answer;
use handover::target;
use stateright::{Checker, HasDiscoveries, Model, Property};
use std::sync::Arc;
use step::Rules;
use twist::Twist;
use world::{Budget, Guest, Harm, Host, Layout, Role, World};

/// What can happen next.
#[derive(Debug, Clone, PartialEq)]
enum Step {
    // The protocol: goes on by itself.
    Deliver(usize),
    Lose(usize),
    TellEnd(usize),
    Progress(usize),
    CarryOut(usize, usize),
    Answer(usize, usize),
    DeadLauncherTakesQemu(usize),
    // Choices: may happen or not.
    LateCarriedOut(usize),
    Fails(usize),
    Retry(usize),
    StartVm(Host),
    // Faults.
    LauncherCrashes(usize),
    QemuEnds(usize),
    HandlerCrashes(usize),
    SwapComesLate(usize, usize),
    Cut(usize),
    GivesUp(usize),
    Repeats(usize),
    ActivationFails(usize),
    /// What is there besides, between two clusters.
    Between(clusters::Step),
}

/// One move of one VM from host A to host B.
#[derive(Debug, Clone)]
struct Handover {
    rules: Rules,
    budget: Budget,
}

impl Handover {
    fn steps(&self, world: &World, steps: &mut Vec<Step>) {
        for (at, launcher) in world.launchers.iter().enumerate() {
            if !launcher.alive() {
                steps.push(Step::DeadLauncherTakesQemu(at));
                continue;
            }
            if !launcher.inbox.is_empty() {
                steps.push(Step::Deliver(at));
            }
            if launcher.loss_untold {
                steps.push(Step::Lose(at));
            }
            if launcher.end_untold {
                steps.push(Step::TellEnd(at));
            }
            if self.rules.can_progress(world, at) {
                steps.push(Step::Progress(at));
            }
            for (i, ask) in launcher.asks.iter().enumerate() {
                if ask.answer.is_some() {
                    steps.push(Step::Answer(at, i));
                } else if !world.parts.stop(ask) && !self.rules.tells_nothing(world, ask) {
                    steps.push(Step::CarryOut(at, i));
                }
            }
        }
        let mut between = vec![];
        self.rules.between(world, &mut between);
        steps.extend(between.into_iter().map(Step::Between));
    }

    fn choices(&self, world: &World, steps: &mut Vec<Step>) {
        let budget = &world.budget;
        let arrives = |at: &usize| !world.parts.is_mute(world.late[*at].host);
        steps.extend((0..world.late.len()).filter(arrives).map(Step::LateCarriedOut));
        for (at, launcher) in world.launchers.iter().enumerate() {
            match &launcher.role {
                Role::Source(_) | Role::Target(_) if budget.cancels > 0 && launcher.undecided() => {
                    steps.push(Step::Fails(at));
                }
                Role::Owner if budget.retries > 0 && self.rules.may_move(world, launcher) => {
                    steps.push(Step::Retry(at));
                }
                _ => {}
            }
        }
        for host in Host::ALL {
            let nobody = !world.launchers.iter().any(|l| l.host == host && l.alive());
            // N.B. without a record it is another VM of that name; and the record of one
            // ledger does not say which disk is meant: see R7's marks.
            let known = world.ledgers[host as usize].is_some() && !self.rules.one_ledger();
            let known = known && !world.parts.is_mute(host);
            if budget.starts > 0 && nobody && known {
                steps.push(Step::StartVm(host));
            }
        }
    }

    fn faults(&self, world: &World, steps: &mut Vec<Step>) {
        for (at, launcher) in world.launchers.iter().enumerate() {
            if !launcher.alive() {
                continue;
            }
            steps.push(Step::LauncherCrashes(at));
            if !matches!(launcher.guest, Guest::Ended)
                && !matches!(launcher.role, Role::Starting(_))
            {
                steps.push(Step::QemuEnds(at));
            }
            for (i, ask) in launcher.asks.iter().enumerate() {
                if ask.answer.is_none() {
                    steps.push(Step::SwapComesLate(at, i));
                }
            }
            let talks =
                matches!(launcher.role, Role::Source(_) | Role::Target(_) | Role::Preparing(_));
            if talks && launcher.undecided() && !launcher.cut && !launcher.loss_untold {
                steps.push(Step::GivesUp(at));
                if launcher.host == Host::A {
                    steps.push(Step::Cut(at));
                }
            }
            if !launcher.inbox.is_empty() {
                steps.push(Step::Repeats(at));
            }
            if let (Role::Target(target), Guest::Loaded) = (&launcher.role, launcher.guest)
                && target.state == target::State::Activating
            {
                steps.push(Step::ActivationFails(at));
            }
        }
        // Of clusters there are more parts: see `clusters`.
        let ledgers = if self.rules.layout == Layout::TwoClusters { 0..0 } else { 0..2 };
        for ledger in ledgers {
            let asked = world.launchers.iter().flat_map(|l| &l.asks);
            if asked.into_iter().any(|ask| self.rules.ledger(ask.host) == ledger) {
                steps.push(Step::HandlerCrashes(ledger));
            }
        }
    }

    fn apply(&self, world: &mut World, step: Step) {
        let rules = &self.rules;
        match step {
            Step::Deliver(at) => {
                let message = world.launcher(at).inbox.remove(0);
                rules.deliver(world, at, message);
            }
            Step::Lose(at) => rules.lose(world, at),
            Step::TellEnd(at) => rules.tell_end(world, at),
            Step::Progress(at) => rules.progress(world, at),
            Step::CarryOut(at, i) => {
                let ask = world.launchers[at].asks[i].clone();
                let answer = rules.carry_out(world, &ask);
                Arc::make_mut(&mut world.launcher(at).asks[i]).answer = Some(answer);
            }
            Step::Answer(at, i) => {
                let ask = world.launcher(at).asks.remove(i);
                if let Some(answer) = ask.answer.clone() {
                    rules.answered(world, at, &ask, answer);
                }
            }
            Step::LateCarriedOut(i) => {
                let ask = world.late.remove(i);
                rules.carry_out(world, &ask);
            }
            Step::DeadLauncherTakesQemu(at) => world.launcher(at).guest = Guest::Ended,
            Step::Fails(at) => {
                world.budget.cancels -= 1;
                rules.fail(world, at);
            }
            Step::Retry(at) => {
                world.budget.retries -= 1;
                let own = self.rules.ledger(world.launchers[at].host);
                let epoch = world.ledgers[own].as_ref().map_or(1, |r| r.epoch);
                rules.begin_move(world, at, epoch);
            }
            Step::StartVm(host) => {
                world.budget.starts -= 1;
                rules.begin_start(world, host);
            }
            Step::Between(step) => rules.step_between(world, step),
            fault => {
                world.budget.faults -= 1;
                self.go_wrong(world, fault);
            }
        }
    }

    fn go_wrong(&self, world: &mut World, fault: Step) {
        let rules = &self.rules;
        match fault {
            Step::LauncherCrashes(at) => {
                world.bury(at);
                if world.launchers[at].guest == Guest::None {
                    world.launcher(at).guest = Guest::Ended;
                }
            }
            Step::QemuEnds(at) => {
                let launcher = world.launcher(at);
                launcher.guest = Guest::Ended;
                launcher.end_untold = true;
            }
            Step::HandlerCrashes(ledger) => {
                for at in 0..world.launchers.len() {
                    for i in 0..world.launchers[at].asks.len() {
                        if rules.ledger(world.launchers[at].asks[i].host) == ledger {
                            Arc::make_mut(&mut world.launcher(at).asks[i]).answer =
                                Some(Answer::Unknown);
                        }
                    }
                }
                world.late.retain(|ask| rules.ledger(ask.host) != ledger);
            }
            Step::SwapComesLate(at, i) => {
                let ask = world.launchers[at].asks[i].clone();
                Arc::make_mut(&mut world.launcher(at).asks[i]).answer = Some(Answer::Unknown);
                world.late.push(ask);
            }
            Step::Cut(at) => {
                let peer = world.launchers[at].peer.clone().and_then(|p| world.find(&p));
                for at in [Some(at), peer].into_iter().flatten() {
                    let launcher = world.launcher(at);
                    if launcher.undecided() {
                        launcher.cut = true;
                        launcher.loss_untold = true;
                    }
                }
            }
            Step::GivesUp(at) => world.launcher(at).loss_untold = true,
            Step::Repeats(at) => {
                let again = world.launchers[at].inbox[0];
                world.launcher(at).inbox.insert(0, again);
            }
            Step::ActivationFails(at) => {
                let why = "no lock".to_owned();
                rules.target(world, at, target::Event::ActivateFailed(why));
            }
            _ => {}
        }
    }
}

const ONE_RUNS: &str = "at most one instance runs";
const OWNER_RUNS: &str = "before the commit only the source runs, after it only the target";
const NOTHING_STALE: &str = "a guest runs only on the newest memory and disk";
const CLAIMANTS_LIVE: &str = "a complete guest is ended only on a ledger's word";
const DISK_EXISTS: &str = "one complete disk always exists";
const KEEPS_MEMORY: &str = "no guest is called back from an heir that lives";
const ARRIVED: &str = "what is known to have come has come";
const ENDS_WELL: &str = "every run ends with exactly one runnable owner";
const DOUBTS: &str = "nobody is in doubt who could ask, and nobody else is stuck";

impl Model for Handover {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        let mut world = World {
            ledgers: [None, None],
            disks: [true, false],
            launchers: vec![],
            late: vec![],
            parts: Arc::default(),
            born: 0,
            budget: self.budget.clone(),
            harm: None,
        };
        self.rules.begin_start(&mut world, Host::A);
        let ask = world.launcher(0).asks.remove(0);
        let answer = self.rules.carry_out(&mut world, &ask);
        self.rules.answered(&mut world, 0, &ask, answer);
        self.rules.begin_move(&mut world, 0, 1);
        vec![world]
    }

    fn actions(&self, world: &World, steps: &mut Vec<Step>) {
        self.steps(world, steps);
        self.choices(world, steps);
        if world.budget.faults > 0 {
            self.faults(world, steps);
        }
        let mut between = vec![];
        self.rules.may_fail_between(world, &mut between);
        steps.extend(between.into_iter().map(Step::Between));
    }

    fn next_state(&self, world: &World, step: Step) -> Option<World> {
        let mut next = world.clone();
        let fails = matches!(step, Step::Fails(_));
        self.apply(&mut next, step);
        next.tidy(|host| self.rules.ledger(host));
        next.tidy_parts();
        // What nobody minds has not happened.
        (!fails || next.launchers != world.launchers).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(ONE_RUNS, |_, w: &World| w.running() <= 1),
            Property::always(OWNER_RUNS, |m: &Self, w: &World| m.owner_runs(w)),
            Property::always(NOTHING_STALE, |_, w: &World| w.harm != Some(Harm::RanStale)),
            Property::always(CLAIMANTS_LIVE, |_, w: &World| w.harm != Some(Harm::EndedClaimant)),
            Property::always(DISK_EXISTS, |_, w: &World| w.disks.contains(&true)),
            Property::always(KEEPS_MEMORY, |_, w: &World| {
                w.harm != Some(Harm::CalledBackFromLiving)
            }),
            Property::always(ARRIVED, |_, w: &World| w.arrivals_are_true()),
            Property::always(ENDS_WELL, |m: &Self, w: &World| m.ends_well(w)),
            Property::always(DOUBTS, |m: &Self, w: &World| m.doubts_rightly(w)),
        ]
    }
}

/// Two faults, one cancel, one retry, one start: what most other budgets are cut from.
const BUDGET: Budget = Budget { faults: 2, cancels: 1, retries: 1, starts: 1, revocations: 0 };

/// What clusters that go apart are shown with.
const APART: Budget = Budget { faults: 1, cancels: 0, retries: 0, starts: 1, revocations: 1 };

fn handover(layout: Layout, twist: Twist, budget: Budget) -> Handover {
    Handover { rules: Rules { layout, twist, seen: Arc::default() }, budget }
}

/// The first property that does not hold; prints how many states were visited.
fn explore(name: &str, model: Handover) -> Option<&'static str> {
    let begun = std::time::Instant::now();
    let checker =
        model.checker().threads(2).finish_when(HasDiscoveries::AnyFailures).spawn_dfs().join();
    println!(
        "{name}: {} states, depth {}, {:.1?}",
        checker.unique_state_count(),
        checker.max_depth(),
        begun.elapsed()
    );
    checker.discoveries().into_keys().next()
}

/// A shortest way to what is wrong.
fn explain(model: Handover) {
    let checker = model.checker().finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
    for (violated, path) in checker.discoveries() {
        println!("violated: {violated}, by");
        for (world, step) in path.into_vec() {
            show(&world);
            step.iter().for_each(|step| println!("{step:?}"));
        }
    }
}

fn show(world: &World) {
    for record in world.ledgers.iter().flatten() {
        println!("      {record}");
    }
    for l in &world.launchers {
        let role = match &l.role {
            Role::Source(source) => source.phase(),
            Role::Target(target) => target.phase(),
            Role::Preparing(_) => "Preparing",
            Role::Starting(_) => "Starting",
            Role::Owner => "Owner",
            Role::Dead => "Dead",
        };
        let asks: Vec<_> = l.asks.iter().map(|a| (&a.swap, a.answer.is_some())).collect();
        println!("      {} {role}, {:?}, hears {:?}, asks {asks:?}", l.instance, l.guest, l.inbox);
    }
}

fn proves(name: &str, model: Handover) {
    let Handover { rules: Rules { layout, seen, .. }, budget } = model.clone();
    let violated = explore(name, model.clone());
    if violated.is_some() {
        explain(model);
    }
    assert_eq!(violated, None);
    // The model is not vacuous.
    assert!(seen.all(layout, &budget), "{name}: something never happened: {seen:?}");
}

fn soak() -> bool {
    std::env::var_os("GODWIT_SOAK").is_some()
}

#[test]
fn a_move_with_two_faults_ends_with_exactly_one_owner() {
    let retries = if soak() { 2 } else { 1 };
    proves("two hosts", handover(Layout::TwoHosts, Twist::Nothing, Budget { retries, ..BUDGET }));
}

#[test]
fn two_launchers_of_one_ledger_end_with_exactly_one_owner() {
    let retries = if soak() { 1 } else { 0 };
    proves("one host", handover(Layout::OneLedger, Twist::Nothing, Budget { retries, ..BUDGET }));
}

#[test]
fn a_move_between_clusters_ends_with_exactly_one_owner() {
    let retries = if soak() { 1 } else { 0 };
    let budget = Budget { retries, ..BUDGET };
    proves("two clusters", handover(Layout::TwoClusters, Twist::Nothing, budget));
}

#[test]
fn clusters_that_go_apart_leave_only_those_in_doubt_who_cannot_ask() {
    let budget = if soak() { Budget { retries: 0, ..BUDGET } } else { APART };
    let budget = Budget { revocations: 1, ..budget };
    proves("clusters apart", handover(Layout::TwoClusters, Twist::Nothing, budget));
}

fn goes_in_no_circles(name: &str, model: &Handover) {
    let mut done = std::collections::HashSet::new();
    // The states of the present run, each with those that come next.
    let mut run: Vec<(World, Vec<World>)> = vec![];
    let mut next = model.init_states().pop();
    while let Some(world) = next.take() {
        if !done.contains(&world) {
            assert!(
                !run.iter().any(|(earlier, _)| *earlier == world),
                "a run returns to {world:?}"
            );
            let after = model.next_states(&world);
            run.push((world, after));
        }
        while let Some((world, after)) = run.last_mut() {
            next = after.pop();
            if next.is_some() {
                break;
            }
            done.insert(world.clone());
            run.pop();
        }
    }
    println!("no circles, {name}: {} states", done.len());
}

/// Then "nothing goes on by itself" is where every run ends, and the model's
/// last properties hold for all of them.
#[test]
fn no_run_goes_in_circles() {
    let hosts = handover(Layout::TwoHosts, Twist::Nothing, Budget { faults: 1, ..BUDGET });
    goes_in_no_circles("two hosts", &hosts);
    goes_in_no_circles("two clusters", &handover(Layout::TwoClusters, Twist::Nothing, APART));
}

fn finds(layout: Layout, twist: Twist, budget: Budget) {
    let found = explore(&format!("{twist:?}"), handover(layout, twist, budget));
    println!("{twist:?} violates: {found:?}");
    assert!(found.is_some(), "{twist:?} was not found");
}

#[test]
fn a_target_that_runs_without_a_commit_is_found() {
    finds(Layout::TwoHosts, Twist::RunsWithoutCommit, BUDGET);
}

#[test]
fn a_source_that_resumes_after_the_record_changed_is_found() {
    finds(Layout::TwoHosts, Twist::ResumesAfterCommit, BUDGET);
}

#[test]
fn a_source_that_resumes_after_an_unknown_write_is_found() {
    finds(Layout::TwoHosts, Twist::ResumesOnUnknown, BUDGET);
}

#[test]
fn a_target_that_discards_on_an_undecided_record_is_found() {
    finds(Layout::TwoHosts, Twist::DiscardsUndecided, BUDGET);
}

#[test]
fn a_promotion_after_the_source_has_aborted_is_found() {
    finds(Layout::TwoHosts, Twist::PromotesAborted, BUDGET);
}

#[test]
fn a_ledger_that_takes_the_vm_from_an_heir_that_adopted_is_found() {
    finds(Layout::TwoHosts, Twist::RelinquishesAdopted, BUDGET);
}

#[test]
fn a_start_beside_a_living_qemu_is_found() {
    finds(Layout::TwoHosts, Twist::StartsBesideLiving, BUDGET);
}

#[test]
fn a_late_expectation_that_replaces_a_later_one_is_found() {
    finds(Layout::TwoHosts, Twist::ExpectsAnything, BUDGET);
}

#[test]
fn a_record_that_lets_a_guest_go_whose_heir_may_live_is_found() {
    finds(Layout::TwoClusters, Twist::RecallsFromLiving, BUDGET);
}

#[test]
fn an_heir_that_gives_back_what_was_told_to_have_come_is_found() {
    finds(Layout::TwoClusters, Twist::GivesBackWhatCame, BUDGET);
}

#[test]
fn a_guest_that_nobody_calls_back_is_found() {
    finds(Layout::TwoClusters, Twist::NeverRecalls, BUDGET);
}

#[test]
fn a_target_that_stays_in_doubt_without_asking_is_found() {
    let model = handover(Layout::TwoClusters, Twist::WaitsForEver, APART);
    // Both when all parts are there again and as long as they are not.
    let both = [ENDS_WELL, DOUBTS].into_iter().collect();
    let checker = model.checker().finish_when(HasDiscoveries::AllOf(both)).spawn_dfs().join();
    let found = checker.discoveries();
    assert!(found.contains_key(ENDS_WELL) && found.contains_key(DOUBTS), "{:?}", found.keys());
}

#[test]
fn an_unknown_answer_of_another_cluster_taken_for_a_refusal_is_found() {
    finds(Layout::TwoClusters, Twist::UnknownIsRefused, BUDGET);
}

#[test]
fn a_question_to_a_cluster_that_has_gone_apart_taken_as_granted_is_found() {
    finds(Layout::TwoClusters, Twist::RevokedIsGranted, APART);
}

#[test]
fn a_start_that_takes_a_guest_that_has_left_is_found() {
    finds(Layout::TwoClusters, Twist::StartsAstray, BUDGET);
}
