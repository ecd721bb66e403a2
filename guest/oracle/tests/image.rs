//! The host's look at a disk at rest, on images written by the block format itself.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use oracle::block::{encode, newest_per_slot, slot_of};
use oracle::image::verify;
use oracle::protocol::Range;

const SEED: u64 = 11;
const OFFSET: u64 = 8192;
const BLOCK: u64 = 4096;
const SLOTS: u64 = 20;

/// An image after the writes `1..=last`.
fn image(path: &Path, last: u64) -> Range {
    let file = File::create(path).unwrap();
    file.set_len(OFFSET + SLOTS * BLOCK).unwrap();
    for n in 1..=last {
        write(&file, SEED, n);
    }
    Range { dev: path.to_str().unwrap().into(), offset: OFFSET, len: SLOTS * BLOCK }
}

fn write(file: &File, seed: u64, n: u64) {
    let slot = slot_of(seed, n, SLOTS);
    let mut block = vec![0; BLOCK as usize];
    encode(&mut block, seed, n, slot);
    file.write_all_at(&block, OFFSET + slot * BLOCK).unwrap();
}

fn lost(range: &Range, acked: u64) -> Vec<(u64, String)> {
    let mut lost = Vec::new();
    let sums =
        verify(range, BLOCK, SEED, acked, |loss| lost.push((loss.slot, loss.found))).unwrap();
    assert_eq!(sums.lost, lost.len() as u64);
    lost
}

#[test]
fn an_image_may_be_newer_than_what_was_acknowledged_but_never_older() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    let range = image(&path, 200);
    assert_eq!(lost(&range, 200), []);
    assert_eq!(lost(&range, 150), [], "writes in flight may be there");
    let ahead = newest_per_slot(SEED, 210, SLOTS).iter().filter(|&&n| n > 200).count();
    assert_eq!(lost(&range, 210).len(), ahead, "each slot of a write that is missing");
}

#[test]
fn a_block_that_is_stale_torn_or_not_ours_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    let range = image(&path, 200);
    let file = File::options().write(true).open(&path).unwrap();
    let newest = newest_per_slot(SEED, 200, SLOTS);
    // A slot that was written more than once goes back to its first write.
    let stale = (1..).find(|&n| newest[slot_of(SEED, n, SLOTS) as usize] > n).unwrap();
    write(&file, SEED, stale);
    let stale_slot = slot_of(SEED, stale, SLOTS);
    let others: Vec<u64> = (0..SLOTS).filter(|&slot| slot != stale_slot).collect();
    let (torn, foreign) = (others[0], others[1]);
    file.write_all_at(&[0xff; 512], OFFSET + torn * BLOCK + 1024).unwrap();
    file.write_all_at(&vec![0; BLOCK as usize], OFFSET + foreign * BLOCK).unwrap();

    let mut expected = vec![
        (stale_slot, stale.to_string()),
        (torn, "torn".to_owned()),
        (foreign, "foreign".to_owned()),
    ];
    expected.sort();
    assert_eq!(lost(&range, 200), expected);
}

#[test]
fn the_command_tells_lost_from_whole_by_its_exit_code() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    image(&path, 200);
    let verify_image = |acked: &str| {
        let words = format!("offset={OFFSET} len={} seed={SEED} acked={acked}", SLOTS * BLOCK);
        Command::new(env!("CARGO_BIN_EXE_oracle"))
            .arg("verify-image")
            .arg(&path)
            .args(words.split(' '))
            .output()
            .unwrap()
    };
    let whole = verify_image("200");
    assert_eq!(whole.status.code(), Some(0));
    let text = format!("VERIFY acked=200 slots={SLOTS} lost=0 newest=200\n");
    assert_eq!(String::from_utf8_lossy(&whole.stdout), text);
    assert_eq!(verify_image("300").status.code(), Some(1));
    assert_eq!(verify_image("many").status.code(), Some(2));
}
