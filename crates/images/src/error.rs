//! What can go wrong, and what the user can do about it.

use std::io;
use std::path::{Path, PathBuf};

use crate::{Format, Qcow2Fault};

/// Why an image could not be brought to its disk.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or folder could not be used.
    #[error(
        "cannot {what} {path:?}: check that it exists, that this process may use it \
         and that there is room"
    )]
    Io {
        /// What was tried, as a verb.
        what: &'static str,
        /// With which file or folder.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// An address is not one that can be downloaded from.
    #[error("{url:?} is not an address of an image ({reason}): give one like {example}")]
    Address {
        /// The address, without what may be secret in it.
        url: String,
        /// What is wrong with it.
        reason: String,
        /// An address as it should be.
        example: &'static str,
    },
    /// A header, a certificate or credentials cannot be used for requests.
    #[error("cannot use the {what} given for {url}: check how it is written")]
    Setting {
        /// Which setting.
        what: &'static str,
        /// For which address.
        url: String,
    },
    /// No request could be sent, or its answer broke off.
    #[error("cannot download {url}: check the address, and that this node reaches its server")]
    Request {
        /// The address, without what may be secret in it.
        url: String,
        /// What the HTTP client said.
        #[source]
        source: reqwest::Error,
    },
    /// The server refused.
    #[error("the server answered {status} for {url}: {hint}")]
    Status {
        /// The address, without what may be secret in it.
        url: String,
        /// The HTTP status.
        status: u16,
        /// What the user can do.
        hint: &'static str,
    },
    /// The server's answer cannot be right.
    #[error("the answer for {url} is wrong ({reason}): check the server, then try again")]
    Answer {
        /// The address, without what may be secret in it.
        url: String,
        /// What is wrong.
        reason: String,
    },
    /// More bytes than allowed.
    #[error("{what} has more than {limit} bytes: use a smaller one, or raise the limit")]
    TooManyBytes {
        /// What is too long.
        what: String,
        /// The limit that it passed.
        limit: u64,
    },
    /// A checksum is not written as it should be.
    #[error(
        "{text:?} is not a checksum: write it like \"sha256:\" and 64 hexadecimal digits \
         (sha256, sha512, sha1 and md5 are known)"
    )]
    ChecksumSyntax {
        /// What was given.
        text: String,
    },
    /// The bytes are not those that were expected.
    #[error(
        "{what} has the checksum {actual}, not {expected}: it was damaged or replaced; \
         check the source and the checksum"
    )]
    Checksum {
        /// What was read.
        what: String,
        /// As it should be.
        expected: String,
        /// As it is.
        actual: String,
    },
    /// Compressed data is damaged or needs too much memory.
    #[error("cannot decompress the {kind} data of {path:?}: it is damaged; make it anew")]
    Decompress {
        /// The compressed file.
        path: PathBuf,
        /// How it is compressed.
        kind: &'static str,
        /// What the decoder said.
        #[source]
        source: io::Error,
    },
    /// A format that is not taken.
    #[error(
        "{path:?} is of the format {format}, which is not supported: \
         make a qcow2 or raw image of it first (for disks: qemu-img convert -O qcow2)"
    )]
    Unsupported {
        /// The image.
        path: PathBuf,
        /// Its format.
        format: Format,
    },
    /// A qcow2 image that is damaged or would lead to other files.
    #[error("the qcow2 image {path:?} is refused")]
    Qcow2 {
        /// The image.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: Qcow2Fault,
    },
    /// qemu-img sees another image than we do.
    #[error(
        "qemu-img and the header of {path:?} disagree about its {field}: \
         the image is damaged or made to deceive; make it anew with qemu-img convert"
    )]
    Disagreement {
        /// The image.
        path: PathBuf,
        /// About what they disagree.
        field: &'static str,
    },
    /// The image does not fit.
    #[error("the image is {image} bytes, the disk {disk}: ask for a larger one")]
    TooLarge {
        /// Virtual size of the image, or what is known to be its least.
        image: u64,
        /// Size of the disk.
        disk: u64,
    },
    /// The image turned out not to fit while it was decompressed.
    #[error("the decompressed image is more than the disk's {disk} bytes: ask for a larger one")]
    Overflow {
        /// Size of the disk.
        disk: u64,
    },
    /// There is a file already that this job did not make.
    #[error(
        "{path:?} exists already and was not made by this import: \
         remove it, or choose another path"
    )]
    Taken {
        /// The target.
        path: PathBuf,
    },
    /// A path leads to something of another kind.
    #[error("{path:?} is not {expected}: links and other kinds are not followed; correct the path")]
    Kind {
        /// The path.
        path: PathBuf,
        /// What it should be.
        expected: &'static str,
    },
    /// The work folder was used for something else.
    #[error(
        "the folder {path:?} holds the state of another import: \
         give each import a folder of its own, or remove this one"
    )]
    OtherJob {
        /// The work folder.
        path: PathBuf,
    },
    /// A program could not be started.
    #[error("cannot run {program}: install the Debian package {package}, and check PATH")]
    Tool {
        /// The program.
        program: String,
        /// The package that has it.
        package: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A program failed.
    #[error(
        "{program} failed for {path:?} ({status}): {said}; \
         if the image is sound there may be too little room, memory or time"
    )]
    ToolFailed {
        /// The program.
        program: &'static str,
        /// What it worked on.
        path: PathBuf,
        /// How it ended.
        status: std::process::ExitStatus,
        /// The end of what it wrote to its standard error.
        said: String,
    },
    /// A registry did not give what was asked for.
    #[error("cannot pull {image}: check its name, the credentials and that the registry is up")]
    Registry {
        /// The image.
        image: String,
        /// What the registry's client said.
        #[source]
        source: Box<oci_client::errors::OciDistributionError>,
    },
    /// The blobs of a registry's image break off again and again.
    #[error("a layer of {image} broke off: check the network between this node and the registry")]
    Layer {
        /// The image.
        image: String,
        /// What the stream said.
        #[source]
        source: io::Error,
    },
    /// A layer is not the archive that it should be.
    #[error("a layer of the container image {image} is damaged: build and push it anew")]
    Archive {
        /// The image.
        image: String,
        /// What the reader of archives said.
        #[source]
        source: io::Error,
    },
    /// An image's manifest or an OCI layout is not as it should be.
    #[error("the container image {image} is not usable ({reason}): build and push it anew")]
    Manifest {
        /// The image.
        image: String,
        /// What is wrong.
        reason: String,
    },
    /// A container image without a disk.
    #[error(
        "no regular file {place} in the container image {image} (links and paths that \
         lead out are not followed): put the disk there, or give its path"
    )]
    NoDisk {
        /// The image.
        image: String,
        /// Where the disk should be.
        place: String,
    },
    /// A container image with more than one disk.
    #[error("{image} has more than one file below /disk ({first}, {second}): give the path of one")]
    SeveralDisks {
        /// The image.
        image: String,
        /// One of them.
        first: String,
        /// Another one.
        second: String,
    },
    /// A container disk that is not here, and must not be pulled.
    #[error("{reference} is not on this node, and its pull policy is Never: allow it to be pulled")]
    NotCached {
        /// The image.
        reference: String,
    },
    /// A seed's file cannot have this name.
    #[error(
        "{name:?} cannot be the name of a file on a seed disk: \
         use relative names without \"..\", of at most 255 bytes for each part"
    )]
    SeedName {
        /// The name.
        name: String,
    },
    /// A seed's label cannot be this.
    #[error("{label:?} cannot be a disk's label: use 1 to 32 letters, digits, '-', '_' or '.'")]
    SeedLabel {
        /// The label.
        label: String,
    },
    /// The import was given up while this part of it ran.
    #[error("the import was stopped: run it again to go on")]
    Stopped,
}

impl Error {
    /// For `map_err`: names what was tried, and with what.
    pub(crate) fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { what, path, source }
    }
}
