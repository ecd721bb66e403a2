//! The test guest, as `guest/build` makes it.

use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The repository.
pub fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_owned()
}

/// A file of the guest.
///
/// # Errors
/// When it was not built.
pub fn image(name: &str) -> Result<PathBuf> {
    let path = root().join("target/guest").join(name);
    if !path.exists() {
        bail!("{} is not there; run `make guest`", path.display());
    }
    Ok(path)
}

/// All files below a folder.
///
/// # Errors
/// When it cannot be read.
pub fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        match (kind.is_dir(), kind.is_file()) {
            (true, _) => files.extend(self::files(&entry.path())?),
            (_, true) => files.push(entry.path()),
            _ => {}
        }
    }
    Ok(files)
}

/// Where the guest may write raw, in bytes of the disk: see guest/README.md.
pub const REGION: std::ops::Range<u64> = 32 << 20..48 << 20;

/// A fresh disk for a guest, of `mib` MiB.
///
/// # Errors
/// When it cannot be made.
pub fn disk(path: &Path, mib: u64) -> Result<()> {
    if mib == 64 {
        std::fs::copy(image("disk.raw")?, path).context("cannot copy the guest's disk")?;
        return Ok(());
    }
    let status = Command::new(root().join("guest/build"))
        .arg("--disk")
        .arg(path)
        .args(["--size", &mib.to_string()])
        .status()?;
    if !status.success() {
        bail!("guest/build could not make {}", path.display());
    }
    Ok(())
}

/// A spec for a guest with one disk.
///
/// # Errors
/// When the guest was not built.
pub fn spec(vm: &str, disk: &Path, memory_mib: u64) -> Result<String> {
    spec_with(vm, &[("root", disk)], memory_mib)
}

/// A spec for a guest with several disks.
///
/// # Errors
/// When the guest was not built.
pub fn spec_with(vm: &str, disks: &[(&str, &Path)], memory_mib: u64) -> Result<String> {
    let cmdline = std::fs::read_to_string(image("cmdline")?)?;
    let disks: Vec<_> =
        disks.iter().map(|(name, path)| serde_json::json!({"name": name, "path": path})).collect();
    Ok(serde_json::json!({
        "name": vm,
        "memoryMiB": memory_mib,
        "accelerator": "tcg",
        "disks": disks,
        "boot": {
            "kernel": image("vmlinuz")?,
            "initrd": image("initramfs.img")?,
            "cmdline": cmdline.trim(),
        },
        "serials": ["console", "oracle"],
    })
    .to_string())
}
