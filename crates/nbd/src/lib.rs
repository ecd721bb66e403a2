//! NBD client: reads, block status, dirty bitmaps. Never writes.
//!
//! Speaks the fixed newstyle handshake and structured replies, as
//! <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md> has them and QEMU since
//! 2.12 serves them.
//!
//! ```text
//!  Client                                             server (qemu-nbd, QEMU)
//!         ◀── NBDMAGIC IHAVEOPT, fixed newstyle ─────
//!         ─── STRUCTURED_REPLY ──▶  ◀── ACK ─────────
//!         ─── SET_META_CONTEXT ──▶  ◀── id = name, … ACK     base:allocation,
//!         ─── GO ────────────────▶  ◀── INFO, … ACK ─        qemu:dirty-bitmap:NAME
//!  read     ─── READ #1 ─────────▶
//!  extents  ─── BLOCK_STATUS #2 ─▶
//!         ◀── #2: runs of a context ─────────────────        requests overlap,
//!         ◀── #1: data, hole, …, done ───────────────        replies come in any order
//!         ─── DISC ──────────────▶
//! ```
//!
//! The server is not trusted: every length it sends is bounded and checked against what was
//! asked. A chunk outside the request, an overlap, a byte that no chunk covered, or a run of no
//! length ends the connection with a [`Violation`].
//!
//! ```no_run
//! # async fn run() -> Result<(), Box<dyn std::error::Error>> {
//! use std::time::Duration;
//!
//! let wait = Duration::from_secs(30);
//! let bitmap = nbd::dirty_bitmap("round-1");
//! let options = nbd::Options::new("disk").context(&bitmap);
//! let client = nbd::Client::connect("/run/vm/nbd.sock", options, wait).await?;
//! let size = client.export().size;
//! for extent in client.extents(&bitmap, 0..size, 100_000, wait).await? {
//!     if extent.flags & nbd::DIRTY != 0 {
//!         let buffer = vec![0; extent.len.min(1 << 20) as usize];
//!         let filled = client.read(extent.offset, buffer, wait).await?;
//!         println!("{} bytes at {}", filled.buffer.len(), extent.offset);
//!     }
//! }
//! client.disconnect(wait).await?;
//! # Ok(())
//! # }
//! ```

pub mod client;
pub mod connect;

mod connection;
mod errno;
mod extents;
mod handshake;
mod reply;
mod wire;

pub use client::{Client, Error, Filled, Kind, Request};
pub use connect::{BlockSize, Export, Options};
pub use connection::Closed;
pub use errno::Errno;
pub use extents::Extent;
pub use wire::Violation;

/// The context that tells holes from data: [`HOLE`] and [`ZERO`].
pub const BASE_ALLOCATION: &str = "base:allocation";
/// `base:allocation`: nothing is allocated there.
pub const HOLE: u32 = 1;
/// `base:allocation`: reads as zeros.
pub const ZERO: u32 = 2;
/// `qemu:dirty-bitmap:NAME`: written to since the bitmap began.
pub const DIRTY: u32 = 1;

/// The context of a dirty bitmap that QEMU exports.
pub fn dirty_bitmap(name: &str) -> String {
    format!("qemu:dirty-bitmap:{name}")
}
