//! What an importer's pod is told by the controller, and what it says of how far it is.

use serde::{Deserialize, Serialize};

/// Disks are multiples of this: they are opened past the cache, and a file system may take whole blocks alone.
pub const BLOCK: u64 = 4096;

/// The variable of the pod's environment in which its [`Order`] is, as JSON.
pub const ORDER: &str = "GODWIT_IMPORT";
/// The variable with the user's name for the source's server.
pub const USER: &str = "GODWIT_IMPORT_USER";
/// The variable with the password for the source's server.
pub const PASSWORD: &str = "GODWIT_IMPORT_PASSWORD";
/// The variable of a lender's pod: the path of the disk that it lends.
pub const LEND: &str = "GODWIT_LEND";
/// The variable with the pod's address.
pub const ADDRESS: &str = "GODWIT_IMPORT_ADDRESS";
/// Annotation of a DataVolume that waits for an upload: an [`Upload`], as JSON.
pub const UPLOAD: &str = "godwit.dev/upload";
/// Where certificates of authorities are mounted.
pub const CERTIFICATES: &str = "/certs";

/// What is to be brought where.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Order {
    /// Tells it from all others, those for disks of the same name as well.
    pub id: String,
    /// From where.
    pub source: Source,
    /// Where to.
    pub target: Target,
    /// A folder that outlives the container.
    pub work: String,
    /// Whether all of the disk is allocated at once.
    #[serde(default)]
    pub preallocate: bool,
}

/// From where.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Source {
    /// From nowhere: the disk is empty.
    Blank,
    /// From a web server.
    Http {
        /// Its address.
        url: String,
        /// What it must be.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        checksum: Option<String>,
        /// Each `Name: value`.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        headers: Vec<String>,
    },
    /// From a registry.
    Registry {
        /// `docker://host/name:tag`.
        url: String,
        /// Over plain HTTP.
        #[serde(default)]
        insecure: bool,
    },
    /// From a person, over the network.
    Upload,
    /// From another claim, which a pod of that claim's namespace and node lends.
    Clone(Lent),
}

/// Where to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Target {
    /// A file that is made.
    File {
        /// Its path.
        path: String,
        /// In bytes; None makes it as large as the source.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        size: Option<u64>,
    },
    /// A device, or the file that stands for one.
    Device {
        /// Its path.
        path: String,
    },
}

/// How far it is: a line of its standard output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Bytes of this step that are done.
    pub done: u64,
    /// Of so many, if that is known.
    #[serde(default)]
    pub total: Option<u64>,
    /// Which step it is: see [`Step`].
    pub what: Step,
    /// Why it broke off, as long as it is only tried again.
    #[serde(default)]
    pub broken: Option<String>,
}

/// Where an upload goes: a line of an importer's standard output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Upload {
    /// The address.
    pub upload: String,
    /// The one certificate to believe there, in PEM.
    pub certificate: String,
}

/// Where a disk is lent: a line of a lender's standard output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lent {
    /// The address.
    pub lent: String,
    /// The one certificate to believe there, in PEM.
    pub certificate: String,
}

/// The Secret with the token of a DataVolume's upload.
pub fn upload_secret(volume: &str) -> String {
    format!("upload-{volume}")
}

/// The Secret with the token of a DataVolume's clone.
pub fn clone_secret(volume: &str) -> String {
    format!("clone-{volume}")
}

/// Whether a registry, `host:port`, is on this very machine: then it may speak without TLS, since
/// nobody is in between.
pub fn is_own_machine(registry: &str) -> bool {
    let host = match registry.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, _)) => address,
        None => registry.split(':').next().unwrap_or_default(),
    };
    host == "localhost"
        || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// A step of an import.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "as their names say")]
pub enum Step {
    Waiting,
    Downloading,
    Verifying,
    Unpacking,
    Converting,
    Writing,
}

impl Progress {
    /// How far a whole import is, in hundredths of a percent: below 10000 until it is over. None
    /// when that cannot be said.
    pub fn share(&self, source: &Source) -> Option<u64> {
        const ALL: u64 = 9999;
        // The network is what takes long.
        let (from, to) = match (source, self.what) {
            (_, Step::Waiting) => return None,
            (Source::Blank | Source::Upload | Source::Clone(_), _) => (0, ALL),
            (_, Step::Downloading) => (0, 9000),
            (_, Step::Verifying) => (9000, 9200),
            (_, Step::Unpacking) => (9200, 9500),
            (_, Step::Converting | Step::Writing) => (9500, ALL),
        };
        let total = self.total.filter(|total| *total > 0)?;
        let done = u128::from(self.done.min(total)) * u128::from(to - from) / u128::from(total);
        Some(from + u64::try_from(done).unwrap_or(to - from))
    }
}
