//! The images that a node has: programs of its machine.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// An image: what it runs, and what else can be named in it.
#[derive(Debug, Clone, Default)]
pub struct Image {
    /// What runs when a container says nothing else.
    pub entrypoint: Vec<String>,
    /// Its programs, by the name that they have in it.
    pub programs: BTreeMap<String, PathBuf>,
    /// The programs of the machine can be named as well, by their paths.
    pub machine: bool,
}

/// Images by name, without tag and digest.
#[derive(Debug, Clone, Default)]
pub struct Images(pub BTreeMap<String, Image>);

/// Why an image cannot be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// It is no name.
    #[error(
        "Failed to apply default image tag {0:?}: couldn't parse image reference {0:?}: invalid reference format"
    )]
    Invalid(String),
    /// There is none of that name.
    #[error("image {0:?} is not on this node, and an embedded cluster pulls none; it has: {1}")]
    Missing(String, String),
}

/// An image's name without tag and digest.
pub fn name(image: &str) -> &str {
    let image = image.split_once('@').map_or(image, |(name, _)| name);
    let last = image.rfind('/').map_or(0, |at| at + 1);
    image[last..].find(':').map_or(image, |at| &image[..last + at])
}

impl Images {
    /// An image of which a container is made.
    ///
    /// # Errors
    /// Why there is none.
    pub fn find(&self, image: &str) -> Result<&Image, Error> {
        let name = name(image);
        let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "._-/:".contains(c);
        if name.is_empty() || !name.chars().all(allowed) {
            return Err(Error::Invalid(image.to_owned()));
        }
        self.0.get(name).ok_or_else(|| {
            let all: Vec<&str> = self.0.keys().map(String::as_str).collect();
            Error::Missing(image.to_owned(), all.join(", "))
        })
    }
}

impl Image {
    /// The program of a name, as a path of the machine.
    pub fn program(&self, name: &str) -> Option<PathBuf> {
        let path = Path::new(name);
        let last = path.file_name()?.to_str()?;
        if let Some(program) = self.programs.get(last) {
            return Some(program.clone());
        }
        if !self.machine {
            return None;
        }
        if name.contains('/') {
            return path.is_file().then(|| path.to_owned());
        }
        let places = ["/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin", "/sbin"];
        places.iter().map(|place| Path::new(place).join(name)).find(|path| path.is_file())
    }
}
