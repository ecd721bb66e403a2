//! Finding zeros in what was read.

use crate::wire::COMPARE_BLOCK;

/// Splits a chunk into runs of (start, length, all zeros), in units of `COMPARE_BLOCK`.
pub fn runs(raw: &[u8]) -> Vec<(usize, usize, bool)> {
    let mut runs: Vec<(usize, usize, bool)> = Vec::new();
    for (i, block) in raw.chunks(COMPARE_BLOCK as usize).enumerate() {
        let zero = is_zero(block);
        match runs.last_mut() {
            Some((_, len, was)) if *was == zero => *len += block.len(),
            _ => runs.push((i * COMPARE_BLOCK as usize, block.len(), zero)),
        }
    }
    runs
}

/// Whether all bytes are zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    // The first bytes decide nearly always; the rest is compared as one run of memory.
    bytes.iter().take(16).all(|b| *b == 0)
        && bytes.get(16..).is_none_or(|rest| rest == &bytes[..rest.len()])
}
