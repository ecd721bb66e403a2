//! Where images come from.

use std::fmt;
use std::path::PathBuf;

use crate::{Checksum, Format};

/// Where an image comes from.
#[derive(Debug, Clone)]
pub enum Source {
    /// Nowhere: the disk is empty.
    Blank,
    /// A web server.
    Http(Http),
    /// A container image which holds a disk.
    Registry(Registry),
    /// A disk of another node.
    Peer(Peer),
    /// A file or a device of this node: an image that was uploaded, or a disk.
    File {
        /// Its path, which must not be a link. Nobody may change an image meanwhile.
        path: PathBuf,
        /// Its format, or none to detect it. A disk that a guest has written to must be given
        /// as raw: its content may look like any format.
        format: Option<Format>,
    },
}

/// An image on a web server.
#[derive(Clone, Default)]
pub struct Http {
    /// Its address, `http://` or `https://`.
    pub url: String,
    /// What its bytes must be.
    pub checksum: Option<Checksum>,
    /// Sent with each request, but not to other servers that this one refers to.
    pub headers: Vec<(String, String)>,
    /// Sent as the headers are.
    pub credentials: Option<Credentials>,
    /// Certificates in PEM to trust besides the system's.
    pub ca: Option<String>,
}

/// An image in a registry.
#[derive(Clone, Default)]
pub struct Registry {
    /// Its address: `docker://host[:port]/name[:tag|@digest]`, or `oci:/path[:tag]` for an
    /// OCI layout on disk.
    pub url: String,
    /// For the registry.
    pub credentials: Option<Credentials>,
    /// Certificates in PEM to trust besides the system's.
    pub ca: Option<String>,
    /// Uses plain HTTP, which only a caller may allow that trusts the network to this host.
    pub insecure: bool,
    /// The disk's path in the image; else it is the one file below `/disk`.
    pub disk_path: Option<String>,
    /// Which of an image's variants is taken, as `os/architecture`; `linux/amd64` by default.
    pub platform: Option<String>,
}

/// A raw disk that another node lends: see [`Lent`](crate::Lent).
#[derive(Clone)]
pub struct Peer {
    /// Its address, `https://`.
    pub url: String,
    /// The one certificate to believe there, in PEM.
    pub certificate: String,
    /// What lets this in.
    pub token: String,
}

/// Who asks.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    /// The user's name.
    pub user: String,
    /// The password, or a token in its place.
    pub password: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("user", &self.user).finish_non_exhaustive()
    }
}

impl fmt::Debug for Http {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Http")
            .field("url", &public(&self.url))
            .field("checksum", &self.checksum)
            .field("credentials", &self.credentials)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registry")
            .field("url", &public(&self.url))
            .field("credentials", &self.credentials)
            .field("insecure", &self.insecure)
            .field("disk_path", &self.disk_path)
            .field("platform", &self.platform)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Peer").field("url", &public(&self.url)).finish_non_exhaustive()
    }
}

impl Source {
    /// What makes this another source than others. Credentials do not.
    pub(crate) fn identity(&self) -> String {
        match self {
            Self::Blank => "blank".to_owned(),
            Self::Http(it) => format!("http {} {:?}", it.url, it.checksum),
            Self::Registry(it) => {
                format!("registry {} {:?} {:?}", it.url, it.disk_path, it.platform)
            }
            // It may be lent by another pod the next time.
            Self::Peer(_) => "peer".to_owned(),
            Self::File { path, format } => format!("file {path:?} {format:?}"),
        }
    }
}

/// An address without what may be secret in it: its user, and the query of a signed one.
pub(crate) fn public(url: &str) -> String {
    let Ok(mut parsed) = reqwest::Url::parse(url) else { return "an address".to_owned() };
    // Both only fail for addresses that cannot have a user.
    let _ = parsed.set_username("");
    let _ = parsed.set_password(None);
    parsed.set_query(None);
    parsed.set_fragment(None);
    parsed.to_string()
}
