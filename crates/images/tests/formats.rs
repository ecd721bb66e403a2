//! Images of each format become the disks that they were, or are refused.

mod common;

use std::os::unix::fs::{FileExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use common::{Bench, MIB, allocated, assert_same, compress, disk, file, import, padded};
use images::{Error, Format, Job, Qcow2Fault, Source, Target, detect, virtual_size};

fn qcow2(bench: &Bench, raw: &Path) -> PathBuf {
    bench.qemu_img(&["convert", "-O", "qcow2", raw.to_str().unwrap(), "disk.qcow2"]);
    bench.path("disk.qcow2")
}

#[tokio::test]
async fn compressed_images_are_what_they_were() {
    let (bench, disk) = (Bench::new(), disk());
    let raw = bench.file("raw", &disk);
    let qcow2 = qcow2(&bench, &raw);
    assert_eq!(detect(&qcow2).unwrap(), Format::Qcow2);
    assert_eq!(virtual_size(&qcow2).unwrap(), disk.len() as u64);
    let size = disk.len() + 4096;
    for (image, format) in [(&raw, Format::Raw), (&qcow2, Format::Qcow2)] {
        let plain = std::fs::read(image).unwrap();
        for kind in [Format::Raw, Format::Gzip, Format::Xz, Format::Zstd] {
            let packed = bench.file(&format!("{format}.{kind}"), &compress(kind, &plain));
            let name = format!("{format}-{kind}");
            let imported = import(&bench.job(file(&packed), &name, size)).await.unwrap();
            assert_eq!((imported.format, imported.virtual_size), (format, disk.len() as u64));
            assert_same(&bench.path(&name), &padded(&disk, size));
            assert!(allocated(&bench.path(&name)) < 2 * MIB as u64, "{name} is sparse");
        }
    }
}

#[tokio::test]
async fn zeros_stay_holes() {
    let (bench, disk) = (Bench::new(), disk());
    let raw = bench.file("raw", &disk);
    import(&bench.job(file(&raw), "disk", 64 * MIB)).await.unwrap();
    assert_same(&bench.path("disk"), &padded(&disk, 64 * MIB));
    assert!(allocated(&bench.path("disk")) < MIB as u64);
    images::ephemeral(&raw, &bench.path("copy")).unwrap();
    assert_same(&bench.path("copy"), &disk);
    assert!(images::ephemeral(&raw, &bench.path("copy")).is_err(), "it exists");
    bench.qemu_img(&["create", "-f", "qcow2", "huge", "1T"]);
    import(&bench.job(file(&bench.path("huge")), "huge disk", 1 << 40)).await.unwrap();
    assert_eq!((allocated(&bench.path("huge disk")), size(&bench.path("huge disk"))), (0, 1 << 40));
    import(&bench.job(Source::Blank, "blank", 64 * MIB)).await.unwrap();
    assert_eq!((allocated(&bench.path("blank")), size(&bench.path("blank"))), (0, 64 << 20));
}

fn size(path: &Path) -> u64 {
    path.metadata().unwrap().len()
}

fn fault(result: Result<images::Imported, Error>) -> Qcow2Fault {
    match result {
        Err(Error::Qcow2 { source, .. }) => source,
        other => panic!("it was not refused as a qcow2 image: {other:?}"),
    }
}

#[tokio::test]
async fn a_hostile_qcow2_is_refused() {
    use Qcow2Fault as Fault;
    type Right = fn(&Fault) -> bool;
    let (bench, disk) = (Bench::new(), disk());
    let raw = bench.file("raw", &disk);
    let sound = std::fs::read(qcow2(&bench, &raw)).unwrap();
    bench.qemu_img(&["create", "-f", "qcow2", "-b", "raw", "-F", "raw", "backed"]);
    bench.qemu_img(&["create", "-f", "qcow2", "-o", "data_file=other", "external", "16M"]);
    let patched = |offset: usize, bytes: &[u8]| {
        let mut image = sound.clone();
        image[offset..offset + bytes.len()].copy_from_slice(bytes);
        image
    };
    let read = |name| std::fs::read(bench.path(name)).unwrap();
    let cases: [(&str, Vec<u8>, Right); 13] = [
        ("a backing file", read("backed"), |it| matches!(it, Fault::BackingFile)),
        ("a data file", read("external"), |it| matches!(it, Fault::DataFile)),
        ("an absurd size", patched(24, &(1_u64 << 60).to_be_bytes()), |it| {
            matches!(it, Fault::Absurd(_))
        }),
        ("a size without tables", patched(24, &(1_u64 << 45).to_be_bytes()), |it| {
            matches!(it, Fault::Bounds("L1 table size"))
        }),
        ("tables outside", patched(40, &(1_u64 << 40).to_be_bytes()), |it| {
            matches!(it, Fault::Bounds("L1 table"))
        }),
        ("giant clusters", patched(20, &63_u32.to_be_bytes()), |it| {
            matches!(it, Fault::Bounds("cluster size"))
        }),
        ("encryption", patched(32, &2_u32.to_be_bytes()), |it| matches!(it, Fault::Encrypted)),
        ("corruption", patched(79, &[2]), |it| matches!(it, Fault::Corrupt)),
        ("unknown features", patched(72, &[1]), |it| matches!(it, Fault::Features(_))),
        ("an unknown version", patched(7, &[9]), |it| matches!(it, Fault::Version(9))),
        ("half a header", sound[..50].to_vec(), |it| matches!(it, Fault::Truncated)),
        ("no features", sound[..72].to_vec(), |it| matches!(it, Fault::Truncated)),
        ("only a header", sound[..112].to_vec(), |it| matches!(it, Fault::Bounds(_))),
    ];
    for (name, image, right) in cases {
        let path = bench.file(name, &image);
        let target = format!("{name} target");
        let fault = fault(import(&bench.job(file(&path), &target, 32 * MIB)).await);
        assert!(right(&fault), "{name}: {fault:?}");
        assert!(!bench.path(&target).exists(), "{name} wrote to the target");
    }
}

#[tokio::test]
async fn an_image_that_does_not_fit_writes_nothing() {
    let (bench, disk) = (Bench::new(), disk());
    let raw = bench.file("raw", &disk);
    for image in [qcow2(&bench, &raw), raw] {
        let error = import(&bench.job(file(&image), "disk", 15 * MIB)).await.unwrap_err();
        assert!(matches!(error, Error::TooLarge { image: 16_777_216, disk: 15_728_640 }));
        assert!(!bench.path("disk").exists());
        std::fs::remove_dir_all(bench.path("disk.work")).unwrap();
    }
}

#[tokio::test]
async fn formats_that_are_not_taken_are_named() {
    let (bench, disk) = (Bench::new(), disk());
    bench.file("raw", &disk);
    for (name, format) in
        [("vmdk", Format::Vmdk), ("vhdx", Format::Vhdx), ("vdi", Format::Vdi), ("vpc", Format::Vhd)]
    {
        bench.qemu_img(&["convert", "-O", name, "raw", name]);
        let error = import(&bench.job(file(&bench.path(name)), "disk", 32 * MIB)).await;
        let Err(Error::Unsupported { format: named, .. }) = error else { panic!("{error:?}") };
        assert_eq!(named, format);
        std::fs::remove_dir_all(bench.path("disk.work")).unwrap();
    }
}

#[tokio::test]
async fn a_disk_that_a_guest_wrote_is_not_taken_for_an_image() {
    let (bench, disk) = (Bench::new(), disk());
    let raw = bench.file("raw", &disk);
    let path = qcow2(&bench, &raw);
    let content = std::fs::read(&path).unwrap();
    let source = Source::File { path, format: Some(Format::Raw) };
    import(&bench.job(source, "disk", 16 * MIB)).await.unwrap();
    assert_same(&bench.path("disk"), &padded(&content, 16 * MIB));
}

#[tokio::test]
async fn a_bomb_is_refused() {
    let bench = Bench::new();
    let mut plain = vec![0; 128 * MIB];
    for kind in [Format::Gzip, Format::Xz, Format::Zstd] {
        plain[..4].fill(0);
        let bomb = bench.file("bomb", &compress(kind, &plain));
        let job = bench.job(file(&bomb), "disk", MIB);
        let error = import(&job).await.unwrap_err();
        assert!(matches!(error, Error::Overflow { disk: 1_048_576 }), "{error}");
        // Of a qcow2 image the disk's size does not tell how long it may be.
        plain[..4].copy_from_slice(b"QFI\xfb");
        let bomb = bench.file("bomb", &compress(kind, &plain));
        let mut job = Job { source: file(&bomb), ..job };
        job.limits.max_bytes = 8 * MIB as u64;
        let error = import(&job).await.unwrap_err();
        assert!(matches!(error, Error::TooManyBytes { .. }), "{error}");
        assert!(!bench.path("disk").exists());
        assert!(!bench.path("disk.work").join("image.partial").exists());
        std::fs::remove_dir_all(bench.path("disk.work")).unwrap();
    }
}

#[tokio::test]
async fn only_what_the_job_made_is_overwritten() {
    let (bench, disk) = (Bench::new(), disk());
    let raw = bench.file("raw", &disk);
    bench.file("disk", b"of somebody");
    let job = bench.job(file(&raw), "disk", 16 * MIB);
    assert!(matches!(import(&job).await, Err(Error::Taken { .. })));
    assert_same(&bench.path("disk"), b"of somebody");
    let link = bench.job(file(&raw), "link", 16 * MIB);
    symlink(bench.path("disk"), bench.path("link")).unwrap();
    assert!(matches!(import(&link).await, Err(Error::Kind { .. })));
    assert_same(&bench.path("disk"), b"of somebody");
    std::fs::remove_file(bench.path("disk")).unwrap();
    import(&job).await.unwrap();
    // From here on it is the guest's.
    let written = std::fs::File::options().write(true).open(bench.path("disk")).unwrap();
    written.write_all_at(b"by a guest", 0).unwrap();
    import(&job).await.unwrap();
    assert_eq!(std::fs::read(bench.path("disk")).unwrap()[..10], *b"by a guest");
    let other = Job { source: Source::Blank, ..job };
    assert!(matches!(import(&other).await, Err(Error::OtherJob { .. })));
}

#[tokio::test]
async fn an_import_that_died_while_writing_starts_its_disk_anew() {
    let (bench, disk) = (Bench::new(), disk());
    let raw = bench.file("raw", &disk);
    let job = bench.job(file(&raw), "disk", 16 * MIB);
    import(&job).await.unwrap();
    std::fs::remove_file(bench.path("disk.work").join("done.json")).unwrap();
    std::fs::write(bench.path("disk"), vec![0xaa; 20 * MIB]).unwrap();
    import(&job).await.unwrap();
    assert_same(&bench.path("disk"), &disk);
}

#[tokio::test]
async fn qemu_img_has_to_agree() {
    let (bench, disk) = (Bench::new(), disk());
    let raw = bench.file("raw", &disk);
    let image = qcow2(&bench, &raw);
    for (field, said) in [
        ("format", r#""format": "raw", "virtual-size": 16777216"#),
        ("size", r#""format": "qcow2", "virtual-size": 4096"#),
        ("backing file", r#""format": "qcow2", "virtual-size": 16777216, "backing-filename": "x""#),
        (
            "data file",
            r#""format": "qcow2", "virtual-size": 16777216,
               "format-specific": { "data": { "data-file": "x" } }"#,
        ),
    ] {
        let mut job = bench.job(file(&image), "disk", 16 * MIB);
        job.shim = ["sh".into(), "-c".into(), format!("echo '{{ {said} }}'").into()].into();
        let error = import(&job).await.unwrap_err();
        assert!(matches!(error, Error::Disagreement { field: it, .. } if it == field), "{error}");
        assert!(!bench.path("disk").exists());
    }
}

#[tokio::test]
async fn a_conversion_that_was_given_up_ends_its_program() {
    let (bench, disk) = (Bench::new(), disk());
    let raw = bench.file("raw", &disk);
    let image = qcow2(&bench, &raw);
    let pid = bench.path("pid");
    let mut job = bench.job(file(&image), "disk", 16 * MIB);
    let script = format!("echo $$ > {}; exec sleep 60", pid.display());
    let sound = std::mem::replace(&mut job.shim, ["sh".into(), "-c".into(), script.into()].into());
    let given_up = tokio::time::timeout(Duration::from_millis(500), import(&job)).await;
    assert!(given_up.is_err());
    job.shim = sound;
    tokio::time::timeout(Duration::from_secs(30), import(&job)).await.unwrap().unwrap();
    assert_same(&bench.path("disk"), &disk);
    let pid = std::fs::read_to_string(pid).unwrap();
    assert!(!Path::new("/proc").join(pid.trim()).exists());
}

/// A loop device over a file.
struct Loop(PathBuf);

impl Loop {
    /// None where they are not to be had, as in most containers.
    fn over(path: &Path) -> Option<Self> {
        let output = Command::new("losetup").args(["--find", "--show"]).arg(path).output().ok()?;
        let device = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| Self(device.trim().into()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

#[tokio::test]
async fn a_device_keeps_nothing_of_what_was_before() {
    let (bench, disk) = (Bench::new(), disk());
    let raw = bench.file("raw", &disk);
    let size = 20 * MIB + 512;
    let old = bench.file("device", &vec![0xaa; size]);
    let Some(device) = Loop::over(&old) else {
        return eprintln!("skipped: there are no loop devices");
    };
    let sources = [(file(&raw), disk.clone()), (file(&qcow2(&bench, &raw)), disk.clone())];
    for (source, content) in sources.into_iter().chain([(Source::Blank, Vec::new())]) {
        std::fs::write(&device.0, vec![0xaa; size]).unwrap();
        let target = Target::Block { path: device.0.clone() };
        let job = Job { target, ..bench.job(source, "work", 0) };
        import(&job).await.unwrap();
        assert_same(&device.0, &padded(&content, size));
        std::fs::remove_dir_all(&job.work).unwrap();
    }
    std::fs::write(&device.0, &disk).unwrap();
    import(&bench.job(file(&device.0), "clone", size)).await.unwrap();
    assert_same(&bench.path("clone"), &std::fs::read(&device.0).unwrap());
}

#[tokio::test]
async fn a_file_that_stands_for_a_device_keeps_its_size_and_nothing_of_what_was_before() {
    let (bench, disk) = (Bench::new(), disk());
    let raw = bench.file("raw", &disk);
    let size = 20 * MIB;
    for image in [&raw, &qcow2(&bench, &raw)] {
        let path = bench.file("allotted", &vec![0xaa; size]);
        let target = Target::Allotted { path: path.clone() };
        let job = Job { target, ..bench.job(file(image), "work", 0) };
        import(&job).await.unwrap();
        assert_same(&path, &padded(&disk, size));
        assert!(allocated(&path) < 2 * MIB as u64, "it is sparse");
        std::fs::remove_dir_all(&job.work).unwrap();
    }
}
