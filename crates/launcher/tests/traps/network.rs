//! How the network learns where the guest is.

use crate::side::{Side, firmware, within};
use launcher::migration::memory;
use launcher::spec::VmSpec;
use qmp::commands::ObjectAdd;
use serde_json::json;
use std::path::PathBuf;
use std::time::Duration;

/// The guest's own frames have its address too, but no firmware sends this kind.
const RARP: [u8; 2] = [0x80, 0x35];
const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];

fn spec() -> VmSpec {
    firmware(json!({"nics": [{"name": "lan", "mac": "52:54:00:00:00:01"}]}))
}

/// What passes through a side's network card.
struct Dump(PathBuf);

impl Dump {
    async fn of(side: &Side) -> Self {
        let file = side.path().join("lan.pcap");
        let filter = json!({
            "qom-type": "filter-dump", "id": "dump", "netdev": "lan-net", "file": file,
        });
        side.execute(ObjectAdd(filter)).await.unwrap();
        Self(file)
    }

    /// How often the guest's place was announced. QEMU writes each packet at once.
    fn announcements(&self) -> usize {
        let dump = std::fs::read(&self.0).unwrap();
        // A header of the file, then for each packet one of 16 bytes, its length in the third word.
        let mut rest = &dump[24..];
        let mut found = 0;
        while let Some((header, after)) = rest.split_at_checked(16) {
            let length = u32::from_ne_bytes(header[8..12].try_into().unwrap()) as usize;
            let Some((frame, after)) = after.split_at_checked(length) else { break };
            found += usize::from(frame[6..12] == MAC && frame[12..14] == RARP);
            rest = after;
        }
        found
    }

    async fn until_announced(&self) {
        let announced = async {
            while self.announcements() == 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        within(announced).await;
    }
}

#[tokio::test]
async fn a_guest_is_announced_when_it_is_loaded_and_not_when_it_runs() {
    let spec = spec();
    let (source, target) = tokio::join!(Side::source(&spec), Side::plain_target(&spec));
    let dump = Dump::of(&target).await;
    // QEMU's defaults: nobody has told the target that the guest is to stand still.
    source.send_to(&target, 0).await;
    assert_eq!(dump.announcements(), 0);
    source.load(&target).await;
    // It may never run here, and stands still.
    dump.until_announced().await;
    assert!(!target.runs().await);
}

#[tokio::test]
async fn our_target_is_silent_until_the_guest_runs_and_a_source_can_take_it_back() {
    let spec = spec();
    let (source, target) = tokio::join!(Side::source(&spec), Side::target(&spec, 0));
    let (here, there) = (Dump::of(&source).await, Dump::of(&target).await);
    source.send_to(&target, 0).await;
    source.load(&target).await;
    // QEMU's first announcement would come before it says that all is loaded.
    assert_eq!(there.announcements(), 0);
    source.bring_back().await;
    assert_eq!(here.announcements(), 0);
    memory::announce(&source.qemu).await;
    here.until_announced().await;

    let target = Side::target(&spec, 0).await;
    let there = Dump::of(&target).await;
    source.send_to(&target, 0).await;
    source.load(&target).await;
    target.run().await;
    assert_eq!(there.announcements(), 0);
    memory::announce(&target.qemu).await;
    there.until_announced().await;
}
