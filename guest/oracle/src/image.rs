//! The host's look at a disk at rest: is every acknowledged write there?

use std::fs::File;
use std::io;
use std::path::Path;

use crate::block::newest_per_slot;
use crate::protocol::Range;
use crate::region::{self, Region, Rule};
pub use crate::region::{Comparison, Loss};

/// More acknowledged writes than any run makes; bounds the time it takes.
const MAX_ACKED: u64 = 1 << 32;

/// Why an image cannot be verified.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The range makes no region.
    #[error(transparent)]
    Region(#[from] region::Error),
    /// A number that no run reaches.
    #[error("acked={0} is beyond any run: give the n of the last `W <n>` line")]
    Acked(u64),
    /// The image cannot be read to the region's end.
    #[error("cannot read the region from {image}: is it a raw image, as long as the guest's disk?")]
    Read {
        /// The file.
        image: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Compares the raw image `range.dev` with a run of the guest's writer.
///
/// `acked` is the highest `n` of the `W <n>` lines. Each slot must hold the
/// newest acknowledged write that went there, or a later one; `lost` is told of
/// each that does not.
///
/// # Errors
/// When the arguments make no sense, or the image cannot be read.
pub fn verify(
    range: &Range,
    block: u64,
    seed: u64,
    acked: u64,
    lost: impl FnMut(Loss),
) -> Result<Comparison, Error> {
    let region = Region::new(range, block)?;
    if acked > MAX_ACKED {
        return Err(Error::Acked(acked));
    }
    let read = |source| Error::Read { image: range.dev.clone(), source };
    let image = File::open(Path::new(&range.dev)).map_err(read)?;
    let expected = newest_per_slot(seed, acked, region.slots);
    region.compare(&image, seed, &expected, Rule::AtLeast, lost).map_err(read)
}
