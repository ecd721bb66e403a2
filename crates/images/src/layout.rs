//! OCI layouts on disk, as `skopeo copy … oci:/path` makes them.

use std::fs::{File, OpenOptions};
use std::io::Read as _;
use std::path::{Path, PathBuf};

use oci_client::manifest::{OciDescriptor, OciImageIndex, OciImageManifest, OciManifest};

use crate::Error;
use crate::http::verify;
use crate::registry::{Platform, digest_of};
use crate::target::{Opened, open};

/// Manifests are small; a registry takes none that is larger.
const MAX_MANIFEST: u64 = 4 << 20;
/// An index may lead to another, but not without end.
const MAX_DEPTH: usize = 4;
const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// A folder with images, and which of them is meant.
pub(crate) struct Layout {
    folder: PathBuf,
    tag: Option<String>,
}

impl Layout {
    /// Parses what follows `oci:`.
    pub fn parse(text: &str) -> Self {
        // A tag is what follows the last colon, unless that is within the path.
        match text.rsplit_once(':').filter(|(_, tag)| !tag.contains('/')) {
            Some((folder, tag)) => Self { folder: folder.into(), tag: Some(tag.to_owned()) },
            None => Self { folder: text.into(), tag: None },
        }
    }

    /// Finds the manifest of a platform's variant, and its digest.
    pub fn manifest(&self, platform: &Platform) -> Result<(OciImageManifest, String), Error> {
        let bytes = read(&self.folder.join("index.json"))?;
        let mut index: OciImageIndex =
            serde_json::from_slice(&bytes).map_err(|_| self.fault("index.json is no index"))?;
        if let Some(tag) = &self.tag {
            index.manifests.retain(|entry| {
                entry.annotations.as_ref().and_then(|it| it.get(REF_NAME)) == Some(tag)
            });
        }
        for _ in 0..MAX_DEPTH {
            let digest = platform.choose(&index.manifests);
            let digest = digest.ok_or_else(|| self.fault(&platform.missing()))?;
            let bytes = self.read_blob(&digest)?;
            match serde_json::from_slice(&bytes) {
                Ok(OciManifest::Image(manifest)) => return Ok((manifest, digest)),
                Ok(OciManifest::ImageIndex(next)) => index = next,
                Err(_) => return Err(self.fault("a manifest is not valid")),
            }
        }
        Err(self.fault("its indexes lead to more and more indexes"))
    }

    /// Opens a blob whose digest was verified.
    pub fn blob(&self, descriptor: &OciDescriptor) -> Result<File, Error> {
        let path = self.path(&descriptor.digest)?;
        let file = regular(&path)?;
        let digest = digest_of(&descriptor.digest, &self.name())?;
        verify(&digest, &mut &file, &format!("{path:?}"), &path)?;
        std::io::Seek::rewind(&mut &file).map_err(Error::io("read", &path))?;
        Ok(file)
    }

    /// As a user would name it.
    pub fn name(&self) -> String {
        let tag = self.tag.as_ref().map(|tag| format!(":{tag}")).unwrap_or_default();
        format!("oci:{}{tag}", self.folder.display())
    }

    fn read_blob(&self, digest: &str) -> Result<Vec<u8>, Error> {
        let path = self.path(digest)?;
        let bytes = read(&path)?;
        let digest = digest_of(digest, &self.name())?;
        verify(&digest, &mut bytes.as_slice(), &format!("{path:?}"), &path)?;
        Ok(bytes)
    }

    fn path(&self, digest: &str) -> Result<PathBuf, Error> {
        let digest = digest_of(digest, &self.name())?;
        Ok(self.folder.join("blobs/sha256").join(digest.hex()))
    }

    fn fault(&self, reason: &str) -> Error {
        Error::Manifest { image: self.name(), reason: reason.to_owned() }
    }
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    let mut bytes = Vec::new();
    regular(path)?.take(MAX_MANIFEST).read_to_end(&mut bytes).map_err(Error::io("read", path))?;
    Ok(bytes)
}

fn regular(path: &Path) -> Result<File, Error> {
    match open(path, OpenOptions::new().read(true), 0)? {
        Opened::File(file, _) => Ok(file),
        Opened::Block(..) => Err(Error::Kind { path: path.to_owned(), expected: "a regular file" }),
    }
}
