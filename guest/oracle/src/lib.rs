//! The guest's own witness: it finds lost writes and lost pages by itself, and
//! shows every pause.
//!
//! The program runs inside the test guest and speaks lines over the second
//! serial port ([`protocol`]). The host asks it to write to disks ([`writer`]),
//! to count in memory ([`memory`]), to make dirt faster than a link
//! ([`dirty`]) and to tick ([`ticker`]); afterwards `check` compares what is
//! there with what must be there.
//!
//! ```text
//!  host                      ttyS1                     guest
//!  `write start dev=…`   -------------->  serve  --->  one worker per job
//!  `OK write start`      <--------------  output <---  acknowledgements,
//!  `W 1`, `W 2`, `T 1 …` <--------------  (one         ticks, losses
//!  `check`               -------------->   writer)
//!  `CHECK … lost=0 …`    <--------------
//! ```
//!
//! [`block`] and [`page`] say which bytes lie on disk and in memory, so that the
//! host can check a disk at rest ([`image`]) and a test can forge a stale page.

pub mod block;
pub mod dirty;
pub mod image;
pub mod memory;
pub mod output;
pub mod page;
pub mod protocol;
pub mod region;
pub mod serve;
pub mod ticker;
pub mod worker;
pub mod writer;
