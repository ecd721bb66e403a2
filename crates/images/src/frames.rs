//! How a disk goes from one node to another: what is not zero of it, piece by piece.
//!
//! ```text
//! data: offset (8 bytes), length (4), bytes    offsets rise; 1 to PIECE bytes
//! end:  size of the disk (8 bytes), 0 (4)
//! ```
//!
//! Numbers are little-endian. What no frame covers reads as zeros. Without its end, a disk is not
//! whole.

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};

use crate::sparse::{PIECE, runs};

/// Bytes before each frame's data.
const HEAD: usize = 12;

/// A frame as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Frame {
    /// At this offset there is this.
    Data(u64, Bytes),
    /// All has been sent.
    End,
}

/// The frames of a piece of a disk; none if all of it is zero.
pub(crate) fn of_piece(offset: u64, piece: &[u8]) -> Bytes {
    let mut out = BytesMut::new();
    for (range, _) in runs(piece).into_iter().filter(|(_, data)| *data) {
        out.put_u64_le(offset + range.start as u64);
        out.put_u32_le(range.len() as u32);
        out.extend_from_slice(&piece[range]);
    }
    out.freeze()
}

/// The last frame of a disk.
pub(crate) fn end(size: u64) -> Bytes {
    let mut out = BytesMut::with_capacity(HEAD);
    out.put_u64_le(size);
    out.put_u32_le(0);
    out.freeze()
}

/// Takes frames out of a stream. Keeps no more than one frame and what was fed last.
pub(crate) struct Frames {
    buffer: BytesMut,
    size: u64,
    position: u64,
}

impl Frames {
    /// For a disk of a size, of which everything before a position is known.
    pub fn new(size: u64, position: u64) -> Self {
        Self { buffer: BytesMut::new(), size, position }
    }

    /// Takes more of the stream.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next frame, if all of it is here. The error says what is wrong with it.
    pub fn take(&mut self) -> Result<Option<Frame>, &'static str> {
        let Some(mut head) = self.buffer.get(..HEAD) else { return Ok(None) };
        let (offset, length) = (head.get_u64_le(), head.get_u32_le() as usize);
        if length == 0 {
            return match offset == self.size {
                true => Ok(Some(Frame::End)),
                false => Err("the disk's size has changed"),
            };
        }
        let end = offset.checked_add(length as u64);
        if length > PIECE || offset < self.position || end.is_none_or(|end| end > self.size) {
            return Err("a piece is not of this disk");
        }
        if self.buffer.len() < HEAD + length {
            return Ok(None);
        }
        self.buffer.advance(HEAD);
        self.position = offset + length as u64;
        Ok(Some(Frame::Data(offset, self.buffer.split_to(length).freeze())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sparse::BLOCK;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_disk_comes_out_as_it_went_in_however_it_is_cut(
            blocks in prop::collection::vec(0u8..3, 1..40),
            tail in 1usize..BLOCK,
            cuts in prop::collection::vec(1usize..9000, 1..20),
        ) {
            let mut disk: Vec<u8> =
                blocks.iter().flat_map(|byte| std::iter::repeat_n(*byte, BLOCK)).collect();
            disk.truncate(disk.len() - tail);
            let size = disk.len() as u64;
            let mut sent = of_piece(0, &disk).to_vec();
            let data = disk.chunks(BLOCK).filter(|block| block.iter().any(|byte| *byte != 0));
            prop_assert!(sent.len() <= data.map(|block| block.len() + HEAD).sum(), "zeros are sent");
            sent.extend(end(size));
            let (mut frames, mut out) = (Frames::new(size, 0), vec![0; disk.len()]);
            let mut cuts = cuts.into_iter().cycle();
            let mut rest = &sent[..];
            let mut ended = false;
            while !rest.is_empty() {
                let (now, later) = rest.split_at(cuts.next().unwrap_or(1).min(rest.len()));
                rest = later;
                frames.feed(now);
                while let Some(frame) = frames.take().unwrap() {
                    let Frame::Data(offset, data) = frame else {
                        ended = true;
                        break;
                    };
                    out[offset as usize..][..data.len()].copy_from_slice(&data);
                }
            }
            prop_assert!(ended && out == disk);
        }

        #[test]
        fn nothing_that_comes_leads_out_of_the_disk(
            sent in prop::collection::vec(any::<u8>(), 0..200), size in 0u64..100_000,
            offsets in prop::collection::vec((0u64..200_000, 0u32..3_000_000), 0..4),
        ) {
            let mut all = BytesMut::new();
            for (offset, length) in offsets {
                all.put_u64_le(offset);
                all.put_u32_le(length);
                all.put_bytes(1, (length as usize).min(5000));
            }
            all.extend_from_slice(&sent);
            let mut frames = Frames::new(size, 0);
            frames.feed(&all);
            while let Ok(Some(Frame::Data(offset, data))) = frames.take() {
                prop_assert!(!data.is_empty() && offset + data.len() as u64 <= size);
            }
        }
    }
}
