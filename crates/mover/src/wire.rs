//! What travels on a disk stream.
//!
//! ```text
//! source                                  target
//!   Data, Zero, Compare (seq n) ------->   written, zeroed, hashed
//!   Flush (seq n) ---------------------->  fsync now
//!   <------------------------- Durable(n)  everything up to n is on stable storage
//!   <---------------------- Differ(n, ..)  blocks of Compare n that are not the same
//!   <------------------------ Failed(..)   the target cannot go on, and why
//! ```
//!
//! Sequence numbers count frames of one stream from 1 and never restart: a
//! stream that reconnects goes on counting. All integers are little-endian.

use crate::extent::Extent;
use std::io::{self, Read, Write};

/// Most bytes of disk in one `Data` or `Compare` frame.
pub const CHUNK: u64 = 1 << 20;
/// Bytes of disk behind one hash of a `Compare` frame, one bit of a `Differ`.
pub const COMPARE_BLOCK: u64 = 64 << 10;
/// Most bytes of disk in one `Zero` frame.
pub const ZERO_MAX: u64 = 1 << 40;
/// Bytes of one block hash (blake3).
pub const HASH: usize = 32;
/// Longest text of a `Failed` reply.
pub const MAX_TEXT: usize = 4096;
const HEADER: usize = 48;
const REPLY: usize = 32;

/// How the payload of a `Data` frame is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Codec {
    /// Not at all.
    None,
    /// LZ4 block.
    Lz4,
    /// Zstandard, level 1.
    Zstd,
}

impl Codec {
    fn from_wire(byte: u8) -> io::Result<Self> {
        Ok(match byte {
            0 => Codec::None,
            1 => Codec::Lz4,
            2 => Codec::Zstd,
            _ => return Err(invalid(format!("unknown codec {byte}"))),
        })
    }
}

/// What a frame asks of the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Write the payload at the extent.
    Data {
        /// Compression of the payload.
        codec: Codec,
        /// xxh3-128 of the uncompressed bytes: end to end against everything between the two movers.
        hash: u128,
    },
    /// Make the extent read as zeros.
    Zero,
    /// Compare own blocks with the hashes in the payload, one per `COMPARE_BLOCK`.
    Compare,
    /// Make everything so far durable and say so.
    Flush,
}

/// A frame's head; its payload of `payload` bytes follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// Number of the frame in its stream, from 1.
    pub seq: u64,
    /// Index of the disk in the move's list.
    pub disk: u16,
    /// The part of the disk.
    pub extent: Extent,
    /// What to do with it.
    pub kind: Kind,
    /// Bytes that follow the head.
    pub payload: u32,
}

/// What the target says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// All frames up to `seq` are on stable storage.
    Durable {
        /// The last such frame.
        seq: u64,
        /// Nanoseconds that the target has spent writing and syncing for this stream so far.
        busy_ns: u64,
    },
    /// Which blocks of a `Compare` frame are not the same: bit i is block i.
    Differ {
        /// The `Compare` frame.
        seq: u64,
        /// One bit per block.
        blocks: u64,
    },
    /// The target cannot go on.
    Failed(String),
}

fn invalid(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("disk stream: {what}"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

/// Writes a frame's head and payload.
///
/// # Errors
/// Those of the writer.
pub fn write_frame(to: &mut impl Write, head: &Head, payload: &[u8]) -> io::Result<()> {
    let mut bytes = [0; HEADER];
    let (kind, codec, hash) = match head.kind {
        Kind::Data { codec, hash } => (1, codec as u8, hash),
        Kind::Zero => (2, 0, 0),
        Kind::Compare => (3, 0, 0),
        Kind::Flush => (4, 0, 0),
    };
    bytes[0] = kind;
    bytes[1] = codec;
    bytes[2..4].copy_from_slice(&head.disk.to_le_bytes());
    bytes[4..8].copy_from_slice(&head.payload.to_le_bytes());
    bytes[8..16].copy_from_slice(&head.seq.to_le_bytes());
    bytes[16..24].copy_from_slice(&head.extent.offset.to_le_bytes());
    bytes[24..32].copy_from_slice(&head.extent.len.to_le_bytes());
    bytes[32..48].copy_from_slice(&hash.to_le_bytes());
    to.write_all(&bytes)?;
    to.write_all(payload)
}

/// Reads a frame's head, and refuses one whose lengths do not fit its kind.
///
/// # Errors
/// `InvalidData` names what is wrong; else those of the reader.
pub fn read_head(from: &mut impl Read) -> io::Result<Head> {
    let mut bytes = [0; HEADER];
    from.read_exact(&mut bytes)?;
    let extent = Extent::new(u64_at(&bytes, 16), u64_at(&bytes, 24));
    let mut hash = [0; 16];
    hash.copy_from_slice(&bytes[32..48]);
    let kind = match bytes[0] {
        1 => Kind::Data { codec: Codec::from_wire(bytes[1])?, hash: u128::from_le_bytes(hash) },
        2 => Kind::Zero,
        3 => Kind::Compare,
        4 => Kind::Flush,
        other => return Err(invalid(format!("unknown frame kind {other}"))),
    };
    let payload = u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
    let head = Head {
        seq: u64_at(&bytes, 8),
        disk: u16::from_le_bytes([bytes[2], bytes[3]]),
        extent,
        kind,
        payload,
    };
    check(&head)?;
    Ok(head)
}

fn check(head: &Head) -> io::Result<()> {
    let Head { extent, payload, .. } = *head;
    if extent.offset.checked_add(extent.len).is_none() {
        return Err(invalid(format!("extent {extent:?} wraps around")));
    }
    let (longest, expected) = match head.kind {
        // An encoder falls back to `None` when it does not shrink the data.
        Kind::Data { codec: Codec::None, .. } => (CHUNK, extent.len..=extent.len),
        Kind::Data { .. } => (CHUNK, 1..=extent.len),
        Kind::Zero => (ZERO_MAX, 0..=0),
        Kind::Compare => {
            let hashes = extent.len.div_ceil(COMPARE_BLOCK) * HASH as u64;
            (CHUNK, hashes..=hashes)
        }
        Kind::Flush => (0, 0..=0),
    };
    if extent.len > longest || !expected.contains(&u64::from(payload)) {
        return Err(invalid(format!(
            "a {:?} frame of {} bytes with a payload of {payload}",
            head.kind, extent.len
        )));
    }
    Ok(())
}

/// Writes a reply.
///
/// # Errors
/// Those of the writer.
pub fn write_reply(to: &mut impl Write, reply: &Reply) -> io::Result<()> {
    let mut bytes = [0; REPLY];
    let mut text: &[u8] = &[];
    let (kind, a, b) = match reply {
        Reply::Durable { seq, busy_ns } => (1, *seq, *busy_ns),
        Reply::Differ { seq, blocks } => (2, *seq, *blocks),
        Reply::Failed(why) => {
            text = &why.as_bytes()[..why.len().min(MAX_TEXT)];
            (3, text.len() as u64, 0)
        }
    };
    bytes[0] = kind;
    bytes[8..16].copy_from_slice(&a.to_le_bytes());
    bytes[16..24].copy_from_slice(&b.to_le_bytes());
    to.write_all(&bytes)?;
    to.write_all(text)
}

/// Reads a reply.
///
/// # Errors
/// `InvalidData` for an unknown kind or a text that is too long; else those of the reader.
pub fn read_reply(from: &mut impl Read) -> io::Result<Reply> {
    let mut bytes = [0; REPLY];
    from.read_exact(&mut bytes)?;
    let (a, b) = (u64_at(&bytes, 8), u64_at(&bytes, 16));
    match bytes[0] {
        1 => Ok(Reply::Durable { seq: a, busy_ns: b }),
        2 => Ok(Reply::Differ { seq: a, blocks: b }),
        3 if a <= MAX_TEXT as u64 => {
            let mut text = vec![0; a as usize];
            from.read_exact(&mut text)?;
            Ok(Reply::Failed(String::from_utf8_lossy(&text).into_owned()))
        }
        3 => Err(invalid(format!("a failure text of {a} bytes"))),
        other => Err(invalid(format!("unknown reply kind {other}"))),
    }
}
