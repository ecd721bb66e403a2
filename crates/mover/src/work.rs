//! What has yet to be sent, what is on its way, and what is safe. Pure.
//!
//! ```text
//! push -> pending --take--> on its way (stream, seq) --durable--> gone
//!            ^                    |
//!            +---- reconnected ---+   only then is the old connection known to be
//!                                     drained: its frames can no longer overwrite newer ones
//! ```
//!
//! N.B. within a round every byte is pushed once, and a round is pushed only
//! when nothing is pending or on its way: two streams never carry the same byte.

use crate::extent::{Extent, ExtentSet};
use crate::wire::{CHUNK, COMPARE_BLOCK, ZERO_MAX};
use std::collections::VecDeque;

/// How a piece of disk is brought over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Task {
    /// Its bytes are sent. `blank`: the target is known to hold zeros there.
    Copy {
        /// Zeros need not be sent.
        blank: bool,
    },
    /// It is made zero.
    Zero,
    /// Its hashes are sent; the bytes only where they differ.
    Compare,
}

/// A piece of work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Item {
    /// Index of the disk.
    pub disk: u16,
    /// The piece.
    pub extent: Extent,
    /// What to do with it.
    pub task: Task,
}

/// What is not safe at the target yet, of one disk: the state that a later
/// attempt resumes from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Outstanding {
    /// To be sent.
    pub copy: ExtentSet,
    /// To be compared.
    pub compare: ExtentSet,
}

impl Outstanding {
    /// Bytes in it.
    pub fn bytes(&self) -> u64 {
        self.copy.bytes() + self.compare.bytes()
    }
}

#[derive(Debug, Default)]
struct Pending {
    blank: ExtentSet,
    copy: ExtentSet,
    zero: ExtentSet,
    compare: ExtentSet,
}

#[derive(Debug, Default)]
struct Stream {
    seq: u64,
    on_its_way: VecDeque<(u64, Item)>,
    bytes: u64,
    /// Taken and not sent yet.
    in_hand: Option<Item>,
}

impl Stream {
    /// The first `len` bytes of what is in hand have been dealt with.
    fn advance(&mut self, len: u64) {
        let left = self.in_hand.take().filter(|item| item.extent.len > len);
        self.in_hand = left.map(|item| {
            let extent = Extent::new(item.extent.offset + len, item.extent.len - len);
            Item { extent, ..item }
        });
    }
}

/// The work of all disks and streams of a move.
#[derive(Debug)]
pub struct Work {
    disks: Vec<Pending>,
    streams: Vec<Stream>,
    /// Disk to look at first, so that several disks advance together.
    turn: usize,
}

impl Work {
    /// No work yet, for so many disks and streams.
    pub fn new(disks: usize, streams: usize) -> Self {
        Self {
            disks: (0..disks).map(|_| Pending::default()).collect(),
            streams: (0..streams).map(|_| Stream::default()).collect(),
            turn: 0,
        }
    }

    /// Adds work for a disk.
    pub fn push(&mut self, disk: u16, task: Task, extents: &ExtentSet) {
        let Some(pending) = self.disks.get_mut(usize::from(disk)) else { return };
        match task {
            Task::Copy { blank: true } => pending.blank.union_with(extents),
            Task::Copy { blank: false } => pending.copy.union_with(extents),
            Task::Zero => pending.zero.union_with(extents),
            Task::Compare => pending.compare.union_with(extents),
        }
    }

    /// Takes the next piece for a stream, if any is pending. The stream sends
    /// or skips all of it, front to back, before it takes another.
    pub fn take(&mut self, stream: u16) -> Option<Item> {
        let count = self.disks.len();
        for i in 0..count {
            let disk = (self.turn + i) % count;
            if let Some((extent, task)) = self.disks[disk].pop() {
                self.turn = (disk + 1) % count;
                let item = Item { disk: disk as u16, extent, task };
                self.streams[usize::from(stream)].in_hand = Some(item);
                return Some(item);
            }
        }
        None
    }

    /// The number for the next frame of a stream.
    pub fn next_seq(&mut self, stream: u16) -> u64 {
        let stream = &mut self.streams[usize::from(stream)];
        stream.seq += 1;
        stream.seq
    }

    /// The last number given to a frame of a stream.
    pub fn last_seq(&self, stream: u16) -> u64 {
        self.streams[usize::from(stream)].seq
    }

    /// `item`, the front of what the stream has in hand, will be safe when
    /// frame `seq` is: to be said before the frame is sent.
    pub fn sending(&mut self, stream: u16, seq: u64, item: Item) {
        let stream = &mut self.streams[usize::from(stream)];
        stream.advance(item.extent.len);
        stream.bytes += item.extent.len;
        stream.on_its_way.push_back((seq, item));
    }

    /// The next `len` bytes of what the stream has in hand need no sending.
    pub fn skip(&mut self, stream: u16, len: u64) {
        self.streams[usize::from(stream)].advance(len);
    }

    /// Everything up to frame `seq` of `stream` is safe. Returns its bytes;
    /// None when no such frame was ever sent, which only a broken target says.
    pub fn durable(&mut self, stream: u16, seq: u64) -> Option<u64> {
        let stream = &mut self.streams[usize::from(stream)];
        if seq > stream.seq {
            return None;
        }
        let mut bytes = 0;
        while let Some((_, item)) = stream.on_its_way.pop_front_if(|(s, _)| *s <= seq) {
            bytes += item.extent.len;
        }
        stream.bytes -= bytes;
        Some(bytes)
    }

    /// The disk and the extents that `blocks` of the `Compare` frame `seq` stand for.
    pub fn blocks_of(&self, stream: u16, seq: u64, blocks: u64) -> Option<(u16, ExtentSet)> {
        let on_its_way = &self.streams[usize::from(stream)].on_its_way;
        let (_, item) = on_its_way.iter().find(|(s, _)| *s == seq)?;
        let Item { disk, extent, .. } = *item;
        let extents = (0..64)
            .filter(|block| blocks & (1 << block) != 0)
            .map(|block| extent.offset + block * COMPARE_BLOCK)
            .filter(|offset| *offset < extent.end())
            .map(|offset| Extent::new(offset, COMPARE_BLOCK.min(extent.end() - offset)))
            .collect();
        Some((disk, extents))
    }

    /// A stream has a new connection and its old one has ended at the target:
    /// what was on its way is pending again. Returns its bytes.
    pub fn reconnected(&mut self, stream: u16) -> u64 {
        let stream = &mut self.streams[usize::from(stream)];
        let lost = std::mem::take(&mut stream.on_its_way);
        let bytes = std::mem::take(&mut stream.bytes);
        let in_hand = stream.in_hand.take();
        for item in lost.into_iter().map(|(_, item)| item).chain(in_hand) {
            self.put_back(item);
        }
        bytes
    }

    fn put_back(&mut self, item: Item) {
        let one = ExtentSet::from(vec![item.extent]);
        let task = match item.task {
            // Some of it may have been written: blank no longer.
            Task::Copy { .. } => Task::Copy { blank: false },
            other => other,
        };
        self.push(item.disk, task, &one);
    }

    /// Bytes on their way on a stream.
    pub fn on_its_way(&self, stream: u16) -> u64 {
        self.streams[usize::from(stream)].bytes
    }

    /// Bytes pending or on their way.
    pub fn left(&self) -> u64 {
        let pending: u64 = self.disks.iter().map(Pending::bytes).sum();
        let taken = |s: &Stream| s.bytes + s.in_hand.map_or(0, |item| item.extent.len);
        pending + self.streams.iter().map(taken).sum::<u64>()
    }

    /// Bytes pending or on their way, per disk.
    pub fn left_per_disk(&self) -> Vec<u64> {
        self.outstanding().iter().map(Outstanding::bytes).collect()
    }

    /// Whether all that was pushed is safe.
    pub fn is_done(&self) -> bool {
        self.left() == 0
    }

    /// Everything that is not safe, per disk.
    pub fn outstanding(&self) -> Vec<Outstanding> {
        let mut all: Vec<Outstanding> = self.disks.iter().map(Pending::outstanding).collect();
        let on_its_way =
            self.streams.iter().flat_map(|s| s.on_its_way.iter().map(|(_, item)| item));
        for item in on_its_way.chain(self.streams.iter().filter_map(|s| s.in_hand.as_ref())) {
            let disk = &mut all[usize::from(item.disk)];
            match item.task {
                Task::Compare => disk.compare.insert(item.extent),
                Task::Copy { .. } | Task::Zero => disk.copy.insert(item.extent),
            }
        }
        all
    }
}

impl Pending {
    fn pop(&mut self) -> Option<(Extent, Task)> {
        if let Some(extent) = self.zero.pop_front(ZERO_MAX) {
            return Some((extent, Task::Zero));
        }
        if let Some(extent) = self.copy.pop_front(CHUNK) {
            return Some((extent, Task::Copy { blank: false }));
        }
        if let Some(extent) = self.compare.pop_front(CHUNK) {
            return Some((extent, Task::Compare));
        }
        self.blank.pop_front(CHUNK).map(|extent| (extent, Task::Copy { blank: true }))
    }

    fn bytes(&self) -> u64 {
        self.blank.bytes() + self.copy.bytes() + self.zero.bytes() + self.compare.bytes()
    }

    fn outstanding(&self) -> Outstanding {
        let mut copy = self.copy.clone();
        copy.union_with(&self.blank);
        copy.union_with(&self.zero);
        Outstanding { copy, compare: self.compare.clone() }
    }
}
