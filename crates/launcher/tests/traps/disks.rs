//! The target's disks, which it takes only when it is told to run the guest.

use crate::side::{Side, disk_in, firmware, with_disk};
use qmp::commands::{BlockExportAdd, Cont, NbdAddress, NbdServerStart};
use serde_json::json;

#[tokio::test]
async fn an_image_is_locked_only_when_the_guest_is_to_run_which_then_may_fail() {
    let folder = tempfile::tempdir().unwrap();
    let spec = with_disk(firmware(json!({})), &disk_in(&folder, "root"), true);
    // The one holds the lock, the other does not mind.
    let (source, target) = tokio::join!(Side::source(&spec), Side::target(&spec, 0));
    source.send_to(&target, 0).await;
    source.load(&target).await;
    // As if an abort had come through after all.
    source.bring_back().await;

    let error = target.execute(Cont).await.unwrap_err();
    assert!(error.to_string().contains("lock"), "{error}");
    // N.B. so the guest can still be handed back: no instruction of it ran here.
    assert!(!error.is_outcome_unknown());
    assert!(!target.runs().await);
    target.kill().await;
    assert!(source.runs().await);

    // And without anybody in its way.
    let target = Side::target(&spec, 0).await;
    source.send_to(&target, 0).await;
    source.load(&target).await;
    target.run().await;
    // Nor can the source come back behind the target's back.
    let error = source.execute(Cont).await.unwrap_err();
    assert!(error.to_string().contains("lock"), "{error}");
    assert!(!source.runs().await);
}

#[tokio::test]
async fn a_writable_export_of_the_targets_disk_conflicts_with_its_device() {
    let folder = tempfile::tempdir().unwrap();
    let (here, there) = (disk_in(&folder, "here"), disk_in(&folder, "there"));
    let spec = |path| with_disk(firmware(json!({})), path, false);
    let source = Side::source(&spec(&here)).await;
    let target = Side::target(&spec(&there), 0).await;
    let addr = NbdAddress::Unix { path: "nbd.sock".into() };
    target.execute(NbdServerStart { addr, max_connections: None }).await.unwrap();
    let export = BlockExportAdd {
        id: "writer".into(),
        node_name: "root".into(),
        writable: Some(true),
        ..Default::default()
    };
    target.execute(export).await.unwrap();
    source.send_to(&target, 0).await;
    source.load(&target).await;

    // 7.2 only says so, and lets the guest run beside the other writer. N.B. which is why the mover
    // writes the file itself.
    match target.execute(Cont).await {
        Ok(_) => target.says("conflict").await,
        Err(error) => assert!(error.to_string().to_lowercase().contains("conflict"), "{error}"),
    }
}
