//! A process that writes is killed at any moment, over and over on one database.
//!
//! Each of its tasks does operations that follow from its number and a count alone, and keeps the
//! count in an object that each operation changes in the same transaction. So whoever reads the
//! database can tell what it must hold.

use crate::{RESOURCE, all, body, key};
use apiserver::store::{Change, Expect, Key, Store, To};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const TASKS: u64 = 8;
const ROUNDS: usize = 300;
/// The database's folder, for the process that is to be killed.
const FOLDER: &str = "STORE_TEST_FOLDER";
/// What must be found: a count for each task.
const ACKNOWLEDGED: &str = "STORE_TEST_ACKNOWLEDGED";

fn counter(task: u64) -> Key {
    Key::new(RESOURCE, "counters", &task.to_string())
}

/// Which object the `n`th operation of a task changes, to how long a text; None: it deletes it.
fn operation(task: u64, n: u64) -> (Key, Option<usize>) {
    let mut random = fastrand::Rng::with_seed(task << 32 | n);
    let name = format!("{task}-{}", random.u8(..5));
    (key(&name), (random.u8(..3) > 0).then(|| random.usize(..8192)))
}

/// What a task's objects are after `n` operations: by which operation each was written.
fn expected(task: u64, n: u64) -> BTreeMap<Key, u64> {
    let mut objects = BTreeMap::new();
    for n in 1..=n {
        match operation(task, n) {
            (key, Some(_)) => objects.insert(key, n),
            (key, None) => objects.remove(&key),
        };
    }
    objects
}

/// Compares the database with what was acknowledged. Returns each task's count.
fn checked(store: &Store, acknowledged: &[u64]) -> Vec<u64> {
    let mut found = BTreeMap::new();
    for (key, object) in store.list(&all()).expect("a list").objects {
        found.insert(key, object.body["n"].as_u64().expect("a number"));
    }
    let counts: Vec<_> =
        (0..TASKS).map(|task| found.remove(&counter(task)).unwrap_or_default()).collect();
    let mut all = BTreeMap::new();
    for (task, (count, acknowledged)) in (0..).zip(counts.iter().zip(acknowledged)) {
        // One operation at a time, whose answer may not have been heard.
        let heard = *acknowledged..=*acknowledged + 1;
        assert!(heard.contains(count), "task {task}: {count} found, {acknowledged} acknowledged");
        all.extend(expected(task, *count));
    }
    assert_eq!(found, all);
    counts
}

async fn operate(store: Store, task: u64, mut n: u64) {
    let at = |key: &Key| match store.get(key) {
        Some(object) => Expect::At(object.revision),
        None => Expect::Absent,
    };
    loop {
        n += 1;
        let (key, length) = operation(task, n);
        let count = counter(task);
        let to = match length {
            Some(length) => {
                let mut body = body(n);
                body["text"] = "x".repeat(length).into();
                To::Body(body)
            }
            None if store.get(&key).is_none() => To::Same,
            None => To::Nothing(body(n)),
        };
        let counted = Change { expect: at(&count), key: count, to: To::Body(body(n)) };
        let changes = vec![counted, Change { expect: at(&key), key, to }];
        store.write(changes).await.expect("written");
        writeln!(std::io::stdout(), "\nacknowledged {task} {n}").expect("said");
    }
}

/// No test of its own: the process that is killed.
#[test]
fn the_process_that_is_killed() {
    let Some(folder) = std::env::var_os(FOLDER) else { return };
    let acknowledged = std::env::var(ACKNOWLEDGED).expect("counts");
    let acknowledged: Vec<u64> = acknowledged.split(' ').map(|n| n.parse().expect("one")).collect();
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    runtime.block_on(async {
        let store = Store::open(&Path::new(&folder).join("db")).expect("opened");
        let counts = checked(&store, &acknowledged);
        for (task, n) in (0..).zip(counts) {
            writeln!(std::io::stdout(), "\nacknowledged {task} {n}").expect("said");
            tokio::spawn(operate(store.clone(), task, n));
        }
        std::future::pending().await
    })
}

#[test]
fn nothing_is_lost_or_invented_however_often_it_is_killed() {
    let folder = tempfile::Builder::new().prefix("store").tempdir().expect("a folder");
    let mut counts = vec![0; TASKS as usize];
    for round in 0..ROUNDS {
        let before = counts.clone();
        let acknowledged = counts.iter().map(u64::to_string).collect::<Vec<_>>().join(" ");
        let mut child = Command::new(std::env::current_exe().expect("this test"))
            .args(["--exact", "killed::the_process_that_is_killed", "--nocapture"])
            .env(FOLDER, folder.path())
            .env(ACKNOWLEDGED, acknowledged)
            .stdout(Stdio::piped())
            .spawn()
            .expect("started");
        let lives = Duration::from_micros(fastrand::u64(..60_000));
        let mut killed_at = None;
        let said = BufReader::new(child.stdout.take().expect("its output"));
        for line in said.lines().map_while(Result::ok) {
            let Some(line) = line.strip_prefix("acknowledged ") else { continue };
            let (task, n) = line.split_once(' ').expect("two numbers");
            // The last line may be cut.
            let (Ok(task), Ok(n)) = (task.parse::<usize>(), n.parse()) else { continue };
            counts[task] = counts[task].max(n);
            if Instant::now() > *killed_at.get_or_insert_with(|| Instant::now() + lives) {
                child.kill().expect("killed");
            }
        }
        child.wait().expect("it ended");
        if killed_at.is_none() {
            let kept = folder.keep();
            panic!("round {round}: it found other than {before:?}; see {}", kept.display());
        }
    }
    let all: u64 = counts.iter().sum();
    println!("{ROUNDS} kills, {all} acknowledged operations");
}
