//! What one written block looks like, and which slot the n-th write goes to.
//!
//! A region of `slots` blocks is written for ever. Write `n` (the first is 1)
//! goes to [`slot_of`]`(seed, n, slots)`, a pure function, so that anyone who
//! knows the seed and the highest acknowledged `n` knows what each slot must
//! hold. All integers are little-endian:
//!
//! | bytes | content |
//! |---|---|
//! | 0..8 | magic `GODWITBK` |
//! | 8..16 | seed |
//! | 16..24 | sequence `n` |
//! | 24..32 | slot |
//! | 32..40 | XXH3-64 of the whole block with these eight bytes zero |
//! | 40.. | filler that depends on seed and `n`, and does not compress |

use xxhash_rust::xxh3::xxh3_64;

/// The first eight bytes of every written block.
pub const MAGIC: [u8; 8] = *b"GODWITBK";
/// Bytes before the filler; a block is never smaller.
pub const HEADER: usize = 40;

/// What a block on disk says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// No block of ours: never written, or overwritten by something else.
    Foreign,
    /// Our magic, but the checksum does not match: written in part, or mangled.
    Torn,
    /// A whole block.
    Whole {
        /// The run that wrote it.
        seed: u64,
        /// The number of the write.
        sequence: u64,
        /// Where it says that it belongs.
        slot: u64,
    },
}

/// The slot of write `n` in a region of `slots` blocks.
///
/// Pseudo-random, so that neighbours in time are not neighbours on disk.
/// `slots` must not be 0.
pub fn slot_of(seed: u64, n: u64, slots: u64) -> u64 {
    mix(seed ^ mix(n)) % slots
}

/// For each slot the number of the newest of the writes `1..=last`, 0 if none.
pub fn newest_per_slot(seed: u64, last: u64, slots: u64) -> Vec<u64> {
    let mut newest = vec![0; slots as usize];
    for n in 1..=last {
        newest[slot_of(seed, n, slots) as usize] = n;
    }
    newest
}

/// Fills `block` with write `sequence` of the run `seed`.
pub fn encode(block: &mut [u8], seed: u64, sequence: u64, slot: u64) {
    block[..8].copy_from_slice(&MAGIC);
    put(block, 8, seed);
    put(block, 16, sequence);
    put(block, 24, slot);
    put(block, 32, 0);
    fill(&mut block[HEADER..], seed ^ mix(sequence));
    let sum = xxh3_64(block);
    put(block, 32, sum);
}

/// Reads what `block` says of itself. The bytes are scratch afterwards.
pub fn decode(block: &mut [u8]) -> Found {
    if block.len() < HEADER || block[..8] != MAGIC {
        return Found::Foreign;
    }
    let sum = get(block, 32);
    put(block, 32, 0);
    if xxh3_64(block) != sum {
        return Found::Torn;
    }
    Found::Whole { seed: get(block, 8), sequence: get(block, 16), slot: get(block, 24) }
}

/// Fills `bytes` with a stream that depends on `seed` and does not compress.
pub fn fill(bytes: &mut [u8], seed: u64) {
    let mut state = mix(seed) | 1;
    for chunk in bytes.chunks_mut(8) {
        // xorshift64: three shifts per word, so that an emulated CPU keeps up.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        chunk.copy_from_slice(&state.to_le_bytes()[..chunk.len()]);
    }
}

/// SplitMix64's finaliser: every bit of the input moves every bit of the output.
pub fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

pub(crate) fn get(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

pub(crate) fn put(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_tells_who_wrote_it_and_any_flipped_bit_is_seen() {
        let mut written = vec![0; 4096];
        encode(&mut written, 7, 42, 3);
        assert_eq!(decode(&mut written.clone()), Found::Whole { seed: 7, sequence: 42, slot: 3 });
        for byte in (8..4096).step_by(61) {
            let mut bad = written.clone();
            bad[byte] ^= 0x10;
            assert_eq!(decode(&mut bad), Found::Torn, "byte {byte}");
        }
        assert_eq!(decode(&mut vec![0; 4096]), Found::Foreign);
    }

    #[test]
    fn the_schedule_reaches_every_slot_and_newest_per_slot_agrees_with_it() {
        let (seed, slots, last) = (9, 64, 2000);
        let newest = newest_per_slot(seed, last, slots);
        assert!(newest.iter().all(|&n| n > 0), "2000 writes leave no slot of 64 unwritten");
        for (slot, &n) in newest.iter().enumerate() {
            assert_eq!(slot_of(seed, n, slots), slot as u64);
            assert!((n + 1..=last).all(|later| slot_of(seed, later, slots) != slot as u64));
        }
    }
}
