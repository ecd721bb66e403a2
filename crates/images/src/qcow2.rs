//! The header of qcow2 images, of which nothing is believed.

use std::fs::File;
use std::io;

use crate::sparse::read_up_to;

const BACKING_FORMAT: u32 = 0xe279_2aca;
const DATA_FILE_NAME: u32 = 0x4441_5441;
const CRYPTO: u32 = 0x0537_be77;

const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;
/// Dirty, compression type and extended L2 entries: qemu-img reads these.
const KNOWN: u64 = 1 | CORRUPT | EXTERNAL_DATA | 1 << 3 | 1 << 4;

/// Larger ones are not disks of this world; QEMU's own limit is higher.
const MAX_VIRTUAL_SIZE: u64 = 1 << 50;
/// As in QEMU.
const MAX_L1_BYTES: u64 = 32 << 20;
const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
const MAX_SNAPSHOTS: u32 = 65536;

/// Why a qcow2 image is refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Qcow2Fault {
    /// Its header could not be read.
    #[error("its header cannot be read: check the disk below it")]
    Read(#[source] io::Error),
    /// It ends before its header does.
    #[error("it ends within its header: it was cut; fetch or make it anew")]
    Truncated,
    /// It is not version 2 or 3.
    #[error("its version is {0}, and only 2 and 3 are known: convert it with qemu-img first")]
    Version(u32),
    /// It needs another file.
    #[error("it has a backing file, which would not come along: flatten it with qemu-img convert")]
    BackingFile,
    /// Its data is in another file.
    #[error("its data is in another file, which would not come along: convert it to one file")]
    DataFile,
    /// It is encrypted.
    #[error("it is encrypted: decrypt it with qemu-img convert first")]
    Encrypted,
    /// It says of itself that it is corrupt.
    #[error("it is marked as corrupt: repair it with qemu-img check -r all")]
    Corrupt,
    /// It needs features that nobody knows.
    #[error("it has unknown features ({0:#x}): convert it with an older qemu-img first")]
    Features(u64),
    /// It is larger than any disk.
    #[error("it claims to be a disk of {0} bytes: it is damaged, or made to deceive")]
    Absurd(u64),
    /// A field of its header cannot be right.
    #[error("its header's {0} is out of bounds: it is damaged, or made to deceive; make it anew")]
    Bounds(&'static str),
}

use Qcow2Fault as Fault;

/// Checks the header of an image of so many bytes, and returns the size of its disk.
pub(crate) fn virtual_size(file: &File, length: u64) -> Result<u64, Fault> {
    let mut first = vec![0; 112];
    let count = read_up_to(file, &mut first, 0).map_err(Fault::Read)?;
    first.truncate(count);
    let header = Header::parse(&first)?;
    header.check(length)?;
    let mut cluster = vec![0; header.cluster_size() as usize];
    let count = read_up_to(file, &mut cluster, 0).map_err(Fault::Read)?;
    check_extensions(&cluster[..count], header.length as usize)?;
    Ok(header.size)
}

struct Header {
    backing_offset: u64,
    cluster_bits: u32,
    size: u64,
    encryption: u32,
    l1_entries: u32,
    l1_offset: u64,
    refcount_offset: u64,
    refcount_clusters: u32,
    snapshots: u32,
    incompatible: u64,
    length: u32,
}

impl Header {
    fn parse(bytes: &[u8]) -> Result<Self, Fault> {
        let version = word(bytes, 4)?;
        if !matches!(version, 2 | 3) {
            return Err(Fault::Version(version));
        }
        let third = version == 3;
        Ok(Self {
            backing_offset: long(bytes, 8)?,
            cluster_bits: word(bytes, 20)?,
            size: long(bytes, 24)?,
            encryption: word(bytes, 32)?,
            l1_entries: word(bytes, 36)?,
            l1_offset: long(bytes, 40)?,
            refcount_offset: long(bytes, 48)?,
            refcount_clusters: word(bytes, 56)?,
            // The offset of the snapshots comes next; a header without it is cut.
            snapshots: long(bytes, 64).and(word(bytes, 60))?,
            incompatible: if third { long(bytes, 72)? } else { 0 },
            length: if third { word(bytes, 100)? } else { 72 },
        })
    }

    fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    fn check(&self, length: u64) -> Result<(), Fault> {
        self.check_features()?;
        self.check_size()?;
        self.check_tables(length)
    }

    fn check_features(&self) -> Result<(), Fault> {
        match () {
            () if self.backing_offset != 0 => Err(Fault::BackingFile),
            () if self.encryption != 0 => Err(Fault::Encrypted),
            () if self.incompatible & EXTERNAL_DATA != 0 => Err(Fault::DataFile),
            () if self.incompatible & CORRUPT != 0 => Err(Fault::Corrupt),
            () if self.incompatible & !KNOWN != 0 => {
                Err(Fault::Features(self.incompatible & !KNOWN))
            }
            () => Ok(()),
        }
    }

    fn check_size(&self) -> Result<(), Fault> {
        if !(9..=21).contains(&self.cluster_bits) {
            return Err(Fault::Bounds("cluster size"));
        }
        if self.size > MAX_VIRTUAL_SIZE {
            return Err(Fault::Absurd(self.size));
        }
        // Each L1 entry leads to a cluster of L2 entries of 8 bytes (16 if extended), each of
        // which leads to a cluster of data.
        let entry = if self.incompatible & 1 << 4 != 0 { 16 } else { 8 };
        let covered = self.cluster_size() / entry * self.cluster_size();
        if u64::from(self.l1_entries) < self.size.div_ceil(covered) {
            return Err(Fault::Bounds("L1 table size"));
        }
        Ok(())
    }

    fn check_tables(&self, length: u64) -> Result<(), Fault> {
        let l1 = u64::from(self.l1_entries) * 8;
        let refcounts = u64::from(self.refcount_clusters) * self.cluster_size();
        let within = |offset: u64, size: u64| {
            offset.is_multiple_of(self.cluster_size())
                && offset.checked_add(size).is_some_and(|end| end <= length)
        };
        let fault = match () {
            () if l1 > MAX_L1_BYTES || !within(self.l1_offset, l1) => "L1 table",
            () if refcounts > MAX_REFCOUNT_TABLE_BYTES
                || !within(self.refcount_offset, refcounts) =>
            {
                "refcount table"
            }
            () if self.snapshots > MAX_SNAPSHOTS => "number of snapshots",
            () if u64::from(self.length) > self.cluster_size() => "length",
            () if self.length < 72 => "length",
            () => return Ok(()),
        };
        Err(Fault::Bounds(fault))
    }
}

/// Walks the header's extensions, which lie in the first cluster.
fn check_extensions(cluster: &[u8], mut offset: usize) -> Result<(), Fault> {
    while offset + 8 <= cluster.len() {
        let (kind, length) = (word(cluster, offset)?, word(cluster, offset + 4)? as usize);
        match kind {
            0 => return Ok(()),
            BACKING_FORMAT => return Err(Fault::BackingFile),
            DATA_FILE_NAME => return Err(Fault::DataFile),
            CRYPTO => return Err(Fault::Encrypted),
            _ if length > cluster.len() - offset - 8 => return Err(Fault::Bounds("extensions")),
            _ => offset += 8 + length.next_multiple_of(8),
        }
    }
    Ok(())
}

fn word(bytes: &[u8], offset: usize) -> Result<u32, Fault> {
    let bytes = bytes.get(offset..offset + 4).and_then(|it| it.try_into().ok());
    bytes.map(u32::from_be_bytes).ok_or(Fault::Truncated)
}

fn long(bytes: &[u8], offset: usize) -> Result<u64, Fault> {
    let bytes = bytes.get(offset..offset + 8).and_then(|it| it.try_into().ok());
    bytes.map(u64::from_be_bytes).ok_or(Fault::Truncated)
}
