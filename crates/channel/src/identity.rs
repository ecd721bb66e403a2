//! Who may speak: SPIFFE ids, certificate authorities, credentials and trust.
//!
//! Every certificate carries exactly one URI, `spiffe://<cluster>/<role>/<instance>`; a
//! CA's carries `spiffe://<cluster>`, and it vouches for ids of that cluster only.

mod ca;
mod credentials;
mod files;
mod trust;

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

pub use ca::{Ca, Identity, Validity};
pub use credentials::Credentials;
pub(crate) use trust::id_of;
pub use trust::{Trust, linked, linked_of, soonest_end};

/// What a process is, as its certificate says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The node agent; owns the gateway.
    Handler,
    /// One VM.
    Launcher,
    /// Reconcilers.
    Controller,
    /// Admission, subresources and the web page.
    Api,
    /// The link between clusters.
    Synchronizer,
}

impl Role {
    const ALL: [Self; 5] =
        [Self::Handler, Self::Launcher, Self::Controller, Self::Api, Self::Synchronizer];

    /// The word in the id.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Handler => "handler",
            Self::Launcher => "launcher",
            Self::Controller => "controller",
            Self::Api => "api",
            Self::Synchronizer => "synchronizer",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// `spiffe://<cluster>/<role>/<instance>`: who a certificate stands for.
///
/// A cluster is 1 to 63 of `a-z 0-9 . -`, an instance (a node's name, a pod's UID) 1 to
/// 128 of `A-Z a-z 0-9 . _ -`; both begin and end with a letter or a digit.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SpiffeId {
    cluster: String,
    role: Role,
    instance: String,
}

impl SpiffeId {
    /// Checks the parts and puts them together.
    pub fn new(cluster: &str, role: Role, instance: &str) -> Result<Self, Error> {
        check_cluster(cluster)?;
        let letter = |b: u8| b.is_ascii_alphanumeric();
        if !well_formed(instance, 128, letter, b"._-") {
            return Err(Error::Malformed {
                what: "instance",
                value: clipped(instance),
                rule: "1 to 128 of A-Z a-z 0-9 . _ -, a letter or digit at both ends",
            });
        }
        Ok(Self { cluster: cluster.into(), role, instance: instance.into() })
    }

    /// The cluster's id: the trust domain.
    pub fn cluster(&self) -> &str {
        &self.cluster
    }

    /// The role.
    pub fn role(&self) -> Role {
        self.role
    }

    /// Which process of that role.
    pub fn instance(&self) -> &str {
        &self.instance
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}/{}/{}", self.cluster, self.role, self.instance)
    }
}

impl FromStr for SpiffeId {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self, Error> {
        let malformed = || Error::Malformed {
            what: "SPIFFE id",
            value: clipped(s),
            rule: "spiffe://<cluster>/<role>/<instance>",
        };
        let mut parts = s.strip_prefix("spiffe://").ok_or_else(malformed)?.split('/');
        let (Some(cluster), Some(role), Some(instance), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(malformed());
        };
        let role =
            Role::ALL.into_iter().find(|r| r.as_str() == role).ok_or_else(|| Error::Malformed {
                what: "role",
                value: clipped(role),
                rule: "handler, launcher, controller, api or synchronizer",
            })?;
        Self::new(cluster, role, instance)
    }
}

impl TryFrom<String> for SpiffeId {
    type Error = Error;

    fn try_from(s: String) -> Result<Self, Error> {
        s.parse()
    }
}

impl From<SpiffeId> for String {
    fn from(id: SpiffeId) -> Self {
        id.to_string()
    }
}

fn check_cluster(cluster: &str) -> Result<(), Error> {
    let letter = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    if well_formed(cluster, 63, letter, b".-") {
        return Ok(());
    }
    Err(Error::Malformed {
        what: "cluster id",
        value: clipped(cluster),
        rule: "1 to 63 of a-z 0-9 . -, a letter or digit at both ends",
    })
}

fn well_formed(s: &str, max: usize, letter: impl Fn(u8) -> bool, inner: &[u8]) -> bool {
    let b = s.as_bytes();
    let ends = |b: Option<&u8>| b.is_some_and(|b| letter(*b));
    b.len() <= max
        && ends(b.first())
        && ends(b.last())
        && b.iter().all(|b| letter(*b) || inner.contains(b))
}

/// What a peer sent, short enough for a log line.
fn clipped(s: &str) -> String {
    s.chars().take(160).collect()
}

/// Why an identity, a CA or a trust bundle cannot be made, read or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not the shape that ids have.
    #[error("{what} {value:?} is not valid: expected {rule}")]
    Malformed {
        /// Which part.
        what: &'static str,
        /// What was given, clipped.
        value: String,
        /// What is expected.
        rule: &'static str,
    },
    /// The certificate does not carry exactly one name, a URI.
    #[error(
        "the certificate carries {found} subject alternative names; exactly one is expected, a \
         spiffe:// URI"
    )]
    NotOneUri {
        /// How many names of any kind it carries.
        found: usize,
    },
    /// Bytes that are no certificate or no key.
    #[error("{what} cannot be read: {text}; issue it again")]
    Encoding {
        /// What was being read.
        what: &'static str,
        /// What the parser said.
        text: String,
    },
    /// A CA was asked to vouch for a foreign cluster.
    #[error("the CA of cluster {ca} does not vouch for {asked}; use the CA of that cluster")]
    ForeignCluster {
        /// The CA's cluster.
        ca: String,
        /// What it was asked for.
        asked: String,
    },
    /// A certificate that is no CA in a trust bundle.
    #[error(
        "a certificate in the trust bundle is not a CA's; put the peer cluster's CA certificate there"
    )]
    NotACa,
    /// A bundle that trusts nobody.
    #[error("the trust bundle holds no certificate")]
    EmptyTrust,
    /// The crypto library refused.
    #[error("a certificate could not be made")]
    Generate(#[source] rcgen::Error),
    /// The file system refused.
    #[error("{path} cannot be {verb}")]
    File {
        /// Which file.
        path: PathBuf,
        /// `read` or `written`.
        verb: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A file that anybody else could have put or read there.
    #[error("{path} is not trusted: {text}")]
    Unsafe {
        /// Which file.
        path: PathBuf,
        /// What is wrong, and how to put it right.
        text: &'static str,
    },
}
