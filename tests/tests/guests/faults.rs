//! Every fault at every point of a move, with the stub of QEMU; and those that
//! matter most with real guests.

use crate::PROGRAM;
use anyhow::Result;
use e2e::chaos::{By, FAULTS, POINTS, Point, Programs, Trial, run_all};
use std::path::Path;

/// Trials at a time, with the stub, which mostly waits, and with real guests.
const STUBS: usize = 5;
const GUESTS: usize = 2;

fn programs(stub: bool) -> Programs {
    Programs {
        godwit: Path::new(PROGRAM).to_owned(),
        stub: stub.then(|| Path::new(env!("CARGO_BIN_EXE_stub-qemu")).to_owned()),
    }
}

/// Every fault at these points; `ONLY` picks those whose name contains it.
fn matrix(points: impl Iterator<Item = Point>, multifd: u8) -> Vec<Trial> {
    only(points.flat_map(|at| FAULTS.map(|fault| Trial::at(at, fault, multifd))))
}

fn only(trials: impl Iterator<Item = Trial>) -> Vec<Trial> {
    let only = std::env::var("ONLY").unwrap_or_default();
    trials.filter(|trial| trial.to_string().contains(&only)).collect()
}

#[test]
fn whatever_breaks_wherever_one_instance_is_left_and_nothing_is_lost() -> Result<()> {
    run_all(&matrix(POINTS.into_iter(), 0), &programs(true), STUBS)
}

#[test]
fn whatever_breaks_wherever_with_multifd_one_instance_is_left_and_nothing_is_lost() -> Result<()> {
    run_all(&matrix(POINTS.into_iter(), 2), &programs(true), STUBS)
}

/// Where a real QEMU and a stub of it may differ most.
fn matters(point: &Point) -> bool {
    point.by == By::Success && ["Seeding", "Paused", "Loaded", "Committing"].contains(&point.state)
}

#[test]
fn a_real_guest_survives_every_fault_where_it_matters_most() -> Result<()> {
    run_all(&matrix(POINTS.into_iter().filter(matters), 0), &programs(false), GUESTS)
}

#[test]
fn a_real_guest_survives_a_fault_between_every_two_steps() -> Result<()> {
    // N.B. that somebody else holds the disk is told to a stub in another way.
    let others = POINTS.into_iter().filter(|at| !matters(at) && at.by != By::Refusal);
    let faults = FAULTS.into_iter().cycle();
    let trials = others.zip(faults).map(|(at, fault)| Trial::at(at, fault, 2));
    run_all(&only(trials), &programs(false), GUESTS)
}
