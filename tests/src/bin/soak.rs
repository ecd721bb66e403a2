//! `make soak`: moves with random faults at random moments under random loads,
//! with real guests and with the stub of QEMU, until the time is over or one
//! write, one page or the only owner is lost.
//!
//! Trial N of a seed is always the same trial: `--only N` runs it alone.

use anyhow::{Context, Result, bail};
use e2e::chaos::{By, FAULTS, Fault, Load, Moment, POINTS, Programs, Trial};
use std::collections::HashMap;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Trials with the stub of QEMU at a time, and with real guests.
const STUBS: usize = 3;
const REAL: usize = 1;

fn main() -> ExitCode {
    e2e::exit("soak", soak())
}

/// What the command line asks for.
struct Request {
    minutes: u64,
    seed: u64,
    only: Option<u64>,
}

fn soak() -> Result<()> {
    let request = request()?;
    println!("seed {}, {} minutes", request.seed, request.minutes);
    if let Some(number) = request.only {
        return run(request.seed, number);
    }
    let until = Instant::now() + Duration::from_secs(60 * request.minutes);
    let (next, ran) = (AtomicU64::new(0), AtomicU64::new(0));
    let failure = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..STUBS + REAL {
            scope.spawn(|| {
                while Instant::now() < until && lock(&failure).is_none() {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    match run(request.seed, number) {
                        Ok(()) => _ = ran.fetch_add(1, Ordering::Relaxed),
                        Err(error) => _ = lock(&failure).get_or_insert((number, error)),
                    }
                }
            });
        }
    });
    let ran = ran.into_inner();
    if let Some((number, error)) = failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        let again = format!("after {ran} trials, trial {number} of seed {}", request.seed);
        return Err(error.context(again));
    }
    println!("{ran} trials: 0 lost writes, 0 lost pages, never two owners");
    Ok(())
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn request() -> Result<Request> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let mut given = HashMap::new();
    for pair in arguments.chunks(2) {
        let [name, value] = pair else { bail!("{} needs a number", pair[0]) };
        let number: u64 = value.parse().with_context(|| format!("{name} {value}"))?;
        given.insert(name.as_str(), number);
    }
    let request = Request {
        minutes: given.remove("--minutes").unwrap_or(10),
        seed: given.remove("--seed").unwrap_or(1),
        only: given.remove("--only"),
    };
    match given.keys().next() {
        Some(name) => bail!("{name} is unknown: soak [--minutes N] [--seed S] [--only TRIAL]"),
        None => Ok(request),
    }
}

/// Runs trial `number` of a seed.
fn run(seed: u64, number: u64) -> Result<()> {
    let here = std::env::current_exe()?;
    let is_real = number % ((STUBS + REAL) as u64) < REAL as u64;
    let stub = (!is_real).then(|| here.with_file_name("stub-qemu"));
    let programs = Programs { godwit: here.with_file_name("godwit"), stub };
    let trial = trial(&mut fastrand::Rng::with_seed(seed.rotate_left(32) ^ number), is_real);
    let begun = Instant::now();
    let ended = trial.run(&programs);
    let how = if ended.is_ok() { "ok" } else { "FAILED" };
    let with = if is_real { "QEMU" } else { "stub" };
    println!("{number:5} {with} {how}: {trial}, {:.1} s", begun.elapsed().as_secs_f64());
    ended
}

fn trial(random: &mut fastrand::Rng, is_real: bool) -> Trial {
    let points: Vec<_> = POINTS.into_iter().filter(|p| !is_real || p.by != By::Refusal).collect();
    let when = match random.bool() {
        true => Moment::At(points[random.usize(..points.len())]),
        false => Moment::After(Duration::from_millis(random.u64(..3000))),
    };
    let fault = fault(random);
    let then = random.bool().then(|| {
        let after = Duration::from_millis(random.u64(..2000));
        (after, self::fault(random))
    });
    let multifd = if random.bool() { 0 } else { random.u8(1..4) };
    let load = Load { writes: random.u32(10..800), pages: random.u32(10..4000) };
    Trial { when, fault, then, multifd, load }
}

fn fault(random: &mut fastrand::Rng) -> Fault {
    match random.usize(..FAULTS.len() + 1) {
        n if n < FAULTS.len() => FAULTS[n],
        _ => Fault::Cut(Duration::from_millis(random.u64(..6000))),
    }
}
