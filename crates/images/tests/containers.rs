//! Disks in container images are found, and only they.

mod common;

use std::ffi::OsString;
use std::time::Duration;

use common::containers::{Image, Running, digest, entry, layer, layout};
use common::{Bench, MIB, assert_same, compress, disk, import, limits, noise, padded, shim};
use images::{Cache, Cached, Error, Format, Http, Progress, Pull, Registry, Source};
use tar::EntryType;

fn qcow2(bench: &Bench, disk: &[u8]) -> Vec<u8> {
    bench.file("raw", disk);
    bench.qemu_img(&["convert", "-O", "qcow2", "raw", "qcow2"]);
    std::fs::read(bench.path("qcow2")).unwrap()
}

#[tokio::test]
async fn a_container_disk_is_found_in_its_layers() {
    let (bench, disk) = (Bench::new(), disk());
    let qcow2 = qcow2(&bench, &disk);
    for kind in [Format::Raw, Format::Gzip, Format::Zstd] {
        let below = layer(&[("etc/passwd", b"root"), ("disk/old.img", b"hidden")]);
        let with_disk = layer(&[("./disk/disk.qcow2", &qcow2), ("usr/x", b"x")]);
        let image = Image::new(vec![
            compress(kind, &below),
            compress(kind, &with_disk),
            compress(kind, &layer(&[("etc/motd", b"above"), ("disk/.wh.gone", b"")])),
        ]);
        let source = layout(bench.path(&format!("layout-{kind}")), &[("amd64", &image)]);
        let name = format!("disk-{kind}");
        let job = bench.job(Source::Registry(source), &name, 16 * MIB);
        let imported = import(&job).await.unwrap();
        assert_eq!(imported.format, Format::Qcow2);
        assert_same(&bench.path(&name), &disk);
    }
}

#[tokio::test]
async fn a_disk_is_chosen_by_path_and_platform() {
    let bench = Bench::new();
    let (first, second, arm) = (noise(MIB, 1), noise(MIB, 2), noise(MIB, 3));
    let image = Image::new(vec![layer(&[("disk/a.img", &first), ("disk/b.img", &second)])]);
    let other = Image::new(vec![layer(&[("disk/a.img", &arm)])]);
    let source = layout(bench.path("layout"), &[("arm64", &other), ("amd64", &image)]);
    let job = bench.job(Source::Registry(source.clone()), "both", MIB);
    assert!(matches!(import(&job).await, Err(Error::SeveralDisks { .. })));
    let chosen = Registry { disk_path: Some("/disk/b.img".into()), ..source.clone() };
    import(&bench.job(Source::Registry(chosen), "second", MIB)).await.unwrap();
    assert_same(&bench.path("second"), &second);
    let platform = Registry { platform: Some("linux/arm64".into()), ..source.clone() };
    import(&bench.job(Source::Registry(platform), "arm", MIB)).await.unwrap();
    assert_same(&bench.path("arm"), &arm);
    let none = Registry { platform: Some("linux/s390x".into()), ..source };
    let error = import(&bench.job(Source::Registry(none), "none", MIB)).await;
    assert!(matches!(error, Err(Error::Manifest { .. })), "{error:?}");
}

#[tokio::test]
async fn entries_that_lead_out_are_not_followed() {
    let bench = Bench::new();
    let outside = bench.file("outside", b"not of the image");
    let outside = outside.to_str().unwrap();
    let mut archive = tar::Builder::new(Vec::new());
    entry(&mut archive, EntryType::Symlink, "disk/link.img", outside.as_bytes());
    entry(&mut archive, EntryType::Link, "disk/hard.img", outside.as_bytes());
    entry(&mut archive, EntryType::Fifo, "disk/pipe.img", b"");
    entry(&mut archive, EntryType::Block, "disk/device.img", b"");
    entry(&mut archive, EntryType::Regular, "disk/../../out.img", b"escaped");
    entry(&mut archive, EntryType::Regular, "/disk/absolute.img", b"escaped");
    let image = Image::new(vec![archive.into_inner().unwrap()]);
    let source = layout(bench.path("layout"), &[("amd64", &image)]);
    let error = import(&bench.job(Source::Registry(source.clone()), "disk", MIB)).await;
    assert!(matches!(error, Err(Error::NoDisk { .. })), "{error:?}");
    for path in ["disk/link.img", "/disk/../../out.img", "../outside"] {
        let named = Registry { disk_path: Some(path.into()), ..source.clone() };
        std::fs::remove_dir_all(bench.path("disk.work")).unwrap();
        let error = import(&bench.job(Source::Registry(named), "disk", MIB)).await;
        assert!(matches!(error, Err(Error::NoDisk { .. })), "{path}: {error:?}");
    }
    assert!(!bench.path("disk").exists() && !bench.path("out.img").exists());
}

#[tokio::test]
async fn a_layer_that_is_not_what_its_digest_says_is_refused() {
    let (bench, mut disk) = (Bench::new(), noise(MIB, 1));
    let image = Image::new(vec![layer(&[("disk/a.img", &disk)])]);
    let source = layout(bench.path("layout"), &[("amd64", &image)]);
    disk[5000] ^= 1;
    let path = bench.path("layout/blobs/sha256").join(&digest(&image.blobs[0])[7..]);
    std::fs::write(path, layer(&[("disk/a.img", &disk)])).unwrap();
    let error = import(&bench.job(Source::Registry(source), "disk", MIB)).await;
    assert!(matches!(error, Err(Error::Checksum { .. })), "{error:?}");
}

#[tokio::test]
async fn a_layer_is_bounded() {
    let bench = Bench::new();
    let zeros = vec![0; 32 * MIB];
    // Before the disk, within it, and after it.
    for files in [
        [("a", &zeros[..]), ("disk/b.img", b"small")],
        [("disk/a.img", &zeros), ("b", b"small")],
        [("disk/a.img", b"small"), ("b", &zeros)],
    ] {
        let image = Image::new(vec![compress(Format::Gzip, &layer(&files))]);
        let source = layout(bench.path("layout"), &[("amd64", &image)]);
        let mut job = bench.job(Source::Registry(source), "disk", MIB);
        job.limits.max_bytes = 8 * MIB as u64;
        let error = import(&job).await.unwrap_err();
        assert!(matches!(error, Error::TooManyBytes { .. }), "{error:?}");
        assert!(!bench.path("disk.work").join("disk.partial").exists());
        assert!(!bench.path("disk").exists());
        std::fs::remove_dir_all(bench.path("disk.work")).unwrap();
    }
}

/// A real registry, with everything that is asked of it.
async fn pulls_from(running: &Running, bench: &Bench, name: &str) {
    let disk = disk();
    let image =
        Image::new(vec![compress(Format::Gzip, &layer(&[("disk/disk", &qcow2(bench, &disk))]))]);
    let other = Image::new(vec![layer(&[("disk/disk", b"for another machine")])]);
    running.push_index("some/disk", "1", &[("arm64", &other), ("amd64", &image)]).await;
    let by_digest = format!("some/disk@{}", digest(image.manifest()));
    for (way, reference) in [("tag", "some/disk:1"), ("digest", &by_digest)] {
        let source = Source::Registry(running.registry(reference));
        let name = format!("{name}-{way}");
        let imported = import(&bench.job(source, &name, 16 * MIB)).await.unwrap();
        assert!(imported.bytes_moved >= image.blobs[0].len() as u64);
        assert_same(&bench.path(&name), &disk);
    }
    let missing = Source::Registry(running.registry("some/disk:2"));
    let error = import(&bench.job(missing, &format!("{name}-missing"), MIB)).await;
    assert!(matches!(error, Err(Error::Registry { .. })), "{error:?}");
    // A registry is a web server as well.
    let url = running.url(&format!("/v2/some/disk/blobs/{}", digest(&other.blobs[0])));
    let (ca, credentials) = (running.ca(), running.credentials());
    let http = Http { url, ca, credentials, ..Http::default() };
    let error = import(&bench.job(Source::Http(http), &format!("{name}-http"), 16 * MIB)).await;
    let Err(Error::Unsupported { format: Format::Tar, .. }) = error else { panic!("{error:?}") };
}

#[tokio::test]
async fn a_registry_is_pulled_from() {
    let bench = Bench::new();
    let Some(running) = Running::start(&bench.path("registry"), false).await else {
        return eprintln!("skipped: docker-registry is not installed");
    };
    pulls_from(&running, &bench, "plain").await;
    let secure = Registry { insecure: false, ..running.registry("some/disk:1") };
    let error = import(&bench.job(Source::Registry(secure), "secure", MIB)).await;
    assert!(matches!(error, Err(Error::Registry { .. })), "plain HTTP was used: {error:?}");
}

#[tokio::test]
async fn a_registry_with_its_own_ca_and_password_is_pulled_from() {
    let bench = Bench::new();
    let Some(running) = Running::start(&bench.path("registry"), true).await else {
        return eprintln!("skipped: docker-registry is not installed");
    };
    pulls_from(&running, &bench, "tls").await;
    let known = running.registry("some/disk:1");
    let unknown = [Registry { credentials: None, ..known.clone() }, Registry { ca: None, ..known }];
    for (number, registry) in unknown.into_iter().enumerate() {
        let name = format!("refused-{number}");
        let error = import(&bench.job(Source::Registry(registry), &name, MIB)).await;
        assert!(matches!(error, Err(Error::Registry { .. })), "{error:?}");
    }
}

#[tokio::test]
async fn a_cut_layer_resumes_without_fetching_again() {
    let (bench, disk) = (Bench::new(), noise(4 * MIB, 8));
    let Some(mut running) = Running::start(&bench.path("registry"), false).await else {
        return eprintln!("skipped: docker-registry is not installed");
    };
    let image = Image::new(vec![layer(&[("disk/disk", &disk)])]);
    running.push("disk", "1", &image).await;
    let (way, left) = running.cut_once_after(2 * MIB).await;
    let job = bench.job(Source::Registry(running.registry("disk:1")), "disk", 4 * MIB);
    let imported = import(&job).await.unwrap();
    way.abort();
    assert_eq!(left.load(std::sync::atomic::Ordering::Relaxed), 0, "it was cut");
    assert_same(&bench.path("disk"), &disk);
    assert_eq!(imported.bytes_moved, image.blobs[0].len() as u64);
}

async fn get(cache: &Cache, registry: &Registry, policy: Pull) -> Result<Cached, Error> {
    get_by(cache, registry, policy, &shim()).await
}

async fn get_by(
    cache: &Cache,
    registry: &Registry,
    policy: Pull,
    shim: &[OsString],
) -> Result<Cached, Error> {
    let (reports, _) = tokio::sync::watch::channel(Progress::default());
    cache.get(registry, policy, shim, &reports).await
}

#[tokio::test]
async fn a_cache_keeps_one_disk_for_each_digest() {
    let (bench, disk) = (Bench::new(), disk());
    let first = Image::new(vec![layer(&[("disk/disk", &qcow2(&bench, &disk))])]);
    let registry = layout(bench.path("layout"), &[("amd64", &first)]);
    let cache = Cache::new(bench.path("cache"), limits());
    let never = get(&cache, &registry, Pull::Never).await;
    assert!(matches!(never, Err(Error::NotCached { .. })), "{never:?}");
    let log = bench.path("log");
    let script = format!("echo ran >> {}; exec \"$0\" \"$@\"", log.display());
    let logged = ["sh".into(), "-c".into(), script.into()];
    let at_once = || get_by(&cache, &registry, Pull::IfNotPresent, &logged);
    let (one, two, three) = tokio::join!(at_once(), at_once(), at_once());
    let (one, _, _) = (one.unwrap(), two.unwrap(), three.unwrap());
    let runs = std::fs::read_to_string(&log).unwrap().lines().count();
    assert_eq!(runs, 2, "it was inspected and converted once");
    assert_eq!(one.digest, digest(first.manifest()));
    assert_eq!(one.virtual_size, disk.len() as u64);
    assert!(one.path.metadata().unwrap().permissions().readonly());
    images::ephemeral(&one.path, &bench.path("copy")).unwrap();
    assert_same(&bench.path("copy"), &disk);

    // The image is another one now.
    let second = Image::new(vec![layer(&[("disk/disk", &noise(1000, 1))])]);
    layout(bench.path("layout"), &[("amd64", &second)]);
    let kept = get(&cache, &registry, Pull::IfNotPresent).await.unwrap();
    assert_eq!(kept.path, one.path);
    let new = get(&cache, &registry, Pull::Always).await.unwrap();
    assert_same(&new.path, &padded(&noise(1000, 1), 4096));
    let kept_new = get(&cache, &registry, Pull::Never).await.unwrap();
    assert_eq!(kept_new.path, new.path);

    // What is in use stays.
    drop(kept);
    assert!(cache.evict(Duration::ZERO).await.unwrap().is_empty());
    let old = one.path.clone();
    drop(one);
    assert!(cache.evict(Duration::from_secs(60)).await.unwrap().is_empty(), "too young");
    assert_eq!(cache.evict(Duration::ZERO).await.unwrap(), [old]);
    assert!(new.path.exists());

    // What was left of a download goes as well.
    let left = bench.path("cache/work/left");
    std::fs::create_dir(&left).unwrap();
    for name in ["lock", "download.partial"] {
        std::fs::write(left.join(name), b"").unwrap();
    }
    cache.evict(Duration::ZERO).await.unwrap();
    assert!(!left.join("download.partial").exists());
}
