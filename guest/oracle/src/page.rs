//! What one counted page of memory looks like.
//!
//! Pages are 4096 bytes, aligned to 4096 in the guest's virtual and therefore
//! also in its physical memory. All integers are little-endian:
//!
//! | bytes | content |
//! |---|---|
//! | 0..10 | magic `GODWITPAGE` |
//! | 10..16 | zero |
//! | 16..24 | page index, from 0 |
//! | 24..32 | counter: the round that last visited this page |
//! | 32..4088 | filler that depends on the index only, and does not compress |
//! | 4088..4096 | the counter once more, so that half a page is seen |
//!
//! N.B. the program's own text holds the magic too: only a 4096-aligned magic,
//! followed by six zeros, is a counted page.

use crate::block::{fill, get, put};

/// Bytes of a page.
pub const SIZE: usize = 4096;
/// The first ten bytes of every counted page.
pub const MAGIC: [u8; 10] = *b"GODWITPAGE";

const INDEX: usize = 16;
const COUNTER: usize = 24;
const FILLER: usize = 32;
const COUNTER_AGAIN: usize = SIZE - 8;

/// Makes `page` page number `index`, with its counter at 0.
pub fn init(page: &mut [u8], index: u64) {
    page[..INDEX].fill(0);
    page[..MAGIC.len()].copy_from_slice(&MAGIC);
    put(page, INDEX, index);
    fill(&mut page[FILLER..COUNTER_AGAIN], index);
    set_counter(page, 0);
}

/// Sets both copies of the counter.
pub fn set_counter(page: &mut [u8], counter: u64) {
    put(page, COUNTER, counter);
    put(page, COUNTER_AGAIN, counter);
}

/// The counter of page `index`, or `None` when head or tail are not what they
/// must be. Cheap: reads 40 bytes.
pub fn counter(page: &[u8], index: u64) -> Option<u64> {
    let counter = get(page, COUNTER);
    let whole = page[..MAGIC.len()] == MAGIC
        && get(page, INDEX) == index
        && get(page, COUNTER_AGAIN) == counter;
    whole.then_some(counter)
}

/// As [`counter`], but the filler is compared too, through `scratch` (one page).
pub fn counter_checked(page: &[u8], index: u64, scratch: &mut [u8]) -> Option<u64> {
    let found = counter(page, index)?;
    init(scratch, index);
    set_counter(scratch, found);
    (page == scratch).then_some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_keeps_its_counter_and_a_changed_byte_anywhere_is_seen() {
        let (mut page, mut scratch) = (vec![0; SIZE], vec![0; SIZE]);
        init(&mut page, 5);
        set_counter(&mut page, 9);
        assert_eq!(counter(&page, 5), Some(9));
        assert_eq!(counter_checked(&page, 5, &mut scratch), Some(9));
        assert_eq!(counter(&page, 6), None, "another page's content");
        for byte in 0..SIZE {
            let mut bad = page.clone();
            bad[byte] ^= 1;
            assert_eq!(counter_checked(&bad, 5, &mut scratch), None, "byte {byte}");
        }
    }
}
