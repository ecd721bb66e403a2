//! Every fault at every point of a move, with the stub of QEMU; and those that
//! matter most with real guests.

use anyhow::Result;
use e2e::chaos::{FAULTS, POINTS, Programs, Trial, run_all};
use std::path::Path;

fn programs(stub: bool) -> Programs {
    Programs {
        godwit: Path::new(env!("CARGO_BIN_EXE_godwit-under-test")).to_owned(),
        stub: stub.then(|| Path::new(env!("CARGO_BIN_EXE_stub-qemu")).to_owned()),
    }
}

/// Every fault at every point; `ONLY` picks those whose name contains it.
fn matrix(multifd: u8) -> Vec<Trial> {
    let only = std::env::var("ONLY").unwrap_or_default();
    let all = POINTS.into_iter().flat_map(|at| FAULTS.map(|fault| Trial { at, fault, multifd }));
    all.filter(|trial| trial.to_string().contains(&only)).collect()
}

#[test]
fn whatever_breaks_wherever_one_instance_is_left_and_nothing_is_lost() -> Result<()> {
    run_all(&matrix(0), &programs(true), 6)
}

#[test]
fn whatever_breaks_wherever_with_multifd_one_instance_is_left_and_nothing_is_lost() -> Result<()> {
    run_all(&matrix(2), &programs(true), 6)
}
