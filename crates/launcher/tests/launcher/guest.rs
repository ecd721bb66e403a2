//! With a real Linux inside (`make guest`).

use crate::console::hear;
use crate::world::{Host, spec};
use launcher::spec::VmSpec;
use launcher::status::Phase;
use serde_json::json;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::io::AsyncWriteExt;

fn file(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/guest").join(name);
    path.canonicalize()
        .unwrap_or_else(|_| panic!("there is no {}; run `make guest`", path.display()))
}

fn linux(disk: &Path) -> VmSpec {
    spec(json!({
        "memoryMiB": 64,
        "disks": [{"name": "root", "path": disk}],
        "boot": {
            "kernel": file("vmlinuz"), "initrd": file("initramfs.img"),
            "cmdline": std::fs::read_to_string(file("cmdline")).unwrap().trim(),
        },
        "serials": ["console", "oracle"],
    }))
}

#[tokio::test]
async fn a_guest_is_typed_to_gives_back_what_it_discards_and_shuts_itself_down() {
    let host = Host::start();
    let disk = host.path().join("root.raw");
    std::fs::copy(file("disk.raw"), &disk).unwrap();
    let launcher = host.launcher_with(Some(&linux(&disk))).await;
    let mut console = launcher.serial("console").await;
    hear(&mut console, "guest# ").await;
    let mut run = async |command: &str| {
        console.write_all(format!("{command}; echo done=$?\n").as_bytes()).await.unwrap();
        hear(&mut console, "done=0").await
    };
    let allocated = || std::fs::metadata(&disk).unwrap().blocks() * 512;
    run("dd if=/dev/urandom of=/dev/vda2 bs=1M count=8; sync").await;
    let full = allocated();
    let usage = launcher.client.usage().await.unwrap();
    assert!(usage.user > 0.0 && usage.resident > 16 << 20, "{usage:?}");
    assert!(usage.vcpus[0].used > 0.0 && usage.vcpus[0].used <= usage.user + usage.system + 1.0);
    let root = &usage.disks[0];
    assert!(root.name == "root" && root.write_bytes >= 8 << 20 && root.flushes > 0, "{root:?}");
    run("blkdiscard /dev/vda2").await;
    assert!(allocated() + (7 << 20) < full, "{} of {full} bytes are left", allocated());
    // Its own decision, long before the grace is over.
    launcher.client.shut_down(Duration::from_secs(600)).await.unwrap();
    let status = launcher.until("stopped, with a reason", |status| {
        status.phase == Phase::Stopped && status.reason.is_some()
    });
    assert_eq!(status.await.reason.unwrap(), "the guest shut down");
}

#[tokio::test]
async fn a_guest_boots_from_its_disk_on_every_bus() {
    for bus in ["virtio", "scsi", "sata"] {
        let host = Host::start();
        let disk = host.path().join("root.raw");
        std::fs::copy(file("disk.raw"), &disk).unwrap();
        let spec = spec(json!({
            "memoryMiB": 96, "machine": "q35",
            // Not the first, to see that the others are passed over.
            "disks": [
                {"name": "root", "path": disk, "bus": bus},
                {"name": "blank", "path": host.disk("blank", 1 << 20), "bus": "virtio"},
            ],
        }));
        let launcher = host.launcher_with(Some(&spec)).await;
        hear(&mut launcher.serial("console").await, "guest ready").await;
    }
}
