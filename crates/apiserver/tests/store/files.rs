//! Files that must not be used, and are left as they are.

use crate::{all, body, create, key};
use apiserver::store::{Change, Expect, OpenError, Store, To, WriteError};
use std::fs;
use std::path::Path;
use std::process::Command;

/// The database of the process that has no room.
const FULL: &str = "STORE_TEST_FULL";

async fn written(file: &Path) {
    let store = Store::open(file).expect("opened");
    let many = (0..100).map(|n| create(&format!("thing-{n}"), n)).collect();
    store.write(many).await.expect("written");
}

fn refused(file: &Path) -> OpenError {
    let before = fs::read(file).expect("it is there");
    let refused = Store::open(file).expect_err("it is refused");
    assert_eq!(fs::read(file).expect("it is there"), before, "it was changed");
    refused
}

#[tokio::test]
async fn a_file_that_is_not_sound_is_refused_and_left_alone() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("db");
    written(&file).await;
    let whole = fs::read(&file).expect("a database");

    fs::write(&file, &whole[..whole.len() / 2 + 100]).expect("cut");
    assert!(matches!(refused(&file), OpenError::Damaged { .. }));

    let mut torn = whole.clone();
    let middle = torn.len() / 2;
    torn[middle..middle + 4096].fill(0xa5);
    fs::write(&file, torn).expect("torn");
    assert!(matches!(refused(&file), OpenError::Damaged { .. }));

    fs::write(&file, b"this is a letter, not a database; it is longer than a header")
        .expect("text");
    assert!(matches!(refused(&file), OpenError::Damaged { .. }));

    let mut newer = whole.clone();
    newer[60..64].copy_from_slice(&7u32.to_be_bytes());
    fs::write(&file, newer).expect("another format");
    assert!(matches!(refused(&file), OpenError::Newer { found: 7, .. }));

    let mut foreign = whole.clone();
    foreign[68..72].copy_from_slice(b"Else");
    fs::write(&file, foreign).expect("another program's");
    assert!(matches!(refused(&file), OpenError::Foreign { .. }));

    fs::write(&file, whole).expect("put back");
    let store = Store::open(&file).expect("opened");
    assert_eq!(store.list(&all()).expect("a list").objects.len(), 100);
    assert!(matches!(Store::open(&file), Err(OpenError::InUse { .. })));

    let link = folder.path().join("link");
    std::os::unix::fs::symlink(folder.path().join("precious"), &link).expect("a link");
    Store::open(&link).expect_err("a link is not followed");
    assert!(!folder.path().join("precious").exists());
}

#[tokio::test]
async fn the_file_shrinks_when_its_objects_are_gone() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("db");
    let mib = || fs::metadata(&file).expect("a file").len() >> 20;
    let store = Store::open(&file).expect("opened");
    let mut large = body(0);
    large["text"] = "x".repeat(32 << 10).into();
    let creates =
        (0..1024).map(|n| Change { to: To::Body(large.clone()), ..create(&n.to_string(), 0) });
    let made = store.write(creates.collect()).await.expect("written");
    drop(store);
    assert!(mib() >= 32, "{} MiB", mib());

    let store = Store::open(&file).expect("opened");
    let deletes = (0..).zip(made).map(|(n, object): (u64, _)| Change {
        key: key(&n.to_string()),
        expect: Expect::At(object.revision),
        to: To::Nothing(body(0)),
    });
    store.write(deletes.collect()).await.expect("deleted");
    drop(store);
    // What is spared, and one step.
    assert!(mib() <= 6, "{} MiB", mib());
}

/// No test of its own: the process whose files may not grow.
#[tokio::test]
async fn the_process_that_has_no_room() {
    let Some(file) = std::env::var_os(FULL) else { return };
    let store = Store::open(Path::new(&file)).expect("opened");
    let mut large = body(0);
    large["text"] = "x".repeat(32 << 10).into();
    for n in 0..1000 {
        let change = Change { to: To::Body(large.clone()), ..create(&n.to_string(), 0) };
        match store.write(vec![change]).await {
            Ok(_) => {}
            Err(WriteError::Database(_)) => {
                assert_eq!((store.revision(), store.get(&key(&n.to_string()))), (n, None));
                fs::write(Path::new(&file).with_file_name("written"), n.to_string()).expect("kept");
                return;
            }
            Err(other) => panic!("{n}: {other}"),
        }
    }
    panic!("there was room for all");
}

#[test]
fn a_write_for_which_there_is_no_room_changes_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("db");
    // In blocks of 512 bytes or of 1 KiB, as the shell likes.
    let limited = "trap '' XFSZ; ulimit -f 4096; exec \"$0\" \"$@\"";
    let status = Command::new("sh")
        .args(["-c", limited])
        .arg(std::env::current_exe().expect("this test"))
        .args(["--exact", "files::the_process_that_has_no_room"])
        .env(FULL, &file)
        .status();
    assert!(status.expect("it ran").success());
    let written = fs::read_to_string(folder.path().join("written")).expect("a number");
    let store = Store::open(&file).expect("opened, now that there is room");
    assert_eq!(store.list(&all()).expect("a list").objects.len().to_string(), written);
}
