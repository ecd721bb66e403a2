//! Volumes as folders and files of this machine.
//!
//! ```text
//! BASE/nodes/NODE/volumes/VOLUME/        of a node's own
//! BASE/shared/VOLUME/                    of all nodes
//!                        data/           what a file system claim is
//!                        disk            what a block claim is: a sparse file of its size
//! ```

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Where volumes are.
#[derive(Debug, Clone)]
pub struct Disks {
    base: PathBuf,
}

impl Disks {
    /// Below a folder.
    pub fn new(base: PathBuf) -> Self {
        Self { base }
    }

    /// The folder of a node's pods and volumes.
    pub fn node(&self, node: &str) -> PathBuf {
        self.base.join("nodes").join(node)
    }

    /// The folders of all nodes that there were.
    pub fn nodes(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.base.join("nodes")).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect()
    }

    fn pool(&self, node: Option<&str>) -> PathBuf {
        match node {
            Some(node) => self.node(node).join("volumes"),
            None => self.base.join("shared"),
        }
    }

    /// Makes a volume; one that was made before is let be. Its path is what pods see of it.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn make(
        &self,
        node: Option<&str>,
        volume: &str,
        block: bool,
        size: u64,
    ) -> io::Result<PathBuf> {
        let folder = self.pool(node).join(volume);
        let mut builder = DirBuilder::new();
        builder.recursive(true).mode(0o700).create(&folder)?;
        let path = folder.join(if block { "disk" } else { "data" });
        if block {
            let mut options = OpenOptions::new();
            let file = options.write(true).create(true).mode(0o600).open(&path)?;
            grow(&file, size)?;
        } else {
            builder.create(&path)?;
        }
        File::open(&folder)?.sync_all()?;
        Ok(path)
    }

    /// Makes a block volume larger. It never shrinks.
    ///
    /// # Errors
    /// When it cannot be changed.
    pub fn expand(&self, path: &Path, size: u64) -> io::Result<()> {
        grow(&OpenOptions::new().write(true).open(self.own(path)?)?, size)
    }

    /// Removes a volume, by its path; one that is gone is let be.
    ///
    /// # Errors
    /// When it cannot be removed, or is not below our folder.
    pub fn remove(&self, path: &Path) -> io::Result<()> {
        let folder = self.own(path)?.parent().unwrap_or(path).to_owned();
        match std::fs::remove_dir_all(folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// A path that is ours: a person can write any other into a volume.
    fn own<'a>(&self, path: &'a Path) -> io::Result<&'a Path> {
        let rest = path.strip_prefix(&self.base).unwrap_or(Path::new(""));
        let parts: Vec<&str> = rest.iter().filter_map(|part| part.to_str()).collect();
        let plain = parts.iter().all(|part| *part != "..");
        if let ["shared", _, "disk" | "data"] | ["nodes", _, "volumes", _, "disk" | "data"] =
            parts[..]
            && plain
        {
            return Ok(path);
        }
        let text = format!("{} is no volume below {}", path.display(), self.base.display());
        Err(io::Error::new(io::ErrorKind::InvalidInput, text))
    }
}

fn grow(file: &File, size: u64) -> io::Result<()> {
    if file.metadata()?.len() < size {
        file.set_len(size)?;
        file.sync_all()?;
    }
    Ok(())
}
