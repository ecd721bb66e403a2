//! Bytes of a stream between two offsets, in the pieces they were read in.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};

/// Smaller pieces are joined, so that a queue of single bytes costs little more than them.
const SMALL: usize = 4 << 10;

/// The bytes of a stream from offset `start` to `end`. Pure.
#[derive(Debug, Default)]
pub(super) struct Queue {
    pieces: VecDeque<(u64, Bytes)>,
    start: u64,
    end: u64,
}

impl Queue {
    pub(super) fn start(&self) -> u64 {
        self.start
    }

    pub(super) fn end(&self) -> u64 {
        self.end
    }

    pub(super) fn len(&self) -> u64 {
        self.end - self.start
    }

    /// Appends at `end`.
    pub(super) fn push(&mut self, piece: Bytes) {
        if piece.is_empty() {
            return;
        }
        let at = self.end;
        self.end += piece.len() as u64;
        match self.pieces.back_mut() {
            Some((_, last)) if last.len() + piece.len() <= SMALL => {
                let mut joined = BytesMut::with_capacity(SMALL);
                joined.extend_from_slice(last);
                joined.extend_from_slice(&piece);
                *last = joined.freeze();
            }
            _ => self.pieces.push_back((at, piece)),
        }
    }

    /// Drops what lies before `offset`, which is at most `end`.
    pub(super) fn advance_to(&mut self, offset: u64) {
        self.start = offset.clamp(self.start, self.end);
        while self.pieces.front().is_some_and(|(at, p)| at + p.len() as u64 <= self.start) {
            self.pieces.pop_front();
        }
    }

    /// Up to `most` bytes from `offset` on, in at most `pieces` pieces, without copying.
    pub(super) fn slices(&self, offset: u64, most: u64, pieces: usize) -> Vec<Bytes> {
        let first = self.pieces.partition_point(|(at, p)| at + p.len() as u64 <= offset);
        let mut slices = Vec::new();
        let mut left = most.min(self.end.saturating_sub(offset.max(self.start)));
        for (at, piece) in self.pieces.range(first..).take(pieces) {
            // Below the length of a piece, and so within usize.
            let skip = offset.saturating_sub(*at) as usize;
            let take = (piece.len() - skip).min(usize::try_from(left).unwrap_or(usize::MAX));
            if take == 0 {
                break;
            }
            slices.push(piece.slice(skip..skip + take));
            left -= take as u64;
        }
        slices
    }
}
