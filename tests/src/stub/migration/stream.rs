//! What the two stubs of a migration say to each other: frames of our own.
//!
//! ```text
//! main:     MAGIC  Header  Pages* Sync  Pages* Sync ...  Pages* Sync  Device  End
//! multifd:  CHANNEL        Pages* Sync  Pages* Sync ...  Pages* Sync
//! back:                                                        one byte: loaded
//! ```
//!
//! With multifd the pages go over the channels. All channels stop at each
//! [`Frame::Sync`] until the main one has come to it too: a page that is sent
//! again never overtakes itself. Each frame is its kind (1 byte), its length
//! (4 bytes, big-endian) and its body.

use crate::stub::guest::{PAGE, Page};
use serde::{Deserialize, Serialize};
use std::io::{self, Read};

/// The main connection begins with it.
pub const MAGIC: [u8; 8] = *b"STUBQEVM";
/// The others begin with it.
pub const CHANNEL: [u8; 8] = *b"STUBQECH";
/// The longest body that is read, in bytes.
const LONGEST: u32 = 64 << 20;

/// What the source has, and how it will send it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// Memory: KiB that `-m` asked for, and MiB that the guest really has.
    pub memory: [u64; 2],
    /// Connections beside the main one.
    pub channels: u64,
    /// Whether it waits for the target's last word.
    pub return_path: bool,
}

/// What moves while the guest stands still.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// How many disks the guest has.
    pub disks: usize,
    /// The run state before the switchover.
    pub state: String,
    /// The guest's own state.
    pub guest: Vec<u8>,
}

/// One message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    Header(Header),
    Pages(Vec<Page>),
    Sync,
    Device(Device),
    End,
}

impl Frame {
    /// Its bytes.
    pub fn encode(&self) -> Vec<u8> {
        let (kind, body) = match self {
            Self::Header(header) => (1, json(header)),
            Self::Pages(pages) => (2, encode_pages(pages)),
            Self::Sync => (3, Vec::new()),
            Self::Device(device) => (4, json(device)),
            Self::End => (5, Vec::new()),
        };
        let mut bytes = vec![kind];
        bytes.extend((body.len() as u32).to_be_bytes());
        bytes.extend_from_slice(&body);
        bytes
    }

    /// Reads one.
    ///
    /// # Errors
    /// The stream's, or that it is no frame.
    pub fn read(from: &mut impl Read) -> io::Result<Self> {
        let mut head = [0; 5];
        from.read_exact(&mut head)?;
        let len = u32::from_be_bytes([head[1], head[2], head[3], head[4]]);
        if len > LONGEST {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut body = vec![0; len as usize];
        from.read_exact(&mut body)?;
        match head[0] {
            1 => Ok(Self::Header(serde_json::from_slice(&body)?)),
            2 => decode_pages(&body).map(Self::Pages),
            3 => Ok(Self::Sync),
            4 => Ok(Self::Device(serde_json::from_slice(&body)?)),
            5 => Ok(Self::End),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

fn json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("plain numbers and text")
}

fn encode_pages(pages: &[Page]) -> Vec<u8> {
    let mut body = Vec::with_capacity(pages.len() * (5 + PAGE));
    for page in pages {
        body.extend_from_slice(&page.index.to_be_bytes());
        body.push(page.bytes.is_some().into());
        body.extend_from_slice(page.bytes.as_deref().unwrap_or_default());
    }
    body
}

fn decode_pages(mut body: &[u8]) -> io::Result<Vec<Page>> {
    let short = || io::Error::from(io::ErrorKind::InvalidData);
    let mut pages = Vec::new();
    while !body.is_empty() {
        let (index, rest) = body.split_first_chunk::<4>().ok_or_else(short)?;
        let (whole, rest) = rest.split_first().ok_or_else(short)?;
        let len = if *whole == 1 { PAGE } else { 0 };
        let (bytes, rest) = rest.split_at_checked(len).ok_or_else(short)?;
        let bytes = (*whole == 1).then(|| bytes.to_vec());
        pages.push(Page { index: u32::from_be_bytes(*index), bytes });
        body = rest;
    }
    Ok(pages)
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn every_frame_reads_back_and_a_cut_one_is_an_error() {
        let pages = vec![
            Page { index: 7, bytes: None },
            Page { index: 1 << 20, bytes: Some(vec![3; PAGE]) },
        ];
        for frame in [
            Frame::Header(Header { memory: [64, 4], channels: 2, return_path: true }),
            Frame::Pages(pages),
            Frame::Sync,
            Frame::Device(Device { disks: 1, state: "running".into(), guest: vec![0, 255] }),
            Frame::End,
        ] {
            let bytes = frame.encode();
            assert_eq!(Frame::read(&mut &bytes[..]).unwrap(), frame);
            Frame::read(&mut &bytes[..bytes.len() - 1]).unwrap_err();
        }
        Frame::read(&mut &[9, 0, 0, 0, 0][..]).unwrap_err();
        Frame::read(&mut &[2, 255, 255, 255, 255][..]).unwrap_err();
    }
}
