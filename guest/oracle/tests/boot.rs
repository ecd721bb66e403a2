//! The built guest, really booted: needs `make guest` and QEMU.

mod vm;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use oracle::image::verify;
use oracle::protocol::{Check, Range, Report};
use tempfile::TempDir;

use vm::{Boot, Vm, built};

/// Partition 2 of `disk.raw`: what README.md reserves for raw writes.
const RAW: (u64, u64) = (32 << 20, 16 << 20);
const SEED: u64 = 3;

/// A disk of our own, in a folder of our own.
fn own_disk() -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk.raw");
    std::fs::copy(built("disk.raw"), &disk).unwrap();
    (dir, disk)
}

fn check(vm: &mut Vm) -> Check {
    match vm.ask("check") {
        Report::Check(check) => check,
        other => panic!("`check` was answered with `{other}`"),
    }
}

#[test]
fn a_guest_of_64_mib_finds_what_its_disk_lost_behind_its_back() {
    let (dir, disk) = own_disk();
    let mut vm = Vm::boot(dir.path(), &disk, "64", Boot::Direct, &[]);
    vm.wait_until_up();
    assert_eq!(vm.ask("ping"), Report::Pong);
    assert!(matches!(vm.ask("fly"), Report::Err(_)));
    assert!(matches!(vm.ask("memory start mib=4000"), Report::Err(_)), "more than there is");

    let ok = |command: &str| Report::Ok(command.into());
    assert_eq!(vm.ask("tick start"), ok("tick start"));
    assert_eq!(vm.ask("memory start mib=4"), ok("memory start"));
    let write = format!("write start dev=/dev/vda2 len={} seed={SEED}", RAW.1);
    assert_eq!(vm.ask(&write), ok("write start"));
    let Report::Tick { n: first, .. } = vm.until("a tick", |r| matches!(r, Report::Tick { .. }))
    else {
        unreachable!()
    };
    vm.until("write 100", |r| matches!(r, Report::Written { n: 100.., id: 0 }));
    let next = |r: &Report| matches!(r, Report::Tick { n, .. } if *n > first);
    vm.until("a later tick", next);

    let Report::Ok(_) = vm.ask("write stop") else { panic!("`write stop` was refused") };
    let whole = check(&mut vm);
    assert!(whole.writes >= 100 && whole.slots > 0, "{whole:?}");
    assert_eq!((whole.lost, whole.pages, whole.stale), (0, 1024, 0));

    let image = File::options().write(true).open(&disk).unwrap();
    image.write_all_at(&vec![0; RAW.1 as usize], RAW.0).unwrap();
    image.sync_all().unwrap();
    let lost = check(&mut vm);
    assert_eq!((lost.writes, lost.slots, lost.lost), (whole.writes, whole.slots, whole.slots));

    assert_eq!(vm.ask("quit"), Report::Bye);
    vm.until("DIED 0", |report| *report == Report::Died("0".into()));
    assert!(vm.power_off().success());
}

#[test]
fn what_the_guest_acknowledged_is_in_its_image_when_qemu_is_killed() {
    let (dir, disk) = own_disk();
    let mut vm = Vm::boot(dir.path(), &disk, "64", Boot::Direct, &[]);
    vm.wait_until_up();
    let write = format!("write start dev=/dev/vda2 len={} batch=4 seed={SEED}", RAW.1);
    vm.ask(&write);
    let Report::Written { n: acked, .. } =
        vm.until("write 200", |r| matches!(r, Report::Written { n: 200.., .. }))
    else {
        unreachable!()
    };
    drop(vm);
    let range = Range { dev: disk.to_str().unwrap().into(), offset: RAW.0, len: RAW.1 };
    let sums = verify(&range, 4096, SEED, acked, |_| ()).unwrap();
    assert_eq!(sums.lost, 0);
    assert!(sums.newest >= acked);
}

#[test]
fn the_disk_boots_by_itself_and_keeps_its_files_across_the_power_button() {
    let (dir, disk) = own_disk();
    let mut vm = Vm::boot(dir.path(), &disk, "96", Boot::Disk, &[]);
    vm.wait_until_up();
    vm.shell("echo 'still here' >/data/note");
    assert!(vm.power_off().success());

    let mut vm = Vm::boot(dir.path(), &disk, "96", Boot::Disk, &[]);
    vm.wait_until_up();
    let note = vm.shell("cat /data/note");
    assert!(note.contains("still here\n"), "{note:?}");
}

#[test]
fn the_oracle_survives_a_move_and_finds_nothing_lost() {
    let (dir, disk) = own_disk();
    let [from, to] = ["from", "to"].map(|name| dir.path().join(name));
    for folder in [&from, &to] {
        std::fs::create_dir(folder).unwrap();
    }
    // README.md: QEMU before 9.0 needs this size to move a guest under TCG.
    let size = "65544k";
    let mut source = Vm::boot(&from, &disk, size, Boot::Direct, &[]);
    source.wait_until_up();
    for start in [
        "tick start".into(),
        "memory start mib=2 rate=20000".into(),
        format!("write start dev=/dev/vda2 len={} rate=100 seed={SEED}", RAW.1),
    ] {
        assert!(matches!(source.ask(&start), Report::Ok(_)), "{start}");
    }
    let mut target = Vm::boot(&to, &disk, size, Boot::Direct, &["-incoming", "defer"]);
    let uri = format!(r#"{{"uri":"unix:{}"}}"#, dir.path().join("move").display());
    // Slow enough that the guest works while it is moved.
    source.qmp("migrate-set-parameters", r#"{"max-bandwidth":30000000,"downtime-limit":500}"#);
    target.qmp("migrate-incoming", &uri);
    source.qmp("migrate", &uri);
    source.wait_until_moved();

    let tick = |r: &Report| matches!(r, Report::Tick { .. });
    target.until("a tick after the move", tick);
    target.until("a write after the move", |r| matches!(r, Report::Written { .. }));
    let check = check(&mut target);
    assert!(check.writes > 0, "{check:?}");
    assert_eq!((check.lost, check.pages, check.stale), (0, 512, 0));
    drop(source);
    assert!(target.power_off().success());
}
