//! The client against `qemu-nbd`.

mod common;

use std::time::Duration;

use common::{LONG, PLENTY, QemuNbd, raw_image, run};
use nbd::{BASE_ALLOCATION, Closed, DIRTY, Error, Extent, HOLE, Options, ZERO, connect};

const MIB: u64 = 1 << 20;
const BRIEF: Duration = Duration::from_millis(50);

#[tokio::test]
async fn reads_and_holes_are_those_of_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let written = [(0, MIB), (3 * MIB, 64 << 10), (6 * MIB, 2 * MIB)];
    let content = raw_image(&folder.path().join("disk"), 8 * MIB, &written);
    let server = QemuNbd::start(folder, &["-f", "raw", "disk"]);
    let client = server.client(Options::new("").context(BASE_ALLOCATION)).await;
    assert_eq!(client.export().size, 8 * MIB);
    assert!(!client.export().read_only);

    let empty = HOLE | ZERO;
    let extent = |offset, end, flags| Extent { offset, len: end - offset, flags };
    let end = (3 * MIB) + (64 << 10);
    let expected = [
        extent(0, MIB, 0),
        extent(MIB, 3 * MIB, empty),
        extent(3 * MIB, end, 0),
        extent(end, 6 * MIB, empty),
        extent(6 * MIB, 8 * MIB, 0),
    ];
    let extents = client.extents(BASE_ALLOCATION, 0..8 * MIB, PLENTY, LONG).await.unwrap();
    assert_eq!(extents, expected);
    let part = client.extents(BASE_ALLOCATION, MIB / 2..2 * MIB, PLENTY, LONG).await.unwrap();
    assert_eq!(part, [extent(MIB / 2, MIB, 0), extent(MIB, 2 * MIB, empty)]);
    let few = client.extents(BASE_ALLOCATION, 0..8 * MIB, 4, LONG).await;
    assert!(matches!(few, Err(Error::TooManyExtents { limit: 4, .. })), "{few:?}");

    let dirt = vec![0xff; content.len()];
    let filled = client.read(0, dirt.clone(), LONG).await.unwrap();
    assert!(filled.buffer == content);
    assert_eq!(filled.holes, []);
    let odd = client.read(3 * MIB + 7, vec![0; 4099], LONG).await.unwrap();
    assert!(odd.buffer == content[3 * MIB as usize + 7..][..4099]);
    client.disconnect(LONG).await.unwrap();

    let client = server.client(Options { sparse: true, ..Options::new("") }).await;
    let filled = client.read(0, dirt, LONG).await.unwrap();
    assert!(filled.buffer == content);
    let holes: Vec<_> = filled.holes.iter().map(|hole| (hole.start, hole.end)).collect();
    assert_eq!(holes, [(MIB, 3 * MIB), (end, 6 * MIB)]);
}

#[tokio::test]
async fn many_reads_at_once_each_get_their_own() {
    let folder = tempfile::tempdir().unwrap();
    let content = raw_image(&folder.path().join("disk"), 8 * MIB, &[(0, 8 * MIB)]);
    let server = QemuNbd::start(folder, &["-f", "raw", "disk"]);
    let client = server.client(Options::new("")).await;

    let reads = (0..256u64).map(|index| {
        let client = client.clone();
        let offset = (index * 7919) % 2000 * 4096;
        tokio::spawn(async move {
            let filled = client.read(offset, vec![0; 16 << 10], LONG).await.unwrap();
            (offset as usize, filled.buffer)
        })
    });
    for read in reads.collect::<Vec<_>>() {
        let (offset, data) = read.await.unwrap();
        assert!(data == content[offset..offset + data.len()]);
    }
}

#[tokio::test]
async fn a_range_beyond_one_request_is_followed_to_its_end() {
    let folder = tempfile::tempdir().unwrap();
    let size = 5 << 30;
    std::fs::File::create(folder.path().join("disk")).unwrap().set_len(size).unwrap();
    let server = QemuNbd::start(folder, &["-f", "raw", "disk"]);
    let client = server.client(Options::new("").context(BASE_ALLOCATION)).await;

    let extents = client.extents(BASE_ALLOCATION, 0..size, PLENTY, LONG).await.unwrap();

    assert_eq!(extents, [Extent { offset: 0, len: size, flags: HOLE | ZERO }]);
}

#[tokio::test]
async fn a_stored_bitmap_tells_what_was_written() {
    let folder = tempfile::tempdir().unwrap();
    let image = |program: &str, arguments: &[&str]| run(program, arguments, folder.path());
    image("qemu-img", &["create", "-q", "-f", "qcow2", "disk", "16M"]);
    image("qemu-img", &["bitmap", "--add", "-g", "64K", "disk", "since"]);
    image("qemu-io", &["-c", "write 1M 64k", "-c", "write 5M 200k", "disk"]);
    let server = QemuNbd::start(folder, &["-f", "qcow2", "-r", "-B", "since", "disk"]);
    let bitmap = nbd::dirty_bitmap("since");
    let client = server.client(Options::new("").context(BASE_ALLOCATION).context(&bitmap)).await;
    assert!(client.export().read_only);

    let extents = client.extents(&bitmap, 0..16 * MIB, PLENTY, LONG).await.unwrap();

    let dirty: Vec<_> = extents.iter().filter(|e| e.flags & DIRTY != 0).collect();
    let found: Vec<_> = dirty.iter().map(|extent| (extent.offset, extent.len)).collect();
    assert_eq!(found, [(MIB, 64 << 10), (5 * MIB, 256 << 10)]);
    assert_eq!(extents.last().unwrap().end(), 16 * MIB);
    let allocation = client.extents(BASE_ALLOCATION, 0..16 * MIB, PLENTY, LONG).await.unwrap();
    assert!(allocation.iter().any(|extent| extent.flags & HOLE != 0));
}

#[tokio::test]
async fn what_is_not_there_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    raw_image(&folder.path().join("disk"), MIB, &[]);
    let server = QemuNbd::start(folder, &["-f", "raw", "-x", "disk", "disk"]);
    server.client(Options::new("disk")).await.disconnect(LONG).await.unwrap();

    let export = server.connect(Options::new("other"), LONG).await.unwrap_err();
    assert!(matches!(export, connect::Error::Refused { .. }), "{export:?}");
    assert!(export.to_string().contains("`other`"), "{export}");
    let bitmap = Options::new("disk").context(nbd::dirty_bitmap("none"));
    let context = server.connect(bitmap, LONG).await.unwrap_err();
    assert!(matches!(context, connect::Error::NoContext { .. }), "{context:?}");
    assert!(context.to_string().contains("qemu:dirty-bitmap:none"), "{context}");
}

#[tokio::test]
async fn what_cannot_be_asked_is_not_sent() {
    let folder = tempfile::tempdir().unwrap();
    raw_image(&folder.path().join("disk"), MIB, &[]);
    let server = QemuNbd::start(folder, &["-f", "raw", "disk"]);
    let client = server.client(Options::new("").context(BASE_ALLOCATION)).await;

    for (offset, len) in [(MIB, 1), (u64::MAX, 2), (0, (32 << 20) + 1)] {
        let read = client.read(offset, vec![0; len], LONG).await;
        assert!(matches!(read, Err(Error::Invalid { .. })), "{read:?}");
    }
    let beyond = client.extents(BASE_ALLOCATION, 0..MIB + 1, PLENTY, LONG).await;
    assert!(matches!(beyond, Err(Error::Invalid { .. })), "{beyond:?}");
    let unknown = client.extents("qemu:dirty-bitmap:x", 0..MIB, PLENTY, LONG).await;
    assert!(matches!(unknown, Err(Error::Invalid { .. })), "{unknown:?}");
    assert_eq!(client.extents(BASE_ALLOCATION, 5..5, PLENTY, LONG).await.unwrap(), []);
    assert!(client.read(MIB, vec![], LONG).await.unwrap().buffer.is_empty());
}

#[tokio::test]
async fn a_failing_disk_fails_its_reads_by_name_and_no_others() {
    let folder = tempfile::tempdir().unwrap();
    // In sectors of 512 bytes; the disk has no holes, which would not be read.
    let disk = "driver=blkdebug,image.driver=null-co,image.size=1M,\
                inject-error.0.event=none,inject-error.0.iotype=read,\
                inject-error.0.errno=5,inject-error.0.sector=16";
    let server = QemuNbd::start(folder, &["--image-opts", disk]);
    let client = server.client(Options::new("")).await;

    let bad = client.read(8192, vec![0; 4096], LONG).await.unwrap_err();
    let Error::Server { errno, .. } = &bad else { panic!("{bad:?}") };
    assert_eq!(errno.name(), Some("EIO"));
    assert!(bad.to_string().contains("EIO"), "{bad}");
    client.read(65536, vec![0; 4096], LONG).await.unwrap();
    client.disconnect(LONG).await.unwrap();

    // Why that is not the default.
    let client = server.client(Options { sparse: true, ..Options::new("") }).await;
    let bad = client.read(8192, vec![0; 4096], LONG).await;
    assert!(matches!(bad, Err(Error::Server { .. } | Error::Closed { .. })), "{bad:?}");
}

#[tokio::test]
async fn a_late_reply_is_dropped_and_the_connection_lives_on() {
    let folder = tempfile::tempdir().unwrap();
    let content = raw_image(&folder.path().join("disk"), MIB, &[(0, MIB)]);
    let server = QemuNbd::start(folder, &["-f", "raw", "disk"]);
    let client = server.client(Options::new("")).await;

    server.process.signal("STOP");
    let late = client.read(0, vec![0; 65536], BRIEF).await.unwrap_err();
    assert!(matches!(late, Error::Deadline { .. }), "{late:?}");
    let dropped = client.read(65536, vec![0; 65536], LONG);
    assert!(tokio::time::timeout(BRIEF, dropped).await.is_err());
    server.process.signal("CONT");

    let filled = client.read(4096, vec![0; 4096], LONG).await.unwrap();
    assert!(filled.buffer == content[4096..8192]);
}

#[tokio::test]
async fn requests_left_behind_are_bounded() {
    let folder = tempfile::tempdir().unwrap();
    raw_image(&folder.path().join("disk"), MIB, &[]);
    let server = QemuNbd::start(folder, &["-f", "raw", "disk"]);
    let client = server.client(Options { in_flight: 2, ..Options::new("") }).await;

    server.process.signal("STOP");
    for _ in 0..5 {
        let late = client.read(0, vec![0; 512], BRIEF).await;
        assert!(matches!(late, Err(Error::Deadline { .. })), "{late:?}");
    }
    server.process.signal("CONT");

    for _ in 0..5 {
        client.read(0, vec![0; 512], LONG).await.unwrap();
    }
}

#[tokio::test]
async fn the_end_of_the_server_fails_what_waits() {
    let folder = tempfile::tempdir().unwrap();
    raw_image(&folder.path().join("disk"), MIB, &[]);
    let server = QemuNbd::start(folder, &["-f", "raw", "disk"]);
    let client = server.client(Options::new("")).await;

    server.process.signal("STOP");
    let waiting = tokio::spawn({
        let client = client.clone();
        async move { client.read(0, vec![0; 512], LONG).await }
    });
    tokio::task::yield_now().await;
    drop(server);

    let waiting = waiting.await.unwrap();
    assert!(matches!(waiting, Err(Error::Closed { .. })), "{waiting:?}");
    assert!(matches!(client.closed().await, Closed::Eof | Closed::Io(_)));
    let later = client.read(0, vec![0; 512], LONG).await;
    assert!(matches!(later, Err(Error::Closed { .. })), "{later:?}");
    client.disconnect(LONG).await.unwrap();
}

#[tokio::test]
async fn a_server_that_takes_one_client_takes_the_next_after_a_disconnect() {
    let folder = tempfile::tempdir().unwrap();
    raw_image(&folder.path().join("disk"), MIB, &[]);
    let server = QemuNbd::start(folder, &["-f", "raw", "--shared", "1", "disk"]);
    let first = server.client(Options::new("")).await;

    let second = server.connect(Options::new(""), BRIEF).await;
    assert!(matches!(second, Err(connect::Error::Deadline { .. })), "{second:?}");
    first.disconnect(LONG).await.unwrap();
    server.client(Options::new("")).await.read(0, vec![0; 512], LONG).await.unwrap();
}
