//! A sender and a receiver over real files, with links that are cut.

use mover::bucket::SharedBucket;
use mover::codec::Compression;
use mover::disk::Disk;
use mover::extent::{Extent, ExtentSet};
use mover::receiver::{Access, Fault, Receiver};
use mover::sender::{Connect, Error, Mode, Options, Sender};
use proptest::prelude::*;
use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

const MIB: u64 = 1 << 20;
const SOON: Duration = Duration::from_secs(60);

/// Connects streams to a receiver through a relay that cuts after so many bytes, once each.
struct Cuts {
    receiver: Arc<Receiver>,
    cuts: Mutex<Vec<usize>>,
}

impl Connect for Cuts {
    fn connect(&self, stream: u16) -> Result<UnixStream, String> {
        let (own, relay_source) = UnixStream::pair().map_err(|e| e.to_string())?;
        let (relay_target, theirs) = UnixStream::pair().map_err(|e| e.to_string())?;
        let cut = self.cuts.lock().unwrap().pop();
        self.receiver.detach(stream);
        self.receiver.attach(stream, theirs).map_err(|e| e.to_string())?;
        let back = (relay_target.try_clone().unwrap(), relay_source.try_clone().unwrap());
        std::thread::spawn(move || relay(back.0, back.1, None));
        std::thread::spawn(move || relay(relay_source, relay_target, cut));
        Ok(own)
    }
}

fn relay(mut from: UnixStream, mut to: UnixStream, cut: Option<usize>) {
    let mut left = cut.unwrap_or(usize::MAX);
    let mut buffer = vec![0; 64 << 10];
    while left > 0 {
        let Ok(n @ 1..) = from.read(&mut buffer) else { break };
        let n = n.min(left);
        if to.write_all(&buffer[..n]).is_err() {
            break;
        }
        left -= n;
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

fn options(streams: u16, compression: Compression) -> Options {
    let bucket = Arc::new(SharedBucket::new(None));
    Options { streams, bucket, compression }
}

struct World {
    _dir: tempfile::TempDir,
    source: File,
    target: File,
    source_disk: Arc<Disk>,
    target_disk: Arc<Disk>,
    blank: bool,
}

fn world(size: u64, target: Option<&[u8]>) -> World {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let source = open(&path("source"));
    source.set_len(size).unwrap();
    if let Some(content) = target {
        std::fs::write(path("target"), content).unwrap();
    }
    let (target_disk, _) = Disk::target(&path("target"), size).unwrap();
    let blank = target_disk.is_hole().unwrap();
    let target = open(&path("target"));
    let source_disk = Arc::new(Disk::source(&path("source")).unwrap());
    World { _dir: dir, source, target, source_disk, target_disk: Arc::new(target_disk), blank }
}

fn open(path: &Path) -> File {
    File::options().read(true).write(true).create(true).truncate(false).open(path).unwrap()
}

fn content(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

impl World {
    fn sender(&self, cuts: Vec<usize>, options: Options, fault: Fault) -> Sender {
        let disks = vec![self.target_disk.clone()];
        let receiver = Receiver::start(disks, options.streams, Access::Write, fault);
        let connect = Cuts { receiver: Arc::new(receiver), cuts: Mutex::new(cuts) };
        Sender::start(vec![self.source_disk.clone()], Arc::new(connect), options)
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn a_copy_is_exact_wherever_its_links_are_cut(
        pieces in proptest::collection::vec((0u64..7 * MIB, 1usize..MIB as usize, any::<bool>()), 0..8),
        changes in proptest::collection::vec((0u64..7 * MIB, 1usize..100_000, any::<bool>()), 0..8),
        cuts in proptest::collection::vec(1usize..3_000_000, 0..6),
        streams in 1u16..4,
        odd in 0u64..8,
        codec in prop_oneof![Just(Compression::Off), Just(Compression::Lz4), Just(Compression::Zstd)],
        old in proptest::option::of(any::<u64>()),
    ) {
        let size = 8 * MIB + odd * 512;
        let old = old.map(|seed| noise(seed, size as usize + 4096));
        let world = world(size, old.as_deref());
        let mut expected = vec![0; size as usize];
        let apply = |expected: &mut Vec<u8>, list: &[(u64, usize, bool)]| {
            let mut touched = ExtentSet::new();
            for (i, (offset, len, zero)) in list.iter().enumerate() {
                let bytes = if *zero { vec![0; *len] } else { noise(i as u64, *len) };
                world.source.write_all_at(&bytes, *offset).unwrap();
                expected[*offset as usize..*offset as usize + len].copy_from_slice(&bytes);
                touched.insert(Extent::new(*offset, *len as u64));
            }
            touched.coarsened(4096, size)
        };
        apply(&mut expected, &pieces);
        let sender = world.sender(cuts, options(streams, codec), Fault::default());
        let mode = if world.blank { Mode::Blank } else { Mode::Over };
        sender.push(0, mode, &ExtentSet::whole(size)).unwrap();
        sender.wait(SOON).unwrap();
        let delta = apply(&mut expected, &changes);
        sender.push(0, Mode::Over, &delta).unwrap();
        sender.wait(SOON).unwrap();
        prop_assert_eq!(sender.left(), 0);
        sender.finish();
        prop_assert!(content(&world.target)[..size as usize] == expected[..]);
    }
}

#[test]
fn a_stream_that_broke_is_counted_once_it_goes_on() {
    let world = world(4 * MIB, None);
    world.source.write_all_at(&noise(3, 4 * MIB as usize), 0).unwrap();
    // The last one first: two more break before anything is answered.
    let cuts = vec![1, 1, 1_000_000];
    let sender = world.sender(cuts, options(1, Compression::Off), Fault::default());
    sender.push(0, Mode::Blank, &ExtentSet::whole(4 * MIB)).unwrap();
    sender.wait(SOON).unwrap();
    assert_eq!(sender.counters().resumes, 1);
}

#[test]
fn holes_cost_no_bytes_and_no_allocation() {
    use std::os::unix::fs::MetadataExt;
    let world = world(1 << 30, None);
    world.source.write_all_at(&noise(1, MIB as usize), 500 * MIB).unwrap();
    let sender = world.sender(vec![], options(2, Compression::Off), Fault::default());
    sender.push(0, Mode::Blank, &ExtentSet::whole(1 << 30)).unwrap();
    sender.wait(SOON).unwrap();
    assert!(sender.counters().sent < 2 * MIB, "{:?}", sender.counters());
    assert!(world.target.metadata().unwrap().blocks() * 512 <= 2 * MIB);
    assert!(content(&world.target) == content(&world.source));
}

#[test]
fn a_comparison_sends_only_the_blocks_that_differ() {
    let old = noise(7, 16 * MIB as usize);
    let world = world(16 * MIB, Some(&old));
    world.source.write_all_at(&old, 0).unwrap();
    world.source.write_all_at(b"changed", 5 * MIB + 70_000).unwrap();
    world.source.write_all_at(b"changed", 16 * MIB - 7).unwrap();
    let sender = world.sender(vec![], options(2, Compression::Off), Fault::default());
    sender.push(0, Mode::Compare, &ExtentSet::whole(16 * MIB)).unwrap();
    sender.wait(SOON).unwrap();
    assert!(sender.counters().sent < 200 << 10, "{:?}", sender.counters());
    assert!(content(&world.target) == content(&world.source));
}

#[test]
fn verification_writes_nothing_and_names_what_differs() {
    let old = noise(7, 4 * MIB as usize);
    let world = world(4 * MIB, Some(&old));
    world.source.write_all_at(&old, 0).unwrap();
    world.source.write_all_at(b"x", 3 * MIB).unwrap();
    let receiver =
        Receiver::start(vec![world.target_disk.clone()], 1, Access::Compare, Fault::default());
    let connect = Cuts { receiver: Arc::new(receiver), cuts: Mutex::new(vec![]) };
    let sender = Sender::start(
        vec![world.source_disk.clone()],
        Arc::new(connect),
        options(1, Compression::Off),
    );
    sender.push(0, Mode::Verify, &ExtentSet::whole(4 * MIB)).unwrap();
    sender.wait(SOON).unwrap();
    assert_eq!(sender.differing()[0].iter().collect::<Vec<_>>(), [Extent::new(3 * MIB, 64 << 10)]);
    assert!(content(&world.target) == old);
    // A source that tries to write all the same is refused.
    sender.push(0, Mode::Over, &ExtentSet::whole(4 * MIB)).unwrap();
    assert!(matches!(sender.wait(SOON), Err(Error::Target(_))));
    assert!(content(&world.target) == old);
}

#[test]
fn what_is_outstanding_after_a_stop_is_all_that_a_resumption_needs() {
    let size = 32 * MIB;
    let world = world(size, None);
    world.source.write_all_at(&noise(3, size as usize), 0).unwrap();
    let sender = world.sender(vec![10_000_000], options(1, Compression::Off), Fault::default());
    sender.push(0, Mode::Blank, &ExtentSet::whole(size)).unwrap();
    while sender.counters().safe < 5 * MIB {
        std::thread::sleep(Duration::from_millis(1));
    }
    let outstanding = sender.finish();
    assert!(outstanding[0].copy.bytes() < size, "something was acknowledged");
    let sender = world.sender(vec![], options(1, Compression::Off), Fault::default());
    sender.push(0, Mode::Over, &outstanding[0].copy).unwrap();
    sender.wait(SOON).unwrap();
    assert_eq!(sender.counters().read, outstanding[0].copy.bytes());
    assert!(content(&world.target) == content(&world.source));
}

#[test]
fn a_source_that_cannot_be_read_ends_the_streams_with_its_name() {
    let world = world(8 * MIB, None);
    world.source.write_all_at(&noise(3, 8 * MIB as usize), 0).unwrap();
    world.source.set_len(4 * MIB).unwrap();
    let sender = world.sender(vec![], options(1, Compression::Off), Fault::default());
    let tail = [Extent::new(3 * MIB, 4 * MIB)].into_iter().collect();
    // A file that was cut must neither pass for a hole nor for zeros.
    let before = sender.push(0, Mode::Over, &tail).unwrap_err().to_string();
    sender.push(0, Mode::Verify, &tail).unwrap();
    let during = sender.wait(SOON).unwrap_err().to_string();
    for error in [before, during] {
        assert!(error.contains("cannot read") && error.contains("source"), "{error}");
    }
}

#[test]
fn garbage_on_a_stream_fails_the_target_with_a_reason_and_writes_nothing() {
    let world = world(MIB, None);
    for bytes in [vec![0xff; 100], noise(1, 4096), {
        let mut far = vec![0; 48];
        far[0] = 2;
        far[8] = 1;
        far[16..24].copy_from_slice(&u64::MAX.to_le_bytes());
        far[24] = 1;
        far
    }] {
        let receiver =
            Receiver::start(vec![world.target_disk.clone()], 1, Access::Write, Fault::default());
        let (mut own, theirs) = UnixStream::pair().unwrap();
        receiver.attach(0, theirs).unwrap();
        own.write_all(&bytes).unwrap();
        let reply = mover::wire::read_reply(&mut own).unwrap();
        assert!(matches!(reply, mover::wire::Reply::Failed(_)), "{reply:?}");
        assert!(receiver.failed().is_some());
    }
    assert!(content(&world.target).iter().all(|b| *b == 0));
}

#[test]
fn a_file_that_is_all_hole_is_known_to_be_blank_whoever_made_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("target");
    let file = open(&path);
    file.set_len(4 * MIB).unwrap();
    let is_hole = || {
        let (disk, created) = Disk::target(&path, 4 * MIB).unwrap();
        assert!(!created);
        disk.is_hole().unwrap()
    };
    assert!(is_hole());
    file.write_all_at(&[0], 4 * MIB - 1).unwrap();
    assert!(!is_hole(), "what was written is data, zeros too");
}

#[test]
fn a_smaller_target_a_link_and_a_folder_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    std::fs::write(path("small"), vec![0; 4096]).unwrap();
    std::os::unix::fs::symlink(path("small"), path("link")).unwrap();
    let error = |name: &str| Disk::target(&path(name), 8192).unwrap_err().to_string();
    assert!(error("small").contains("make it at least as large"));
    assert!(error("link").contains("neither a regular file nor a block device"));
    std::fs::create_dir(path("folder")).unwrap();
    Disk::target(&path("folder"), 512).unwrap_err();
    std::fs::write(path("odd"), vec![0; 1000]).unwrap();
    assert!(Disk::source(&path("odd")).unwrap_err().to_string().contains("multiple of 512"));
}

#[test]
fn an_injected_fault_changes_the_target_so_that_the_checks_can_be_checked() {
    let world = world(4 * MIB, None);
    world.source.write_all_at(&noise(3, 4 * MIB as usize), 0).unwrap();
    let fault = Fault { flip_byte_at: Some(MIB + 5), drop_writes_at: None };
    let sender = world.sender(vec![], options(1, Compression::Off), fault);
    sender.push(0, Mode::Blank, &ExtentSet::whole(4 * MIB)).unwrap();
    sender.wait(SOON).unwrap();
    assert!(content(&world.target) != content(&world.source));
}

/// Where whole blocks alone are written past the cache, QEMU refuses a disk that does not end with one.
#[test]
fn a_disk_is_used_past_the_cache_only_if_its_last_sector_can_be() {
    let dir = tempfile::tempdir().unwrap();
    for size in [8192, 8192 + 512] {
        let path = dir.path().join(size.to_string());
        std::fs::write(&path, vec![0; size]).unwrap();
        let past = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::DIRECT;
        let opened = rustix::fs::open(&path, past, rustix::fs::Mode::empty());
        let last = |file: std::fs::File| {
            let len = if size % 4096 == 0 { 4096 } else { 512 };
            let mut buffer = Vec::new();
            file.read_exact_at(mover::disk::aligned(&mut buffer, len), (size - len) as u64).is_ok()
        };
        let can = opened.is_ok_and(|file| last(file.into()));
        assert_eq!(Disk::source(&path).unwrap().is_direct(), can, "{size}");
    }
}
