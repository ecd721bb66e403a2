//! A target that is sent what it cannot load.

use crate::side::{Side, disk_in, firmware, with_disk};
use channel::socket::connect_beneath;
use launcher::migration::memory::INCOMING;
use serde_json::json;
use tokio::io::AsyncWriteExt;

/// N.B. from 9.1 on QEMU could be told to stay (`exit-on-error`). We have it end: a new one is
/// needed anyway, and an old one would hold its disks.
#[tokio::test]
async fn a_failed_incoming_ends_the_target_and_the_next_one_finds_the_disk_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let (here, there) = (disk_in(&folder, "here"), disk_in(&folder, "there"));
    let spec = |path| with_disk(firmware(json!({})), path, false);
    let source = Side::source(&spec(&here)).await;
    let copied = vec![7; 1 << 20];
    std::fs::write(&there, &copied).unwrap();

    let target = Side::target(&spec(&there), 0).await;
    let mut main = connect_beneath(target.path(), INCOMING).await.unwrap();
    main.write_all(b"a guest? no").await.unwrap();
    // It says why, but no longer to those who ask.
    target.loaded().await.unwrap_err();
    let words = target.fails().await;
    assert!(words.contains("Not a migration stream"), "{words}");

    let target = Side::target(&spec(&there), 0).await;
    let lost =
        Side::source(&with_disk(firmware(json!({})), &disk_in(&folder, "lost"), false)).await;
    lost.send_to(&target, 0).await;
    lost.kill().await;
    target.loaded().await.unwrap_err();
    let words = target.fails().await;
    assert!(words.contains("load of migration failed"), "{words}");

    assert_eq!(std::fs::read(&there).unwrap(), copied);
    let target = Side::target(&spec(&there), 0).await;
    source.send_to(&target, 0).await;
    source.load(&target).await;
    target.run().await;
    assert_eq!(std::fs::read(&there).unwrap(), copied);
}
