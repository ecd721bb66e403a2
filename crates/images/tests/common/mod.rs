//! What several tests need.

#![allow(dead_code)]

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use images::{Error, Format, Imported, Job, Limits, Progress, Source, Target};
use tempfile::TempDir;

pub mod containers;
pub mod server;

pub const MIB: usize = 1 << 20;

/// A folder for one test, and what it needs in it.
pub struct Bench {
    folder: TempDir,
}

impl Bench {
    pub fn new() -> Self {
        // Another test may have installed it.
        #[expect(clippy::disallowed_methods, reason = "reqwest and oci-client take no other")]
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        Self { folder: tempfile::tempdir().unwrap() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        std::fs::write(self.path(name), bytes).unwrap();
        self.path(name)
    }

    /// A job whose target is the file of that name.
    pub fn job(&self, source: Source, name: &str, size: usize) -> Job {
        Job {
            source,
            target: Target::File { path: self.path(name), size: size as u64 },
            work: self.path(&format!("{name}.work")),
            shim: shim(),
            limits: limits(),
        }
    }

    pub fn qemu_img(&self, args: &[&str]) {
        let output = Command::new("qemu-img").args(args).current_dir(self.folder.path()).output();
        let output = output.unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

pub fn limits() -> Limits {
    Limits {
        max_bytes: 256 << 20,
        stall: Duration::from_secs(10),
        retries: 3,
        backoff: Duration::from_millis(10),
    }
}

/// The example that does nothing but to confine, which `cargo test` builds as well.
pub fn shim() -> Vec<OsString> {
    let own = std::env::current_exe().unwrap();
    let path = own.ancestors().nth(2).unwrap().join("examples/confine");
    assert!(path.exists(), "{path:?} is missing: run cargo build --examples");
    vec![path.into()]
}

pub fn file(path: &Path) -> Source {
    Source::File { path: path.to_owned(), format: None }
}

pub async fn import(job: &Job) -> Result<Imported, Error> {
    let (reports, _) = tokio::sync::watch::channel(Progress::default());
    images::import(job, &reports).await
}

/// Bytes that no compression makes shorter, the same for the same seed.
pub fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    std::iter::repeat_with(&mut next).flatten().take(length).collect()
}

/// A disk that is mostly zeros, but neither at its beginning nor at its end.
pub fn disk() -> Vec<u8> {
    let mut disk = vec![0; 16 * MIB];
    for (start, length) in [(512, 3000), (5 * MIB, MIB / 2), (16 * MIB - 700, 700)] {
        disk[start..start + length].copy_from_slice(&noise(length, start as u64));
    }
    disk
}

/// What a file of this size has to be after the import of a disk.
pub fn padded(disk: &[u8], size: usize) -> Vec<u8> {
    let mut padded = disk.to_owned();
    padded.resize(size, 0);
    padded
}

pub fn allocated(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    path.metadata().unwrap().blocks() * 512
}

/// A message that does not print megabytes.
pub fn assert_same(path: &Path, expected: &[u8]) {
    let actual = std::fs::read(path).unwrap();
    assert_eq!(actual.len(), expected.len(), "the length of {path:?}");
    let first = actual.iter().zip(expected).position(|(a, b)| a != b);
    assert_eq!(first, None, "the first byte of {path:?} that differs");
}

pub fn compress(format: Format, plain: &[u8]) -> Vec<u8> {
    use std::io::Read as _;
    let mut packed = Vec::new();
    match format {
        Format::Gzip => flate2::read::GzEncoder::new(plain, flate2::Compression::fast())
            .read_to_end(&mut packed)
            .map(drop),
        Format::Xz => liblzma::read::XzEncoder::new(plain, 1).read_to_end(&mut packed).map(drop),
        Format::Zstd => zstd::stream::copy_encode(plain, &mut packed, 1),
        _ => std::io::copy(&mut { plain }, &mut packed).map(drop),
    }
    .unwrap();
    packed
}
