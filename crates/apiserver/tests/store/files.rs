//! Files that must not be used, and are left as they are.

use crate::{all, create};
use apiserver::store::{OpenError, Store};
use std::fs;
use std::path::Path;

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
