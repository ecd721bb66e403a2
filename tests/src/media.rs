//! Places for disks that a test cannot have without root: block devices and
//! filesystems of their own. They go when they are dropped.

use anyhow::{Context, Result, bail};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A loop device over a file of its own.
#[derive(Debug)]
pub struct Loop {
    device: PathBuf,
    backing: tempfile::NamedTempFile,
}

impl Loop {
    /// A device of `size` bytes, all zeros.
    ///
    /// # Errors
    /// Says so when this machine has no loop devices to give: the test cannot be made then.
    pub fn new(size: u64) -> Result<Self> {
        let backing = tempfile::Builder::new().prefix("godwit-loop-").tempfile()?;
        backing.as_file().set_len(size)?;
        let args = ["--find", "--show"].map(Path::new);
        let said = run("losetup", &[args[0], args[1], backing.path()])
            .context("this test needs loop devices: run it as root where `losetup` works")?;
        Ok(Self { device: said.trim().into(), backing })
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.device
    }

    /// The file behind it: where that ends, reads of the device fail.
    pub fn backing(&self) -> &File {
        self.backing.as_file()
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        // A QEMU that is just ending may still have it: it goes with that.
        let _ = run("losetup", &[Path::new("--detach"), &self.device]);
    }
}

/// A filesystem in memory.
#[derive(Debug)]
pub struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    /// One with room for `size` bytes.
    ///
    /// # Errors
    /// Says so when this user may not mount: the test cannot be made then.
    pub fn new(size: u64) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("godwit-tmpfs-").tempdir()?;
        let fs = Self(folder);
        fs.mount(&format!("size={size}")).context(
            "this test needs a filesystem of its own: run it as root where `mount` works",
        )?;
        Ok(fs)
    }

    /// Makes it larger.
    ///
    /// # Errors
    /// When that fails.
    pub fn grow(&self, size: u64) -> Result<()> {
        self.mount(&format!("remount,size={size}"))
    }

    fn mount(&self, options: &str) -> Result<()> {
        let args = ["-t", "tmpfs", "-o", options, "none"].map(Path::new);
        run("mount", &[&args[..], &[self.0.path()]].concat())?;
        Ok(())
    }

    /// A file on it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // Lazily: a QEMU that is just ending may still use it.
        let _ = run("umount", &[Path::new("--lazy"), self.0.path()]);
    }
}

fn run(program: &str, args: &[&Path]) -> Result<String> {
    let output = Command::new(program).args(args).output();
    let output = output.with_context(|| format!("cannot run {program}"))?;
    if !output.status.success() {
        bail!("{program}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
