//! Formats of images, told by their magic and never by their names.

use std::fmt;
use std::fs::OpenOptions;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::sparse::read_up_to;
use crate::target::{Opened, open};
use crate::{Error, qcow2};

/// How many bytes of an image are enough to tell its format.
pub(crate) const HEAD: usize = 64 << 10;

/// The format of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// The disk's bytes as they are, as in ISO images; everything that is nothing else.
    Raw,
    /// qcow2, and the qcow before it.
    Qcow2,
    /// Of VMware.
    Vmdk,
    /// Of Hyper-V.
    Vhdx,
    /// Of Hyper-V and Azure before it.
    Vhd,
    /// Of VirtualBox.
    Vdi,
    /// QEMU's enhanced disk.
    Qed,
    /// Of Parallels.
    Parallels,
    /// Compressed by gzip.
    Gzip,
    /// Compressed by xz.
    Xz,
    /// Compressed by Zstandard.
    Zstd,
    /// Compressed by bzip2.
    Bzip2,
    /// A ZIP archive.
    Zip,
    /// A tar archive, such as an OVA.
    Tar,
}

/// Offset, magic and format. The first that matches counts.
const MAGICS: [(usize, &[u8], Format); 17] = [
    (0, b"QFI\xfb", Format::Qcow2),
    (0, b"KDMV", Format::Vmdk),
    (0, b"COWD", Format::Vmdk),
    (0, b"# Disk DescriptorFile", Format::Vmdk),
    (0, b"vhdxfile", Format::Vhdx),
    (0, b"conectix", Format::Vhd),
    (64, b"\x7f\x10\xda\xbe", Format::Vdi),
    (0, b"QED\0", Format::Qed),
    (0, b"WithoutFreeSpace", Format::Parallels),
    (0, b"WithouFreSpacExt", Format::Parallels),
    (0, b"\x1f\x8b\x08", Format::Gzip),
    (0, b"\xfd7zXZ\0", Format::Xz),
    (0, b"\x28\xb5\x2f\xfd", Format::Zstd),
    (0, b"BZh", Format::Bzip2),
    (0, b"PK\x03\x04", Format::Zip),
    (257, b"ustar\0", Format::Tar),
    (257, b"ustar ", Format::Tar),
];

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vmdk => "vmdk",
            Self::Vhdx => "vhdx",
            Self::Vhd => "vhd",
            Self::Vdi => "vdi",
            Self::Qed => "qed",
            Self::Parallels => "parallels",
            Self::Gzip => "gzip",
            Self::Xz => "xz",
            Self::Zstd => "zstd",
            Self::Bzip2 => "bzip2",
            Self::Zip => "zip",
            Self::Tar => "tar",
        })
    }
}

/// The format that the first bytes of an image tell.
pub(crate) fn of_head(head: &[u8]) -> Format {
    let matches =
        |offset: usize, magic: &[u8]| head.get(offset..).is_some_and(|it| it.starts_with(magic));
    MAGICS
        .into_iter()
        .find(|(offset, magic, _)| matches(*offset, magic))
        .map_or(Format::Raw, |(.., format)| format)
}

/// Tells the format of an image by its first bytes.
///
/// # Errors
///
/// Fails if the path is not a regular file or block device, or cannot be read.
pub fn detect(path: &Path) -> Result<Format, Error> {
    let (Opened::File(file, _) | Opened::Block(file, _)) =
        open(path, OpenOptions::new().read(true), 0)?;
    let mut head = vec![0; HEAD];
    let length = read_up_to(&file, &mut head, 0).map_err(Error::io("read", path))?;
    Ok(of_head(&head[..length]))
}

/// Tells the size of the disk in a raw or qcow2 image, of which it believes nothing unchecked.
///
/// # Errors
///
/// Fails if the image cannot be read, is of another format, or is a qcow2 that [`import`]
/// would refuse.
///
/// [`import`]: crate::import
pub fn virtual_size(path: &Path) -> Result<u64, Error> {
    size_as(path, detect(path)?)
}

/// The size of the disk in an image of a format that is known.
pub(crate) fn size_as(path: &Path, format: Format) -> Result<u64, Error> {
    let opened = open(path, OpenOptions::new().read(true), 0)?;
    let length = opened.length()?;
    let (Opened::File(file, _) | Opened::Block(file, _)) = opened;
    match format {
        Format::Raw => Ok(length),
        Format::Qcow2 => qcow2::virtual_size(&file, length)
            .map_err(|source| Error::Qcow2 { path: path.to_owned(), source }),
        format => Err(Error::Unsupported { path: path.to_owned(), format }),
    }
}
