//! Checksums as users write them: "sha256:…".

use std::fmt::{self, Write as _};
use std::io::{self, Read};
use std::str::FromStr;

use sha2::digest::DynDigest;

use crate::Error;

/// A checksum which an image must have, over its bytes as they are downloaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checksum {
    algorithm: Algorithm,
    hex: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Algorithm {
    Md5,
    Sha1,
    Sha256,
    Sha512,
}

impl Algorithm {
    const ALL: [Self; 4] = [Self::Md5, Self::Sha1, Self::Sha256, Self::Sha512];

    fn name(self) -> &'static str {
        match self {
            Self::Md5 => "md5",
            Self::Sha1 => "sha1",
            Self::Sha256 => "sha256",
            Self::Sha512 => "sha512",
        }
    }

    fn hasher(self) -> Box<dyn DynDigest> {
        match self {
            Self::Md5 => Box::new(md5::Md5::default()),
            Self::Sha1 => Box::new(sha1::Sha1::default()),
            Self::Sha256 => Box::new(sha2::Sha256::default()),
            Self::Sha512 => Box::new(sha2::Sha512::default()),
        }
    }
}

impl Checksum {
    /// Reads everything and returns the checksum of the same kind that it has.
    pub(crate) fn of(&self, reader: &mut dyn Read) -> io::Result<Self> {
        let mut hasher = self.algorithm.hasher();
        let mut buffer = vec![0; 256 << 10];
        loop {
            match reader.read(&mut buffer)? {
                0 => break,
                count => hasher.update(&buffer[..count]),
            }
        }
        Ok(Self { algorithm: self.algorithm, hex: hex(&hasher.finalize()) })
    }

    /// The digits, which are safe as the name of a file.
    pub(crate) fn hex(&self) -> &str {
        &self.hex
    }

    /// Whether it is a SHA-256, as the digests of container images have to be.
    pub(crate) fn is_sha256(&self) -> bool {
        self.algorithm == Algorithm::Sha256
    }
}

impl FromStr for Checksum {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        parse(text).ok_or_else(|| Error::ChecksumSyntax { text: text.to_owned() })
    }
}

fn parse(text: &str) -> Option<Checksum> {
    let (name, digits) = text.trim().split_once(':')?;
    let algorithm = Algorithm::ALL.into_iter().find(|known| known.name() == name)?;
    let whole = digits.len() == 2 * algorithm.hasher().output_size();
    let valid = whole && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    valid.then(|| Checksum { algorithm, hex: digits.to_ascii_lowercase() })
}

impl fmt::Display for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.algorithm.name(), self.hex)
    }
}

/// SHA-256 of a short text, as a name that is safe for files.
pub(crate) fn name_of(text: &str) -> String {
    use sha2::Digest as _;
    hex(&sha2::Sha256::digest(text.as_bytes()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
